"""A histogram in the shared memory of a program.

`tl.histogram` clears and reads all bins for every tile, and in Triton 3.6, which torch 2.11 has, each warp looks at
every bin for every value: 500 instructions a value, where this takes three. Triton has no word for shared memory that
outlives an operation, so it is declared and used by lines of PTX, on NVIDIA's GPUs.
"""

import triton
import triton.language as tl

from xentile._triton import launch


def declaration(bins: int, device: launch.Device) -> str:
    """The line that declares so many bins of 4 bytes; nothing where the operations below are to use `tl.histogram`."""
    if not isinstance(device.arch, int) or triton.knobs.runtime.interpret:
        return ""
    return f".shared .align 16 .b32 xentile_bins[{bins}]; mov.u32 $0, xentile_bins;"


@triton.jit
def empty(DECLARATION: tl.constexpr, BINS: tl.constexpr):
    """A histogram without counts: the address of its first bin, or its counts themselves. Once a kernel."""
    if DECLARATION == "":
        histogram = tl.zeros([BINS], tl.int32)
    else:
        histogram = tl.inline_asm_elementwise(DECLARATION, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(
            "st.shared.u32 [$1], 0; mov.u32 $0, 0;", "=r,r", [histogram + tl.arange(0, BINS) * 4],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        tl.debug_barrier()
    return histogram


@triton.jit
def counted(histogram, bin, DECLARATION: tl.constexpr, BINS: tl.constexpr):
    """The histogram with one more in each of these bins, int32 of any shape."""
    if DECLARATION == "":
        histogram += tl.histogram(tl.ravel(bin), BINS)
    else:
        tl.inline_asm_elementwise(
            "red.shared.add.u32 [$1], 1; mov.u32 $0, 0;", "=r,r", [histogram + bin * 4],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return histogram


@triton.jit
def counts_of(histogram, DECLARATION: tl.constexpr, BINS: tl.constexpr):
    """int32 [BINS]. Afterwards nothing may be counted."""
    counts = histogram
    if DECLARATION != "":
        tl.debug_barrier()
        counts = tl.inline_asm_elementwise(
            "ld.shared.u32 $0, [$1];", "=r,r", [histogram + tl.arange(0, BINS) * 4],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    return counts
