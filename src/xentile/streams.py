"""Percentiles of the recent past: a sliding window of steps, and exponential decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xentile import _check
from xentile import _layout as layout
from xentile._autograd import recomputing
from xentile.readout import Readout
from xentile.reference.sketch import bin_edges
from xentile.sketch import WEIGHT_UNIT, LossSketch


class Stream(Readout):
    """A sketch of the past steps, of which each adds to, and may take from, what is read.

    Attributes:
        current: the LossSketch of the step that is running. Feed it as any other: `cross_entropy(..., sketch=current)`,
            `current.update(...)`, once a micro-batch if there are several; reduce it over ranks with
            `current.all_reduce_()`. What it holds is not read yet.
        state: (G, width) int64, what the read-outs are over: the closed steps.

    Everything is preallocated and changed in place with fixed shapes, and nothing waits for the device, so that a step
    can be captured in a CUDA graph.
    """

    current: LossSketch

    def __init__(self, device: torch.device | str | None, groups: int, precision: int, weighted: bool) -> None:
        self.current = LossSketch(device, groups=groups, precision=precision, weighted=weighted)
        self.state = torch.zeros_like(self.current.state)
        self.unit = self.current.unit

    @property
    def weighted(self) -> bool:
        """Whether values have weights."""
        return self.current.weighted

    def update(
        self,
        values: Tensor,
        mask: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        group_ids: Tensor | None = None,
    ) -> None:
        """A whole step in one call: `current.update` with the same arguments, then `step()`."""
        self.current.update(values, mask, weights=weights, group_ids=group_ids)
        self.step()

    def step(self) -> None:
        """Close the running step: `current` goes into the read-outs, and is empty again.

        Like counting, this is skipped where activation checkpointing recomputes a forward.
        """
        if self.current.state.shape != self.state.shape:
            raise ValueError(
                f"current must keep its precision of {self.layout.mantissa_bits}: a sketch of precision "
                f"{self.current.precision} was merged into it"
            )
        if recomputing():
            return
        self._close()
        self.current.reset()

    def reset(self) -> None:
        """Forget everything, the running step as well, in place."""
        for buffer in self._buffers().values():
            buffer.zero_()

    def state_dict(self) -> dict[str, Any]:
        """A copy of all there is, the running step as well, for torch.save."""
        return {**self._options(), **{name: buffer.clone() for name, buffer in self._buffers().items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace all there is, in place. Window or half-life, groups, precision and weighting must agree."""
        _check.instance(state_dict, "state_dict", dict)
        options, buffers = self._options(), self._buffers()
        if set(state_dict) != options.keys() | buffers.keys():
            wanted = sorted(options.keys() | buffers.keys())
            raise ValueError(f"state_dict must have the keys {wanted}, got {sorted(state_dict)}")
        for name, value in options.items():
            if state_dict[name] != value:
                raise ValueError(f"state_dict must hold {name}={value}, got {state_dict[name]}")
        for name, buffer in buffers.items():
            loaded = _check.tensor(state_dict[name], f"state_dict[{name!r}]")
            if loaded.shape != buffer.shape or loaded.dtype != buffer.dtype:
                raise ValueError(
                    f"state_dict[{name!r}] must have shape {tuple(buffer.shape)} and dtype {buffer.dtype}, "
                    f"got {tuple(loaded.shape)} and {loaded.dtype}"
                )
        for name, buffer in buffers.items():
            buffer.copy_(state_dict[name])

    def __repr__(self) -> str:
        options = {**self._options(), "groups": self.groups, "precision": self.layout.mantissa_bits}
        text = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"{type(self).__name__}({text}, device={str(self.device)!r})"

    def _close(self) -> None:
        """Take `current` into `state`."""
        raise NotImplementedError

    def _options(self) -> dict[str, float]:
        """What the constructor was told, as far as the shapes of the buffers don't show it."""
        return {"weighted": self.weighted}

    def _buffers(self) -> dict[str, Tensor]:
        return {"state": self.state, "current": self.current.state}


