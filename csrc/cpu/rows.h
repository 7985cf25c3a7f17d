// Phases 1 and 3 of a row, for any storage format and vector width. Included once per instruction set.
//
// Phase 1 walks blocks that stay in the first-level cache: a block's maximum first, then its exponentials relative to the
// largest maximum so far. A later, larger maximum rescales the sums, which happens a few times a row. Within a block sums are
// float32 in 4 * kLanes partial sums; across blocks they are double.
#pragma once
#include "formats.h"
#include "kernels.h"

namespace {
using xentile::Coefficients;
using xentile::RowSums;
using xentile::RowTask;

constexpr int64_t kBlock = 2048;  // 8 KB of floats
constexpr int kChains = 4;        // independent accumulators: the latency of an addition is 3 to 4 cycles

XENTILE_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// The first `count` of the vector at p, and `fill` in the lanes after them.
template <class F>
XENTILE_INLINE VecF load_some(const typename F::T* p, int64_t count, float fill) {
  if (count >= kLanes) return F::load(p);
  typename F::T padded[kLanes] = {};
  __builtin_memcpy(padded, p, count * sizeof(*p));
  return select(lane_index() < (int32_t)count, F::load(padded), splat(fill));
}

// Calls body(vector at p + j, j, k) for all of p[0:n], k < kChains being different for consecutive vectors.
template <class F, class Body>
XENTILE_INLINE void for_vectors(const typename F::T* p, int64_t n, float fill, Body body) {
  int64_t j = 0;
  for (; j + kChains * kLanes <= n; j += kChains * kLanes)
    for (int k = 0; k < kChains; k++) body(F::load(p + j + k * kLanes), j + k * kLanes, k);
  for (int k = 0; j < n; j += kLanes, k++) body(load_some<F>(p + j, n - j, fill), j, k);
}

XENTILE_INLINE float sum_chains(const VecF* chain) { return horizontal_sum((chain[0] + chain[1]) + (chain[2] + chain[3])); }

template <class F>
float block_max(const typename F::T* x, int64_t n) {
  VecF chain[kChains] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  for_vectors<F>(x, n, -kInf, [&](VecF v, int64_t, int k) { chain[k] = max(v, chain[k]); });
  return horizontal_max(max(max(chain[0], chain[1]), max(chain[2], chain[3])));
}

XENTILE_INLINE VecF transform(const RowTask<float>& task, VecF x) {
  const VecF scaled = x * task.logit_scale;
  return task.softcap == 0 ? scaled : task.softcap * tanh(scaled / task.softcap);
}

// z[0:n] = transform(x[0:n]); the maximum of x.
template <class F, bool kTransform>
float load_block(const RowTask<float>& task, const typename F::T* x, int64_t n, float* z) {
  VecF chain[kChains] = {splat(-kInf), splat(-kInf), splat(-kInf), splat(-kInf)};
  for_vectors<F>(x, n, -kInf, [&](VecF v, int64_t j, int k) {
    chain[k] = max(v, chain[k]);
    store(z + j, kTransform ? transform(task, v) : v);
  });
  return horizontal_max(max(max(chain[0], chain[1]), max(chain[2], chain[3])));
}

// sum of exp(z - m)
double exp_sum(const float* z, int64_t n, float m) {
  VecF chain[kChains] = {};
  for_vectors<Float32>(z, n, -kInf, [&](VecF v, int64_t, int k) {
    const ExpParts e = exp_parts(v - m);
    chain[k] += e.power * e.scale;
  });
  return (double)sum_chains(chain) * kExpUnbias;
}

// sum of exp(z - m), and *spread += sum of exp(z - m) (m - z), where 0 * inf counts 0
double exp_sum_and_spread(const float* z, int64_t n, float m, double* spread) {
  VecF sums[kChains] = {}, spreads[kChains] = {};
  for_vectors<Float32>(z, n, -kInf, [&](VecF v, int64_t, int k) {
    const VecF gap = m - v;
    const ExpParts parts = exp_parts(-gap);
    const VecF e = parts.power * parts.scale;
    sums[k] += e;
    spreads[k] += select(e > 0.0f, e * gap, VecF{});
  });
  *spread += (double)sum_chains(spreads) * kExpUnbias;
  return (double)sum_chains(sums) * kExpUnbias;
}

// sum of weight (m - z) and, in *total, sum of weight; weight null: all ones
double weighted_gap(const float* z, const float* weight, int64_t n, float m, double* total) {
  VecF gaps[kChains] = {}, weights[kChains] = {};
  for_vectors<Float32>(z, n, 0, [&](VecF v, int64_t j, int k) {
    const VecI inside = lane_index() < (int32_t)(n - j);
    const VecF w = weight ? load_some<Float32>(weight + j, n - j, 0) : select(inside, splat(1), VecF{});
    gaps[k] += select(inside, w * (m - v), VecF{});
    weights[k] += w;
  });
  *total = sum_chains(weights);
  return sum_chains(gaps);
}

// how many of x[0:n] are larger than `limit`, or equal to it if `ties`
template <class F>
int64_t count_above(const typename F::T* x, int64_t n, float limit, bool ties) {
  VecI count = {};
  for_vectors<F>(x, n, __builtin_nanf(""), [&](VecF v, int64_t, int) {
    count -= ties ? (VecI)(v >= limit) : (VecI)(v > limit);
  });
  int64_t total = 0;
  for (int k = 0; k < kLanes; k++) total += count[k];
  return total;
}

// index of the first of x[0:n] that equals `value`; 0 if there is none
template <class F>
int64_t find(const typename F::T* x, int64_t n, float value) {
  constexpr int64_t kStep = 4 * kLanes;
  for (int64_t j = 0; j < n; j += kStep) {
    VecI equal = {};
    for_vectors<F>(x + j, min(kStep, n - j), __builtin_nanf(""), [&](VecF v, int64_t, int) { equal |= (VecI)(v == value); });
    uint64_t words[sizeof(VecI) / 8], any = 0;
    __builtin_memcpy(words, &equal, sizeof words);
    for (uint64_t word : words) any |= word;
    for (int64_t k = j; any && k < min(j + kStep, n); k++)
      if (load_some<F>(x + k, 1, 0)[0] == value) return k;
  }
  return 0;
}

template <class F>
class Reduction {
 public:
  Reduction(const RowTask<float>& task, const typename F::T* x, int64_t target)
      : task_(task), x_(x), transformed_(task.softcap != 0 || task.logit_scale != 1) {
    if (target >= 0) target_x_ = load_some<F>(x + target, 1, 0)[0];
    if (transformed_) max_ = transform(task, splat(max_x_))[0];  // a softcap makes -inf finite
  }

