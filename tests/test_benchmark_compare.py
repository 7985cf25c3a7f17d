"""`python -m benchmarks.run --base REF`: what either commit cannot do is told, and stops nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import compare, worker
from benchmarks.cases import Case
from benchmarks.run import main

SMALL = Case("resnet50", 64, "float32", "training")
TOPK = Case("llama2c-tok4096", 8, "float32", "topk_distillation", k=5, support="tail_bucket", temperature=2.0)


def test_a_worker_answers_a_case_and_times_its_steps(monkeypatch, capsys) -> None:
    xentile = pytest.importorskip("xentile")
    requests = [{"case": asdict(TOPK)}, {"run": 0}, {"run": 1}]
    monkeypatch.setattr("sys.stdin", [json.dumps(request) for request in requests])
    worker.main(str(Path(xentile.__file__).parent), str(torch.get_num_threads()))
    answers = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert len(answers) == 3
    assert all(answer["seconds"] > 0 for answer in answers)


def test_a_worker_says_why_it_cannot_run_a_case_and_runs_the_next(monkeypatch) -> None:
    monkeypatch.delattr(pytest.importorskip("xentile"), "topk_distillation_loss")
    side = worker.Worker()
    reason = "AttributeError: module 'xentile' has no attribute 'topk_distillation_loss'"
    assert side.answer({"case": asdict(TOPK)}) == {"cannot": reason}
    assert side.answer({"case": asdict(SMALL)})["seconds"] > 0


def test_a_base_that_cannot_run_a_case_is_reported_and_asked_for_the_next(tmp_path: Path) -> None:
    (tmp_path / "xentile.py").write_text("import os\ndef cross_entropy(*_): os._exit(3)\n")
    base = compare.Side("base", tmp_path, 1)
    try:
        died, lacks = compare.line(SMALL, {"base": base}), compare.line(TOPK, {"base": base})
    finally:
        base.close()
    assert died == f"{SMALL.name:<60} base cannot run it: its process ended with exit code 3"
    assert "base cannot run it: AttributeError: module 'xentile' has no attribute 'topk_distillation_loss'" in lacks


def test_a_base_that_does_not_build_stops_the_run_with_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "setup.py").write_text("raise SystemExit('error: a header is missing')")
    monkeypatch.setattr(compare, "exported", lambda reference, folder: shutil.copytree(tmp_path, folder) and "0123")
    assert main(["--base", "old", "--cases", "ci"]) == 2
    assert capsys.readouterr().err == "--base old does not build: error: a header is missing\n"


def test_a_base_that_is_no_commit_stops_the_run_with_one_line(capsys) -> None:
    assert main(["--base", "no-such-commit", "--cases", "ci"]) == 2
    assert capsys.readouterr().err.startswith("--base no-such-commit is no commit: ")


def test_a_worker_refuses_the_xentile_of_the_other_side(tmp_path: Path) -> None:
    pytest.importorskip("xentile")
    with pytest.raises(RuntimeError, match="xentile must come from the side's own folder"):
        worker.main(str(tmp_path), "1")
