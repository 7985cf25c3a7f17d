"""The speed tables of README.md and docs/distillation.md, from the stored results.

`python -m benchmarks.table --write` brings them up to date, `--check` says whether they are.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from benchmarks import distillation_table, quantile_table
from benchmarks.cases import CROSS_ENTROPY
from benchmarks.markdown import caption, grid, milliseconds, missing, peak, replaced, times
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
    rows = [row for row in load(folder) if row["operation"] in CROSS_ENTROPY]
    devices = list(dict.fromkeys(row["device"] for row in rows))
    parts = [_device([row for row in rows if row["device"] == device]) for device in devices] or [NO_RESULTS]
    if not any(row["kind"] == "cuda" for row in rows):
        parts.append(NO_GPU)
    return "\n\n".join(parts) + "\n"


def _device(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["status"] == "measured"]
    by_key = {(row["case"], row["provider"]): row for row in measured}
    headlines = [row for row in measured if row["provider"] == "xentile" and "headline" in row["tags"]]
    lines = [caption(rows), "", *grid(_COLUMNS, [_cells(row, by_key) for row in headlines])]
    notes = [*_percentiles(measured), *missing(rows)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _cells(row: Row, by_key: dict[tuple[str, str], Row]) -> list[str]:
    eager = by_key.get((row["case"], "torch.eager"))
    over = row["speedup_over"]
    which = "gradient" if row["operation"] == "training" else "loss"
    return [
        f"{row['tokens']} x {row['vocab']} {row['dtype']}",
        "forward + backward" if row["operation"] == "training" else "forward",
        milliseconds(row),
        milliseconds(eager),
        times(over.get("torch.eager")),
        times(over.get("torch.compile")),
        f"{100 * row['of_roof']['median']:.0f} %",
        peak(row),
        f"{row['errors'][which]:.1e} / {eager['errors'][which]:.1e}" if eager else f"{row['errors'][which]:.1e}",
    ]


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


def current(text: str, folder: Path = RESULTS) -> str:
    """`text` with the part between the markers made anew; ValueError without them."""
    return replaced(text, START, END, render_table(folder))


def current_readme(text: str) -> str:
    """README.md with both of its tables made anew."""
    return replaced(current(text), quantile_table.START, quantile_table.END, quantile_table.render_table())


def current_distillation(text: str) -> str:
    """docs/distillation.md with its table made anew."""
    table = distillation_table
    return replaced(text, table.START, table.END, table.render_table())


DOCUMENTS = {README: current_readme, distillation_table.DOCUMENT: current_distillation}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description="The tables of speed.")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="exit with 1 when a document is stale")
    action.add_argument("--write", action="store_true", help="bring the documents up to date")
    options = parser.parse_args(argv)
    if not (options.check or options.write):
        print(render_table(), quantile_table.render_table(), distillation_table.render_table(), sep="\n", end="")
        return 0
    stale = False
    for document, bring_up_to_date in DOCUMENTS.items():
        text = document.read_text(encoding="utf-8")
        fresh = bring_up_to_date(text)
        if options.write:
            document.write_text(fresh, encoding="utf-8")
        elif fresh != text:
            print(f"{document.name} is stale: run python -m benchmarks.table --write", file=sys.stderr)
            stale = True
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
