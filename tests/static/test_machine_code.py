"""The readers of machine code, on a kernel whose loops are known."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from . import machine_code
from .targets import TARGETS, compile_only


@triton.jit
def scale_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, VECTORS: tl.constexpr):
    """out = exp(x), 16 bytes a thread, or an element at a time when VECTORS is off."""
    x_ptr = tl.multiple_of(x_ptr, 16) if VECTORS else x_ptr + 1
    offsets = tl.arange(0, BLOCK)
    for first in range(0, size, BLOCK):
        x = tl.load(x_ptr + first + offsets)
        tl.store(out_ptr + first + offsets, tl.exp2(x))


def compiled(target: str, *, vectors: bool) -> machine_code.Code:
    x = torch.empty(2**30, device="meta")
    with compile_only(TARGETS[target]) as kernels:
        scale_kernel[(1,)](x, x, 2**30, BLOCK=2048, VECTORS=vectors, num_warps=4, enable_fp_fusion=False)
    return machine_code.read(kernels["scale_kernel"].kernel)


@pytest.mark.parametrize("target", TARGETS)
def test_widths_and_exponentials_of_a_loop(target: str) -> None:
    code = compiled(target, vectors=True)
    loop = max(code.writing_loops(), key=lambda loop: loop.bytes_loaded)
    assert set(loop.loads) == set(loop.stores) == {16}
    assert loop.special == loop.bytes_loaded // 4
    assert code.reading_loops() == []
    assert (code.spills, code.fences) == (0, 0)


@pytest.mark.parametrize("target", TARGETS)
def test_lost_vectors_show(target: str) -> None:
    assert 4 in compiled(target, vectors=False).writing_loops()[0].loads
