"""The sketch keeps its promises: exact counts, quantiles within 2**-7 or 2**-24, exact merges."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from distributions import DISTRIBUTIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import xentile as xt
from xentile import _layout as layout
from xentile import reference

Q = [0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0]
LOSSES = hnp.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(0, 255.0, width=32) | st.sampled_from([0.0, 2.0**-24, 1.0, 1.0078125, 5.0]),
)


def sketch_of(values: torch.Tensor, **options: torch.Tensor) -> xt.LossSketch:
    sketch = xt.LossSketch(values.device)
    sketch.update(values, **options)
    return sketch


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("size", [1, 2, 7, 100, 10_000])
def test_every_quantile_is_within_the_promised_error(name: str, size: int, device: torch.device) -> None:
    values = DISTRIBUTIONS[name](size).to(device)
    exact = torch.from_numpy(np.quantile(values.cpu().double().numpy(), Q))
    estimate = sketch_of(values).quantile(Q).cpu().double()
    error = (estimate - exact).abs()
    assert bool((error <= torch.maximum(exact * 2.0**-7, torch.tensor(2.0**-24)) + exact * 2.0**-23).all())


@given(LOSSES, st.floats(0, 1))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_bounds_enclose_every_interpolation(values: np.ndarray, q: float) -> None:
    sketch = sketch_of(torch.from_numpy(values))
    lower, upper = (float(b) for b in sketch.quantile_bounds(q))
    for method in layout.INTERPOLATIONS:
        exact = float(np.quantile(values.astype(np.float64), q, method=method))
        estimate = float(sketch.quantile(q, interpolation=method))
        assert lower * (1 - 2.0**-23) <= exact <= upper * (1 + 2.0**-23)
        assert lower <= estimate <= upper
        assert abs(estimate - exact) <= max(exact * 2.0**-7, 2.0**-24) + exact * 2.0**-23


@given(LOSSES, st.lists(st.floats(0, 1), min_size=2, max_size=12))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_quantiles_are_monotone(values: np.ndarray, q: list[float]) -> None:
    result = sketch_of(torch.from_numpy(values)).quantile(sorted(q))
    assert bool((result.diff() >= 0).all())


def test_extremes_are_exact() -> None:
    values = DISTRIBUTIONS["fine-tuned"](5000)
    sketch = sketch_of(values)
    assert sketch.min() == values.min() == sketch.quantile(0.0)
    assert sketch.max() == values.max() == sketch.quantile(1.0)


def test_mean_is_the_exact_sum_divided_once() -> None:
    values = DISTRIBUTIONS["fine-tuned"](20_000).clamp(min=2.0**-24, max=255.0)
    numerator = sum(int(v * 2**48) for v in values.tolist())  # Python integers: exact
    assert sketch_of(values).mean().item() == pytest.approx(numerator / 2**48 / len(values), rel=1e-15)


def test_std_matches_numpy() -> None:
    values = DISTRIBUTIONS["pretraining"](5000)
    assert sketch_of(values).std().item() == pytest.approx(np.std(values.double().numpy(), ddof=1), rel=1e-12)


@pytest.mark.parametrize("start", [2**31 - 1, 2**40])
def test_counts_are_exact_beyond_two_to_the_31(start: int) -> None:
    sketch = sketch_of(torch.tensor([1.0]))
    sketch.state[0, layout.SPECIAL :] *= start
    sketch.update(torch.tensor([1.0, 2.0]))
    assert sketch.count() == start + 2
    assert sketch.quantile(0.5) == pytest.approx(1.0, rel=2.0**-7)


def test_merge_equals_whole_in_any_order_and_grouping() -> None:
    values = DISTRIBUTIONS["with outliers"](3000)
    whole = sketch_of(values)
    parts = [sketch_of(v) for v in values[torch.randperm(3000)].split([1, 999, 0, 1700, 300])]
    left = xt.LossSketch()
    for part in parts:
        left.merge(part)
    right = xt.LossSketch()
    for part in reversed(parts):
        part = part.clone()
        part.merge(right)
        right = part
    assert left == whole == right


def test_merge_leaves_the_other_unchanged() -> None:
    one, other = sketch_of(torch.tensor([1.0])), sketch_of(torch.tensor([2.0]))
    before = other.clone()
    one.merge(other)
    assert other == before
    assert one.count() == 2


def test_twenty_updates_are_bitwise_equal(device: torch.device) -> None:
    values = DISTRIBUTIONS["pretraining"](50_000).to(device)
    first = sketch_of(values)
    assert all(sketch_of(values) == first for _ in range(20))


def test_nan_is_counted_and_left_out() -> None:
    sketch = sketch_of(torch.tensor([1.0, torch.nan, 3.0, -torch.inf]))
    assert sketch.count() == 2
    assert sketch.nan_count() == 2
    assert sketch.quantile([0.0, 1.0]).tolist() == [1.0, 3.0]


def test_infinity_takes_part_without_making_nan() -> None:
    sketch = sketch_of(torch.tensor([1.0, 2.0, torch.inf]))
    assert sketch.inf_count() == 1
    assert sketch.quantile([0.0, 0.75, 1.0]).tolist() == [1.0, torch.inf, torch.inf]
    assert sketch.quantile(0.5).item() == pytest.approx(2.0, rel=2.0**-7)
    assert sketch.mean() == torch.inf


def test_an_empty_sketch_reads_as_nan() -> None:
    sketch = xt.LossSketch()
    assert sketch.count() == 0
    for value in (sketch.quantile(0.5), sketch.mean(), sketch.min(), sketch.max(), *sketch.quantile_bounds(0.5)):
        assert value.isnan()


def test_mask_leaves_values_out() -> None:
    values = DISTRIBUTIONS["pretraining"](1000).reshape(10, 100)
    mask = torch.rand(10, 100) < 0.3
    assert sketch_of(values, mask=mask) == sketch_of(values[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_update_takes_any_float_dtype(dtype: torch.dtype) -> None:
    values = DISTRIBUTIONS["pretraining"](100).to(dtype)
    assert sketch_of(values) == sketch_of(values.float())


def test_groups_equal_separate_sketches(device: torch.device) -> None:
    values, ids = DISTRIBUTIONS["fine-tuned"](2000).to(device), torch.randint(0, 3, (2000,)).to(device)
    sketch = xt.LossSketch(device, groups=4)
    sketch.update(values, group_ids=ids)
    for group in range(4):
        alone = sketch_of(values[ids == group])
        assert torch.equal(sketch.state[group], alone.state[0])
    assert sketch.quantile(Q).shape == (4, len(Q))
    assert sketch.count().tolist() == [*torch.bincount(ids.cpu(), minlength=4).tolist()]


def test_the_shape_of_q_is_the_shape_of_the_answer() -> None:
    sketch = sketch_of(torch.rand(100))
    assert sketch.quantile(0.5).shape == ()
    assert sketch.quantile(torch.rand(2, 3)).shape == (2, 3)
    assert sketch.quantile([]).shape == (0,)


def test_state_dict_and_pickle_and_copy_round_trip() -> None:
    sketch = sketch_of(torch.rand(100))
    loaded = xt.LossSketch()
    loaded.load_state_dict(sketch.state_dict())
    assert sketch == loaded == pickle.loads(pickle.dumps(sketch)) == copy.deepcopy(sketch) == sketch.clone()
    loaded.update(torch.tensor([9.0]))
    assert sketch != loaded


def test_reset_keeps_the_memory() -> None:
    sketch = sketch_of(torch.rand(100))
    address = sketch.state.data_ptr()
    sketch.reset()
    assert sketch == xt.LossSketch()
    assert sketch.state.data_ptr() == address


def test_summary_shows_counts_and_remarks() -> None:
    sketch = sketch_of(torch.tensor([1.0, 1e-5, torch.nan]))
    text = sketch.summary()
    assert text.splitlines()[0].split() == ["tokens", "mean", "p1", "p10", "p25", "p50", "p75", "p90", "p99", "max"]
    assert text.splitlines()[1].split()[0] == "2"
    assert "1 token with a NaN loss" in text


def test_native_quantile_equals_the_reference(device: torch.device) -> None:
    sketch = xt.LossSketch(device, groups=3)
    values = torch.cat([DISTRIBUTIONS["fine-tuned"](500), torch.tensor([torch.inf, 300.0, 1e-9, 0.0])]).to(device)
    sketch.update(values, group_ids=torch.arange(len(values), device=device) % 2)  # group 2 stays empty
    q = torch.linspace(0, 1, 101, dtype=torch.float64)
    for code, method in enumerate(layout.INTERPOLATIONS):
        expected = reference.sketch_quantile(sketch.state.cpu(), q, method)
        actual = [torch.empty(3, 101, device=device) for _ in range(3)]
        torch.ops.xentile.sketch_quantile(sketch.state, q.to(device), *actual, code)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.cpu(), e, rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", [3, 7, 10])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_midpoint_estimator_has_half_the_error(name: str, precision: int, device: torch.device) -> None:
    values = DISTRIBUTIONS[name](5000)
    sketch = xt.LossSketch(device, precision=precision)
    sketch.update(values.to(device))
    q = torch.linspace(0, 1, 101, dtype=torch.float64)
    for interpolation in ("linear", "lower", "nearest"):
        exact = torch.from_numpy(np.quantile(values.double().numpy(), q.numpy(), method=interpolation))
        got = sketch.quantile(q, interpolation=interpolation, estimator="midpoint").double().cpu()
        assert bool(((got - exact).abs() <= (exact * 2.0 ** -(precision + 1)).clamp(min=2.0**-24) * (1 + 1e-6)).all())
        assert bool((got.diff() >= 0).all())
    assert [got[0], got[-1]] == [values.min(), values.max()]


def test_the_midpoint_estimator_takes_groups_infinity_and_nothing() -> None:
    sketch = xt.LossSketch(groups=3)
    values, ids = torch.tensor([0.0, 1.0, 2.0, torch.inf, 3.0, torch.inf]), torch.tensor([0, 0, 0, 0, 2, 2])
    sketch.update(values, group_ids=ids)
    got = sketch.quantile([0.0, 0.4, 1.0], estimator="midpoint", interpolation="lower")
    assert got.shape == (3, 3)
    assert got[0].tolist() == [0.0, 1.0 + 2.0**-8, torch.inf]
    assert got[1].isnan().all()
    assert got[2].tolist() == [3.0, 3.0, torch.inf]
    with pytest.raises(ValueError, match="mean is not a valid value for estimator: expected one of 'interpolated', 'm"):
        sketch.quantile(0.5, estimator="mean")


READ_OUTS = {
    "quantile": lambda s: s.quantile(torch.rand(3)),
    "quantile of numbers": lambda s: s.quantile([0.1, 0.5]),
    "midpoint": lambda s: s.quantile(torch.rand(3), estimator="midpoint"),
    "quantile_bounds": lambda s: s.quantile_bounds(0.5),
    "cdf": lambda s: s.cdf(1.0),
    "trimmed_mean": lambda s: s.trimmed_mean(0.1, 0.9),
    "cvar": lambda s: s.cvar(0.9),
    "tail_share": lambda s: s.tail_share(0.9),
    "merge": lambda s: s.merge(xt.LossSketch(groups=2, precision=5)),
    **{name: (lambda s, name=name: getattr(s, name)()) for name in ("mean", "std", "min", "max", "count", "reset")},
    **{name: (lambda s, name=name: getattr(s, name)()) for name in ("nan_count", "inf_count", "ignored_count")},
}


@pytest.mark.parametrize("name", READ_OUTS)
def test_no_value_is_read_on_the_host(name: str) -> None:
    """Under FakeTensorMode any read of a value raises; on a GPU it would wait."""
    with torch._subclasses.FakeTensorMode():
        sketch = xt.LossSketch(groups=2)
        losses = torch.rand(4, 5)
        sketch.update(losses, losses > 0.1, group_ids=losses.long())
        READ_OUTS[name](sketch)
