"""Histograms with edges: NumPy, W&B and trackio, TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from xentile import _check
from xentile.export.row import Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from xentile.readout import Readout

WANDB_MAX_BINS = 512
"""wandb.Histogram.MAX_LENGTH; more bins are refused there."""


def numpy_histogram(
    sketch: Readout, *, max_bins: int = 512, group: int | None = None
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Counts and edges, as `np.histogram` returns them, with log-spaced bins.

    Neighbouring bins are added up in groups of 2**k, k the least that leaves at most `max_bins`. A quantile below 256
    nats that is read from the result is then within 2**(k - M) relative of the exact one, or 2**-24 nats, as long as
    k <= M, for which 34 bins always suffice; fewer may be whole octaves wide. Infinite losses are left out.

    Args:
        sketch: any sketch.
        max_bins: at least 3: below 2**-24, the regular bins, and from 256 nats on.
        group: which group, of a sketch that has several.

    Returns:
        counts (b,) int64 (float64 total weights if the values have weights) and edges (b + 1,) float64, b <= max_bins.
        The range covers all values, and no more than it must. One empty bin [0, 1] where nothing was counted.

    Example:
        >>> sketch = LossSketch()
        >>> sketch.update(torch.tensor([0.5, 1.0, 1.25, 3.0]))
        >>> numpy_histogram(sketch, max_bins=8)
        (array([1, 0, 2, 0, 0, 1]), array([0.5 , 0.75, 1.  , 1.5 , 2.  , 3.  , 4.  ]))
    """
    if _check.integer(max_bins, "max_bins") < 3:
        raise ValueError(f"max_bins must be at least 3, got {max_bins}")
    row = Row(sketch, group)
    counts = row.counts()
    if not counts.any():
        return np.zeros(1, counts.dtype), np.array([0.0, 1.0])
    regular = np.flatnonzero(counts[1:-1])
    outer = [0, 1] * bool(counts[0]) + [len(counts) - 1, len(counts)] * bool(counts[-1])  # positions of edges
    for k in range(row.layout.mantissa_bits + 6):  # up to all 2**(M + 5) regular bins in one
        inner = np.empty(0, np.int64)
        if regular.size:
            inner = np.arange(regular[0] >> k, (regular[-1] >> k) + 2) * 2**k + 1
        kept = np.unique(np.concatenate([np.array(outer, np.int64), inner]))
        if len(kept) - 1 <= max_bins:
            break
    below = np.concatenate([np.zeros(1, counts.dtype), np.cumsum(counts)])
    return np.diff(below[kept]), row.edges()[kept]


def wandb_histogram(sketch: Readout, *, group: int | None = None) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """`wandb.Histogram(np_histogram=wandb_histogram(sketch))`, and the same with `trackio.Histogram`.

    At most 512 bins, which is what W&B takes: `numpy_histogram` says what is lost.
    """
    return numpy_histogram(sketch, max_bins=WANDB_MAX_BINS, group=group)


def tensorboard_histogram(sketch: Readout, *, max_bins: int = 512, group: int | None = None) -> dict[str, Any]:
    """`writer.add_histogram_raw("loss", **tensorboard_histogram(sketch), global_step=step)`.

    Bins as of `numpy_histogram`; `num`, `sum` and `sum_squares` are over the finite values, and exact up to the
    rounding to float64, `min` and `max` are exact (`max` a bin's upper edge where a loss is infinite).
    """
    counts, edges = numpy_histogram(sketch, max_bins=max_bins, group=group)
    row = Row(sketch, group)
    low, high = row.extremes()
    total, square = row.sums()
    return {
        "min": low,
        "max": high,
        "num": counts.sum().item(),
        "sum": total,
        "sum_squares": square,
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }
