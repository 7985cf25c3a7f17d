// The row kernels of `distillation`. A row is walked in blocks of columns that are float32 in the first-level cache, in
// the order of the columns, whatever the formats of the two matrices: the mathematics is compiled once a divergence.
#pragma once
#include "dense_columns.h"
#include "dense_math.h"

namespace {
using xentile::DenseRow;
using xentile::DenseSums;
using xentile::DenseTotals;
using xentile::DivergenceCode;

// Sum of exp((z - m) * inverse) over whole steps.
double tempered_sum(const float* z, int64_t n, float m, float inverse) {
  VecF sum = {};
  for (int64_t i = 0; i < n; i += kSpan) {
    VecF part = {};
    for (int64_t j = i; j < min(i + kSpan, n); j += kStep) {
      Batch y = Float32::load(z + j);
      for (VecF& v : y.v) v = (v - m) * inverse;
      const auto e = exp_parts(y);
      for (int k = 0; k < kBatch; k++) part = multiply_add(e.power[k], e.scale[k], part);
    }
    sum += part;
  }
  return horizontal_sum(sum) * kExpUnbias;
}

// Phase 1 of one matrix's row.
template <class F>
class DenseReduction {
 public:
  typedef typename F::T T;

  DenseReduction(const DenseLogits& logits, int64_t target, float inverse_temperature, bool plain)
      : logits_(logits),
        transform_{logits.scale, logits.softcap},
        target_(target),
        inverse_(inverse_temperature),
        plain_(plain && inverse_ != 1),
        max_(transformed(-kInf)) {}

  void add(int64_t begin, int64_t n, float* z) {
    const T* x = static_cast<const T*>(logits_.x) + begin;
    raise(F::max(x, n));
    const bool has_target = target_ >= begin && target_ < begin + n;
    if (inverse_ == 1 && transform_.identity() && !has_target) {
      tempered_ += exp_sum<F, false>(x, n, shift(), x + n, nullptr);
      return;
    }
    alignas(64) float room[kColumns];
    const float* columns = load_columns<F>(logits_, begin, n, z ? z + begin : room);
    if (has_target) columns = without_target(columns, begin, whole_steps(n), room);
    tempered_ += tempered_sum(columns, whole_steps(n), shift(), inverse_);
    if (plain_) rest_ += tempered_sum(columns, whole_steps(n), shift(), 1);
  }

  DenseSums finish() const {
    const bool valid = max_x_ - max_x_ == 0;
    const double all = target_ < 0 ? tempered_ : tempered_ + exp_one((at_target_ - shift()) * inverse_);
    const double nan = __builtin_nan("");
    return {max_, at_target_, valid ? all : nan, valid ? (plain_ ? rest_ : tempered_) : nan};
  }

 private:
  // Only -inf so far: relative to 0, exp(-inf) is 0 and not exp(-inf + inf) = NaN, and a NaN still shows.
  float shift() const { return max_ == -kInf ? 0 : max_; }

  void raise(float top) {
    if (!(top > max_x_)) return;
    const float before = shift();
    max_x_ = top;
    max_ = transformed(top);
    rescale(&tempered_, before, inverse_);
    rescale(&rest_, before, 1);
  }

  float transformed(float x) const { return transform_.identity() ? x : transform_(x); }

  void rescale(double* sum, float before, float inverse) const {
    if (*sum == 0) return;
    const float down = (before - max_) * inverse;  // rounded; to first order the factor gets that back
    *sum *= exp_one(down) * (1 - (((double)max_ - before) * inverse + down));
  }

  const float* without_target(const float* columns, int64_t begin, int64_t n, float* room) {
    if (columns != room) __builtin_memcpy(room, columns, n * sizeof(float));
    at_target_ = room[target_ - begin];
    room[target_ - begin] = -kInf;
    return room;
  }

