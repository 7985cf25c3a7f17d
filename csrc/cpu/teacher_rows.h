// Selection and tail of a teacher's row, for any storage format and vector width. Included once per instruction set.
//
// A block is read twice, the second time from the first-level cache: `collect` finds the logits above a limit and the
// maximum of the others, `add_tail` adds the exponentials of those others. A block is a sequence of spans, most without
// a candidate, which a span's maximum tells. Where candidates are is chance, and a branch on it would cost more than
// the work that it saves: loops go over the bits of masks instead.
#pragma once
#include "rows.h"

namespace {
using xentile::Candidates;
using xentile::Collected;
using xentile::TopKTask;

constexpr int64_t kAhead = 8192;  // bytes from the logits that are summed to those that are prefetched
constexpr int64_t kSpanBatches = kSpan / kStep;

// One bit a lane.
XENTILE_INLINE uint32_t lane_bits(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask);
#else
  uint32_t bits = 0;
  for (int k = 0; k < kLanes; k++) bits |= (mask[k] & 1u) << k;
  return bits;
#endif
}

// The bits of a batch's lanes in the order of its elements.
template <class F>
XENTILE_INLINE uint32_t element_bits(uint32_t lanes) {
  return lanes;
}
template <>
XENTILE_INLINE uint32_t element_bits<BFloat16>(uint32_t lanes) {
  const auto spread = [](uint32_t x) {  // a zero behind every bit
    x = (x | x << 8) & 0x00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0fu;
    x = (x | x << 2) & 0x33333333u;
    return (x | x << 1) & 0x55555555u;
  };
  return spread(lanes & ((1u << kLanes) - 1)) | spread(lanes >> kLanes) << 1;
}

// Integers in the order of the numbers. Adding 0 makes 0 of -0, which is no smaller.
XENTILE_INLINE VecI ordered(VecF x) {
  const VecI bits = (VecI)(x + 0.0f);
  return bits ^ ((bits >> 31) & INT32_MAX);
}

XENTILE_INLINE void store(int32_t* p, VecI v) { store(reinterpret_cast<float*>(p), (VecF)v); }

// The maximum of every lane of x[0:n], n <= kSpan.
template <class F>
XENTILE_INLINE VecF span_max(const typename F::T* x, int64_t n) {
  Batch top = {{splat(-kInf), splat(-kInf)}};
  if (n == kSpan) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kSpanBatches; i++) {
      const Batch b = F::load(x + i * kStep);
      for (int k = 0; k < kBatch; k++) top.v[k] = max(top.v[k], b.v[k]);
    }
  } else {
    for_batches<F>(x, n, F::kLowest, [&](const Batch& b, int64_t, int64_t) XENTILE_LAMBDA {
      for (int k = 0; k < kBatch; k++) top.v[k] = max(top.v[k], b.v[k]);
    });
  }
  return max(top.v[0], top.v[1]);
}

// A group is a lane of consecutive batches.
template <class F>
int64_t group_maxima(const void* row, int64_t n, int64_t wanted, int32_t* maxima) {
  const auto* x = static_cast<const typename F::T*>(row);
  const int64_t batches = n / kStep, members = n / wanted > 1 ? n / wanted : 1;
  const int64_t group = min(members, batches), sets = group > 0 ? batches / group : 0;
  for (int64_t i = 0; i < sets; i++) {
    Batch top = {{splat(-kInf), splat(-kInf)}};
    for (int64_t j = 0; j < group; j++, x += kStep) {
      const Batch b = F::load(x);
      for (int k = 0; k < kBatch; k++) top.v[k] = max(top.v[k], b.v[k]);
    }
    for (int k = 0; k < kBatch; k++) store(maxima + i * kStep + k * kLanes, ordered(top.v[k]));
  }
  return sets * kStep;
}

