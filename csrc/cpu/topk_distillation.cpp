// The operators topk_distillation and topk_distillation_backward; their schemas are in src/xentile/_schemas.py.
#include <memory>

#include "dispatch.h"
#include "operators.h"
#include "sketch_state.h"
#include "topk_problem.h"

namespace xentile {
namespace {

// Calls f(row kernels, kernels of the rest, bytes of a logit).
template <class F>
void with_rest_kernels(ScalarType dtype, F f) {
  const KernelTable& table = kernel_table();
  switch (dtype) {
    case ScalarType::Float:
      return f(table.float32, table.float32_rest, 4);
    case ScalarType::BFloat16:
      return f(table.bfloat16, table.bfloat16_rest, 2);
    case ScalarType::Half:
      return f(table.float16, table.float16_rest, 2);
    default:
      STD_TORCH_CHECK(false, "xentile: logits must be float32, bfloat16 or float16");
  }
}

struct Outputs {
  float *kd_loss, *token_loss, *student_mass, *rest, *row_loss;

  void store(int64_t i, const RestSums& sums, float kd, float ce, float mass, float row) const {
    rest[3 * i] = sums.max, rest[3 * i + 1] = sums.tempered, rest[3 * i + 2] = sums.plain;
    kd_loss[i] = kd, token_loss[i] = ce, student_mass[i] = mass, row_loss[i] = row;
  }
};

struct Sketches {
  std::optional<sketch::State> token_loss, kd_loss;
};

// Works off rows, in one thread.
class Forward {
 public:
  Forward(const TopkProblem& problem, const Outputs& outputs, const Gradient& gradient, float denominator,
          const Sketches& sketches)
      : problem_(problem), outputs_(outputs), gradient_(gradient), g_(1 / denominator), rows_(problem) {
    if (sketches.token_loss) counter_.emplace(*sketches.token_loss);
    if (sketches.kd_loss) kd_counter_.emplace(*sketches.kd_loss);
    if (!gradient) return;
    maxima_.resize(kept_maxima(problem.base.columns));
    exponentials_.reset(new float[2 * problem.base.columns]);
  }

  void row(int64_t i, int64_t group) {
    if (problem_.ignored(i)) {
      outputs_.store(i, {}, 0, 0, 0, 0);
      return without_target(i, group, sketch::kIgnored);
    }
    const bool live = problem_.live(i);
    rows_.begin(i);
    const std::optional<KeptRest> kept = live ? keep(i) : std::nullopt;
    const RestSums sums = rows_.reduce(kept ? &*kept : nullptr);
    const TopkRow& row = rows_.read(sums.max, sums.tempered, sums.plain);
    const float mass = row.student_mass(), weight = problem_.base.token_weight_of(i);
    if (live && rows_.is_finite(sums)) {
      outputs_.store(i, sums, row.kd_loss(), row.token_loss(), mass, weight * row.loss());
    } else {
      outputs_.store(i, sums, NAN, problem_.base.targets ? NAN : 0, mass, NAN);
    }
    if (!live) return without_target(i, group, sketch::kOutOfRange);
    if (counter_) counter_->add_value(outputs_.token_loss[i], group);
    if (kd_counter_) kd_counter_->add_value(outputs_.kd_loss[i], group);
    if (gradient_) rows_.gradient(g_ * weight, gradient_.row(problem_.base, i), kept ? &*kept : nullptr);
  }

 private:
  void without_target(int64_t i, int64_t group, sketch::Column reason) {
    if (counter_) counter_->add_token(reason, group, 1);
    if (kd_counter_) kd_counter_->add_token(reason, group, 1);
    if (gradient_) gradient_.clear_row(problem_.base, i);
  }

  std::optional<KeptRest> keep(int64_t i) {
    if (!gradient_) return {};
    float *one = exponentials_.get(), *other = one + problem_.base.columns;
    if (gradient_.holds_floats(problem_.base)) one = gradient_.floats(problem_.base, i);
    return rows_.kept(one, other, maxima_.data());
  }

