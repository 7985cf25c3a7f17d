"""Exact quantiles: by sorting, as the specification, and digit by digit, as the operator `radix_counts` counts.

The key of a float is an unsigned integer of as many bits, ordered as the values: the bits of a positive number with the
sign bit set, those of a negative one inverted. -0.0 is next to 0.0, and every NaN is the largest key. Keys are held in
int64; those of float64 use its sign bit, so they are shifted logically and never compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

WEIGHT_BITS = 31

DIGITS = {
    torch.float32: (11, 11, 10),
    torch.bfloat16: (11, 5),
    torch.float16: (11, 5),
    torch.float64: (13, 13, 13, 13, 12),
}
"""Bits of a key from the top, pass by pass. The first digit is wide enough for its last value to mean NaN: it takes in
the sign, the exponent and one bit of the mantissa, and the key of NaN has only ones."""

CONTINUOUS = {
    "hazen": (1 / 2.0, 1 / 2.0),
    "weibull": (0.0, 0.0),
    "median_unbiased": (1 / 3.0, 1 / 3.0),
    "normal_unbiased": (3 / 8.0, 3 / 8.0),
}
"""(alpha, beta) of Hyndman and Fan's continuous definitions, where they are not NumPy's default."""

DISCRETE = ("lower", "higher", "nearest", "inverted_cdf")
"""Interpolations whose result is one of the values."""

INTERPOLATIONS = ("linear", "midpoint", *DISCRETE, *CONTINUOUS)

_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "lower": torch.floor,
    "higher": torch.ceil,
    "nearest": torch.round,
    "midpoint": lambda h: 0.5 * (torch.floor(h) + torch.ceil(h)),
}

_INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def quantile(x: Tensor, q: Tensor, interpolation: str) -> Tensor:
    """The quantiles q (Q,) float64 of x (N,) by sorting, float64; NaN if x is empty or has one."""
    return host_quantile(x, None, None, q, INTERPOLATIONS.index(interpolation), omit_nan=False)[0]


def host_quantile(
    x: Tensor, mask: Tensor | None, weights: Tensor | None, q: Tensor, interpolation: int, omit_nan: bool
) -> tuple[Tensor, Tensor]:
    """The quantiles q of x by sorting, float64, and (2,) what counts: not NaN, and NaN; -1 where a weight is wrong."""
    values = torch.cat([x.reshape(-1).double(), torch.full((1,), torch.nan, dtype=torch.float64, device=x.device)])
    amounts = torch.ones_like(x, dtype=torch.int64) if mask is None else mask.long()
    valid = torch.ones((), dtype=torch.bool, device=x.device)
    if weights is not None:
        largest = largest_weight(weights, mask)
        amounts, valid = units(weights, mask, largest), largest != torch.inf
    amounts = torch.cat([amounts.reshape(-1), amounts.new_zeros(1)])
    ordered, order = values.sort()
    upto = amounts[order].cumsum(0)
    nans = torch.where(values.isnan(), amounts, 0).sum()
    n = amounts.sum() - nans

    def find(rank: Tensor) -> Tensor:
        return ordered[torch.searchsorted(upto, rank, right=True).clamp(max=x.numel())]

    value = select(find, n, nans, q.reshape(-1), INTERPOLATIONS[interpolation], omit_nan, weights is not None)
    return value.reshape(q.shape), torch.where(valid, torch.stack([n, nans]), -1)


def select(
    find: Callable[[Tensor], Tensor],
    n: Tensor,
    nans: Tensor,
    q: Tensor,
    interpolation: str,
    omit_nan: bool,
    weighted: bool,
) -> Tensor:
    """The quantiles q (Q,) float64 of n values besides NaN, from `find`, which gives the values of ranks, float64."""
    given, q = q, q.clamp(0, 1)
    lower, upper, fraction = weighted_ranks(q, n) if weighted else ranks(q, n, interpolation)
    if interpolation in DISCRETE:
        value = find(lower)
    else:
        low, high = find(torch.cat([lower, upper])).chunk(2)
        value = interpolate(low, high, fraction)
    some = n != 0 if omit_nan else (n != 0) & (nans == 0)
    return torch.where((given == q) & some, value, torch.nan)


def largest_weight(weights: Tensor, mask: Tensor | None) -> Tensor:
    """The largest of those that count, () float64: infinite if one of them is negative, infinite or NaN."""
    valid = torch.where(weights >= 0, weights.double(), torch.inf)
    if mask is not None:
        valid = torch.where(mask, valid, 0.0)
    return valid.max() if valid.numel() else valid.sum()


def units(weights: Tensor, mask: Tensor | None, largest: Tensor) -> Tensor:
    """Weights as integers, at most 2**WEIGHT_BITS, in units that depend only on the largest: 0 if that is infinite."""
    weights = weights.double() if mask is None else torch.where(mask, weights.double(), 0.0)
    # mantissa / largest is a power of two without rounding. If nothing counts the units are 0: as if x were empty.
    scale = torch.frexp(largest).mantissa * 2.0**WEIGHT_BITS / largest
    return torch.nan_to_num(weights * scale, nan=0.0, posinf=0.0).round().long()


def ranks(q: Tensor, n: Tensor, interpolation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Between which of n sorted values the quantiles q lie: lower and upper rank, int64, and how far from the lower.

    The floating point operations are NumPy's, in its order, so that the ranks are NumPy's also where they round.
    """
    last = (n - 1).clamp(min=0).double()
    h = q * last
    if interpolation in CONTINUOUS:
        alpha, beta = CONTINUOUS[interpolation]
        h = torch.minimum((n * q + (alpha + q * (1 - alpha - beta)) - 1).clamp(min=0), last)
    elif interpolation == "inverted_cdf":
        h = torch.minimum(torch.ceil(n * q - 1).clamp(min=0), last)
    elif interpolation != "linear":
        h = _ROUNDINGS[interpolation](h)
    lower = torch.floor(h)
    return lower.long(), torch.ceil(h).long(), h - lower


