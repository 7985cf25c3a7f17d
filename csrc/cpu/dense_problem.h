// What both operators of distillation against a dense teacher work on: rows of student and teacher, their temperatures,
// and how sums over a row become its loss and its gradient.
#pragma once
#include <algorithm>
#include <limits>

#include "dense_kernels.h"
#include "dispatch.h"
#include "problem.h"

namespace xentile {

struct DenseOptions {
  int64_t ignore_index, reduction, divergence;
  double beta, temperature;
  bool temperature_squared;
  double kd_weight, ce_weight, softcap, logit_scale;
};

// The columns of `rows`, which the backward has from the forward.
struct SavedRow {
  float max, tempered, plain;  // student: m, the sums of exp((z - m) / T) and exp(z - m)
  float teacher_max, teacher_sum;
  float slope;  // E
};
static_assert(sizeof(SavedRow) == 6 * sizeof(float));

inline Format format_of(ScalarType dtype, const char* name) {
  if (dtype == ScalarType::BFloat16) return Format::kBFloat16;
  if (dtype == ScalarType::Half) return Format::kFloat16;
  STD_TORCH_CHECK(dtype == ScalarType::Float, "xentile: ", name, " must be float32, bfloat16 or float16");
  return Format::kFloat32;
}

// Where a skew divergence has no mixture, it is the one that it was made from.
inline DivergenceCode divergence_of(int64_t code, double beta) {
  STD_TORCH_CHECK(code >= 0 && code <= static_cast<int64_t>(kTotalVariation), "xentile: divergence has no such code");
  const DivergenceCode divergence = static_cast<DivergenceCode>(code);
  if (static_cast<float>(beta) != 0) return divergence;
  if (divergence == kSkewForwardKl) return kForwardKl;
  return divergence == kSkewReverseKl ? kReverseKl : divergence;
}

// Rows of student and teacher, and how they become losses.
class DenseProblem {
 public:
  DenseProblem(const Problem<float>& problem, const Tensor& logits, const Tensor& teacher,
               const std::optional<Tensor>& token_temperature, const DenseOptions& options)
      : problem(problem),
        options(options),
        kernels(kernel_table().dense),
        divergence(divergence_of(options.divergence, options.beta)),
        format_(format_of(logits.scalar_type(), "logits")),
        teacher_format_(format_of(teacher.scalar_type(), "teacher_logits")),
        teacher_(static_cast<const char*>(teacher.const_data_ptr())),
        teacher_pitch_(teacher.stride(0) * (teacher_format_ == Format::kFloat32 ? 4 : 2)),
        temperatures_(read<float>(token_temperature, ScalarType::Float, problem.rows, "token_temperature")) {
    STD_TORCH_CHECK(teacher.is_cpu() && teacher.dim() == 2 && teacher.size(0) == problem.rows &&
                        teacher.size(1) == problem.columns && (teacher.stride(1) == 1 || problem.columns == 1),
                    "xentile: teacher_logits must be a CPU matrix of the shape of logits, contiguous in its last "
                    "dimension");
  }

  bool has_cross_entropy() const { return problem.targets && options.ce_weight != 0; }
  bool is_transformed() const { return problem.row_task.softcap != 0 || problem.row_task.logit_scale != 1; }
  Format format() const { return format_; }
  double temperature(int64_t i) const { return temperatures_ ? temperatures_[i] : options.temperature; }
  // What the divergence of row i counts.
  double kd_weight(int64_t i) const {
    return options.kd_weight * (options.temperature_squared ? temperature(i) * temperature(i) : 1);
  }
  int64_t target(int64_t i) const { return problem.targets ? problem.targets[i] : -1; }
  bool ignored(int64_t i) const { return problem.targets && problem.targets.ignored(i); }
  bool in_range(int64_t i) const { return !problem.targets || problem.targets.in_range(i); }

  DenseRow row(int64_t i) const {
    const float scale = problem.row_task.logit_scale, softcap = problem.row_task.softcap;
    return {{problem.row(i), format_, scale, softcap},
            {teacher_ + i * teacher_pitch_, teacher_format_, 1, 0},
            scale,
            softcap,
            problem.columns,
            target(i)};
  }

  DenseConstants constants(int64_t i, const SavedRow& saved) const {
    const double share = divergence == kSkewReverseKl ? 1 - options.beta : options.beta;
    return {divergence,
            static_cast<float>(1 / temperature(i)),
            saved.max,
            saved.teacher_max,
            1 / saved.tempered,
            1 / saved.teacher_sum,
            static_cast<float>(std::log(static_cast<double>(saved.teacher_sum)) -
                               std::log(static_cast<double>(saved.tempered))),
            static_cast<float>(1 - share),
            static_cast<float>(share)};
  }

  // g: the gradient of the loss with respect to the row's loss. With T = 1 both parts have the same exponential.
  DenseCoefficients coefficients(int64_t i, float g, const SavedRow& saved, float token_loss) const {
    g *= problem.token_weight_of(i);
    DenseCoefficients c = {};
    if (options.kd_weight != 0) c.divergence = static_cast<float>(g * kd_weight(i) / temperature(i));
    c.expected = saved.slope;
    if (!has_cross_entropy()) return c;
    const float h = g * static_cast<float>(options.ce_weight);
    c.target = h * std::expm1(-token_loss);
    if (c.divergence != 0 && temperature(i) == 1) {
      c.mass = h;
    } else {
      c.plain = h / saved.plain;
    }
    return c;
  }

  void write_gradient(const Gradient& gradient, int64_t i, const DenseRow& row, const SavedRow& saved, float g,
                      float token_loss, DenseTotals* totals) const {
    void* dx = gradient.row(problem, i);
    DenseRow wanted = row;
    if (!has_cross_entropy()) wanted.target = -1;
    const bool broken = (options.kd_weight != 0 && std::isnan(saved.tempered + saved.teacher_sum)) ||
                        (has_cross_entropy() && std::isnan(saved.plain));
    if (broken) return fill_with_nan(dx);
    kernels.gradient(wanted, constants(i, saved), coefficients(i, g, saved, token_loss), format_, dx, totals);
  }

  const Problem<float>& problem;
  const DenseOptions& options;
  const DenseKernels& kernels;
  const DivergenceCode divergence;

 private:
  void fill_with_nan(void* dx) const {
    if (format_ == Format::kFloat32) {
      std::fill_n(static_cast<float*>(dx), problem.columns, std::numeric_limits<float>::quiet_NaN());
    } else {
      const uint16_t nan = format_ == Format::kBFloat16 ? 0x7fc0 : 0x7e00;
      std::fill_n(static_cast<uint16_t*>(dx), problem.columns, nan);
    }
  }

  const Format format_, teacher_format_;
  const char* teacher_;
  const int64_t teacher_pitch_;  // bytes
  const float* temperatures_;
};

}  // namespace xentile
