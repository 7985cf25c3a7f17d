"""One side of benchmarks/compare.py: `python -m benchmarks.worker PACKAGE THREADS` answers requests on standard input.

{"case": {field: value}} makes inputs, answers 0; {"run": i} answers the seconds of one step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

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


def main(package: str, threads: str) -> None:
    import xentile

    imported = Path(xentile.__file__).resolve()
    if not imported.is_relative_to(Path(package).resolve()):
        raise RuntimeError(f"xentile must come from the side's own folder, came from {imported.parent}")
    torch.set_num_threads(int(threads))
    step: Step = lambda i: None  # noqa: E731
    for text in sys.stdin:
        request = json.loads(text)
        if "case" in request:
            step = step_for(Case(**request["case"]))
        print(cpu_clock(step, request["run"]) if "run" in request else 0.0, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
