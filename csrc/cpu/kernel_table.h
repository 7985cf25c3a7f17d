// All kernels of one instruction set.
#pragma once
#include "dense_rows.h"
#include "rows.h"
#include "teacher_rows.h"
#include "topk_rest_gradient.h"

#define XENTILE_KERNEL_TABLE(isa)                                              \
  const xentile::KernelTable xentile::kernels_##isa = {#isa,                   \
                                                       kRowKernels<Float32>,   \
                                                       kRowKernels<BFloat16>,  \
                                                       kRowKernels<Float16>,   \
                                                       kRestKernels<Float32>,  \
                                                       kRestKernels<BFloat16>, \
                                                       kRestKernels<Float16>,  \
                                                       kTopKKernels<Float32>,  \
                                                       kTopKKernels<BFloat16>, \
                                                       kTopKKernels<Float16>,  \
                                                       kDenseKernels,          \
                                                       count};
