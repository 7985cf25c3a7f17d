"""OpenTelemetry exponential histograms, which are also Prometheus native histograms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xentile import _check
from xentile.export.row import Row
from xentile.reference.sketch import bin_edges

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from opentelemetry.sdk.metrics.export import ExponentialHistogramDataPoint

    from xentile.readout import Readout


@dataclass(frozen=True)
class Buckets:
    """Bucket i of an exponential histogram of scale s counts values in (2**(i / 2**s), 2**((i + 1) / 2**s)]."""

    offset: int
    """The index of the first bucket."""
    bucket_counts: tuple[int, ...]
    """The counts from there on."""


@dataclass(frozen=True)
class ExponentialHistogram:
    """The values of an OpenTelemetry ExponentialHistogramDataPoint; names as in its protocol."""

    count: int
    sum: float
    scale: int
    zero_count: int
    zero_threshold: float
    positive: Buckets
    negative: Buckets
    min: float
    max: float


def exponential_histogram(
    sketch: Readout, *, max_size: int = 160, zero_threshold: float = 2.0**-24, group: int | None = None
) -> ExponentialHistogram:
    """The sketch as an OpenTelemetry exponential histogram, the same as a Prometheus native histogram.

    Its bins are not those of the sketch, so each bin goes as a whole where its middle is. A quantile read from the
    middle of a bucket is within (b - 1) / (b + 1) + 2**-M relative of the exact one, b = 2**(2**-scale); or within
    the zero threshold. The scale is the largest up to M that needs no more than `max_size` buckets: 29 octaves of
    losses in 160 buckets leave scale 2, an error of 9 %. Infinite losses are left out, as OpenTelemetry does; those of
    256 nats or more are counted just above 256.

    Args:
        sketch: a sketch without weights: buckets count in integers.
        max_size: how many buckets, at least 2. 160 is the default of OpenTelemetry.
        zero_threshold: values up to this many nats, at least 2**-24, are counted as zero. Fewer octaves, a finer scale.
        group: which group, of a sketch that has several.
    """
    if _check.integer(max_size, "max_size") < 2:
        raise ValueError(f"max_size must be at least 2, got {max_size}")
    if not 2.0**-24 <= _check.number(zero_threshold, "zero_threshold") <= 2.0**8:
        raise ValueError(f"zero_threshold must be in [2**-24, 2**8], got {zero_threshold}")
    row = Row(sketch, group)
    if row.unit != 1:
        raise ValueError("sketch must count values, not weights, to become an exponential histogram")
    counts = row.counts()
    edges = bin_edges(row.layout).double().numpy()
    zeros = int(np.searchsorted(edges, zero_threshold, "right"))  # buckets below the last edge that is within it
    kept = zeros + np.flatnonzero(counts[zeros:])
    upper = np.append(edges, edges[-1] * (1 + 2.0**-row.layout.mantissa_bits))
    left, right = upper[kept - 1], upper[kept]
    log2 = np.log2(2 * left * right / (left + right))
    scale, index = _exponential_index(log2, row.layout.mantissa_bits, max_size)
    offset = int(index.min()) if index.size else 0
    buckets = np.zeros(int(index.max()) - offset + 1 if index.size else 0, np.int64)
    np.add.at(buckets, index - offset, counts[kept])
    low, high = row.extremes()
    return ExponentialHistogram(
        count=int(counts.sum()),
        sum=row.sums()[0],
        scale=scale,
        zero_count=int(counts[:zeros].sum()),
        zero_threshold=float(edges[zeros - 1]),
        positive=Buckets(offset, tuple(buckets.tolist())),
        negative=Buckets(0, ()),
        min=low,
        max=high,
    )


def _exponential_index(log2: NDArray[np.float64], finest: int, max_size: int) -> tuple[int, NDArray[np.int64]]:
    """The largest scale up to `finest` at which the indices span at most max_size buckets, and the indices."""
    scale = finest
    index = np.floor(np.ldexp(log2, scale)).astype(np.int64)
    while index.size and index.max() - index.min() >= max_size:
        scale -= 1
        index >>= 1
    return scale, index


def opentelemetry_data_point(
    histogram: ExponentialHistogram,
    *,
    time_unix_nano: int,
    start_time_unix_nano: int = 0,
    attributes: Mapping[str, Any] | None = None,
) -> ExponentialHistogramDataPoint:
    """The histogram as a data point of opentelemetry-sdk, for a metric exporter. The class has no zero threshold.

    Raises:
        ImportError: without opentelemetry-sdk, the extra `export`.
    """
    try:
        from opentelemetry.sdk.metrics import export as sdk
    except ImportError as error:
        raise ImportError("opentelemetry_data_point needs opentelemetry-sdk: pip install 'xentile[export]'") from error
    return sdk.ExponentialHistogramDataPoint(
        attributes=dict(attributes or {}),
        start_time_unix_nano=start_time_unix_nano,
        time_unix_nano=time_unix_nano,
        count=histogram.count,
        sum=histogram.sum,
        scale=histogram.scale,
        zero_count=histogram.zero_count,
        positive=sdk.Buckets(histogram.positive.offset, histogram.positive.bucket_counts),
        negative=sdk.Buckets(histogram.negative.offset, histogram.negative.bucket_counts),
        flags=0,
        min=histogram.min,
        max=histogram.max,
    )
