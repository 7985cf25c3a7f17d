// Phase 1 of a row of which some columns, a support and the target, are excluded. Included once per instruction set.
//
// Blocks do not end at an excluded column: a thousand of them would leave nothing but short ends. A block that has some
// is copied, with -inf in their places, and then goes the way of all blocks.
#pragma once
#include "rows.h"

namespace {
using xentile::InverseTemperature;
using xentile::KeptRest;
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
    for (const int32_t* column = first_; column < next_; column++) z[place_of<F>(*column - begin_, n)] = -kInf;
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
                       float* kept, float* kept_plain, double* tempered, double* plain) {
  VecF sum = {}, plain_sum = {};
  const VecF minus_m = splat(-m);
  for (int64_t i = 0; i < n; i += kSpan) {
    VecF part = {}, plain_part = {};
    const auto add = [&](Batch d, float* keep, bool whole, VecF* part) XENTILE_LAMBDA {
      const auto e = exp_parts(d);
      for (int k = 0; k < kBatch; k++) {
        if (kKeep && whole) store(keep + k * kLanes, e.power[k] * e.scale[k]);
        *part = multiply_add(e.power[k], e.scale[k], *part);
      }
    };
    for_batches<F>(z + i, min(kSpan, n - i), F::kLowest,
                   [&](const Batch& z_batch, int64_t j, int64_t count) XENTILE_LAMBDA {
                     __builtin_prefetch(next + i + j);
                     const Batch d = {{z_batch.v[0] + minus_m, z_batch.v[1] + minus_m}};
                     add(over_temperature(d, inverse), kKeep ? kept + i + j : nullptr, count == kStep, &part);
                     if (kPlain) add(d, kKeep ? kept_plain + i + j : nullptr, count == kStep, &plain_part);
                   });
    sum += part, plain_sum += plain_part;
  }
  *tempered += horizontal_sum(sum) * kExpUnbias;
  if (kPlain) *plain += horizontal_sum(plain_sum) * kExpUnbias;
}

template <class F>
class RestReduction {
 public:
  typedef typename F::T T;

  RestReduction(const RestTask& task, const T* x, const KeptRest* kept)
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
      add_exponentials<Z, true>(z, begin, n, kept_->tempered ? kept_->tempered + begin : nullptr,
                                kept_->plain ? kept_->plain + begin : nullptr);
    } else {
      add_exponentials<Z, false>(z, begin, n, nullptr, nullptr);
    }
  }

  template <class Z, bool kKeep>
  void add_exponentials(const typename Z::T* z, int64_t begin, int64_t n, float* kept, float* kept_plain) {
    const T* next = x_ + begin + n;
    const float m = shift();
    if (!task_.tempered) {
      plain_ += exp_sum<Z, kKeep>(z, n, m, next, kept_plain);
    } else if (task_.plain) {
      tempered_exp_sums<Z, kKeep, true>(z, n, m, task_.inverse, next, kept, kept_plain, &tempered_, &plain_);
    } else {
      tempered_exp_sums<Z, kKeep, false>(z, n, m, task_.inverse, next, kept, nullptr, &tempered_, &plain_);
    }
  }

  const RestTask& task_;
  const Transform transform_;
  const double inverse_;
  const T* x_;
  const KeptRest* kept_;
  float top_ = -kInf, max_ = -kInf;
  double tempered_ = 0, plain_ = 0;
};

template <class F>
void reduce_rest(const RestTask& task, const void* row, RestSums* sums, const KeptRest* kept) {
  *sums = RestReduction<F>(task, static_cast<const typename F::T*>(row), kept).run();
}

}  // namespace
