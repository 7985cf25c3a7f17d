// Phases 1 and 3 of a row of which some columns, a support and the target, are excluded. Included once per instruction
// set.
//
// Blocks do not end at an excluded column: a thousand of them would leave nothing but short ends. A block that has some
// is copied, with -inf in their places, and then goes the way of all blocks. In the gradient the excluded columns
// receive anything; the few numbers that belong there are written afterwards.
#pragma once
#include "rows.h"

namespace {
using xentile::InverseTemperature;
using xentile::RestCoefficients;
using xentile::RestKernels;
using xentile::RestSums;
using xentile::RestTask;

template <int K>
XENTILE_INLINE Vectors<K> over_temperature(Vectors<K> d, InverseTemperature inverse) {
  Vectors<K> y;
  for (int k = 0; k < K; k++) y.v[k] = d.v[k] * inverse.high;
  for (int k = 0; k < K; k++) y.v[k] = multiply_add(d.v[k], splat(inverse.low), y.v[k]);
  return y;
}

// exp((from - to) / T) for from <= to. Both are relative to numbers of 30 nats and more: without the factor the
// rounding of the quotient would be an error of 1e-6.
double decay(double from, double to, double inverse_temperature) {
  if (from == -kInf) return 0;
  const double exact = (from - to) * inverse_temperature;
  const float rounded = (float)exact, factor = exp_one(rounded);
  return factor == 0 ? 0 : factor * (1 + (exact - rounded));
}

// The blocks of a row in their order, with -inf at the excluded columns.
template <class F>
class MaskedBlocks {
 public:
  typedef typename F::T T;

  MaskedBlocks(const RestTask& task, const T* x) : x_(x), next_(task.excluded), end_(next_ + task.excluded_size) {}

  // x[begin:begin + n], or a copy that lives until the next call
  const T* advance(int64_t begin, int64_t n) {
    begin_ = begin, first_ = next_;
    while (next_ < end_ && *next_ < begin + n) next_++;
    if (first_ == next_) return x_ + begin;
    __builtin_memcpy(copy_, x_ + begin, n * sizeof(T));
    for (const int32_t* column = first_; column < next_; column++) copy_[*column - begin] = F::kLowest;
    return copy_;
  }

  // The same for z[0:n], which `transform_block` made of the block: a softcap has made numbers of the -inf.
  void mask(float* z, int64_t n) const {
    for (const int32_t* column = first_; column < next_; column++) {
      const int64_t j = *column - begin_, within = j % kStep;
      z[j < n / kStep * kStep ? j - within + F::lane_of(within) : j] = -kInf;
    }
  }

 private:
  const T* x_;
  int64_t begin_ = 0;
  const int32_t *first_ = nullptr, *next_, *end_;
  alignas(64) T copy_[kBlock];
};

// *tempered += sum of exp((z - m) / T), and if kPlain *plain += sum of exp(z - m). Else as `exp_sum`.
template <class F, bool kKeep, bool kPlain, class Next>
void tempered_exp_sums(const typename F::T* z, int64_t n, float m, InverseTemperature inverse, const Next* next,
                       float* kept, double* tempered, double* plain) {
  VecF sum = {}, plain_sum = {};
  const VecF minus_m = splat(-m);
  for (int64_t i = 0; i < n; i += kSpan) {
    VecF part = {}, plain_part = {};
    for_batches<F>(z + i, min(kSpan, n - i), F::kLowest,
                   [&](const Batch& z_batch, int64_t j, int64_t count) XENTILE_LAMBDA {
                     __builtin_prefetch(next + i + j);
                     const Batch d = {{z_batch.v[0] + minus_m, z_batch.v[1] + minus_m}};
                     const auto e = exp_parts(over_temperature(d, inverse));
                     for (int k = 0; k < kBatch; k++) {
                       if (kKeep && count == kStep) store(kept + i + j + k * kLanes, e.power[k] * e.scale[k]);
                       part = multiply_add(e.power[k], e.scale[k], part);
                     }
                     if (!kPlain) return;
                     const auto plain_e = exp_parts(d);
                     for (int k = 0; k < kBatch; k++)
                       plain_part = multiply_add(plain_e.power[k], plain_e.scale[k], plain_part);
                   });
    sum += part, plain_sum += plain_part;
  }
  *tempered += (double)horizontal_sum(sum) * kExpUnbias;
  if (kPlain) *plain += (double)horizontal_sum(plain_sum) * kExpUnbias;
}

template <class F>
class RestReduction {
 public:
  typedef typename F::T T;

  RestReduction(const RestTask& task, const T* x, const Kept* kept)
      : task_(task),
        transform_{task.logit_scale, task.softcap},
        inverse_((double)task.inverse.high + task.inverse.low),
        x_(x),
        kept_(kept) {
    if (task.excluded_size < task.columns) max_ = transformed(-kInf);  // a softcap makes -inf finite
  }

  RestSums run() {
    alignas(64) float z[kBlock];
    MaskedBlocks<F> blocks(task_, x_);
    for (int64_t i = 0; i < task_.columns; i += kBlock) {
      const int64_t n = min(kBlock, task_.columns - i);
      const T* x = blocks.advance(i, n);
      raise(F::max(x, n));
      if (transform_.identity()) {
        add_block<F>(x, i, n);
      } else {
        transform_block<F>(transform_, x, n, z);
        blocks.mask(z, n);
        add_block<Float32>(z, i, n);
      }
    }
    return {top_, max_, (float)tempered_, (float)plain_};
  }

 private:
  float transformed(float x) const { return transform_.identity() ? x : transform_(x); }
  float shift() const { return max_ == -kInf ? 0 : max_; }  // see Reduction in rows.h

  void raise(float top) {
    if (!(top > top_)) return;
    const float before = max_;
    top_ = top, max_ = transformed(top);
    if (tempered_ != 0) tempered_ *= decay(before, max_, inverse_);
    if (plain_ != 0) plain_ *= decay(before, max_, 1);
  }

  template <class Z>
  void add_block(const typename Z::T* z, int64_t begin, int64_t n) {
    if (kept_) {
      kept_->maxima[begin / kBlock] = max_;
      add_exponentials<Z, true>(z, n, x_ + begin + n, kept_->exponentials + begin);
    } else {
      add_exponentials<Z, false>(z, n, x_ + begin + n, nullptr);
    }
  }

  template <class Z, bool kKeep>
  void add_exponentials(const typename Z::T* z, int64_t n, const T* next, float* kept) {
    const float m = shift();
    if (!task_.tempered) {
      plain_ += exp_sum<Z, kKeep>(z, n, m, next, kept);
    } else if (task_.plain) {
      tempered_exp_sums<Z, kKeep, true>(z, n, m, task_.inverse, next, kept, &tempered_, &plain_);
    } else {
      tempered_exp_sums<Z, kKeep, false>(z, n, m, task_.inverse, next, kept, &tempered_, &plain_);
    }
  }

  const RestTask& task_;
  const Transform transform_;
  const double inverse_;
  const T* x_;
  const Kept* kept_;
  float top_ = -kInf, max_ = -kInf;
  double tempered_ = 0, plain_ = 0;
};

template <class F>
void reduce_rest(const RestTask& task, const void* row, RestSums* sums, const Kept* kept) {
  *sums = RestReduction<F>(task, static_cast<const typename F::T*>(row), kept).run();
}

// dx = factor * exp((x - max) / T), T = 1 unless kTempered, block by block as phase 1 and with the same numbers,
// whether they were kept or are computed again.
template <class F, bool kTempered>
class RestGradient {
 public:
  typedef typename F::T T;

  RestGradient(const RestTask& task, const T* x, T* dx, const RestCoefficients& c, const Kept* kept)
      : task_(task), x_(x), dx_(dx), top_(c.max), factor_(kTempered ? c.tempered : c.plain), kept_(kept) {}

  void run() {
    const double inverse = kTempered ? (double)task_.inverse.high + task_.inverse.low : 1;
    MaskedBlocks<F> blocks(task_, x_);
    for (int64_t i = 0; i < task_.columns; i += kBlock) {
      const int64_t n = min(kBlock, task_.columns - i);
      const T* x = kept_ ? x_ + i : blocks.advance(i, n);
      if (kept_) {
        max_ = kept_->maxima[i / kBlock];
      } else {
        const float top = F::max(x, n);
        max_ = top > max_ ? top : max_;
      }
      const float factor = (float)decay(max_, top_, inverse) * factor_ * kExpUnbias;
      if (kept_) {
        scale_kept(i, n, factor);
      } else {
        map_row<F>(x, dx_ + i, n, exponential(factor, x_ + i + n));
      }
    }
  }

