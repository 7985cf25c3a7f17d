// The mathematics of a row of distillation against a teacher's top K that takes O(K) steps, in double: its losses and
// the coefficients of its gradient. The formulas are those of xentile/reference/distillation.py.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "divergence.h"
#include "row_math.h"

namespace xentile {

enum SupportCode { kTruncated, kTeacherRenormalized, kRenormalized, kTailBucket, kSampled };

struct TopkTask {
  SupportCode support;
  DivergenceTask divergence;
  bool temperature_squared;
  double kd_weight, ce_weight, softcap, logit_scale;

  bool has_tail_gradient() const { return kd_weight != 0 && support != kRenormalized; }
};

// What is known of a row after phase 1.
struct TopkInput {
  const float *logits,
      *logprobs;  // (size) of the support: the student's x, the teacher's log p
  int64_t size;
  double tail, temperature;
  bool has_target;
  int64_t target_entry;  // where the support has the target, -1 if it does not
  float target_logit;
  float max, rest, plain_rest;  // m, r and r1: see RestSums
};

struct DoubleMath {
  typedef double Number;
  static constexpr double kInf = std::numeric_limits<double>::infinity();

  static double number(double x) { return x; }
  static double exp(double x) { return std::exp(x); }
  static double expm1(double x) { return std::expm1(x); }
  static double abs(double x) { return std::fabs(x); }
  static double larger(double a, double b) { return a < b ? b : a; }
  static double times(double mass, double x) { return mass == 0 ? 0 : mass * x; }  // also for an infinite x
  static double signed_as(double magnitude, double x) { return x > 0 ? magnitude : x < 0 ? -magnitude : 0; }

  static double logaddexp(double a, double b) {
    if (a == b) return a + 0.69314718055994531;  // also if both are infinite
    return larger(a, b) + std::log1p(std::exp(-std::fabs(a - b)));
  }

  static double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }

  // a log(a / b) - a + b; b where a = 0, infinite where b = 0 < a
  static double bregman(double log_a, double log_b, double a, double b) {
    if (log_a == -kInf) return b;
    const double d = log_b - log_a;
    return std::fabs(d) < 0.5 ? a * exp_remainder(d) : b - a - times(a, d);
  }

 private:
  // exp(d) - 1 - d for |d| < 0.5: the Taylor series up to where a term is below the last digit
  static double exp_remainder(double d) {
    double sum = 1;
    for (int n = 14; n > 2; n--) sum = 1 + sum * d * kReciprocal[n];
    return 0.5 * d * d * sum;
  }
  static constexpr double kReciprocal[] = {0,      1,      1. / 2,  1. / 3,  1. / 4,  1. / 5,  1. / 6, 1. / 7,
                                           1. / 8, 1. / 9, 1. / 10, 1. / 11, 1. / 12, 1. / 13, 1. / 14};
};

// A student's masses on the support and outside of it, its losses and its gradient. One object serves many rows.
class TopkRow {
 public:
  TopkRow(const TopkTask& task, int64_t k) : task_(task), z_(k), relative_(k), conditional_(k), q_(k), slope_(k) {}

  void read(const TopkInput& input) {
    in_ = &input;
    const double temperature = input.temperature;
    target_z_ = transform(input.target_logit);
    read_support();
    lse_tail_ = log_sum(input.max / temperature, input.rest);
    if (input.has_target && input.target_entry < 0)
      lse_tail_ = DoubleMath::logaddexp(lse_tail_, target_z_ / temperature);
    const double gap = lse_tail_ - lse_support_;
    inside_ = -DoubleMath::softplus(gap), outside_ = -DoubleMath::softplus(-gap);
    kd_ = divergence();
    if (!input.has_target) return;
    const double others = other_logsumexp();
    ce_ = DoubleMath::softplus(others - target_z_), lse_ = DoubleMath::logaddexp(others, target_z_);
  }

  double student_mass() const { return std::exp(inside_); }
  double kd_loss() const { return kd_; }
  double token_loss() const { return in_->has_target ? ce_ : 0; }

  // Without the token's weight.
  double loss() const {
    double sum = 0;
    if (task_.kd_weight != 0) sum += task_.kd_weight * squared() * kd_;
    if (has_ce()) sum += task_.ce_weight * ce_;
    return sum;
  }

  // g: the gradient of the loss with respect to the row's loss.
  RestCoefficients rest_gradient(double g) const {
    const double m = in_->max;
    if (m == -kInf) return {0, 0, 0};
    double tempered = 0, plain = 0;
    if (task_.has_tail_gradient()) tempered = kd_factor(g) * at_tail() * std::exp(m / in_->temperature - lse_tail_);
    if (has_ce()) plain = ce_factor(g) * std::exp(m - lse_);
    if (in_->temperature == 1) plain += std::exchange(tempered, 0);
    return {in_->max, canonical(static_cast<float>(tempered)), canonical(static_cast<float>(plain))};
  }

  float support_gradient(double g, int64_t k) const {
    double dz = 0;
    if (task_.kd_weight != 0) dz = kd_factor(g) * (slope_[k] - DoubleMath::times(q_[k], expected_));
    if (has_ce()) dz += k == in_->target_entry ? target_ce_gradient(g) : ce_factor(g) * std::exp(z_[k] - lse_);
    return static_cast<float>(dz * slope_of_transform(z_[k]));
  }

  // Of a target that is not in the support.
  float target_gradient(double g) const {
    double dz = 0;
    if (task_.has_tail_gradient() && target_z_ != -kInf)
      dz = kd_factor(g) * at_tail() * std::exp(target_z_ / in_->temperature - lse_tail_);
    if (has_ce()) dz += target_ce_gradient(g);
    return static_cast<float>(dz * slope_of_transform(target_z_));
  }

