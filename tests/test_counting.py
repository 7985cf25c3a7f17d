"""Which column counts a value: the same on every backend for every float, exhaustively where a bin is."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import xentile as xt
from xentile import _layout as layout
from xentile import reference
from xentile._layout import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Iterator


def edges_and_neighbours() -> torch.Tensor:
    """Every bin edge, the float32 before and after it, and every special pattern."""
    edges = reference.bin_edges().view(torch.int32)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, -1.0, 1e38, torch.inf, -torch.inf, torch.nan, 255.99, 256.0])
    return torch.cat([(edges + d).view(torch.float32) for d in (-1, 0, 1)] + [special])


def test_kernel_counts_every_edge_and_neighbour_like_the_reference(device: torch.device) -> None:
    values = edges_and_neighbours()
    expected = torch.zeros(1, DEFAULT.width, dtype=torch.int64)
    reference.sketch_update(values, None, None, None, expected, 1)
    sketch = xt.LossSketch(device)
    sketch.update(values.to(device))
    assert torch.equal(sketch.state.cpu(), expected)


def test_each_bin_contains_the_values_it_counts() -> None:
    values = edges_and_neighbours()
    column = reference.column_of(values) - layout.SPECIAL
    regular = column >= 0
    edges = reference.bin_edges()
    assert bool((edges[column[regular]] <= values[regular]).all())
    assert bool((values[regular] < edges[column[regular] + 1]).all())
    assert int(regular.sum()) == 3 * DEFAULT.bins + 1  # an edge and its neighbours, less 3 outside; 255.99


def many_values() -> dict[str, torch.Tensor]:
    """Enough for a histogram of their own, in shuffled blocks of every mixture."""
    extreme = torch.tensor([0.0, -0.0, -1e-9, -3.0, 2.0**-149, 256.0, 3e38, torch.inf, -torch.inf, torch.nan])
    patterns = torch.randint(-(2**31), 2**31, (70_000,)).int().view(torch.float32)
    return {
        "edges": edges_and_neighbours().repeat(6),
        "any bits": patterns,
        "below the bins": torch.exp(torch.randn(70_000) * 4 - 16),
        "halves of the last digit of a sum": (torch.arange(70_000) + 0.5) * 2.0**-48,
        "few outside": torch.cat([torch.rand(70_000) + 0.5, extreme]),
        "half outside": torch.cat([torch.rand(40_000) * 20, extreme.repeat(4000)]),
        "none inside": extreme[2:].repeat(9000),
    }


@pytest.mark.parametrize("name", many_values())
@pytest.mark.parametrize("masked", [False, True])
def test_many_values_are_counted_like_the_reference(name: str, masked: bool, device: torch.device) -> None:
    values = many_values()[name]
    values = values[torch.randperm(len(values))]
    mask = torch.rand(len(values)) < 0.7 if masked else None
    expected = torch.zeros(1, DEFAULT.width, dtype=torch.int64)
    reference.sketch_update(values, mask, None, None, expected, 1)
    sketch = xt.LossSketch(device)
    sketch.update(values.to(device), None if mask is None else mask.to(device))
    assert torch.equal(sketch.state.cpu(), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "not aligned"])
def test_a_batch_of_every_mixture_is_counted_like_the_reference(start: int, masked: bool, device: torch.device) -> None:
    """Half a million values: a GPU counts so many by a kernel of their own."""
    values = torch.cat(list(many_values().values()))
    there = values[torch.randperm(len(values))].to(device)[start:]  # beside a 16-byte boundary on a GPU too
    values = there.cpu()
    assert len(values) > 2**18
    mask = torch.rand(len(values)) < 0.7 if masked else None
    expected = torch.zeros(1, DEFAULT.width, dtype=torch.int64)
    reference.sketch_update(values, mask, None, None, expected, 1)
    sketch = xt.LossSketch(device)
    sketch.update(there, None if mask is None else mask.to(device))
    assert torch.equal(sketch.state.cpu(), expected)


@pytest.mark.parametrize("precision", [1, 5, 7, 10])
@pytest.mark.parametrize("n", [100, 2048, 5000, 40_000])
def test_few_or_many_values_of_any_precision_are_counted_like_the_reference(
    n: int, precision: int, device: torch.device
) -> None:
    values = torch.exp(torch.randn(n) * 2)
    sketch = xt.LossSketch(device, precision=precision)
    expected = torch.zeros(sketch.state.shape, dtype=torch.int64)
    reference.sketch_update(values, None, None, None, expected, 1)
    sketch.update(values.to(device))
    assert torch.equal(sketch.state.cpu(), expected)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(FINITE)
def test_the_limbs_of_a_value_are_its_sums_but_for_a_last_rounding(value: float) -> None:
    sketch = xt.LossSketch()
    sketch.update(torch.tensor([value]))
    x = Fraction(max(-layout.LIMIT, min(value, layout.LIMIT)))
    for limbs, exact in ((layout.SUM_LIMBS, x), (layout.SQUARE_LIMBS, x * x)):
        found = sum(int(sketch.state[0, column]) * Fraction(2) ** exponent for column, exponent in limbs)
        assert found == round(exact * 2**48) / Fraction(2) ** 48  # half to even, as `round` does


@given(st.floats(0, 2.0**layout.E_MAX, width=32, exclude_max=True))
def test_values_in_the_bins_leave_the_highest_limb_empty_and_the_others_with_room(value: float) -> None:
    """2**35 values or more fit in an int64, whatever they are; 2**26 of the largest in the sum of squares."""
    sketch = xt.LossSketch()
    sketch.update(torch.tensor([value]))
    (hi, _), *others = layout.SQUARE_LIMBS
    assert sketch.state[0, hi] == 0
    assert max(abs(int(sketch.state[0, column])) for column, _ in (*layout.SUM_LIMBS, *others[1:])) <= 2**28
    assert 0 <= sketch.state[0, others[0][0]] <= 2**36


def test_a_weight_counts_in_the_sums_until_its_product_is_out_of_range(device: torch.device) -> None:
    values, weights = torch.tensor([2.0**24, 2.0**11, -(2.0**24)]), torch.tensor([2.0**20, 2.0**19, 2.0**20])
    sketch = xt.LossSketch(device, weighted=True)
    sketch.update(values[:2].to(device), weights=weights[:2].to(device))
    assert sketch.mean() * (weights[0] + weights[1]) == 2 * layout.WEIGHED_LIMIT  # the second is 2**30 by itself
    sketch.update(values[2:].to(device), weights=weights[2:].to(device))
    expected = torch.zeros(1, DEFAULT.width, dtype=torch.int64)
    reference.sketch_update(values, None, weights, None, expected, sketch.unit)
    assert torch.equal(sketch.state.cpu(), expected)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of short calls: several threads would wait for each other longer than they count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_every_float_between_the_first_and_the_last_edge_is_counted_in_its_bin() -> None:
    """All 2**28 of them, a bin at a time: its values are the consecutive bit patterns from its edge on."""
    sketch, first = xt.LossSketch(), DEFAULT.first_key << DEFAULT.shift
    patterns = torch.arange(first, first + (1 << DEFAULT.shift), dtype=torch.int32)
    for column in range(layout.SPECIAL, DEFAULT.width):
        sketch.update(patterns.view(torch.float32))
        assert sketch.state[0, column] == len(patterns)
        patterns += len(patterns)
    assert sketch.count() == 2**28
