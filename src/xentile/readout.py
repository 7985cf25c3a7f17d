"""What can be read from the state of a sketch, on its device, without waiting for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xentile import _check
from xentile import _layout as layout
from xentile._ops import ops
from xentile.reference.quantile import interpolate, ranks
from xentile.reference.sketch import bin_edges, extremes, ordered_counts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xentile.reading import PendingReading

ESTIMATORS = ("interpolated", "midpoint")


class Readout:
    """The read-outs that every kind of sketch shares; a subclass provides `state` and `unit`.

    With one group they are scalars, or have the shape of q; with more they have a leading dimension G.
    """

    state: Tensor
    """(G, width) int64, laid out as in xentile/_layout.py."""
    unit: int
    """What one value adds to its bin: 1, or 2**20 where values have weights."""

    @property
    def groups(self) -> int:
        """G, the number of separate histograms."""
        return self.state.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.state.device

    @property
    def layout(self) -> layout.Layout:
        """Which column of the state counts what."""
        return layout.Layout.of_width(self.state.shape[1])

    # ---------------------------------------------------------------------------------------------------------
    # quantiles

    def quantile(
        self,
        q: float | Sequence[float] | Tensor,
        *,
        interpolation: str = "linear",
        estimator: str = "interpolated",
    ) -> Tensor:
        """Quantiles q of the counted values, float32; the shape of q, after (G,) when there are groups.

        Args:
            q: in [0, 1]; a number, a sequence or a tensor of any shape.
            interpolation: 'linear', 'lower', 'higher', 'nearest' or 'midpoint' between order statistics, as in
                torch.quantile.
            estimator: 'interpolated': the values of a bin are taken as spread evenly over it, mostly the closest.
                'midpoint': as in its middle, which has half the largest error.

        Returns:
            NaN where nothing was counted. q = 0 and q = 1 are the exact minimum and maximum. NaN values are left out
            (`nan_count`). Within 2**-M relative or 2**-24 nats of the exact quantile, M the precision (7); 2**-(M + 1)
            with the midpoint estimator.
        """
        _check.one_of(estimator, "estimator", ESTIMATORS)
        return self._midpoints(q, interpolation) if estimator == "midpoint" else self._quantile(q, interpolation)[0]

    def quantile_bounds(self, q: float | Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper) with lower <= exact quantile <= upper, whatever the interpolation; shapes as `quantile`."""
        return self._quantile(q, "linear")[1:]

    def confidence_interval(
        self, q: float | Sequence[float] | Tensor, *, level: float = 0.95, clustered: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(lower, upper) that encloses the quantile q of what the values were drawn from, with probability `level`.

        For independent tokens: see `xentile.confidence.confidence_interval`. With `clustered`, tokens of one document
        need not be: the groups hold whole documents each (`group_ids = document % groups`), and there is one interval
        for all of them together: see `xentile.confidence.grouped_confidence_interval`. Waits for the device.
        """
        from xentile.confidence import confidence_interval, grouped_confidence_interval

        return (grouped_confidence_interval if clustered else confidence_interval)(self, q, level=level)

    def _quantile(self, q: float | Sequence[float] | Tensor, interpolation: str) -> tuple[Tensor, Tensor, Tensor]:
        _check.one_of(interpolation, "interpolation", layout.INTERPOLATIONS)
        wanted = _check.quantiles(q, self.device)
        shape = wanted.shape if self.groups == 1 else (self.groups, *wanted.shape)
        flat = wanted.reshape(-1).contiguous()
        value, lower, upper = (
            torch.empty(self.groups, flat.shape[0], dtype=torch.float32, device=self.device) for _ in range(3)
        )
        code = layout.INTERPOLATIONS.index(interpolation)
        ops.sketch_quantile.default(self.state, flat, value, lower, upper, code)
        return value.reshape(shape), lower.reshape(shape), upper.reshape(shape)

    def _midpoints(self, q: float | Sequence[float] | Tensor, interpolation: str) -> Tensor:
        _check.one_of(interpolation, "interpolation", layout.INTERPOLATIONS)
        wanted = _check.quantiles(q, self.device)
        _, left, right = self._buckets()
        upto = ordered_counts(self.state).cumsum(1)
        n = upto[:, -1:]
        low, high = (e.double()[:, None] for e in extremes(self.state))
        middle = left + (right - left).nan_to_num(0.0) / 2
        middle[:, 0] = 0

        def at(rank: Tensor) -> Tensor:
            index = torch.searchsorted(upto, rank.contiguous(), right=True).clamp(max=middle.shape[1] - 1)
            value = torch.where(rank == 0, low, torch.where(rank == n - 1, high, middle.gather(1, index)))
            return torch.clamp(value, low, high)

        lower, upper, fraction = ranks(wanted.reshape(1, -1), n, interpolation)
        value = interpolate(at(lower), at(upper), fraction).masked_fill(n == 0, torch.nan).float()
        return value.reshape(wanted.shape if self.groups == 1 else (self.groups, *wanted.shape))

    def cdf(self, x: float | Sequence[float] | Tensor) -> Tensor:
        """The share of the counted values up to x, float64, shapes as `quantile`; the inverse of `quantile`.

        The values of a bin are taken as spread evenly over it, those below 2**-24 as 0: at the edge of a bin the share
        of the values below it is exact. NaN where nothing was counted.
        """
        x = _check.numbers(x, "x", self.device)
        low, high = (e.double()[:, None] for e in extremes(self.state))
        at = x.reshape(1, -1).expand(self.groups, -1).contiguous()
        counts, left, right = self._buckets()
        index = torch.searchsorted(right.contiguous(), at, right=True).clamp(max=counts.shape[1] - 1)
        before = (counts.cumsum(1) - counts).gather(1, index)
        c, a, b = counts.gather(1, index), left.gather(1, index), right.gather(1, index)
        inside = torch.where(b > a, (at - a) / (b - a), (at >= b).double()).clamp(0, 1)
        inside = torch.where(index == 0, (at >= 0).double(), inside)
        share = (before + c * inside) / counts.sum(1, keepdim=True)
        share = torch.where(at >= high, 1.0, torch.where(at < low, 0.0, share))
        share = torch.where(low.isnan() | at.isnan(), torch.nan, share)
        return share.reshape(x.shape if self.groups == 1 else (self.groups, *x.shape))

    def trimmed_mean(self, lo: float, hi: float) -> Tensor:
        """The mean of the values between the quantiles lo < hi, float64.

        Each value is taken as the middle of its bin: within 2**-(M + 1) relative or 2**-25 nats, below 256 nats. Larger
        values, of which only the maximum is known, are taken as halfway between 256 and that.
        """
        if not 0 <= _check.number(lo, "lo") < _check.number(hi, "hi") <= 1:
            raise ValueError(f"lo and hi must satisfy 0 <= lo < hi <= 1, got {lo} and {hi}")
        counts, left, right = self._buckets()
        upto = counts.cumsum(1)
        n = upto[:, -1:]
        share = (torch.minimum(upto, hi * n) - torch.maximum(upto - counts, lo * n)).clamp(min=0)
        total = torch.where(share > 0, share * (left + (right - left).nan_to_num(0.0) / 2), 0.0).sum(1)
        return self._per_group(total / ((hi - lo) * n[:, 0]))

    def cvar(self, q: float) -> Tensor:
        """The mean of the values above the quantile q < 1 (conditional value at risk), float64."""
        return self.trimmed_mean(q, 1.0)

    def tail_share(self, q: float) -> Tensor:
        """The share of the sum of all values that is in those above the quantile q < 1, float64; within 2**-M."""
        return self.cvar(q) * (1 - q) / self.trimmed_mean(0.0, 1.0)

    def _buckets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Counts and edges (G, bins + 3) float64 of the buckets in the order of their values."""
        state, edges = self.state, bin_edges(self.layout, self.device).double()
        counts = ordered_counts(state).double()
        low, high = (e.double()[:, None] for e in extremes(state))
        row = edges.expand(self.groups, -1)
        infinity = torch.full_like(low, torch.inf)
        top = torch.maximum(high.nan_to_num(0.0).clamp(max=torch.finfo(torch.float32).max), row[:, -1:])
        left = torch.cat([low.nan_to_num(0.0).clamp(max=0), row, infinity], 1)
        return counts, left, torch.cat([row, top, infinity], 1)

    # ------------------------------------------------------------------------------------------------------------
    # counts

    def count(self) -> Tensor:
        """How many values the quantiles are over: all but NaN. int64; float64, their total weight, if they have
        weights.
        """
        return self._counted(self._row_count())

    def nan_count(self) -> Tensor:
        """How many values were NaN or -inf; as `count`."""
        return self._counted(self.state[:, layout.NAN])

    def inf_count(self) -> Tensor:
        """How many values were +inf; as `count`."""
        return self._counted(self.state[:, layout.INF])

    def ignored_count(self) -> Tensor:
        """How many tokens had `ignore_index` as their target, int64."""
        return self._per_group(self.state[:, layout.IGNORED])

    def out_of_range_count(self) -> Tensor:
        """How many tokens had a target outside [0, V), or (in group 0) a group outside [0, G); int64."""
        return self._per_group(self.state[:, layout.OUT_OF_RANGE] + self.state[:, layout.BAD_GROUP])

    # -----------------------------------------------------------------------------------------------------------
    # moments

    def mean(self) -> Tensor:
        """The mean, float64: the exact sum, divided once. inf if a value is; NaN where nothing was counted."""
        total, _ = self._sums()
        mean = total / (self._row_count().double() / self.unit)
        return self._per_group(torch.where(self.state[:, layout.INF] > 0, torch.inf, mean))

    def std(self) -> Tensor:
        """The standard deviation of the finite values, float64, divided by n - 1 (by the total weight with weights).

        From the sums of x and x^2: absolute error about 1e-16 * mean**2 / std.
        """
        total, square = self._sums()
        n = (self._row_count() - self.state[:, layout.INF]).double() / self.unit
        variance = (square / n - (total / n) ** 2).clamp(min=0)
        return self._per_group((variance * n / (n - 1) if self.unit == 1 else variance).sqrt())

    def min(self) -> Tensor:
        """The exact minimum, float32; NaN where nothing was counted."""
        return self._per_group(extremes(self.state)[0])

    def max(self) -> Tensor:
        """The exact maximum, float32; NaN where nothing was counted."""
        return self._per_group(extremes(self.state)[1])

    # -----------------------------------------------------------------------------------------------------------
    # to the host

    def read_async(self, q: float | Sequence[float] | Tensor, *, interpolation: str = "linear") -> PendingReading:
        """The quantiles q, the moments, the extremes and the counts as they are now, on their way to the host.

        Nothing waits: the state is packed into one small tensor on the device, and copied to pinned memory on the
        current stream. Take the result when it is `ready()`, for instance one step later; the sketch can be updated and
        reset at once. Pass q as a tensor on the device where a step counts every launch. See `PendingReading`.

        Example:
            >>> sketch, pending = LossSketch(), None
            >>> for loss in (1.0, 2.0, 3.0):  # a training loop that logs one step late
            ...     if pending is not None:
            ...         reading = pending.result()
            ...         print(reading.count.item(), round(reading.mean.item(), 3), reading.quantile)
            ...     sketch.update(torch.tensor([loss, loss + 1]))
            ...     pending = sketch.read_async([0.0, 1.0])
            2 1.5 tensor([1., 2.])
            4 2.0 tensor([1., 3.])
        """
        from xentile.reading import read_async

        return read_async(self, q, interpolation=interpolation)

    def summary(self) -> str:
        """One readable block (a line a group): tokens, mean, percentiles, maximum. Waits for the device."""
        from xentile.summary import sketch_summary

        return sketch_summary(self)

    def _condensed(self) -> dict[str, Tensor]:
        """What counts, moments and extremes are computed from, by attribute: contiguous (G, k) tensors of 8 bytes.

        The state is here with a single bin: they need but the sum of the bins.
        """
        bins = self.state[:, layout.SPECIAL :].sum(1, keepdim=True)
        return {"state": torch.cat([self.state[:, : layout.SPECIAL], bins], 1)}

    def _row_count(self) -> Tensor:
        return self.state[:, layout.SPECIAL :].sum(1) + self.state[:, : layout.INF + 1].sum(1)

    def _sums(self) -> tuple[Tensor, Tensor]:
        """Sum of x and of x^2 over the finite values of each row, float64, from their integer limbs."""
        return self._sum(layout.SUM_LIMBS), self._sum(layout.SQUARE_LIMBS)

    def _sum(self, limbs: tuple[tuple[int, int], ...]) -> Tensor:
        return torch.stack([self.state[:, column].double() * 2.0**exponent for column, exponent in limbs]).sum(0)

    def _counted(self, value: Tensor) -> Tensor:
        return self._per_group(value if self.unit == 1 else value.double() / self.unit)

    def _per_group(self, value: Tensor) -> Tensor:
        return value[0].clone() if self.groups == 1 else value.clone()