 private:
  auto exponential(float factor, const T* next) const {
    const VecF minus_m = splat(max_ == -kInf ? 0 : -max_);
    const InverseTemperature inverse = task_.inverse;
    return [=](auto b, int64_t j, int64_t) XENTILE_LAMBDA {
      constexpr int count = sizeof b / sizeof(VecF);
      __builtin_prefetch(next + j);
      for (int k = 0; k < count; k++) b.v[k] += minus_m;
      if (kTempered) b = over_temperature(b, inverse);
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

  const RestTask& task_;
  const T* x_;
  T* dx_;
  const float top_, factor_;
  const Kept* kept_;
  float max_ = -kInf;
};

// Relative to the maximum of all blocks.
template <class F>
void general_rest_gradient(const RestTask& task, const typename F::T* x, typename F::T* dx, const RestCoefficients& c) {
  const Transform transform = {task.logit_scale, task.softcap};
  const float tempered = c.tempered * kExpUnbias, plain = c.plain * kExpUnbias, m = c.max;
  const bool has_tempered = task.tempered, has_plain = task.plain;
  const InverseTemperature inverse = task.inverse;
  map_row<F>(x, dx, task.columns, [=](auto b, int64_t, int64_t) XENTILE_LAMBDA {
    constexpr int count = sizeof b / sizeof(VecF);
    Vectors<count> d, sum = {};
    for (int k = 0; k < count; k++) {
      b.v[k] = transform.identity() ? b.v[k] : transform(b.v[k]);
      d.v[k] = b.v[k] - m;
    }
    if (has_tempered) {
      const auto e = exp_parts(over_temperature(d, inverse));
      for (int k = 0; k < count; k++) sum.v[k] = e.power[k] * e.scale[k] * tempered;
    }
    if (has_plain) {
      const auto e = exp_parts(d);
      for (int k = 0; k < count; k++) sum.v[k] += e.power[k] * e.scale[k] * plain;
    }
    for (int k = 0; k < count; k++) b.v[k] = canonical(sum.v[k] * transform.slope(b.v[k]));
    return b;
  });
}

template <class F>
void rest_gradient(const RestTask& task, const void* row, const RestCoefficients& c, void* out, const Kept* kept) {
  const auto* x = static_cast<const typename F::T*>(row);
  auto* dx = static_cast<typename F::T*>(out);
  const Transform transform = {task.logit_scale, task.softcap};
  if (!transform.identity() || (task.tempered && task.plain)) {
    general_rest_gradient<F>(task, x, dx, c);
  } else if (task.tempered) {
    RestGradient<F, true>(task, x, dx, c, kept).run();
  } else {
    RestGradient<F, false>(task, x, dx, c, kept).run();
  }
}

template <class F>
void gather(const void* row, const int32_t* columns, int64_t n, float* values) {
  const auto* x = static_cast<const typename F::T*>(row);
  for (int64_t i = 0; i < n; i += kStep) {
    const int64_t count = min(kStep, n - i);
    typename F::T some[kStep] = {};
    for (int64_t k = 0; k < count; k++) some[k] = x[columns[i + k]];
    float floats[kStep];
    Float32::store(floats, F::load(some));
    for (int64_t k = 0; k < count; k++) values[i + k] = floats[F::lane_of(k)];
  }
}

template <class F>
void scatter(const float* values, const int32_t* columns, int64_t n, void* row) {
  auto* x = static_cast<typename F::T*>(row);
  for (int64_t i = 0; i < n; i += kStep) {
    const int64_t count = min(kStep, n - i);
    Batch b = F::load_floats(Padded<Float32>(values + i, count, 0).values);
    for (VecF& v : b.v) v = canonical(v);
    typename F::T some[kStep];
    F::store(some, b);
    for (int64_t k = 0; k < count; k++) x[columns[i + k]] = some[k];
  }
}

template <class F>
constexpr RestKernels kRestKernels = {reduce_rest<F>, rest_gradient<F>, gather<F>, scatter<F>};

}  // namespace
