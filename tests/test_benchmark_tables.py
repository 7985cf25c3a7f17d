"""What is made of measured rows: stored lines, tables, a figure, targets; none of them out of date."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from benchmarks import distillation_table, plot, results, table, targets
from benchmarks.cases import Case, quick
from benchmarks.measure import Plan, Row, measure
from benchmarks.providers import named
from benchmarks.run import header, line

if TYPE_CHECKING:
    from pathlib import Path

SMALL = Case("resnet50", 64, "float32", "training", ("headline",))
PLAN = Plan(seconds=0.01, min_rounds=3, max_rounds=3, pair_min_rounds=3)


def stored_row(provider: str, *, tokens: int = 1024, median: float = 0.1, device: str = "Some CPU, 2 threads") -> Row:
    """A row as run.py stores it, with round numbers."""
    middle = {"median": median, "p20": median, "p80": median, "low": median, "high": median, "rounds": 9}
    return {
        "case": f"llama3-8b/{tokens}/float32/training",
        "model": "llama3-8b",
        "tokens": tokens,
        "vocab": 128256,
        "dtype": "float32",
        "operation": "training",
        "allocator": "default",
        "tags": ["headline", "issue2"],
        "provider": provider,
        "ours": provider.startswith("xentile"),
        "status": "measured",
        "reason": "",
        "seconds": middle,
        "bytes_per_second": 1e10,
        "roofs": {"copy": 2e10},
        "of_roof": middle | {"median": 0.7},
        "speedup_over": {"torch.eager": middle | {"median": 9.5}, "torch.compile": middle | {"median": 4.25}},
        "logits_bytes": 1000,
        "peak_bytes": 1010,
        "errors": {"loss": 1e-8, "gradient": 2e-9, "off_target": 1e-7},
        "device": device,
        "kind": "cpu",
        "isa": "avx2",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc",
        "versions": {"torch": "2.13.0"},
    }


def store(folder: Path, *rows: Row) -> Path:
    results.append(folder / "some-cpu-2-threads.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def measured() -> list[Row]:
    providers = named(["xentile", "torch.eager"])
    return measure(quick(SMALL), providers, "cpu", PLAN)


def test_a_measured_row_can_be_stored_and_printed(measured: list[Row]) -> None:
    eager = next(row for row in measured if row["provider"] == "torch.eager")
    assert json.loads(json.dumps(eager)) == eager
    assert eager["speedup_over"]["torch.eager"]["median"] == 1.0
    assert eager["of_roof"]["median"] > 0
    assert "GB/s" in line(eager)
    assert SMALL.model in header(measured)


def test_results_keep_the_newest_row_of_each_provider(tmp_path: Path) -> None:
    store(tmp_path, stored_row("xentile", median=0.3), stored_row("torch.eager"), stored_row("xentile", median=0.2))
    assert [(row["provider"], row["seconds"]["median"]) for row in results.load(tmp_path)] == [
        ("xentile", 0.2),
        ("torch.eager", 0.1),
    ]


def test_the_table_shows_what_is_stored(tmp_path: Path) -> None:
    shown = table.render_table(
        store(tmp_path, stored_row("xentile", median=0.2), stored_row("torch.eager", median=1.9))
    )
    assert (
        "| 1024 x 128256 float32 | forward + backward | 200 ms | 1900 ms | **9.5x** | **4.2x** | 70 % | 1.01 |" in shown
    )
    assert "**Some CPU, 2 threads**, avx2 kernels, torch 2.13.0, 2026-01-02, commit abc." in shown


def test_the_table_lists_who_was_not_compared(tmp_path: Path) -> None:
    absent = stored_row("liger") | {"status": "missing", "reason": "liger_kernel is not installed"}
    shown = table.render_table(store(tmp_path, stored_row("xentile"), absent))
    assert "Not compared: liger (liger_kernel is not installed)." in shown


def test_the_table_says_so_when_there_are_no_results(tmp_path: Path) -> None:
    assert table.render_table(tmp_path) == f"{table.NO_RESULTS}\n\n{table.NO_GPU}\n"


def test_the_table_reports_what_percentiles_cost(tmp_path: Path) -> None:
    cost = {"cost_over_xentile": {"median": 1.002, "low": 0.999, "high": 1.004}}
    shown = table.render_table(store(tmp_path, stored_row("xentile+sketch") | cost))
    assert "float32 training +0.20 % [-0.10 %, +0.40 %]." in shown


def test_a_stale_readme_is_brought_up_to_date(tmp_path: Path) -> None:
    store(tmp_path, stored_row("xentile"))
    stale = f"before\n{table.START}\nold\n{table.END}\nafter\n"
    fresh = table.current(stale, tmp_path)
    assert fresh == f"before\n{table.START}\n{table.render_table(tmp_path)}{table.END}\nafter\n"
    assert table.current(fresh, tmp_path) == fresh


def test_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold"):
        table.current("no markers")


def test_readme_table_is_current() -> None:
    if not table.README.exists() or table.START not in (text := table.README.read_text(encoding="utf-8")):
        pytest.skip("README.md has no benchmark section")
    assert table.current(text) == text, "run python -m benchmarks.table --write"


def test_the_figure_is_current() -> None:
    pytest.importorskip("PIL")
    assert plot.is_current(), "run python -m benchmarks.plot"


def test_the_figure_knows_when_it_is_stale(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot.is_current(tmp_path)
    store(tmp_path, stored_row("xentile"), stored_row("torch.eager"))
    assert not plot.is_current(tmp_path)
    assert plot.draw(tmp_path) == tmp_path / plot.FIGURE
    assert plot.is_current(tmp_path)
    changed = stored_row("xentile")
    store(tmp_path, changed | {"of_roof": changed["of_roof"] | {"median": 0.5}})
    assert not plot.is_current(tmp_path)


def test_the_targets_are_held_against_the_rows() -> None:
    lines = targets.report("issue2", [stored_row("xentile")]).splitlines()
    assert len(lines) == len(targets.TARGETS["issue2"])
    assert lines[0].split()[-4:] == ["9.50x", ">=", "9x", "met"]
    assert lines[1].split()[-4:] == ["4.25x", ">=", "4.5x", "MISSED"]
    assert lines[3].split()[-5:] == ["not", "measured", ">=", "65%", "-"]


# Distillation


def topk_row(provider: str, **changed: object) -> Row:
    row = stored_row(provider)
    cost = {"cost_over": {"xentile.cross_entropy": row["seconds"] | {"median": 1.125}}}
    options = {"operation": "topk_distillation", "options": "truncated,K=64", "tags": ["issue4"]}
    return row | cost | options | {"case": "llama3-8b/1024/float32/topk_distillation/truncated,K=64"} | changed


def test_the_table_of_distillation_shows_what_is_stored(tmp_path: Path) -> None:
    eager = topk_row("torch.eager", errors={"loss": 0.0, "gradient": 4e-7, "off_target": 0.0})
    shown = distillation_table.render_table(store(tmp_path, topk_row("xentile"), eager))
    line_of_case = "| `topk_distillation_loss` truncated, K=64 | 1024 x 128256 float32 | 100 ms | 100 ms | **9.5x** "
    assert line_of_case + "| **4.2x** | 1.12x | 70 % | 1.01 | 2.0e-09 / 4.0e-07 |" in shown


def test_the_table_of_distillation_says_which_loss_a_peer_lacks(tmp_path: Path) -> None:
    absent = topk_row("liger", status="missing", reason="it has none")
    shown = distillation_table.render_table(store(tmp_path, topk_row("xentile"), absent))
    assert "`topk_distillation_loss`: not compared: liger (it has none)." in shown


def test_the_tables_share_a_store_and_no_row(tmp_path: Path) -> None:
    store(tmp_path, stored_row("xentile"))
    only_cross_entropy = table.render_table(tmp_path)
    assert distillation_table.render_table(tmp_path).startswith(distillation_table.NO_RESULTS)
    store(tmp_path, topk_row("xentile"))
    assert table.render_table(tmp_path) == only_cross_entropy
    assert "topk_distillation_loss" in distillation_table.render_table(tmp_path)


def test_the_table_of_the_document_on_distillation_is_current() -> None:
    text = distillation_table.DOCUMENT.read_text(encoding="utf-8")
    assert table.current_distillation(text) == text, "run python -m benchmarks.table --write"


def test_the_targets_of_distillation_are_held_against_the_rows() -> None:
    lines = targets.report("issue4", [topk_row("xentile")]).splitlines()
    assert [line.split()[-1] for line in lines[:6]] == ["met", "met", "-", "-", "met", "-"]
    slow = topk_row("xentile", cost_over={"xentile.cross_entropy": {"median": 1.3}})
    assert targets.report("issue4", [slow]).splitlines()[1].split()[-4:] == ["1.30x", "<=", "1.25x", "MISSED"]


@pytest.fixture(scope="module")
def distilled() -> dict[str, Row]:
    pytest.importorskip("xentile")
    case = Case("resnet50", 16, "float32", "topk_distillation", k=5, support="truncated")
    names = ["xentile", "xentile+inplace", "xentile.cross_entropy", "xentile.cross_entropy+inplace", "torch.eager"]
    rows = measure(case, named(names), "cpu", PLAN)
    return {row["provider"]: row for row in rows}


def test_a_row_of_distillation_is_timed_by_the_cross_entropy(distilled: dict[str, Row]) -> None:
    assert distilled["xentile.cross_entropy"]["cost_over"]["xentile.cross_entropy"]["median"] == 1.0
    assert "the time of xentile.cross_entropy" in line(distilled["xentile"])
    assert "the time of" not in line(distilled["xentile.cross_entropy"])


def test_what_overwrites_its_logits_is_timed_by_what_does_so_too(distilled: dict[str, Row]) -> None:
    assert list(distilled["xentile"]["cost_over"]) == ["xentile.cross_entropy"]
    assert list(distilled["xentile+inplace"]["cost_over"]) == ["xentile.cross_entropy+inplace"]


def test_the_yardstick_is_no_peer(distilled: dict[str, Row]) -> None:
    assert set(distilled["xentile"]["speedup_over"]) == {"torch.eager"}