 private:
  typedef DivergenceTerm<double> Term;
  static constexpr double kInf = DoubleMath::kInf;

  double transform(double x) const {
    const double scaled = task_.logit_scale * x;
    return task_.softcap == 0 ? scaled : task_.softcap * std::tanh(scaled / task_.softcap);
  }
  double slope_of_transform(double z) const {
    const double u = task_.softcap == 0 ? 0 : z / task_.softcap;
    return task_.logit_scale * ((1 - u) * (1 + u));
  }

  static double log_sum(double max, double sum) { return sum == 0 ? -kInf : max + std::log(sum); }

  // log q~_k, relative to the largest entry and with the others' sum by itself: an entry that has nearly all of the
  // mass keeps its digits.
  void read_support() {
    double top = -kInf;
    int64_t top_entry = -1;
    for (int64_t k = 0; k < in_->size; k++) {
      z_[k] = transform(in_->logits[k]);
      if (z_[k] > top) top = z_[k], top_entry = k;
    }
    top_ = top == -kInf ? 0 : top;
    double others = 0;
    for (int64_t k = 0; k < in_->size; k++) {
      const double below = (z_[k] - top_) / in_->temperature;
      relative_[k] = std::exp(below), conditional_[k] = below;
      if (k != top_entry) others += relative_[k];
    }
    const double log_others = std::log1p(others);
    for (int64_t k = 0; k < in_->size; k++) conditional_[k] -= log_others;
    conditional_scale_ = 1 / (1 + others);
    lse_support_ = top == -kInf && !std::isnan(others) ? -kInf : top_ / in_->temperature + log_others;
  }

  double conditional_mass(int64_t k) const { return relative_[k] * conditional_scale_; }

  // The divergence in nats, and the slopes.
  double divergence() {
    const bool renormalized = task_.support == kRenormalized;
    const double shift = renormalized ? 0 : inside_, mass = renormalized ? 1 : std::exp(inside_);
    double sum = 0;
    expected_ = 0;
    for (int64_t k = 0; k < in_->size; k++) {
      const double log_p = in_->logprobs[k];
      q_[k] = conditional_mass(k) * mass;
      const Term term = log_p == -kInf ? Term{0, 0} : class_term(log_p, conditional_[k] + shift, q_[k]);
      if (log_p == -kInf) q_[k] = 0;
      sum += term.value, slope_[k] = term.slope, expected_ += term.slope;
    }
    tail_slope_ = 0;
    if (task_.support == kTailBucket && !(in_->tail == -kInf && outside_ == -kInf)) {
      const Term term = class_term(in_->tail, outside_, std::exp(outside_));
      sum += term.value, tail_slope_ = term.slope, expected_ += term.slope;
    }
    return is_open_forward_kl() ? open_forward_kl() : sum;
  }

  bool is_open_forward_kl() const {
    return task_.divergence.code == kForwardKl && !task_.divergence.closed && task_.support != kSampled;
  }

  Term class_term(double log_p, double log_q, double q) const {
    const double p = std::exp(log_p);
    if (task_.support == kSampled) return {-DoubleMath::times(p, log_q), -p};
    return Divergence<DoubleMath>::term(task_.divergence, log_p, log_q, p, q);
  }

  // sum p log(p / q) as P (sum bregman(p / P, q / Q) + log P - log Q): every part of it is accurate by itself.
  double open_forward_kl() const {
    double total = 0;
    if (task_.support == kTeacherRenormalized) {
      total = in_->size ? 1 : 0;
    } else {
      for (int64_t k = 0; k < in_->size; k++) total += std::exp(double{in_->logprobs[k]});
    }
    if (total == 0) return 0;
    const double log_total = std::log(total);
    double share = 0;
    for (int64_t k = 0; k < in_->size; k++) {
      const double log_p = in_->logprobs[k] - log_total;
      if (log_p != -kInf) share += DoubleMath::bregman(log_p, conditional_[k], std::exp(log_p), conditional_mass(k));
    }
    return total * (share + log_total - inside_);
  }

  // logsumexp of z over every column but the target
  double other_logsumexp() const {
    double sum = 0;
    for (int64_t k = 0; k < in_->size; k++)
      if (k != in_->target_entry) sum += in_->temperature == 1 ? relative_[k] : std::exp(z_[k] - top_);
    return DoubleMath::logaddexp(log_sum(in_->max, in_->plain_rest), log_sum(top_, sum));
  }

  bool has_ce() const { return in_->has_target && task_.ce_weight != 0; }
  double squared() const { return task_.temperature_squared ? in_->temperature * in_->temperature : 1; }
  double kd_factor(double g) const { return g * task_.kd_weight * squared() / in_->temperature; }
  double ce_factor(double g) const { return g * task_.ce_weight; }
  double target_ce_gradient(double g) const { return ce_factor(g) * std::expm1(-ce_); }

  // G_tail - (1 - Q) E, which a column of the tail has its share of
  double at_tail() const { return tail_slope_ - DoubleMath::times(std::exp(outside_), expected_); }

  const TopkTask& task_;
  const TopkInput* in_ = nullptr;
  std::vector<double> z_, relative_;             // relative_: exp((z - top) / T)
  std::vector<double> conditional_, q_, slope_;  // log q~, q and G of each class
  double top_ = 0, conditional_scale_ = 0, target_z_ = 0;
  double lse_support_ = 0, lse_tail_ = 0, inside_ = 0, outside_ = 0;
  double tail_slope_ = 0, expected_ = 0, kd_ = 0, ce_ = 0, lse_ = 0;
};

}  // namespace xentile