// How many of values[0:n] are below x; n is a multiple of kStep.
XENTILE_INLINE int64_t count_below(const int32_t* values, int64_t n, int32_t x) {
  VecI count[kBatch] = {};
  const VecI limit = VecI{} + x;
  for (int64_t i = 0; i < n; i += kStep)
    for (int k = 0; k < kBatch; k++)
      count[k] -= (VecI)load(reinterpret_cast<const float*>(values + i + k * kLanes)) < limit;
  int64_t sum = 0;
  for (int k = 0; k < kLanes; k++) sum += count[0][k] + count[1][k];
  return sum;
}

// Bisection: a step reads all values, but no branch depends on one of them.
inline int32_t kth_largest(int32_t* values, int64_t n, int64_t k) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < n; i++) {
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  const int64_t padded = (n + kStep - 1) / kStep * kStep;
  for (int64_t i = n; i < padded; i++) values[i] = INT32_MAX;  // never below
  while (low < high) {
    const int32_t middle = low + static_cast<int32_t>((static_cast<uint32_t>(high) - low) / 2) + 1;
    const int64_t above = n - count_below(values, padded, middle);
    if (above == k) return middle;
    low = above > k ? middle : low;
    high = above > k ? high : middle - 1;
  }
  return low;
}

struct FoundBatch {
  int64_t index;
  uint32_t elements;  // a bit for each candidate
};

// Notes the batches of x[0:n], n <= kSpan, with candidates from *found on; returns the maximum of the others.
template <class F>
XENTILE_INLINE VecF find_batches(const typename F::T* x, int64_t n, int64_t index, float limit, FoundBatch** found) {
  VecF below = splat(-kInf);
  for_batches<F>(x, n, F::kLowest, [&](const Batch& b, int64_t j, int64_t) XENTILE_LAMBDA {
    uint32_t lanes = 0;
    for (int k = 0; k < kBatch; k++) {
      const VecI above = b.v[k] > limit;
      lanes |= lane_bits(above) << k * kLanes;
      below = max(below, select(above, splat(-kInf), b.v[k]));
    }
    **found = {index + j, element_bits<F>(lanes)};
    *found += lanes != 0;
  });
  return below;
}

template <class F>
Collected collect(const void* row, int64_t n, int64_t id, float limit, Candidates out) {
  const auto* x = static_cast<const typename F::T*>(row);
  uint32_t spans = 0;
  VecF below = splat(-kInf);
  for (int64_t i = 0, s = 0; i < n; i += kSpan, s++) {
    const VecF top = span_max<F>(x + i, min(kSpan, n - i));
    const VecI above = top > limit;
    below = max(below, select(above, splat(-kInf), top));
    spans |= uint32_t{lane_bits(above) != 0} << s;
  }

  FoundBatch batches[kBlock / kStep + 1], *end = batches;
  for (uint32_t rest = spans; rest != 0; rest &= rest - 1) {
    const int64_t i = __builtin_ctz(rest) * kSpan;
    below = max(below, find_batches<F>(x + i, min(kSpan, n - i), i, limit, &end));
  }

  int64_t count = 0;
  for (const FoundBatch* found = batches; found < end; found++) {
    const int64_t j = found->index, size = min(kStep, n - j);
    const Batch b = F::load(size == kStep ? x + j : Padded<F>(x + j, size, F::kLowest).values);
    int32_t values[kStep];
    for (int k = 0; k < kBatch; k++) store(values + k * kLanes, ordered(b.v[k]));
    for (uint32_t rest = found->elements; rest != 0; rest &= rest - 1, count++) {
      const int64_t element = __builtin_ctz(rest);
      out.values[count] = values[F::lane_of(element)];
      out.ids[count] = static_cast<int32_t>(id + j + element);
    }
  }
  return {count, horizontal_max(below), spans};
}

// sum of exp(exponents(batch, index of its first element, how many of its elements count)) over x[0:n], times
// 2**kExpBias
template <class F, class Exponents>
XENTILE_INLINE VecF exp_span(const typename F::T* x, int64_t n, Exponents exponents) {
  VecF part = {};
  for_batches<F>(x, n, F::kLowest, [&](const Batch& b, int64_t j, int64_t count) XENTILE_LAMBDA {
    const auto e = exp_parts(exponents(b, j, count));
    for (int k = 0; k < kBatch; k++) part = multiply_add(e.power[k], e.scale[k], part);
  });
  return part;
}

