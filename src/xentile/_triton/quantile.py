"""Kernel and launcher of `radix_counts`, with its schema's signature. Keys: xentile/reference/quantile.py.

The first digit is counted by each program in a histogram of its own; x is read once. Later digits are counted of few
values, those with one of the prefixes, by one relaxed atomic each; where a quarter of a tile shares a prefix, they too
are counted on chip first, because equal values, such as the zeros of a loss, would queue at one address.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from xentile._triton import launch, shared_histogram
from xentile._triton.shared_histogram import counted, counts_of, empty

TILE = 2048
"""Values a program takes at once: 8 a thread, because with 16 one program fills the registers of a processor."""

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@triton.jit
def key_of(bits, WIDTH: tl.constexpr, INFINITY: tl.constexpr):
    """Unsigned keys, in the order of the floats that have these bits; every NaN has the largest."""
    bits = bits.to(tl.int32)
    ones: tl.constexpr = (1 << WIDTH) - 1
    unsigned = bits.to(tl.uint32, bitcast=True) & ones
    key = tl.where(bits < 0, unsigned ^ ones, unsigned | (1 << (WIDTH - 1)))
    return tl.where((unsigned & (ones >> 1)) > INFINITY, ones, key).to(tl.uint32)


@triton.jit
def read_amount(mask_ptr, weight_ptr, i, keep):
    """(keep, amount) of the values i: where they count at all, and the int64 they add."""
    if mask_ptr is not None:
        keep &= tl.load(mask_ptr + i, mask=keep, other=0) != 0
    amount = keep.to(tl.int64)
    if weight_ptr is not None:
        amount = tl.load(weight_ptr + i, mask=keep, other=0)
    return keep, amount


@triton.jit
def add_histogram(count_ptr, digit, keep, BUCKETS: tl.constexpr):
    """Count the digits of a tile on chip, then each bucket that is not empty by one atomic."""
    histogram = tl.histogram(digit, BUCKETS, mask=keep)
    tl.atomic_add(count_ptr + tl.arange(0, BUCKETS), histogram.to(tl.int64), mask=histogram != 0, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def first_digit_kernel(
    x_ptr, mask_ptr, weight_ptr, count_ptr, n: tl.int64,
    DECLARATION: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th tile."""
    buckets: tl.constexpr = 1 << BITS
    histogram = empty(DECLARATION, buckets)
    left_out = tl.zeros([], tl.int64)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        i = first + tl.arange(0, BLOCK)
        keep, amount = read_amount(mask_ptr, weight_ptr, i, i < n)
        key = key_of(tl.load(x_ptr + i, mask=i < n, other=0), WIDTH, INFINITY)
        digit = (key >> SHIFT).to(tl.int32)
        if weight_ptr is None:
            # What does not count is counted in the first bucket and taken out in the end.
            histogram = counted(histogram, tl.where(keep, digit, 0), DECLARATION, buckets)
            if mask_ptr is None:
                left_out += tl.maximum(first + BLOCK - n, 0)
            else:
                left_out += tl.sum((keep == 0).to(tl.int32), 0)
        else:
            tl.atomic_add(count_ptr + digit, amount, mask=keep, sem="relaxed")
    if weight_ptr is None:
        bucket = tl.arange(0, buckets)
        counts = counts_of(histogram, DECLARATION, buckets).to(tl.int64) - tl.where(bucket == 0, left_out, 0)
        tl.atomic_add(count_ptr + bucket, counts, mask=counts != 0, sem="relaxed")


@triton.jit(do_not_specialize=["n", "targets"])
def next_digit_kernel(
    x_ptr, mask_ptr, weight_ptr, prefix_ptr, count_ptr, n: tl.int64, targets,
    SHIFT: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th tile, and compares it with all prefixes while it is in registers."""
    buckets: tl.constexpr = 1 << BITS
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        i = first + tl.arange(0, BLOCK)
        keep, amount = read_amount(mask_ptr, weight_ptr, i, i < n)
        key = key_of(tl.load(x_ptr + i, mask=i < n, other=0), WIDTH, INFINITY)
        prefix = (key >> (SHIFT + BITS)).to(tl.int32)
        digit = ((key >> SHIFT) & (buckets - 1)).to(tl.int32)
        for t in range(targets):
            match = keep & (prefix == tl.load(prefix_ptr + t).to(tl.int32))
            row = count_ptr + t * buckets
            if weight_ptr is not None:
                tl.atomic_add(row + digit, amount, mask=match, sem="relaxed")
            elif tl.sum(match.to(tl.int32), 0) > BLOCK // 4:
                add_histogram(row, digit, match, buckets)
            else:
                tl.atomic_add(row + digit, amount, mask=match, sem="relaxed")


def radix_counts(
    x: Tensor, mask: Tensor | None, weights: Tensor | None, prefixes: Tensor, shift: int, bits: int, counts: Tensor
) -> None:
    """Add to counts (T, 2**bits) how often each digit occurs among the values of x (N,) with each prefix (T,)."""
    n, width = x.numel(), 8 * x.element_size()
    if n == 0 or prefixes.numel() == 0:
        return
    device = launch.device_of(x)
    arguments = {
        "x_ptr": x.view(_INTEGERS[x.dtype]),
        "mask_ptr": mask,
        "weight_ptr": weights,
        "prefix_ptr": prefixes,
        "count_ptr": counts,
        "n": n,
        "targets": prefixes.numel(),
        "DECLARATION": shared_histogram.declaration(1 << bits, device),
        "SHIFT": shift,
        "BITS": bits,
        "WIDTH": width,
        "INFINITY": _INFINITY[x.dtype],
        "BLOCK": TILE,
    }
    kernel = first_digit_kernel if shift + bits == width else next_digit_kernel
    with launch.guard(x):
        launch.run(kernel, (min(triton.cdiv(n, TILE), 2 * device.processors),), arguments, 256, device)
