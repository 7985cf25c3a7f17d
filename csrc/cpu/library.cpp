// The library as torch sees it: implementations, for the CPU, of operators whose schemas Python defines. Only the
// stable C++ interface of libtorch is used, so that one binary serves every torch >= 2.11.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "checks.h"
#include "dispatch.h"
#include "operators.h"

namespace xentile {

const KernelTable& kernel_table() {
  static const KernelTable* const table = [] {
#if defined(__x86_64__)
    const char* variable = std::getenv("XENTILE_ISA");
    const std::string cap = variable ? variable : "";
    __builtin_cpu_init();
    if (cap != "default" && cap != "avx2" && __builtin_cpu_supports("x86-64-v4")) return &kernels_avx512;
    if (cap != "default" && __builtin_cpu_supports("x86-64-v3")) return &kernels_avx2;
#endif
    return &kernels_default;
  }();
  return *table;
}

// What the library was built for: setup.py passes it, and xentile/_ops.py looks for it in the file before it loads it.
extern "C" __attribute__((used)) const char xentile_signature[] = XENTILE_SIGNATURE;

namespace {

std::string isa() { return kernel_table().name; }

void scale_(Tensor x, const Tensor& scale) {
  const bool wide = scale.scalar_type() == ScalarType::Double;
  const double factor =
      wide ? *read<double>(scale, ScalarType::Double, 1, "scale") : *read<float>(scale, ScalarType::Float, 1, "scale");
  if (factor == 1) return;
  char* data = write<char>(x, x.scalar_type(), x.numel(), "x");
  with_kernels(x.scalar_type(), [&](const auto& kernels, int64_t item) {
    torch::stable::parallel_for(0, x.numel(), 32768, [&](int64_t begin, int64_t end) {
      kernels.scale(data + begin * item, end - begin, factor);
    });
  });
}

// Index of the first of x[0:n] that is neither in [0, limit) nor `allowed`; -1 if there is none.
template <class T>
int64_t first_bad(const T* x, int64_t n, int64_t limit, int64_t allowed) {
  for (int64_t i = 0; i < n; i++)
    if ((x[i] < 0 || x[i] >= limit) && x[i] != allowed) return i;
  return -1;
}

int64_t first_bad_target(const Tensor& target, int64_t num_classes, int64_t ignore_index) {
  const int64_t n = target.numel();
  if (target.scalar_type() == ScalarType::Int)
    return first_bad(read<int32_t>(target, ScalarType::Int, n, "target"), n, num_classes, ignore_index);
  return first_bad(read<int64_t>(target, ScalarType::Long, n, "target"), n, num_classes, ignore_index);
}

int64_t first_bad_group(const Tensor& group_ids, int64_t num_groups) {
  const int64_t n = group_ids.numel(), none = 0;
  return first_bad(read<int64_t>(group_ids, ScalarType::Long, n, "group_ids"), n, num_groups, none);
}

}  // namespace
}  // namespace xentile

STABLE_TORCH_LIBRARY_IMPL(xentile, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&xentile::cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&xentile::cross_entropy_backward));
  m.impl("teacher_topk", TORCH_BOX(&xentile::teacher_topk));
  m.impl("topk_support", TORCH_BOX(&xentile::topk_support));
  m.impl("topk_distillation", TORCH_BOX(&xentile::topk_distillation));
  m.impl("topk_distillation_backward", TORCH_BOX(&xentile::topk_distillation_backward));
  m.impl("distillation", TORCH_BOX(&xentile::distillation));
  m.impl("distillation_backward", TORCH_BOX(&xentile::distillation_backward));
  m.impl("empty_gradient", TORCH_BOX(&xentile::empty_gradient));
  m.impl("scale_", TORCH_BOX(&xentile::scale_));
  m.impl("sketch_update", TORCH_BOX(&xentile::sketch_update));
  m.impl("sketch_quantile", TORCH_BOX(&xentile::sketch_quantile));
  m.impl("first_bad_target", TORCH_BOX(&xentile::first_bad_target));
  m.impl("first_bad_group", TORCH_BOX(&xentile::first_bad_group));
}

STABLE_TORCH_LIBRARY_IMPL(xentile, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&xentile::isa));
  m.impl("empty_cache", TORCH_BOX(&xentile::empty_cache));
}
