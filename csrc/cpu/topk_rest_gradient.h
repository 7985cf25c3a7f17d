// Phase 3 of a row of which some columns are excluded: these receive anything, and the few numbers that belong there
// are written afterwards.
#pragma once
#include "topk_rest.h"

namespace {
using xentile::RestCoefficients;
using xentile::RestKernels;

// dx = tempered * exp((x - max) / T) + plain * exp(x - max), of which at least one part is there, block by block as
// phase 1 and with the same numbers, whether they were kept or are computed again.
template <class F, bool kTempered, bool kPlain>
class RestGradient {
 public:
  typedef typename F::T T;

  RestGradient(const RestTask& task, const T* x, T* dx, const RestCoefficients& c, const KeptRest* kept)
      : task_(task), x_(x), dx_(dx), c_(c), kept_(kept) {}

  void run() {
    const double inverse = (double)task_.inverse.high + task_.inverse.low;
    MaskedBlocks<F> blocks(task_, x_);
    float max = -kInf;
    for (int64_t i = 0; i < task_.columns; i += kBlock) {
      const int64_t n = min(kBlock, task_.columns - i);
      const T* x = kept_ ? x_ + i : blocks.advance(i, n);
      if (kept_) {
        max = kept_->maxima[i / kBlock];
      } else {
        const float top = F::max(x, n);
        max = top > max ? top : max;
      }
      const Factors factors = {max == -kInf ? 0 : -max, (float)decay(max, c_.max, inverse) * c_.tempered * kExpUnbias,
                               (float)decay(max, c_.max, 1) * c_.plain * kExpUnbias};
      if (kept_) {
        scale_kept(i, n, factors);
      } else {
        map_row<F>(x, dx_ + i, n, exponential(factors, x_ + i + n));
      }
    }
  }

 private:
  struct Factors {
    float minus_max, tempered, plain;
  };

  static XENTILE_INLINE VecF combine(VecF tempered, VecF plain, const Factors& f) {
    if (!kPlain) return tempered * f.tempered;
    return kTempered ? multiply_add(plain, splat(f.plain), tempered * f.tempered) : plain * f.plain;
  }

  // next: what will be read after this block, and should come closer
  auto exponential(Factors factors, const T* next) const {
    const InverseTemperature inverse = task_.inverse;
    return [=](auto b, int64_t j, int64_t) XENTILE_LAMBDA {
      constexpr int count = sizeof b / sizeof(VecF);
      __builtin_prefetch(next + j);
      for (int k = 0; k < count; k++) b.v[k] += factors.minus_max;
      ExpParts<count> tempered = {}, plain = {};
      if (kTempered) tempered = exp_parts(over_temperature(b, inverse));
      if (kPlain) plain = exp_parts(b);
      for (int k = 0; k < count; k++)
        b.v[k] = combine(tempered.power[k] * tempered.scale[k], plain.power[k] * plain.scale[k], factors);
      return b;
    };
  }

  void scale_kept(int64_t begin, int64_t n, const Factors& factors) const {
    const int64_t whole = n / kStep * kStep;
    for (int64_t j = begin; j < begin + whole; j += kStep) {
      Batch tempered = {}, plain = {};
      if (kTempered) tempered = Float32::load(kept_->tempered + j);
      if (kPlain) plain = Float32::load(kept_->plain + j);
      for (int k = 0; k < kBatch; k++) plain.v[k] = combine(tempered.v[k], plain.v[k], factors);
      F::store(dx_ + j, plain);
    }
    map_some<F>(x_ + begin, dx_ + begin, whole, n - whole, exponential(factors, x_ + begin));
  }

  const RestTask& task_;
  const T* x_;
  T* dx_;
  const RestCoefficients& c_;
  const KeptRest* kept_;
};

// With dz/dx, and relative to the maximum of all blocks.
template <class F>
void transformed_rest_gradient(const RestTask& task, const typename F::T* x, typename F::T* dx,
                               const RestCoefficients& c) {
  const Transform transform = {task.logit_scale, task.softcap};
  const float tempered = c.tempered * kExpUnbias, plain = c.plain * kExpUnbias, m = c.max;
  const bool has_tempered = task.tempered, has_plain = task.plain;
  const InverseTemperature inverse = task.inverse;
  map_row<F>(x, dx, task.columns, [=](auto b, int64_t, int64_t) XENTILE_LAMBDA {
    constexpr int count = sizeof b / sizeof(VecF);
    Vectors<count> d, sum = {};
    for (int k = 0; k < count; k++) {
      b.v[k] = transform(b.v[k]);
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
void rest_gradient(const RestTask& task, const void* row, const RestCoefficients& c, void* out, const KeptRest* kept) {
  const auto* x = static_cast<const typename F::T*>(row);
  auto* dx = static_cast<typename F::T*>(out);
  if (!Transform{task.logit_scale, task.softcap}.identity()) {
    transformed_rest_gradient<F>(task, x, dx, c);
  } else if (!task.tempered) {
    RestGradient<F, false, true>(task, x, dx, c, kept).run();
  } else if (!task.plain) {
    RestGradient<F, true, false>(task, x, dx, c, kept).run();
  } else {
    RestGradient<F, true, true>(task, x, dx, c, kept).run();
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
