// The operators that library.cpp registers. What they compute is described where they are declared:
// src/xentile/_ops.py.
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

void sketch_update(const Tensor& values, std::optional<Tensor> mask, std::optional<Tensor> weights,
                   std::optional<Tensor> group_ids, Tensor sketch, int64_t unit);

void sketch_quantile(const Tensor& sketch, const Tensor& q, Tensor value, Tensor lower, Tensor upper,
                     int64_t interpolation);

}  // namespace xentile
