"""Machine code against its budget: hard limits, and no worse than what is stored. No GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import triton

from . import baseline
from .cases import CASES, Case
from .targets import TARGETS

if TYPE_CHECKING:
    from .measure import Cost

LAUNCHES = [pytest.param(case, target, id=f"{case.name} {target}") for case in CASES for target in TARGETS]


def costs(case: Case, target: str) -> dict[str, Cost]:
    """Kernel -> cost."""
    return baseline.measure_all()[target][case.name]


STREAMING = [parameters for parameters in LAUNCHES if parameters.values[0].streams]


@pytest.mark.parametrize(("case", "target"), LAUNCHES)
def test_nothing_spills(case: Case, target: str) -> None:
    assert {name: cost.spills for name, cost in costs(case, target).items() if cost.spills} == {}


@pytest.mark.parametrize(("case", "target"), LAUNCHES)
def test_counting_needs_no_fence(case: Case, target: str) -> None:
    assert {name: cost.fences for name, cost in costs(case, target).items() if cost.fences} == {}


@pytest.mark.parametrize(("case", "target"), STREAMING)
def test_hot_loops_load_and_store_sixteen_bytes(case: Case, target: str) -> None:
    kernels = costs(case, target)
    reading, writing = (baseline.hot_loop(kernels, phase) for phase in ("reading", "writing"))
    if not case.operator.endswith("backward"):
        assert reading is not None
        assert reading.load_width >= 16
    if not case.operator.endswith("forward"):
        assert writing is not None
        assert (writing.load_width, writing.store_width) >= (16, 16)


def test_bfloat16_forward_on_hopper_has_eight_instructions_and_little_more_than_one_exponential() -> None:
    for case in CASES:
        if case.operator.endswith("forward") and case.dtype.itemsize == 2 and case.streams:
            loop = baseline.hot_loop(costs(case, "sm_90"), "reading")
            assert loop is not None
            assert loop.instructions <= 8, f"{case.name}: {loop.instructions} instructions an element"
            assert loop.special <= 1.2, f"{case.name}: {loop.special} special-function operations an element"


@pytest.mark.parametrize(("case", "target"), LAUNCHES)
def test_nothing_got_worse_than_the_stored_baseline(case: Case, target: str) -> None:
    if baseline.load()["triton"] != triton.__version__:
        pytest.skip("the stored numbers are of another Triton's code")
    stored = baseline.load()["costs"].get(target, {}).get(case.name, {})
    found = []
    for name, cost in costs(case, target).items():
        what = f"{name} for {target} in {case.name}"
        found += baseline.regressions(stored[name], cost.as_json(), what) if name in stored else [f"{what}: not stored"]
    assert not found, "\n".join(["python -m tests.static.baseline stores new numbers", *found])


def test_worse_numbers_are_named() -> None:
    before = {"registers": 40, "spills": 0, "reading": {"instructions": 7.0, "load_width": 16}}
    now = {"registers": 41, "spills": 2, "reading": {"instructions": 9.0, "load_width": 2}}
    assert baseline.regressions(before, now, "kernel") == [
        "kernel: spills 2 instead of 0",
        "kernel, reading loop: instructions 9.0 instead of 7.0",
        "kernel, reading loop: load_width 2 bytes instead of 16",
    ]
    assert baseline.regressions(before, {"registers": 40, "spills": 0}, "kernel") == [
        "kernel: the reading loop is gone"
    ]
