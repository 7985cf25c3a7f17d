#include "kernel_table.h"

XENTILE_KERNEL_TABLE(default)
