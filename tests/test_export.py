"""A sketch in the formats of others: no count is lost, and quantiles read there keep the promised error."""

from __future__ import annotations

import ast
import json
import math
import pathlib
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from distributions import DISTRIBUTIONS

import xentile as xt
from xentile import _layout as layout
from xentile import export

if TYPE_CHECKING:
    from collections.abc import Callable

SPREAD = torch.exp(torch.linspace(math.log(2.0**-23.9), math.log(255.0), 5000))  # in all octaves
Q = np.linspace(0, 1, 101)


def sketch_of(values: torch.Tensor, **options: Any) -> xt.LossSketch:
    sketch = xt.LossSketch(**options)
    sketch.update(values)
    return sketch


def order_statistics(values: torch.Tensor) -> np.ndarray:
    return np.quantile(values.double().numpy(), Q, method="lower")


def read_quantiles(counts: np.ndarray, estimates: np.ndarray) -> np.ndarray:
    """What a reader of a histogram estimates for order_statistics: the value that stands for the bin of that rank."""
    ranks = np.floor(Q * (counts.sum() - 1))
    return estimates[np.searchsorted(np.cumsum(counts), ranks, side="right")]


# --------------------------------------------------------------------------------------------------------------------
# histograms with edges


@pytest.mark.parametrize("max_bins", [3, 7, 64, 512, 10_000])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_numpy_histogram_counts_what_numpy_counts_between_its_edges(name: str, max_bins: int) -> None:
    values = torch.cat([DISTRIBUTIONS[name](2000), torch.tensor([0.0, 1e-9, 300.0])])
    for part in (values, values[:-1], values[:-3]):
        counts, edges = export.numpy_histogram(sketch_of(part), max_bins=max_bins)
        assert len(counts) <= max_bins
        assert bool((np.diff(edges) > 0).all())
        assert counts.tolist() == np.histogram(part.double().numpy(), edges)[0].tolist()
        assert counts.dtype == np.int64
        assert counts.sum() == len(part)


def test_bins_are_no_coarser_than_they_must_be() -> None:
    for max_bins, width in ((5000, 2.0**-7), (512, 2.0**-4), (300, 2.0**-3), (32, 1.0)):
        counts, edges = export.numpy_histogram(sketch_of(SPREAD), max_bins=max_bins)
        assert max_bins / 2 < len(counts) <= max_bins
        assert (edges[1:] / edges[:-1]).max() == 1 + width


def test_wandb_gets_at_most_512_bins() -> None:
    counts, edges = export.wandb_histogram(sketch_of(torch.cat([SPREAD, torch.tensor([0.0, 1e6])]), precision=10))
    assert len(counts) <= 512
    assert len(edges) == len(counts) + 1
    assert counts.sum() == len(SPREAD) + 2


def test_what_is_no_finite_loss_is_left_out() -> None:
    values = torch.tensor([1.0, 2.0])
    rest = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected, got = (export.numpy_histogram(sketch_of(v)) for v in (values, torch.cat([values, rest])))
    assert [a.tolist() for a in expected] == [a.tolist() for a in got]
    assert export.exponential_histogram(sketch_of(torch.cat([values, rest]))).count == 2


@pytest.mark.parametrize("values", [[], [torch.nan, torch.inf]])
def test_nothing_to_show_is_an_empty_bin(values: list[float]) -> None:
    sketch = sketch_of(torch.tensor(values))
    counts, edges = export.numpy_histogram(sketch)
    assert (counts.tolist(), edges.tolist()) == ([0], [0.0, 1.0])
    assert export.tensorboard_histogram(sketch)["num"] == 0
    assert export.exponential_histogram(sketch).positive == export.Buckets(0, ())


def test_negative_losses_are_within_the_first_bin() -> None:
    counts, edges = export.numpy_histogram(sketch_of(torch.tensor([-5.0, 0.0, 1.0])))
    assert edges[0] == -5
    assert counts[0] == 2


def test_weights_become_float_counts() -> None:
    sketch = xt.LossSketch(weighted=True)
    sketch.update(torch.tensor([1.0, 2.0]), weights=torch.tensor([0.5, 0.25]))
    counts, _ = export.numpy_histogram(sketch)
    assert counts[[0, -1]].tolist() == [0.5, 0.25]


