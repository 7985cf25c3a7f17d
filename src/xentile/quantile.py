"""`quantile`: exact quantiles of any number of values, on any number of ranks, without sorting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor

from xentile import _check
from xentile._autograd import transformed
from xentile._ops import ops
from xentile.reference import quantile as spec

if TYPE_CHECKING:
    from collections.abc import Sequence

NAN_POLICIES = ("propagate", "omit", "raise")
BAD_WEIGHT = "weights must be finite and at least 0"
HAS_NAN = "x has NaN values: pass nan_policy='omit' to leave them out"
IN_ONE_CALL = ("cpu",)
"""Devices whose values one operator serves; on others, and over a process group, Python goes from digit to digit."""


def quantile(
    x: Tensor,
    q: float | Sequence[float] | Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    interpolation: str = "linear",
    nan_policy: str = "propagate",
    process_group: Any = None,
) -> Tensor:
    """The exact quantiles of all values of x, with NumPy's definitions: equal to `np.quantile` of x in float64.

    Order statistics are selected digit by digit from histograms of the bits of x (three passes over x for float32, two
    for 16 bits, five for float64): nothing is copied or gathered, and no more than a thousand values, on a CPU, sorted.
    Over a process group the histograms are added between the passes, for float32 in all-reduces of 16 KiB, 32 KiB a
    quantile and 16 KiB a quantile, however many values and ranks there are. Ranks may hold different numbers of values,
    or none. Not differentiable.

    Args:
        x: of any shape and size; float32, bfloat16, float16 or float64. Infinities, ties and both zeros are ordered as
            numbers are.
        q: in [0, 1]; a number, a sequence, or a floating point tensor of any shape on any device. A tensor is not read
            on the host: where it is outside of [0, 1], the result is NaN.
        mask: bool, shape of x; only values where it holds count.
        weights: shape of x, at least 0, only with interpolation="inverted_cdf": the smallest value at which the weights
            up to it reach the share q of all weights. They are rounded to multiples of 2**-31 of the power of two above
            the largest, so that sums are exact in any order, for up to 2**32 values; integers below 2**31 are not
            changed. A value of weight 0 does not count at all. A weight that is negative, infinite or NaN raises on
            a CPU and makes every result NaN on other devices, where it would have to be waited for.
        interpolation: between order statistics: 'linear', 'lower', 'higher', 'nearest' or 'midpoint' as torch.quantile;
            'inverted_cdf', 'hazen', 'weibull', 'median_unbiased' or 'normal_unbiased' as np.quantile. Between a finite
            and an infinite value it gives the infinite one, and between -inf and inf NaN.
        nan_policy: 'propagate': a NaN makes every result NaN; 'omit': NaN values don't count; 'raise': ValueError if
            there is one, on every rank. Only 'raise' waits for the device.
        process_group: quantiles of the values on all its ranks, for instance torch.distributed.group.WORLD; None: of
            the values here. Every rank calls with the same q and options and the same dtype of x, and gets the same
            result.

    Returns:
        Shape of q, on the device of x: float64 for float64 x, else float32, rounded once. NaN where nothing counts.

    Example:
        The threshold of the tokens with the highest entropy in a batch that is spread over ranks (TRL's
        `get_high_entropy_mask`) needs neither padding nor gathering nor `torch.quantile`, which takes at most 2**24
        values. If no rank has a token, the threshold is NaN, and the mask all False:

        >>> entropies = torch.tensor([[0.1, 2.0, 0.7], [1.5, 0.3, 9.0]])
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> threshold = quantile(entropies, 0.8, mask=mask)  # process_group=torch.distributed.group.WORLD
        >>> threshold
        tensor(1.6000)
        >>> mask & (entropies >= threshold)
        tensor([[False,  True, False],
                [False, False, False]])
    """
    _check_arguments(x, mask, weights, interpolation, nan_policy)
    if process_group is not None and torch.distributed.get_rank(process_group) < 0:
        raise ValueError("process_group must contain this rank")
    wanted, values = _check.quantiles(q, x.device), x.detach()
    if process_group is None and x.device.type in IN_ONE_CALL:
        return _in_one_call(values, wanted, mask, weights, interpolation, nan_policy)
    return _digit_by_digit(values, wanted, mask, weights, interpolation, nan_policy, process_group)


def _in_one_call(
    x: Tensor, q: Tensor, mask: Tensor | None, weights: Tensor | None, interpolation: str, nan_policy: str
) -> Tensor:
    """The quantiles q, of its shape."""
    x, q, mask = x.contiguous(), q.contiguous(), None if mask is None else mask.contiguous()
    weights = None if weights is None else weights.detach().double().contiguous()
    options = (spec.INTERPOLATIONS.index(interpolation), nan_policy == "omit")
    if transformed():
        value, counted = spec.host_quantile(x, mask, weights, q, *options)
        value = value.to(_result_dtype(x))
    else:
        value = torch.empty_like(q, dtype=_result_dtype(x))
        counted = torch.empty(2, dtype=torch.int64, device=x.device)
        ops.host_quantile.default(x, mask, weights, q, value, counted, *options)
    if nan_policy == "raise" or (weights is not None and not _check.values_hidden()):
        n, nans = counted.tolist()
        if n < 0:
            raise ValueError(BAD_WEIGHT)
        if nan_policy == "raise" and nans > 0:
            raise ValueError(HAS_NAN)
    return value


def _digit_by_digit(
    x: Tensor,
    q: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    interpolation: str,
    nan_policy: str,
    process_group: Any,
) -> Tensor:
    """The same for the values of all ranks, and without waiting for the device. Ranks of values stay on it."""
    keep = None if mask is None else mask.reshape(-1).contiguous()
    units = None if weights is None else _units(weights.detach().reshape(-1), keep, process_group)
    selection = _Radix(x.reshape(-1).contiguous(), keep, units, process_group)
    n, nans = selection.n, selection.nans
    if nan_policy == "raise" and bool(nans != 0):
        raise ValueError(HAS_NAN)
    omit_nan, weighted = nan_policy == "omit", weights is not None
    value = spec.select(selection.find, n, nans, q.reshape(-1), interpolation, omit_nan, weighted)
    return value.reshape(q.shape).to(_result_dtype(x))


class _Radix:
    """Order statistics of the values (N,) of all ranks, digit by digit. Fixed passes over fixed shapes, no waiting."""

    def __init__(self, values: Tensor, keep: Tensor | None, amounts: Tensor | None, process_group: Any) -> None:
        self._values, self._keep, self._amounts, self._process_group = values, keep, amounts, process_group
        first, *self._rest = spec.DIGITS[values.dtype]
        self._shift = 8 * values.dtype.itemsize - first
        self._first = self._count(torch.zeros(1, dtype=torch.int64, device=values.device), self._shift, first)
        self.nans = self._first.select(1, -1).sum()
        self.n = self._first.sum() - self.nans

    def find(self, ranks: Tensor) -> Tensor:
        """The values of these ranks (K,), float64; anything where there is no such rank."""
        prefixes, left = _descend(self._first, ranks.unsqueeze(0))
        shift = self._shift
        for bits in self._rest:
            shift -= bits
            digit, left = _descend(self._count(prefixes, shift, bits), left)
            prefixes = (prefixes << bits) | digit
        return spec.value_of_key(prefixes, self._values.dtype)

    def _count(self, prefixes: Tensor, shift: int, bits: int) -> Tensor:
        counts = torch.zeros(prefixes.shape[0], 1 << bits, dtype=torch.int64, device=prefixes.device)
        ops.radix_counts.default(self._values, self._keep, self._amounts, prefixes, shift, bits, counts)
        if self._process_group is not None:
            torch.distributed.all_reduce(counts, group=self._process_group)
        return counts


def _descend(counts: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Of the values with ranks (R, K) in the rows of counts (R, buckets): their digits (R K,), and their ranks (R K, 1)
    among the values with the same digit.
    """
    cumulative = counts.cumsum(1)
    digit = torch.searchsorted(cumulative, ranks, right=True).clamp(max=counts.shape[1] - 1)
    ranks = ranks - cumulative.gather(1, digit) + counts.gather(1, digit)
    return digit.reshape(-1), ranks.reshape(-1, 1)


