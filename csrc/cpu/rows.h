// Phases 1 and 3 of a row, for any storage format and vector width. Included once per instruction set.
//
// Phase 1 walks blocks that stay in the first-level cache: a block's maximum first, then its exponentials relative to
// the largest maximum so far. A later, larger maximum rescales the sums, which happens a few times a row. Within a
// block sums are float32, in partial sums; across blocks they are double.
#pragma once
#include "blocks.h"
#include "counting.h"

namespace {
using xentile::Coefficients;
using xentile::Kept;
using xentile::RowSums;
using xentile::RowTask;

constexpr int64_t kBlock = 16 * kSpan;  // elements: 2048 for AVX2

template <class F>
class Reduction {
 public:
  typedef typename F::T T;

  Reduction(const RowTask<float>& task, const T* x, int64_t target, const Kept* kept)
      : task_(task),
        transform_{task.logit_scale, task.softcap},
        transformed_(!transform_.identity()),
        x_(x),
        kept_(kept) {
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
    const double factor = exp_one(down) * (1 - (step + down));
    sums_.spread = factor * (sums_.spread + step * sums_.rest);
    sums_.rest *= factor;
  }

  // z[0:n]: the logits of the columns from `begin` on, as they are or transformed
  template <class Z>
  void add_block(const typename Z::T* z, int64_t begin, int64_t n) {
    const float m = shift();
    if (kept_) {
      kept_->maxima[blocks_++] = max_;
      sums_.rest += exp_sum<Z, true>(z, n, m, x_ + begin + n, kept_->exponentials + begin);
    } else if (task_.entropy) {
      sums_.rest += exp_sum_and_spread<Z>(z, n, m, &sums_.spread);
    } else {
      sums_.rest += exp_sum<Z, false>(z, n, m, x_ + begin + n, nullptr);
    }
    if (task_.smoothing)
      sums_.gap += weighted_gap<Z, F>(z, task_.weight ? task_.weight + begin : nullptr, n, m, &weight_seen_);
  }

  const RowTask<float>& task_;
  const Transform transform_;
  const bool transformed_;
  const T* x_;
  const Kept* kept_;
  int64_t blocks_ = 0;
  float target_x_ = 0, max_x_ = -kInf, max_ = -kInf;
  int64_t best_begin_ = 0, best_size_ = 0;  // the first block that holds the largest x
  double weight_seen_ = 0;
  RowSums sums_ = {};
};

template <class F>
void reduce(const RowTask<float>& task, const void* row, int64_t target, RowSums* sums, const Kept* kept) {
  Reduction<F> reduction(task, static_cast<const typename F::T*>(row), target, kept);
  if (target < 0) {
    reduction.add(0, task.columns, false);
  } else {
    reduction.add(0, target, true);
    reduction.add_target(target);
    reduction.add(target + 1, task.columns, false);
  }
  *sums = reduction.finish();
}

// y[0:n] = map(x[0:n]), with map(vectors, index of the first element, how many elements count). y may be x.
template <class F, class Map>
XENTILE_INLINE void map_some(const typename F::T* x, typename F::T* y, int64_t j, int64_t count, Map map) {
  if (count <= 0) return;
  Padded<F> batch(x + j, count, 0);
  F::store(batch.values, map(F::load(batch.values), j, count));
  __builtin_memcpy(y + j, batch.values, count * sizeof(*y));
}

template <class F, class Map>
XENTILE_INLINE void map_row(const typename F::T* x, typename F::T* y, int64_t n, Map map) {
  constexpr int wide = 2 * kBatch;
  constexpr int64_t step = wide * kLanes;
  const int64_t whole = n / step * step;
  for (int64_t j = 0; j < whole; j += step) store_all<F>(y + j, map(load_all<F, wide>(x + j), j, step));
  map_some<F>(x, y, whole, min(kStep, n - whole), map);
  map_some<F>(x, y, whole + kStep, n - whole - kStep, map);
}

// dx = exp_factor * exp(x - max), block by block as phase 1, whose exponentials are relative to the maximum so far.
// Without them the same numbers are computed from x: two launches give the gradient of one, bit by bit.
template <class F>
class PlainGradient {
 public:
  typedef typename F::T T;

  PlainGradient(const T* x, T* dx, const Coefficients<float>& c, const Kept* kept)
      : x_(x), dx_(dx), c_(c), kept_(kept) {}

