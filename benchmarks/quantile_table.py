"""The README's table of the speed of percentiles, from the stored results; written by benchmarks/table.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.quantile import COMPARISONS, FOLDER, met
from benchmarks.results import load

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.measure import Row

START, END = "<!-- percentiles:start -->", "<!-- percentiles:end -->"
NO_RESULTS = "No stored results yet: `python -m benchmarks.quantile --store` makes them."
_COLUMNS = ("", "xentile", "against", "takes", "times as long", "to reach")


def render_table(folder: Path = FOLDER) -> str:
    """Markdown: a table a device, and a line for the comparisons that no device has."""
    rows = load(folder)
    devices = list(dict.fromkeys(row["device"] for row in rows))
    parts = [_device([row for row in rows if row["device"] == device]) for device in devices] or [NO_RESULTS]
    stored = {(row["case"], row["kind"]) for row in rows}
    missing = dict.fromkeys(c.case for c in COMPARISONS if c.device == "cuda" and (c.case, "cuda") not in stored)
    if missing:
        parts.append(f"Not measured, for want of a GPU: {'; '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _device(rows: Sequence[Row]) -> str:
    newest = max(rows, key=lambda row: row["date"])
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    served = f", {newest['isa']} kernels" if newest["isa"] else ""
    caption = (
        f"**{newest['device']}**{served}, torch {newest['versions']['torch']}, {newest['date'][:10]}, commit {commits}."
        " Medians of rounds in which both run once; log-normal losses."
    )
    lines = [caption, "", "| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(_cells(row)) + " |" for row in rows])


def _cells(row: Row) -> list[str]:
    if row["status"] != "measured":
        return [row["case"], "-", row["provider"], row["reason"], "-", "-"]
    against = "times_as_long" in row
    times = f"**{_three_digits(row['times_as_long']['median'])}**" if against else "-"
    took = _duration(row["peer_seconds"]["median"]) if against else "-"
    return [row["case"], _duration(row["seconds"]["median"]), row["provider"] or "-", took, times, _goal(row)]


def _goal(row: Row) -> str:
    if row["goal"] is None:
        return "-"
    goal = f"{row['goal']:g}" if "times_as_long" in row else _duration(row["goal"])
    return goal if met(row) else f"{goal}, missed"


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _three_digits(x: float) -> str:
    """Or all those before the point."""
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"
