// The operator teacher_topk; its schema is in src/xentile/_schemas.py.
#include <limits>

#include "checks.h"
#include "dispatch.h"
#include "operators.h"
#include "teacher_row.h"

namespace xentile {
namespace {

const TopKKernels& kernels_for(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return kernel_table().topk_float32;
    case ScalarType::BFloat16:
      return kernel_table().topk_bfloat16;
    case ScalarType::Half:
      return kernel_table().topk_float16;
    default:
      STD_TORCH_CHECK(false, "xentile: logits must be float32, bfloat16 or float16");
  }
}

}  // namespace

void teacher_topk(const Tensor& logits, const Tensor& temperatures, Tensor ids, Tensor logprobs, Tensor log_z,
                  Tensor tail_logprob, double softcap, double logit_scale) {
  constexpr int64_t most_columns = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) <= most_columns &&
                      (logits.stride(1) == 1 || logits.size(1) == 1),
                  "xentile: logits must be a CPU matrix with 1 to 2^31 - 1 columns, contiguous in its last dimension");
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(1) > 0 && ids.size(1) <= logits.size(1),
                  "xentile: ids must be a matrix of 1 to V columns");
  const int64_t rows = logits.size(0), columns = logits.size(1), k = ids.size(1), asked = temperatures.numel();
  const int64_t item = static_cast<int64_t>(logits.element_size());
  teacher::Problem problem = {
      kernels_for(logits.scalar_type()),
      kernel_table().topk_float32,
      static_cast<const char*>(logits.const_data_ptr()),
      rows,
      columns,
      k,
      item,
      logits.stride(0) * item,
      teacher::Temperatures(read<float>(temperatures, ScalarType::Float, asked, "temperatures"), asked),
      {},
      write<int32_t>(ids, ScalarType::Int, rows * k, "ids"),
      write<float>(logprobs, ScalarType::Float, rows * k, "logprobs"),
      write<float>(log_z, ScalarType::Float, rows * asked, "log_z"),
      write<float>(tail_logprob, ScalarType::Float, rows * asked, "tail_logprob")};
  const std::vector<float>& inverses = problem.temperatures.inverses;
  problem.task = {static_cast<float>(logit_scale), static_cast<float>(softcap), static_cast<int>(inverses.size()),
                  inverses.data()};
  torch::stable::parallel_for(0, rows, 1 + 32768 / columns, [&](int64_t begin, int64_t end) {
    teacher::TopK topk(problem);
    for (int64_t i = begin; i < end; i++) topk.row(i);
  });
}

}  // namespace xentile
