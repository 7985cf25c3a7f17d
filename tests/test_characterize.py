"""The characterisation measures what it says: errors by any convention of a quantile, and nobody dropped in silence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import characterize, results, sketches
from benchmarks.characterize import NOTHING, REAL, distributions, kept, largest_error, main, measure
from benchmarks.provenance import provenance
from benchmarks.sketches import Contender, contenders
from benchmarks.token_losses import STORED

if TYPE_CHECKING:
    from pathlib import Path

FOUND, MISSING = contenders()
SMALL = ["--values", "300", "--seconds", "0"]
VALUES = np.linspace(0.5, 8.0, 1001, dtype=np.float32)


@pytest.mark.parametrize("method", ["linear", "lower", "higher", "inverted_cdf", "hazen", "median_unbiased"])
def test_no_convention_of_a_quantile_counts_as_an_error(method: str) -> None:
    for values in (VALUES, np.float32([0.0, 1.0, 5.0]), np.float32([2.0])):
        answers = np.quantile(values.astype(np.float64), characterize.Q, method=method)
        assert largest_error(values, answers.tolist()) == pytest.approx(0, abs=1e-12)


def test_the_largest_error_is_relative_to_the_quantile() -> None:
    answers = np.quantile(VALUES.astype(np.float64), characterize.Q)
    answers[4] *= 1.05
    assert largest_error(VALUES, answers.tolist()) == pytest.approx(0.05, abs=0.003)  # less the gap between values


def test_a_difference_that_is_nothing_beside_a_loss_is_no_error() -> None:
    assert largest_error(np.zeros(9, dtype=np.float32), [NOTHING] * 10) == 0
    assert largest_error(np.zeros(9, dtype=np.float32), [2.5 * NOTHING] * 10) == pytest.approx(2.5)


def test_nan_is_the_largest_error() -> None:
    assert largest_error(VALUES, [1.0, float("nan")], (0.0, 0.5)) == float("inf")


@pytest.mark.parametrize("contender", FOUND, ids=lambda c: c.name)
def test_every_sketch_is_read_in_nats(contender: Contender) -> None:
    row = measure(contender, "even", VALUES, seconds=0.0)
    assert row["largest_error"] < 0.2
    assert 100 < row["bytes"] < 500_000
    assert row["ns_per_value"] > 0


@pytest.mark.parametrize("contender", FOUND[:3], ids=lambda c: c.name)
def test_this_sketch_keeps_its_promise_on_every_distribution(contender: Contender) -> None:
    for name, values in distributions(5000).items():
        assert kept(measure(contender, name, values, seconds=0.0))


def test_both_tables_have_every_distribution_and_every_sketch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    errors, costs = capsys.readouterr().out.split("\nLargest error and bytes")
    lines = {line.split("  ")[0] for line in errors.splitlines()}
    assert {REAL, "pretraining", "half zeros", "promised"} <= lines
    assert len(distributions(10)) == 11
    assert all(contender.name in costs for contender in FOUND)
    assert all(package in costs for package in MISSING)


def test_a_missing_package_is_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketches, "PEERS", [("no-such-sketch", "no_such_sketch", lambda _: [])])
    assert main(SMALL) == 0
    assert "not compared: no-such-sketch (PackageNotFoundError" in capsys.readouterr().out


def test_a_broken_promise_is_marked_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(characterize, "contenders", lambda: ([FOUND[0]._replace(promise=1e-6)], {}))
    assert main(SMALL) == 1
    out, err = capsys.readouterr()
    assert "!" in out.split("promised\n")[1]
    assert "promised 1e-06" in err


def test_rows_are_stored_apart_from_those_of_the_speed_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(characterize, "RESULTS", tmp_path)
    monkeypatch.setattr(characterize, "contenders", lambda: (FOUND[:1], {}))
    assert main([*SMALL, "--store"]) == 0
    (path,) = (tmp_path / "characterize").iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 11
    assert {"distribution", "sketch", "package", "promise", "largest_error", "bytes", "commit", "date"} <= rows[
        0
    ].keys()
    assert results.load(tmp_path) == []
    assert main([*SMALL, "--store"]) == 0
    assert len(path.read_text().splitlines()) == 11  # of the last run alone


def stored_rows() -> list[dict]:
    (path,) = (results.RESULTS / characterize.FOLDER).glob("*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_stored_rows_are_of_the_present_distributions_sketches_and_columns() -> None:
    rows = stored_rows()
    present = measure(FOUND[0], "any", VALUES, seconds=0.0).keys() | provenance("cpu").keys()
    assert all(row.keys() == present for row in rows)
    assert all(tuple(row["quantiles"]) == characterize.Q for row in rows)
    names = {row["sketch"] for row in rows}
    assert names >= {contender.name for contender in FOUND}
    assert {(row["distribution"], row["sketch"]) for row in rows} == {
        (name, sketch) for name in distributions(1) for sketch in names
    }
    promises = {contender.name: contender.promise for contender in FOUND}
    assert all(row["promise"] == promises.get(row["sketch"], row["promise"]) for row in rows)


def test_the_stored_rows_keep_the_promises_of_this_sketch() -> None:
    ours = [row for row in stored_rows() if row["sketch"].startswith("xentile")]
    assert len(ours) == 3 * len(distributions(1))
    assert all(kept(row) for row in ours)


def test_the_stored_answers_on_real_losses_are_those_of_today() -> None:
    values = distributions(characterize.VALUES)[REAL]
    for contender in FOUND[:3]:
        (row,) = (r for r in stored_rows() if (r["distribution"], r["sketch"]) == (REAL, contender.name))
        assert row["values"] == len(values)
        assert row["answers"] == contender.quantiles(contender.count(contender.prepare(values)), characterize.Q)


def test_the_stored_losses_are_those_of_tokens() -> None:
    losses = np.load(STORED)
    assert losses.dtype == np.float32
    assert len(losses) > 20_000
    assert STORED.stat().st_size < 200_000
    assert losses.min() >= 0
    assert np.isfinite(losses).all()
    assert len(np.unique(losses)) > 0.9 * len(losses)
