"""Kernels and launchers of `sketch_update` and `sketch_quantile`, with their schemas' signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from xentile import _layout as layout
from xentile._triton import launch, shared_histogram
from xentile._triton.bulk import bulk_kernel
from xentile._triton.counting import (
    BAD_GROUP,
    E_MAX,
    E_MIN,
    HIGHEST,
    INF,
    LOWEST,
    MAX_KEY,
    MIN_KEY,
    OVERFLOW,
    SPECIAL,
    ZERO,
    add,
    count_values,
    edge_of,
    read_group,
    rint,
    value_of_key,
    width_of,
)

if TYPE_CHECKING:
    from torch import Tensor

HEAVIEST = tl.constexpr(2.0**40)  # more of a weight, in units, is not counted: 2^23 such values fit in an int64
TILE = 4096
"""Values a program takes at once; half as many if each has an amount and a place of its own, in registers."""
BULK_FROM = 1 << 18
"""Values from which on a program counts in shared memory first. Of fewer, it would have more bins than values."""
BULK_PRECISION = 8
"""The most bits of a bin with which there is room for that."""
BULK_THREADS = 256


@triton.jit
def amount_of(weight_ptr, i, keep, unit):
    """int64 [BLOCK]: the unit, or a value's weight in it."""
    amount = tl.where(keep, unit, 0)
    if weight_ptr is not None:
        weight = rint(tl.load(weight_ptr + i, mask=keep, other=0.0).to(tl.float64) * unit.to(tl.float64))
        weight = tl.where(weight == weight, weight, 0.0)
        amount = tl.minimum(tl.maximum(weight, 0.0), HEAVIEST).to(tl.int64)
    return amount