  const DenseLogits& logits_;
  const Transform transform_;
  const int64_t target_;
  const float inverse_;
  const bool plain_;
  float max_x_ = -kInf, max_, at_target_ = 0;
  double tempered_ = 0, rest_ = 0;
};

void reduce_dense(const DenseLogits& logits, int64_t columns, int64_t target, float inverse_temperature, bool plain,
                  float* z, DenseSums* sums) {
  with_format(logits.format, [&](auto f) {
    DenseReduction<decltype(f)> reduction(logits, target, inverse_temperature, plain);
    for (int64_t i = 0; i < columns; i += kColumns) reduction.add(i, min(kColumns, columns - i), z);
    *sums = reduction.finish();
  });
}

// Whole steps of z and of the teacher's: totals if kSum, the gradient if kWrite.
template <class D, bool kSum, bool kWrite>
void terms(const DenseConstants& constants, const DenseCoefficients& coefficients, const float* z, const float* x,
           int64_t n, DenseTotals* totals, float* out) {
  const DenseConstants c = constants;  // its fields stay in registers, whatever `out` points to
  const DenseCoefficients g = coefficients;
  VecF value = {}, slope = {};
  for (int64_t i = 0; i < n; i += kSpan) {
    VecF value_part = {}, slope_part = {};
    for (int64_t j = i; j < min(i + kSpan, n); j += kLanes) {
      const Term term = D::of(c, Columns(c, load(z + j), load(x + j)));
      if (kSum) value_part += term.value, slope_part += D::expected_slope(term);
      if (kWrite) store(out + j, D::gradient(term, g));
    }
    value += value_part, slope += slope_part;
  }
  if (kSum) totals->value += horizontal_sum(value), totals->slope += horizontal_sum(slope);
}

typedef void (*Terms)(const DenseConstants&, const DenseCoefficients&, const float*, const float*, int64_t,
                      DenseTotals*, float*);

template <bool kSum, bool kWrite>
Terms terms_of(DivergenceCode divergence) {
  switch (divergence) {
    case xentile::kForwardKl:
      return terms<ForwardKl, kSum, kWrite>;
    case xentile::kReverseKl:
      return terms<ReverseKl, kSum, kWrite>;
    case xentile::kJsd:
      return terms<Jsd, kSum, kWrite>;
    case xentile::kSkewForwardKl:
      return terms<SkewForwardKl, kSum, kWrite>;
    case xentile::kSkewReverseKl:
      return terms<SkewReverseKl, kSum, kWrite>;
    case xentile::kTotalVariation:
      break;
  }
  return terms<TotalVariation, kSum, kWrite>;
}

void sum_divergence(const DenseRow& row, const DenseConstants& c, DenseTotals* totals) {
  alignas(64) float z_room[kColumns], x_room[kColumns];
  const Terms sum = terms_of<true, false>(c.divergence);
  *totals = {0, 0};
  for (int64_t i = 0; i < row.columns; i += kColumns) {
    const int64_t n = min(kColumns, row.columns - i);
    const float* z = load_columns(row.student, i, n, z_room);
    const float* x = load_columns(row.teacher, i, n, x_room);
    sum(c, {}, z, x, whole_steps(n), totals, nullptr);
  }
}

// Phase 3, and for the forward KL divergence meanwhile the totals.
class DenseGradient {
 public:
  DenseGradient(const DenseRow& row, const DenseConstants& c, const DenseCoefficients& coefficients,
                DenseTotals* totals)
      : row_(row), c_(c), coefficients_(coefficients), totals_(totals) {
    if (coefficients.divergence != 0)
      terms_ = totals ? terms<ForwardKl, true, true> : terms_of<false, true>(c.divergence);
  }

  // out[0:n], up to whole steps
  void add(int64_t begin, int64_t n, float* out) const {
    alignas(64) float z_room[kColumns], x_room[kColumns];
    const float* z = load_columns(row_.student, begin, n, z_room);
    const int64_t whole = whole_steps(n);
    if (terms_) {
      terms_(c_, coefficients_, z, load_columns(row_.teacher, begin, n, x_room), whole, totals_, out);
    } else {
      __builtin_memset(out, 0, whole * sizeof(float));
    }
    if (coefficients_.plain != 0) add_plain(z, whole, out);
    multiply_by_slope(z, whole, out);
  }

 private:
  void add_plain(const float* z, int64_t n, float* out) const {
    const float factor = coefficients_.plain * kExpUnbias;
    for (int64_t j = 0; j < n; j += kStep) {
      Batch b = Float32::load(z + j), y = Float32::load(out + j);
      for (VecF& v : b.v) v -= c_.student_max;
      const auto e = exp_parts(b);
      for (int k = 0; k < kBatch; k++) y.v[k] = multiply_add(e.power[k] * e.scale[k], splat(factor), y.v[k]);
      Float32::store(out + j, y);
    }
  }

  void multiply_by_slope(const float* z, int64_t n, float* out) const {
    const Transform transform = {row_.scale, row_.softcap};
    if (transform.identity()) return;
    for (int64_t j = 0; j < n; j += kLanes) store(out + j, load(out + j) * transform.slope(load(z + j)));
  }

  const DenseRow& row_;
  const DenseConstants& c_;
  const DenseCoefficients& coefficients_;
  DenseTotals* totals_;
  Terms terms_ = nullptr;
};

// dz/dx of the target's column alone: the row's formula, but one coefficient.
float gradient_at_target(const DenseRow& row, const DenseConstants& c, DenseCoefficients coefficients) {
  alignas(64) float out[kStep];
  coefficients.mass = coefficients.plain = 0;
  DenseRow unscaled = row;
  unscaled.scale = 1, unscaled.softcap = 0;
  DenseGradient(unscaled, c, coefficients, nullptr).add(row.target, 1, out);
  alignas(64) float room[kStep];
  const Transform transform = {row.scale, row.softcap};
  const VecF z = splat(load_columns(row.student, row.target, 1, room)[0]);
  return ((out[0] + coefficients.target) * transform.slope(z))[0];
}

void gradient_dense(const DenseRow& row, const DenseConstants& c, const DenseCoefficients& coefficients, Format format,
                    void* dx, DenseTotals* totals) {
  alignas(64) float out[kColumns];
  const bool has_target = row.target >= 0;
  // before x is overwritten: dx may be x
  const float at_target = has_target ? gradient_at_target(row, c, coefficients) : 0;
  if (totals) *totals = {0, 0};
  const DenseGradient gradient(row, c, coefficients, totals);
  for (int64_t i = 0; i < row.columns; i += kColumns) {
    const int64_t n = min(kColumns, row.columns - i);
    gradient.add(i, n, out);
    if (has_target && row.target >= i && row.target < i + n) out[row.target - i] = at_target;
    store_columns(format, out, n, dx, i);
  }
}

constexpr xentile::DenseKernels kDenseKernels = {reduce_dense, sum_divergence, gradient_dense};

}  // namespace