def test_tensorboard_takes_the_arguments_by_their_names() -> None:
    source = pathlib.Path(torch.__file__).parent / "utils/tensorboard/writer.py"  # import needs tensorboard itself
    function = next(n for n in ast.walk(ast.parse(source.read_text())) if getattr(n, "name", "") == "add_histogram_raw")
    names = {argument.arg for argument in function.args.args} - {"self", "tag", "global_step", "walltime"}
    assert names == set(export.tensorboard_histogram(sketch_of(SPREAD)))


def test_tensorboard_gets_moments_and_right_edges() -> None:
    values = DISTRIBUTIONS["pretraining"](1000)
    raw = export.tensorboard_histogram(sketch_of(values), max_bins=30)
    exact = values.double()
    assert (raw["min"], raw["max"], raw["num"]) == (exact.min(), exact.max(), 1000)
    assert raw["sum"] == pytest.approx(float(exact.sum()), rel=1e-14)
    assert raw["sum_squares"] == pytest.approx(float((exact**2).sum()), rel=1e-12)
    assert len(raw["bucket_limits"]) == len(raw["bucket_counts"]) <= 30
    assert raw["bucket_limits"][-1] > raw["max"]
    json.dumps(raw)  # plain Python numbers, all finite


def test_an_infinite_loss_leaves_the_other_numbers_finite() -> None:
    raw = export.tensorboard_histogram(sketch_of(torch.tensor([1.0, torch.inf])))
    assert (raw["sum"], raw["num"], raw["max"]) == (1.0, 1, 1 + 2.0**-7)


# --------------------------------------------------------------------------------------------------------------------
# OpenTelemetry


@pytest.mark.parametrize("max_size", [2, 20, 160, 5000])
@pytest.mark.parametrize("name", [*DISTRIBUTIONS, "spread"])
def test_exponential_buckets_keep_the_promised_error(name: str, max_size: int) -> None:
    values = SPREAD if name == "spread" else DISTRIBUTIONS[name](2000)
    h = export.exponential_histogram(sketch_of(values), max_size=max_size)
    assert len(h.positive.bucket_counts) <= max_size
    assert h.count == len(values) == h.zero_count + sum(h.positive.bucket_counts)
    base = 2.0 ** (2.0**-h.scale)
    index = h.positive.offset + np.arange(len(h.positive.bucket_counts))
    middles = 2 * base**index * base / (1 + base)
    estimates = read_quantiles(np.array([h.zero_count, *h.positive.bucket_counts]), np.array([0.0, *middles]))
    exact = order_statistics(values)
    promised = np.maximum(((base - 1) / (base + 1) + 2.0**-7) * exact, h.zero_threshold)
    assert bool((abs(estimates - exact) <= promised).all())


def test_fewer_octaves_give_a_finer_scale() -> None:
    sketch = sketch_of(SPREAD)
    assert export.exponential_histogram(sketch).scale == 2
    assert export.exponential_histogram(sketch, zero_threshold=2.0**-2).scale == 4
    assert export.exponential_histogram(sketch, max_size=10_000).scale == 7


def test_the_zero_threshold_is_that_of_the_counts() -> None:
    values = torch.tensor([0.001, 0.01, 0.1, 1.0])
    h = export.exponential_histogram(sketch_of(values), zero_threshold=0.05)
    assert h.zero_count == 2
    assert 0.01 < h.zero_threshold <= 0.05


def test_losses_above_the_bins_are_counted_at_256() -> None:
    h = export.exponential_histogram(sketch_of(torch.tensor([255.0, 1000.0])), max_size=1000)
    assert h.positive.bucket_counts[-1] == 1
    assert h.max == 1000.0


def test_opentelemetry_sdk_takes_the_data_point() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.metrics.export")
    h = export.exponential_histogram(sketch_of(SPREAD))
    point = export.opentelemetry_data_point(h, time_unix_nano=2, start_time_unix_nano=1, attributes={"split": "train"})
    assert isinstance(point, sdk.ExponentialHistogramDataPoint)
    values = json.loads(point.to_json())
    assert values["positive"] == {"offset": h.positive.offset, "bucket_counts": list(h.positive.bucket_counts)}
    assert (values["count"], values["scale"], values["attributes"]) == (len(SPREAD), 2, {"split": "train"})


def test_a_missing_opentelemetry_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.metrics", None)
    h = export.exponential_histogram(sketch_of(SPREAD))
    with pytest.raises(ImportError, match=r"xentile\[export\]"):
        export.opentelemetry_data_point(h, time_unix_nano=0)


# --------------------------------------------------------------------------------------------------------------------
# DDSketch


