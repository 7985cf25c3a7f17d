"""The stored costs of every kernel, and what counts as worse.

A kernel whose source, options and compiler are those of the stored numbers has these numbers, and is not compiled
again. `python -m tests.static.baseline` compiles what changed, says what got worse, and stores all numbers unless
something did; with --accept it stores them anyway, with --all it compiles everything.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton

from .cases import CASES
from .launches import compile_case
from .measure import Cost, measure
from .table import table
from .targets import TARGETS

if TYPE_CHECKING:
    from .cases import Case
    from .measure import LoopCost

FOLDER = Path(__file__).parent
PATH = FOLDER / "baseline.json"
TOLERANCE = 1.05  # a few instructions come and go with any change of the source

Costs = dict[str, dict[str, dict[str, Cost]]]  # target -> case -> kernel


def method() -> dict[str, str]:
    """Who compiled and who counted: numbers of others are not compared with these."""
    counters = b"".join((FOLDER / name).read_bytes() for name in ("machine_code.py", "measure.py"))
    return {"triton": triton.__version__, "counters": hashlib.sha256(counters).hexdigest()[:16]}


@cache
def load() -> dict[str, Any]:
    """What is stored: the `method`, and "costs", target -> case -> kernel -> numbers."""
    stored: dict[str, Any] = json.loads(PATH.read_text())
    return stored


def by_source(stored: dict[str, Any], target: str) -> dict[str, Cost]:
    """The stored costs of a target by what was compiled; nothing if it was another Triton that did."""
    if any(stored[name] != value for name, value in method().items()):
        return {}
    cases = stored["costs"].get(target, {}).values()
    return {cost["source"]: Cost.from_json(cost) for kernels in cases for cost in kernels.values()}


def measure_case(case: Case, target: str, known: dict[str, Cost]) -> dict[str, Cost]:
    """Kernel -> cost of one launch; known: of what need not be compiled."""
    return {
        name: known[launch.source]
        if launch.kernel is None
        else measure(name, launch, case.dtype.itemsize, streams=case.streams)
        for name, launch in compile_case(case, TARGETS[target], known).items()
    }


def measure_target(target: str, stored: dict[str, Any]) -> dict[str, dict[str, Cost]]:
    """Case -> kernel -> cost."""
    known = by_source(stored, target)
    return {case.name: measure_case(case, target, known) for case in CASES}


def measure_all(stored: dict[str, Any]) -> Costs:
    """By a process for each processor."""
    workers = min(len(TARGETS), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        measured = pool.map(measure_target, TARGETS, [stored] * len(TARGETS))
        return dict(zip(TARGETS, measured, strict=True))


@cache
def measured() -> Costs:
    """The costs of the present kernels, once a session."""
    return measure_all(load())


def regressions(before: dict[str, Any], now: dict[str, Any], what: str) -> list[str]:
    """What got worse by more than the tolerance, in words. before, now: costs of a kernel or a loop, as JSON."""
    found = []
    for name, value in now.items():
        old = before.get(name)
        if old is None:
            found.append(f"{what}: no stored {name}")
        elif isinstance(value, list):
            if len(old) != len(value):
                found.append(f"{what}: {len(value)} {name} loops instead of {len(old)}")
            for one, other in zip(old, value, strict=False):
                found += regressions(one, other, f"{what}, {name} loop")
        elif name.endswith("width"):
            if value < old:
                found.append(f"{what}: {name} {value} bytes instead of {old}")
        elif name != "source" and value > old * TOLERANCE:
            found.append(f"{what}: {name} {value} instead of {old}")
    return found


def compare(stored: dict[str, Any], case: Case, target: str, costs: dict[str, Cost]) -> list[str]:
    """What of a launch is worse than what is stored, or was not stored."""
    before = stored["costs"].get(target, {}).get(case.name, {})
    found = [f"{name} for {target} in {case.name}: gone" for name in before.keys() - costs.keys()]
    for name, cost in costs.items():
        what = f"{name} for {target} in {case.name}"
        found += regressions(before[name], cost.as_json(), what) if name in before else [f"{what}: not stored"]
    return found


def hot_loops(kernels: dict[str, Cost], phase: str) -> list[LoopCost]:
    """The loops of a phase ("reading" or "writing") in all kernels of a launch."""
    return [loop for cost in kernels.values() for loop in getattr(cost, phase)]


def _write(costs: Costs) -> None:
    """A line for each kernel, so that a change shows as one."""
    lines = [
        f'  "{target}": {{\n'
        + ",\n".join(
            f'   "{case}": {{\n'
            + ",\n".join(f'    "{name}": {json.dumps(cost.as_json())}' for name, cost in kernels.items())
            + "\n   }"
            for case, kernels in cases.items()
        )
        + "\n  }"
        for target, cases in costs.items()
    ]
    head = "".join(f' "{name}": "{value}",\n' for name, value in method().items())
    PATH.write_text("{\n" + head + ' "costs": {\n' + ",\n".join(lines) + "\n }\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the kernels that changed, and store their costs.")
    parser.add_argument("--all", action="store_true", help="compile every kernel")
    parser.add_argument("--accept", action="store_true", help="store also what got worse")
    options = parser.parse_args()
    stored = load()
    costs = measure_all({**stored, "triton": ""} if options.all else stored)
    print(table(costs))
    worse = [
        line
        for case in CASES
        for target in TARGETS
        if case.name in stored["costs"].get(target, {})
        for line in compare(stored, case, target, costs[target][case.name])
    ]
    print(*worse, sep="\n")
    if worse and not options.accept:
        sys.exit("Nothing was stored.")
    _write(costs)


if __name__ == "__main__":
    main()
