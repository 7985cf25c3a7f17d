"""The speed of percentiles against what is used today: `python -m benchmarks.quantile [--store]`.

Exact quantiles, sketch updates and read-outs, each beside its peer in one process: the two alternate, round by round,
and results are compared before anything is timed. Rows are printed with what is to be reached, and with --store
appended to benchmarks/results/percentiles/<device>.jsonl, from which `python -m benchmarks.table --write` makes the
README's table.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import xentile as xt
from benchmarks import results
from benchmarks.provenance import provenance, slug
from benchmarks.timing import Step, clock_for, interleave, ratio, spread
from xentile import _layout as layout
from xentile.reference import column_of
from xentile.reference import quantile as spec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.measure import Row

FIVE = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
NINE = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
FOLDER = results.RESULTS / "percentiles"
M = 1 << 20
FEW = 4096
"""Values of a quick run, at most."""


@dataclass(frozen=True)
class Comparison:
    """One row: how long ours takes, and either how many times as long the peer, or against a limit in seconds.

    `steps(n, device)` gives ours and the peer's, for n values.
    """

    operation: str
    values: int
    peer: str
    steps: Callable[[int, str], tuple[Step, Step | None]]
    goal: float | None
    rounds: int
    device: str = "cpu"
    package: str | None = None
    """What the peer needs to be installed."""

    @property
    def case(self) -> str:
        size = f"{self.values // M}M" if self.values >= M else f"{self.values:,}"
        return f"{self.operation}, {size} float32"


def losses(n: int, device: str = "cpu") -> Tensor:
    """Between those of a pretraining and of a fine-tuning: log-normal, over five decades, none above 64 nats."""
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).mul_(2).exp_().clamp_(max=64).to(device)


def exact_and_torch(n: int, device: str) -> tuple[Step, Step]:
    x, q = losses(n, device), FIVE.to(device)
    return lambda _: xt.quantile(x, q), lambda _: torch.quantile(x, q.float())


def exact_and_sort(n: int, device: str) -> tuple[Step, Step]:
    x, q = losses(n, device), FIVE.to(device)
    return lambda _: xt.quantile(x, q), lambda _: x.sort()


def exact_and_partition(n: int, device: str) -> tuple[Step, Step]:
    x = losses(n, device)
    lower, upper, _ = spec.ranks(FIVE, torch.tensor(n), "linear")
    ranks, values = torch.cat([lower, upper]).unique().numpy(), x.numpy()
    return lambda _: xt.quantile(x, FIVE), lambda _: np.partition(values, ranks)


def update_and_bincount(n: int, device: str) -> tuple[Step, Step]:
    """The bins are known beforehand: the peer has only to count."""
    x, sketch = losses(n, device), xt.LossSketch(device)
    bins = column_of(x).numpy()
    return lambda _: sketch.update(x), lambda _: np.bincount(bins, minlength=layout.DEFAULT.width)


def update_and_bins(n: int, device: str) -> tuple[Step, Step]:
    """The peer starts from the losses, as ours does."""
    x, sketch, bins = losses(n, device), xt.LossSketch(device), layout.DEFAULT
    values, last = x.numpy(), bins.bins + layout.SPECIAL - 1

    def peer(_: int) -> Any:
        column = (values.view(np.int32) >> bins.shift) - (bins.first_key - layout.SPECIAL)
        return np.bincount(np.clip(column, 0, last), minlength=bins.width)

    return lambda _: sketch.update(x), peer


def update_and_ddsketch(n: int, device: str) -> tuple[Step, Step]:
    import ddsketch  # optional

    x, sketch = losses(n, device), xt.LossSketch(device)
    values = x.tolist()

    def peer(_: int) -> Any:
        theirs = ddsketch.DDSketch(0.01)
        for value in values:
            theirs.add(value)
        return theirs

    return lambda _: sketch.update(x), peer


def update_alone(n: int, device: str) -> tuple[Step, None]:
    x, sketch = losses(n, device), xt.LossSketch(device)
    return lambda _: sketch.update(x), None


def read_out(n: int, device: str) -> tuple[Step, None]:
    sketch, q = xt.LossSketch(device), NINE.to(device)
    sketch.update(losses(n, device))
    return lambda _: sketch.quantile(q), None


EXACT, UPDATE, READ = "exact, 5 quantiles", "sketch update", "read-out of 9 quantiles"
COMPARISONS = (
    Comparison(EXACT, 1000, "`torch.quantile`", exact_and_torch, 1, 1001),
    Comparison(EXACT, 4 * M, "`torch.quantile`", exact_and_torch, 10, 9),
    Comparison(EXACT, 64 * M, "`np.partition` of the same ranks", exact_and_partition, 3, 5),
    Comparison(UPDATE, 4 * M, "`np.bincount` of the same bins, known beforehand", update_and_bincount, 5, 101),
    Comparison(UPDATE, 4 * M, "the bins and `np.bincount`", update_and_bins, None, 51),
    Comparison(UPDATE, 4 * M, "`ddsketch`", update_and_ddsketch, 200, 3, package="ddsketch"),
    Comparison(READ, 4 * M, "", read_out, 100e-6, 501),
    Comparison(UPDATE, 16 * M, "", update_alone, 45e-6, 101, "cuda"),
    Comparison(EXACT, 16 * M, "`torch.sort`", exact_and_sort, 8, 51, "cuda"),
)


def check(device: str) -> None:
    """Exact is NumPy's answer, and the sketch counts what NumPy counts: nothing is timed that is wrong."""
    x = losses(M, device)
    expected = torch.from_numpy(np.quantile(x.cpu().double().numpy(), FIVE)).float()
    if not torch.equal(xt.quantile(x, FIVE).cpu(), expected):
        raise AssertionError("xt.quantile is not np.quantile: nothing is timed")
    sketch = xt.LossSketch(device)
    sketch.update(x)
    counted = torch.bincount(column_of(x.cpu()), minlength=layout.DEFAULT.width)[layout.SPECIAL :]
    if not torch.equal(sketch.state[0, layout.SPECIAL :].cpu(), counted):
        raise AssertionError("the sketch does not count what bincount counts: nothing is timed")
    lower, upper = sketch.quantile_bounds(FIVE)
    if not bool(((lower.cpu() <= expected) & (expected <= upper.cpu())).all()):
        raise AssertionError("the sketch's bounds do not hold the quantiles: nothing is timed")