  void add(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t n = min(kBlock, end - i);
      if (kept_) {
        max_ = kept_->maxima[blocks_++];
      } else {
        raise(F::max(x_ + i, n));
      }
      const float factor = (max_ == -kInf ? 0 : exp_one(max_ - c_.max)) * c_.exp_factor * kExpUnbias;
      if (kept_) {
        scale_kept(i, n, factor);
      } else {
        map_row<F>(x_ + i, dx_ + i, n, exponential(factor, x_ + i + n));
      }
    }
  }

  void raise(float top) { max_ = top > max_ ? top : max_; }

 private:
  // next: what will be read after this block, and should come closer
  auto exponential(float factor, const T* next) const {
    const VecF minus_m = splat(max_ == -kInf ? 0 : -max_);
    return [=](auto b, int64_t j, int64_t) XENTILE_LAMBDA {
      constexpr int count = sizeof b / sizeof(VecF);
      __builtin_prefetch(next + j);
      for (int k = 0; k < count; k++) b.v[k] += minus_m;
      const auto e = exp_parts(b);
      for (int k = 0; k < count; k++) b.v[k] = e.power[k] * e.scale[k] * factor;
      return b;
    };
  }

  void scale_kept(int64_t begin, int64_t n, float factor) const {
    const int64_t whole = n / kStep * kStep;
    for (int64_t j = begin; j < begin + whole; j += kStep) {
      Batch b = Float32::load(kept_->exponentials + j);
      for (VecF& v : b.v) v *= factor;
      F::store(dx_ + j, b);
    }
    map_some<F>(x_ + begin, dx_ + begin, whole, n - whole, exponential(factor, x_ + begin));
  }

  const T* x_;
  T* dx_;
  const Coefficients<float>& c_;
  const Kept* kept_;
  int64_t blocks_ = 0;
  float max_ = -kInf;
};

// dx = (exp_factor * exp(z - max) - constant * weight) * dz/dx, weight null: all ones
template <class F>
void general_gradient(const Transform transform, const typename F::T* x, typename F::T* dx, int64_t n,
                      const Coefficients<float>& c, const float* weight) {
  const float factor = c.exp_factor * kExpUnbias, m = c.max, constant = c.constant;
  map_row<F>(x, dx, n, [=](auto b, int64_t j, int64_t valid) XENTILE_LAMBDA {
    constexpr int count = sizeof b / sizeof(VecF);
    Vectors<count> d, w;
    for (int k = 0; k < count; k++) {
      b.v[k] = transform(b.v[k]);
      d.v[k] = b.v[k] - m;
      w.v[k] = splat(1);
    }
    if (weight && valid == count * kLanes) {
      w = load_all_floats<F, count>(weight + j);
    } else if (weight) {
      w = load_all_floats<F, count>(Padded<Float32>(weight + j, valid, 0).values);
    }
    const auto e = exp_parts(d, factor);
    for (int k = 0; k < count; k++)
      b.v[k] = canonical((e.power[k] * e.scale[k] - constant * w.v[k]) * transform.slope(b.v[k]));
    return b;
  });
}

template <class F>
void gradient(const RowTask<float>& task, const void* row, int64_t target, const Coefficients<float>& c, void* out,
              const Kept* kept) {
  const auto* x = static_cast<const typename F::T*>(row);
  auto* dx = static_cast<typename F::T*>(out);
  const Transform transform = {task.logit_scale, task.softcap};
  const float x_t = load_one<F>(x + target);  // before it is overwritten: dx may be x
  if (transform.identity() && !task.smoothing) {
    PlainGradient<F> plain(x, dx, c, kept);
    plain.add(0, target);
    plain.raise(x_t);
    plain.add(target + 1, task.columns);
  } else {
    general_gradient<F>(transform, x, dx, task.columns, c, task.smoothing ? task.weight : nullptr);
  }
  typename F::T at_target[kStep];
  F::store(at_target, {{canonical(c.target * transform.slope(splat(transform(x_t)))), VecF{}}});
  dx[target] = at_target[0];
}

template <class F>
void scale(void* data, int64_t n, float factor) {
  auto* x = static_cast<typename F::T*>(data);
  map_row<F>(x, x, n, [=](auto b, int64_t, int64_t) XENTILE_LAMBDA {
    for (VecF& v : b.v) v = canonical(v * factor);
    return b;
  });
}

template <class F>
constexpr xentile::RowKernels<float> kRowKernels = {reduce<F>, gradient<F>, scale<F>};

}  // namespace
