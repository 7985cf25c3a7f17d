"""What the tables of stored results have in common."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.measure import Row


def grid(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns), *(f"| {' | '.join(cells)} |" for cells in lines)]


def caption(rows: Sequence[Row]) -> str:
    """Where and when the rows were measured, and how to read them."""
    newest = max(rows, key=lambda row: row["date"])
    commits = sorted({row["commit"] for row in rows})
    served = f", {newest['isa']} kernels" if newest["isa"] else ""
    return (
        f"**{newest['device']}**{served}, torch {newest['versions']['torch']}, {newest['date'][:10]},"
        f" commit {', '.join(commits)}. Medians of rounds in which every provider runs once; the roof is `copy_`"
        " (forward + backward) or a read (forward) of the same bytes in the same rounds; peak memory counts (N, V)"
        " tensors beyond the logits."
    )


def milliseconds(row: Row | None) -> str:
    if row is None:
        return "-"
    value = 1e3 * row["seconds"]["median"]
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def times(speedup: dict[str, float] | None) -> str:
    return "-" if speedup is None else f"**{speedup['median']:.1f}x**"


def peak(row: Row) -> str:
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / row['logits_bytes']:.2f}"


def missing(rows: Sequence[Row]) -> list[str]:
    """Peers without any number on this device, with the reasons."""
    measured = {row["provider"] for row in rows if row["status"] == "measured"}
    reasons = {row["provider"]: row["reason"] for row in rows if row["provider"] not in measured}
    listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
    return ["", f"Not compared: {listed}."] if reasons else []


def replaced(text: str, start: str, end: str, table: str) -> str:
    """`text` with the part between the markers made anew; ValueError without them."""
    section = re.compile(f"(?<={start}\n).*?(?={end})", re.DOTALL)
    if not section.search(text):
        raise ValueError(f"the text must hold {start} and {end}, each on a line of its own")
    return section.sub(lambda _: table, text, count=1)
