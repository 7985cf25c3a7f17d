"""The choices of the Triton launchers, and the kernels in Triton's interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xentile._triton import launch
from xentile._triton.launch import Device, Rows


def test_kernels_in_the_interpreter() -> None:
    tests = Path(__file__).with_name("triton_interpreter.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


class TestLaunches:
    H100 = Device()

    def choose(self, n: int, v: int, itemsize: int = 2, *, gradient: bool = True, **changes: Any) -> Rows:
        alignment = math.gcd(16, v * itemsize)
        arguments = {"together": True, "alignment": alignment, "smooth": False, "device": self.H100} | changes
        return launch.forward(n, v, itemsize, gradient, **arguments)

    @pytest.mark.parametrize("v", [1, 100, 1000, 4096, 8192])
    @pytest.mark.parametrize("gradient", [False, True])
    def test_short_rows_stay_in_registers(self, v: int, gradient: bool) -> None:
        rows = self.choose(8192, v, gradient=gradient)
        assert rows.resident or rows.lanes
        assert rows.block >= v

    @pytest.mark.parametrize("v", [1, 2, 3, 10, 32, 51, 100, 255, 256, 1000])
    @pytest.mark.parametrize("itemsize", [2, 4])
    def test_short_rows_share_a_warp_and_fit_in_its_registers(self, v: int, itemsize: int) -> None:
        rows = self.choose(8192, v, itemsize)
        assert rows.lanes <= 16
        assert rows.threads % rows.lanes == 0
        assert v % rows.vector == 0
        assert rows.block <= 64 * rows.lanes
        assert rows.block % (rows.lanes * rows.vector) == 0

    @pytest.mark.parametrize("v", [1001, 1025])
    def test_rows_of_odd_length_are_kept_short(self, v: int) -> None:
        assert self.choose(8192, v).resident

    def test_class_weights_have_room_in_the_registers(self) -> None:
        assert self.choose(8192, 256, smooth=True).lanes == 2 * self.choose(8192, 256).lanes
        assert self.choose(8192, 128256, smooth=True, weighted=True).threads <= 512

    @pytest.mark.parametrize("v", [32000, 50257, 128256, 262144])
    @pytest.mark.parametrize("itemsize", [2, 4])
    def test_long_rows_are_streamed_by_one_program_each(self, v: int, itemsize: int) -> None:
        rows = self.choose(8192, v, itemsize)
        assert not rows.resident
        assert rows.splits == 1

    def test_rows_in_flight_fit_in_the_cache_where_they_can(self) -> None:
        for v in (16384, 32000, 50257, 100000):
            programs = 1024 // self.choose(8192, v).threads * self.H100.processors
            assert programs * v * 2 <= 0.6 * self.H100.l2_bytes

    def test_few_long_rows_fill_the_device(self) -> None:
        rows = self.choose(64, 262144)
        assert 64 * rows.splits >= 2 * self.H100.processors
        assert self.choose(64, 1000).splits == 1

    def test_gradient_of_another_alignment_is_streamed(self) -> None:
        assert self.choose(8192, 5000).resident
        assert not self.choose(8192, 5000, together=False).resident

    def test_programs_are_whole_warps_of_whole_groups(self) -> None:
        for device in (self.H100, replace(self.H100, arch="gfx942", warp_size=64)):
            for v in (1, 1000, 5000, 50257, 262144):
                for itemsize in (2, 4):
                    for rows in (
                        self.choose(8192, v, itemsize, device=device),
                        launch.backward(v, itemsize, False, device, 16),
                    ):
                        threads, group = (rows.lanes, rows.vector) if rows.lanes else (rows.threads, 16 // itemsize)
                        assert rows.threads % device.warp_size == 0
                        assert rows.block % (threads * group) == 0

    def test_backward_shares_long_rows(self) -> None:
        rows = launch.backward(128256, 2, False, self.H100, 16)
        assert rows.splits * rows.block >= 128256 / 4
        assert launch.backward(5000, 2, False, self.H100, 16).splits == 1

    def test_backward_of_short_rows_takes_them_together(self) -> None:
        assert launch.backward(100, 2, False, self.H100, 8) == self.choose(8192, 100)
