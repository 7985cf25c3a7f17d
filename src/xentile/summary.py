"""Sketches and outputs as text for people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from xentile.distillation_output import DistillationOutput
    from xentile.output import CrossEntropyOutput
    from xentile.readout import Readout

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)


def sketch_summary(sketch: Readout) -> str:
    """A header, a line a group, and a remark for each kind of token that is not in the percentiles."""
    q = torch.tensor([p / 100 for p in PERCENTILES], dtype=torch.float64)
    one = sketch.groups == 1
    quantiles = sketch.quantile(q)
    columns = torch.cat([sketch.mean()[..., None], quantiles, sketch.max()[..., None]], -1).cpu()
    counts = sketch.count().cpu()
    if one:
        columns, counts = columns[None], counts[None]
    names = ["tokens", "mean", *(f"p{p}" for p in PERCENTILES), "max"]
    labels = [] if one else ["group"]
    lines = ["".join(f"{name:>10}" for name in labels + names)]
    for group, (n, row) in enumerate(zip(counts.tolist(), columns.tolist(), strict=True)):
        cells = ([] if one else [str(group)]) + [f"{n:,}"] + [_number(x) for x in row]
        lines.append("".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines + _remarks(sketch))


def output_summary(output: CrossEntropyOutput) -> str:
    """The sketch of this call, then accuracy, and entropy and rank where they were asked for."""
    lines = [sketch_summary(output.sketch())]
    live = output.predicted >= 0
    tokens, ignored, bad = int(live.sum()), int((output.predicted == -1).sum()), int(output.out_of_range)
    facts = [f"top-1 accuracy {100 * int(output.correct.sum()) / tokens:.2f} %" if tokens else "top-1 accuracy n/a"]
    if output.entropy is not None and tokens:
        entropy, loss = output.entropy[live].double().mean(), output.token_loss[live].double().mean()
        facts.append(f"entropy {_number(float(entropy))} (mean loss - entropy {_number(float(loss - entropy))})")
    if output.target_rank is not None and tokens:
        facts.append(f"median target rank {int(output.target_rank[live].median())}")
    lines.append(", ".join(facts))
    lines += [_tokens(n, what) for n, what in ((ignored, "ignored"), (bad, "with a target out of range")) if n]
    return "\n".join(lines)


def distillation_summary(output: DistillationOutput) -> str:
    """The divergences, the cross-entropies if there are any, and the mean masses on the support."""
    lines = ["divergence", sketch_summary(output.kd_sketch())]
    if output.token_loss is not None:
        lines += ["cross-entropy", sketch_summary(output.sketch())]
    masses = []
    for name, mass in (("teacher", output.teacher_mass), ("student", output.student_mass)):
        if mass is not None:
            counted = mass if output.counted is None else mass[output.counted]
            masses.append(f"{name} {_number(float(counted.double().mean()))}")
    if masses:
        lines.append(f"mean mass on the support: {', '.join(masses)}")
    return "\n".join(lines)


def _remarks(sketch: Readout) -> list[str]:
    kinds = (
        (sketch.ignored_count(), "ignored"),
        (sketch.nan_count(), "with a NaN loss"),
        (sketch.inf_count(), "with an infinite loss (in the percentiles)"),
        (sketch.out_of_range_count(), "with a target or a group out of range"),
    )
    return [_tokens(int(n.sum()), what) for n, what in kinds if int(n.sum())]


def _tokens(n: int, what: str) -> str:
    return f"{n:,} token{'' if n == 1 else 's'} {what}"


def _number(x: float) -> str:
    """Four significant digits; losses of a strong model span six decades."""
    return f"{x:.3e}" if x and math.isfinite(x) and abs(x) < 1e-3 else f"{x:.4g}"
