"""DDSketch: a sketch as one, and one as a sketch. The bins are the same, so no count moves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from xentile import _check
from xentile import _layout as layout
from xentile.export import protobuf
from xentile.export.row import Row
from xentile.reference.sketch import bin_edges, limbs_of
from xentile.sketch import LossSketch

if TYPE_CHECKING:
    from xentile.readout import Readout

READERS = ("python", "go")
"""Who reads a DDSketch. They take the `gamma` of a linearly interpolated mapping differently, and number the same bins
differently: bin i of a sketch, [2**-24, ...) being bin 0, is the index i - 24 * 2**M for 'go', one more for 'python'.
"""


def _log_gamma(mantissa_bits: int, reader: str) -> float:
    """ln(gamma) that makes the bins of that reader ours: it has 1 / ln(gamma) or 1 / log2(gamma) bins an octave."""
    return 2.0**-mantissa_bits * (1.0 if reader == "python" else math.log(2))


def to_ddsketch(sketch: Readout, *, reader: str = "python", group: int | None = None) -> bytes:
    """The sketch as a DDSketch in protobuf bytes, with the same bins: every count arrives, exact up to 2**53.

    A quantile read by DDSketch is within 2**-(M + 1) relative of the exact one, or 2**-24 nats. Losses of 256 nats or
    more, infinite ones too, are counted just above 256. Sums and extremes are lost: the format has none.

    Args:
        sketch: any sketch; with weights the counts are total weights.
        reader: 'python' for the package `ddsketch`, 'go' for DataDog's libraries for Go and Java.
        group: which group, of a sketch that has several.

    Returns:
        What `ddsketch.pb.ddsketch_pb2.DDSketch.FromString` takes, and the other libraries alike.
    """
    _check.one_of(reader, "reader", READERS)
    row = Row(sketch, group)
    m = row.layout.mantissa_bits
    counts = row.counts().astype(np.float64)
    counts[-1] += int(row.state[0, layout.INF]) / row.unit
    first = (layout.E_MIN << m) + (reader == "python") - 1  # the index of bucket 0, were it a bin
    return protobuf.encode(
        protobuf.Message(
            gamma=math.exp(_log_gamma(m, reader)),
            interpolation=protobuf.LINEAR,
            positive=protobuf.Store({first + int(i): float(counts[i]) for i in np.flatnonzero(counts[1:]) + 1}),
            zero_count=float(counts[0]),
        )
    )


def from_ddsketch(data: bytes, *, weighted: bool = False, device: torch.device | str = "cpu") -> LossSketch:
    """A sketch with the counts of a DDSketch in protobuf bytes that has the bins of some precision M in 1 ... 10.

    What `to_ddsketch` wrote comes back with equal counts in all bins, for either reader. Minimum and maximum become the
    edges of the outermost bins, mean and standard deviation those of the bins' middles, within 2**-(M + 1) relative.
    Infinite losses come back as finite ones of 256 nats or more.

    Args:
        data: the bytes.
        weighted: make a weighted sketch. Else a count that is no integer is an error.
        device: of the sketch.

    Raises:
        ValueError: if the bytes are no DDSketch, or one with other bins, negative values or a sum of 2**43 or more.
    """
    message = protobuf.decode(data)
    m, reader = _convention(message)
    if message.negative.counts:
        raise ValueError("data must hold no negative values: a loss sketch has no bins for them")
    sketch = LossSketch("cpu", precision=m, weighted=weighted)
    first = (layout.E_MIN << m) + (reader == "python") + int(message.index_offset)
    buckets = {-1: message.zero_count}
    for index, count in message.positive.counts.items():
        bucket = min(max(index - first, -1), sketch.layout.bins)
        buckets[bucket] = buckets.get(bucket, 0.0) + count
    amounts = {bucket: _amount(count, sketch.unit) for bucket, count in sorted(buckets.items()) if count}
    _fill(sketch.state[0], sketch.layout, amounts, sketch.unit)
    return sketch.to(device)


def _convention(message: protobuf.Message) -> tuple[int, str]:
    """The precision and the reader whose bins the mapping has."""
    if message.interpolation == protobuf.LINEAR and message.gamma > 1 and float(message.index_offset).is_integer():
        for m in layout.PRECISIONS:
            for reader in READERS:
                if math.isclose(math.log(message.gamma), _log_gamma(m, reader), rel_tol=1e-9):
                    return m, reader
    raise ValueError(
        "data must have a linearly interpolated mapping with 2**M bins an octave, M in 1 ... 10, and an integer "
        f"offset, got gamma={message.gamma}, interpolation={message.interpolation}, indexOffset={message.index_offset}"
    )


def _amount(count: float, unit: int) -> int:
    """A count in units of a sketch."""
    if not 0 <= count * unit < 2.0**63:
        raise ValueError(f"data must have counts in [0, 2**63), got {count}")
    if unit == 1 and not count.is_integer():
        raise ValueError(f"data must have integer counts unless weighted=True, got {count}")
    return round(count * unit)


def _fill(state: torch.Tensor, bins: layout.Layout, amounts: dict[int, int], unit: int) -> None:
    """Write counts by bin (-1 below the bins, ascending) to an empty state (width,), and sums over their middles."""
    if not amounts:
        return
    edges = [0.0, *bin_edges(bins).tolist()]
    edges.append(edges[-1] * (1 + 2.0**-bins.mantissa_bits))
    total = square = 0.0
    for bucket, amount in amounts.items():
        column = {-1: layout.ZERO, bins.bins: layout.OVERFLOW}.get(bucket, layout.SPECIAL + bucket)
        state[column] += amount
        middle = 0.0 if bucket < 0 else (edges[bucket + 1] + edges[bucket + 2]) / 2
        total += amount / unit * middle
        square += amount / unit * middle**2
    if total >= 2.0**43:  # more than a sketch's integers hold
        raise ValueError(f"data must have a sum of values below 2**43, got about {total:.3g}")
    for sum_, limbs in ((total, layout.SUM_LIMBS), (square, layout.SQUARE_LIMBS)):
        for column, limb in limbs_of(torch.tensor(sum_, dtype=torch.float64), limbs).items():
            state[column] = limb
    low, high = torch.tensor([edges[min(amounts) + 1], edges[max(amounts) + 2]]).view(torch.int32).tolist()
    state[layout.MAX_KEY] = high + 2**31 + 1
    state[layout.MIN_KEY] = 2**31 - low