// The functions of a span are not inlined: their loops need every register.

// Temperature 1, without a transform. Meanwhile logits that follow come closer: otherwise the memory would idle.
template <class F, bool kMasked>
__attribute__((noinline)) VecF plain_span(const typename F::T* x, int64_t n, float limit, float max) {
  const VecF minus_max = splat(-max);  // an addition can take x from memory, a subtraction can't
  const char* ahead = reinterpret_cast<const char*>(x) + kAhead;
  return exp_span<F>(x, n, [=](Batch b, int64_t j, int64_t) XENTILE_LAMBDA {
    __builtin_prefetch(ahead + j * sizeof *x);
    for (VecF& v : b.v) v = kMasked ? select(v > limit, splat(-kInf), v + minus_max) : v + minus_max;
    return b;
  });
}

template <class F>
VecF plain_tail(const typename F::T* x, int64_t n, float limit, uint32_t spans, float max) {
  VecF sum = {};
  const uint32_t all = static_cast<uint32_t>((uint64_t{1} << (n + kSpan - 1) / kSpan) - 1);
  for (uint32_t rest = all & ~spans; rest != 0; rest &= rest - 1) {
    const int64_t i = __builtin_ctz(rest) * kSpan;
    sum += plain_span<F, false>(x + i, min(kSpan, n - i), limit, max);
  }
  for (uint32_t rest = spans; rest != 0; rest &= rest - 1) {
    const int64_t i = __builtin_ctz(rest) * kSpan;
    sum += plain_span<F, true>(x + i, min(kSpan, n - i), limit, max);
  }
  return sum;
}

template <class F>
__attribute__((noinline)) VecF tempered_span(const typename F::T* x, int64_t n, float limit, float max, float inverse) {
  return exp_span<F>(x, n, [=](Batch b, int64_t, int64_t) XENTILE_LAMBDA {
    for (VecF& v : b.v) v = select(v > limit, splat(-kInf), (v - max) * inverse);
    return b;
  });
}

template <class F>
__attribute__((noinline)) VecF transformed_span(const Transform transform, const typename F::T* x, int64_t n,
                                                float limit, float max, float inverse) {
  return exp_span<F>(x, n, [=](Batch b, int64_t, int64_t count) XENTILE_LAMBDA {
    for (VecF& v : b.v) {
      const VecF d = (transform(v) - max) * inverse;
      v = select(v > limit, splat(-kInf), select(d > 0.0f, VecF{}, d));  // the rounded tanh may be not quite monotone
    }
    for (int64_t i = count; i < kStep; i++) {  // a softcap makes the filling behind the end finite
      const int64_t slot = F::lane_of(i);
      b.v[slot / kLanes][slot % kLanes] = -kInf;
    }
    return b;
  });
}

// The same at any temperature, and with a transform.
template <class F>
VecF general_tail(const Transform transform, const typename F::T* x, int64_t n, float limit, float max, float inverse) {
  VecF sum = {};
  for (int64_t i = 0; i < n; i += kSpan)
    sum += transform.identity() ? tempered_span<F>(x + i, min(kSpan, n - i), limit, max, inverse)
                                : transformed_span<F>(transform, x + i, min(kSpan, n - i), limit, max, inverse);
  return sum;
}

template <class F>
void add_tail(const TopKTask& task, const void* row, int64_t n, float limit, uint32_t spans, float max, double* sums) {
  const auto* x = static_cast<const typename F::T*>(row);
  const Transform transform = {task.logit_scale, task.softcap};
  for (int t = 0; t < task.temperatures; t++) {
    const VecF sum = transform.identity() && t == 0
                         ? plain_tail<F>(x, n, limit, spans, max)
                         : general_tail<F>(transform, x, n, limit, max, task.inverse_temperatures[t]);
    sums[t] += horizontal_sum(sum) * kExpUnbias;
  }
}

template <class F>
constexpr xentile::TopKKernels kTopKKernels = {kBlock, group_maxima<F>, kth_largest, collect<F>, add_tail<F>};

}  // namespace
