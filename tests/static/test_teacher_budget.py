"""Machine code of `teacher_topk` against its budget. No GPU."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from xentile._triton import teacher_topk

from . import machine_code
from .targets import TARGETS, compile_only

if TYPE_CHECKING:
    from torch import Tensor

ROWS, V = 8192, 128256
LAUNCHES = [
    *((target, torch.bfloat16, 64) for target in ("sm_80", "sm_90", "gfx942")),
    ("sm_90", torch.float32, 64),
    ("sm_90", torch.bfloat16, 1024),
]


@cache
def codes_of(target: str, dtype: torch.dtype, k: int) -> dict[str, machine_code.Code]:
    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    outputs = new(ROWS, k, dtype=torch.int32), new(ROWS, k), new(ROWS, 1), new(ROWS, 1)
    with compile_only(TARGETS[target]) as compiled:
        teacher_topk.teacher_topk(new(ROWS, V, dtype=dtype), new(1), *outputs, 0.0, 1.0)
    return {name: machine_code.read(kernel) for name, kernel in compiled.items()}


def streaming_loop(code: machine_code.Code) -> machine_code.Loop:
    return max(code.reading_loops(), key=lambda loop: loop.bytes_loaded)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_nothing_spills_and_nothing_is_fenced(launch: tuple[Any, ...]) -> None:
    for name, code in codes_of(*launch).items():
        assert (code.spills, code.fences) == (0, 0), name


@pytest.mark.parametrize("launch", LAUNCHES)
def test_rows_are_streamed_sixteen_bytes_at_a_time(launch: tuple[Any, ...]) -> None:
    for name, code in codes_of(*launch).items():
        assert set(streaming_loop(code).loads) == {16}, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_only_pass_takes_nine_instructions_and_little_more_than_one_exponential_on_hopper(
    dtype: torch.dtype,
) -> None:
    loop = streaming_loop(codes_of("sm_90", dtype, 64)["teacher_kernel"])
    columns = loop.bytes_loaded / dtype.itemsize
    assert loop.instructions / columns <= 9
    assert loop.special / columns <= 1.25


def test_a_processor_has_room_for_two_rows_of_a_common_top_k() -> None:
    """512 threads of 128 registers are all that a processor has."""
    for target in ("sm_80", "sm_90"):
        assert codes_of(target, torch.bfloat16, 64)["teacher_kernel"].registers <= 128
