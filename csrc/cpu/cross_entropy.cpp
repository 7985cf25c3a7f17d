// The operators cross_entropy and cross_entropy_backward; their schemas are in src/xentile/_schemas.py.
#include <memory>
#include <vector>

#include "dispatch.h"
#include "operators.h"
#include "problem.h"
#include "sketch_state.h"

namespace xentile {
namespace {

// Per-row results, null where not wanted.
template <class Acc>
struct Outputs {
  Acc *token_loss, *lse, *row_max, *sum_exp, *entropy, *row_loss;
  int64_t *predicted, *target_rank;
  bool* correct;

  void store(int64_t i, const RowLoss<Acc>& loss, Acc weight) const {
    token_loss[i] = loss.token, lse[i] = loss.lse;
    row_max[i] = loss.max, sum_exp[i] = loss.sum_exp;
    row_loss[i] = weight * loss.row;
    if (entropy) entropy[i] = loss.entropy;
  }

  void store(int64_t i, int64_t argmax, bool hit, int64_t rank) const {
    predicted[i] = argmax, correct[i] = hit;
    if (target_rank) target_rank[i] = rank;
  }
};

// Works off rows, in one thread.
template <class Acc>
class Forward {
 public:
  Forward(const Problem<Acc>& problem, const Outputs<Acc>& outputs, const Gradient& gradient, Acc denominator,
          const std::optional<sketch::State>& state)
      : problem_(problem),
        outputs_(outputs),
        gradient_(gradient),
        g_(1 / denominator),
        keeps_(gradient && problem.is_plain()) {
    if (state) counter_.emplace(*state);
    if (!keeps_) return;
    maxima_.resize(kept_maxima(problem.columns));
    if (!gradient.holds_floats(problem)) exponentials_.reset(new float[problem.columns]);
  }

  void row(int64_t i, int64_t group) {
    if (problem_.targets.ignored(i)) return without_target(i, group, true);
    if (!problem_.targets.in_range(i)) return without_target(i, group, false);
    const int64_t target = problem_.targets[i];
    const Kept kept = {exponentials_ ? exponentials_.get() : gradient_.floats(problem_, i), maxima_.data()};
    RowSums sums;
    problem_.kernels.reduce(problem_.row_task, problem_.row(i), target, &sums, keeps_ ? &kept : nullptr);
    const RowLoss<Acc> loss = row_loss(problem_.loss_task, sums, problem_.weight_of(target));
    outputs_.store(i, loss, problem_.token_weight_of(i));
    outputs_.store(i, sums.argmax, sums.argmax == target, sums.rank);
    if (counter_) counter_->add_value(static_cast<float>(loss.token), group);
    if (gradient_) gradient_.fill_row(problem_, i, g_, loss.token, loss.max, loss.sum_exp, keeps_ ? &kept : nullptr);
  }

 private:
  void without_target(int64_t i, int64_t group, bool ignored) {
    RowLoss<Acc> loss = {};
    if (!ignored) {
      RowSums sums;
      problem_.kernels.reduce(problem_.row_task, problem_.row(i), -1, &sums, nullptr);
      loss = untargeted_loss<Acc>(sums);
    }
    outputs_.store(i, loss, 1);
    outputs_.store(i, ignored ? -1 : -2, false, -1);
    if (counter_) counter_->add_token(ignored ? sketch::kIgnored : sketch::kOutOfRange, group, 1);
    if (gradient_) gradient_.clear_row(problem_, i);
  }