  // Adds the columns [begin, end). ties: an equal logit ranks before the target.
  void add(int64_t begin, int64_t end, bool ties) {
    alignas(64) float buffer[kBlock + kLanes];
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t n = min(kBlock, end - i);
      const float* z = buffer;
      float top;
      if (transformed_) {
        top = load_block<F, true>(task_, x_ + i, n, buffer);
      } else if (sizeof(typename F::T) == sizeof(float)) {
        z = reinterpret_cast<const float*>(x_ + i);
        top = block_max<F>(x_ + i, n);
      } else {
        top = load_block<F, false>(task_, x_ + i, n, buffer);
      }
      raise(top, i, n);
      add_block(z, i, n);
      if (task_.rank) sums_.rank += count_above<F>(x_ + i, n, target_x_, ties);
    }
  }

  void add_target(int64_t target) {
    raise(target_x_, target, 1);
    const float z = transformed_ ? transform(task_, splat(target_x_))[0] : target_x_;
    sums_.target = z;
    if (!task_.smoothing) return;
    const float weight = task_.weight ? task_.weight[target] : 1;
    sums_.gap += (double)(weight * (shift() - z));
    weight_seen_ += weight;
  }

  RowSums finish() {
    sums_.max = max_;
    sums_.argmax = best_begin_ + find<F>(x_ + best_begin_, best_size_, max_x_);
    return sums_;
  }

 private:
  // Only -inf so far: relative to 0, exp(-inf) is 0 and not exp(-inf + inf) = NaN, and a NaN still shows.
  float shift() const { return max_ == -kInf ? 0 : max_; }

  void raise(float top, int64_t begin, int64_t size) {
    if (!(top > max_x_)) return;
    const float before = shift();
    max_x_ = top, best_begin_ = begin, best_size_ = size;
    max_ = transformed_ ? transform(task_, splat(top))[0] : top;
    const double step = (double)max_ - before;
    sums_.gap += weight_seen_ == 0 ? 0 : weight_seen_ * step;
    if (sums_.rest == 0) return;
    const ExpParts e = exp_parts(splat(before - max_));
    const double factor = (double)(e.power[0] * e.scale[0]) * kExpUnbias;
    sums_.spread = factor * (sums_.spread + step * sums_.rest);
    sums_.rest *= factor;
  }

  void add_block(const float* z, int64_t begin, int64_t n) {
    sums_.rest += task_.entropy ? exp_sum_and_spread(z, n, shift(), &sums_.spread) : exp_sum(z, n, shift());
    if (!task_.smoothing) return;
    double weight;
    sums_.gap += weighted_gap(z, task_.weight ? task_.weight + begin : nullptr, n, shift(), &weight);
    weight_seen_ += weight;
  }

  const RowTask<float>& task_;
  const typename F::T* x_;
  bool transformed_;
  float target_x_ = 0, max_x_ = -kInf, max_ = -kInf;
  int64_t best_begin_ = 0, best_size_ = 0;
  double weight_seen_ = 0;
  RowSums sums_ = {};
};

