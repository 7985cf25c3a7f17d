// The interface between the operators `distillation` and its row kernels, of which there is one set per instruction
// set. Without a header of the standard library: see kernels.h.
#pragma once
#include <stdint.h>

#include "divergence.h"

namespace xentile {

enum class Format { kFloat32, kBFloat16, kFloat16 };

// A row of logits x, of which z = scale * x, or softcap * tanh(scale * x / softcap), is meant.
struct DenseLogits {
  const void* x;
  Format format;
  float scale, softcap;  // 1, 0: z = x
};

// Sums over a row, m the maximum of z; NaN in both if a logit is NaN or +inf, or if all are -inf.
struct DenseSums {
  float max;        // m
  float at_target;  // z of the target (0 without a target)
  double tempered;  // sum of exp((z_j - m) / T) over all j
  double rest;      // sum of exp(z_j - m) over j != target: the target is excluded, never subtracted
};

// How a row's logits become log q = (z - student_max) / T - log(sum), log p likewise, and what is made of them.
struct DenseConstants {
  DivergenceCode divergence;
  float inverse_temperature;
  float student_max, teacher_max;
  float student_factor, teacher_factor;  // 1 / sum
  float log_ratio;                       // log of the teacher's sum over the student's
  float student_share, teacher_share;    // of the mixture M
};

// dz_j = divergence q_j (df_j/dq_j - expected) + mass q_j + plain exp(z_j - max), and for the target
// dz_t = divergence q_t (df_t/dq_t - expected) + target.
struct DenseCoefficients {
  float divergence, expected;  // expected: E, the sum of q df/dq
  float mass, plain, target;
};

struct DenseTotals {
  double value, slope;  // the sums of f and G
};

struct DenseRow {
  DenseLogits student, teacher;
  float scale, softcap;     // for dz/dx, also where the student's x is z already
  int64_t columns, target;  // target < 0: none
};

struct DenseKernels {
  // plain: whether the rest is wanted where T is not 1. z: null, or room for columns + kDensePadding numbers.
  void (*reduce)(const DenseLogits&, int64_t columns, int64_t target, float inverse_temperature, bool plain, float* z,
                 DenseSums* sums);
  void (*divergence)(const DenseRow&, const DenseConstants&, DenseTotals* totals);
  // dx may be the student's x. totals: null, or for the forward KL divergence, whose gradient needs no total, where to
  // leave them in the same pass.
  void (*gradient)(const DenseRow&, const DenseConstants&, const DenseCoefficients&, Format format, void* dx,
                   DenseTotals* totals);
};

constexpr int64_t kDensePadding = 32;

}  // namespace xentile