class WindowedSketch(Stream):
    """Percentiles of the last `window` steps, exactly as one sketch of all their values.

    A ring holds the sketch of each step: closing a step adds it and subtracts the one that falls out, in integers. The
    minimum and the maximum are those of the ring.

    Args:
        window: W >= 1, how many steps are remembered; fewer count as long as there are fewer.
        device: where it lives; the device of the losses it counts.
        groups: G >= 1 separate histograms, chosen by `group_ids`.
        precision: M in 1 ... 10 mantissa bits. The ring takes W * G * (32 * 2**M + 16) * 8 bytes, at M = 7 about 32 KiB
            a step and group.
        weighted: values have real weights, as in a weighted LossSketch, and counts are total weights.

    Example:
        >>> stream = WindowedSketch(window=2)
        >>> for step in range(5):
        ...     stream.update(torch.tensor([1.0 * step, 2.0 * step]))
        >>> stream.min(), stream.max(), stream.count()
        (tensor(3.), tensor(8.), tensor(4))
    """

    def __init__(
        self,
        window: int,
        device: torch.device | str | None = None,
        *,
        groups: int = 1,
        precision: int = 7,
        weighted: bool = False,
    ) -> None:
        if _check.integer(window, "window") < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        super().__init__(device, groups, precision, weighted)
        self.window = window
        self._ring = torch.zeros(window, *self.state.shape, dtype=torch.int64, device=self.device)
        self._steps = torch.zeros(1, dtype=torch.int64, device=self.device)  # closed so far; on the device for graphs

    def _close(self) -> None:
        slot, now = self._steps.remainder(self.window), self.current.state
        self.state += now - self._ring.index_select(0, slot)[0]
        self._ring.index_copy_(0, slot, now[None])
        self.state[:, layout.EXTREMES] = self._ring[:, :, layout.EXTREMES].amax(0)
        self._steps += 1

    def _options(self) -> dict[str, float]:
        return {"window": self.window, **super()._options()}

    def _buffers(self) -> dict[str, Tensor]:
        return {**super()._buffers(), "ring": self._ring, "steps": self._steps}