  const TopkProblem& problem_;
  const Outputs& outputs_;
  const Gradient& gradient_;
  const float g_;
  TopkRows rows_;
  std::optional<sketch::Counter> counter_, kd_counter_;
  std::unique_ptr<float[]> exponentials_;  // of a row; float32 has room for them
                                           // where the gradient will be
  std::vector<float> maxima_;
};

struct ForwardTensors {
  const std::optional<Tensor>&normalizer, &group_ids;
  const Tensor &loss, &denominator, &kd_loss, &token_loss, &student_mass, &rest;
  const std::optional<Tensor>&sketch, &kd_sketch, &dlogits;
};

void forward(const TopkProblem& problem, const Tensor& logits, const ForwardTensors& t, int64_t reduction,
             bool zero_if_empty) {
  const int64_t rows = problem.base.rows;
  STD_TORCH_CHECK(!(t.dlogits && reduction == kNone),
                  "xentile: the gradient of reduction none is not known in the forward");
  STD_TORCH_CHECK(!(t.sketch && !problem.base.targets), "xentile: sketch counts the loss of targets, and needs them");
  const float* normalizer = read<float>(t.normalizer, ScalarType::Float, 1, "normalizer");
  const int64_t* group_ids = read<int64_t>(t.group_ids, ScalarType::Long, rows, "group_ids");
  float* loss = write<float>(t.loss, ScalarType::Float, reduction == kNone ? rows : 1, "loss");
  std::vector<float> row_losses(reduction == kNone ? 0 : rows);
  const Outputs outputs = {write<float>(t.kd_loss, ScalarType::Float, rows, "kd_loss"),
                           write<float>(t.token_loss, ScalarType::Float, rows, "token_loss"),
                           write<float>(t.student_mass, ScalarType::Float, rows, "student_mass"),
                           write<float>(t.rest, ScalarType::Float, 3 * rows, "rest"),
                           reduction == kNone ? loss : row_losses.data()};
  Sketches sketches;
  if (t.sketch) sketches.token_loss = write_state(*t.sketch);
  if (t.kd_sketch) sketches.kd_loss = write_state(*t.kd_sketch);
  const Gradient gradient(t.dlogits, logits, problem.base.row_bytes / problem.base.columns);

  const auto weight_of = [&](int64_t i) { return problem.live(i) ? problem.base.token_weight_of(i) : 0; };
  const double total = reduction == kMean ? mean_denominator(rows, normalizer, zero_if_empty, weight_of) : 1;
  const float denominator = static_cast<float>(total);
  *write<float>(t.denominator, ScalarType::Float, 1, "denominator") = denominator;
  torch::stable::parallel_for(0, rows, problem.base.grain(), [&](int64_t begin, int64_t end) {
    Forward forward(problem, outputs, gradient, denominator, sketches);
    for (int64_t i = begin; i < end; i++) forward.row(i, group_ids ? group_ids[i] : 0);
  });
  if (reduction != kNone)
    *loss = static_cast<float>(std::accumulate(row_losses.begin(), row_losses.end(), 0.0) / total);
}

void backward(const TopkProblem& problem, const Tensor& logits, const Tensor& dloss_tensor,
              const Tensor& denominator_tensor, const Tensor& rest_tensor, const Tensor& dlogits, int64_t reduction,
              bool filled) {
  const int64_t rows = problem.base.rows;
  const float* dloss = read<float>(dloss_tensor, ScalarType::Float, reduction == kNone ? rows : 1, "dloss");
  const float denominator = *read<float>(denominator_tensor, ScalarType::Float, 1, "denominator");
  const float* rest = read<float>(rest_tensor, ScalarType::Float, 3 * rows, "rest");
  if (filled && reduction != kNone && *dloss == 1) return;
  const Gradient gradient(dlogits, logits, problem.base.row_bytes / problem.base.columns);
  torch::stable::parallel_for(0, rows, problem.base.grain(), [&](int64_t begin, int64_t end) {
    TopkRows topk(problem);
    for (int64_t i = begin; i < end; i++) {
      if (!problem.live(i)) {
        gradient.clear_row(problem.base, i);
        continue;
      }
      topk.begin(i);
      topk.read(rest[3 * i], rest[3 * i + 1], rest[3 * i + 2]);
      const float g = dloss[reduction == kNone ? i : 0] / denominator;
      topk.gradient(g * problem.base.token_weight_of(i), gradient.row(problem.base, i), nullptr);
    }
  });
}

struct TopkOptions {
  int64_t ignore_index, support, divergence;
  double beta, temperature;
  bool temperature_squared;
  double kd_weight, ce_weight, softcap, logit_scale;
};

TopkTask make_task(const TopkOptions& o) {
  STD_TORCH_CHECK(o.support >= kTruncated && o.support <= kSampled, "xentile: support has no such code");
  STD_TORCH_CHECK(o.divergence >= kForwardKl && o.divergence <= kTotalVariation,
                  "xentile: divergence has no such code");
  const auto support = static_cast<SupportCode>(o.support);
  const auto divergence = static_cast<DivergenceCode>(o.divergence);
  const double share = divergence == kSkewReverseKl ? 1 - o.beta : o.beta;
  const bool closed = support == kRenormalized || support == kTailBucket;
  return {support,
          {divergence, share, std::log(share), std::log1p(-share), closed},
          o.temperature_squared,
          o.kd_weight,
          o.ce_weight,
          o.softcap,
          o.logit_scale};
}

// Calls f(problem), if it is one that the kernels serve.
template <class F>
void with_problem(const Tensor& logits, const Tensor& ids, const Tensor& logprobs, const Tensor& tail,
                  const std::optional<Tensor>& target, const std::optional<Tensor>& token_weight,
                  const std::optional<Tensor>& token_temperature, const TopkOptions& options, F f) {
  with_rest_kernels(logits.scalar_type(), [&](const auto& row_kernels, const RestKernels& kernels, int64_t item) {
    const Problem<float> base = make_problem(row_kernels, item, logits, target, std::nullopt, token_weight,
                                             options.ignore_index, {0, 0, options.softcap, options.logit_scale});
    STD_TORCH_CHECK(base.columns <= std::numeric_limits<int32_t>::max(), "xentile: logits have more columns than ids");
    STD_TORCH_CHECK(ids.dim() == 2 && ids.size(1) > 0, "xentile: ids must be a matrix with at least one column");
    const int64_t k = ids.size(1);
    const Teacher teacher = {read<int32_t>(ids, ScalarType::Int, base.rows * k, "ids"),
                             read<float>(logprobs, ScalarType::Float, base.rows * k, "logprobs"),
                             read<float>(tail, ScalarType::Float, base.rows, "tail"),
                             read<float>(token_temperature, ScalarType::Float, base.rows, "token_temperature"),
                             k,
                             options.temperature};
    f(TopkProblem{base, kernels, teacher, make_task(options)});
  });
}

}  // namespace

void topk_distillation(const Tensor& logits, const Tensor& ids, const Tensor& logprobs, const Tensor& tail,
                       std::optional<Tensor> target, std::optional<Tensor> token_weight,
                       std::optional<Tensor> normalizer, std::optional<Tensor> token_temperature,
                       std::optional<Tensor> group_ids, Tensor loss, Tensor denominator, Tensor kd_loss,
                       Tensor token_loss, Tensor student_mass, Tensor rest, std::optional<Tensor> sketch,
                       std::optional<Tensor> kd_sketch, std::optional<Tensor> dlogits, int64_t ignore_index,
                       int64_t reduction, int64_t support, int64_t divergence, double beta, double temperature,
                       bool temperature_squared, double kd_weight, double ce_weight, double softcap, double logit_scale,
                       bool zero_if_empty) {
  const ForwardTensors tensors = {normalizer,   group_ids, loss,   denominator, kd_loss, token_loss,
                                  student_mass, rest,      sketch, kd_sketch,   dlogits};
  const TopkOptions options = {ignore_index,        support,   divergence, beta,    temperature,
                               temperature_squared, kd_weight, ce_weight,  softcap, logit_scale};
  with_problem(logits, ids, logprobs, tail, target, token_weight, token_temperature, options,
               [&](const TopkProblem& problem) { forward(problem, logits, tensors, reduction, zero_if_empty); });
}

void topk_distillation_backward(const Tensor& dloss, const Tensor& logits, const Tensor& ids, const Tensor& logprobs,
                                const Tensor& tail, std::optional<Tensor> target, std::optional<Tensor> token_weight,
                                std::optional<Tensor> token_temperature, const Tensor& denominator,
                                const Tensor& token_loss, const Tensor& rest, Tensor dlogits, int64_t ignore_index,
                                int64_t reduction, int64_t support, int64_t divergence, double beta, double temperature,
                                bool temperature_squared, double kd_weight, double ce_weight, double softcap,
                                double logit_scale, bool filled) {
  (void)token_loss;  // found again from `rest`: the support has it in double,
                     // and costs little
  const TopkOptions options = {ignore_index,        support,   divergence, beta,    temperature,
                               temperature_squared, kd_weight, ce_weight,  softcap, logit_scale};
  with_problem(logits, ids, logprobs, tail, target, token_weight, token_temperature, options,
               [&](const TopkProblem& problem) {
                 backward(problem, logits, dloss, denominator, rest, dlogits, reduction, filled);
               });
}

}  // namespace xentile
