"""The speed figure, drawn from the stored results: `python -m benchmarks.plot` writes benchmarks/results/speed.png.

The figure carries a digest of what it shows, so that a test can tell whether it is current.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from benchmarks.results import RESULTS, load

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.measure import Row

FIGURE = "speed.png"
BARS = {"xentile": "#2a6fdb", "torch.compile": "#8a8f98", "torch.eager": "#c9ccd1"}


def shown(folder: Path = RESULTS) -> list[Row]:
    """The rows in the figure: headline cases with gradients, of the providers that have a bar."""
    rows = (row for row in load(folder) if row["status"] == "measured" and row["provider"] in BARS)
    return [row for row in rows if "headline" in row["tags"] and row["operation"] == "training"]


def digest(rows: Sequence[Row]) -> str:
    values = [[row["device"], row["case"], row["provider"], row["of_roof"]["median"]] for row in rows]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def is_current(folder: Path = RESULTS) -> bool:
    """Whether the stored figure shows the stored results; no results need no figure."""
    from PIL import Image  # comes with matplotlib

    rows = shown(folder)
    if not rows:
        return not (folder / FIGURE).exists()
    if not (folder / FIGURE).exists():
        return False
    with Image.open(folder / FIGURE) as image:
        return bool(image.info.get("Results") == digest(rows))


def draw(folder: Path = RESULTS) -> Path | None:
    """One panel a device: loss and gradient as a fraction of copy_ of the same bytes. None without results."""
    import matplotlib  # the one module that needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = shown(folder)
    if not rows:
        return None
    devices = list(dict.fromkeys(row["device"] for row in rows))
    figure, panels = pyplot.subplots(len(devices), squeeze=False, figsize=(9, 3.4 * len(devices)), layout="constrained")
    for axes, device in zip(panels[:, 0], devices, strict=True):
        _panel(axes, device, [row for row in rows if row["device"] == device])
    path = folder / FIGURE
    figure.savefig(path, dpi=150, metadata={"Results": digest(rows), "Software": None})
    pyplot.close(figure)
    return path


def _panel(axes, device: str, rows: Sequence[Row]) -> None:  # type: ignore[no-untyped-def]  # matplotlib may be absent
    cases = list(dict.fromkeys(row["case"] for row in rows))
    of_roof = {(row["case"], row["provider"]): 100 * row["of_roof"]["median"] for row in rows}
    width = 0.8 / len(BARS)
    for k, (provider, colour) in enumerate(BARS.items()):
        heights = [of_roof.get((case, provider), 0.0) for case in cases]
        bars = axes.bar([i + (k - 1) * width for i in range(len(cases))], heights, width, label=provider, color=colour)
        axes.bar_label(bars, labels=[f"{h:.0f}" if h else "" for h in heights], fontsize=8)
    labels = {row["case"]: f"{row['tokens']} x {row['vocab']}\n{row['dtype']}" for row in rows}
    axes.set_xticks(range(len(cases)), [labels[case] for case in cases], fontsize=8)
    axes.set_ylabel("% of copy_ of the same bytes")
    axes.set_title(f"Loss and gradient, {device}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, 1.15 * max(100.0, *of_roof.values()))  # room for the legend
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=len(BARS))


if __name__ == "__main__":
    print(draw() or "no stored results to draw")