class DecayedSketch(Stream):
    """Percentiles of all steps, each with half the weight of the step `halflife` steps later.

    With decay = 2**(-1 / halflife), a value of the newest step has weight 1, of the step before `decay`, and so on.
    Counts are total weights in units of 2**-20. Closing a step multiplies each by `decay` in float64 and rounds it
    towards zero, so the result has the same bits on every device, and a bin that gets nothing is empty in the end. Its
    weight is too low by less than 2**-20 / (1 - decay), at most 1.4e-6 * halflife + 1e-6. The mean and the standard
    deviation don't feel this: their sums are in units of 2**-48, over a total weight in float64.

    The maximum is the largest value ever, but not above the highest bin that still has weight; likewise the minimum.
    So these two are exact as long as their values have weight, and thereafter within a bin (2**-M relative).

    Args:
        halflife: in steps, greater than 0; need not be an integer.
        device: where it lives; the device of the losses it counts.
        groups: G >= 1 separate histograms, chosen by `group_ids`. They decay with every step, also one that has no
            token for them.
        precision: M in 1 ... 10 mantissa bits.
        weighted: values have real weights of their own, as in a weighted LossSketch, which decay from there.

    Attributes:
        decay: 2**(-1 / halflife).

    Example:
        >>> stream = DecayedSketch(halflife=1)
        >>> for loss in (4.0, 2.0, 1.0):
        ...     stream.update(torch.tensor([loss]))
        >>> stream.count(), stream.mean()  # weights 1/4, 1/2, 1
        (tensor(1.7500, dtype=torch.float64), tensor(1.7143, dtype=torch.float64))
    """

    def __init__(
        self,
        halflife: float,
        device: torch.device | str | None = None,
        *,
        groups: int = 1,
        precision: int = 7,
        weighted: bool = False,
    ) -> None:
        super().__init__(device, groups, precision, weighted)
        self.unit = WEIGHT_UNIT
        self.halflife = _check.positive(halflife, "halflife")
        self.decay: float = 2.0 ** (-1 / self.halflife)
        self._weight_sums = torch.zeros(self.groups, 2, dtype=torch.float64, device=self.device)  # of w, of w^2
        self._decays = torch.empty_like(self._weight_sums)
        self._decays[:, 0], self._decays[:, 1] = self.decay, self.decay**2
        # What a step's columns are multiplied by. Values may have come in the unit; tokens that are only counted never
        # do. The sums are in their own units, and the extremes don't add.
        self._scale = torch.full_like(self.state[0], self.unit // self.current.unit)
        self._scale[layout.IGNORED : layout.BAD_GROUP + 1] = self.unit
        self._scale[layout.SUM_LO : layout.SQ_HI + 1] = 1
        self._scale[layout.EXTREMES] = 0
        self._ends = bucket_ends(self.layout, self.device)

    def effective_count(self) -> Tensor:
        """The effective sample size (sum w)^2 / (sum w^2) of the counted values, float64; 0 where nothing is left.

        That many values of equal weight make a mean with the same variance, if values are independent. For n values a
        step it tends to n * (1 + decay) / (1 - decay), about 2.89 * halflife * n.

        Raises:
            ValueError: if values have weights of their own: a sketch doesn't know the sum of their squares.
        """
        if self.weighted:
            raise ValueError("effective_count needs values without weights, got weighted=True")
        total, squares = self._weight_sums.unbind(1)
        return self._per_group(torch.where(self._row_count() > 0, total**2 / squares, 0.0))

    def ignored_count(self) -> Tensor:
        """The total weight of tokens that had `ignore_index` as their target, float64."""
        return super().ignored_count().double() / self.unit

    def out_of_range_count(self) -> Tensor:
        """The total weight of tokens with a target or a group out of range, float64."""
        return super().out_of_range_count().double() / self.unit

    def _sums(self) -> tuple[Tensor, Tensor]:
        """As many of the sums as the bins have kept of the weight, so that a mean is over the exact weight."""
        kept = self._row_count().double() / self.unit / self._weight_sums[:, 0]
        total, square = super()._sums()
        return total * kept, square * kept

    def _close(self) -> None:
        now = self.current.state
        extremes = torch.maximum(self.state[:, layout.EXTREMES], now[:, layout.EXTREMES])
        self._fade()
        self.state += now * self._scale
        reach = torch.where((self.state > 0)[:, :, None], self._ends, 0).amax(1)
        self.state[:, layout.EXTREMES] = torch.minimum(extremes, reach)
        self._weight_sums.mul_(self._decays).add_(self.current._row_count().double()[:, None] / self.current.unit)

    def _fade(self) -> None:
        """Multiply the additive columns by `decay`: a limb's fraction goes to the next, the rest is dropped."""
        faded = self.state.double() * self.decay
        for limbs in (layout.SUM_LIMBS, layout.SQUARE_LIMBS):
            carry = torch.zeros_like(faded[:, 0])
            for column, exponent in limbs:
                value = faded[:, column] + carry * 2.0**-exponent
                faded[:, column] = value.trunc()
                carry = (value - faded[:, column]) * 2.0**exponent
        self.state.copy_(faded.trunc_())

    def _condensed(self) -> dict[str, Tensor]:
        return {**super()._condensed(), "_weight_sums": self._weight_sums}

    def _options(self) -> dict[str, float]:
        return {"halflife": self.halflife, **super()._options()}

    def _buffers(self) -> dict[str, Tensor]:
        return {**super()._buffers(), "weight_sums": self._weight_sums}


def bucket_ends(layout_: layout.Layout, device: torch.device) -> Tensor:
    """(width, 2) int64: the MAX_KEY of the largest and the MIN_KEY of the smallest value that each bucket can hold.

    0 for the columns that are no buckets of values.
    """
    edges = bin_edges(layout_, device)
    below = torch.nextafter(edges, torch.zeros_like(edges))
    smallest = torch.full((layout_.width,), torch.nan, device=device)
    largest = smallest.clone()
    smallest[layout.ZERO], largest[layout.ZERO] = torch.finfo(torch.float32).min, below[0]
    smallest[layout.SPECIAL :], largest[layout.SPECIAL :] = edges[:-1], below[1:]
    smallest[layout.OVERFLOW], largest[layout.OVERFLOW] = edges[-1], torch.finfo(torch.float32).max
    smallest[layout.INF] = largest[layout.INF] = torch.inf
    keys = torch.stack([_order(largest) + 2**31 + 1, 2**31 - _order(smallest)], 1)
    return torch.where(smallest.isnan()[:, None], 0, keys)


def _order(values: Tensor) -> Tensor:
    """The integers, ordered as the float32 values, from which MAX_KEY and MIN_KEY are made (xentile/_layout.py)."""
    bits = values.view(torch.int32).long()
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
