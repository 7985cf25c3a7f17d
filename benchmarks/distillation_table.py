"""The table of the speed of distillation, for docs/distillation.md, from the stored results; written by table.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.cases import DISTILLATION, WITH_GRADIENT
from benchmarks.markdown import caption, grid, milliseconds, missing, peak, times
from benchmarks.results import RESULTS, load

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.measure import Row

DOCUMENT = RESULTS.parent.parent / "docs" / "distillation.md"
START, END = "<!-- speed:start -->", "<!-- speed:end -->"
NO_RESULTS = "No stored results yet: `python -m benchmarks.run --cases issue4` makes them."
NO_GPU = "No GPU results yet: `bash benchmarks/gpu.sh` makes them on a machine that has one."
_TITLES = {
    "topk_distillation": "`topk_distillation_loss`",
    "distillation": "`distillation_loss`",
    "teacher_topk": "`teacher_topk`",
}
_COLUMNS = (
    "",
    "logits",
    "xentile",
    "plain PyTorch",
    "over it",
    "over `torch.compile`",
    "time of `xt.cross_entropy`",
    "of the roof",
    "peak memory",
    "error / plain PyTorch's",
)


def render_table(folder: Path = RESULTS) -> str:
    """Markdown: for each device a line for every case, and who could not be compared."""
    rows = [row for row in load(folder) if row["operation"] in DISTILLATION]
    devices = list(dict.fromkeys(row["device"] for row in rows))
    parts = [_device([row for row in rows if row["device"] == device]) for device in devices] or [NO_RESULTS]
    if not any(row["kind"] == "cuda" for row in rows):
        parts.append(NO_GPU)
    return "\n\n".join(parts) + "\n"


def _device(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["status"] == "measured"]
    eager = {row["case"]: row for row in measured if row["provider"] == "torch.eager"}
    lines = [_cells(row, eager.get(row["case"])) for row in measured if row["provider"] == "xentile"]
    notes = [note for operation in DISTILLATION for note in _not_compared(rows, operation)]
    return "\n".join([caption(rows), "", *grid(_COLUMNS, lines), *notes])


def _not_compared(rows: Sequence[Row], operation: str) -> list[str]:
    """By operation: a peer may have one of the losses and not the other."""
    blank, *listed = missing([row for row in rows if row["operation"] == operation]) or [""]
    return [blank, *(f"{_TITLES[operation]}: {line[0].lower()}{line[1:]}" for line in listed)] if listed else []


def _cells(row: Row, eager: Row | None) -> list[str]:
    over = row["speedup_over"]
    by = row["cost_over"].get("xentile.cross_entropy")
    which = "gradient" if row["operation"] in WITH_GRADIENT else "loss"
    mapped = ", memory kept mapped" if row["allocator"] == "retained" else ""
    return [
        f"{_TITLES[row['operation']]} {row['options'].replace(',', ', ')}".rstrip() + mapped,
        f"{row['tokens']} x {row['vocab']} {row['dtype']}",
        milliseconds(row),
        milliseconds(eager),
        times(over.get("torch.eager")),
        times(over.get("torch.compile")),
        f"{by['median']:.2f}x" if by else "-",
        f"{100 * row['of_roof']['median']:.0f} %",
        peak(row),
        f"{row['errors'][which]:.1e} / {eager['errors'][which]:.1e}" if eager else f"{row['errors'][which]:.1e}",
    ]
