// Counting a block of values in a histogram, with their exact sums: the part of sketch_update that is vectorised.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace {
using xentile::sketch::BlockCount;
using xentile::sketch::kCountBlock;
using xentile::sketch::Totals;

typedef double VecD __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint64_t VecUL __attribute__((vector_size(4 * kLanes), may_alias));
typedef float HalfF __attribute__((vector_size(2 * kLanes), may_alias, aligned(4)));
typedef uint16_t Halves __attribute__((may_alias));
constexpr int kDoubles = kLanes / 2;

// kDoubles floats: compilers make several instructions of the conversion.
XENTILE_INLINE VecD doubles(const float* p) {
#if defined(__AVX512F__)
  return (VecD)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
  return (VecD)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  return __builtin_convertvector(*reinterpret_cast<const HalfF*>(p), VecD);
#endif
}

template <class V>
XENTILE_INLINE int64_t total(V v) {
  uint64_t sum = 0;  // wraps
  for (unsigned k = 0; k < sizeof v / sizeof v[0]; k++) sum += (uint64_t)(int64_t)v[k];
  return (int64_t)sum;
}

// Adds up the two limbs of values below 2**16 over a block. A double next to kHigh counts 2**-20 in its bits, to which
// it is rounded, half to even, and one next to kLow counts 2**-48: their bits are added up, as integers.
class LimbSums {
 public:
  // a * b, which is exact or not rounded before it is added to
  XENTILE_INLINE void add(VecD a, VecD b) {
    const VecD high = a * b + kHigh;
    high_ += (VecUL)high;
    low_ += (VecUL)(a * b + (kHigh + kLow - high));
  }

  int64_t high() const { return total(high_) - kCountBlock * bits_of(kHigh); }
  int64_t low() const { return total(low_) - kCountBlock * bits_of(kLow); }

 private:
  static constexpr double kHigh = 0x1.8p32, kLow = 0x1.8p4;

  static uint64_t bits_of(double x) { return ((VecUL)(VecD{} + x))[0]; }

  VecUL high_ = {}, low_ = {};
};

// The counters of values that are all in bins, if a bin is the high half of their bits.
struct HighHalves {
  static constexpr int kShift = 16, kFirstKey = (127 - 24) << 7;
  const Halves* bits;
  XENTILE_INLINE int64_t operator[](int j) const {
    return int64_t{bits[2 * j + (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__)]} - kFirstKey;  // a part of the address
  }
};

// Raises the counters of x[0:kCountBlock], and adds up x. The caller goes on at `next`.
template <class Counters>
void add_block(Counters counter, const float* x, const float* next, uint32_t* histogram, Totals* totals) {
  constexpr int line = 16;
  LimbSums sum, square;
  for (int i = 0; i < kCountBlock; i += line) {
    // Two blocks ahead: reading the next one for its extremes would wait for memory.
    __builtin_prefetch(next + kCountBlock + i);
    for (int j = i; j < i + line; j += kDoubles) {
      // Scalar and vector instructions fill different parts of the processor.
      for (int k = 0; k < kDoubles; k++) histogram[counter[j + k]]++;
      const VecD v = doubles(x + j);
      sum.add(v, VecD{} + 1.0);
      square.add(v, v);
    }
  }
  totals->sum_hi += sum.high(), totals->sum_lo += sum.low();
  totals->square_mid += square.high(), totals->square_lo += square.low();
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
    store(block->kept + j, (VecF)kept);
  }
  block->low = horizontal(smallest, kSmaller), block->high = horizontal(largest, kLarger);
  return {(int)total(below), (int)total(others)};
}

// See KernelTable.
BlockCount count(const float* x, int shift, int first_key, int bins, uint32_t* histogram, Totals* totals) {
  Block block;
  BlockCount outside = {};
  const float* next = x + kCountBlock;
  if (shift == HighHalves::kShift && find_extremes(x, first_key, bins, &block)) {
    add_block(HighHalves{reinterpret_cast<const Halves*>(x)}, x, next, histogram, totals);
  } else {
    outside = sort_out(x, shift, first_key, bins, &block);
    add_block(block.counter, block.kept, next, histogram, totals);
  }
  if (outside.others < kCountBlock) {
    const int64_t max_key = block.high + (INT64_C(1) << 31) + 1, min_key = (INT64_C(1) << 31) - block.low;
    totals->max_key = max_key > totals->max_key ? max_key : totals->max_key;
    totals->min_key = min_key > totals->min_key ? min_key : totals->min_key;
  }
  return outside;
}

}  // namespace
