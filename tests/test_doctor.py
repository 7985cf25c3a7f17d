"""`python -m xentile doctor` says what serves what, and why."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from xentile import __main__ as command
from xentile import _ops
from xentile._schemas import SCHEMAS, WITHOUT_TENSORS


def test_every_operator_has_a_line_that_names_its_kernel() -> None:
    lines = {line.split()[0]: line for line in command.doctor().splitlines() if line and line.split()[0] in SCHEMAS}
    assert set(lines) == set(SCHEMAS) - WITHOUT_TENSORS
    native = _ops.NATIVE_UNAVAILABLE is None
    assert ("C++" in lines["cross_entropy"]) == native
    assert "Triton" in lines["cross_entropy"]
    assert "Triton" not in lines["first_bad_target"]


def test_the_reason_is_given_for_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "NATIVE_UNAVAILABLE", "the moon is full")
    text = command.doctor()
    assert "plain PyTorch, because the moon is full" in text
    if torch.version.cuda is None and torch.version.hip is None:
        assert "CUDA: not available, because this torch is a CPU build" in text


def test_it_runs_from_the_shell() -> None:
    done = subprocess.run([sys.executable, "-m", "xentile", "doctor"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("xentile ")
    assert done.stderr == ""


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["surgeon"])
    assert "invalid choice: 'surgeon'" in capsys.readouterr().err
