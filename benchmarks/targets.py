"""The speed that the issues ask for, as data, held against rows. Without its row a target is never met.

`python -m benchmarks.targets ROWS.jsonl TAG` prints the targets of a tag, from the rows of a run that may have been cut
short.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import results
from benchmarks.cases import VOCABULARIES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.measure import Row


@dataclass(frozen=True)
class Target:
    text: str
    case: str
    provider: str
    value: Callable[[Row], float | None]
    goal: float
    unit: str
    at_most: bool = False

    def met(self, value: float | None) -> bool:
        return value is not None and (value <= self.goal if self.at_most else value >= self.goal)


def _speedup(peer: str) -> Callable[[Row], float | None]:
    return lambda row: row["speedup_over"].get(peer, {}).get("median")


def _of_roof(row: Row) -> float | None:
    return 100 * float(row["of_roof"]["median"])


def _of_copy(row: Row) -> float:
    """Also of an operation that only reads: issue 5 holds every one against the copy."""
    return 100 * float(row["bytes_per_second"]) / float(row["roofs"]["copy"])


def _milliseconds(row: Row) -> float:
    return 1e3 * float(row["seconds"]["median"])


def _peak(row: Row) -> float | None:
    return None if row["peak_bytes"] is None else row["peak_bytes"] / row["logits_bytes"]


def _percentiles(row: Row) -> float | None:
    return 100 * (row["cost_over_xentile"]["median"] - 1) if "cost_over_xentile" in row else None


def _over_cross_entropy(row: Row) -> float | None:
    """Each with a new gradient, or each with the gradient over the logits."""
    return next((cost["median"] for cost in row["cost_over"].values()), None)


def _headline(dtype: str, eager: float, compiled: float, copy: float) -> list[Target]:
    case = f"llama3-8b/1024/{dtype}/training"
    what = f"{dtype}, forward + backward, 1024 x 128256"
    return [
        Target(f"{what}: against F.cross_entropy", case, "xentile", _speedup("torch.eager"), eager, "x"),
        Target(f"{what}: against torch.compile", case, "xentile", _speedup("torch.compile"), compiled, "x"),
        Target(f"{what}: of copy_", case, "xentile", _of_roof, copy, "%"),
        Target(f"{what}, inplace=True: of copy_", case, "xentile+inplace", _of_roof, copy, "%"),
        Target(f"{what}, memory kept mapped: of copy_", case + "+retained", "xentile", _of_roof, copy, "%"),
    ]


def _small(model: str, tokens: int, vocab: int) -> list[Target]:
    return [
        Target(
            f"{dtype}, {operation}, {tokens} x {vocab}: against F.cross_entropy",
            f"{model}/{tokens}/{dtype}/{operation}",
            "xentile",
            _speedup("torch.eager"),
            4.0,
            "x",
        )
        for dtype in ("float32", "bfloat16")
        for operation in ("training", "forward")
    ]


def _cost_of_percentiles(dtypes: str, tokens: int, goal: float) -> list[Target]:
    return [
        Target(
            f"{dtype}, {operation}, {tokens} x 128256: percentiles on against off",
            f"llama3-8b/{tokens}/{dtype}/{operation}",
            "xentile+sketch",
            _percentiles,
            goal,
            "%",
            at_most=True,
        )
        for dtype in dtypes.split()
        for operation in ("training", "forward")
    ]


_FP32 = "llama3-8b/1024/float32"
_CROSS_ENTROPY: tuple[Target, ...] = (
    *_headline("float32", 9.0, 4.5, 65.0),
    *_headline("bfloat16", 15.0, 6.0, 40.0),
    Target("float32, forward, 1024 x 128256: of read bandwidth", f"{_FP32}/forward", "xentile", _of_roof, 70.0, "%"),
    *_small("llama2-7b", 2048, 32000),
    *_small("resnet50", 32768, 1000),
    *_cost_of_percentiles("float32 bfloat16", 1024, 1.0),
    Target("peak memory of a training step, in (N, V) tensors", f"{_FP32}/training", "xentile", _peak, 1.02, "", True),
    Target("the same with inplace=True", f"{_FP32}/training", "xentile+inplace", _peak, 0.02, "", True),
)


def _topk(options: str, what: str) -> list[Target]:
    case = f"llama3-8b/1024/float32/topk_distillation/{options}"
    mapped = case + "+retained"
    return [
        Target(f"{what}: against plain PyTorch", case, "xentile", _speedup("torch.eager"), 8.0, "x"),
        Target(f"{what}: time over xt.cross_entropy", case, "xentile", _over_cross_entropy, 1.25, "x", True),
        Target(f"{what}, memory kept mapped: the same", mapped, "xentile", _over_cross_entropy, 1.25, "x", True),
        Target(f"{what}, inplace=True both: the same", case, "xentile+inplace", _over_cross_entropy, 1.25, "x", True),
        Target(f"{what}: peak memory in (N, V) tensors", case, "xentile", _peak, 1.02, "", True),
        Target(f"{what}, inplace=True: peak memory", case, "xentile+inplace", _peak, 0.02, "", True),
    ]


_DISTILLATION: tuple[Target, ...] = (
    *_topk("truncated,K=64", "top-K, truncated"),
    *_topk("tail_bucket,K=64", "top-K, tail bucket"),
    *_topk("tail_bucket,K=64,T=2,ce=0.5", "top-K, tail bucket, T = 2, with CE"),
    *(
        Target(
            f"teacher_topk, {dtype}: against torch.topk + torch.logsumexp",
            f"llama3-8b/1024/{dtype}/teacher_topk/K=64",
            "xentile",
            _speedup("torch.eager"),
            4.0,
            "x",
        )
        for dtype in ("float32", "bfloat16")
    ),
)


def _on_gpu(models: str, tokens: int, operation: str, goal: float) -> list[Target]:
    """Of the bandwidth of a copy in the same rounds."""
    return [
        Target(
            f"bfloat16, {operation}, {tokens} x {VOCABULARIES[model]}: of copy_",
            f"{model}/{tokens}/bfloat16/{operation}",
            "xentile",
            _of_copy,
            goal,
            "%",
        )
        for model in models.split()
    ]


_H100 = "llama3-8b/8192/bfloat16"
_GPU: tuple[Target, ...] = (
    *_on_gpu("llama2-7b gpt2 llama3-8b qwen3-8b gemma3-1b", 8192, "forward", 92.0),
    *_on_gpu("llama2-7b gpt2 llama3-8b", 8192, "training", 88.0),
    Target("bfloat16, training, 8192 x 128256", f"{_H100}/training", "xentile", _milliseconds, 1.45, " ms", True),
    *(
        target
        for operation in ("forward", "training")
        for target in (
            *_on_gpu("resnet50 llama2c-tok4096", 65536, operation, 80.0),
            *_on_gpu("gemma3-1b", 64, operation, 60.0),
        )
    ),
    *_cost_of_percentiles("bfloat16 float32", 8192, 0.5),
    *(
        Target(
            f"top-K distillation, {options}: time over xt.cross_entropy",
            f"{_H100}/topk_distillation/{options}",
            "xentile",
            _over_cross_entropy,
            1.15,
            "x",
            at_most=True,
        )
        for options in ("truncated,K=64", "tail_bucket,K=64", "tail_bucket,K=64,T=2,ce=0.5")
    ),
)
TARGETS: dict[str, tuple[Target, ...]] = {"issue2": _CROSS_ENTROPY, "issue4": _DISTILLATION, "gpu": _GPU}
"""By the tag of the cases that measure them; "gpu" are issue 5's of an H100. Those of percentiles alone stand beside
their measurement in quantile.py.
"""


def report(issue: str, rows: Sequence[Row]) -> str:
    """One line a target: what was asked, what was measured, whether it is met."""
    measured = {(row["case"], row["provider"]): row for row in rows if row["status"] == "measured"}
    width = max(len(t.text) for t in TARGETS[issue])
    lines = []
    for target in TARGETS[issue]:
        row = measured.get((target.case, target.provider))
        value = None if row is None else target.value(row)
        shown = "not measured" if value is None else f"{value:.2f}{target.unit}"
        goal = f"{'<=' if target.at_most else '>='} {target.goal:g}{target.unit}"
        verdict = "met" if target.met(value) else "MISSED" if value is not None else "-"
        lines.append(f"{target.text:<{width}}  {shown:>12}  {goal:>9}  {verdict}")
    return "\n".join(lines)


def main(path: str, tag: str) -> None:
    print(report(tag, results.rows_of(Path(path))))


if __name__ == "__main__":
    main(*sys.argv[1:])
