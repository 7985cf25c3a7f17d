// The kernels of this CPU.
#pragma once
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"

namespace xentile {

// The widest instruction set of this CPU, chosen once. XENTILE_ISA=default|avx2|avx512 caps it, so that tests run each.
const KernelTable& kernel_table();

// Calls f(row kernels, bytes of a logit), with kernels for the accumulation type that belongs to the dtype.
template <class F>
void with_kernels(torch::headeronly::ScalarType dtype, F f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return f(kernel_table().float32, 4);
    case ScalarType::BFloat16:
      return f(kernel_table().bfloat16, 2);
    case ScalarType::Half:
      return f(kernel_table().float16, 2);
    case ScalarType::Double:
      return f(kernels_float64, 8);
    default:
      STD_TORCH_CHECK(false, "xentile: logits must be float32, bfloat16, float16 or float64");
  }
}

}  // namespace xentile
