// What both operators on a matrix of logits work on: its rows, their targets and weights, and the matrix for the
// gradient.
#pragma once
#include <cstring>
#include <numeric>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"
#include "row_math.h"

namespace xentile {

enum Reduction { kNone, kMean, kSum };

// The target of each row, from int64 or int32. Without targets no row may be asked for.
class Targets {
 public:
  Targets(const std::optional<Tensor>& target, int64_t rows, int64_t columns, int64_t ignore_index)
      : columns_(columns), ignore_index_(ignore_index) {
    if (!target) return;
    if (target->scalar_type() == ScalarType::Int) {
      narrow_ = read<int32_t>(*target, ScalarType::Int, rows, "target");
    } else {
      wide_ = read<int64_t>(*target, ScalarType::Long, rows, "target");
    }
  }
  explicit operator bool() const { return wide_ || narrow_; }
  int64_t operator[](int64_t i) const { return wide_ ? wide_[i] : narrow_[i]; }
  bool ignored(int64_t i) const { return (*this)[i] == ignore_index_; }
  bool in_range(int64_t i) const { return (*this)[i] >= 0 && (*this)[i] < columns_; }

 private:
  const int64_t* wide_ = nullptr;
  const int32_t* narrow_ = nullptr;
  int64_t columns_, ignore_index_;
};

struct Options {
  double label_smoothing, z_loss, softcap, logit_scale;
};

// The matrix of logits, and how its rows become losses.
template <class Acc>
struct Problem {
  const void* row(int64_t i) const { return data + i * pitch; }
  // Whether the gradient is exp(x - max) times a number, everywhere but at the target.
  bool is_plain() const {
    return sizeof(Acc) == 4 && !row_task.smoothing && !row_task.entropy && row_task.softcap == 0 &&
           row_task.logit_scale == 1;
  }
  Acc weight_of(int64_t target) const { return weight ? weight[target] : Acc(1); }
  Acc token_weight_of(int64_t i) const { return token_weight ? token_weight[i] : Acc(1); }
  int64_t grain() const { return 1 + 32768 / columns; }  // rows that are worth a thread

  const RowKernels<Acc>& kernels;
  int64_t rows, columns, row_bytes, pitch;  // pitch: bytes from one row to the next
  const char* data;
  Targets targets;
  const Acc *weight, *token_weight;
  RowTask<Acc> row_task;
  LossTask<Acc> loss_task;
};

template <class Acc>
Problem<Acc> make_problem(const RowKernels<Acc>& kernels, int64_t item, const Tensor& logits,
                          const std::optional<Tensor>& target, const std::optional<Tensor>& class_weight,
                          const std::optional<Tensor>& token_weights, int64_t ignore_index, const Options& options) {
  STD_TORCH_CHECK(
      logits.is_cpu() && logits.dim() == 2 && logits.size(1) > 0 && (logits.stride(1) == 1 || logits.size(1) == 1),
      "xentile: logits must be a CPU matrix with at least one column, contiguous in its last dimension");
  const int64_t rows = logits.size(0), columns = logits.size(1);
  const Acc* weight = read<Acc>(class_weight, kAccType<Acc>, columns, "weight");
  const bool smoothing = options.label_smoothing != 0;
  const double total_weight = weight && smoothing ? std::accumulate(weight, weight + columns, 0.0) : columns;
  return {kernels,
          rows,
          columns,
          columns * item,
          logits.stride(0) * item,
          static_cast<const char*>(logits.const_data_ptr()),
          Targets(target, rows, columns, ignore_index),
          weight,
          read<Acc>(token_weights, kAccType<Acc>, rows, "token_weight"),
          {columns, static_cast<Acc>(options.logit_scale), static_cast<Acc>(options.softcap), weight, smoothing, false,
           false},
          {static_cast<Acc>(options.label_smoothing), static_cast<Acc>(options.z_loss), static_cast<Acc>(columns),
           static_cast<Acc>(total_weight)}};
}

// What a mean is divided by: the normalizer if there is one, else the sum of weight_of(i), which is 0 for a row that does
// not count.
template <class Acc, class WeightOf>
double mean_denominator(int64_t rows, const Acc* normalizer, bool zero_if_empty, WeightOf weight_of) {
  double total = normalizer ? *normalizer : 0;
  for (int64_t i = 0; i < rows && !normalizer; i++) total += weight_of(i);
  return zero_if_empty && total == 0 ? INFINITY : total;
}

// The matrix that receives the gradient.
class Gradient {
 public:
  Gradient(const std::optional<Tensor>& dlogits, const Tensor& logits, int64_t item) {
    if (!dlogits) return;
    data_ = write<char>(*dlogits, logits.scalar_type(), logits.numel(), "dlogits");
    const bool aliases = data_ == logits.const_data_ptr();
    STD_TORCH_CHECK(!aliases || logits.is_contiguous(), "xentile: logits must be contiguous to be overwritten");
    if (!aliases) prefer_huge_pages(data_, logits.numel() * item);
  }
  explicit operator bool() const { return data_; }

  template <class Acc>
  char* row(const Problem<Acc>& problem, int64_t i) const {
    return data_ + i * problem.row_bytes;
  }

  template <class Acc>
  void fill_row(const Problem<Acc>& problem, int64_t i, Acc g, Acc token_loss, Acc max, Acc sum_exp,
                const Kept* kept) const {
    const int64_t target = problem.targets[i];
    g *= problem.token_weight_of(i);
    const Coefficients<Acc> c = coefficients(problem.loss_task, g, problem.weight_of(target), token_loss, max, sum_exp);
    problem.kernels.gradient(problem.row_task, problem.row(i), target, c, row(problem, i), kept);
  }

  // Whether a row of it can hold float32 numbers meanwhile.
  template <class Acc>
  bool holds_floats(const Problem<Acc>& problem) const {
    return data_ != problem.data && problem.row_bytes == problem.columns * 4;
  }

  template <class Acc>
  float* floats(const Problem<Acc>& problem, int64_t i) const {
    return reinterpret_cast<float*>(row(problem, i));
  }

  template <class Acc>
  void clear_row(const Problem<Acc>& problem, int64_t i) const {
    std::memset(row(problem, i), 0, problem.row_bytes);
  }

 private:
  // A large tensor is new memory at the first step (gradient_memory.cpp), and at every step of a compiled graph. The
  // first write to each of its pages is a fault: with pages of 2 MB instead of 4 KB there are 512 times fewer.
  static void prefer_huge_pages(char* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr int64_t least = 32 << 20, page = 2 << 20;
    if (bytes < least) return;
    char* first = data + (page - reinterpret_cast<uintptr_t>(data) % page) % page;
    madvise(first, (data + bytes - first) / page * page, MADV_HUGEPAGE);  // a wish: nothing depends on its success
#else
    (void)data, (void)bytes;
#endif
  }

  char* data_ = nullptr;
};

}  // namespace xentile
