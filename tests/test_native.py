"""The native library on every instruction set of this CPU: the same tests, each in a process that is capped to one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xentile import _ops

TESTS = Path(__file__).parent
NATIVE = pytest.mark.skipif(_ops.NATIVE_UNAVAILABLE is not None, reason=str(_ops.NATIVE_UNAVAILABLE))


@NATIVE
def test_the_best_instruction_set_is_chosen() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    expected = {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "default")
    assert os.environ.get("XENTILE_ISA", _ops.ops.isa.default()) == expected


@NATIVE
@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_lesser_instruction_sets_pass_the_same_tests(isa: str) -> None:
    if isa == _ops.ops.isa.default():
        pytest.skip("the whole suite runs on it")
    names = ("test_cross_entropy.py", "test_numerics.py", "test_sketch.py", "test_teacher_topk_native.py")
    names += ("test_distillation_native.py",)
    files = [str(TESTS / name) for name in names]
    selection = ["-k", "not hypothesis and not enclose and not promised"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, *selection],
        env=os.environ | {"XENTILE_ISA": isa},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
