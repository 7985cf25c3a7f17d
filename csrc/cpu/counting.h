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
typedef float HalfF __attribute__((vector_size(2 * kLanes), may_alias, aligned(4)));
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

// Sums of the limbs of x and x^2 over a block, where 0 <= x < 2**8. Whole parts are added up as doubles, exactly. What
// is left is rounded to 2**-28, half to even, by adding kRound: the numbers next to that are multiples of 2**-28, and
// their bits count the multiples. So the bits are added up, as integers.
struct LimbSums {
  VecD sum_hi = {}, square_hi = {}, square_mid = {};
  VecL sum_lo = {}, square_lo = {};

  // below_16: then no square has a highest limb.
  template <bool below_16>
  XENTILE_INLINE void add(VecD x) {
    const VecD sum = x * 0x1p20, whole = floor(sum);  // in units of 2**-20, as the square
    sum_hi += whole;
    sum_lo += (VecL)(sum - whole + kRound);
    VecD square = sum * x;
    if constexpr (!below_16) {
      const VecD top = floor(square * 0x1p-28);
      square_hi += top;
      square -= top * 0x1p28;
    }
    const VecD mid = floor(square);
    square_mid += mid;
    square_lo += (VecL)(square - mid + kRound);
  }

  void add_to(Totals* totals) const {
    const VecL surplus = (VecL)(VecD{} + kRound) * (kCountBlock / kDoubles);
    totals->sum_hi += total(sum_hi);
    totals->sum_lo += total(sum_lo - surplus);
    totals->square_hi += total(square_hi);
    totals->square_mid += total(square_mid);
    totals->square_lo += total(square_lo - surplus);
  }

 private:
  static constexpr double kRound = 0x1.8p24;
};

// Raises the counts of bin[0:kCountBlock] and adds up x[0:kCountBlock].
template <bool below_16>
void add_block(const uint32_t* bin, const float* x, uint32_t* histogram, Totals* totals) {
  LimbSums sums;
  for (int j = 0; j < kCountBlock; j += kLanes) {
    // Scalar and vector instructions of one iteration fill different parts of the processor.
    for (int k = 0; k < kLanes; k++) histogram[bin[j + k]]++;
    for (int k = 0; k < kLanes; k += kDoubles) sums.add<below_16>(doubles(x + j + k));
  }
  sums.add_to(totals);
}

template <bool largest>
XENTILE_INLINE int32_t extreme(VecI v) {
  int32_t found = v[0];
  for (int k = 1; k < kLanes; k++) found = (v[k] > found) == largest ? v[k] : found;
  return found;
}

// The bins of a block and what is to be added up, with the smallest and the largest bits of that: positive floats are
// ordered as their bits.
struct Block {
  alignas(64) uint32_t bin[kCountBlock];
  alignas(64) float kept[kCountBlock];
  int32_t low, high;
};

// If all values are in bins, their bins; false if they are not. Nearly all blocks are done by this.
XENTILE_INLINE bool find_bins(const float* x, int shift, int first_key, int bins, Block* block) {
  const VecU last_bin = VecU{} + (uint32_t)(bins - 1);
  VecI outside = {}, smallest = VecI{} + INT32_MAX, largest = {};
  for (int j = 0; j < kCountBlock; j += kLanes) {
    const VecI bits = (VecI)load(x + j), b = (bits >> shift) - first_key;
    outside |= (VecU)b > last_bin;
    smallest = bits < smallest ? bits : smallest;
    largest = bits > largest ? bits : largest;
    *reinterpret_cast<VecI*>(block->bin + j) = b;
  }
  block->low = extreme<false>(smallest), block->high = extreme<true>(largest);
  return total(outside) == 0;
}

// Of a block with any values; 0 is kept of those that are not counted.
BlockCount sort_out(const float* x, int shift, int first_key, int bins, Block* block) {
  const VecI nowhere = lane_index() + bins;  // a counter each, because the next increment of the same one has to wait
  const VecU first_bits = VecU{} + ((uint32_t)first_key << shift), last_bin = VecU{} + (uint32_t)(bins - 1);
  VecI below = {}, others = {}, smallest = VecI{} + INT32_MAX, largest = {};
  for (int j = 0; j < kCountBlock; j += kLanes) {
    const VecI bits = (VecI)load(x + j), b = (bits >> shift) - first_key;
    const VecI tiny = (VecU)bits < first_bits, outside = (VecU)b > last_bin, other = outside & ~tiny;
    const VecI kept = bits & ~other, lowest = (bits | other) & INT32_MAX;
    below -= tiny;
    others -= other;
    smallest = lowest < smallest ? lowest : smallest;
    largest = kept > largest ? kept : largest;
    *reinterpret_cast<VecI*>(block->bin + j) = outside ? nowhere : b;
    store(block->kept + j, (VecF)kept);
  }
  block->low = extreme<false>(smallest), block->high = extreme<true>(largest);
  return {(int)total(below), (int)total(others)};
}

// See KernelTable.
BlockCount count(const float* x, int shift, int first_key, int bins, uint32_t* histogram, Totals* totals) {
  Block block;
  BlockCount outside = {};
  if (!find_bins(x, shift, first_key, bins, &block)) {
    outside = sort_out(x, shift, first_key, bins, &block);
    x = block.kept;
  }
  constexpr int32_t bits_of_16 = 0x41800000;
  (block.high < bits_of_16 ? add_block<true> : add_block<false>)(block.bin, x, histogram, totals);
  if (outside.others < kCountBlock) {
    const int64_t max_key = block.high + (INT64_C(1) << 31) + 1, min_key = (INT64_C(1) << 31) - block.low;
    totals->max_key = max_key > totals->max_key ? max_key : totals->max_key;
    totals->min_key = min_key > totals->min_key ? min_key : totals->min_key;
  }
  return outside;
}

}  // namespace
