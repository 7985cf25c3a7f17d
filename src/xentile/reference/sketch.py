"""The loss sketch in plain PyTorch: counting values, and reading quantiles. Layout: xentile/_layout.py."""

from __future__ import annotations

import torch
from torch import Tensor

from xentile._layout import (
    BAD_GROUP,
    DEFAULT,
    E_MAX,
    E_MIN,
    INF,
    LIMIT,
    MAX_KEY,
    MIN_KEY,
    NAN,
    OVERFLOW,
    SPECIAL,
    SQUARE_LIMBS,
    SUM_LIMBS,
    WEIGHED_LIMIT,
    ZERO,
    Layout,
)


def column_of(values: Tensor, layout: Layout = DEFAULT) -> Tensor:
    """The state column, int64, that counts each value of a float32 tensor."""
    bits = values.view(torch.int32).long()
    column = (bits >> layout.shift) - layout.first_key + SPECIAL
    column = torch.where(values < 2.0**E_MIN, ZERO, column)
    column = torch.where(values >= 2.0**E_MAX, OVERFLOW, column)
    column = torch.where(values == torch.inf, INF, column)
    return torch.where(values.isnan() | (values == -torch.inf), NAN, column)


def bin_edges(layout: Layout = DEFAULT, device: torch.device | str | None = None) -> Tensor:
    """The edges of the regular bins, float32, ascending, one more than bins: bin i is [edge[i], edge[i + 1])."""
    keys = torch.arange(layout.bins + 1, device=device) + layout.first_key
    return (keys << layout.shift).int().view(torch.float32)


def sketch_update(
    values: Tensor, mask: Tensor | None, weights: Tensor | None, group_ids: Tensor | None, sketch: Tensor, unit: int
) -> None:
    """Add values (N,) float32, where mask (N,) holds, to rows group_ids (N,) of the state (G, width), in place.

    A value adds `unit` to its bin, or its weight (N,) float32 in that unit, rounded to an integer in [0, 2**40]. Sums
    are weighted alike; a value whose weight rounds to 0 leaves no trace.
    """
    amount = torch.full_like(values, unit, dtype=torch.int64)
    if weights is not None:
        amount = torch.round(weights.double() * unit).nan_to_num(0.0).clamp(0, 2.0**40).long()
    if mask is not None:
        amount = torch.where(mask, amount, 0)
    add_columns(sketch, column_of(values, Layout.of_width(sketch.shape[1])), amount, group_ids)
    group, known = _groups(group_ids, values, sketch.shape[0])
    live = (amount > 0) & known & ~values.isnan() & (values != -torch.inf)
    _add_sums(sketch, torch.where(live & values.isfinite(), values, 0.0).double(), amount.double() / unit, group)
    bits = values.view(torch.int32).long()
    key = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)  # signed, ordered as the values
    for column, k in ((MAX_KEY, key + 2**31 + 1), (MIN_KEY, 2**31 - key)):
        best = sketch[:, column].clone().scatter_reduce_(0, group, torch.where(live, k, 0), "amax")
        sketch[:, column] = best


def add_columns(sketch: Tensor, column: Tensor, amount: Tensor, group_ids: Tensor | None) -> None:
    """Add each token's amount at (group, column); where it is not 0 and the group does not exist, 1 to BAD_GROUP."""
    group, known = _groups(group_ids, column, sketch.shape[0])
    flat = torch.where(known, group * sketch.shape[1] + column, BAD_GROUP)
    counts = torch.zeros(sketch.numel(), dtype=torch.int64, device=sketch.device)
    sketch += counts.scatter_add_(0, flat, torch.where(known, amount, amount.clamp(max=1))).view_as(sketch)


