// Counting a block of values in a histogram, with their exact sums: the part of sketch_update that is vectorised.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {
using xentile::sketch::kCountBlock;
using xentile::sketch::Totals;

typedef double VecD __attribute__((vector_size(4 * kLanes), may_alias));
typedef int64_t VecL __attribute__((vector_size(4 * kLanes), may_alias));
typedef float HalfF __attribute__((vector_size(2 * kLanes), may_alias, aligned(4)));
constexpr int kDoubles = kLanes / 2;

// To integers, for |x| < 2**51: the nearest, half to even, and the largest that is not above.
#if defined(__AVX512F__)
XENTILE_INLINE VecD nearest(VecD x) {
  return (VecD)_mm512_maskz_roundscale_pd(0xff, (__m512d)x, _MM_FROUND_TO_NEAREST_INT);
}
XENTILE_INLINE VecD floor(VecD x) { return (VecD)_mm512_maskz_roundscale_pd(0xff, (__m512d)x, _MM_FROUND_TO_NEG_INF); }
#elif defined(__AVX2__)
XENTILE_INLINE VecD nearest(VecD x) { return (VecD)_mm256_round_pd((__m256d)x, _MM_FROUND_TO_NEAREST_INT); }
XENTILE_INLINE VecD floor(VecD x) { return (VecD)_mm256_floor_pd((__m256d)x); }
#else
XENTILE_INLINE VecD nearest(VecD x) { return (x + 0x1.8p52) - 0x1.8p52; }
XENTILE_INLINE VecD floor(VecD x) {
  const VecD rounded = nearest(x);
  return rounded - (VecD)((VecL)(rounded > x) & (VecL)(VecD{} + 1.0));
}
#endif

XENTILE_INLINE int64_t exact_sum(VecD v) {
  double sum = 0;
  for (int k = 0; k < kDoubles; k++) sum += v[k];
  return (int64_t)sum;
}

// The limbs of values in [2**-24, 2**8), which are multiples of 2**-48: partial sums of kCountBlock of them are exact
// in double.
void add_sums(const float* x, Totals* totals) {
  VecD sum_hi = {}, fractions = {}, square_hi = {}, square_mid = {}, square_lo = {};
  for (int j = 0; j < kCountBlock; j += kDoubles) {
    const VecD value = __builtin_convertvector(*reinterpret_cast<const HalfF*>(x + j), VecD);
    const VecD scaled = value * 0x1p20, hi = floor(scaled);
    sum_hi += hi;
    fractions += scaled - hi;
    const VecD square = value * value, top = floor(square * 0x1p-8);
    const VecD rest = (square - top * 0x1p8) * 0x1p20, mid = floor(rest);
    square_hi += top;
    square_mid += mid;
    square_lo += nearest((rest - mid) * 0x1p28);
  }
  totals->sum_hi += exact_sum(sum_hi);
  totals->sum_lo += exact_sum(fractions * 0x1p28);
  totals->square_hi += exact_sum(square_hi);
  totals->square_mid += exact_sum(square_mid);
  totals->square_lo += exact_sum(square_lo);
}

// Counts x[0:kCountBlock] in histogram[0:bins] and *totals; false, having done nothing, if a value is outside the bins.
bool count(const float* x, int shift, int first_key, int bins, uint32_t* histogram, Totals* totals) {
  alignas(64) uint32_t bin[kCountBlock];
  VecI outside = {}, smallest = VecI{} + INT32_MAX, largest = {};
  for (int j = 0; j < kCountBlock; j += kLanes) {
    const VecI bits = (VecI)load(x + j);
    const VecI b = (bits >> shift) - first_key;
    outside |= (VecI)((VecU)b >= (VecU{} + (uint32_t)bins));
    smallest = bits < smallest ? bits : smallest;  // positive floats are ordered as their bits
    largest = bits > largest ? bits : largest;
    *reinterpret_cast<VecI*>(bin + j) = b;
  }
  int32_t any = 0, low = INT32_MAX, high = 0;
  for (int k = 0; k < kLanes; k++) {
    any |= outside[k];
    low = smallest[k] < low ? smallest[k] : low;
    high = largest[k] > high ? largest[k] : high;
  }
  if (any) return false;
  for (uint32_t b : bin) histogram[b]++;
  add_sums(x, totals);
  const int64_t max_key = high + (INT64_C(1) << 31) + 1, min_key = (INT64_C(1) << 31) - low;
  totals->max_key = max_key > totals->max_key ? max_key : totals->max_key;
  totals->min_key = min_key > totals->min_key ? min_key : totals->min_key;
  return true;
}

}  // namespace
