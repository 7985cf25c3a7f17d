"""The choices of the launchers of dense distillation, and its Triton kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xentile import _layout as layout
from xentile._triton.dense_distillation import _same_boundaries, backward_rows, forward_rows
from xentile._triton.launch import Device

H100 = Device()
FORMATS = [torch.float32, torch.bfloat16]


def rows(n: int, v: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(n, v, dtype=dtype, device="meta")


def test_kernels_in_the_interpreter() -> None:
    tests = Path(__file__).with_name("triton_interpreter_dense.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize("device", [H100, replace(H100, arch="gfx942", warp_size=64)], ids=["cuda", "amd"])
@pytest.mark.parametrize("teacher_dtype", FORMATS)
@pytest.mark.parametrize("dtype", FORMATS)
def test_programs_are_whole_warps_of_whole_groups(
    dtype: torch.dtype, teacher_dtype: torch.dtype, device: Device
) -> None:
    group = 16 // min(dtype.itemsize, teacher_dtype.itemsize)
    for v in (1, 1000, 50257, 262144):
        tensors = rows(8192, v, dtype), rows(8192, v, teacher_dtype)
        for choice in (forward_rows(*tensors, "forward_kl", device), backward_rows(*tensors, device)):
            assert choice.threads % device.warp_size == 0
            assert choice.block % (choice.threads * group) == 0


def test_divergences_have_registers_for_their_logarithms() -> None:
    for divergence in layout.DIVERGENCES:
        tensors = rows(8192, 128256, torch.bfloat16), rows(8192, 128256, torch.bfloat16)
        threads = forward_rows(*tensors, divergence, H100).threads
        assert threads == (1024 if divergence == "forward_kl" else 512)


def test_backward_shares_long_rows() -> None:
    tensors = rows(1, 128256, torch.bfloat16), rows(1, 128256, torch.bfloat16)
    choice = backward_rows(*tensors, H100)
    assert choice.splits * choice.block >= 128256 / 4
    assert backward_rows(tensors[0][:, :1000], tensors[1][:, :1000], H100).splits == 1


def test_boundaries_of_one_format_are_the_same_at_the_same_offset() -> None:
    memory = torch.empty(100, dtype=torch.bfloat16)
    at = [memory[offset:].as_strided((2, 33), (33, 1)) for offset in range(9)]
    assert _same_boundaries(at[0], at[8])
    assert not _same_boundaries(at[0], at[1])
    assert not _same_boundaries(at[0], memory.as_strided((2, 33), (34, 1)))


def test_boundaries_of_two_formats_are_the_same_where_rows_begin_on_one() -> None:
    x, teacher = torch.empty(2, 40, dtype=torch.bfloat16), torch.empty(2, 40)
    assert _same_boundaries(teacher, x)
    assert not _same_boundaries(teacher[:, 8:33].contiguous(), x[:, 8:33].contiguous())
    assert not _same_boundaries(teacher[:, 1:], x[:, 1:])
