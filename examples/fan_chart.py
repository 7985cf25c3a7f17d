"""A fan chart: how the distribution of the per-token loss reshapes during training, and the mean that hides it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # draws to files only: works without a display

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

BLUE, RED, INK, GREY = "#1f5f99", "#c8442f", "#222222", "#666666"
BANDS = (("p1", "p99", 0.14), ("p10", "p90", 0.22), ("p25", "p75", 0.32))  # lower, upper, opacity
LABEL_GAP = 0.043  # smallest distance between two labels, of the height of the axes


def thousands(value: float, _: object = None) -> str:
    """2000 -> 2k, 1500000 -> 1.5M."""
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved apart until neighbours are `gap` from each other, without moving their centre."""
    placed: list[list[float]] = []  # clusters of heights whose labels would overlap
    for height in heights:
        placed.append([height])
        while len(placed) > 1 and _top(placed[-2], gap) + gap > _bottom(placed[-1], gap):
            cluster = placed.pop()
            placed[-1] += cluster
    return [_bottom(cluster, gap) + i * gap for cluster in placed for i in range(len(cluster))]


def _bottom(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _top(cluster: Sequence[float], gap: float) -> float:
    return sum(cluster) / len(cluster) + gap * (len(cluster) - 1) / 2


def draw(path: Path, tokens: Sequence[int], series: Mapping[str, Sequence[float]], title: str, subtitle: str) -> None:
    """Write the chart as a PNG. `series` holds "mean" and "p1" to "p99", in nats, one value for each of `tokens`."""
    with plt.rc_context({"font.size": 11, "axes.edgecolor": "#bbbbbb", "text.color": INK, "axes.labelcolor": GREY}):
        figure, axes = plt.subplots(figsize=(9.6, 5.2), layout="constrained")
        for lower, upper, opacity in BANDS:
            axes.fill_between(tokens, series[lower], series[upper], color=BLUE, alpha=opacity, linewidth=0)
            for edge in (lower, upper):
                axes.plot(tokens, series[edge], color="white", linewidth=0.9)
        axes.plot(tokens, series["p50"], color=BLUE, linewidth=2.4)
        axes.plot(tokens, series["mean"], color=RED, linewidth=2.4, linestyle=(0, (4, 1.5)))

        axes.set(xlim=(0, tokens[-1]), ylim=(0, None), xlabel="training tokens", ylabel="loss of a token (nats)")
        axes.xaxis.set_major_formatter(FuncFormatter(thousands))
        axes.tick_params(colors=GREY, length=0)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=30)
        axes.text(0, 1.03, subtitle, transform=axes.transAxes, color=GREY)
        label_line_ends(axes, tokens[-1], {name: values[-1] for name, values in series.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def label_line_ends(axes: Axes, x: float, ends: Mapping[str, float]) -> None:
    """Name each line at its right end, with its value, instead of a legend."""
    names = sorted(ends, key=lambda name: ends[name])
    gap = LABEL_GAP * (axes.get_ylim()[1] - axes.get_ylim()[0])
    for name, height in zip(names, spread([ends[name] for name in names], gap), strict=True):
        bold = "bold" if name in {"mean", "p50"} else "normal"
        axes.annotate(
            f"{'median' if name == 'p50' else name}  {ends[name]:.2f}",
            (x, height),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=10.5,
            fontweight=bold,
            color=RED if name == "mean" else BLUE,
            annotation_clip=False,
        )
