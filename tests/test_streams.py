"""Streams: the window is exact, decay is what its formula says, and a step does nothing that a CUDA graph forbids."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import TYPE_CHECKING

import pytest
import torch
from distributions import DISTRIBUTIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import xentile as xt
from xentile import _layout as layout
from xentile.reference import column_of
from xentile.streams import DecayedSketch, Stream, WindowedSketch

if TYPE_CHECKING:
    from collections.abc import Iterator

UNIT = 2**20
STREAMS = {"window": lambda **o: WindowedSketch(3, **o), "decay": lambda **o: DecayedSketch(2.5, **o)}


def steps_of(count: int, size: int = 50) -> Iterator[torch.Tensor]:
    """Steps of uneven size, some empty, with the distribution changing from one to the next, and special values."""
    names = itertools.cycle(DISTRIBUTIONS)
    special = torch.tensor([torch.inf, torch.nan, -1.0, 300.0, 0.0])
    for step, name in zip(range(count), names, strict=False):
        values = DISTRIBUTIONS[name](1 + step * 7 % size)
        yield torch.cat([values, special[step % 5 : step % 5 + 1]]) if step % 4 else values[:0]


def sketch_of(values: torch.Tensor, **options: int) -> xt.LossSketch:
    sketch = xt.LossSketch(values.device, **options)
    sketch.update(values)
    return sketch


def faded(steps: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Columns of a sketch of the steps with their decayed weights, float64: bins in values, sums as they are."""
    total = torch.zeros(layout.DEFAULT.width, dtype=torch.float64)
    for values in steps:
        total = total * decay + sketch_of(values).state[0].double()
    return total


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("precision", [5, 7])
def test_a_window_is_the_sketch_of_its_last_steps_to_the_bit(window: int, precision: int, device: torch.device) -> None:
    stream = WindowedSketch(window, device, precision=precision)
    past: list[torch.Tensor] = []
    for values in steps_of(11):
        past.append(values.to(device))
        stream.update(past[-1])
        assert torch.equal(stream.state, sketch_of(torch.cat(past[-window:]), precision=precision).state)


@given(st.lists(st.lists(st.floats(0, 400, width=32), max_size=5), max_size=12), st.integers(1, 6))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_window_of_any_steps_is_the_sketch_of_the_last(steps: list[list[float]], window: int) -> None:
    stream = WindowedSketch(window)
    for values in steps:
        stream.update(torch.tensor(values))
    last = torch.tensor([value for values in steps[-window:] for value in values])
    assert torch.equal(stream.state, sketch_of(last).state)