@pytest.mark.parametrize("reader", export.ddsketch.READERS)
@pytest.mark.parametrize("precision", layout.PRECISIONS)
def test_ddsketch_round_trip_keeps_every_count(precision: int, reader: str) -> None:
    values = torch.cat([SPREAD, torch.tensor([0.0, 1e-9, 256.0, 1e9])])
    sketch = sketch_of(values, precision=precision)
    back = export.from_ddsketch(export.to_ddsketch(sketch, reader=reader))
    columns = [layout.ZERO, layout.OVERFLOW, *range(layout.SPECIAL, sketch.layout.width)]
    assert torch.equal(back.state[:, columns], sketch.state[:, columns])
    assert back.count() == len(values)


def test_what_a_ddsketch_has_no_room_for_comes_from_the_bins() -> None:
    values = DISTRIBUTIONS["pretraining"](3000)
    sketch = sketch_of(values)
    back = export.from_ddsketch(export.to_ddsketch(sketch))
    assert back.min() <= sketch.min() <= back.min() * (1 + 2**-7)
    assert back.max() * (1 - 2**-7) <= sketch.max() <= back.max()
    assert back.mean().item() == pytest.approx(sketch.mean().item(), rel=2**-8)
    assert back.std().item() == pytest.approx(sketch.std().item(), rel=2**-7)
    assert back.quantile(0.5) == sketch.quantile(0.5)


def test_an_infinite_loss_comes_back_above_the_bins() -> None:
    back = export.from_ddsketch(export.to_ddsketch(sketch_of(torch.tensor([1.0, 300.0, torch.inf]))))
    assert back.count() == 3
    assert back.state[0, layout.OVERFLOW] == 2
    assert back.inf_count() == 0


def test_an_empty_sketch_makes_the_round_trip() -> None:
    assert export.from_ddsketch(export.to_ddsketch(xt.LossSketch())) == xt.LossSketch()


def test_weights_make_the_round_trip() -> None:
    sketch = xt.LossSketch(weighted=True)
    sketch.update(torch.tensor([1.0, 2.0]), weights=torch.tensor([0.3, 0.25]))
    data = export.to_ddsketch(sketch)
    assert export.from_ddsketch(data, weighted=True).count() == sketch.count()
    with pytest.raises(ValueError, match="integer counts unless weighted=True"):
        export.from_ddsketch(data)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_ddsketch_package_reads_every_quantile_within_half_a_bin(name: str) -> None:
    proto = pytest.importorskip("ddsketch.pb.proto")
    values = DISTRIBUTIONS[name](2000)
    message = proto.pb.DDSketch.FromString(export.to_ddsketch(sketch_of(values)))
    theirs = proto.DDSketchProto.from_proto(message)
    assert theirs.count == len(values)
    for q, exact in zip(Q, order_statistics(values), strict=True):
        error = abs(theirs.get_quantile_value(q) - exact)
        assert error <= max(2.0**-8 * exact, 2.0**-24)


def their_sketch(values: torch.Tensor, mapping: Callable[[Any], Any]) -> bytes:
    """A DDSketch that counted the values itself."""
    ddsketch = pytest.importorskip("ddsketch")
    proto = pytest.importorskip("ddsketch.pb.proto")
    store = sys.modules["ddsketch.store"].DenseStore
    theirs = ddsketch.ddsketch.BaseDDSketch(mapping(sys.modules["ddsketch.mapping"]), store(), store(), 0.0)
    for value in values.tolist():
        theirs.add(value)
    return proto.DDSketchProto.to_proto(theirs).SerializeToString()


def test_a_ddsketch_with_these_bins_that_counted_by_itself_is_the_same_sketch() -> None:
    values = DISTRIBUTIONS["pretraining"](2000)  # none of them on an edge, where DDSketch takes the bin below
    gamma = math.exp(2.0**-7)
    data = their_sketch(values, lambda m: m.LinearlyInterpolatedMapping.from_gamma_offset(gamma, 0.0))
    assert torch.equal(
        export.from_ddsketch(data).state[:, layout.SPECIAL :], sketch_of(values).state[:, layout.SPECIAL :]
    )
    shifted = their_sketch(values, lambda m: m.LinearlyInterpolatedMapping.from_gamma_offset(gamma, 40.0))
    assert export.from_ddsketch(shifted) == export.from_ddsketch(data)


