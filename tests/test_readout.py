"""Every other read-out of a sketch against NumPy on the same values, within the error it states."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from distributions import DISTRIBUTIONS
from hypothesis import given, settings
from hypothesis import strategies as st

import xentile as xt
from xentile import _layout as layout
from xentile import reference
from xentile._layout import PRECISIONS, Layout
from xentile.sketch import WEIGHT_UNIT

Q = [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]
BELOW = 2.0**-24  # values below it count as 0
HALF_A_BIN = 2.0**-8 + 1e-12  # reached where all values are edges
INSIDE = sorted(DISTRIBUTIONS.keys() - {"one value"})


def sketch_of(values: torch.Tensor, **options: int) -> xt.LossSketch:
    sketch = xt.LossSketch(values.device, **options)
    sketch.update(values)
    return sketch


def integral(values: np.ndarray, lo: float, hi: float) -> float:
    """The integral of the quantile function from lo to hi: values in order, the outer ones in part."""
    ordered = np.sort(values.astype(np.float64))
    n = len(ordered)
    upto = np.arange(1, n + 1)
    share = np.minimum(upto, hi * n) - np.maximum(upto - 1, lo * n)
    return float((np.clip(share, 0, None) * ordered).sum() / n)


# --------------------------------------------------------------------------------------------------------------------
# cdf


@pytest.mark.parametrize("name", INSIDE)
def test_cdf_at_edges_is_the_exact_share_of_the_values_below(name: str, device: torch.device) -> None:
    values = DISTRIBUTIONS[name](3000).to(device)
    edges = reference.bin_edges(device=device)[::7]
    edges = edges[(edges > values.min()) & (edges < values.max())]
    below = (values < edges[:, None]).double().mean(1)
    torch.testing.assert_close(sketch_of(values).cdf(edges), below, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_cdf_is_monotone_from_0_to_1(name: str) -> None:
    values = DISTRIBUTIONS[name](3000)
    share = sketch_of(values).cdf(torch.cat([torch.tensor([-1.0]), values.sort().values, torch.tensor([300.0])]))
    assert share[0] == 0
    assert share[-1] == 1
    assert bool((share.diff() >= 0).all())


@pytest.mark.parametrize("name", ["pretraining", "fine-tuned"])
def test_cdf_is_the_inverse_of_quantile(name: str, device: torch.device) -> None:
    sketch = sketch_of(DISTRIBUTIONS[name](20_000).to(device))
    q = torch.linspace(0.05, 0.95, 181, dtype=torch.float64, device=device)
    torch.testing.assert_close(sketch.cdf(sketch.quantile(q)), q, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_rank_of_a_quantile_is_that_of_its_bin_also_with_ties(name: str) -> None:
    values = DISTRIBUTIONS[name](1000)
    sketch, n = sketch_of(values), values.numel()
    lower, upper = sketch.quantile_bounds(Q)
    for q, low, high in zip(Q, lower.tolist(), upper.tolist(), strict=True):
        below = 0.0 if low == values.min() else float(sketch.cdf(math.nextafter(low, 0.0)))
        assert below - 1 / n <= q <= float(sketch.cdf(high)) + 1 / n


def test_cdf_counts_exact_zeros_at_zero() -> None:
    sketch = sketch_of(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert sketch.quantile(0.5) == 0
    assert sketch.cdf([-1.0, 0.0, 0.5]).tolist() == [0.0, 0.75, 0.75]


def test_cdf_leaves_infinite_losses_above_every_number() -> None:
    sketch = sketch_of(torch.tensor([1.0, torch.inf]))
    assert sketch.cdf([0.5, 2.0, 1e39, math.inf]).tolist() == [0.0, 0.5, 0.5, 1.0]


def test_cdf_has_the_shape_of_x_after_that_of_groups() -> None:
    sketch = xt.LossSketch(groups=3)
    sketch.update(torch.tensor([1.0, 2.0]), group_ids=torch.tensor([0, 2]))
    share = sketch.cdf(torch.tensor([[1.5, 1.5], [0.0, 3.0]]))
    assert share.shape == (3, 2, 2)
    assert share[0].tolist() == [[1.0, 1.0], [0.0, 1.0]]
    assert bool(share[1].isnan().all())
    assert share[2].tolist() == [[0.0, 0.0], [0.0, 1.0]]


# --------------------------------------------------------------------------------------------------------------------
# means of a part


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("lo", "hi"), [(0.05, 0.95), (0.0, 0.5), (0.333, 0.334), (0.0, 1.0)])
def test_trimmed_mean_is_that_of_numpy_within_half_a_bin(name: str, lo: float, hi: float) -> None:
    values = DISTRIBUTIONS[name](3001)
    exact = integral(values.numpy(), lo, hi) / (hi - lo)
    assert float(sketch_of(values).trimmed_mean(lo, hi)) == pytest.approx(exact, rel=HALF_A_BIN, abs=BELOW / 2)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("q", [0.0, 0.5, 0.9, 0.99])
def test_cvar_is_the_mean_of_the_largest_values_within_half_a_bin(name: str, q: float) -> None:
    values = DISTRIBUTIONS[name](2000)
    exact = integral(values.numpy(), q, 1.0) / (1 - q)
    assert float(sketch_of(values).cvar(q)) == pytest.approx(exact, rel=HALF_A_BIN, abs=BELOW / 2)


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS.keys() - {"tiny"}))
@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_tail_share_is_that_of_numpy_within_a_bin(name: str, q: float) -> None:
    values = DISTRIBUTIONS[name](2000)
    exact = integral(values.numpy(), q, 1.0) / integral(values.numpy(), 0.0, 1.0)
    assert float(sketch_of(values).tail_share(q)) == pytest.approx(exact, rel=2.0**-7)


def test_parts_add_up_to_the_whole() -> None:
    sketch = sketch_of(DISTRIBUTIONS["fine-tuned"](5000))
    whole = 0.3 * sketch.trimmed_mean(0.0, 0.3) + 0.6 * sketch.trimmed_mean(0.3, 0.9) + 0.1 * sketch.cvar(0.9)
    assert float(whole) == pytest.approx(float(sketch.trimmed_mean(0.0, 1.0)), rel=1e-12)


def test_an_infinite_loss_makes_only_the_means_that_hold_it_infinite() -> None:
    sketch = sketch_of(torch.tensor([1.0, 2.0, 3.0, torch.inf]))
    assert sketch.cvar(0.5) == torch.inf
    assert float(sketch.trimmed_mean(0.0, 0.75)) == pytest.approx(2.0, rel=2.0**-8)


@pytest.mark.parametrize(("lo", "hi"), [(0.5, 0.5), (0.9, 0.1), (-0.1, 0.5), (0.5, 1.1)])
def test_trimmed_mean_refuses_a_part_that_is_none(lo: float, hi: float) -> None:
    with pytest.raises(ValueError, match="lo and hi must satisfy 0 <= lo < hi <= 1"):
        xt.LossSketch().trimmed_mean(lo, hi)


def test_read_outs_of_an_empty_sketch_are_nan() -> None:
    sketch = xt.LossSketch()
    for value in (sketch.cdf(1.0), sketch.trimmed_mean(0.1, 0.9), sketch.cvar(0.5), sketch.tail_share(0.5)):
        assert value.isnan()
    assert sketch.std().isnan()


# --------------------------------------------------------------------------------------------------------------------
# moments and counts


@pytest.mark.parametrize("name", ["pretraining", "fine-tuned", "half zeros", "few distinct", "with outliers"])
def test_std_is_that_of_numpy(name: str, device: torch.device) -> None:
    values = DISTRIBUTIONS[name](3000)
    exact = np.std(values.double().numpy(), ddof=1)
    assert sketch_of(values.to(device)).std().item() == pytest.approx(exact, rel=1e-10)


def test_std_leaves_infinite_and_nan_losses_out() -> None:
    sketch = sketch_of(torch.tensor([1.0, 2.0, 4.0, torch.inf, torch.nan]))
    assert sketch.std().item() == pytest.approx(np.std([1, 2, 4], ddof=1), rel=1e-12)


def test_counts_of_each_kind_are_exact_int64() -> None:
    values = torch.tensor([0.5, 0.0, -1.0, 300.0, torch.inf, torch.inf, torch.nan, -torch.inf, torch.nan])
    sketch = sketch_of(values)
    counts = [sketch.count(), sketch.nan_count(), sketch.inf_count(), sketch.ignored_count()]
    assert [int(c) for c in counts] == [6, 3, 2, 0]
    assert all(c.dtype == torch.int64 for c in counts)


def test_ignored_and_bad_targets_are_counted_apart() -> None:
    sketch = xt.LossSketch()
    xt.cross_entropy(torch.randn(5, 7), torch.tensor([1, -100, 2, -100, -100]), sketch=sketch)
    assert (int(sketch.count()), int(sketch.ignored_count()), int(sketch.out_of_range_count())) == (2, 3, 0)


def test_read_outs_do_not_share_memory_with_the_state() -> None:
    sketch = sketch_of(torch.tensor([1.0, torch.inf]))
    before = sketch.clone()
    sketch.inf_count().add_(7)
    sketch.ignored_count().add_(7)
    assert sketch == before


# --------------------------------------------------------------------------------------------------------------------
# weights


def weighted_quantile(values: np.ndarray, weights: np.ndarray, q: float) -> float:
    """NumPy's inverted_cdf: the first value up to which there is a share q of the weight."""
    order = np.argsort(values, kind="stable")
    upto = np.cumsum(weights[order].astype(np.float64))
    return float(values[order][min(np.searchsorted(upto, q * upto[-1]), len(values) - 1)])


