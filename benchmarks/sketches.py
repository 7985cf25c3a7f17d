"""The quantile sketches that `characterize` compares: how to fill, read and weigh each, and what it promises."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

import xentile as xt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Values = np.ndarray[Any, np.dtype[np.float32]]

TICK = 2.0**-24  # HdrHistogram counts integers: nats in units of this


class Contender(NamedTuple):
    """A sketch with its parameters; `promise` is its largest relative error, None if it promises none."""

    name: str
    package: str
    promise: float | None
    remark: str
    prepare: Callable[[Values], Any]
    """What `count` takes, made of float32 values outside the timing."""
    count: Callable[[Any], Any]
    """A sketch of all values."""
    quantiles: Callable[[Any, Sequence[float]], list[float]]
    size: Callable[[Any], int]
    """Bytes of its state, as far as it can be asked."""


def contenders() -> tuple[list[Contender], dict[str, str]]:
    """Those whose package is installed, and the reasons why the others are missing."""
    found, missing = [_ours(precision) for precision in (5, 7, 10)], {}
    for package, module, make in PEERS:
        try:
            version = importlib.metadata.version(package)
            found += [c._replace(package=f"{package} {version}") for c in make(importlib.import_module(module))]
        except ImportError as error:
            missing[package] = f"{type(error).__name__}: {error}"
    return found, missing


def _ours(precision: int) -> Contender:
    def count(values: torch.Tensor) -> xt.LossSketch:
        sketch = xt.LossSketch(precision=precision)
        sketch.update(values)
        return sketch

    return Contender(
        f"xentile m={precision}",
        f"xentile {xt.__version__}",
        2.0**-precision,
        "",
        torch.from_numpy,
        count,
        lambda sketch, q: sketch.quantile(q).double().tolist(),
        lambda sketch: sketch.state.nbytes,
    )


def _ddsketch(module: Any) -> list[Contender]:
    def count(values: list[float]) -> Any:
        sketch = module.DDSketch(0.01)
        for value in values:
            sketch.add(value)
        return sketch

    def size(sketch: Any) -> int:
        return 8 * (len(sketch._store.bins) + len(sketch._negative_store.bins))

    def quantiles(sketch: Any, q: Sequence[float]) -> list[float]:
        return [float(sketch.get_quantile_value(p)) for p in q]

    return [Contender("DDSketch 1 %", "", 0.01, "", lambda v: v.tolist(), count, quantiles, size)]


def _hdrhistogram(module: Any) -> list[Contender]:
    def prepare(values: Values) -> list[int]:
        return np.rint(np.clip(values.astype(np.float64), 0, 255.999) / TICK).astype(np.int64).tolist()

    def count(values: list[int]) -> Any:
        sketch = module.HdrHistogram(1, 2**32, 2)
        for value in values:
            sketch.record_value(value)
        return sketch

    def quantiles(sketch: Any, q: Sequence[float]) -> list[float]:
        return [sketch.get_value_at_percentile(100 * p) * TICK for p in q]

    def size(sketch: Any) -> int:
        return int(sketch.counts_len * sketch.word_size)

    return [Contender("HdrHistogram 2 digits", "", 0.01, "", prepare, count, quantiles, size)]


def _datasketches(module: Any) -> list[Contender]:
    def filled(make: Callable[[], Any]) -> Callable[[Values], Any]:
        def count(values: Values) -> Any:
            sketch = make()
            sketch.update(values)
            return sketch

        return count

    def quantiles(sketch: Any, q: Sequence[float]) -> list[float]:
        return [float(sketch.get_quantile(p)) for p in q]

    def size(sketch: Any) -> int:
        return len(sketch.serialize())

    def contender(name: str, remark: str, make: Callable[[], Any]) -> Contender:
        return Contender(name, "", None, remark, lambda v: v, filled(make), quantiles, size)

    def kll(k: int) -> Contender:
        rank_error = module.kll_floats_sketch(k).normalized_rank_error(False)
        return contender(f"KLL k={k}", f"rank {100 * rank_error:.2g} %", lambda: module.kll_floats_sketch(k))

    return [
        kll(200),
        kll(4096),
        contender("REQ k=12", "rank, high q", lambda: module.req_floats_sketch(12, True)),
        contender("t-digest 200 (datasketches)", "none", lambda: module.tdigest_float(200)),
    ]


def _crick(module: Any) -> list[Contender]:
    def count(values: Values) -> Any:
        sketch = module.TDigest(100)
        sketch.update(values)
        return sketch

    def quantiles(sketch: Any, q: Sequence[float]) -> list[float]:
        return [float(x) for x in sketch.quantile(np.asarray(q))]

    def size(sketch: Any) -> int:
        return int(sketch.centroids().nbytes)

    return [Contender("t-digest 100 (crick)", "", None, "none", _doubles, count, quantiles, size)]


def _fastdigest(module: Any) -> list[Contender]:
    def count(values: Values) -> Any:
        sketch = module.TDigest(100)
        sketch.batch_update(values)
        return sketch

    def quantiles(sketch: Any, q: Sequence[float]) -> list[float]:
        return [float(sketch.quantile(p)) for p in q]

    def size(sketch: Any) -> int:
        return len(sketch.to_bytes())

    return [Contender("t-digest 100 (fastdigest)", "", None, "none", _doubles, count, quantiles, size)]


def _doubles(values: Values) -> Any:
    return values.astype(np.float64)


PEERS: list[tuple[str, str, Callable[[Any], list[Contender]]]] = [
    ("ddsketch", "ddsketch", _ddsketch),
    ("hdrhistogram", "hdrh.histogram", _hdrhistogram),
    ("datasketches", "datasketches", _datasketches),
    ("crick", "crick", _crick),
    ("fastdigest", "fastdigest", _fastdigest),
]
"""Package, module, and its contenders given the module."""