  const Problem<Acc>& problem_;
  const Outputs<Acc>& outputs_;
  const Gradient& gradient_;
  const Acc g_;
  const bool keeps_;
  std::optional<sketch::Counter> counter_;
  std::unique_ptr<float[]> exponentials_;  // of a row; float32 has room for them where the gradient will be
  std::vector<float> maxima_;
};

struct ForwardTensors {
  const std::optional<Tensor>&normalizer, &group_ids;
  const Tensor &loss, &denominator, &token_loss, &lse, &row_max, &sum_exp, &predicted, &correct;
  const std::optional<Tensor>&entropy, &target_rank, &sketch, &dlogits;
};

template <class Acc>
void forward(Problem<Acc> problem, const Tensor& logits, const ForwardTensors& t, int64_t reduction,
             bool zero_if_empty) {
  constexpr ScalarType acc = kAccType<Acc>;
  const int64_t rows = problem.rows;
  STD_TORCH_CHECK(!(t.dlogits && reduction == kNone),
                  "xentile: the gradient of reduction none is not known in the forward");
  problem.row_task.entropy = t.entropy.has_value(), problem.row_task.rank = t.target_rank.has_value();
  const Acc* normalizer = read<Acc>(t.normalizer, acc, 1, "normalizer");
  const int64_t* group_ids = read<int64_t>(t.group_ids, ScalarType::Long, rows, "group_ids");
  Acc* loss = write<Acc>(t.loss, acc, reduction == kNone ? rows : 1, "loss");
  std::vector<Acc> row_losses(reduction == kNone ? 0 : rows);
  const Outputs<Acc> outputs = {write<Acc>(t.token_loss, acc, rows, "token_loss"),
                                write<Acc>(t.lse, acc, rows, "lse"),
                                write<Acc>(t.row_max, acc, rows, "row_max"),
                                write<Acc>(t.sum_exp, acc, rows, "sum_exp"),
                                write<Acc>(t.entropy, acc, rows, "entropy"),
                                reduction == kNone ? loss : row_losses.data(),
                                write<int64_t>(t.predicted, ScalarType::Long, rows, "predicted"),
                                write<int64_t>(t.target_rank, ScalarType::Long, rows, "target_rank"),
                                write<bool>(t.correct, ScalarType::Bool, rows, "correct")};
  std::optional<sketch::State> state;
  if (t.sketch) state = write_state(*t.sketch);
  const Gradient gradient(t.dlogits, logits, problem.row_bytes / problem.columns);

  const auto weight_of = [&](int64_t i) {
    const bool counts = !problem.targets.ignored(i) && problem.targets.in_range(i);
    return counts ? problem.token_weight_of(i) * problem.weight_of(problem.targets[i]) : Acc(0);
  };
  const double total = reduction == kMean ? mean_denominator(rows, normalizer, zero_if_empty, weight_of) : 1;
  const Acc denominator = static_cast<Acc>(total);
  *write<Acc>(t.denominator, acc, 1, "denominator") = denominator;
  torch::stable::parallel_for(0, rows, problem.grain(), [&](int64_t begin, int64_t end) {
    Forward<Acc> forward(problem, outputs, gradient, denominator, state);
    for (int64_t i = begin; i < end; i++) forward.row(i, group_ids ? group_ids[i] : 0);
  });
  if (reduction != kNone) *loss = static_cast<Acc>(std::accumulate(row_losses.begin(), row_losses.end(), 0.0) / total);
}

template <class Acc>
void backward(const Problem<Acc>& problem, const Tensor& logits, const Tensor& dloss_tensor,
              const Tensor& denominator_tensor, const Tensor& token_loss_tensor, const Tensor& max_tensor,
              const Tensor& sum_tensor, const Tensor& dlogits, int64_t reduction, bool filled) {
  constexpr ScalarType acc = kAccType<Acc>;
  const Acc* dloss = read<Acc>(dloss_tensor, acc, reduction == kNone ? problem.rows : 1, "dloss");
  const Acc denominator = *read<Acc>(denominator_tensor, acc, 1, "denominator");
  const Acc* token_loss = read<Acc>(token_loss_tensor, acc, problem.rows, "token_loss");
  const Acc* row_max = read<Acc>(max_tensor, acc, problem.rows, "row_max");
  const Acc* sum_exp = read<Acc>(sum_tensor, acc, problem.rows, "sum_exp");
  if (filled && reduction != kNone && *dloss == 1) return;
  const Gradient gradient(dlogits, logits, problem.row_bytes / problem.columns);
  torch::stable::parallel_for(0, problem.rows, problem.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      if (problem.targets.ignored(i) || !problem.targets.in_range(i)) {
        gradient.clear_row(problem, i);
      } else {
        gradient.fill_row(problem, i, dloss[reduction == kNone ? i : 0] / denominator, token_loss[i], row_max[i],
                          sum_exp[i], nullptr);
      }
    }
  });
}

}  // namespace

void cross_entropy(const Tensor& logits, const Tensor& target, std::optional<Tensor> weight,
                   std::optional<Tensor> token_weight, std::optional<Tensor> normalizer,
                   std::optional<Tensor> group_ids, Tensor loss, Tensor denominator, Tensor token_loss, Tensor lse,
                   Tensor row_max, Tensor sum_exp, Tensor predicted, Tensor correct, std::optional<Tensor> entropy,
                   std::optional<Tensor> target_rank, std::optional<Tensor> sketch, std::optional<Tensor> dlogits,
                   int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss, double softcap,
                   double logit_scale, bool zero_if_empty) {
  const ForwardTensors tensors = {normalizer, group_ids, loss,    denominator, token_loss,  lse,    row_max,
                                  sum_exp,    predicted, correct, entropy,     target_rank, sketch, dlogits};
  with_kernels(logits.scalar_type(), [&](const auto& kernels, int64_t item) {
    forward(make_problem(kernels, item, logits, target, weight, token_weight, ignore_index,
                         {label_smoothing, z_loss, softcap, logit_scale}),
            logits, tensors, reduction, zero_if_empty);
  });
}

void cross_entropy_backward(const Tensor& dloss, const Tensor& logits, const Tensor& target,
                            std::optional<Tensor> weight, std::optional<Tensor> token_weight, const Tensor& denominator,
                            const Tensor& token_loss, const Tensor& row_max, const Tensor& sum_exp, Tensor dlogits,
                            int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss,
                            double softcap, double logit_scale, bool filled) {
  with_kernels(logits.scalar_type(), [&](const auto& kernels, int64_t item) {
    backward(make_problem(kernels, item, logits, target, weight, token_weight, ignore_index,
                          {label_smoothing, z_loss, softcap, logit_scale}),
             logits, dloss, denominator, token_loss, row_max, sum_exp, dlogits, reduction, filled);
  });
}

}  // namespace xentile
