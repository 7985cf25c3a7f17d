// Counting a block of values in a histogram, with their exact sums: the part of sketch_update that is vectorised.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {
using xentile::sketch::BlockCount;
using xentile::sketch::kCountBlock;
using xentile::sketch::Totals;

typedef double VecD __attribute__((vector_size(4 * kLanes), may_alias));
typedef int64_t VecL __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint64_t VecUL __attribute__((vector_size(4 * kLanes), may_alias));
typedef float HalfF __attribute__((vector_size(2 * kLanes), may_alias, aligned(4)));
typedef uint16_t Halves __attribute__((may_alias));
constexpr int kDoubles = kLanes / 2;

// kDoubles floats (compilers make several instructions of the conversion), and the largest integer that is not above,
// for |x| < 2**51.
#if defined(__AVX512F__)
XENTILE_INLINE VecD doubles(const float* p) { return (VecD)_mm512_cvtps_pd(_mm256_loadu_ps(p)); }
XENTILE_INLINE VecD floor(VecD x) { return (VecD)_mm512_maskz_roundscale_pd(0xff, (__m512d)x, _MM_FROUND_TO_NEG_INF); }
#elif defined(__AVX2__)
XENTILE_INLINE VecD doubles(const float* p) { return (VecD)_mm256_cvtps_pd(_mm_loadu_ps(p)); }
XENTILE_INLINE VecD floor(VecD x) { return (VecD)_mm256_floor_pd((__m256d)x); }
#else
XENTILE_INLINE VecD doubles(const float* p) {
  return __builtin_convertvector(*reinterpret_cast<const HalfF*>(p), VecD);
}
XENTILE_INLINE VecD floor(VecD x) {
  const VecD rounded = (x + 0x1.8p52) - 0x1.8p52;
  return rounded - (VecD)((VecL)(rounded > x) & (VecL)(VecD{} + 1.0));
}
#endif

template <class V>
XENTILE_INLINE int64_t total(V v) {
  uint64_t sum = 0;  // wraps
  for (unsigned k = 0; k < sizeof v / sizeof v[0]; k++) sum += (uint64_t)(int64_t)v[k];
  return (int64_t)sum;
}

// Sums of the limbs of x and x^2 over a block. x is below 2**8, or below 16: then no square has a highest limb; and it is
// a multiple of 2**-48, so a sum is not rounded. Its limbs are found as floats, and added up as 32-bit integers, of which
// kGroup fit. Those of a square are found as doubles, which hold it exactly. Whole numbers are added up as doubles,
// exactly too; the rest is added up as bits: a double next to kRound counts multiples of 2**-28 in its bits, to which it
// is rounded, half to even. One next to kWhole counts ones: what is left of it without 28 bits is the highest limb.
template <bool below_16>
class LimbSums {
 public:
  static constexpr int kGroup = 16;

  // x[0:kGroup * kLanes]; before_each(j) is called in front of the vector at x + j.
  template <class BeforeEach>
  XENTILE_INLINE void add(const float* x, BeforeEach before_each) {
    VecU hi = {}, lo = {};
    for (int j = 0; j < kGroup * kLanes; j += kLanes) {
      before_each(j);
      const VecF sum = load(x + j) * 0x1p20f;  // in units of 2**-20, as the square
      const VecI whole = __builtin_convertvector(sum, VecI);
      const VecF rest = sum - __builtin_convertvector(whole, VecF);
      hi += (VecU)whole;
      lo += (VecU)__builtin_convertvector(rest * 0x1p28f, VecI);
      for (int k = 0; k < kLanes; k += kDoubles) add_square(doubles(x + j + k));
    }
    sum_hi_ += pairs(hi), sum_lo_ += pairs(lo);
  }

  void add_to(Totals* totals) const {
    const int64_t hi = total(square_hi_) - (below_16 ? 0 : kCountBlock * (bits_of(kWhole) >> 28));
    totals->sum_hi += total(sum_hi_);
    totals->sum_lo += total(sum_lo_);
    totals->square_hi += hi;
    totals->square_mid += total(square_whole_) - (hi << 28);
    totals->square_lo += total(square_lo_) - kCountBlock * bits_of(kRound);
  }

 private:
  static constexpr double kWhole = 0x1p52, kRound = 0x1.8p24;

  static uint64_t bits_of(double x) { return ((VecUL)(VecD{} + x))[0]; }
  static VecUL pairs(VecU v) { return ((VecUL)v & UINT32_MAX) + ((VecUL)v >> 32); }

  XENTILE_INLINE void add_square(VecD x) {
    const VecD square = x * 0x1p20 * x, whole = floor(square);
    square_whole_ += whole;
    if constexpr (!below_16) square_hi_ += (VecUL)(whole + kWhole) >> 28;
    square_lo_ += (VecUL)(square - whole + kRound);
  }

  VecUL sum_hi_ = {}, sum_lo_ = {}, square_hi_ = {}, square_lo_ = {};
  VecD square_whole_ = {};
};

