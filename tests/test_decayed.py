"""Exponential decay: what its formula says, less the weight that is stated."""

from __future__ import annotations

import pytest
import torch
from distributions import DISTRIBUTIONS
from steps import sketch_of, steps_of

import xentile as xt
from xentile import _layout as layout
from xentile.reference import column_of
from xentile.streams import DecayedSketch

UNIT = 2**20


def faded(steps: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Columns of a sketch of the steps with their decayed weights, float64: bins in values, sums as they are."""
    total = torch.zeros(layout.DEFAULT.width, dtype=torch.float64)
    for values in steps:
        total = total * decay + sketch_of(values).state[0].double()
    return total


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


def test_ignored_tokens_decay_as_the_others() -> None:
    stream = DecayedSketch(1)
    for _ in range(2):
        xt.cross_entropy(torch.randn(4, 5), torch.tensor([-100, 1, -100, 2]), sketch=stream.current)
        stream.step()
    assert stream.ignored_count() == 3.0
    assert stream.count() == 3.0
    assert stream.out_of_range_count() == 0.0


@pytest.mark.parametrize("halflife", [0, -1.0, float("inf"), float("nan")])
def test_a_halflife_that_is_not_positive_is_refused(halflife: float) -> None:
    with pytest.raises(ValueError, match="halflife must be finite and greater than 0, got"):
        DecayedSketch(halflife)


def test_whole_weights_decay_like_repeated_values() -> None:
    weighted, repeated = DecayedSketch(1.5, weighted=True), DecayedSketch(1.5)
    for values in steps_of(9):
        times = torch.arange(len(values)) % 4
        weighted.update(values, weights=times.float())
        repeated.update(values.repeat_interleave(times))
    buckets = [layout.ZERO, layout.OVERFLOW, layout.INF, layout.NAN, *range(layout.SPECIAL, layout.DEFAULT.width)]
    assert torch.equal(weighted.state[:, buckets], repeated.state[:, buckets])
    assert torch.equal(weighted.state[:, layout.EXTREMES], repeated.state[:, layout.EXTREMES])
    assert float(weighted.mean()) == pytest.approx(float(repeated.mean()), rel=1e-12)
    assert weighted.count() == repeated.count()


def test_a_weighted_decay_has_no_effective_count() -> None:
    with pytest.raises(ValueError, match="effective_count needs values without weights, got weighted=True"):
        DecayedSketch(2, weighted=True).effective_count()