def _groups(group_ids: Tensor | None, like: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The row of each token, 0 where its group does not exist, and whether it exists."""
    if group_ids is None:
        return torch.zeros_like(like, dtype=torch.int64), torch.ones_like(like, dtype=torch.bool)
    known = (group_ids >= 0) & (group_ids < groups)
    return torch.where(known, group_ids.long(), 0), known


def _add_sums(sketch: Tensor, values: Tensor, weight: Tensor, group: Tensor) -> None:
    """Add the limbs of w x and w x^2, all in float64, where for w = 1 only the last rounding of each is not exact."""
    x = values.clamp(-LIMIT, LIMIT)
    limbs = {
        **limbs_of((x * weight).clamp(-WEIGHED_LIMIT, WEIGHED_LIMIT), SUM_LIMBS),
        **limbs_of((x * x * weight).clamp(max=LIMIT * LIMIT), SQUARE_LIMBS),
    }
    for column, limb in limbs.items():
        added = torch.zeros(sketch.shape[0], dtype=torch.int64, device=sketch.device)
        sketch[:, column] += added.scatter_add_(0, group, limb)


def limbs_of(x: Tensor, limbs: tuple[tuple[int, int], ...]) -> dict[int, Tensor]:
    """What float64 values add to each of these columns, int64."""
    amounts = {}
    for column, exponent in limbs:
        limb = torch.round(x * 2.0**-exponent)
        amounts[column] = limb.long()
        x = x - limb * 2.0**exponent
    return amounts


def extremes(sketch: Tensor) -> tuple[Tensor, Tensor]:
    """The exact minimum and maximum of each row, float32 (G,); NaN where nothing was counted."""

    def value(key: Tensor) -> Tensor:
        bits = torch.where(key >= 0, key, key ^ 0x7FFFFFFF)
        return bits.int().view(torch.float32)

    some = sketch[:, MAX_KEY] > 0
    low = torch.where(some, value(2**31 - sketch[:, MIN_KEY]), torch.nan)
    high = torch.where(some, value(sketch[:, MAX_KEY] - 2**31 - 1), torch.nan)
    return low, high


def sketch_quantile(sketch: Tensor, q: Tensor, interpolation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate, lower and upper bound (G, Q) float32 of the quantiles q (Q,) float64 of each group.

    The order statistic of rank k in a bin [L, H) that holds c values, p of all values being below it, is estimated by
    L + (H - L) * (k - p + 1/2) / c, or 0 below 2**-24; ranks 0 and n - 1 are the exact minimum and maximum, and no
    estimate leaves [min, max]. The bounds are the lower edge of the lower rank's bin and the upper edge of the upper
    rank's.
    """
    counts, lower, upper = _buckets(sketch)
    cumulative = counts.cumsum(1)
    n = cumulative[:, -1:]
    h = q[None, :] * (n - 1).clamp(min=0).double()
    lo = torch.floor(h)
    fraction = h - lo
    if interpolation == "nearest":
        lo, fraction = torch.round(h), torch.zeros_like(h)
    hi = torch.where(fraction > 0, torch.minimum(lo + 1, (n - 1).double()), lo)
    low, high = (e[:, None].double() for e in extremes(sketch))

    def estimate(rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rank = rank.long()
        index = torch.searchsorted(cumulative, rank.contiguous(), right=True).clamp(max=counts.shape[1] - 1)
        c, left, right = (t.gather(1, index) for t in (counts.double(), lower, upper))
        before = cumulative.gather(1, index) - counts.gather(1, index)
        inside = left + (right - left) * ((rank - before).double() + 0.5) / c.clamp(min=1)
        inside = torch.where(index == 0, 0.0, torch.where(right == torch.inf, torch.inf, inside))
        value = torch.where(rank == 0, low, torch.where(rank == n - 1, high, inside))
        return torch.clamp(value, low, high), torch.clamp(left, low, high), torch.clamp(right, low, high)

    (at_lo, bound_lo, _), (at_hi, _, bound_hi) = estimate(lo), estimate(hi)
    if interpolation in ("lower", "nearest"):
        value = at_lo
    elif interpolation == "higher":
        value = at_hi
    else:
        step = torch.full_like(fraction, 0.5) if interpolation == "midpoint" else fraction
        between = torch.where(at_hi == torch.inf, torch.inf, at_lo + step * (at_hi - at_lo))
        value = torch.where((fraction == 0) | (at_lo == at_hi), at_lo, between)
    empty = n == 0
    return tuple(t.masked_fill(empty, torch.nan).float() for t in (value, bound_lo, bound_hi))  # type: ignore[return-value]


def ordered_counts(sketch: Tensor) -> Tensor:
    """(G, bins + 3): the counts below 2**-24, of the bins, above 2**8 and of +inf. Slices only: no index to copy."""
    return torch.cat([sketch[:, ZERO : ZERO + 1], sketch[:, SPECIAL:], sketch[:, OVERFLOW : INF + 1]], 1)


def _buckets(sketch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, lower and upper edges (G, BINS + 3) of the buckets in the order of their values."""
    layout = Layout.of_width(sketch.shape[1])
    counts = ordered_counts(sketch)
    edges = bin_edges(layout, sketch.device).double()
    high = extremes(sketch)[1].double()
    groups = counts.shape[0]
    infinity = torch.full((groups, 1), torch.inf, dtype=torch.float64, device=sketch.device)
    top = high.clamp(max=torch.finfo(torch.float32).max)[:, None]
    lower = torch.cat([-infinity, edges.expand(groups, -1), infinity], 1)
    upper = torch.cat([edges.expand(groups, -1), torch.maximum(top, edges[-1:]), infinity], 1)
    return counts, lower, upper
