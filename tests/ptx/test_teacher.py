"""The machine code of `teacher_topk`'s kernels against float64, from the package's own launcher down."""

from __future__ import annotations

import functools

import pytest
import torch

from xentile._triton import teacher_topk
from xentile._triton.launch import Rows

from .device import pretended_gpu
from .teacher_operators import assert_exact, awkward_logits, exact, forward

SMALL = functools.partial(teacher_topk.teacher_topk, rows=Rows(512, 32))  # two groups of 16 bytes a thread, or four
MACHINES = [
    pytest.param(architecture, dtype, id=f"sm_{architecture}-{str(dtype).removeprefix('torch.')}")
    for architecture in (80, 90)
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("architecture", "dtype"), MACHINES)
def test_rows_of_every_order(architecture: int, dtype: torch.dtype) -> None:
    """Of odd length, so that each starts at another place between two boundaries of 16 bytes."""
    logits = awkward_logits(1501, dtype)
    with pretended_gpu(architecture, races=True):
        got = forward(SMALL, logits, 7, (1.0, 2.0))
    assert_exact(got, exact(logits, 7, (1.0, 2.0)))


@pytest.mark.parametrize(("k", "size"), [(1, 50257), (64, 50257), (1024, 5003)])
def test_the_launchers_own_tiles(k: int, size: int) -> None:
    logits = awkward_logits(size, torch.bfloat16, ("random", "few values") if k == 64 else ("random",))
    with pretended_gpu(90):
        got = forward(teacher_topk.teacher_topk, logits, k)
    assert_exact(got, exact(logits, k))


def test_half_precision() -> None:
    logits = awkward_logits(700, torch.float16, ("random", "equal"))
    with pretended_gpu(80):
        got = forward(SMALL, logits, 9, (1.0,), 5.0, 0.5)
    assert_exact(got, exact(logits, 9, (1.0,), 5.0, 0.5), tolerance=4e-6)


def test_the_logits_are_read_once_and_a_little() -> None:
    logits = awkward_logits(50257, torch.bfloat16, ("random",))
    with pretended_gpu(90) as launches:
        forward(teacher_topk.teacher_topk, logits, 16)
    rows, tempered = launches
    assert rows.bytes_loaded("x_ptr") < 1.1 * logits.nbytes
    assert tempered.bytes_loaded("x_ptr") == 0
