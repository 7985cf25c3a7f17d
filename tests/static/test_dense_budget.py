"""Machine code of distillation against a teacher's logits against its budget. No GPU."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from xentile import _layout as layout
from xentile._triton import dense_distillation

from . import machine_code
from .targets import TARGETS, compile_only

if TYPE_CHECKING:
    from torch import Tensor

ROWS, V = 8192, 128256
PLAIN, TEMPERED_AND_CAPPED = (1.0, 0.0), (2.5, 20.0)
"""temperature, softcap"""
LAUNCHES = [
    *((target, torch.bfloat16, "forward_kl", PLAIN) for target in ("sm_80", "sm_90", "gfx942")),
    ("sm_90", torch.float32, "forward_kl", PLAIN),
    ("sm_90", torch.bfloat16, "reverse_kl", TEMPERED_AND_CAPPED),
    ("sm_80", torch.bfloat16, "jsd", TEMPERED_AND_CAPPED),
]


@cache
def code_of(target: str, dtype: torch.dtype, divergence: str, scalars: tuple[float, float]) -> machine_code.Code:
    """The forward with its gradient, with cross-entropy and both sketches."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    temperature, softcap = scalars
    logits, teacher, gradient = (new(ROWS, V, dtype=dtype) for _ in range(3))
    inputs = logits, teacher, new(ROWS, dtype=torch.int64), None, None, None, None
    sketches = (new(1, layout.DEFAULT.width, dtype=torch.int64) for _ in range(2))
    outputs = new(), new(), new(ROWS), new(ROWS), new(ROWS, 6), *sketches, gradient
    options: tuple[Any, ...] = (layout.DIVERGENCES.index(divergence), 0.5, temperature, True, 1.0, 0.5, softcap, 1.0)
    with compile_only(TARGETS[target]) as compiled:
        dense_distillation.distillation(*inputs, *outputs, -100, layout.REDUCTIONS.index("mean"), *options, False)
    return machine_code.read(compiled["dense_row_kernel"])


def loops_of(code: machine_code.Code) -> list[machine_code.Loop]:
    """Those that stream rows: one of each row, and two of both."""
    return [*code.reading_loops(), *code.writing_loops()]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_nothing_spills_and_counting_needs_no_fence(launch: tuple[Any, ...]) -> None:
    code = code_of(*launch)
    assert (code.spills, code.fences) == (0, 0)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_all_passes_load_and_store_sixteen_bytes(launch: tuple[Any, ...]) -> None:
    loops = loops_of(code_of(*launch))
    assert len(loops) == 4
    assert {width for loop in loops for width in (loop.loads | loop.stores)} == {16}


def test_forward_kl_and_its_gradient_take_70_instructions_a_column_on_hopper() -> None:
    loops = loops_of(code_of("sm_90", torch.bfloat16, "forward_kl", PLAIN))
    of_one_row, of_both = loops[:2], loops[2:]
    count = sum(loop.instructions / (loop.bytes_loaded / 2) for loop in of_one_row)
    count += sum(loop.instructions / (loop.bytes_loaded / 4) for loop in of_both)
    assert count <= 70
