"""`LossSketch`: running percentiles of per-token losses, in 32 KiB on the device, mergeable without loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xentile import _check
from xentile import _layout as layout
from xentile._autograd import recomputing
from xentile._ops import ops
from xentile.readout import Readout

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    import torch.distributed as dist

WEIGHT_UNIT = 2**20
"""Weights are integers in units of 2**-20, so that sums of them are exact: each is rounded by at most 2**-21."""


class LossSketch(Readout):
    """A histogram of losses with log-linear bins between 2**-24 and 256 nats, exact counts, sum, minimum and maximum.

    Every quantile is within 2**-7 (0.78 %) of the exact one, or within 2**-24 nats; `quantile_bounds` encloses it.
    Counts, sums and extremes are integers, so updates and merges in any order give the same bits. Nothing here waits
    for the device except `summary`, `==`, and checks on a CPU.

    Args:
        device: where it lives; the device of the losses it counts.
        groups: G >= 1 separate histograms (a domain, a position bucket), chosen by `group_ids`. With one group the
            read-outs are scalars, or have the shape of q; with more they have a leading dimension G.
        precision: M in 1 ... 10 mantissa bits: 32 * 2**M bins, relative error at most 2**-M.
        weighted: values have real weights, counted in units of 2**-20, and counts are total weights.

    Attributes:
        state: (G, width) int64, laid out as in xentile/_layout.py; all zeros when empty. Preallocated, changed in place
            only (unless a coarser sketch is merged in), so it can be captured in a CUDA graph.
        unit: what one value adds to its bin: 1, or 2**20 when weighted.

    Example:
        >>> sketch = LossSketch()
        >>> sketch.update(torch.tensor([0.5, 1.0, 4.0]))
        >>> sketch.quantile([0.0, 0.5, 1.0])
        tensor([0.5000, 1.0039, 4.0000])
        >>> sketch.count(), sketch.mean()
        (tensor(3), tensor(1.8333, dtype=torch.float64))
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        groups: int = 1,
        precision: int = 7,
        weighted: bool = False,
    ) -> None:
        if _check.integer(groups, "groups") < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        if _check.integer(precision, "precision") not in layout.PRECISIONS:
            raise ValueError(f"precision must be in 1 ... 10, got {precision}")
        width = layout.Layout(precision).width
        self.state = torch.zeros(groups, width, dtype=torch.int64, device=device)
        self.unit = WEIGHT_UNIT if weighted else 1

    @classmethod
    def from_state(cls, state: Tensor, *, weighted: bool = False) -> LossSketch:
        """A sketch over an existing state tensor, shared, not copied.

        Raises:
            TypeError, ValueError: if it is no contiguous int64 tensor of shape (G, width).
        """
        _check.sketch_state(state)
        sketch = cls.__new__(cls)
        sketch.state, sketch.unit = state, WEIGHT_UNIT if weighted else 1
        return sketch

    @property
    def precision(self) -> int:
        """M, the mantissa bits that choose a bin."""
        return self.layout.mantissa_bits

    @property
    def weighted(self) -> bool:
        """Whether values have weights."""
        return self.unit != 1

    def update(
        self,
        values: Tensor,
        mask: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        group_ids: Tensor | None = None,
    ) -> None:
        """Count losses of any shape and float dtype (nats), where `mask` (bool, same shape) holds.

        `weights` (same shape, of a weighted sketch) are rounded to multiples of 2**-20; a negative one, or NaN, counts
        as 0, more than 2**20 as that. Like the fused update, this skips the recomputation of activation checkpointing.
        """
        shape = tuple(_check.tensor(values, "values").shape)
        _check.floating(values, "values", TypeError)
        _check.mask(mask, shape)
        if weights is not None:
            if not self.weighted:
                raise ValueError("weights need a sketch that was made with weighted=True")
            _check.like_values(weights, "weights", shape)
        _check.group_ids(group_ids, shape, self)
        others = {"values": values, "mask": mask, "weights": weights, "group_ids": group_ids}
        _check.same_device(self.state, "the sketch", **others)
        ids = None if group_ids is None else group_ids.reshape(-1).long().contiguous()
        _check.group_range(ids, self.groups)
        if recomputing():
            return
        flat = None if weights is None else _flat(weights)
        kept = None if mask is None else mask.reshape(-1).contiguous()
        ops.sketch_update.default(_flat(values), kept, flat, ids, self.state, self.unit)

    def merge(self, other: LossSketch) -> None:
        """Add the counts of another sketch with as many groups. Associative, commutative, exact.

        Of two precisions the lower is kept: if that is `other`'s, this sketch gets a new, smaller state.
        """
        self._check_mergeable(other)
        if other.precision < self.precision:
            self.state = self.coarsened(other.precision).state
        state = other.coarsened(self.precision).state.to(self.device)
        extremes = torch.maximum(self.state[:, layout.EXTREMES], state[:, layout.EXTREMES])
        self.state += state
        self.state[:, layout.EXTREMES] = extremes

    def merge_many(self, others: Iterable[LossSketch]) -> None:
        """Merge each of the others; nothing is merged if one of them doesn't fit."""
        others = list(others)
        for other in others:
            self._check_mergeable(other)
        for other in others:
            self.merge(other)

    def _check_mergeable(self, other: LossSketch) -> None:
        _check.instance(other, "other", LossSketch)
        if other.groups != self.groups:
            raise ValueError(f"other must have {self.groups} groups, got {other.groups}")
        if other.unit != self.unit:
            raise ValueError(f"other must have weighted={self.weighted}, got {other.weighted}")

    def coarsened(self, precision: int) -> LossSketch:
        """A sketch with fewer bins, exactly the one that would have counted the same values; itself if it has as
        many.
        """
        steps = self.precision - _check.integer(precision, "precision")
        if precision not in layout.PRECISIONS or steps < 0:
            raise ValueError(f"precision must be in 1 ... {self.precision}, got {precision}")
        if steps == 0:
            return self
        bins = self.state[:, layout.SPECIAL :].reshape(self.groups, -1, 2**steps).sum(2)
        state = torch.cat([self.state[:, : layout.SPECIAL], bins], 1)
        return LossSketch.from_state(state, weighted=self.weighted)

    def all_reduce_(self, process_group: dist.ProcessGroup | None = None, *, check: bool = True) -> None:
        """Merge the sketches of all ranks, in place: see `xentile.distributed.all_reduce_`."""
        from xentile.distributed import all_reduce_

        all_reduce_(self, process_group, check=check)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checksummed file, whole or not at all: see `xentile.persistence.save`."""
        from xentile.persistence import save

        save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> LossSketch:
        """Read a file that `save` wrote; ValueError if it is damaged: see `xentile.persistence.load`."""
        from xentile.persistence import load

        return load(path, device)

    def reset(self) -> None:
        """Forget everything, in place."""
        self.state.zero_()

    def clone(self) -> LossSketch:
        """A copy that shares nothing."""
        return LossSketch.from_state(self.state.clone(), weighted=self.weighted)

    def to(self, device: torch.device | str) -> LossSketch:
        """This sketch if it is there already, else a copy on the device."""
        state = self.state.to(device)
        return self if state is self.state else LossSketch.from_state(state, weighted=self.weighted)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state, for torch.save."""
        return {"state": self.state.clone(), "weighted": self.weighted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the counts, in place. Groups, precision and weighting must agree."""
        _check.instance(state_dict, "state_dict", dict)
        if set(state_dict) != {"state", "weighted"}:
            raise ValueError(f"state_dict must have the keys 'state' and 'weighted', got {sorted(state_dict)}")
        loaded = LossSketch.from_state(state_dict["state"], weighted=state_dict["weighted"])
        for name in ("groups", "precision", "weighted"):
            if getattr(loaded, name) != getattr(self, name):
                raise ValueError(f"state_dict must hold {name}={getattr(self, name)}, got {getattr(loaded, name)}")
        self.state.copy_(loaded.state)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LossSketch):
            return NotImplemented
        if self.state.shape != other.state.shape or self.unit != other.unit:
            return False
        return torch.equal(self.state, other.state.to(self.device))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        options = f"groups={self.groups}, precision={self.precision}, weighted={self.weighted}"
        return f"LossSketch(device={str(self.device)!r}, {options})"


def _flat(values: Tensor) -> Tensor:
    """Contiguous float32 (N,) without a gradient; the tensor itself, and no call of torch, where it is that already."""
    if values.requires_grad:
        values = values.detach()
    if values.dim() != 1:
        values = values.reshape(-1)
    return (values if values.dtype == torch.float32 else values.float()).contiguous()
