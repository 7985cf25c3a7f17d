"""The launches of `teacher_topk`'s Triton kernels, and the kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from xentile._triton.launch import Device
from xentile._triton.teacher_topk import choose_rows

H100 = Device()


def test_kernels_in_the_interpreter() -> None:
    tests = Path(__file__).with_name("triton_interpreter_teacher.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize("device", [H100, replace(H100, arch="gfx942", warp_size=64)], ids=["cuda", "amd"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("v", [1, 1000, 50257, 262144])
@pytest.mark.parametrize("n", [1, 8192])
def test_programs_are_whole_warps_of_whole_groups(n: int, v: int, itemsize: int, device: Device) -> None:
    for k in (1, 64, 1024):
        rows = choose_rows(n, v, k, itemsize, device)
        assert rows.threads % device.warp_size == 0
        assert rows.block % (rows.threads * 16 // itemsize) == 0


@pytest.mark.parametrize("k", [1, 64, 256, 1024])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_slots_of_the_top_k_are_at_most_a_third_of_all(k: int, itemsize: int) -> None:
    rows = choose_rows(8192, 128256, k, itemsize, H100)
    assert 5 * k // 4 <= rows.block * itemsize // 16 // 3