def _units(weights: Tensor, mask: Tensor | None, process_group: Any) -> Tensor:
    """Weights (N,) as integers, in units that depend only on the largest weight of all ranks."""
    largest = spec.largest_weight(weights, mask)
    if process_group is not None:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=process_group)
    if largest.device.type == "cpu" and not torch.compiler.is_compiling() and bool(largest == torch.inf):
        raise ValueError(BAD_WEIGHT)
    return spec.units(weights, mask, largest)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_arguments(x: Any, mask: Any, weights: Any, interpolation: Any, nan_policy: Any) -> None:
    if _check.tensor(x, "x").dtype not in spec.DIGITS:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {_name(x)}")
    if mask is not None and _check.tensor(mask, "mask").dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {_name(mask)}")
    if weights is not None and not _check.tensor(weights, "weights").is_floating_point():
        raise TypeError(f"weights must be floating point, got {_name(weights)}")
    for name, value in (("mask", mask), ("weights", weights)):
        if value is not None and value.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}")
    _check.same_device(x, "x", mask=mask, weights=weights)
    _check.one_of(interpolation, "interpolation", spec.INTERPOLATIONS)
    _check.one_of(nan_policy, "nan_policy", NAN_POLICIES)
    if weights is not None and interpolation != "inverted_cdf":
        raise ValueError(f"weights need interpolation='inverted_cdf', got {interpolation!r}")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
