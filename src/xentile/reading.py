"""What a sketch says, on its way from the device to the host: one packed copy that nobody waits for."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from xentile.readout import Readout


@dataclass(frozen=True)
class Reading:
    """What was read: CPU tensors, each with the shape, the dtype and the bits of the read-out of its name."""

    quantile: Tensor
    mean: Tensor
    std: Tensor
    min: Tensor
    max: Tensor
    count: Tensor
    nan_count: Tensor
    inf_count: Tensor
    ignored_count: Tensor
    out_of_range_count: Tensor


class PendingReading:
    """A `Reading` that may still be on its way to the host; made by `read_async` of a sketch or a stream.

    It shows the moment of that call, whatever happened to the sketch since.
    """

    def __init__(
        self, source: Readout, quantiles: Tensor, shape: tuple[int, ...], event: torch.cuda.Event | None
    ) -> None:
        self._source = source  # a copy of the sketch, whose state is in the host buffer
        self._quantiles = quantiles
        self._shape = shape
        self._event = event

    def ready(self) -> bool:
        """Whether `result` would not wait. Always on a CPU."""
        return self._event is None or self._event.query()

    def result(self) -> Reading:
        """The reading, as often as it is asked for; waits for the device until it is there."""
        if self._event is not None:
            self._event.synchronize()
        quantile = self._quantiles.view(torch.float64).float().reshape(self._shape)
        others = {field.name for field in fields(Reading)} - {"quantile"}
        return Reading(quantile, **{name: getattr(self._source, name)() for name in others})


def read_async(sketch: Readout, q: float | Sequence[float] | Tensor, *, interpolation: str) -> PendingReading:
    """`Readout.read_async`."""
    quantile = sketch.quantile(q, interpolation=interpolation)
    parts = sketch._condensed()
    on_device = [*parts.values(), quantile.reshape(sketch.groups, -1).double()]
    host, event = _to_host(torch.cat([part.view(torch.int64) for part in on_device], 1))
    *columns, quantiles = host.split([part.shape[1] for part in on_device], 1)
    source = copy.copy(sketch)
    for (name, part), column in zip(parts.items(), columns, strict=True):
        # Moments and counts are computed of these on the host, by the methods that compute them on the device.
        setattr(source, name, column.view(part.dtype))
    return PendingReading(source, quantiles, tuple(quantile.shape), event)


def _to_host(packed: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy in host memory, and the event after which it is there; None if it is."""
    if packed.device.type != "cuda":
        return packed.cpu(), None
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(packed.device))
    return host, event