template <class F>
void reduce(const RowTask<float>& task, const void* row, int64_t target, RowSums* sums) {
  const auto* x = static_cast<const typename F::T*>(row);
  Reduction<F> reduction(task, x, target);
  if (target < 0) {
    reduction.add(0, task.columns, false);
  } else {
    reduction.add(0, target, true);
    reduction.add_target(target);
    reduction.add(target + 1, task.columns, false);
  }
  *sums = reduction.finish();
}

// y[0:n] = map(x[0:n]), with map(vector, index of its first element, how many of its lanes count). y may be x.
template <class F, class Map>
XENTILE_INLINE void map_some(const typename F::T* x, typename F::T* y, int64_t begin, int64_t end, Map map) {
  typedef typename F::T T;
  T in[kLanes * F::kVectors] = {}, out[kLanes * F::kVectors];
  const int64_t n = end - begin;
  if (n <= 0) return;
  __builtin_memcpy(in, x + begin, n * sizeof(T));
  VecF mapped[F::kVectors];
  for (int k = 0; k < F::kVectors; k++) {
    const int64_t count = n > k * kLanes ? n - k * kLanes : 0;
    mapped[k] = map(F::load(in + k * kLanes), begin + k * kLanes, count);
  }
  const VecF packed = F::pack(mapped);
  __builtin_memcpy(out, &packed, sizeof out);
  __builtin_memcpy(y + begin, out, n * sizeof(T));
}

template <class F, bool kStream, class Map>
XENTILE_INLINE void map_row(const typename F::T* x, typename F::T* y, int64_t n, Map map) {
  typedef typename F::T T;
  constexpr int64_t kStep = kLanes * F::kVectors;
  int64_t j = 0;
  if (kStream) {
    j = min(n, -(int64_t)(reinterpret_cast<uintptr_t>(y) / sizeof(T)) & (kStep - 1));
    map_some<F>(x, y, 0, j, map);
  }
  for (; j + kStep <= n; j += kStep) {
    VecF mapped[F::kVectors];
    for (int k = 0; k < F::kVectors; k++) mapped[k] = map(F::load(x + j + k * kLanes), j + k * kLanes, kLanes);
    const VecF packed = F::pack(mapped);
    if (kStream) {
      stream(y + j, packed);
    } else {
      __builtin_memcpy(y + j, &packed, sizeof packed);
    }
  }
  map_some<F>(x, y, j, n, map);
  if (kStream) stream_fence();
}

template <class F, class Map>
void map_row(const typename F::T* x, typename F::T* y, int64_t n, bool streamed, Map map) {
  return streamed ? map_row<F, true>(x, y, n, map) : map_row<F, false>(x, y, n, map);
}

XENTILE_INLINE VecF jacobian(const RowTask<float>& task, VecF z) {
  if (task.softcap == 0) return splat(task.logit_scale);
  const VecF u = z / task.softcap;
  return task.logit_scale * ((1.0f - u) * (1.0f + u));
}

template <class F>
void gradient(const RowTask<float>& task, const void* row, int64_t target, const Coefficients<float>& c, void* out, bool stream) {
  const auto* x = static_cast<const typename F::T*>(row);
  auto* dx = static_cast<typename F::T*>(out);
  const VecF z_t = transform(task, load_some<F>(x + target, 1, 0));  // before it is overwritten: dx may be x
  const float factor = c.exp_factor * kExpUnbias, m = c.max;
  if (task.smoothing || task.softcap != 0 || task.logit_scale != 1) {
    map_row<F>(x, dx, task.columns, stream, [&](VecF v, int64_t j, int64_t count) {
      const VecF z = transform(task, v);
      const ExpParts e = exp_parts(z - m);
      VecF d = e.power * e.scale * factor;
      if (task.smoothing) d -= task.weight ? c.constant * load_some<Float32>(task.weight + j, count, 0) : splat(c.constant);
      return d * jacobian(task, z);
    });
  } else {
    map_row<F>(x, dx, task.columns, stream, [&](VecF v, int64_t, int64_t) {
      const ExpParts e = exp_parts(v - m);
      return e.power * e.scale * factor;
    });
  }
  VecF at_target[F::kVectors] = {};
  at_target[0] = c.target * jacobian(task, z_t);
  const VecF packed = F::pack(at_target);
  __builtin_memcpy(dx + target, &packed, sizeof(*dx));
}

template <class F>
void scale(void* data, int64_t n, float factor) {
  auto* x = static_cast<typename F::T*>(data);
  map_row<F>(x, x, n, false, [&](VecF v, int64_t, int64_t) { return v * factor; });
}

template <class F>
constexpr xentile::RowKernels<float> kRowKernels = {reduce<F>, gradient<F>, scale<F>};

}  // namespace

#define XENTILE_KERNEL_TABLE(isa)                    \
  const xentile::KernelTable xentile::kernels_##isa = { \
      #isa, kRowKernels<Float32>, kRowKernels<BFloat16>, kRowKernels<Float16>};
