"""The README's speed tables, from the stored results: `python -m benchmarks.table --write`; `--check`: current?"""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING

from benchmarks import quantile_table
from benchmarks.results import RESULTS, load

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.measure import Row

README = RESULTS.parent.parent / "README.md"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
NO_RESULTS = "No stored results yet: `make bench` makes them."
NO_GPU = "No GPU results yet: `bash benchmarks/gpu.sh` makes them on a machine that has one."
_COLUMNS = (
    "logits",
    "pass",
    "xentile",
    "`F.cross_entropy`",
    "over it",
    "over `torch.compile`",
    "of the roof",
    "peak memory",
    "error / eager's",
)


def render_table(folder: Path = RESULTS) -> str:
    """Markdown: for each device its headline cases, what the percentiles cost, and who could not be compared."""
    rows = load(folder)
    devices = list(dict.fromkeys(row["device"] for row in rows))
    parts = [_device([row for row in rows if row["device"] == device]) for device in devices] or [NO_RESULTS]
    if not any(row["kind"] == "cuda" for row in rows):
        parts.append(NO_GPU)
    return "\n\n".join(parts) + "\n"


def _device(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["status"] == "measured"]
    by_key = {(row["case"], row["provider"]): row for row in measured}
    lines = [_caption(rows), "", "| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for row in measured:
        if row["provider"] == "xentile" and "headline" in row["tags"]:
            lines.append("| " + " | ".join(_cells(row, by_key)) + " |")
    notes = [*_percentiles(measured), *_missing(rows)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _caption(rows: Sequence[Row]) -> str:
    newest = max(rows, key=lambda row: row["date"])
    versions = newest["versions"]
    commits = sorted({row["commit"] for row in rows})
    served = f", {newest['isa']} kernels" if newest["isa"] else ""
    return (
        f"**{newest['device']}**{served}, torch {versions['torch']}, {newest['date'][:10]},"
        f" commit {', '.join(commits)}. Medians of rounds in which every provider runs once; the roof is `copy_`"
        " (forward + backward) or a read (forward) of the same bytes in the same rounds; peak memory counts (N, V)"
        " tensors beyond the logits."
    )


def _cells(row: Row, by_key: dict[tuple[str, str], Row]) -> list[str]:
    eager = by_key.get((row["case"], "torch.eager"))
    over = row["speedup_over"]
    which = "gradient" if row["operation"] == "training" else "loss"
    return [
        f"{row['tokens']} x {row['vocab']} {row['dtype']}",
        "forward + backward" if row["operation"] == "training" else "forward",
        _milliseconds(row),
        _milliseconds(eager) if eager else "-",
        _times(over.get("torch.eager")),
        _times(over.get("torch.compile")),
        f"{100 * row['of_roof']['median']:.0f} %",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / row['logits_bytes']:.2f}",
        f"{row['errors'][which]:.1e} / {eager['errors'][which]:.1e}" if eager else f"{row['errors'][which]:.1e}",
    ]


def _milliseconds(row: Row) -> str:
    milliseconds = 1e3 * row["seconds"]["median"]
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def _times(speedup: dict[str, float] | None) -> str:
    return "-" if speedup is None else f"**{speedup['median']:.1f}x**"


def _percentiles(measured: Sequence[Row]) -> list[str]:
    costs = [row for row in measured if "cost_over_xentile" in row]
    if not costs:
        return []
    shown = "; ".join(
        f"{row['dtype']} {row['operation']} {_percent(cost['median'])}"
        f" [{_percent(cost['low'])}, {_percent(cost['high'])}]"
        for row in costs
        for cost in [row["cost_over_xentile"]]
    )
    return [f"Percentiles on against off, {costs[0]['tokens']} x {costs[0]['vocab']} (median, 95 % interval): {shown}."]


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.2f} %"


def _missing(rows: Sequence[Row]) -> list[str]:
    """Peers without any number on this device, with the reasons."""
    measured = {row["provider"] for row in rows if row["status"] == "measured"}
    reasons = {row["provider"]: row["reason"] for row in rows if row["provider"] not in measured}
    listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
    return ["", f"Not compared: {listed}."] if reasons else []


def current(text: str, folder: Path = RESULTS) -> str:
    """`text` with the part between the markers made anew; ValueError without them."""
    return _replaced(text, START, END, render_table(folder))


def current_readme(text: str) -> str:
    """`text` with both tables made anew."""
    return _replaced(current(text), quantile_table.START, quantile_table.END, quantile_table.render_table())


def _replaced(text: str, start: str, end: str, table: str) -> str:
    section = re.compile(f"(?<={start}\n).*?(?={end})", re.DOTALL)
    if not section.search(text):
        raise ValueError(f"README.md must hold {start} and {end}, each on a line of its own")
    return section.sub(lambda _: table, text, count=1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description="The README's speed tables.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="exit with 1 when README.md is stale")
    action.add_argument("--write", action="store_true", help="bring README.md up to date")
    options = parser.parse_args(argv)
    if not (options.check or options.write):
        print(render_table(), quantile_table.render_table(), sep="\n", end="")
        return 0
    text = README.read_text(encoding="utf-8")
    fresh = current_readme(text)
    if options.write:
        README.write_text(fresh, encoding="utf-8")
    elif fresh != text:
        print("README.md is stale: run python -m benchmarks.table --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
