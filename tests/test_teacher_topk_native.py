"""teacher_topk by the C++ kernels, against the reference in float64: every order of logits that a selection could trip
over, every masking, and the bits of results.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import xentile as xt
from xentile import _ops, reference

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.skipif(_ops.NATIVE_UNAVAILABLE is not None, reason=str(_ops.NATIVE_UNAVAILABLE))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 3

ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "rising": lambda x: x.sort(1).values,  # every logit is the largest so far
    "falling": lambda x: x.sort(1, descending=True).values,
    "rising twice": lambda x: torch.cat([half.sort(1).values for half in x.chunk(2, 1)], 1),
    "equal": torch.ones_like,
    "few values": lambda x: x.div(4).round(),  # more ties at the K-th than there are blocks
    "zeros of both signs": lambda x: torch.where(x > 0, 0.0, -0.0),
    "two plateaus": lambda x: torch.where(x > 3, 1.0, 0.0),
}


def sample(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(ROWS, size, generator=torch.Generator().manual_seed(size)) * 3).to(dtype)


def exact(
    logits: Tensor, k: int, temperatures: Sequence[float] = (1.0,), softcap: float = 0.0, logit_scale: float = 1.0
) -> xt.TeacherTopK:
    tempered = torch.tensor(temperatures, dtype=torch.float64)
    return reference.teacher_topk(logits.double(), k, tempered, softcap, logit_scale)


def assert_agree(actual: xt.TeacherTopK, expected: xt.TeacherTopK, tolerance: float = 1e-6) -> None:
    assert torch.equal(actual.ids, expected.ids)
    for name in ("logprobs", "log_z", "tail_logprob"):
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 17, 257, 4099, 40_009])
def test_every_order_of_logits(size: int, dtype: torch.dtype, order: str) -> None:
    logits = ORDERS[order](sample(size).float()).to(dtype)
    for k in (1, min(1024, size)):
        assert_agree(xt.teacher_topk(logits, k), exact(logits, k))


@pytest.mark.parametrize("size", [127, 128, 129, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097])
def test_lengths_around_a_span_and_a_block(size: int) -> None:
    logits = sample(size)
    logits[:, -1] = 20.0  # the last column counts
    logits[:, 0] = 19.0
    assert_agree(xt.teacher_topk(logits, 7), exact(logits, 7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_temperature_has_its_own_masses(dtype: torch.dtype) -> None:
    logits, temperatures = sample(5000, dtype), (2.0, 1.0, 0.5, 20.0, 2.0)
    got = xt.teacher_topk(logits, 64, temperatures=temperatures)
    assert_agree(got, exact(logits, 64, temperatures))
    assert (got.log_z[:, 1] == 0).all()
    assert torch.equal(got.log_z[:, 0], got.log_z[:, 4])


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e6, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    """The cold limit is the maximum alone, and the hot one counts columns."""
    logits = sample(300)
    got = xt.teacher_topk(logits, 10, temperatures=(temperature,))
    if temperature < 1:
        torch.testing.assert_close(got.log_z, got.logprobs[:, :1] / temperature, rtol=1e-6, atol=0)
        assert (got.tail_logprob < -100).all()
    else:
        torch.testing.assert_close(got.tail_logprob, torch.full((ROWS, 1), math.log(290 / 300)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 0.75), (30.0, 1.0), (2.0, 0.5)])
def test_softcap_and_scale(softcap: float, scale: float, dtype: torch.dtype) -> None:
    """Arithmetic is float32: an error of a few 2**-24 of the largest |z|."""
    logits, temperatures = sample(5003, dtype), (1.0, 2.0)
    logits[:, ::7] = -torch.inf
    got = xt.teacher_topk(logits, 33, temperatures=temperatures, softcap=softcap or None, logit_scale=scale)
    assert_agree(got, exact(logits, 33, temperatures, softcap, scale), tolerance=3e-6)


def test_order_is_that_of_the_logits_also_where_the_softcap_makes_them_equal() -> None:
    logits = torch.tensor([[100.0, 300.0, 200.0, 1.0]])
    assert xt.teacher_topk(logits, 3, softcap=1.0).ids.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("lead", [40.0, 75.0, 300.0, 1e6])
@pytest.mark.parametrize("k", [1, 5])
def test_the_tail_of_a_peaked_row_keeps_its_digits(lead: float, k: int) -> None:
    """The mass falls to 1e-30 and far below; 1 - sum(p) would be zero from the first case on."""
    logits = sample(3001)
    logits[:, 100 : 100 + k] += lead
    got, right = xt.teacher_topk(logits, k), exact(logits, k)
    assert float(right.tail_logprob.max()) < -17
    torch.testing.assert_close(got.tail_logprob, right.tail_logprob, rtol=2e-7, atol=1e-6)


def test_the_logprob_of_a_sure_teacher_keeps_its_digits() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 5] = 30.0
    right = -math.log1p(999 * math.exp(-30))
    assert xt.teacher_topk(logits, 4).logprobs[0, 0].item() == pytest.approx(right, rel=1e-6)


@pytest.mark.parametrize("finite", [1, 5, 63, 64, 65])
@pytest.mark.parametrize("softcap", [0.0, 10.0])
def test_infinitely_unlikely_tokens_come_last_and_by_id(finite: int, softcap: float) -> None:
    """A softcap makes them possible: then they have a mass."""
    logits = torch.full((2, 6000), -torch.inf)
    where = torch.randperm(6000, generator=torch.Generator().manual_seed(1))[:finite]
    logits[:, where] = torch.randn(finite, generator=torch.Generator().manual_seed(2))
    got = xt.teacher_topk(logits, 64, temperatures=(1.0, 3.0), softcap=softcap or None)
    assert_agree(got, exact(logits, 64, (1.0, 3.0), softcap))
    assert softcap or bool((got.tail_logprob == -torch.inf).all()) == (finite < 65)


def test_nothing_is_left_when_every_column_is_taken() -> None:
    logits = sample(64)
    got = xt.teacher_topk(logits, 64, temperatures=(1.0, 2.0))
    assert (got.tail_logprob == -torch.inf).all()
    torch.testing.assert_close(got.logprobs.exp().sum(1), torch.ones(ROWS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 77, 4998, 4999])
def test_a_broken_row_is_nan_and_its_neighbours_are_not(bad: float, column: int, dtype: torch.dtype) -> None:
    logits = sample(5000, dtype)
    logits[1] = bad if bad == -math.inf else logits[1]
    logits[1, column] = bad
    got = xt.teacher_topk(logits, 20, temperatures=(2.0, 1.0))
    assert got.ids[1].tolist() == list(range(20))
    assert all(t[1].isnan().all() for t in (got.logprobs, got.log_z, got.tail_logprob))
    neighbours = xt.TeacherTopK(*(t[[0, 2]] for t in got))
    assert_agree(neighbours, exact(logits[[0, 2]], 20, (2.0, 1.0)))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_bits_do_not_depend_on_threads_or_neighbours() -> None:
    logits = sample(60_000).repeat(5, 1)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(xt.teacher_topk(logits, 64, temperatures=(1.0, 2.0)))
    alone = xt.teacher_topk(logits[1:2], 64, temperatures=(1.0, 2.0))
    for i, first in enumerate(results[0]):
        assert all(torch.equal(first, other[i]) for other in results[1:])
        assert torch.equal(first[4:5], alone[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3])
def test_rows_may_start_anywhere_and_end_before_garbage(dtype: torch.dtype, offset: int) -> None:
    storage = torch.full((ROWS, 2100), torch.nan, dtype=dtype)
    view = storage[:, offset : offset + 2057]
    view.copy_(sample(2057, dtype))
    assert_agree(xt.teacher_topk(view, 9), exact(view, 9))


def test_rows_may_be_one_and_the_same() -> None:
    logits = sample(300)[:1].expand(4, 300)
    assert_agree(xt.teacher_topk(logits, 9), exact(logits, 9))


def test_rows_beyond_two_to_the_31_elements_are_read(tmp_path: pathlib.Path) -> None:
    """Pages of a sparse file: nothing of that size exists."""
    stride, size = 2**31 + 8, 1000
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + size, dtype=torch.bfloat16)
    logits = file.as_strided((ROWS, size), (stride, 1))
    values = sample(size, torch.bfloat16)
    logits.copy_(values)
    assert_agree(xt.teacher_topk(logits, 9), exact(values, 9))


def test_no_rows() -> None:
    got = xt.teacher_topk(torch.empty(0, 50), 7, temperatures=(1.0, 2.0))
    assert [tuple(t.shape) for t in got] == [(0, 7), (0, 7), (0, 2), (0, 2)]


def test_subnormal_logits_are_told_apart() -> None:
    logits = torch.zeros(1, 3000)
    logits[0, 1234], logits[0, 7], logits[0, 2999] = 2e-42, 1e-42, -1e-42
    assert xt.teacher_topk(logits, 3).ids.tolist() == [[1234, 7, 0]]
