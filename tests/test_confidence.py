"""Confidence intervals of quantiles cover as often as they say, also when the tokens of a document are alike."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import xentile as xt
from xentile.confidence import (
    EXACT_UP_TO,
    binomial_range,
    clustered_confidence_interval,
    confidence_interval,
    grouped_confidence_interval,
    student_quantile,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Q = [0.1, 0.5, 0.9]
TRIALS = 800  # the standard error of a coverage of 95 % is then 0.8 %
NOMINAL = (0.93, 0.97)
DOCUMENTS = 100
Interval = tuple[Tensor, Tensor]


def sketch_of(values: Tensor, **options: int) -> xt.LossSketch:
    sketch = xt.LossSketch(**options)
    sketch.update(values)
    return sketch


def log_normal_quantiles(scale: float) -> Tensor:
    return torch.tensor([math.exp(scale * NormalDist().inv_cdf(q)) for q in Q])


def documents(alike: float) -> tuple[Tensor, Tensor]:
    """Losses of tokens in documents of 1 to 19 tokens, and their documents; `alike` is the spread of the documents."""
    ids = torch.arange(DOCUMENTS).repeat_interleave(torch.randint(1, 20, (DOCUMENTS,)))
    return torch.exp(alike * torch.randn(DOCUMENTS)[ids] + 0.8 * torch.randn(len(ids))), ids


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of calls on a thousand values each: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def coverage(interval: Callable[[Tensor, Tensor], Interval], alike: float, trials: int = TRIALS) -> list[float]:
    """The share of trials in which the interval covers the true quantiles Q."""
    truth = log_normal_quantiles(math.hypot(alike, 0.8))
    hits = torch.zeros(len(Q))
    for _ in range(trials):
        lower, upper = interval(*documents(alike))
        hits += (lower <= truth) & (truth <= upper)
    return (hits / trials).tolist()


def from_sketch(losses: Tensor, _: Tensor) -> Interval:
    return confidence_interval(sketch_of(losses, precision=9), Q)


def from_documents(losses: Tensor, ids: Tensor) -> Interval:
    return clustered_confidence_interval(losses, ids, Q)


def from_groups(losses: Tensor, ids: Tensor) -> Interval:
    sketch = xt.LossSketch(groups=25)
    sketch.update(losses, group_ids=ids % 25)
    return grouped_confidence_interval(sketch, Q)


@pytest.mark.parametrize("interval", [from_sketch, from_documents], ids=lambda f: f.__name__)
def test_independent_tokens_are_covered_as_often_as_the_level_says(
    interval: Callable[[Tensor, Tensor], Interval],
) -> None:
    assert all(NOMINAL[0] <= c <= NOMINAL[1] for c in coverage(interval, alike=0.0))


def test_documents_of_similar_tokens_are_covered_as_often_as_the_level_says() -> None:
    assert all(NOMINAL[0] <= c <= NOMINAL[1] for c in coverage(from_documents, alike=0.6))


def test_groups_of_documents_are_covered_at_least_as_often_as_the_level_says() -> None:
    assert all(0.94 <= c <= 0.985 for c in coverage(from_groups, alike=0.6, trials=300))  # two bins wider


def test_taking_the_tokens_of_documents_for_independent_covers_far_too_seldom() -> None:
    assert all(c < 0.8 for c in coverage(from_sketch, alike=0.6, trials=300))


def exact_range(n: int, p: float, level: float) -> tuple[int, int]:
    """The same from binomial coefficients."""
    mass = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    tail = (1 - level) / 2
    low = next(k for k in range(n + 1) if math.fsum(mass[: k + 1]) >= tail)
    return low, next(k for k in range(n, -1, -1) if math.fsum(mass[k:]) >= tail)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 60])
def test_binomial_range_equals_that_from_binomial_coefficients(n: int, level: float) -> None:
    for p in (0.01, 0.1, 0.37, 0.5, 0.9, 0.999):
        assert binomial_range(n, p, level) == exact_range(n, p, level)


@pytest.mark.parametrize("n", [1000, 10**5, 10**7, 10**9, 10**12])
def test_binomial_range_is_that_of_scipy_or_up_to_one_rank_wider(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    for p in (1e-6, 0.001, 0.1, 0.5, 0.99):
        for level in (0.5, 0.95, 1 - 1e-9):
            tail = (1 - level) / 2
            low, high = binomial_range(n, p, level)
            slack = 1 if math.sqrt(n * p * (1 - p)) > EXACT_UP_TO else 0
            assert 0 <= int(stats.binom.ppf(tail, n, p)) - low <= slack
            assert 0 <= high - int(stats.binom.isf(tail, n, p)) <= slack


def test_student_quantile_is_that_of_the_tables() -> None:
    two_sided = {3: 3.182446, 5: 2.570582, 10: 2.228139, 30: 2.042272, 100: 1.983972}  # 95 %
    for freedom, t in two_sided.items():
        assert student_quantile(0.95, freedom) == pytest.approx(t, rel=1.3e-3 if freedom == 3 else 2e-4)
    assert student_quantile(0.95, math.inf) == pytest.approx(1.959964, rel=1e-6)


def test_the_interval_is_that_of_scipy_widened_to_edges_of_bins() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = torch.randn(500).exp()
    for q in Q:
        exact = stats.quantile_test(values.numpy(), p=q).confidence_interval(0.95)
        lower, upper = (float(end) for end in confidence_interval(sketch_of(values), q))
        assert exact.low * (1 - 2.0**-7) <= lower <= exact.low
        assert exact.high <= upper <= exact.high * (1 + 2.0**-7)


def test_the_ends_of_a_sketch_are_edges_that_enclose_the_ranks() -> None:
    values = torch.rand(300).sort().values * 4
    low, high = binomial_range(300, 0.3, 0.9)
    lower, upper = confidence_interval(sketch_of(values, precision=3), 0.3, level=0.9)
    assert lower <= values[low - 1]
    assert values[high] <= upper
    assert math.frexp(float(lower))[0] * 16 % 1 == 0
    assert math.frexp(float(upper))[0] * 16 % 1 == 0


def test_each_token_its_own_document_gives_the_ranks_of_independent_tokens_or_wider() -> None:
    values = torch.randn(1000).exp()
    ordered = values.sort().values
    lower, upper = clustered_confidence_interval(values, torch.arange(1000), Q)
    for i, q in enumerate(Q):
        low, high = binomial_range(1000, q, 0.95)
        assert ordered[low - 5] <= lower[i] <= ordered[low - 1]
        assert ordered[high] <= upper[i] <= ordered[high + 4]


def test_copies_of_a_token_in_its_document_add_no_information() -> None:
    values = torch.randn(400).exp()
    alone = clustered_confidence_interval(values, torch.arange(400), Q)
    copies = clustered_confidence_interval(values.repeat(25), torch.arange(400).repeat(25), Q)
    for one, many in zip(alone, copies, strict=True):
        torch.testing.assert_close(many, one, rtol=0.02, atol=0)


def test_grouped_intervals_of_merged_shards_equal_those_of_the_whole() -> None:
    losses, ids = documents(0.6)
    whole = xt.LossSketch(groups=32)
    whole.update(losses, group_ids=ids % 32)
    merged = xt.LossSketch(groups=32)
    for shard in (ids % 3 == k for k in range(3)):
        part = xt.LossSketch(groups=32)
        part.update(losses[shard], group_ids=ids[shard] % 32)
        merged.merge(part)
    assert torch.equal(
        torch.stack(grouped_confidence_interval(whole, Q)), torch.stack(grouped_confidence_interval(merged, Q))
    )


def test_the_method_gives_both_kinds_of_interval() -> None:
    losses, ids = documents(0.6)
    sketch = xt.LossSketch(groups=32)
    sketch.update(losses, group_ids=ids % 32)
    for clustered, function in ((False, confidence_interval), (True, grouped_confidence_interval)):
        got, wanted = sketch.confidence_interval(Q, clustered=clustered), function(sketch, Q)
        assert torch.equal(torch.stack(got), torch.stack(wanted))


def test_groups_that_are_documents_give_the_clustered_interval_widened() -> None:
    losses, ids = documents(0.6)
    sketch = xt.LossSketch(groups=DOCUMENTS, precision=9)
    sketch.update(losses, group_ids=ids)
    lower, upper = clustered_confidence_interval(losses, ids, Q)
    wide_lower, wide_upper = grouped_confidence_interval(sketch, Q)
    torch.testing.assert_close(wide_lower, lower, rtol=0.02, atol=0)
    torch.testing.assert_close(wide_upper, upper, rtol=0.02, atol=0)


def test_higher_levels_give_intervals_that_enclose_the_lower_ones() -> None:
    losses, ids = documents(0.6)
    for make in (
        lambda level: confidence_interval(sketch_of(losses), Q, level=level),
        lambda level: clustered_confidence_interval(losses, ids, Q, level=level),
    ):
        (low, high), (lower, higher) = make(0.8), make(0.99)
        assert bool((lower < low).all())
        assert bool((high < higher).all())


def test_too_few_values_for_a_limit_give_none() -> None:
    lower, upper = confidence_interval(sketch_of(torch.tensor([1.0, 2.0, 3.0])), [0.01, 0.5, 0.99])
    assert lower.tolist() == [-math.inf, -math.inf, 2.0]  # more than one of three above the 99th percentile is rare
    assert upper.tolist() == [2.015625, math.inf, math.inf]  # the next edge after 2; likewise


def test_one_document_gives_no_limits() -> None:
    lower, upper = clustered_confidence_interval(torch.rand(100), torch.zeros(100, dtype=torch.int64), 0.5)
    assert (lower.item(), upper.item()) == (-math.inf, math.inf)


def test_no_values_give_nan() -> None:
    empty = torch.empty(0)
    for interval in (
        confidence_interval(xt.LossSketch(), 0.5),
        clustered_confidence_interval(empty, empty.long(), 0.5),
        grouped_confidence_interval(xt.LossSketch(groups=4), 0.5),
    ):
        assert all(end.isnan() for end in interval)


def test_ties_and_infinities_are_ends_like_other_values() -> None:
    values = torch.cat([torch.zeros(600), torch.ones(300), torch.full((100,), torch.inf)])
    ids = torch.randperm(1000)
    assert [float(end) for end in clustered_confidence_interval(values, ids, 0.3)] == [0.0, 0.0]
    assert [float(end) for end in clustered_confidence_interval(values, ids, 0.95)] == [math.inf, math.inf]
    assert float(confidence_interval(sketch_of(values), 0.3)[0]) == 0.0


def test_nan_losses_are_left_out() -> None:
    losses, ids = documents(0.6)
    more = torch.cat([losses, torch.full((50,), torch.nan)])
    more_ids = torch.cat([ids, torch.arange(50)])
    for got, expected in zip(
        clustered_confidence_interval(more, more_ids, Q), clustered_confidence_interval(losses, ids, Q), strict=True
    ):
        assert torch.equal(got, expected)


def test_intervals_have_the_shape_of_q_after_that_of_groups(device: torch.device) -> None:
    sketch = xt.LossSketch(device, groups=3)
    values = torch.rand(90, device=device)
    sketch.update(values, group_ids=torch.arange(90, device=device) % 3)
    q = torch.rand(2, 5, device=device)
    shapes = [end.shape for end in confidence_interval(sketch, q)]
    shapes += [end.shape for end in grouped_confidence_interval(sketch, q)]
    shapes += [end.shape for end in clustered_confidence_interval(values, torch.arange(90, device=device), q)]
    assert shapes == [(3, 2, 5)] * 2 + [(2, 5)] * 4


def test_each_group_has_the_interval_of_its_values() -> None:
    values, ids = torch.rand(1000), torch.randint(0, 3, (1000,))
    sketch = xt.LossSketch(groups=3)
    sketch.update(values, group_ids=ids)
    lower, upper = confidence_interval(sketch, Q)
    for group in range(3):
        alone = confidence_interval(sketch_of(values[ids == group]), Q)
        assert torch.equal(torch.stack([lower[group], upper[group]]), torch.stack(alone))


def test_wrong_arguments_are_refused_with_a_message() -> None:
    losses, ids = torch.rand(4), torch.arange(4)
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 95"):
        confidence_interval(sketch_of(losses), 0.5, level=95)
    with pytest.raises(ValueError, match="sketch must count values"):
        confidence_interval(xt.LossSketch(weighted=True), 0.5)
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\]"):
        confidence_interval(sketch_of(losses), torch.tensor(1.5))
    with pytest.raises(ValueError, match=r"document_ids must have the shape of losses, \(4,\), got \(3,\)"):
        clustered_confidence_interval(losses, ids[:3], 0.5)
    with pytest.raises(TypeError, match="document_ids must be integers, got float32"):
        clustered_confidence_interval(losses, losses, 0.5)
    with pytest.raises(TypeError, match="losses must be a floating point tensor, got int64"):
        clustered_confidence_interval(ids, ids, 0.5)
