#include "rows.h"

XENTILE_KERNEL_TABLE(default)
