// The mathematics of a row that takes a constant number of steps: its losses, the coefficients of its gradient, and
// where the loss is counted in a sketch. The formulas are those of xentile/reference; here is their only copy in C++.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace xentile {

// What the loss is made of, the same for every row.
template <class Acc>
struct LossTask {
  Acc smoothing, z_loss;  // eps, lambda
  Acc columns;            // V
  Acc total_weight;       // W, the sum of the class weights
};

template <class Acc>
struct RowLoss {
  Acc token;  // plain cross-entropy, in nats
  Acc lse;
  Acc max, sum_exp;  // m, S
  Acc entropy;       // if the spread was asked for
  Acc row;           // the training loss, without the token's weight
};

// log(sum_j exp(z_j)) of a row without a target, relative to the maximum.
template <class Acc>
RowLoss<Acc> untargeted_loss(const RowSums& sums) {
  constexpr Acc nan = std::numeric_limits<Acc>::quiet_NaN();
  const Acc max = static_cast<Acc>(sums.max), sum_exp = std::isfinite(max) ? static_cast<Acc>(sums.rest) : nan;
  const Acc log_sum = std::log(sum_exp);
  return {nan, max + log_sum, max, sum_exp, log_sum + static_cast<Acc>(sums.spread) / sum_exp, nan};
}

template <class Acc>
RowLoss<Acc> row_loss(const LossTask<Acc>& task, const RowSums& sums, Acc weight) {
  const Acc max = static_cast<Acc>(sums.max), rest = static_cast<Acc>(sums.rest);
  const Acc below = max - static_cast<Acc>(sums.target);  // how far the target is below the maximum
  const Acc at_target = below == 0 ? Acc(1) : std::exp(-below);
  constexpr Acc nan = std::numeric_limits<Acc>::quiet_NaN();
  const Acc sum_exp = std::isfinite(max) ? rest + at_target : nan;  // +inf, or nothing but -inf
  const Acc log_sum = below == 0 && std::isfinite(max) ? std::log1p(rest) : std::log(sum_exp);

  RowLoss<Acc> loss;
  loss.token = below + log_sum;
  loss.lse = max + log_sum;
  loss.max = max, loss.sum_exp = sum_exp;
  const Acc target_spread = at_target > 0 ? at_target * below : Acc(0);
  loss.entropy = log_sum + (static_cast<Acc>(sums.spread) + target_spread) / sum_exp;
  loss.row = (1 - task.smoothing) * weight * loss.token;
  if (task.smoothing != 0)
    loss.row += task.smoothing / task.columns * (static_cast<Acc>(sums.gap) + task.total_weight * log_sum);
  if (task.z_loss != 0) loss.row += task.z_loss * loss.lse * loss.lse;
  return loss;
}

// Any NaN becomes the usual one, of which a rounding to bfloat16 makes a NaN again.
template <class Acc>
Acc canonical(Acc x) {
  return std::isnan(x) ? std::numeric_limits<Acc>::quiet_NaN() : x;
}

// g: the gradient of the loss with respect to the row's loss. From m and S, since exp(z - lse) would inherit the
// rounding of lse.
template <class Acc>
Coefficients<Acc> coefficients(const LossTask<Acc>& task, Acc g, Acc weight, Acc token_loss, Acc max, Acc sum_exp) {
  const Acc hard = (1 - task.smoothing) * weight, smooth = task.smoothing / task.columns;
  const Acc z_slope = task.z_loss == 0 ? Acc(0) : 2 * task.z_loss * (max + std::log(sum_exp));
  const Acc p = std::exp(-token_loss), one_minus_p = -std::expm1(-token_loss);
  Coefficients<Acc> c;
  c.max = max;
  c.exp_factor = canonical(g * (hard + smooth * task.total_weight + z_slope) / sum_exp);
  c.constant = g * smooth;
  c.target = g * (-hard * one_minus_p + smooth * (task.total_weight * p - weight) + z_slope * p);
  return c;
}

}  // namespace xentile
