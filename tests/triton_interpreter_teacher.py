"""`teacher_topk`'s Triton kernels in Triton's interpreter, with tiles so small that short rows cross many.

test_teacher_triton.py runs this file in a process of its own, as test_triton.py does with triton_interpreter.py.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import triton_36
from ptx.teacher_operators import assert_exact, awkward_logits, exact, forward

from xentile._triton import teacher_topk
from xentile._triton.launch import Rows

if TYPE_CHECKING:
    from torch import Tensor

    from xentile.reference import TeacherTopK

TILES = Rows(128, 64)
PLAIN = ("random", "rising", "few values")
INFINITE = ("random", "few possible", "impossible", "infinite")

# numpy's warnings, about the infinities and NaN that are tested
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def interpreter_of_any_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_36.mend(monkeypatch)


def run(logits: Tensor, k: int, *options: Any, rows: Rows | None = TILES) -> TeacherTopK:
    return forward(functools.partial(teacher_topk.teacher_topk, rows=rows), logits, k, *options)


@pytest.mark.parametrize("k", [1, 20])
def test_rows_of_every_order(k: int) -> None:
    logits = awkward_logits(299)
    assert_exact(run(logits, k), exact(logits, k))


@pytest.mark.parametrize("size", [1, 3, 4, 127, 129])
def test_every_length_and_all_of_a_row(size: int) -> None:
    logits = awkward_logits(size, orders=PLAIN[:1])
    for k in {1, (size + 1) // 2, size}:
        assert_exact(run(logits, k), exact(logits, k))


def test_the_launchers_own_tiles() -> None:
    logits = awkward_logits(3000, orders=PLAIN)
    assert_exact(run(logits, 30, rows=None), exact(logits, 30))


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_start_anywhere_and_end_before_garbage(offset: int) -> None:
    memory = torch.full((3, 150), torch.nan)
    logits = memory[:, offset : offset + 131]
    logits.copy_(awkward_logits(131, orders=PLAIN))
    assert_exact(run(logits, 5), exact(logits, 5))


def test_half_precision() -> None:
    logits = awkward_logits(131, torch.float16, PLAIN)
    assert_exact(run(logits, 9), exact(logits, 9))


def test_each_temperature_has_its_own_masses() -> None:
    logits, temperatures = awkward_logits(70, orders=PLAIN), (2.0, 1.0, 0.5, 20.0, 2.0)
    got = run(logits, 5, temperatures)
    assert_exact(got, exact(logits, 5, temperatures))
    assert torch.equal(got.log_z[:, 1], torch.zeros(len(PLAIN)))
    assert torch.equal(got.tail_logprob[:, 0], got.tail_logprob[:, 4])


def test_temperatures_of_any_size() -> None:
    logits, temperatures = awkward_logits(70, orders=PLAIN[:2]), (1e-40, 1e-6, 1e30)
    got = run(logits, 5, temperatures)
    assert (got.log_z[:, 0] == -torch.inf).all()  # what a float holds of logprob / temperature
    torch.testing.assert_close(got.log_z[:, 1], got.logprobs[:, 0] / 1e-6, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.tail_logprob[:, 2], torch.full((2,), math.log(65 / 70)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("softcap", "scale"), [(0.0, 0.75), (5.0, 1.0), (2.0, 0.5)])
def test_softcap_and_scale(softcap: float, scale: float) -> None:
    """Arithmetic is float32, with a tanh that is good to 2^-21. A softcap makes all columns possible."""
    logits = awkward_logits(131, orders=INFINITE)
    wanted = exact(logits, 9, (1.0, 2.0), softcap, scale)
    assert_exact(run(logits, 9, (1.0, 2.0), softcap, scale), wanted, tolerance=4e-6)


def test_order_is_that_of_the_logits_also_where_the_softcap_makes_them_equal() -> None:
    assert run(torch.tensor([[100.0, 300.0, 200.0, 1.0]]), 3, (1.0,), 1.0).ids.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("lead", [40.0, 75.0, 1e6])
def test_the_tail_of_a_peaked_row_keeps_its_digits(lead: float, k: int) -> None:
    logits = awkward_logits(300, orders=PLAIN[:1])
    logits[:, 100 : 100 + k] += lead
    got, wanted = run(logits, k), exact(logits, k)
    torch.testing.assert_close(got.tail_logprob, wanted.tail_logprob, rtol=2e-7, atol=1e-6)


def test_the_logprob_of_a_sure_teacher_keeps_its_digits() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 5] = 30.0
    assert run(logits, 4).logprobs[0, 0].item() == pytest.approx(-math.log1p(299 * math.exp(-30)), rel=1e-6)


def test_rows_in_any_number_and_of_one_memory() -> None:
    assert run(torch.empty(0, 50), 7).ids.shape == (0, 7)
    logits = awkward_logits(50, orders=PLAIN[:1]).expand(3, 50)
    assert_exact(run(logits, 7), exact(logits, 7))
