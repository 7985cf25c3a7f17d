// The operators distillation and distillation_backward, against a dense teacher; their schemas are in
// src/xentile/_schemas.py.
#include <type_traits>
#include <vector>

#include "dense_problem.h"
#include "operators.h"
#include "sketch_state.h"

namespace xentile {
namespace {

// Per-row results.
struct DenseOutputs {
  float *kd_loss, *token_loss, *row_loss;
  SavedRow* saved;
};

// Works off rows, in one thread.
class DenseForward {
 public:
  DenseForward(const DenseProblem& dense, const DenseOutputs& outputs, const Gradient& gradient, float denominator,
               const std::optional<sketch::State>& state, const std::optional<sketch::State>& kd_state)
      : dense_(dense), outputs_(outputs), gradient_(gradient), g_(1 / denominator) {
    if (state) counter_.emplace(*state);
    if (kd_state) kd_counter_.emplace(*kd_state);
    if (dense.is_transformed()) z_.resize(dense.problem.columns + kDensePadding);
  }

  void row(int64_t i, int64_t group) {
    if (dense_.ignored(i)) return without_target(i, group, sketch::kIgnored, 0);
    if (!dense_.in_range(i)) return without_target(i, group, sketch::kOutOfRange, NAN);
    DenseRow row = dense_.row(i);
    SavedRow saved;
    const float token_loss = reduce(i, row, &saved);
    if (!z_.empty()) row.student = {z_.data(), Format::kFloat32, 1, 0};
    const float kd_loss = divergence(i, row, &saved, token_loss);
    store(i, kd_loss, token_loss, weighted_loss(i, kd_loss, token_loss), saved);
    if (counter_) counter_->add_value(token_loss, group);
    if (kd_counter_) kd_counter_->add_value(kd_loss, group);
  }

 private:
  // Phase 1; returns the cross-entropy.
  float reduce(int64_t i, const DenseRow& row, SavedRow* saved) {
    const float inverse = static_cast<float>(1 / dense_.temperature(i));
    const bool has_target = row.target >= 0;
    DenseSums student, teacher;
    dense_.kernels.reduce(row.student, row.columns, row.target, inverse, has_target, z_.empty() ? nullptr : z_.data(),
                          &student);
    // Without the same column: then equal logits have equal sums, and a divergence of 0.
    dense_.kernels.reduce(row.teacher, row.columns, row.target, inverse, false, nullptr, &teacher);
    *saved = {student.max, static_cast<float>(student.tempered), static_cast<float>(student.tempered),
              teacher.max, static_cast<float>(teacher.tempered), 0};
    if (!has_target) return 0;
    RowSums sums = {};
    sums.max = student.max, sums.target = student.at_target, sums.rest = student.rest;
    const RowLoss<float> loss = row_loss(dense_.problem.loss_task, sums, 1.0f);
    if (inverse != 1) saved->plain = loss.sum_exp;
    return loss.token;
  }

  // Phase 2, and phase 3 if it is time for it.
  float divergence(int64_t i, const DenseRow& row, SavedRow* saved, float token_loss) {
    DenseTotals totals = {NAN, NAN};
    const bool valid = !std::isnan(saved->tempered + saved->teacher_sum);
    const bool forward_kl = dense_.divergence == kForwardKl;
    const bool at_once = forward_kl && gradient_ && valid && dense_.options.kd_weight != 0;
    if (valid && !at_once) dense_.kernels.divergence(row, dense_.constants(i, *saved), &totals);
    saved->slope = forward_kl ? -1 : static_cast<float>(totals.slope);
    if (gradient_) dense_.write_gradient(gradient_, i, row, *saved, g_, token_loss, at_once ? &totals : nullptr);
    return static_cast<float>(totals.value < 0 ? 0 : totals.value);
  }

  float weighted_loss(int64_t i, float kd_loss, float token_loss) const {
    double loss = 0;
    if (dense_.options.kd_weight != 0) loss += dense_.kd_weight(i) * kd_loss;
    if (dense_.has_cross_entropy()) loss += dense_.options.ce_weight * token_loss;
    return static_cast<float>(dense_.problem.token_weight_of(i) * loss);
  }

  void without_target(int64_t i, int64_t group, int column, float loss) {
    store(i, loss, loss, loss, SavedRow{});
    if (counter_) counter_->add_token(column, group, 1);
    if (kd_counter_) kd_counter_->add_token(column, group, 1);
    if (gradient_) gradient_.clear_row(dense_.problem, i);
  }

  void store(int64_t i, float kd_loss, float token_loss, float row_loss, const SavedRow& saved) const {
    outputs_.kd_loss[i] = kd_loss, outputs_.token_loss[i] = token_loss, outputs_.row_loss[i] = row_loss;
    outputs_.saved[i] = saved;
  }

  const DenseProblem& dense_;
  const DenseOutputs& outputs_;
  const Gradient& gradient_;
  const float g_;
  std::optional<sketch::Counter> counter_, kd_counter_;
  std::vector<float> z_;  // of a row, where a softcap makes it worth keeping
};

struct DenseTensors {
  const std::optional<Tensor>&normalizer, &group_ids;
  const Tensor &loss, &denominator, &kd_loss, &token_loss, &rows;
  const std::optional<Tensor>&sketch, &kd_sketch, &dlogits;
};

void forward(const DenseProblem& dense, const Tensor& logits, const DenseTensors& t, bool zero_if_empty) {
  constexpr ScalarType acc = ScalarType::Float;
  const Problem<float>& problem = dense.problem;
  const int64_t rows = problem.rows, reduction = dense.options.reduction;
  STD_TORCH_CHECK(!(t.dlogits && reduction == kNone),
                  "xentile: the gradient of reduction none is not known in the forward");
  const float* normalizer = read<float>(t.normalizer, acc, 1, "normalizer");
  const int64_t* group_ids = read<int64_t>(t.group_ids, ScalarType::Long, rows, "group_ids");
  float* loss = write<float>(t.loss, acc, reduction == kNone ? rows : 1, "loss");
  std::vector<float> row_losses(reduction == kNone ? 0 : rows);
  const DenseOutputs outputs = {write<float>(t.kd_loss, acc, rows, "kd_loss"),
                                write<float>(t.token_loss, acc, rows, "token_loss"),
                                reduction == kNone ? loss : row_losses.data(),
                                reinterpret_cast<SavedRow*>(write<float>(t.rows, acc, 6 * rows, "rows"))};
  std::optional<sketch::State> state, kd_state;
  if (t.sketch) state = write_state(*t.sketch);
  if (t.kd_sketch) kd_state = write_state(*t.kd_sketch);
  const Gradient gradient(t.dlogits, logits, problem.row_bytes / problem.columns);

  const auto weight_of = [&](int64_t i) {
    return dense.ignored(i) || !dense.in_range(i) ? 0 : problem.token_weight_of(i);
  };
  const double total = reduction == kMean ? mean_denominator(rows, normalizer, zero_if_empty, weight_of) : 1;
  const float denominator = static_cast<float>(total);
  *write<float>(t.denominator, acc, 1, "denominator") = denominator;
  torch::stable::parallel_for(0, rows, problem.grain(), [&](int64_t begin, int64_t end) {
    DenseForward forward(dense, outputs, gradient, denominator, state, kd_state);
    for (int64_t i = begin; i < end; i++) forward.row(i, group_ids ? group_ids[i] : 0);
  });
  if (reduction != kNone)
    *loss = static_cast<float>(std::accumulate(row_losses.begin(), row_losses.end(), 0.0) / total);
}

void backward(const DenseProblem& dense, const Tensor& logits, const Tensor& dloss_tensor,
              const Tensor& denominator_tensor, const Tensor& token_loss_tensor, const Tensor& rows_tensor,
              const Tensor& dlogits, bool filled) {
  constexpr ScalarType acc = ScalarType::Float;
  const Problem<float>& problem = dense.problem;
  const bool none = dense.options.reduction == kNone;
  const float* dloss = read<float>(dloss_tensor, acc, none ? problem.rows : 1, "dloss");
  const float denominator = *read<float>(denominator_tensor, acc, 1, "denominator");
  const float* token_loss = read<float>(token_loss_tensor, acc, problem.rows, "token_loss");
  const auto* saved = reinterpret_cast<const SavedRow*>(read<float>(rows_tensor, acc, 6 * problem.rows, "rows"));
  if (filled && !none && *dloss == 1) return;
  const Gradient gradient(dlogits, logits, problem.row_bytes / problem.columns);
  torch::stable::parallel_for(0, problem.rows, problem.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      if (dense.ignored(i) || !dense.in_range(i)) {
        gradient.clear_row(problem, i);
      } else {
        const float g = canonical(dloss[none ? i : 0] / denominator);
        dense.write_gradient(gradient, i, dense.row(i), saved[i], g, token_loss[i], nullptr);
      }
    }
  });
}

