// A row of logits against a teacher's top K: from the tensors to the kernels of the rest and the O(K) mathematics.
#pragma once
#include <algorithm>
#include <vector>

#include "problem.h"
#include "topk_row.h"

namespace xentile {

inline InverseTemperature inverse_of(double temperature) {
  const double inverse = 1 / temperature;
  float high = static_cast<float>(inverse);
  if (high > inverse) high = std::nextafter(high, 0.0f);
  return {high, std::max(static_cast<float>(inverse - high), std::numeric_limits<float>::min())};
}

// The form of a teacher's top K that topk_support makes.
struct Teacher {
  const int32_t* ids;                           // (N, K)
  const float *logprobs, *tail, *temperatures;  // (N, K), (N,), (N,) or null
  int64_t k;
  double temperature;
};

struct TopkProblem {
  Problem<float> base;
  RestKernels kernels;
  Teacher teacher;
  TopkTask task;

  bool ignored(int64_t i) const { return base.targets && base.targets.ignored(i); }
  bool live(int64_t i) const { return !base.targets || (!base.targets.ignored(i) && base.targets.in_range(i)); }
};

// What forward and backward both do with a row; one thread has one for all of its rows.
class TopkRows {
 public:
  explicit TopkRows(const TopkProblem& problem)
      : problem_(problem),
        excluded_(problem.teacher.k + 1),
        logits_(problem.teacher.k),
        gradient_(problem.teacher.k + 1),
        row_(problem.task, problem.teacher.k) {}

  // What is known before the row is read.
  void begin(int64_t i) {
    const Teacher& teacher = problem_.teacher;
    ids_ = teacher.ids + i * teacher.k;
    x_ = problem_.base.row(i);
    input_ = {};
    input_.size = support_size();
    input_.logits = logits_.data();
    input_.logprobs = teacher.logprobs + i * teacher.k;
    input_.tail = teacher.tail[i];
    input_.temperature = teacher.temperatures ? teacher.temperatures[i] : teacher.temperature;
    input_.target_entry = -1;
    input_.has_target = problem_.base.targets && problem_.live(i);
    exclude(input_.has_target ? static_cast<int32_t>(problem_.base.targets[i]) : -1);
    problem_.kernels.gather(x_, ids_, input_.size, logits_.data());
  }

  // Where phase 1 shall leave the exponentials, if the gradient is made of them: in one or both of two arrays.
  std::optional<KeptRest> kept(float* one, float* other, float* maxima) const {
    const RestTask wanted = gradient_task(), summed = reduce_task();
    if (!(wanted.tempered || wanted.plain) || problem_.task.softcap != 0 || problem_.task.logit_scale != 1) return {};
    if (!summed.tempered) return KeptRest{nullptr, one, maxima};
    return KeptRest{one, summed.plain ? other : nullptr, maxima};
  }

  RestSums reduce(const KeptRest* kept) const {
    RestSums sums;
    problem_.kernels.reduce(reduce_task(), x_, &sums, kept);
    if (!is_tempered()) sums.tempered = sums.plain;
    if (is_tempered() && !input_.has_target) sums.plain = sums.tempered;
    return sums;
  }

  const TopkRow& read(float max, float rest, float plain_rest) {
    input_.max = max, input_.rest = rest, input_.plain_rest = plain_rest;
    row_.read(input_);
    return row_;
  }

  // Neither NaN nor +inf among the logits, and not all -inf.
  bool is_finite(const RestSums& sums) const {
    float top = std::isnan(sums.tempered) || std::isnan(sums.plain) ? NAN : sums.top;
    for (int64_t k = 0; k < input_.size; k++) top = larger_or_nan(top, logits_[k]);
    if (input_.has_target) top = larger_or_nan(top, input_.target_logit);
    return std::isfinite(top);
  }

  // g: the gradient of the loss with respect to the row's loss.
  void gradient(double g, char* dx, const KeptRest* kept) {
    const RestTask task = gradient_task();
    for (int64_t k = 0; k < input_.size; k++) gradient_[k] = row_.support_gradient(g, k);
    if (task.tempered || task.plain) {
      problem_.kernels.gradient(task, x_, row_.rest_gradient(g), dx, kept);
    } else {
      std::memset(dx, 0, problem_.base.row_bytes);
    }
    problem_.kernels.scatter(gradient_.data(), ids_, input_.size, dx);
    if (!input_.has_target || input_.target_entry >= 0) return;
    const float at_target = row_.target_gradient(g);
    problem_.kernels.scatter(&at_target, &target_, 1, dx);
  }

 private:
  static float larger_or_nan(float a, float b) { return b > a || std::isnan(b) ? b : a; }

  // How many ids come before the first that is no column, or out of order: none leads outside of the row.
  int64_t support_size() const {
    int64_t size = 0, last = -1;
    while (size < problem_.teacher.k && ids_[size] > last && ids_[size] < problem_.base.columns) last = ids_[size++];
    return size;
  }

  // Merges the target, if there is one, into the support.
  void exclude(int32_t target) {
    target_ = target;
    excluded_size_ = input_.size;
    std::copy_n(ids_, input_.size, excluded_.data());
    if (target < 0) return;
    problem_.kernels.gather(x_, &target, 1, &input_.target_logit);
    int32_t* end = excluded_.data() + input_.size;
    int32_t* place = std::lower_bound(excluded_.data(), end, target);
    if (place < end && *place == target) {
      input_.target_entry = place - excluded_.data();
      return;
    }
    std::copy_backward(place, end, end + 1);
    *place = target;
    excluded_size_++;
  }

  bool is_tempered() const { return input_.temperature != 1; }

  RestTask rest_task(bool tempered, bool plain) const {
    return {problem_.base.columns,
            static_cast<float>(problem_.task.logit_scale),
            static_cast<float>(problem_.task.softcap),
            excluded_.data(),
            excluded_size_,
            inverse_of(input_.temperature),
            tempered,
            plain};
  }

  RestTask reduce_task() const { return rest_task(is_tempered(), !is_tempered() || input_.has_target); }

  RestTask gradient_task() const {
    const bool kd = problem_.task.has_tail_gradient(), ce = problem_.task.ce_weight != 0 && input_.has_target;
    return rest_task(kd && is_tempered(), ce || (kd && !is_tempered()));
  }

  const TopkProblem& problem_;
  const int32_t* ids_ = nullptr;
  const void* x_ = nullptr;
  int32_t target_ = -1;
  TopkInput input_ = {};
  std::vector<int32_t> excluded_;  // the support and the target, ascending
  int64_t excluded_size_ = 0;
  std::vector<float> logits_, gradient_;
  TopkRow row_;
};

}  // namespace xentile
