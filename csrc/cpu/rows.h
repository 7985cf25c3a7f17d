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
        target_(target),
        kept_(kept) {
    if (target >= 0) target_x_ = load_one<F>(x + target);
    if (transformed_) max_ = transform_(max_x_);  // a softcap makes -inf finite
  }

  // Adds the columns [begin, begin + n), n <= kBlock.
  void add(int64_t begin, int64_t n) {
    const int64_t hole = target_ >= begin && target_ < begin + n ? target_ - begin : -1;
    raise(F::max(x_ + begin, n), begin, n);
    if (transformed_) {
      alignas(64) float z[kBlock];
      transform_block<F>(transform_, x_ + begin, n, z);
      add_block<Float32>(z, begin, n, hole < 0 ? hole : place_of<F>(hole, n));
    } else {
      add_block<F>(x_ + begin, begin, n, hole);
    }
    if (task_.rank) add_rank(begin, n);
  }

  RowSums finish() {
    sums_.max = max_;
    sums_.target = target_ < 0 ? 0 : transformed_ ? transform_(target_x_) : target_x_;
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

  // Up to the target, an equal logit ranks before it.
  void add_rank(int64_t begin, int64_t n) {
    const int64_t ties = target_ < begin ? 0 : min(target_ - begin, n);
    sums_.rank += count_above<F>(x_ + begin, ties, target_x_, true);
    sums_.rank += count_above<F>(x_ + begin + ties, n - ties, target_x_, false);
  }

  // z[0:n]: the logits of the columns from `begin` on, as they are or transformed; z[hole] is that of the target
  template <class Z>
  void add_block(const typename Z::T* z, int64_t begin, int64_t n, int64_t hole) {
    const float m = shift();
    if (kept_) {
      kept_->maxima[blocks_++] = max_;
      sums_.rest += exp_sum<Z, true>(z, n, m, x_ + begin + n, kept_->exponentials + begin, hole);
    } else if (task_.entropy) {
      sums_.rest += exp_sum_and_spread<Z>(z, n, m, &sums_.spread, hole);
    } else {
      sums_.rest += exp_sum<Z, false>(z, n, m, x_ + begin + n, nullptr, hole);
    }
    if (task_.smoothing)
      sums_.gap += weighted_gap<Z, F>(z, task_.weight ? task_.weight + begin : nullptr, n, m, &weight_seen_);
  }

  const RowTask<float>& task_;
  const Transform transform_;
  const bool transformed_;
  const T* x_;
  const int64_t target_;
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
  for (int64_t i = 0; i < task.columns; i += kBlock) reduction.add(i, min(kBlock, task.columns - i));
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
  if (n < step) {
    map_some<F>(x, y, 0, min(kStep, n), map);
    map_some<F>(x, y, kStep, n - kStep, map);
    return;
  }
  // The last ones are read before y, which may be x, is written, and some of them are computed twice.
  typename F::T last[step];
  __builtin_memcpy(last, x + n - step, sizeof last);
  for (int64_t j = 0; j + step <= n; j += step) store_all<F>(y + j, map(load_all<F, wide>(x + j), j, step));
  if (n % step) store_all<F>(y + n - step, map(load_all<F, wide>(last), n - step, step));
}

// dx = exp_factor * exp(x - max), block by block as phase 1, whose exponentials are relative to the maximum so far.
// Without them the same numbers are computed from x: two launches give the gradient of one, bit by bit.
template <class F>
class PlainGradient {
 public:
  typedef typename F::T T;

  PlainGradient(const T* x, T* dx, const Coefficients<float>& c, const Kept* kept)
      : x_(x), dx_(dx), c_(c), kept_(kept) {}

  // The columns [begin, begin + n), n <= kBlock.
  void add(int64_t begin, int64_t n) {
    const T* x = x_ + begin;
    max_ = kept_ ? kept_->maxima[blocks_++] : kLarger(F::max(x, n), max_);
    const float factor = (max_ == -kInf ? 0 : exp_one(max_ - c_.max)) * c_.exp_factor * kExpUnbias;
    if (kept_) {
      scale_kept(begin, n, factor);
    } else {
      map_row<F>(x, dx_ + begin, n, exponential(factor, x + n));
    }
  }

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
    T rest[kStep];  // read before dx, which may be x, is written
    const bool again = whole < n && n >= kStep;
    if (again) __builtin_memcpy(rest, x_ + begin + n - kStep, sizeof rest);
    for (int64_t j = begin; j < begin + whole; j += kStep) {
      Batch b = Float32::load(kept_->exponentials + j);
      for (VecF& v : b.v) v *= factor;
      F::store(dx_ + j, b);
    }
    const auto map = exponential(factor, x_ + begin);
    if (again) {
      F::store(dx_ + begin + n - kStep, map(F::load(rest), 0, kStep));
    } else {
      map_some<F>(x_ + begin, dx_ + begin, whole, n - whole, map);
    }
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
    for (int64_t i = 0; i < task.columns; i += kBlock) plain.add(i, min(kBlock, task.columns - i));
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
