// Compiled with -march=x86-64-v4 -mprefer-vector-width=512.
#if defined(__x86_64__)
#include "kernel_table.h"

XENTILE_KERNEL_TABLE(avx512)
#endif
