// Compiled with -march=x86-64-v3.
#if defined(__x86_64__)
#include "kernel_table.h"

XENTILE_KERNEL_TABLE(avx2)
#endif
