// Phases 1 and 3 of a row, for any storage format and vector width. Included once per instruction set.
//
// Phase 1 walks blocks that stay in the first-level cache: a block's maximum first, then its exponentials relative to the
// largest maximum so far. A later, larger maximum rescales the sums, which happens a few times a row. Within a block sums are
// float32, in kStep partial sums; across blocks they are double.
#pragma once
#include "blocks.h"

namespace {
using xentile::Coefficients;
using xentile::RowSums;
using xentile::RowTask;

constexpr int64_t kBlock = 2048;  // elements

template <class F>
class Reduction {
 public:
  typedef typename F::T T;

  Reduction(const RowTask<float>& task, const T* x, int64_t target)
      : task_(task), transform_{task.logit_scale, task.softcap}, transformed_(!transform_.identity()), x_(x) {
    if (target >= 0) target_x_ = load_one<F>(x + target);
    if (transformed_) max_ = transform_(max_x_);  // a softcap makes -inf finite
  }

  // Adds the columns [begin, end). ties: an equal logit ranks before the target.
  void add(int64_t begin, int64_t end, bool ties) {
    alignas(64) float z[kBlock];
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t n = min(kBlock, end - i);
      raise(F::max(x_ + i, n), i, n);
      if (transformed_) {
        transform_block<F>(transform_, x_ + i, n, z);
        add_block<Float32>(z, i, n);
      } else {
        add_block<F>(x_ + i, i, n);
      }
      if (task_.rank) sums_.rank += count_above<F>(x_ + i, n, target_x_, ties);
    }
  }

  void add_target(int64_t target) {
    raise(target_x_, target, 1);
    const float z = transformed_ ? transform_(target_x_) : target_x_;
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
    max_ = transformed_ ? transform_(top) : top;
    const double step = (double)max_ - before;
    if (weight_seen_ != 0) sums_.gap += weight_seen_ * step;
    if (sums_.rest == 0) return;
    const float down = before - max_;  // rounded, by up to 1e-6 at 30 nats; to first order the factor gets that back
    const ExpParts e = exp_parts(splat(down));
    const double factor = (double)(e.power[0] * e.scale[0]) * kExpUnbias * (1 - (step + down));
    sums_.spread = factor * (sums_.spread + step * sums_.rest);
    sums_.rest *= factor;
  }

  // z[0:n]: the logits of the columns from `begin` on, as they are or transformed
  template <class Z>
  void add_block(const typename Z::T* z, int64_t begin, int64_t n) {
    const float m = shift();
    if (task_.entropy) {
      sums_.rest += exp_sum_and_spread<Z>(z, n, m, &sums_.spread);
    } else {
      sums_.rest += exp_sum<Z>(z, n, m, x_ + begin + n);
    }
    if (task_.smoothing) sums_.gap += weighted_gap<Z, F>(z, task_.weight ? task_.weight + begin : nullptr, n, m, &weight_seen_);
  }

  const RowTask<float>& task_;
  const Transform transform_;
  const bool transformed_;
  const T* x_;
  float target_x_ = 0, max_x_ = -kInf, max_ = -kInf;
  int64_t best_begin_ = 0, best_size_ = 0;  // the first block that holds the largest x
  double weight_seen_ = 0;
  RowSums sums_ = {};
};

template <class F>
void reduce(const RowTask<float>& task, const void* row, int64_t target, RowSums* sums) {
  Reduction<F> reduction(task, static_cast<const typename F::T*>(row), target);
  if (target < 0) {
    reduction.add(0, task.columns, false);
  } else {
    reduction.add(0, target, true);
    reduction.add_target(target);
    reduction.add(target + 1, task.columns, false);
  }
  *sums = reduction.finish();
}

// y[0:n] = map(x[0:n]), with map(batch, index of its first element, how many of its elements count). y may be x.
template <class F, class Map>
XENTILE_INLINE void map_some(const typename F::T* x, typename F::T* y, int64_t j, int64_t count, Map map) {
  if (count == 0) return;
  Padded<F> batch(x + j, count, 0);
  F::template store<false>(batch.values, map(F::load(batch.values), j, count));
  __builtin_memcpy(y + j, batch.values, count * sizeof(*y));
}

template <class F, bool kStream, class Map>
XENTILE_INLINE void map_row(const typename F::T* x, typename F::T* y, int64_t n, Map map) {
  const auto misaligned = (int64_t)(reinterpret_cast<uintptr_t>(y) / sizeof(*y) % kStep);
  int64_t j = kStream && misaligned ? min(n, kStep - misaligned) : 0;
  map_some<F>(x, y, 0, j, map);
#pragma GCC unroll 2
  for (; j + kStep <= n; j += kStep) F::template store<kStream>(y + j, map(F::load(x + j), j, kStep));
  map_some<F>(x, y, j, n - j, map);
  if (kStream) stream_fence();
}

template <class F, class Map>
void map_row(const typename F::T* x, typename F::T* y, int64_t n, bool streamed, Map map) {
  return streamed ? map_row<F, true>(x, y, n, map) : map_row<F, false>(x, y, n, map);
}

template <class F>
void gradient(const RowTask<float>& task, const void* row, int64_t target, const Coefficients<float>& c, void* out, bool stream) {
  const auto* x = static_cast<const typename F::T*>(row);
  auto* dx = static_cast<typename F::T*>(out);
  const Transform transform = {task.logit_scale, task.softcap};
  const VecF z_t = transform(splat(load_one<F>(x + target)));  // before it is overwritten: dx may be x
  const float factor = c.exp_factor * kExpUnbias, m = c.max, constant = task.smoothing ? c.constant : 0;
  if (transform.identity() && !task.smoothing) {
    const VecF minus_m = splat(-m);
    map_row<F>(x, dx, task.columns, stream, [=](Batch b, int64_t, int64_t) XENTILE_LAMBDA {
      for (VecF& v : b.v) {
        const ExpParts e = exp_parts(v + minus_m, factor);
        v = e.power * e.scale;
      }
      return b;
    });
  } else {
    const float* weight = task.smoothing ? task.weight : nullptr;
    map_row<F>(x, dx, task.columns, stream, [=](Batch b, int64_t j, int64_t count) XENTILE_LAMBDA {
      Batch w = {{splat(1), splat(1)}};
      if (weight) w = F::load_floats(count == kStep ? weight + j : Padded<Float32>(weight + j, count, 0).values);
      for (int k = 0; k < kBatch; k++) {
        const VecF z = transform(b.v[k]);
        const ExpParts e = exp_parts(z - m, factor);
        b.v[k] = canonical((e.power * e.scale - constant * w.v[k]) * transform.slope(z));
      }
      return b;
    });
  }
  Padded<F> at_target(x, 0, 0);
  F::template store<false>(at_target.values, {{canonical(c.target * transform.slope(z_t)), VecF{}}});
  dx[target] = at_target.values[0];
}

template <class F>
void scale(void* data, int64_t n, float factor) {
  auto* x = static_cast<typename F::T*>(data);
  map_row<F>(x, x, n, false, [=](Batch b, int64_t, int64_t) XENTILE_LAMBDA {
    for (VecF& v : b.v) v = canonical(v * factor);
    return b;
  });
}

template <class F>
constexpr xentile::RowKernels<float> kRowKernels = {reduce<F>, gradient<F>, scale<F>};

}  // namespace

#define XENTILE_KERNEL_TABLE(isa)                       \
  const xentile::KernelTable xentile::kernels_##isa = { \
      #isa, kRowKernels<Float32>, kRowKernels<BFloat16>, kRowKernels<Float16>};
