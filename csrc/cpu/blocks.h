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

// Where transform_block puts the element i of n.
template <class F>
XENTILE_INLINE int64_t place_of(int64_t i, int64_t n) {
  return i < n / kStep * kStep ? i / kStep * kStep + F::lane_of(i % kStep) : i;
}

// The elements of a batch from number `first` on, without number `hole`: -inf for the others.
template <class F>
XENTILE_INLINE Batch only(Batch b, int64_t first, int64_t hole) {
  for (int k = 0; k < kBatch; k++) {
    const VecI element = F::elements(k);
    b.v[k] = select((VecI)(element >= (int32_t)first) & (VecI)(element != (int32_t)hole), b.v[k], splat(-kInf));
  }
  return b;
}

// Sums are taken in two levels: a lane that holds one large number would round each of hundreds of small ones.
constexpr int64_t kSpan = 8 * kStep;

// Calls body(batch, index of its first element, whether the batch counts whole or but for the hole) for all of z[0:n]
// but z[hole] (hole < 0: for all), with -inf in place of what does not count; and after() behind every kBatch spans.
template <class F, class Body, class After>
XENTILE_INLINE void for_batches_but(int64_t hole, const typename F::T* z, int64_t n, Body body, After after) {
  const int64_t whole = n / kStep * kStep, holed = hole & -kStep;
  for (int64_t i = 0; i < whole; i += kBatch * kSpan) {
    const int64_t end = min(i + kBatch * kSpan, whole);
    for (int64_t j = i; j < end; j += kStep)
      if (j != holed) body(F::load(z + j), j, true);
    after();
  }
  if (hole >= 0 && hole < whole) body(only<F>(F::load(z + holed), 0, hole - holed), holed, true);
  if (n < kStep) {
    body(only<F>(F::load(Padded<F>(z, n, F::kLowest).values), 0, hole), 0, false);
  } else if (whole < n) {  // a whole batch again, of which the first elements have been seen
    body(only<F>(F::load(z + n - kStep), whole + kStep - n, hole + kStep - n), n - kStep, false);
  }
  after();
}

// sum of exp(z - m) without that of z[hole] (hole < 0: of all), times 2**kExpBias also in kept[0:n] for whole batches,
// in the order of F's lanes, if kKeep. Meanwhile the n logits at `next` come closer: otherwise the memory would idle.
template <class F, bool kKeep, class Next>
double exp_sum(const typename F::T* z, int64_t n, float m, const Next* next, float* kept, int64_t hole = -1) {
  VecF sum = {}, part[kBatch] = {};
  const VecF minus_m = splat(-m);  // an addition can take z from memory, a subtraction can't
  for_batches_but<F>(
      hole, z, n,
      [&](const Batch& z_batch, int64_t j, bool whole) XENTILE_LAMBDA {
        __builtin_prefetch(next + j);
        const auto e = exp_parts(Batch{{z_batch.v[0] + minus_m, z_batch.v[1] + minus_m}});
        for (int k = 0; k < kBatch; k++) {
          if (kKeep && whole) store(kept + j + k * kLanes, e.power[k] * e.scale[k]);
          part[k] = multiply_add(e.power[k], e.scale[k], part[k]);
        }
      },
      [&]() XENTILE_LAMBDA {
        sum += part[0] + part[1];
        for (VecF& p : part) p = VecF{};
      });
  return horizontal_sum(sum) * kExpUnbias;
}

// The same sum, and *spread += sum of exp(z - m) (m - z), where 0 * inf counts 0
template <class F>
double exp_sum_and_spread(const typename F::T* z, int64_t n, float m, double* spread, int64_t hole) {
  VecF sum = {}, part[kBatch] = {}, spread_sum = {}, spread_part[kBatch] = {};
  for_batches_but<F>(
      hole, z, n,
      [&](const Batch& z_batch, int64_t, bool) XENTILE_LAMBDA {
        const Batch d = {{z_batch.v[0] - m, z_batch.v[1] - m}};
        const auto parts = exp_parts(d);
        for (int k = 0; k < kBatch; k++) {
          const VecF e = parts.power[k] * parts.scale[k];
          part[k] += e;
          spread_part[k] -= select(e > 0.0f, e * d.v[k], VecF{});
        }
      },
      [&]() XENTILE_LAMBDA {
        for (VecF& p : part) sum += p, p = VecF{};
        for (VecF& p : spread_part) spread_sum += p, p = VecF{};
      });
  *spread += horizontal_sum(spread_sum) * kExpUnbias;
  return horizontal_sum(sum) * kExpUnbias;
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
  return horizontal(count, kAdd);
}

// index of the first of x[0:n] that equals `value`; 0 if there is none
template <class F>
int64_t find(const typename F::T* x, int64_t n, float value) {
  typename F::T stored[kStep];
  F::store(stored, {{splat(value), splat(value)}});
  int64_t j = 0;
  while (j + kChunk <= n && !F::contains(x + j, stored[0])) j += kChunk;
  for (; j < n; j += kStep) {
    const int64_t count = min(kStep, n - j);
    const Batch b = F::load(count == kStep ? x + j : Padded<F>(x + j, count, F::kNaN).values);
    VecI first = VecI{} + kStep;
    for (int k = 0; k < kBatch; k++) {
      const VecI element = F::elements(k);
      first = (VecI)(b.v[k] == value) & (VecI)(element < first) ? element : first;
    }
    const int32_t found = horizontal(first, kSmaller);
    if (found < kStep) return j + found;
  }
  return 0;
}

}  // namespace
