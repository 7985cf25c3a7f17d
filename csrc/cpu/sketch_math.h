// Where a value is counted in a loss sketch, and the integers that its sums are made of. The layout, and why it is so,
// is described in src/xentile/_layout.py; all backends compute equal integers from equal values.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace xentile::sketch {

constexpr int kMinExponent = -24, kMaxExponent = 8;
constexpr double kLimit = 0x1p24, kWeighedLimit = 0x1p30;  // of values, and of these times their weights, in the sums

enum Column {
  // values outside the bins
  kZero,
  kOverflow,
  kInf,
  kNaN,
  // tokens without a value
  kIgnored,
  kOutOfRange,
  kBadGroup,
  // limbs of sums
  kSumLo,
  kSumHi,
  kSquareLo,
  kSquareMid,
  kSquareHi,
  // extremes: these merge by maximum, all others by addition
  kMaxKey,
  kMinKey,
  kSpecial = 16  // the first bin
};

inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The bins for M mantissa bits.
struct Layout {
  int bins, shift, first_key;

  int64_t width() const { return kSpecial + bins; }
  float edge(int bin) const { return float_of((bin + first_key) << shift); }

  int column_of(float x) const {
    const int bin = (bits_of(x) >> shift) - first_key;
    if (bin >= 0 && bin < bins) return kSpecial + bin;
    if (std::isnan(x) || x == -INFINITY) return kNaN;
    if (x == INFINITY) return kInf;
    return x < 1 ? kZero : kOverflow;
  }

  static Layout of_precision(int mantissa_bits) {
    return {(kMaxExponent - kMinExponent) << mantissa_bits, 23 - mantissa_bits, (127 + kMinExponent) << mantissa_bits};
  }

  // The layout of a state with so many columns; one without bins if there is none.
  static Layout of_width(int64_t width) {
    for (int mantissa_bits = 1; mantissa_bits <= 10; mantissa_bits++)
      if (of_precision(mantissa_bits).width() == width) return of_precision(mantissa_bits);
    return {0, 0, 0};
  }
};

inline int64_t ordered(float x) {  // a signed integer that is ordered as the values are
  const int32_t bits = bits_of(x);
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

inline int64_t max_key(float x) { return ordered(x) + (int64_t{1} << 31) + 1; }
inline int64_t min_key(float x) { return (int64_t{1} << 31) - ordered(x); }

inline float value_of(int64_t ordered) {
  const int32_t key = static_cast<int32_t>(ordered);
  return float_of(key >= 0 ? key : key ^ 0x7fffffff);
}
inline float max_of_key(int64_t key) { return value_of(key - (int64_t{1} << 31) - 1); }
inline float min_of_key(int64_t key) { return value_of((int64_t{1} << 31) - key); }

// Integers wrap around, as those of torch do: sums that leave 64 bits are no reason for undefined behaviour.
inline void accumulate(int64_t& sum, int64_t x) {
  sum = static_cast<int64_t>(static_cast<uint64_t>(sum) + static_cast<uint64_t>(x));
}

// A double next to it is a multiple of 2**exponent: to add a smaller number is to round that, half to even.
constexpr double rounding_to(int exponent) {
  double x = 0x1.8p52;
  for (; exponent < 0; exponent++) x /= 2;
  for (; exponent > 0; exponent--) x *= 2;
  return x;
}

// Moves what is a multiple of 2**exponent from x to a sum in this unit, exactly.
template <int exponent>
void move_limb(double& x, int64_t& sum) {
  constexpr double round = rounding_to(exponent);
  const double rounded = x + round;
  int64_t bits, bits_of_0;
  std::memcpy(&bits, &rounded, sizeof bits);
  std::memcpy(&bits_of_0, &round, sizeof bits);
  accumulate(sum, bits - bits_of_0);
  x -= rounded - round;
}

inline double clamped(double x, double limit) { return x > limit ? limit : x < -limit ? -limit : x; }

// Adds a value, neither NaN nor -inf, with its weight (1 if there are none). For weight 1 all arithmetic is exact but
// the last rounding of each sum.
inline void add(Totals& totals, float value, double weight) {
  const int64_t high = max_key(value), low = min_key(value);
  totals.max_key = high > totals.max_key ? high : totals.max_key;
  totals.min_key = low > totals.min_key ? low : totals.min_key;
  if (value == INFINITY) return;
  const double x = clamped(value, kLimit);
  double sum = clamped(x * weight, kWeighedLimit), square = clamped(x * x * weight, kLimit * kLimit);
  move_limb<-20>(sum, totals.sum_hi);
  move_limb<-48>(sum, totals.sum_lo);
  move_limb<17>(square, totals.square_hi);
  move_limb<-20>(square, totals.square_mid);
  move_limb<-48>(square, totals.square_lo);
}

// What a value of this weight adds to its bin, in multiples of 1 / unit.
inline int64_t amount_of(float weight, int64_t unit) {
  const double scaled = static_cast<double>(weight) * static_cast<double>(unit);
  return scaled > 0 ? static_cast<int64_t>(std::nearbyint(std::fmin(scaled, 0x1p40))) : 0;  // NaN: 0
}

}  // namespace xentile::sketch
