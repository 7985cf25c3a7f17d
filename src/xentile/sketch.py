"""`LossSketch`: running percentiles of per-token losses, in 32 KiB on the device, mergeable without loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xentile import _check
from xentile import _layout as layout
from xentile._autograd import recomputing
from xentile._ops import ops
from xentile.reference.sketch import extremes

if TYPE_CHECKING:
    from collections.abc import Sequence


class LossSketch:
    """A histogram of losses with 4096 log-linear bins between 2**-24 and 256 nats, exact counts, sum, minimum and
    maximum.

    Every quantile is within 2**-7 (0.78 %) of the exact one, or within 2**-24 nats; `quantile_bounds` encloses it.
    Counts, sums and extremes are integers, so updates and merges in any order give the same bits. Nothing here waits
    for the device except `summary` and `==`.

    Args:
        device: where it lives; the device of the losses it counts.
        groups: G >= 1 separate histograms (a domain, a position bucket), chosen by `group_ids`. With one group the
            read-outs are scalars, or (Q,); with more they have a leading dimension G.

    Attributes:
        state: (G, WIDTH) int64, laid out as in xentile/_layout.py; all zeros when empty. Preallocated, changed in place
            only, so it can be captured in a CUDA graph.

    Example:
        >>> sketch = LossSketch()
        >>> sketch.update(torch.tensor([0.5, 1.0, 4.0]))
        >>> sketch.quantile([0.0, 0.5, 1.0])
        tensor([0.5000, 1.0039, 4.0000])
        >>> sketch.count(), sketch.mean()
        (tensor(3), tensor(1.8333, dtype=torch.float64))
    """

    def __init__(self, device: torch.device | str | None = None, *, groups: int = 1) -> None:
        if _check.integer(groups, "groups") < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.state = torch.zeros(groups, layout.WIDTH, dtype=torch.int64, device=device)

    @classmethod
    def from_state(cls, state: Tensor) -> LossSketch:
        """A sketch over an existing state tensor, shared, not copied.

        Raises:
            TypeError, ValueError: if it is no int64 tensor of shape (G, WIDTH).
        """
        _check.tensor(state, "state")
        if state.dtype != torch.int64:
            raise TypeError(f"state must be int64, got {state.dtype}")
        if state.dim() != 2 or state.shape[0] < 1 or state.shape[1] != layout.WIDTH:
            raise ValueError(f"state must have shape (G, {layout.WIDTH}), got {tuple(state.shape)}")
        if not state.is_contiguous():
            raise ValueError(f"state must be contiguous, got strides {state.stride()}")
        sketch = cls.__new__(cls)
        sketch.state = state
        return sketch

    @property
    def groups(self) -> int:
        """G, the number of separate histograms."""
        return self.state.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the state lives."""
        return self.state.device

    # ----------------------------------------------------------------------------------------------------------
    # counting

    def update(self, values: Tensor, mask: Tensor | None = None, *, group_ids: Tensor | None = None) -> None:
        """Count losses of any shape and float dtype (nats), where `mask` (bool, same shape) holds.

        Like the fused update, it skips the recomputation of activation checkpointing.
        """
        _check.tensor(values, "values")
        if not values.is_floating_point():
            raise TypeError(f"values must be floating point, got {values.dtype}")
        if mask is not None:
            if _check.tensor(mask, "mask").dtype != torch.bool:
                raise TypeError(f"mask must be bool, got {mask.dtype}")
            if mask.shape != values.shape:
                raise ValueError(f"mask must have the shape of values, {tuple(values.shape)}, got {tuple(mask.shape)}")
        _check.group_ids(group_ids, tuple(values.shape), self)
        _check.same_device(self.state, "the sketch", values=values, mask=mask, group_ids=group_ids)
        ids = None if group_ids is None else group_ids.reshape(-1).to(torch.int64).contiguous()
        _check.group_range(ids, self.groups)
        if recomputing():
            return
        flat = values.detach().reshape(-1).float().contiguous()
        ops.sketch_update.default(flat, None if mask is None else mask.reshape(-1).contiguous(), ids, self.state)

    def merge(self, other: LossSketch) -> None:
        """Add the counts of another sketch with as many groups. Associative, commutative, exact."""
        _check.instance(other, "other", LossSketch)
        if other.groups != self.groups:
            raise ValueError(f"other must have {self.groups} groups, got {other.groups}")
        state = other.state.to(self.device)
        self.state[:, : layout.ADDITIVE] += state[:, : layout.ADDITIVE]
        extreme = slice(layout.ADDITIVE, layout.WIDTH)
        self.state[:, extreme] = torch.maximum(self.state[:, extreme], state[:, extreme])

    def reset(self) -> None:
        """Forget everything, in place."""
        self.state.zero_()

    # ---------------------------------------------------------------------------------------------------------
    # read-outs

    def quantile(self, q: float | Sequence[float] | Tensor, *, interpolation: str = "linear") -> Tensor:
        """Quantiles q of the counted values, float32; the shape of q, after (G,) when there are groups.

        Args:
            q: in [0, 1]; a number, a sequence or a tensor of any shape.
            interpolation: 'linear', 'lower', 'higher', 'nearest' or 'midpoint' between order statistics, as
                torch.quantile.

        Returns:
            NaN where nothing was counted. q = 0 and q = 1 are the exact minimum and maximum. NaN values are left out
            (`nan_count`).
        """
        return self._quantile(q, interpolation)[0]

    def quantile_bounds(self, q: float | Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
        """(lower, upper) with lower <= exact quantile <= upper, whatever the interpolation; shapes as `quantile`."""
        return self._quantile(q, "linear")[1:]

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

    def count(self) -> Tensor:
        """How many values the quantiles are over, int64: all but NaN."""
        return self._per_group(self.state[:, : layout.INF + 1].sum(1))

    def nan_count(self) -> Tensor:
        """How many values were NaN or -inf."""
        return self._per_group(self.state[:, layout.NAN])

    def inf_count(self) -> Tensor:
        """How many values were +inf."""
        return self._per_group(self.state[:, layout.INF])

    def ignored_count(self) -> Tensor:
        """How many tokens had `ignore_index` as their target."""
        return self._per_group(self.state[:, layout.IGNORED])

    def out_of_range_count(self) -> Tensor:
        """How many tokens had a target outside [0, V), or (in group 0) a group outside [0, G)."""
        return self._per_group(self.state[:, layout.OUT_OF_RANGE] + self.state[:, layout.BAD_GROUP])

    def mean(self) -> Tensor:
        """The mean, float64: the exact sum, divided once. inf if a value is; NaN where nothing was counted."""
        total = self.state[:, layout.SUM_HI].double() * 2.0**-20 + self.state[:, layout.SUM_LO].double() * 2.0**-48
        infinite = self.state[:, layout.INF]
        n = self.state[:, : layout.INF].sum(1) + infinite
        return self._per_group(torch.where(infinite > 0, torch.inf, total / n))

    def std(self) -> Tensor:
        """The standard deviation of the finite values, float64, divided by n - 1."""
        state = self.state.double()
        n = state[:, : layout.INF].sum(1)
        mean = (state[:, layout.SUM_HI] * 2.0**-20 + state[:, layout.SUM_LO] * 2.0**-48) / n
        square = (
            state[:, layout.SQ_HI] * 2.0**8 + state[:, layout.SQ_MID] * 2.0**-20 + state[:, layout.SQ_LO] * 2.0**-48
        )
        return self._per_group(((square / n - mean**2).clamp(min=0) * n / (n - 1)).sqrt())

    def min(self) -> Tensor:
        """The exact minimum, float32; NaN where nothing was counted."""
        return self._per_group(extremes(self.state)[0])

    def max(self) -> Tensor:
        """The exact maximum, float32; NaN where nothing was counted."""
        return self._per_group(extremes(self.state)[1])

    def _per_group(self, value: Tensor) -> Tensor:
        return value[0].clone() if self.groups == 1 else value.clone()

    def summary(self) -> str:
        """One readable block (a line a group): tokens, mean, percentiles, maximum. Waits for the device."""
        from xentile.summary import sketch_summary

        return sketch_summary(self)

    # ------------------------------------------------------------------------------------------------------ as an
    # object

    def clone(self) -> LossSketch:
        """A copy that shares nothing."""
        return LossSketch.from_state(self.state.clone())

    def to(self, device: torch.device | str) -> LossSketch:
        """This sketch if it is there already, else a copy on the device."""
        state = self.state.to(device)
        return self if state is self.state else LossSketch.from_state(state)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, for torch.save."""
        return {"state": self.state.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the counts, in place. The number of groups must agree."""
        _check.instance(state_dict, "state_dict", dict)
        if set(state_dict) != {"state"}:
            raise ValueError(f"state_dict must have the one key 'state', got {sorted(state_dict)}")
        state = LossSketch.from_state(state_dict["state"]).state
        if state.shape != self.state.shape:
            raise ValueError(f"state_dict must hold {self.groups} groups, got {state.shape[0]}")
        self.state.copy_(state)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LossSketch):
            return NotImplemented
        return self.state.shape == other.state.shape and torch.equal(self.state, other.state.to(self.device))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"LossSketch(device={str(self.device)!r}, groups={self.groups})"