@pytest.mark.parametrize("name", ["pretraining", "fine-tuned", "half zeros", "few distinct"])
def test_weighted_quantiles_are_those_of_numpy_within_the_promised_error(name: str, device: torch.device) -> None:
    values, weights = DISTRIBUTIONS[name](2000), torch.rand(2000) * 3
    sketch = xt.LossSketch(device, weighted=True)
    sketch.update(values.to(device), weights=weights.to(device))
    slack = 2000 * 2.0**-21 / float(weights.sum())  # of the share: every weight rounded the same way
    for q in Q:
        estimate = float(sketch.quantile(q, interpolation="lower"))
        low, high = (weighted_quantile(values.numpy(), weights.numpy(), q + d) for d in (-slack, slack))
        assert low * (1 - 2.0**-7) - BELOW <= estimate <= high * (1 + 2.0**-7) + BELOW


def test_weights_are_rounded_to_the_nearest_unit_ties_to_even() -> None:
    units = [0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 3.49, 1000.5]
    sketch = xt.LossSketch(weighted=True)
    sketch.update(torch.arange(1.0, 9.0), weights=torch.tensor(units) / WEIGHT_UNIT)
    bins = reference.column_of(torch.arange(1.0, 9.0))
    assert sketch.state[0, bins].tolist() == [0, 0, 1, 1, 2, 2, 3, 1000]