def measure(comparison: Comparison) -> Row:
    """One row, ready to be stored; with the reason if the peer is missing."""
    row: Row = {
        "case": comparison.case,
        "operation": comparison.operation,
        "provider": comparison.peer,
        "goal": comparison.goal,
        "values": comparison.values,
    }
    if comparison.package and importlib.util.find_spec(comparison.package) is None:
        return row | {"status": "missing", "reason": f"{comparison.package} is not installed"}
    ours, peer = comparison.steps(comparison.values, comparison.device)
    steps = {"ours": ours} | ({"peer": peer} if peer else {})
    seconds = interleave(steps, comparison.rounds, clock_for(comparison.device))
    row |= {"status": "measured", "reason": "", "seconds": asdict(spread(seconds["ours"]))}
    if peer:
        row["peer_seconds"] = asdict(spread(seconds["peer"]))
        row["times_as_long"] = asdict(ratio(seconds["peer"], seconds["ours"]))
    return row


def met(row: Row) -> bool | None:
    """Whether the goal is reached; None without a goal or without a number."""
    if row["goal"] is None or row["status"] != "measured":
        return None
    if "times_as_long" in row:
        return bool(row["times_as_long"]["median"] >= row["goal"])
    return bool(row["seconds"]["median"] <= row["goal"])


def line(row: Row) -> str:
    """One row for people."""
    if row["status"] != "measured":
        return f"{row['case']:<45} against {row['provider']}: {row['reason']}"
    text = f"{row['case']:<45} {1e3 * row['seconds']['median']:9.3f} ms"
    if "times_as_long" in row:
        times = row["times_as_long"]
        spread_ = f"{times['p20']:.1f} ... {times['p80']:.1f}"
        text += f", {row['provider']} takes {times['median']:.1f} times as long ({spread_})"
    if row["goal"] is not None:
        goal = f"{row['goal']:g}" if "times_as_long" in row else f"{1e3 * row['goal']:g} ms"
        text += f"; to reach {goal}: {'met' if met(row) else 'MISSED'}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantile", description="The speed of percentiles.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--store", action="store_true", help="append the rows to benchmarks/results/percentiles")
    parser.add_argument("--quick", action="store_true", help="few values, few rounds, nothing stored")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can see, there is none")
    if options.quick and options.store:
        parser.error("--quick measures nothing worth storing")
    check(options.device)
    record = provenance(options.device)
    print(*(f"{key}: {record[key]}" for key in ("device", "isa", "commit", "date")), sep="; ", flush=True)
    rows = []
    for comparison in COMPARISONS:
        if comparison.device != options.device:
            continue
        if options.quick:
            comparison = replace(comparison, values=min(comparison.values, FEW), rounds=3, goal=None)
        rows.append(record | measure(comparison))
        print(line(rows[-1]), flush=True)
    if options.store:
        path = FOLDER / f"{slug(record['device'])}.jsonl"
        results.append(path, rows)
        print(f"{len(rows)} rows in results/percentiles/{path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