def weighted_ranks(q: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `ranks`, among `total` values: a value of integer weight w is w equal ones. The first that reaches a share q.

    This is 'inverted_cdf', the definition that NumPy has for weights. It compares quotients, so a product does not do.
    """
    reached = torch.ceil(q * total.double()) - 1  # one less than it should be, or right, or one more
    for _ in range(2):
        reached += (reached / total.double() < q).double()
    rank = torch.minimum(reached.clamp(min=1).long(), total) - 1
    return rank, rank, torch.zeros_like(q)


def interpolate(low: Tensor, high: Tensor, fraction: Tensor) -> Tensor:
    """Between order statistics, float64; rounded as NumPy does, but an infinite one gives infinity, not NaN."""
    step = high - low
    value = torch.where(fraction < 0.5, low + step * fraction, high - step * (1 - fraction))
    value = torch.where(step == torch.inf, low + high, value)
    return torch.where(low == high, low, value)  # also where the fraction is 0


def key_of(x: Tensor) -> Tensor:
    """The keys of floats, int64."""
    width = 8 * x.element_size()
    bits = x.view(_INTEGERS.get(x.dtype, torch.int64)).long()
    ones = -1 if width == 64 else (1 << width) - 1
    sign = -(2**63) if width == 64 else 1 << (width - 1)
    key = torch.where(bits < 0, bits.bitwise_not(), bits ^ sign)
    return torch.where(x.isnan(), ones, key)


def value_of_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats with these keys, as float64."""
    width = 8 * dtype.itemsize
    positive = _shift(key, width - 1) == 1
    sign = -(2**63) if width == 64 else 1 << (width - 1)
    bits = torch.where(positive, key ^ sign, key.bitwise_not())
    return bits.to(_INTEGERS.get(dtype, torch.int64)).view(dtype).double()


def radix_counts(
    x: Tensor, mask: Tensor | None, weights: Tensor | None, prefixes: Tensor, shift: int, bits: int, counts: Tensor
) -> None:
    """Add to counts[t] (T, 2**bits) how many values of x (N,) with the prefix t have each digit, or their weights."""
    key = key_of(x)
    amount = torch.ones_like(key) if weights is None else weights
    if mask is not None:
        amount = torch.where(mask, amount, 0)
    digit = _shift(key, shift) & ((1 << bits) - 1)
    prefix = _shift(key, shift + bits)
    for t in range(prefixes.shape[0]):
        counts[t] += torch.zeros_like(counts[t]).scatter_add_(0, digit, torch.where(prefix == prefixes[t], amount, 0))


def _shift(key: Tensor, bits: int) -> Tensor:
    """Logical shift to the right, 0 <= bits <= 64."""
    if bits == 0:
        return key
    if bits == 64:
        return torch.zeros_like(key)
    return (key >> bits) & ((1 << (64 - bits)) - 1)