def test_a_total_weight_is_off_by_at_most_half_a_unit_a_value() -> None:
    weights = torch.rand(5000)
    sketch = xt.LossSketch(weighted=True)
    sketch.update(torch.rand(5000), weights=weights)
    assert sketch.count().dtype == torch.float64
    assert abs(float(sketch.count()) - float(weights.double().sum())) <= 5000 * 2.0**-21


@pytest.mark.parametrize("weight", [0.0, -1.0, torch.nan, 2.0**-23])
def test_a_value_without_weight_leaves_no_trace(weight: float) -> None:
    sketch = xt.LossSketch(weighted=True)
    sketch.update(torch.tensor([1.0, torch.inf, torch.nan]), weights=torch.full((3,), weight))
    assert sketch == xt.LossSketch(weighted=True)


@pytest.mark.parametrize("weight", [2.0**20, 2.0**30, torch.inf])
def test_a_weight_is_at_most_a_million(weight: float) -> None:
    sketch = xt.LossSketch(weighted=True)
    sketch.update(torch.tensor([1.0]), weights=torch.tensor([weight]))
    assert sketch.count() == 2.0**20


def test_whole_weights_count_like_repeated_values() -> None:
    values, times = DISTRIBUTIONS["pretraining"](300), torch.randint(0, 5, (300,))
    weighted = xt.LossSketch(weighted=True)
    weighted.update(values, weights=times.float())
    repeated = sketch_of(values.repeat_interleave(times))
    keys = slice(layout.MAX_KEY, layout.SPECIAL)
    assert torch.equal(weighted.state[:, layout.SPECIAL :], repeated.state[:, layout.SPECIAL :] * WEIGHT_UNIT)
    assert torch.equal(weighted.state[:, keys], repeated.state[:, keys])
    assert weighted.mean().item() == pytest.approx(repeated.mean().item(), rel=1e-12)


def test_weighted_mean_and_std_are_those_of_numpy() -> None:
    values, weights = DISTRIBUTIONS["pretraining"](2000), torch.randint(1, 2**20, (2000,)) / 2.0**20
    sketch = xt.LossSketch(weighted=True)
    sketch.update(values, weights=weights)
    x, w = values.double().numpy(), weights.double().numpy()
    mean = np.average(x, weights=w)
    assert sketch.mean().item() == pytest.approx(mean, rel=1e-9)
    assert sketch.std().item() == pytest.approx(math.sqrt(np.average((x - mean) ** 2, weights=w)), rel=1e-8)


def test_weighted_updates_in_any_order_give_the_same_bits(device: torch.device) -> None:
    values, weights = DISTRIBUTIONS["fine-tuned"](5000).to(device), torch.rand(5000).to(device)
    sketches = []
    for order in (torch.arange(5000), torch.randperm(5000), torch.randperm(5000)):
        sketch = xt.LossSketch(device, weighted=True)
        for part in order.to(device).split(1999):
            sketch.update(values[part], weights=weights[part])
        sketches.append(sketch)
    assert sketches[0] == sketches[1] == sketches[2]


