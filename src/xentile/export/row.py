"""One group of a sketch on the host: what every format is made of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xentile import _check
from xentile import _layout as layout
from xentile.readout import Readout
from xentile.reference.sketch import bin_edges

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOAT32_MAX = float(torch.finfo(torch.float32).max)


class Row(Readout):
    """One group of a sketch on the host."""

    def __init__(self, sketch: Readout, group: int | None) -> None:
        _check.instance(sketch, "sketch", Readout)
        if group is None:
            if sketch.groups != 1:
                raise ValueError(f"group must be chosen for a sketch of {sketch.groups} groups, got None")
            group = 0
        if not 0 <= _check.integer(group, "group") < sketch.groups:
            raise ValueError(f"group must be in [0, {sketch.groups}), got {group}")
        self.state, self.unit = sketch.state[group : group + 1].cpu(), sketch.unit

    def counts(self) -> NDArray[Any]:
        """Finite values in each bucket: below 2**-24, the bins, from 256 on. int64; float64 if they have weights."""
        state = self.state[0].numpy()
        counts = np.concatenate([state[[layout.ZERO]], state[layout.SPECIAL :], state[[layout.OVERFLOW]]])
        return counts if self.unit == 1 else counts / self.unit

    def edges(self) -> NDArray[np.float64]:
        """The edges of those buckets, float64, strictly ascending, and around every value."""
        inner = bin_edges(self.layout).double().numpy()
        low, high = self.extremes()
        return np.concatenate([[min(low, 0.0)], inner, [max(high, np.nextafter(inner[-1], np.inf))]])

    def extremes(self) -> tuple[float, float]:
        """The least and the greatest finite value; an upper edge where an infinite loss hid the greatest; (0, 0)."""
        occupied = np.flatnonzero(self.counts())
        if not occupied.size:
            return 0.0, 0.0
        low, high = float(self.min()), float(self.max())
        if math.isinf(high):
            last = int(occupied[-1])  # bucket i ends at the edge of bin i
            high = FLOAT32_MAX if last > self.layout.bins else float(bin_edges(self.layout)[last])
        return low, high

    def sums(self) -> tuple[float, float]:
        """Sum of the finite values, and of their squares."""
        total, square = self._sums()
        return float(total), float(square)
