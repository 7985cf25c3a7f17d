"""The speed of percentiles: what is measured, when a goal is met, and that README shows what is stored."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import quantile, quantile_table, results, table
from benchmarks.quantile import COMPARISONS, line, main, measure, met

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.measure import Row

MIDDLE = {"median": 0.002, "p20": 0.001, "p80": 0.003, "low": 0.001, "high": 0.003, "rounds": 9}


def stored_row(case: str = "update, 4M float32", times: float | None = 12.0, goal: float | None = 10) -> Row:
    row = {
        "case": case,
        "operation": "update",
        "provider": "`peer`" if times else "",
        "goal": goal,
        "values": 1 << 22,
        "status": "measured",
        "reason": "",
        "seconds": MIDDLE,
        "device": "Some CPU, 2 threads",
        "kind": "cpu",
        "isa": "avx2",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc",
        "versions": {"torch": "2.13.0"},
    }
    if times:
        row |= {"peer_seconds": MIDDLE | {"median": 0.024}, "times_as_long": MIDDLE | {"median": times}}
    return row


def test_every_row_of_issue_3_has_a_comparison() -> None:
    goals = {(c.operation, c.device, c.goal) for c in COMPARISONS if c.goal is not None}
    exact, update, read = quantile.EXACT, quantile.UPDATE, quantile.READ
    assert goals == {
        (exact, "cpu", 1),  # of few values: not in the issue
        (exact, "cpu", 10),
        (exact, "cpu", 3),
        (update, "cpu", 5),
        (update, "cpu", 200),
        (read, "cpu", 100e-6),
        (update, "cuda", 45e-6),
        (exact, "cuda", 8),
    }


def test_comparisons_have_keys_of_their_own() -> None:
    keys = [(c.device, c.case, c.peer) for c in COMPARISONS]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("steps", [quantile.update_and_bincount, quantile.update_and_bins])
def test_the_numpy_peers_count_what_the_sketch_counts(steps) -> None:
    _, peer = steps(5000, "cpu")
    expected = torch.bincount(quantile.column_of(quantile.losses(5000)), minlength=quantile.layout.DEFAULT.width)
    inside = slice(quantile.layout.SPECIAL + 1, quantile.layout.DEFAULT.width - 1)  # the ends take what is outside
    assert peer(0)[inside].tolist() == expected[inside].tolist()


def test_the_partition_peer_puts_the_same_ranks_in_place() -> None:
    ours, peer = quantile.exact_and_partition(4001, "cpu")
    middle = peer(0)[2000]
    assert ours(0)[2] == middle


def test_a_quick_run_measures_every_row_and_stores_nothing(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(quantile, "FOLDER", tmp_path)
    assert main(["--quick"]) == 0
    shown = capsys.readouterr().out
    for comparison in COMPARISONS:
        assert (comparison.operation in shown) or comparison.device == "cuda"
    assert "MISSED" not in shown
    assert not list(tmp_path.iterdir())


def test_a_missing_peer_is_a_row_with_the_reason() -> None:
    (comparison,) = (c for c in COMPARISONS if c.package)
    row = measure(type(comparison)(**{**comparison.__dict__, "package": "no_such_package"}))
    assert (row["status"], row["reason"]) == ("missing", "no_such_package is not installed")
    assert met(row) is None
    assert "no_such_package is not installed" in line(row)


def test_a_goal_is_a_least_ratio_or_a_longest_time() -> None:
    assert met(stored_row(times=12.0, goal=10)) is True
    assert met(stored_row(times=9.9, goal=10)) is False
    assert met(stored_row(times=None, goal=100e-6)) is False
    assert met(stored_row(times=None, goal=0.002)) is True
    assert met(stored_row(goal=None)) is None


def test_rows_are_stored_with_their_provenance(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(quantile, "FOLDER", tmp_path)
    monkeypatch.setattr(quantile, "COMPARISONS", [type(COMPARISONS[0])("read", 100, "", quantile.read_out, 1.0, 3)])
    assert main(["--store"]) == 0
    (path,) = tmp_path.iterdir()
    (row,) = map(json.loads, path.read_text().splitlines())
    assert {"device", "isa", "commit", "date", "versions", "threads", "seconds", "case"} <= row.keys()
    assert main(["--store"]) == 0
    assert len(results.load(tmp_path)) == 1  # the newest


def test_the_table_shows_what_is_stored(tmp_path: Path) -> None:
    rows = [stored_row(), stored_row("read, 4M float32", None, 100e-6), stored_row("slow, 4M float32", 2.0, 3)]
    results.append(tmp_path / "some-cpu.jsonl", rows)
    shown = quantile_table.render_table(tmp_path)
    assert "| update, 4M float32 | 2 ms | `peer` | 24 ms | **12** | 10 |" in shown
    assert "| read, 4M float32 | 2 ms | - | - | - | 100 µs, missed |" in shown
    assert "| slow, 4M float32 | 2 ms | `peer` | 24 ms | **2** | 3, missed |" in shown
    assert "**Some CPU, 2 threads**, avx2 kernels, torch 2.13.0, 2026-01-02, commit abc." in shown
    assert "Not measured, for want of a GPU: sketch update, 16M float32; exact, 5 quantiles, 16M float32." in shown


def test_the_table_says_so_when_there_are_no_results(tmp_path: Path) -> None:
    assert quantile_table.render_table(tmp_path).startswith(quantile_table.NO_RESULTS)


def test_readme_shows_the_stored_rows() -> None:
    text = table.README.read_text(encoding="utf-8")
    assert table.current_readme(text) == text, "run python -m benchmarks.table --write"
