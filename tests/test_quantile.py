"""`quantile` against np.quantile of the same values in float64: equal, not close."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from distributions import DISTRIBUTIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES
from torch import Tensor

import xentile as xt
from xentile.reference import quantile as spec

if TYPE_CHECKING:
    from collections.abc import Iterator

Q = [0.0, 0.001, 0.1, 0.25, 1 / 3, 0.5, 0.9, 0.99, 1.0]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module", params=["in one call", "digit by digit"])
def selection(request: pytest.FixtureRequest) -> Iterator[None]:
    """A CPU has an operator for all of it; selected as on other devices the values have the same quantiles."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "digit by digit":
            patch.setattr(importlib.import_module("xentile.quantile"), "IN_ONE_CALL", ())
        yield


def expected(x: Tensor, q: Any, interpolation: str = "linear", weights: Tensor | None = None) -> Tensor:
    """np.quantile in float64, rounded once to the dtype of the result."""
    w = None if weights is None else weights.double().cpu().numpy()
    value = np.quantile(x.double().cpu().numpy(), q, method=interpolation, weights=w)  # type: ignore[call-overload]
    return torch.as_tensor(value).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def assert_equal(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("interpolation", spec.INTERPOLATIONS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_interpolation_equals_numpy(name: str, interpolation: str, device: torch.device) -> None:
    for dtype in DTYPES:
        x = (DISTRIBUTIONS[name](5003) - 1).to(dtype)
        actual = xt.quantile(x.to(device), Q, interpolation=interpolation)
        assert_equal(actual, expected(x, Q, interpolation))


@pytest.mark.usefixtures("selection")
@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("interpolation", spec.INTERPOLATIONS)
def test_few_values_equal_numpy(n: int, interpolation: str) -> None:
    x, q = torch.randn(n), torch.linspace(0, 1, 61, dtype=torch.float64)
    assert_equal(xt.quantile(x, q, interpolation=interpolation), expected(x, q, interpolation))


VALUES = st.one_of(
    st.floats(allow_nan=False), st.sampled_from([0.0, -0.0, INF, -INF, 5e-324, 1e-40, -1e-40, 1.0, -1.0])
)


@pytest.mark.usefixtures("selection")
@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=12), st.lists(st.floats(0, 1), max_size=3), st.sampled_from(DTYPES))
def test_any_values_are_selected_as_by_sorting(values: list[float], q: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    for interpolation in spec.DISCRETE:
        assert_equal(xt.quantile(x, q, interpolation=interpolation), expected(x, q, interpolation))
    wanted = spec.quantile(x, torch.tensor(q, dtype=torch.float64), "linear")
    assert_equal(xt.quantile(x, q), wanted.to(torch.float64 if dtype == torch.float64 else torch.float32))


@pytest.mark.usefixtures("selection")
@pytest.mark.parametrize(
    ("values", "q", "result"),
    [
        ([1.0, INF], [0.0, 0.5, 1.0], [1.0, INF, INF]),
        ([-INF, 1.0], [0.0, 0.5, 1.0], [-INF, -INF, 1.0]),
        ([-INF, INF], [0.0, 0.5, 1.0], [-INF, NAN, INF]),
        ([INF, INF, INF], [0.0, 0.3, 1.0], [INF, INF, INF]),
    ],
)
def test_infinity_takes_part_without_making_nan(values: list[float], q: list[float], result: list[float]) -> None:
    assert_equal(xt.quantile(torch.tensor(values), q), torch.tensor(result))


def test_more_values_than_torch_takes(device: torch.device) -> None:
    """Consecutive bit patterns from 1.0 on, in a shuffled order: the value of rank k is known without sorting."""
    n = 2**24 + 5
    bits = torch.arange(n, dtype=torch.int32, device=device).mul_(0x9E3779B1 - 2**32).remainder_(n)  # hits repeat
    x = bits.add_(0x3F800000).view(torch.float32)
    ranks = torch.tensor([0, 3, 2**23, n - 2, n - 1])
    counts = torch.bincount(x.view(torch.int32) - 0x3F800000, minlength=n).cumsum(0)
    wanted = (torch.searchsorted(counts, ranks.to(device), right=True).int() + 0x3F800000).view(torch.float32)
    q = ranks.double() / (n - 1)
    assert_equal(xt.quantile(x, q, interpolation="nearest"), wanted.cpu())


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    x, threads = torch.randn(200_000), torch.get_num_threads()
    several = xt.quantile(x, Q)
    try:
        torch.set_num_threads(1)
        assert_equal(xt.quantile(x, Q), several)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("selection")
def test_values_of_any_shape_and_stride_with_a_mask() -> None:
    x, mask = torch.randn(30, 40).T[::2], torch.rand(20, 30) < 0.3
    for interpolation in ("linear", "inverted_cdf"):
        assert_equal(xt.quantile(x, Q, interpolation=interpolation), expected(x, Q, interpolation))
        actual = xt.quantile(x, Q, mask=mask, interpolation=interpolation)
        assert_equal(actual, expected(x[mask], Q, interpolation))


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.usefixtures("selection")
@pytest.mark.parametrize("dtype", DTYPES)
def test_integer_weights_equal_numpy_and_repetition(dtype: torch.dtype) -> None:
    x, weights = torch.randn(500).to(dtype), torch.randint(0, 5, (500,))
    q = torch.linspace(0, 1, 101, dtype=torch.float64)
    actual = xt.quantile(x, q, weights=weights.float(), interpolation="inverted_cdf")
    assert_equal(actual, expected(x, q, "inverted_cdf", weights))
    repeated = x.repeat_interleave(weights)
    inside = q[1:-1] + 1e-9  # off the steps, where NumPy's two formulas round differently
    actual = xt.quantile(x, inside, weights=weights.float(), interpolation="inverted_cdf")
    assert_equal(actual, expected(repeated, inside, "inverted_cdf"))


@pytest.mark.usefixtures("selection")
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_real_weights_of_any_magnitude_equal_numpy(scale: float) -> None:
    x, weights = torch.randn(1000), torch.rand(1000, dtype=torch.float64) * scale
    actual = xt.quantile(x, Q, weights=weights, interpolation="inverted_cdf")
    assert_equal(actual, expected(x, Q, "inverted_cdf", weights))


@pytest.mark.usefixtures("selection")
def test_a_weighted_quantile_changes_where_a_share_is_reached() -> None:
    """Weights of a few units, the largest as large as can be: one unit too many or too few is another value."""
    x, weights = torch.arange(6.0), torch.tensor([1, 1, 2, 1, 3, 2**31 - 1], dtype=torch.float64)
    steps, none, all_ = weights.cumsum(0) / weights.sum(), torch.zeros(()).double(), torch.ones(()).double()
    q = torch.cat([steps, steps.nextafter(none), steps.nextafter(all_)])
    actual = xt.quantile(x, q, weights=weights, interpolation="inverted_cdf")
    assert_equal(actual, expected(x, q, "inverted_cdf", weights))


@pytest.mark.usefixtures("selection")
def test_weights_and_mask_together() -> None:
    x, weights, mask = torch.randn(400), torch.rand(400), torch.rand(400) < 0.5
    weights[~mask] = INF  # never looked at
    actual = xt.quantile(x, Q, weights=weights, mask=mask, interpolation="inverted_cdf")
    assert_equal(actual, expected(x[mask], Q, "inverted_cdf", weights[mask]))


@pytest.mark.parametrize("bad", [-1.0, NAN, INF])
def test_a_bad_weight_raises(bad: float) -> None:
    with pytest.raises(ValueError, match="weights must be finite and at least 0"):
        xt.quantile(torch.rand(2), 0.5, weights=torch.tensor([1.0, bad]), interpolation="inverted_cdf")


# ------------------------------------------------------------------------------------------------- NaN, emptiness, q


@pytest.mark.usefixtures("selection")
def test_nan_policies() -> None:
    x = torch.tensor([3.0, NAN, 1.0, -NAN, INF])
    assert xt.quantile(x, [0.0, 0.5]).isnan().all()
    assert_equal(xt.quantile(x, [0.0, 0.5, 1.0], nan_policy="omit"), torch.tensor([1.0, 3.0, INF]))
    with pytest.raises(ValueError, match="x has NaN values: pass nan_policy='omit'"):
        xt.quantile(x, 0.5, nan_policy="raise")
    for policy in ("propagate", "raise"):  # a NaN that is masked out is not there
        assert xt.quantile(x, 0.0, mask=~x.isnan(), nan_policy=policy) == 1.0


@pytest.mark.usefixtures("selection")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_of_any_payload_is_nan_and_infinity_is_not(dtype: torch.dtype) -> None:
    integer, width = spec._INTEGERS.get(dtype, torch.int64), 8 * dtype.itemsize
    infinity = int(torch.tensor(INF, dtype=dtype).view(integer))
    for sign in (0, -(2 ** (width - 1))):
        x = torch.tensor([infinity + 1, infinity, 0], dtype=integer).add(sign).view(dtype)
        assert xt.quantile(x, 0.0).isnan()
        finite = xt.quantile(x, [0.0, 1.0], nan_policy="omit")
        assert finite.abs().sort().values.tolist() == [0.0, INF]


@pytest.mark.usefixtures("selection")
def test_nothing_to_count_gives_nan() -> None:
    assert_equal(xt.quantile(torch.empty(0), Q), torch.full((len(Q),), NAN))
    assert xt.quantile(torch.rand(3), 0.5, mask=torch.zeros(3, dtype=torch.bool)).isnan()
    assert xt.quantile(torch.tensor([NAN]), 0.5, nan_policy="omit").isnan()
    zero = torch.zeros(3)
    assert xt.quantile(zero, 0.5, weights=zero, interpolation="inverted_cdf").isnan()


def test_the_shape_of_q_is_the_shape_of_the_answer() -> None:
    x = torch.rand(100)
    assert xt.quantile(x, 0.5).shape == ()
    assert xt.quantile(x, []).shape == (0,)
    q = torch.rand(2, 3)
    assert_equal(xt.quantile(x, q), expected(x, q.double().flatten()).reshape(2, 3))


@pytest.mark.usefixtures("selection")
def test_a_tensor_q_outside_of_the_unit_interval_gives_nan() -> None:
    answer = xt.quantile(torch.rand(100), torch.tensor([-0.1, 0.5, 1.1, NAN, INF]))
    assert answer.isnan().tolist() == [True, False, True, True, True]


def test_the_answer_is_detached() -> None:
    assert not xt.quantile(torch.rand(5, requires_grad=True), 0.5).requires_grad


X = torch.rand(4)
REFUSED: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "x list": ([1.0], 0.5, {}, TypeError, "x must be a Tensor, got list"),
    "x integer": (X.long(), 0.5, {}, TypeError, "x must be float32, bfloat16, float16 or float64, got int64"),
    "q string": (X, "0.5", {}, TypeError, "q must be a number, a sequence of numbers or a tensor, got str"),
    "q integers": (X, torch.tensor([1]), {}, TypeError, "q must be a floating point tensor, got int64"),
    "q percent": (X, [0.5, 50], {}, ValueError, r"q must be in \[0, 1\], got 50"),
    "mask dtype": (X, 0.5, {"mask": X}, TypeError, "mask must be bool, got float32"),
    "mask shape": (X, 0.5, {"mask": X[:2] > 0}, ValueError, r"mask must have the shape of x, \(4,\), got \(2,\)"),
    "weights dtype": (X, 0.5, {"weights": X.long()}, TypeError, "weights must be floating point, got int64"),
    "weights shape": (X, 0.5, {"weights": X[:2]}, ValueError, r"weights must have the shape of x, \(4,\), got \(2,\)"),
    "weights alone": (X, 0.5, {"weights": X}, ValueError, "weights need interpolation='inverted_cdf', got 'linear'"),
    "interpolation": (X, 0.5, {"interpolation": "cubic"}, ValueError, "expected one of 'linear', 'midpoint', 'lower'"),
    "nan_policy": (X, 0.5, {"nan_policy": "skip"}, ValueError, "expected one of 'propagate', 'omit', 'raise'"),
    "device": (
        X,
        0.5,
        {"mask": torch.ones(4, dtype=torch.bool, device="meta")},
        RuntimeError,
        "mask must be on the dev",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_misuse_is_explained(name: str) -> None:
    x, q, options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        xt.quantile(x, q, **options)