def test_go_and_java_index_the_same_bins() -> None:
    """Their index of x = 2**e * (1 + s): floor((e + s) / log2(gamma) + indexOffset)."""
    sketch = sketch_of(SPREAD)
    message = export.protobuf.decode(export.to_ddsketch(sketch, reader="go"))
    mantissa, exponent = np.frexp(SPREAD.double().numpy())
    index = np.floor((exponent - 1 + 2 * mantissa - 1) / math.log2(message.gamma) + message.index_offset)
    assert message.positive.counts == dict(zip(*np.unique(index, return_counts=True), strict=True))


def test_a_sparse_message_is_read_too() -> None:
    proto = pytest.importorskip("ddsketch.pb.proto")
    message = proto.pb.DDSketch.FromString(export.to_ddsketch(sketch_of(torch.tensor([1.0, 1.0, 2.0]))))
    first = message.positiveValues.contiguousBinIndexOffset
    message.positiveValues.binCounts[first] = 5
    message.positiveValues.binCounts[-40] = 1
    back = export.from_ddsketch(message.SerializeToString())
    counts = back.state[0, layout.SPECIAL :]
    assert counts[counts > 0].tolist() == [1, 7, 1]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (lambda m: m.LogarithmicMapping(0.01), r"linearly interpolated mapping .* got gamma=1\.02"),
        (lambda m: m.LinearlyInterpolatedMapping(0.01), r"linearly interpolated mapping .* interpolation=1"),
    ],
)
def test_a_ddsketch_with_other_bins_is_refused(mapping: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export.from_ddsketch(their_sketch(torch.tensor([1.0]), mapping))


def test_a_ddsketch_of_more_than_a_sketch_can_add_up_is_refused() -> None:
    proto = pytest.importorskip("ddsketch.pb.proto")
    message = proto.pb.DDSketch.FromString(export.to_ddsketch(sketch_of(torch.tensor([1.0]))))
    message.positiveValues.binCounts[message.positiveValues.contiguousBinIndexOffset] = 2.0**43
    with pytest.raises(ValueError, match=r"sum of values below 2\*\*43, got about 8\.8"):
        export.from_ddsketch(message.SerializeToString())


def test_a_ddsketch_with_negative_values_is_refused() -> None:
    data = their_sketch(
        torch.tensor([-1.0]), lambda m: m.LinearlyInterpolatedMapping.from_gamma_offset(math.exp(1 / 128), 0)
    )
    with pytest.raises(ValueError, match="no negative values"):
        export.from_ddsketch(data)


def test_damaged_bytes_give_a_value_error_or_a_sketch_and_nothing_else() -> None:
    data = export.to_ddsketch(sketch_of(torch.tensor([0.0, 1.0, 1.25])))
    refused = 0
    for size in range(len(data)):
        for damaged in (data[:size], data[:size] + bytes([data[size] ^ 0xFF]) + data[size + 1 :]):
            try:
                export.from_ddsketch(damaged)
            except ValueError:
                refused += 1
    assert refused > len(data) / 2


# --------------------------------------------------------------------------------------------------------------------
# arguments


FUNCTIONS = [export.numpy_histogram, export.wandb_histogram, export.tensorboard_histogram]
FUNCTIONS += [export.exponential_histogram, export.to_ddsketch]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_format_holds_the_group_that_was_chosen(function: Callable[..., Any]) -> None:
    values = DISTRIBUTIONS["pretraining"](300)
    sketch = xt.LossSketch(groups=3)
    sketch.update(values, group_ids=torch.arange(300) % 3)
    expected = function(sketch_of(values[1::3]))
    assert str(function(sketch, group=1)) == str(expected)
    with pytest.raises(ValueError, match="group must be chosen for a sketch of 3 groups, got None"):
        function(sketch)
    with pytest.raises(ValueError, match=r"group must be in \[0, 3\), got 3"):
        function(sketch, group=3)


def test_wrong_arguments_are_named() -> None:
    sketch = sketch_of(SPREAD)
    with pytest.raises(TypeError, match="sketch must be a Readout, got Tensor"):
        export.numpy_histogram(SPREAD)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_bins must be at least 3, got 2"):
        export.numpy_histogram(sketch, max_bins=2)
    with pytest.raises(ValueError, match="max_size must be at least 2, got 1"):
        export.exponential_histogram(sketch, max_size=1)
    with pytest.raises(ValueError, match="zero_threshold must be in"):
        export.exponential_histogram(sketch, zero_threshold=0.0)
    with pytest.raises(ValueError, match="sketch must count values, not weights"):
        export.exponential_histogram(xt.LossSketch(weighted=True))
    with pytest.raises(ValueError, match="rust is not a valid value for reader"):
        export.to_ddsketch(sketch, reader="rust")