// Calls f(DenseProblem).
template <class F>
void with_problem(const Tensor& logits, const Tensor& teacher, const std::optional<Tensor>& target,
                  const std::optional<Tensor>& token_weight, const std::optional<Tensor>& token_temperature,
                  const DenseOptions& options, F f) {
  with_kernels(logits.scalar_type(), [&](const auto& kernels, int64_t item) {
    if constexpr (std::is_same_v<std::decay_t<decltype(kernels)>, RowKernels<float>>) {
      const Problem<float> problem = make_problem(kernels, item, logits, target, std::nullopt, token_weight,
                                                  options.ignore_index, {0, 0, options.softcap, options.logit_scale});
      f(DenseProblem(problem, logits, teacher, token_temperature, options));
    } else {
      STD_TORCH_CHECK(false, "xentile: float64 logits are for the reference");
    }
  });
}

}  // namespace

void distillation(const Tensor& logits, const Tensor& teacher_logits, std::optional<Tensor> target,
                  std::optional<Tensor> token_weight, std::optional<Tensor> normalizer,
                  std::optional<Tensor> token_temperature, std::optional<Tensor> group_ids, Tensor loss,
                  Tensor denominator, Tensor kd_loss, Tensor token_loss, Tensor rows, std::optional<Tensor> sketch,
                  std::optional<Tensor> kd_sketch, std::optional<Tensor> dlogits, int64_t ignore_index,
                  int64_t reduction, int64_t divergence, double beta, double temperature, bool temperature_squared,
                  double kd_weight, double ce_weight, double softcap, double logit_scale, bool zero_if_empty) {
  const DenseTensors tensors = {normalizer, group_ids, loss,   denominator, kd_loss,
                                token_loss, rows,      sketch, kd_sketch,   dlogits};
  const DenseOptions options = {ignore_index,        reduction, divergence, beta,    temperature,
                                temperature_squared, kd_weight, ce_weight,  softcap, logit_scale};
  with_problem(logits, teacher_logits, target, token_weight, token_temperature, options,
               [&](const DenseProblem& dense) { forward(dense, logits, tensors, zero_if_empty); });
}

void distillation_backward(const Tensor& dloss, const Tensor& logits, const Tensor& teacher_logits,
                           std::optional<Tensor> target, std::optional<Tensor> token_weight,
                           std::optional<Tensor> token_temperature, const Tensor& denominator, const Tensor& token_loss,
                           const Tensor& rows, Tensor dlogits, int64_t ignore_index, int64_t reduction,
                           int64_t divergence, double beta, double temperature, bool temperature_squared,
                           double kd_weight, double ce_weight, double softcap, double logit_scale, bool filled) {
  const DenseOptions options = {ignore_index,        reduction, divergence, beta,    temperature,
                                temperature_squared, kd_weight, ce_weight,  softcap, logit_scale};
  with_problem(logits, teacher_logits, target, token_weight, token_temperature, options,
               [&](const DenseProblem& dense) {
                 backward(dense, logits, dloss, denominator, token_loss, rows, dlogits, filled);
               });
}

}  // namespace xentile
