"""The stored costs of every kernel, and what counts as worse.

`python -m tests.static.baseline` measures anew, stores the result in baseline.json and prints the table.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import triton

from .cases import CASES, compile_case
from .measure import Cost, LoopCost, measure
from .table import table
from .targets import TARGETS

PATH = Path(__file__).with_name("baseline.json")
TOLERANCE = 1.05  # a few instructions come and go with any change of the source

Costs = dict[str, dict[str, dict[str, Cost]]]  # target -> case -> kernel


def measure_target(target: str) -> dict[str, dict[str, Cost]]:
    """Case -> kernel -> cost."""
    return {
        case.name: {
            name: measure(name, kernel, case.dtype.itemsize)
            for name, kernel in compile_case(case, TARGETS[target]).items()
        }
        for case in CASES
    }


@cache
def measure_all() -> Costs:
    """Compiled once a session, by a process for each processor."""
    workers = min(len(TARGETS), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(TARGETS, pool.map(measure_target, TARGETS), strict=True))


def regressions(before: dict[str, Any], now: dict[str, Any], what: str) -> list[str]:
    """What got worse by more than the tolerance, in words."""
    found = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict):
            found += regressions(old or {}, value, f"{what}, {name} loop") if old else [f"{what}: new {name} loop"]
        elif old is None:
            found.append(f"{what}: no stored {name}")
        elif name.endswith("width"):
            if value < old:
                found.append(f"{what}: {name} {value} bytes instead of {old}")
        elif value > old * TOLERANCE:
            found.append(f"{what}: {name} {value} instead of {old}")
    return found + [f"{what}: the {name} loop is gone" for name in before.keys() - now.keys()]


def load() -> dict[str, Any]:
    """What is stored: "triton", the version that compiled it, and "costs", target -> case -> kernel -> numbers."""
    stored: dict[str, Any] = json.loads(PATH.read_text())
    return stored


def hot_loop(kernels: dict[str, Cost], phase: str) -> LoopCost | None:
    """The loop of a phase ("reading" or "writing") in the kernel of a launch that has it."""
    return next((loop for cost in kernels.values() if (loop := getattr(cost, phase))), None)


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:  # the PTX tests leave kernels without machine code in the usual one
        os.environ["TRITON_CACHE_DIR"] = cache
        measured = measure_all()
    stored = {
        target: {case: {name: cost.as_json() for name, cost in kernels.items()} for case, kernels in by_case.items()}
        for target, by_case in measured.items()
    }
    PATH.write_text(json.dumps({"triton": triton.__version__, "costs": stored}, indent=1) + "\n")
    print(table(measured))


if __name__ == "__main__":
    main()
