"""Stored results: one JSON row a line, one file a device, appended by run.py and read by table.py and plot.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from benchmarks.measure import Row

RESULTS = Path(__file__).resolve().parent / "results"


def append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)


def rows_of(path: Path) -> list[Row]:
    """All rows of a file, in stored order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(folder: Path = RESULTS) -> list[Row]:
    """The newest row of each (device, case, provider), in stored order of first appearance."""
    newest: dict[tuple[str, str, str], Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in rows_of(path):
            newest[row["device"], row["case"], row["provider"]] = row
    return list(newest.values())
