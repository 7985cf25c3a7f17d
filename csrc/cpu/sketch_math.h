// Where a value is counted in a loss sketch, and the integers that its sums are made of. The layout, and why it is so, is
// described in src/xentile/_layout.py; all backends compute equal integers from equal values.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace xentile::sketch {

constexpr int kMantissaBits = 7, kMinExponent = -24, kMaxExponent = 8;
constexpr int kBins = (kMaxExponent - kMinExponent) << kMantissaBits, kShift = 23 - kMantissaBits;
constexpr int kFirstKey = (127 + kMinExponent) << kMantissaBits;

enum Column {
  kZero = kBins, kOverflow, kInf, kNaN,                           // values outside the bins
  kIgnored, kOutOfRange, kBadGroup,                               // tokens without a value
  kSumLo, kSumHi, kSquareLo, kSquareMid, kSquareHi,               // limbs
  kMaxKey, kMinKey,                                               // merge by maximum, all others by addition
  kWidth = kBins + 16
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

inline float edge(int bin) { return float_of((bin + kFirstKey) << kShift); }

inline int column_of(float x) {
  const int bin = (bits_of(x) >> kShift) - kFirstKey;
  if (bin >= 0 && bin < kBins) return bin;
  if (std::isnan(x) || x == -INFINITY) return kNaN;
  if (x == INFINITY) return kInf;
  return x < 1 ? kZero : kOverflow;
}

inline int64_t ordered(float x) {
  const int32_t bits = bits_of(x);
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

inline int64_t max_key(float x) { return ordered(x) + (int64_t{1} << 31) + 1; }
inline int64_t min_key(float x) { return (int64_t{1} << 31) - ordered(x); }

inline float value_of_key(int64_t ordered) {
  const int32_t key = static_cast<int32_t>(ordered);
  return float_of(key >= 0 ? key : key ^ 0x7fffffff);
}
inline float max_of_key(int64_t key) { return value_of_key(key - (int64_t{1} << 31) - 1); }
inline float min_of_key(int64_t key) { return value_of_key((int64_t{1} << 31) - key); }

// The exact sums and extremes of some values. All arithmetic in `add` is exact but the last rounding of each sum.
struct Totals {
  int64_t sum_lo, sum_hi, square_lo, square_mid, square_hi, max_key, min_key;

  void add(float value) {
    const int64_t high = sketch::max_key(value), low = sketch::min_key(value);
    max_key = high > max_key ? high : max_key;
    min_key = low > min_key ? low : min_key;
    if (value == INFINITY) return;
    constexpr double limit = 0x1p24;
    const double x = value > limit ? limit : value < -limit ? -limit : value;
    const double scaled = x * 0x1p20, hi = floor_of(scaled);
    sum_hi += static_cast<int64_t>(hi);
    sum_lo += std::llrint((scaled - hi) * 0x1p28);
    const double square = x * x, top = floor_of(square * 0x1p-8);
    const double rest = (square - top * 0x1p8) * 0x1p20, mid = floor_of(rest);
    square_hi += static_cast<int64_t>(top);
    square_mid += static_cast<int64_t>(mid);
    square_lo += std::llrint((rest - mid) * 0x1p28);
  }

 private:
  static double floor_of(double x) {  // without a call of the C library, for |x| < 2**63
    const double truncated = static_cast<double>(static_cast<int64_t>(x));
    return truncated - (truncated > x);
  }
};

}  // namespace xentile::sketch