# --------------------------------------------------------------------------------------------------------------------
# precision


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["pretraining", "fine-tuned", "with outliers"])
def test_quantiles_of_every_precision_are_within_its_error(name: str, precision: int, device: torch.device) -> None:
    values = DISTRIBUTIONS[name](5000)
    estimate = sketch_of(values.to(device), precision=precision).quantile(Q).cpu().double()
    exact = torch.from_numpy(np.quantile(values.double().numpy(), Q))
    allowed = torch.maximum(exact * (2.0**-precision + 2.0**-23), torch.tensor(BELOW))
    assert bool(((estimate - exact).abs() <= allowed).all())


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_a_coarsened_sketch_is_the_one_that_counts_coarsely(precision: int, device: torch.device) -> None:
    edges = reference.bin_edges(Layout(precision), device)
    values = torch.cat([DISTRIBUTIONS["fine-tuned"](2000).to(device), edges, edges.nextafter(edges * 0)])
    fine = sketch_of(values, precision=precision)
    assert fine.coarsened(precision - 1) == sketch_of(values, precision=precision - 1)


def test_coarsening_by_many_steps_equals_one_by_one() -> None:
    sketch = sketch_of(DISTRIBUTIONS["fine-tuned"](2000), precision=10)
    steps = sketch
    for precision in range(9, 0, -1):
        steps = steps.coarsened(precision)
    assert steps == sketch.coarsened(1)


@pytest.mark.parametrize(("mine", "others"), [(7, 5), (5, 7), (10, 1)])
def test_merging_different_precisions_goes_to_the_coarser(mine: int, others: int) -> None:
    one, two = DISTRIBUTIONS["pretraining"](500), DISTRIBUTIONS["fine-tuned"](700)
    merged, other = sketch_of(one, precision=mine), sketch_of(two, precision=others)
    before = other.clone()
    merged.merge(other)
    assert merged == sketch_of(torch.cat([one, two]), precision=min(mine, others))
    assert other == before


@pytest.mark.parametrize("precision", [0, 11, 8])
def test_a_sketch_is_not_made_finer(precision: int) -> None:
    with pytest.raises(ValueError, match=r"precision must be in 1 \.\.\. 7"):
        xt.LossSketch().coarsened(precision)


# --------------------------------------------------------------------------------------------------------------------
# groups, and merging many


def test_every_read_out_of_a_group_is_that_of_its_values() -> None:
    values, ids = DISTRIBUTIONS["fine-tuned"](3000), torch.randint(0, 3, (3000,))
    sketch = xt.LossSketch(groups=3, precision=6)
    sketch.update(values, group_ids=ids)
    for group in range(3):
        alone = sketch_of(values[ids == group], precision=6)
        for read in (
            lambda s: s.quantile(Q),
            lambda s: s.cdf([0.01, 1.0, 2.0]),
            lambda s: s.trimmed_mean(0.1, 0.7),
            lambda s: s.tail_share(0.9),
            lambda s: s.std(),
            lambda s: s.mean(),
            lambda s: s.max(),
            lambda s: s.count(),
        ):
            torch.testing.assert_close(read(sketch)[group], read(alone), rtol=1e-15, atol=0)


def test_merge_many_equals_whole() -> None:
    parts = DISTRIBUTIONS["with outliers"](3000).split([1, 0, 999, 2000])
    merged = xt.LossSketch()
    merged.merge_many(sketch_of(part) for part in parts)
    assert merged == sketch_of(torch.cat(parts))


def test_merge_many_merges_nothing_if_one_does_not_fit() -> None:
    sketch = sketch_of(torch.tensor([1.0]))
    before = sketch.clone()
    with pytest.raises(ValueError, match="other must have 1 groups, got 2"):
        sketch.merge_many([sketch_of(torch.tensor([2.0])), xt.LossSketch(groups=2)])
    with pytest.raises(ValueError, match="other must have weighted=False, got True"):
        sketch.merge_many([sketch_of(torch.tensor([2.0])), xt.LossSketch(weighted=True)])
    assert sketch == before


@given(st.lists(st.floats(0, 2.0**-20, width=32) | st.floats(0, 255, width=32), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_cdf_of_any_values_is_within_the_shares_of_the_bin(values: list[float]) -> None:
    losses = torch.tensor(values, dtype=torch.float32)
    x = losses.clamp(min=0)
    share = sketch_of(losses).cdf(x)
    column = reference.column_of(losses)
    columns = reference.column_of(x)
    below = (column < columns[:, None]).double().mean(1)
    upto = (column <= columns[:, None]).double().mean(1)
    assert bool(((below - 1e-12 <= share) & (share <= upto + 1e-12)).all())
