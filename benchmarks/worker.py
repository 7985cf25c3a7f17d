"""One side of benchmarks/compare.py: `python -m benchmarks.worker PACKAGE THREADS` answers requests on standard input.

{"case": {field: value}} makes inputs and takes one step; {"run": i} takes one on input set i. The answer is a line:
{"seconds": s}, of that step, or {"cannot": reason} if this side's xentile has no such function or fails in it.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory
from benchmarks.cases import Case
from benchmarks.inputs import make_inputs
from benchmarks.providers import build, named
from benchmarks.step import STEPS
from benchmarks.timing import Step, cpu_clock


def step_for(case: Case) -> Step:
    ready, missing = build(named(["xentile"]), case, "cpu")
    if missing:
        raise RuntimeError(missing[0][1])
    inputs = [make_inputs(case, seed, "cpu") for seed in (1, 2)]
    return lambda i: STEPS[case.operation](ready[0][1], *inputs[i % 2])


def nothing(i: int) -> None:
    """The step before there is a case."""


class Worker:
    """Keeps the step of the case that was asked for last."""

    def __init__(self) -> None:
        self.step: Step = nothing
        self.allocator = ExitStack()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if "case" in request:
                self.step = nothing  # the inputs of the case before are freed
                self.allocator.close()
                case = Case(**request["case"])
                self.allocator.enter_context(memory.allocator(case.allocator))
                self.step = step_for(case)
            return {"seconds": cpu_clock(self.step, request.get("run", 0))}
        except Exception as error:  # whatever another commit raises: it is its answer to this case, and no other's
            return {"cannot": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def main(package: str, threads: str) -> None:
    import xentile

    imported = Path(xentile.__file__).resolve()
    if not imported.is_relative_to(Path(package).resolve()):
        raise RuntimeError(f"xentile must come from the side's own folder, came from {imported.parent}")
    torch.set_num_threads(int(threads))
    worker = Worker()
    for text in sys.stdin:
        print(json.dumps(worker.answer(json.loads(text))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
