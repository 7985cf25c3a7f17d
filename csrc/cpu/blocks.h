// Sums over a block of logits, in any storage format: each is one vectorised loop over memory that the cache holds.
#pragma once
#include "formats.h"
#include "kernels.h"

namespace {

XENTILE_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(batch, index of its first element, how many of its elements count) for all of p[0:n], with `fill` behind
// the end.
template <class F, class Body>
XENTILE_INLINE void for_batches(const typename F::T* p, int64_t n, typename F::T fill, Body body) {
  const int64_t whole = n / kStep * kStep;
  for (int64_t j = 0; j < whole; j += kStep) body(F::load(p + j), j, kStep);
  if (whole < n) body(F::load(Padded<F>(p + whole, n - whole, fill).values), whole, n - whole);
}

// z = logit_scale * x, or softcap * tanh(logit_scale * x / softcap).
struct Transform {
  float scale, cap;
  bool identity() const { return cap == 0 && scale == 1; }
  XENTILE_INLINE VecF operator()(VecF x) const {
    const VecF scaled = x * scale;
    return cap == 0 ? scaled : cap * tanh(scaled / cap);
  }
  XENTILE_INLINE float operator()(float x) const { return (*this)(splat(x))[0]; }
  XENTILE_INLINE VecF slope(VecF z) const {  // dz/dx
    if (cap == 0) return splat(scale);
    const VecF u = z / cap;
    return scale * ((1.0f - u) * (1.0f + u));
  }
};

// z[0:n] = transform(x[0:n]). In whole batches the elements stay in the order of F's lanes, behind those in their own.
template <class F>
void transform_block(Transform transform, const typename F::T* x, int64_t n, float* z) {
  for_batches<F>(x, n, 0, [&](const Batch& x_batch, int64_t j, int64_t count) XENTILE_LAMBDA {
    const Batch z_batch = {{transform(x_batch.v[0]), transform(x_batch.v[1])}};
    if (count == kStep) return Float32::store(z + j, z_batch);
    float some[kStep];
    Float32::store(some, z_batch);
    for (int64_t k = 0; k < count; k++) z[j + k] = some[F::lane_of(k)];
  });
}

// Sums are taken in two levels: a lane that holds one large number would round each of hundreds of small ones.
constexpr int64_t kSpan = 8 * kStep;

// sum of exp(z - m), times 2**kExpBias also in kept[0:n] for whole batches, in the order of F's lanes, if kKeep.
// Meanwhile the n logits at `next` come closer: otherwise the memory would idle.
template <class F, bool kKeep, class Next>
double exp_sum(const typename F::T* z, int64_t n, float m, const Next* next, float* kept) {
  VecF sum = {};
  const VecF minus_m = splat(-m);  // an addition can take z from memory, a subtraction can't
  for (int64_t i = 0; i < n; i += kSpan) {
    VecF part = {};  // one accumulator: its latency is below the time of an exponential, and registers are few
    for_batches<F>(z + i, min(kSpan, n - i), F::kLowest,
                   [&](const Batch& z_batch, int64_t j, int64_t count) XENTILE_LAMBDA {
                     __builtin_prefetch(next + i + j);
                     const auto e = exp_parts(Batch{{z_batch.v[0] + minus_m, z_batch.v[1] + minus_m}});
                     for (int k = 0; k < kBatch; k++) {
                       if (kKeep && count == kStep) store(kept + i + j + k * kLanes, e.power[k] * e.scale[k]);
                       part = multiply_add(e.power[k], e.scale[k], part);
                     }
                   });
    sum += part;
  }
  return (double)horizontal_sum(sum) * kExpUnbias;
}

// sum of exp(z - m), and *spread += sum of exp(z - m) (m - z), where 0 * inf counts 0
template <class F>
double exp_sum_and_spread(const typename F::T* z, int64_t n, float m, double* spread) {
  VecF sum = {}, spread_sum = {};
  for (int64_t i = 0; i < n; i += kSpan) {
    VecF part = {}, spread_part = {};
    for_batches<F>(z + i, min(kSpan, n - i), F::kLowest, [&](const Batch& z_batch, int64_t, int64_t) XENTILE_LAMBDA {
      const Batch d = {{z_batch.v[0] - m, z_batch.v[1] - m}};
      const auto parts = exp_parts(d);
      for (int k = 0; k < kBatch; k++) {
        const VecF e = parts.power[k] * parts.scale[k];
        part += e;
        spread_part -= select(e > 0.0f, e * d.v[k], VecF{});
      }
    });
    sum += part, spread_sum += spread_part;
  }
  *spread += (double)horizontal_sum(spread_sum) * kExpUnbias;
  return (double)horizontal_sum(sum) * kExpUnbias;
}

// sum of weight (m - z), and *seen += sum of weight; weight null: all ones. Order: whose lanes the elements of z are in
template <class F, class Order>
double weighted_gap(const typename F::T* z, const float* weight, int64_t n, float m, double* seen) {
  VecF gap = {}, total = {};
  for (int64_t i = 0; i < n; i += kSpan) {
    VecF gap_part = {}, total_part = {};
    for_batches<F>(z + i, min(kSpan, n - i), 0, [&](const Batch& z_batch, int64_t j, int64_t count) XENTILE_LAMBDA {
      Batch w = {{splat(1), splat(1)}};
      if (count == kStep) {
        if (weight) w = Order::load_floats(weight + i + j);
      } else {  // behind the end z is 0, finite, and its weight 0
        float some[kStep] = {};
        for (int64_t k = 0; k < count; k++) some[k] = weight ? weight[i + j + k] : 1;
        w = F::load_floats(some);
      }
      for (int k = 0; k < kBatch; k++) {
        gap_part += w.v[k] * (m - z_batch.v[k]);
        total_part += w.v[k];
      }
    });
    gap += gap_part, total += total_part;
  }
  *seen += horizontal_sum(total);
  return horizontal_sum(gap);
}

// how many of x[0:n] are larger than `limit`, or equal to it if `ties`
template <class F>
int64_t count_above(const typename F::T* x, int64_t n, float limit, bool ties) {
  VecI count = {};
  for_batches<F>(x, n, F::kNaN, [&](const Batch& x_batch, int64_t, int64_t) XENTILE_LAMBDA {
    for (const VecF& v : x_batch.v) count -= ties ? (VecI)(v >= limit) : (VecI)(v > limit);
  });
  int64_t sum = 0;
  for (int k = 0; k < kLanes; k++) sum += count[k];
  return sum;
}

// index of the first of x[0:n] that equals `value`; 0 if there is none
template <class F>
int64_t find(const typename F::T* x, int64_t n, float value) {
  constexpr int64_t chunk = 2 * kStep;
  for (int64_t j = 0; j < n; j += chunk) {
    VecI equal = {};
    const int64_t size = min(chunk, n - j);
    for_batches<F>(x + j, size, F::kNaN, [&](const Batch& x_batch, int64_t, int64_t) XENTILE_LAMBDA {
      for (const VecF& v : x_batch.v) equal |= (VecI)(v == value);
    });
    uint64_t words[sizeof(VecI) / 8], any = 0;
    __builtin_memcpy(words, &equal, sizeof words);
    for (uint64_t word : words) any |= word;
    for (int64_t k = j; any && k < j + size; k++)
      if (load_one<F>(x + k) == value) return k;
  }
  return 0;
}

}  // namespace
