// The operators that library.cpp registers. What they compute is described where they are declared:
// src/xentile/_schemas.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace xentile {

using torch::stable::Tensor;

void cross_entropy(const Tensor& logits, const Tensor& target, std::optional<Tensor> weight,
                   std::optional<Tensor> token_weight, std::optional<Tensor> normalizer,
                   std::optional<Tensor> group_ids, Tensor loss, Tensor denominator, Tensor token_loss, Tensor lse,
                   Tensor row_max, Tensor sum_exp, Tensor predicted, Tensor correct, std::optional<Tensor> entropy,
                   std::optional<Tensor> target_rank, std::optional<Tensor> sketch, std::optional<Tensor> dlogits,
                   int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss, double softcap,
                   double logit_scale, bool zero_if_empty);

void cross_entropy_backward(const Tensor& dloss, const Tensor& logits, const Tensor& target,
                            std::optional<Tensor> weight, std::optional<Tensor> token_weight, const Tensor& denominator,
                            const Tensor& token_loss, const Tensor& row_max, const Tensor& sum_exp, Tensor dlogits,
                            int64_t ignore_index, int64_t reduction, double label_smoothing, double z_loss,
                            double softcap, double logit_scale, bool filled);

void teacher_topk(const Tensor& logits, const Tensor& temperatures, Tensor ids, Tensor logprobs, Tensor log_z,
                  Tensor tail_logprob, double softcap, double logit_scale);

void distillation(const Tensor& logits, const Tensor& teacher_logits, std::optional<Tensor> target,
                  std::optional<Tensor> token_weight, std::optional<Tensor> normalizer,
                  std::optional<Tensor> token_temperature, std::optional<Tensor> group_ids, Tensor loss,
                  Tensor denominator, Tensor kd_loss, Tensor token_loss, Tensor rows, std::optional<Tensor> sketch,
                  std::optional<Tensor> kd_sketch, std::optional<Tensor> dlogits, int64_t ignore_index,
                  int64_t reduction, int64_t divergence, double beta, double temperature, bool temperature_squared,
                  double kd_weight, double ce_weight, double softcap, double logit_scale, bool zero_if_empty);

void distillation_backward(const Tensor& dloss, const Tensor& logits, const Tensor& teacher_logits,
                           std::optional<Tensor> target, std::optional<Tensor> token_weight,
                           std::optional<Tensor> token_temperature, const Tensor& denominator, const Tensor& token_loss,
                           const Tensor& rows, Tensor dlogits, int64_t ignore_index, int64_t reduction,
                           int64_t divergence, double beta, double temperature, bool temperature_squared,
                           double kd_weight, double ce_weight, double softcap, double logit_scale, bool filled);

void sketch_update(const Tensor& values, std::optional<Tensor> mask, std::optional<Tensor> weights,
                   std::optional<Tensor> group_ids, Tensor sketch, int64_t unit);

void sketch_quantile(const Tensor& sketch, const Tensor& q, Tensor value, Tensor lower, Tensor upper,
                     int64_t interpolation);

void topk_support(const Tensor& ids, const Tensor& logprobs, std::optional<Tensor> log_z,
                  std::optional<Tensor> tail_logprob, std::optional<Tensor> token_temperature, Tensor sorted_ids,
                  Tensor sorted_logprobs, Tensor tail, Tensor mass, int64_t num_classes, int64_t support,
                  int64_t duplicates, int64_t fallback, double temperature);

void topk_distillation(const Tensor& logits, const Tensor& ids, const Tensor& logprobs, const Tensor& tail,
                       std::optional<Tensor> target, std::optional<Tensor> token_weight,
                       std::optional<Tensor> normalizer, std::optional<Tensor> token_temperature,
                       std::optional<Tensor> group_ids, Tensor loss, Tensor denominator, Tensor kd_loss,
                       Tensor token_loss, Tensor student_mass, Tensor rest, std::optional<Tensor> sketch,
                       std::optional<Tensor> kd_sketch, std::optional<Tensor> dlogits, int64_t ignore_index,
                       int64_t reduction, int64_t support, int64_t divergence, double beta, double temperature,
                       bool temperature_squared, double kd_weight, double ce_weight, double softcap, double logit_scale,
                       bool zero_if_empty);

void topk_distillation_backward(const Tensor& dloss, const Tensor& logits, const Tensor& ids, const Tensor& logprobs,
                                const Tensor& tail, std::optional<Tensor> target, std::optional<Tensor> token_weight,
                                std::optional<Tensor> token_temperature, const Tensor& denominator,
                                const Tensor& token_loss, const Tensor& rest, Tensor dlogits, int64_t ignore_index,
                                int64_t reduction, int64_t support, int64_t divergence, double beta, double temperature,
                                bool temperature_squared, double kd_weight, double ce_weight, double softcap,
                                double logit_scale, bool filled);

Tensor empty_gradient(const Tensor& logits);

void empty_cache();

}  // namespace xentile
