"""What limits the CPU kernels where they miss a target, by counts: `python -m benchmarks.limits [--store]`.

A time on a virtual machine says little about its cause; counts do not depend on the hour. Here: page faults of a
training step, with and without the memory that xentile keeps; instructions of the kernels under callgrind; and the time
of the same kernels with their data in the first cache, which no memory can beat. Needs g++ and valgrind.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import xentile as xt
from benchmarks import markdown
from benchmarks.provenance import REPOSITORY, provenance
from benchmarks.results import RESULTS
from tests.native import instructions

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, COLUMNS = 1024, 128256
VALUES = 1 << 22
IN_CACHE = 2048  # columns: a block, with its exponentials and its gradient
DTYPES = ("float32", "bfloat16")
PATH = RESULTS / "limits.md"


def faults(step: Callable[[], object], steps: int = 5) -> int:
    """Page faults of one step, the median of some after the first."""
    counts = []
    for _ in range(steps + 1):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return int(statistics.median(counts[1:]))


def training_faults(dtype: str) -> dict[str, int]:
    """Of this process: the environment says whether memory is kept."""
    logits = torch.randn(ROWS, COLUMNS).to(getattr(torch, dtype)).requires_grad_()
    target = torch.randint(0, COLUMNS, (ROWS,))

    def step(loss: Callable[[], torch.Tensor]) -> None:
        logits.grad = None
        loss().backward()

    return {
        "xentile": faults(lambda: step(lambda: xt.cross_entropy(logits, target).loss)),
        "eager": faults(lambda: step(lambda: F.cross_entropy(logits, target))),
    }


def in_another_process(dtype: str, *, keep: bool) -> dict[str, int]:
    """Page faults where the memory of gradients is kept, or not."""
    command = [sys.executable, "-m", "benchmarks.limits", "--faults", dtype]
    environment = os.environ | {"XENTILE_KEEP_MEMORY": str(int(keep))}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=REPOSITORY)
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def per_element(run: Callable[[int], float], few: int, many: int, columns: int) -> float:
    """What an element costs: the difference of two runs, without what both do besides."""
    return (run(many) - run(few)) / (many - few) / columns


def seconds(command: list[str]) -> float:
    """The fastest of some runs."""

    def once() -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    return min(once() for _ in range(7))


def kernel(driver: str, phase: str, dtype: str) -> tuple[float, float]:
    """Instructions and nanoseconds for each logit (or value), with the data of a row in the first cache."""

    def counted(rows: int) -> float:
        return instructions.executed(driver, phase, dtype, IN_CACHE, rows)

    def timed(rows: int) -> float:
        return 1e9 * seconds([driver, phase, dtype, str(IN_CACHE), str(rows)])

    return per_element(counted, 1, 5, IN_CACHE), per_element(timed, 10_000, 60_000, IN_CACHE)


def bincount_instructions() -> float:
    """For each value that NumPy counts, of bins that are known."""

    def counted(calls: int) -> float:
        script = f"import numpy as np; x = np.arange({1 << 16}) % 4096\nfor _ in range({calls}): np.bincount(x)"
        return instructions.executed(sys.executable, "-c", script)

    return per_element(counted, 1, 401, 1 << 16)  # the start of Python varies by a million


def training_table(driver: str, threads: int) -> list[str]:
    lines = []
    for dtype in DTYPES:
        kept, fresh = (in_another_process(dtype, keep=keep) for keep in (True, False))
        count, nanoseconds = kernel(driver, "fused", dtype)
        bound = ROWS * COLUMNS * nanoseconds / threads / 1e6
        lines.append(
            (
                f"{dtype}",
                f"{kept['xentile']:,}",
                f"{fresh['xentile']:,}",
                f"{kept['eager']:,}",
                f"{count:.2f}",
                f"{nanoseconds:.3f} ns",
                f"{bound:.1f} ms",
            )
        )
    head = ("logits", "page faults", "if nothing is kept", "of `F.cross_entropy`", "instructions a logit")
    return markdown.grid((*head, "time a logit in cache", f"hence {threads} threads at best"), lines)


def counting_table(driver: str, threads: int) -> list[str]:
    count, nanoseconds = kernel(driver, "count", "float32")
    head = ("instructions a value", "of `np.bincount`", "time a value in cache", f"hence {threads} threads at best")
    bound = f"{VALUES * nanoseconds / threads / 1e6:.2f} ms"
    return markdown.grid(head, [(f"{count:.2f}", f"{bincount_instructions():.2f}", f"{nanoseconds:.3f} ns", bound)])


def report() -> str:
    """The Markdown text."""
    where: dict[str, Any] = provenance("cpu")
    with tempfile.TemporaryDirectory() as folder:
        driver = instructions.build(folder)
        training = training_table(driver, where["threads"])
        counting = counting_table(driver, where["threads"])
    lines = [
        "# Limits, by counts",
        "",
        f"Made by `python -m benchmarks.limits --store` on {where['device']}, torch {where['versions']['torch']}, "
        f"commit {where['commit']}, {where['date'][:10]}. AVX2 kernels; instructions by callgrind.",
        "",
        f"Forward + backward, {ROWS} x {COLUMNS}. The last column is the time of the step if memory cost nothing.",
        "",
        *training,
        "",
        f"Sketch update of {VALUES:,} values, with exact sums and extremes; `np.bincount` counts only.",
        "",
        *counting,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the report, and keep it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="write benchmarks/results/limits.md")
    parser.add_argument("--faults", choices=DTYPES, help="print the page faults of this process as JSON, no more")
    arguments = parser.parse_args()
    if arguments.faults:
        print(json.dumps(training_faults(arguments.faults)))
        return 0
    text = report()
    print(text, end="")
    if arguments.store:
        PATH.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
