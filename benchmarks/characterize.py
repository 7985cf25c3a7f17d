"""Measured against promised error of quantile sketches on losses: `python -m benchmarks.characterize`.

Every sketch counts the same values of each named distribution on one thread, and answers ten quantiles. Then there is a
table of largest errors, and one of promises, bytes and time. Packages that are missing are listed with the reason.

The error of an answer is how far it is from the nearest value that is a quantile by some convention (the values of rank
floor(qn) to ceil(qn) + 1), relative to that; a difference of up to 2**-24 nats counts as none.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.provenance import REPOSITORY, provenance, slug
from benchmarks.results import RESULTS, append
from benchmarks.sketches import Contender, contenders
from benchmarks.token_losses import STORED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.sketches import Values

    Row = dict[str, Any]

Q = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
VALUES = 200_000
NOTHING = 2.0**-24
ROUNDING = 2.0**-23  # answers are float32
REAL = "token losses of a model"
FOLDER = "characterize"  # in results, whose own *.jsonl are those of run.py


def distributions(n: int) -> dict[str, Values]:
    """Those that the tests hold the sketch to, and real losses: name to at most n float32 values."""
    path = REPOSITORY / "tests" / "distributions.py"
    spec = importlib.util.spec_from_file_location("named_distributions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = {name: make(n).numpy() for name, make in module.DISTRIBUTIONS.items()}
    return {REAL: np.load(STORED)[:n], **values}


def largest_error(values: Values, answers: Sequence[float], quantiles: Sequence[float] = Q) -> float:
    """The largest relative error of the answers, as the head of this file says; inf for a NaN."""
    ordered = np.sort(values).astype(np.float64)
    n = len(ordered)
    errors = []
    for q, answer in zip(quantiles, answers, strict=True):
        low = ordered[max(math.floor(q * n) - 1, 0)]
        high = ordered[min(math.ceil(q * n), n - 1)]
        nearest = min(max(answer, low), high)
        distance = abs(answer - nearest)
        errors.append(0.0 if distance <= NOTHING else distance / max(nearest, NOTHING))
    return max(math.inf if math.isnan(error) else error for error in errors)


def measure(contender: Contender, name: str, values: Values, seconds: float) -> Row:
    """One row: the error of a contender on a distribution, its bytes, and its time a value, the best of some runs."""
    prepared = contender.prepare(values)
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < 50):
        start = time.perf_counter()
        sketch = contender.count(prepared)
        times.append(time.perf_counter() - start)
    answers = contender.quantiles(sketch, Q)
    return {
        "distribution": name,
        "values": len(values),
        "sketch": contender.name,
        "package": contender.package,
        "promise": contender.promise,
        "quantiles": list(Q),
        "answers": answers,
        "largest_error": largest_error(values, answers),
        "bytes": contender.size(sketch),
        "ns_per_value": 1e9 * min(times) / len(values),
    }


def kept(row: Row) -> bool:
    """Whether the error is within the promise; nothing promised is nothing broken."""
    return row["promise"] is None or row["largest_error"] <= row["promise"] * (1 + ROUNDING) + ROUNDING


def error_table(rows: Sequence[Row]) -> str:
    """A line a distribution, a column a sketch: largest relative errors, and the promises."""
    names, sketches = (list(dict.fromkeys(row[key] for row in rows)) for key in ("distribution", "sketch"))
    cell = {(row["distribution"], row["sketch"]): row for row in rows}
    promises = {row["sketch"]: row["promise"] for row in rows}
    heads = [_heading(sketch) for sketch in sketches]
    lines = [["", *(head[0] for head in heads)], ["distribution", *(head[1] for head in heads)]]
    for name in names:
        shown = (cell[name, sketch] for sketch in sketches)
        lines.append([name, *(_number(row["largest_error"]) + ("" if kept(row) else "!") for row in shown)])
    lines.append(["promised", *("-" if promises[sketch] is None else _number(promises[sketch]) for sketch in sketches)])
    return _aligned(lines)


def cost_table(rows: Sequence[Row], found: Sequence[Contender]) -> str:
    """A line a sketch: what it promises, the largest error anywhere, the most bytes, the median time a value."""
    lines = [["sketch", "package", "promises", "measured", "bytes", "ns a value"]]
    for contender in found:
        own = [row for row in rows if row["sketch"] == contender.name]
        promise = contender.remark if contender.promise is None else f"value {100 * contender.promise:.2g} %"
        nanoseconds = statistics.median(row["ns_per_value"] for row in own if row["values"] > 1)
        worst = max(row["largest_error"] for row in own)
        size = max(row["bytes"] for row in own)
        cells = [contender.name, contender.package, promise, _number(worst), f"{size:,}", f"{nanoseconds:,.1f}"]
        lines.append(cells)
    return _aligned(lines, left=3)


def _heading(name: str) -> tuple[str, str]:
    first, _, second = name.partition(" ")
    return first, second


def _number(error: float) -> str:
    return "0" if error == 0 else f"{error:.1e}"


def _aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and store on request; 1 if xentile broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.characterize", description=main.__doc__)
    parser.add_argument("--values", type=int, default=VALUES, help="of each distribution (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.05, help="to repeat each measurement for, once at least")
    parser.add_argument("--store", action="store_true", help="write the rows to benchmarks/results/characterize")
    options = parser.parse_args(argv)
    if options.values < 1:
        parser.error(f"argument --values: must be at least 1, got {options.values}")
    return on_one_thread(lambda: report(options.values, options.seconds, options.store))


def on_one_thread(run: Callable[[], int]) -> int:
    """The other packages have one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return run()
    finally:
        torch.set_num_threads(threads)


def report(n: int, seconds: float, store: bool) -> int:
    """Print both tables; 1 if xentile broke a promise."""
    record = provenance("cpu")
    found, missing = contenders()
    shown = {key: record[key] for key in ("device", "isa", "commit", "date")}
    print(*(f"{key}: {value}" for key, value in shown.items()), sep="; ", flush=True)
    rows = [
        measure(contender, name, values, seconds) | record
        for name, values in distributions(n).items()
        for contender in found
    ]
    print(f"\nLargest relative error of the quantiles {', '.join(map(str, Q))}; ! is more than promised\n")
    print(error_table(rows))
    print("\nLargest error and bytes over all distributions, median time of an update\n")
    print(cost_table(rows, found))
    for package, reason in missing.items():
        print(f"\nnot compared: {package} ({reason})")
    if store:
        path = RESULTS / FOLDER / f"{slug(record['device'])}.jsonl"
        path.unlink(missing_ok=True)  # the rows of a file are those of one run
        append(path, rows)
        print(f"\n{len(rows)} rows in results/characterize/{path.name}")
    broken = [row for row in rows if row["sketch"].startswith("xentile") and not kept(row)]
    for row in broken:
        print(
            f"{row['sketch']} on {row['distribution']}: {row['largest_error']}, promised {row['promise']}",
            file=sys.stderr,
        )
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
