"""The choices of the launchers of top-K distillation, and its Triton kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from xentile._triton.launch import Device
from xentile._triton.topk_distillation import backward_rows, forward_rows

H100 = Device()


def test_kernels_in_the_interpreter() -> None:
    tests = Path(__file__).with_name("triton_interpreter_topk.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize("device", [H100, replace(H100, arch="gfx942", warp_size=64)], ids=["cuda", "amd"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("v", [1, 1000, 50257, 262144])
def test_programs_are_whole_warps_of_whole_groups(v: int, itemsize: int, device: Device) -> None:
    for k in (1, 64, 1024):
        launches = [forward_rows(8192, v, k, itemsize, g, t, device) for g in (False, True) for t in (False, True)]
        for rows in [*launches, backward_rows(v, itemsize, False, device), backward_rows(v, itemsize, True, device)]:
            assert rows.threads % device.warp_size == 0
            assert rows.block % (rows.threads * 16 // itemsize) == 0


def test_the_groups_of_a_large_support_have_room_in_registers() -> None:
    for itemsize in (2, 4):
        assert 1024 * 16 // itemsize <= 16 * forward_rows(8192, 32000, 1024, itemsize, False, False, H100).threads


def test_a_gradient_in_place_is_one_program_a_row() -> None:
    assert backward_rows(128256, 2, True, H100).splits == 1
    assert backward_rows(128256, 2, False, H100).splits > 1