@triton.jit(do_not_specialize=["n", "groups", "unit"])
def update_kernel(
    value_ptr, mask_ptr, weight_ptr, group_ptr, sketch_ptr, n: tl.int64, groups, unit: tl.int64,
    GROUPED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add values (n,) where mask (n,) holds; each program takes every num_programs-th tile."""
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
        i = first + tl.arange(0, BLOCK)
        keep = i < n
        if mask_ptr is not None:
            keep &= tl.load(mask_ptr + i, mask=keep, other=0) != 0
        value = tl.load(value_ptr + i, mask=keep, other=0.0)
        amount = amount_of(weight_ptr, i, keep, unit)
        keep &= amount > 0
        group, known = read_group(group_ptr, groups, i, keep)
        if group_ptr is not None:
            stray = keep & (known == 0)
            add(sketch_ptr, group, BAD_GROUP, stray.to(tl.int64), stray, BITS, False)
        weight = None if weight_ptr is None else amount.to(tl.float64) / unit.to(tl.float64)
        count_values(sketch_ptr, group, value, amount, weight, known, BITS, GROUPED)


def sketch_update(
    values: Tensor, mask: Tensor | None, weights: Tensor | None, group_ids: Tensor | None, sketch: Tensor, unit: int
) -> None:
    """Add values (N,) float32 to the sketch where mask (N,) holds; each counts `unit`, or its weight (N,) in that
    unit.
    """
    n, groups = values.numel(), sketch.shape[0]
    if n == 0:
        return
    device = launch.device_of(values)
    precision = layout.Layout.of_width(sketch.shape[1]).mantissa_bits
    grouped = group_ids is not None and groups > 1
    bulk = weights is None and group_ids is None and n >= BULK_FROM and precision <= BULK_PRECISION
    tile = TILE if weights is None and not grouped else TILE // 2
    arguments = {
        "value_ptr": values,
        "mask_ptr": mask,
        "weight_ptr": weights,
        "group_ptr": group_ids,
        "sketch_ptr": sketch,
        "n": n,
        "groups": groups,
        "unit": unit,
        "GROUPED": grouped,
        "BITS": precision,
        "BLOCK": tile,
        "THREADS": BULK_THREADS,
        "DECLARATION": shared_histogram.declaration((layout.E_MAX - layout.E_MIN) << precision, device),
    }
    with launch.guard(values):
        # Of 256 threads with 64 registers, four fit in a processor.
        programs = min(triton.cdiv(n, tile), (4 if bulk else 2) * device.processors)
        launch.run(bulk_kernel if bulk else update_kernel, (programs,), arguments, BULK_THREADS, device)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def order_statistic(k, counts, below, zeros, regular, overflow, n, low, high, BITS: tl.constexpr):
    """(estimate, lower, upper) of the value of rank k, float64. below: cumulative counts of the bins, each with its
    own.

    The buckets in order: ZERO, the bins, OVERFLOW, INF. A bin's values are taken as spread evenly in rank.
    """
    i = tl.arange(0, (E_MAX - E_MIN) << BITS)
    index = tl.sum((below <= k - zeros).to(tl.int32), 0)
    c = tl.sum(tl.where(i == index, counts, 0), 0)
    before = zeros + tl.sum(tl.where(i < index, counts, 0), 0)
    left, right = edge_of(index, BITS).to(tl.float64), edge_of(index + 1, BITS).to(tl.float64)
    in_zero, in_overflow, in_inf = k < zeros, k >= zeros + regular, k >= zeros + regular + overflow
    c = tl.where(in_overflow, overflow, c)
    before = tl.where(in_overflow, zeros + regular, before)
    top = tl.maximum(tl.minimum(high, 3.4028234663852886e38), HIGHEST)
    left = tl.where(in_overflow, HIGHEST, left)
    right = tl.where(in_overflow, top, right)
    value = left + (right - left) * ((k - before).to(tl.float64) + 0.5) / tl.maximum(c, 1).to(tl.float64)
    value = tl.where(in_zero, 0.0, tl.where(in_inf, float("inf"), value))
    left = tl.where(in_zero, float("-inf"), tl.where(in_inf, float("inf"), left))
    right = tl.where(in_zero, LOWEST, tl.where(in_inf, float("inf"), right))
    value = tl.where(k == 0, low, tl.where(k == n - 1, high, value))
    return clamp(value, low, high), clamp(left, low, high), clamp(right, low, high)


@triton.jit
def quantile_kernel(
    sketch_ptr, q_ptr, value_ptr, lower_ptr, upper_ptr, INTERPOLATION: tl.constexpr, BITS: tl.constexpr
):
    """Program (g, i): quantile q[i] of group g."""
    row = sketch_ptr + tl.program_id(0).to(tl.int64) * width_of(BITS)
    out = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    counts = tl.load(row + SPECIAL + tl.arange(0, (E_MAX - E_MIN) << BITS))
    zeros, overflow = tl.load(row + ZERO), tl.load(row + OVERFLOW)
    regular = tl.sum(counts, 0)
    n = zeros + regular + overflow + tl.load(row + INF)
    below = tl.cumsum(counts, 0)
    low = value_of_key(2147483648 - tl.load(row + MIN_KEY)).to(tl.float64)
    high = value_of_key(tl.load(row + MAX_KEY) - 2147483649).to(tl.float64)

    h = tl.load(q_ptr + tl.program_id(1)) * tl.maximum(n - 1, 0).to(tl.float64)
    lo = tl.floor(h)
    fraction = h - lo
    if INTERPOLATION == "nearest":
        lo = rint(h)
        fraction = h * 0.0
    hi = tl.where(fraction > 0.0, tl.minimum(lo + 1.0, (n - 1).to(tl.float64)), lo)
    at_lo, lower, _ = order_statistic(lo.to(tl.int64), counts, below, zeros, regular, overflow, n, low, high, BITS)
    at_hi, _, upper = order_statistic(hi.to(tl.int64), counts, below, zeros, regular, overflow, n, low, high, BITS)
    if INTERPOLATION == "lower" or INTERPOLATION == "nearest":
        value = at_lo
    elif INTERPOLATION == "higher":
        value = at_hi
    else:
        step = 0.5 if INTERPOLATION == "midpoint" else fraction
        between = tl.where(at_hi == float("inf"), float("inf"), at_lo + step * (at_hi - at_lo))
        value = tl.where((fraction == 0.0) | (at_lo == at_hi), at_lo, between)
    empty = n == 0
    tl.store(value_ptr + out, tl.where(empty, float("nan"), value).to(tl.float32))
    tl.store(lower_ptr + out, tl.where(empty, float("nan"), lower).to(tl.float32))
    tl.store(upper_ptr + out, tl.where(empty, float("nan"), upper).to(tl.float32))


def sketch_quantile(sketch: Tensor, q: Tensor, value: Tensor, lower: Tensor, upper: Tensor, interpolation: int) -> None:
    """Fill value, lower and upper (G, Q) float32 with the quantiles q (Q,) float64 of each group."""
    grid = (sketch.shape[0], q.shape[0])
    if 0 in grid:
        return
    arguments: dict[str, Any] = {"sketch_ptr": sketch, "q_ptr": q}
    arguments |= {"value_ptr": value, "lower_ptr": lower, "upper_ptr": upper}
    arguments["INTERPOLATION"] = layout.INTERPOLATIONS[interpolation]
    arguments["BITS"] = layout.Layout.of_width(sketch.shape[1]).mantissa_bits
    with launch.guard(sketch):
        launch.run(quantile_kernel, grid, arguments, 256, launch.device_of(sketch))