def test_a_window_forgets_an_extreme_that_falls_out() -> None:
    stream = WindowedSketch(2)
    for value in (100.0, 1.0, 2.0):
        stream.update(torch.tensor([value]))
    assert stream.max() == 2.0
    assert stream.quantile([0.0, 1.0]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("halflife", [0.5, 3.0, 40.0])
def test_decay_loses_less_than_the_stated_weight(halflife: float, device: torch.device) -> None:
    stream, past = DecayedSketch(halflife, device), []
    for values in steps_of(60):
        past.append(values)
        stream.update(values.to(device))
    exact, state = faded(past, stream.decay) * UNIT, stream.state[0].cpu().double()
    buckets = [layout.ZERO, layout.OVERFLOW, layout.INF, layout.NAN, *range(layout.SPECIAL, layout.DEFAULT.width)]
    lost = (exact - state)[buckets]
    assert bool((lost >= -1e-15 * exact[buckets]).all())
    assert bool((lost < 1 / (1 - stream.decay)).all())
    assert float(lost.max()) > 0.1  # the bound is not idle


def test_a_decayed_mean_is_the_weighted_mean() -> None:
    stream, past = DecayedSketch(3), [torch.rand(200) * 1e-4 + 2.0**-20 for _ in range(40)]  # a small sum must survive
    for values in past:
        stream.update(values)
    weights = torch.cat([torch.full((200,), stream.decay ** (39 - i), dtype=torch.float64) for i in range(40)])
    values = torch.cat(past).double()
    mean = (weights * values).sum() / weights.sum()
    spread = ((weights * (values - mean) ** 2).sum() / weights.sum()).sqrt()
    assert float(stream.mean()) == pytest.approx(float(mean), rel=1e-11)
    assert float(stream.std()) == pytest.approx(float(spread), rel=1e-9)


@pytest.mark.parametrize("q", [0.01, 0.5, 0.9, 0.99])
def test_a_decayed_quantile_is_a_weighted_quantile(q: float) -> None:
    stream, past = DecayedSketch(4), [DISTRIBUTIONS["pretraining"](500) * (1 + 0.05 * i) for i in range(30)]
    for values in past:
        stream.update(values)
    values, order = torch.cat(past).sort()
    weights = torch.cat([torch.full((500,), stream.decay ** (29 - i), dtype=torch.float64) for i in range(30)])[order]
    below = weights.cumsum(0) / weights.sum()
    exact = values[torch.searchsorted(below, q)]
    assert float(stream.quantile(q)) == pytest.approx(float(exact), rel=2.0**-7 + 1e-3)  # neighbours are 1e-3 apart


def test_twenty_halflives_leave_nothing_of_one_value() -> None:
    stream = DecayedSketch(2)
    stream.update(torch.tensor([3.0]))
    for _ in range(36):
        stream.step()
    assert stream.count() > 0
    assert stream.max() == stream.min() == 3.0
    assert float(stream.mean()) == pytest.approx(3.0, rel=1e-6)  # the bin has lost several per cent of its weight
    for _ in range(5):
        stream.step()
    assert stream.count() == 0
    assert stream.effective_count() == 0
    for value in (stream.mean(), stream.std(), stream.max(), stream.quantile(0.5)):
        assert value.isnan()


def test_a_forgotten_extreme_leaves_the_end_of_its_bin_at_most() -> None:
    stream = DecayedSketch(0.5)
    for value in (100.0, 0.001, *([1.0] * 12)):
        stream.update(torch.tensor([value]))
    assert 1.0 <= stream.max() < 1.0 + 2.0**-7
    assert stream.min() == 1.0  # the lower edge of the bin of 1
    assert stream.count() == pytest.approx(4 / 3, rel=1e-5)


@pytest.mark.parametrize("value", [0.0, -2.0, 1e-20, 2.0**-24, 1.0, 255.99, 256.0, 3e38, torch.inf])
def test_extremes_are_exact_while_their_value_has_weight(value: float) -> None:
    stream = DecayedSketch(5)
    for _ in range(3):
        stream.update(torch.tensor([value]))
    expected = sketch_of(torch.tensor([value])).state
    assert torch.equal(stream.state[:, layout.EXTREMES], expected[:, layout.EXTREMES])
    assert stream.min() == stream.max() == torch.tensor(value)


def test_the_ends_of_buckets_are_in_their_buckets() -> None:
    for precision in (1, 7, 8):
        stream = DecayedSketch(1, precision=precision)
        keys = stream._ends
        largest, smallest = keys[:, 0] - 2**31 - 1, 2**31 - keys[:, 1]
        buckets = (keys[:, 0] > 0).nonzero()[:, 0]
        for order in (largest[buckets], smallest[buckets]):
            values = torch.where(order >= 0, order, order ^ 0x7FFFFFFF).int().view(torch.float32)
            assert torch.equal(column_of(values, stream.layout), buckets)
        assert len(buckets) == stream.layout.bins + 3


def test_effective_count_is_the_kish_formula(device: torch.device) -> None:
    stream, sizes = DecayedSketch(3, device), [5, 0, 17, 2, 9]
    for size in sizes:
        stream.update(torch.rand(size, device=device))
    weights = torch.cat([torch.full((n,), stream.decay**age) for age, n in enumerate(reversed(sizes))]).double()
    assert float(stream.effective_count()) == pytest.approx(float(weights.sum() ** 2 / (weights**2).sum()), rel=1e-6)


def test_effective_count_reaches_its_limit() -> None:
    stream = DecayedSketch(2)
    for _ in range(80):
        stream.update(torch.rand(10))
    limit = 10 * (1 + stream.decay) / (1 - stream.decay)
    assert float(stream.effective_count()) == pytest.approx(limit, rel=1e-10)


def test_decay_has_the_same_bits_each_time() -> None:
    def run() -> torch.Tensor:
        stream = DecayedSketch(7)
        for values in steps_of(30):
            stream.update(values)
        return stream.state

    assert torch.equal(run(), run())


@pytest.mark.parametrize("kind", STREAMS)
def test_groups_equal_separate_streams(kind: str, device: torch.device) -> None:
    stream = STREAMS[kind](device=device, groups=3)
    alone = [STREAMS[kind](device=device) for _ in range(3)]
    for values in steps_of(9):
        values, ids = values.to(device), torch.arange(len(values), device=device) % 2  # group 2 stays empty
        stream.update(values, group_ids=ids)
        for group in range(3):
            alone[group].update(values[ids == group])
    assert torch.equal(stream.state, torch.cat([one.state for one in alone]))
    assert stream.quantile([0.1, 0.9]).shape == (3, 2)
    if isinstance(stream, DecayedSketch):
        assert stream.effective_count().tolist() == [float(one.effective_count()) for one in alone]


@pytest.mark.parametrize("kind", STREAMS)
def test_micro_batches_of_one_step_are_one_step(kind: str) -> None:
    whole, parts = STREAMS[kind](), STREAMS[kind]()
    for values in steps_of(7):
        whole.update(values)
        for part in values.split(11):
            parts.current.update(part)
        parts.step()
    assert torch.equal(whole.state, parts.state)


@pytest.mark.parametrize("kind", STREAMS)
def test_mask_leaves_values_out(kind: str) -> None:
    masked, without = STREAMS[kind](), STREAMS[kind]()
    values, mask = torch.rand(40), torch.rand(40) < 0.5
    masked.update(values, mask)
    without.update(values[mask])
    assert torch.equal(masked.state, without.state)


def test_cross_entropy_feeds_the_running_step() -> None:
    stream, last = WindowedSketch(2), []
    for _ in range(4):
        logits, target = torch.randn(30, 11, requires_grad=True), torch.randint(0, 11, (30,))
        target[0] = -100
        out = xt.cross_entropy(logits, target, sketch=stream.current)
        out.loss.backward()
        stream.step()
        last.append(out.token_loss.detach()[1:])
    expected = sketch_of(torch.cat(last[-2:]))
    assert stream.ignored_count() == 2
    assert stream.count() == 58
    assert torch.equal(stream.quantile([0.1, 0.5, 1.0]), expected.quantile([0.1, 0.5, 1.0]))


def test_ignored_tokens_decay_as_the_others() -> None:
    stream = DecayedSketch(1)
    for _ in range(2):
        xt.cross_entropy(torch.randn(4, 5), torch.tensor([-100, 1, -100, 2]), sketch=stream.current)
        stream.step()
    assert stream.ignored_count() == 3.0
    assert stream.count() == 3.0
    assert stream.out_of_range_count() == 0.0


@pytest.mark.parametrize("kind", STREAMS)
def test_recomputation_does_not_count_a_step_twice(kind: str) -> None:
    stream, once = STREAMS[kind](), STREAMS[kind]()

    def block(x: torch.Tensor) -> torch.Tensor:
        stream.update(x * x)
        return (x * x).sum()

    x = torch.rand(20, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).backward()
    once.update(x.detach() ** 2)
    assert torch.equal(stream.state, once.state)


@pytest.mark.parametrize("kind", STREAMS)
def test_every_buffer_keeps_its_memory(kind: str) -> None:
    stream = STREAMS[kind]()
    before = {name: buffer.data_ptr() for name, buffer in stream._buffers().items()}
    for values in steps_of(5):
        stream.update(values)
    stream.load_state_dict(stream.state_dict())
    stream.reset()
    assert before == {name: buffer.data_ptr() for name, buffer in stream._buffers().items()}
    assert not any(bool(buffer.any()) for buffer in stream._buffers().values())


@pytest.mark.parametrize("kind", STREAMS)
def test_a_step_reads_no_value_on_the_host(kind: str) -> None:
    """Under FakeTensorMode any read of a value raises; on a GPU it would wait, or break a graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        stream = STREAMS[kind](groups=2)
        for _ in range(2):
            stream.step()
    assert stream.state.shape == (2, layout.DEFAULT.width)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_loaded_stream_goes_on_as_the_saved_one(kind: str, tmp_path: object) -> None:
    stream, loaded = STREAMS[kind](groups=2), STREAMS[kind](groups=2)
    for values in steps_of(5):
        stream.update(values)
    stream.current.update(torch.tensor([7.0]))  # in the middle of a step
    torch.save(stream.state_dict(), f"{tmp_path}/stream.pt")
    loaded.load_state_dict(torch.load(f"{tmp_path}/stream.pt", weights_only=True))
    others = [loaded, copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))]
    for one in (stream, *others):
        for values in steps_of(4):
            one.current.update(values)
            one.step()
    for one in others:
        assert all(torch.equal(b, one._buffers()[name]) for name, b in stream._buffers().items())


@pytest.mark.parametrize("other", [WindowedSketch(4), WindowedSketch(3, groups=2), WindowedSketch(3, precision=6)])
def test_load_state_dict_refuses_another_kind_of_window(other: Stream) -> None:
    with pytest.raises(ValueError, match=r"must h(old|ave) (window=3|shape .*), got"):
        WindowedSketch(3).load_state_dict(other.state_dict())


def test_load_state_dict_refuses_another_halflife_and_another_stream() -> None:
    with pytest.raises(ValueError, match=r"state_dict must hold halflife=3.0, got 2.0"):
        DecayedSketch(3).load_state_dict(DecayedSketch(2).state_dict())
    with pytest.raises(ValueError, match=r"state_dict must have the keys \[.*'window'\], got \[.*'weight_sums'\]"):
        WindowedSketch(3).load_state_dict(DecayedSketch(2).state_dict())


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_no_step_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window must be at least 1, got {window}"):
        WindowedSketch(window)


@pytest.mark.parametrize("halflife", [0, -1.0, float("inf"), float("nan")])
def test_a_halflife_that_is_not_positive_is_refused(halflife: float) -> None:
    with pytest.raises(ValueError, match="halflife must be finite and greater than 0, got"):
        DecayedSketch(halflife)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_coarser_sketch_in_the_running_step_is_refused(kind: str) -> None:
    stream = STREAMS[kind]()
    stream.current.merge(xt.LossSketch(precision=5))
    with pytest.raises(ValueError, match="current must keep its precision of 7: a sketch of precision 5 was merged"):
        stream.step()


def test_repr_and_summary_are_readable() -> None:
    stream = DecayedSketch(2, groups=1, precision=6)
    stream.update(torch.tensor([1.0, 2.0]))
    assert repr(stream) == "DecayedSketch(halflife=2.0, groups=1, precision=6, device='cpu')"
    assert repr(WindowedSketch(5)) == "WindowedSketch(window=5, groups=1, precision=7, device='cpu')"
    assert stream.summary().splitlines()[1].split()[0] == "2.0"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", STREAMS)
def test_a_captured_step_replays_as_eager(kind: str) -> None:
    captured, eager = STREAMS[kind](device="cuda"), STREAMS[kind](device="cuda")
    values = torch.rand(1000, device="cuda")
    captured.update(values)  # compiles outside of the capture
    captured.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.update(values)
    captured.reset()
    for step in range(10):
        values.copy_(torch.rand(1000) * step)
        graph.replay()
        eager.update(values)
    assert torch.equal(captured.state, eager.state)
