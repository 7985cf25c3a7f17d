"""The small kernels around the row kernels: the divisor before them; the loss and the sums of the sketch after them."""

import triton
import triton.language as tl

from xentile._triton.counting import BAD_GROUP, IGNORED, OUT_OF_RANGE, add, add_moments, read_group
from xentile._triton.epilogue import UNSPECIALIZED, read_divisor, read_target

BLOCK = 4096
"""Tokens a tile. Fixed, because it decides the order of the sums over rows: the loss has the same bits on every
device.
"""
THREADS = 256


@triton.jit
def sum_weights(target_ptr, weight_ptr, token_weight_ptr, N, V, ignore_index, BLOCK: tl.constexpr):
    """The sum of token weight times class weight over the tokens with a target, float64."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, N, BLOCK):
        row = first + tl.arange(0, BLOCK)
        t, _, in_range = read_target(target_ptr, row, row < N, ignore_index, V)
        counts = in_range & (row < N)
        w = tl.where(counts, 1.0, 0.0)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + t, mask=counts, other=0.0)
        if token_weight_ptr is not None:
            w *= tl.load(token_weight_ptr + row, mask=counts, other=0.0)
        total += w.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_kernel(
    target_ptr, weight_ptr, token_weight_ptr, denominator_ptr, weight_sum_ptr,
    N, V, ignore_index: tl.int64, zero_if_empty, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the gradient needs before the first row is read: the divisor of the mean, and the sum of the class
    weights.
    """
    if denominator_ptr is not None:
        divisor = sum_weights(target_ptr, weight_ptr, token_weight_ptr, N, V, ignore_index, BLOCK).to(tl.float32)
        tl.store(denominator_ptr, tl.where((zero_if_empty != 0) & (divisor == 0.0), float("inf"), divisor))
    if weight_sum_ptr is not None:
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            total += tl.load(weight_ptr + column, mask=column < V, other=0.0).to(tl.float64)
        tl.store(weight_sum_ptr, tl.sum(total, 0).to(tl.float32))


@triton.jit
def write_loss(
    target_ptr, weight_ptr, token_weight_ptr, normalizer_ptr, row_loss_ptr, loss_ptr, denominator_ptr,
    N, V, ignore_index, zero_if_empty, MEAN: tl.constexpr, PREPARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and denominator of the reductions mean and sum. PREPARED: the denominator is there already."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, N, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.load(row_loss_ptr + row, mask=row < N, other=0.0).to(tl.float64)
    loss = tl.sum(total, 0)
    if MEAN:
        if PREPARED:
            divisor = tl.load(denominator_ptr)
        else:
            if normalizer_ptr is not None:
                divisor = read_divisor(normalizer_ptr, zero_if_empty)
            else:
                total = sum_weights(target_ptr, weight_ptr, token_weight_ptr, N, V, ignore_index, BLOCK)
                divisor = total.to(tl.float32)
                divisor = tl.where((zero_if_empty != 0) & (divisor == 0.0), float("inf"), divisor)
            tl.store(denominator_ptr, divisor)
        loss = loss / divisor.to(tl.float64)
    tl.store(loss_ptr, loss.to(tl.float32))


@triton.jit
def count_tokens(
    target_ptr, group_ptr, loss_ptr, sketch_ptr, N, V, groups, ignore_index,
    GROUPED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What BLOCK tokens add to the sketch of a per-token loss besides their bins."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < N
    _, valid, in_range = read_target(target_ptr, row, mask, ignore_index, V)
    group, known = read_group(group_ptr, groups, row, mask)
    one = known.to(tl.int64)
    add(sketch_ptr, group, IGNORED, one, known & (valid == 0), BITS, GROUPED)
    add(sketch_ptr, group, OUT_OF_RANGE, one, known & valid & (in_range == 0), BITS, GROUPED)
    if group_ptr is not None:
        stray = mask & (known == 0)
        add(sketch_ptr, group, BAD_GROUP, stray.to(tl.int64), stray, BITS, False)
    value = tl.load(loss_ptr + row, mask=mask, other=0.0)
    add_moments(sketch_ptr, group, value, None, known & in_range, BITS, GROUPED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_kernel(
    target_ptr, weight_ptr, token_weight_ptr, normalizer_ptr, group_ptr,
    row_loss_ptr, token_loss_ptr, loss_ptr, denominator_ptr, sketch_ptr,
    N, V, groups, ignore_index: tl.int64, zero_if_empty,
    REDUCTION: tl.constexpr, PREPARED: tl.constexpr, GROUPED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program 0 sums the loss, alone and in a fixed order; each program adds BLOCK tokens to the sketch.

    The bins were counted row by row; here come the counts of tokens without a target, the sums, and the extremes.
    """
    if tl.program_id(0) == 0:
        if REDUCTION == "none":
            tl.store(denominator_ptr, 1.0)
        else:
            write_loss(
                target_ptr, weight_ptr, token_weight_ptr, normalizer_ptr, row_loss_ptr, loss_ptr, denominator_ptr, N, V,
                ignore_index, zero_if_empty, REDUCTION == "mean", PREPARED, BLOCK,
            )  # fmt: skip
        if REDUCTION == "sum":
            tl.store(denominator_ptr, 1.0)
    if sketch_ptr is not None:
        count_tokens(
            target_ptr, group_ptr, token_loss_ptr, sketch_ptr, N, V, groups, ignore_index, GROUPED, BITS, BLOCK
        )
