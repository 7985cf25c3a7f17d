// Compiled with -march=x86-64-v3.
#if defined(__x86_64__)
#include "rows.h"

XENTILE_KERNEL_TABLE(avx2)
#endif