// The counters of values that are all in bins, if a bin is the high half of their bits.
struct HighHalves {
  static constexpr int kShift = 16;
  const Halves* bits;
  int64_t first_key;
  XENTILE_INLINE int64_t operator[](int j) const {
    return bits[2 * j + (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)] - first_key;
  }
};

// Raises the counters of x[0:kCountBlock], and adds up x. The caller goes on at `next`.
template <bool below_16, class Counters>
void add_block(Counters counter, const float* x, const float* next, uint32_t* histogram, Totals* totals) {
  constexpr int step = LimbSums<below_16>::kGroup * kLanes, line = 16;
  LimbSums<below_16> sums;
  for (int i = 0; i < kCountBlock; i += step) {
    sums.add(x + i, [&](int j) XENTILE_LAMBDA {
      // Two blocks ahead: reading the next one for its extremes would wait for memory.
      if (j % line == 0) __builtin_prefetch(next + kCountBlock + i + j);
      // Scalar and vector instructions fill different parts of the processor.
      for (int k = 0; k < kLanes; k++) histogram[counter[i + j + k]]++;
    });
  }
  sums.add_to(totals);
}

// Counters of a block and what is to be added up, with the smallest and the largest bits of that: positive floats are
// ordered as their bits.
struct Block {
  alignas(64) uint32_t counter[kCountBlock];
  alignas(64) float kept[kCountBlock];
  int32_t low, high;
};

// The extremes of a block, and whether all its values are in bins that are high halves: nearly always.
XENTILE_INLINE bool find_extremes(const float* x, int first_key, int bins, Block* block) {
  VecU smallest = VecU{} + UINT32_MAX, largest = {};  // a negative value has larger bits than a positive one
  for (int j = 0; j < kCountBlock; j += kLanes) {
    const VecU bits = (VecU)load(x + j);
    smallest = bits < smallest ? bits : smallest;
    largest = bits > largest ? bits : largest;
  }
  const uint32_t low = horizontal(smallest, kSmaller), high = horizontal(largest, kLarger);
  block->low = (int32_t)low, block->high = (int32_t)high;
  return low >= (uint32_t)first_key << HighHalves::kShift && high < (uint32_t)(first_key + bins) << HighHalves::kShift;
}

// Of a block with any values; 0 is kept of those that are not counted.
BlockCount sort_out(const float* x, int shift, int first_key, int bins, Block* block) {
  const VecI nowhere = lane_index() + bins;  // a counter each, because the next increment of the same one has to wait
  const VecU first_bits = VecU{} + ((uint32_t)first_key << shift), last_bin = VecU{} + (uint32_t)(bins - 1);
  constexpr float unit = 0x1p-25f;  // all floats from here on are multiples of 2**-48
  VecI below = {}, others = {}, smallest = VecI{} + INT32_MAX, largest = {};
  for (int j = 0; j < kCountBlock; j += kLanes) {
    const VecI bits = (VecI)load(x + j), b = (bits >> shift) - first_key;
    const VecI tiny = (VecU)bits < first_bits, outside = (VecU)b > last_bin, other = outside & ~tiny;
    const VecI kept = bits & ~other, lowest = (bits | other) & INT32_MAX;
    below -= tiny;
    others -= other;
    smallest = lowest < smallest ? lowest : smallest;
    largest = kept > largest ? kept : largest;
    *reinterpret_cast<VecI*>(block->counter + j) = outside ? nowhere : b;
    store(block->kept + j, select((VecF)kept < unit, (VecF)kept + unit - unit, (VecF)kept));
  }
  block->low = horizontal(smallest, kSmaller), block->high = horizontal(largest, kLarger);
  return {(int)total(below), (int)total(others)};
}

// See KernelTable.
BlockCount count(const float* x, int shift, int first_key, int bins, uint32_t* histogram, Totals* totals) {
  Block block;
  BlockCount outside = {};
  const float* next = x + kCountBlock;
  const auto add = [&](auto counter, const float* kept) {
    constexpr int32_t bits_of_16 = 0x41800000;
    (block.high < bits_of_16 ? add_block<true, decltype(counter)> : add_block<false, decltype(counter)>)(
        counter, kept, next, histogram, totals);
  };
  if (shift == HighHalves::kShift && find_extremes(x, first_key, bins, &block)) {
    add(HighHalves{reinterpret_cast<const Halves*>(x), first_key}, x);
  } else {
    outside = sort_out(x, shift, first_key, bins, &block);
    add(block.counter, block.kept);
  }
  if (outside.others < kCountBlock) {
    const int64_t max_key = block.high + (INT64_C(1) << 31) + 1, min_key = (INT64_C(1) << 31) - block.low;
    totals->max_key = max_key > totals->max_key ? max_key : totals->max_key;
    totals->min_key = min_key > totals->min_key ? min_key : totals->min_key;
  }
  return outside;
}

}  // namespace
