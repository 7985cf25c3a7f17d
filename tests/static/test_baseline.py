"""No kernel that the baseline does not know can pass: whatever changes machine code has it compiled and compared."""

from __future__ import annotations

import copy
import importlib.util
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from . import baseline
from .cases import CASES
from .targets import TARGETS, compile_only

if TYPE_CHECKING:
    from pathlib import Path

    from .targets import Launch

[SMALL] = (case for case in CASES if case.name.startswith("scale") and case.dtype is torch.float32)

KERNEL = """
import triton
import triton.language as tl

FACTOR = tl.constexpr(2.0)

@triton.jit
def inner(x):
    return x * FACTOR

@triton.jit
def outer(x):
    return inner(x) + 1.0

@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, outer(tl.load(x_ptr + i)))
"""


def launch(source: str, folder: Path, *, target: str = "sm_90", known: Any = (), warps: int = 4, **x: Any) -> Launch:
    """Launch the kernel of a module with this source."""
    path = folder / f"kernel_{random.randrange(10**9)}.py"
    path.write_text(source)
    specification = importlib.util.spec_from_file_location("kernels_of_a_test", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    with compile_only(TARGETS[target], known) as launches:
        module.kernel[(1,)](torch.empty(128, device="meta", **x), BLOCK=128, num_warps=warps, enable_fp_fusion=False)
    return launches["kernel"]


def test_an_unchanged_kernel_is_not_compiled_again(tmp_path: Path) -> None:
    first = launch(KERNEL, tmp_path)
    again = launch(KERNEL, tmp_path, known={first.source})
    assert first.kernel is not None
    assert again == (first.source, None)


@pytest.mark.parametrize(
    "change",
    [
        {"source": KERNEL.replace("tl.load(x_ptr + i)", "tl.load(x_ptr + i + 1)")},
        {"source": KERNEL.replace("x * FACTOR", "x * FACTOR * x")},
        {"source": KERNEL.replace("constexpr(2.0)", "constexpr(3.0)")},
        {"warps": 8},
        {"target": "sm_80"},
        {"dtype": torch.bfloat16},
    ],
    ids=["kernel", "function two calls away", "constant", "option", "target", "type"],
)
def test_whatever_changes_a_kernel_has_it_compiled(change: dict[str, Any], tmp_path: Path) -> None:
    before = launch(KERNEL, tmp_path).source
    changed = launch(**{"source": KERNEL, "folder": tmp_path, "known": {before}} | change)
    assert changed.source != before
    assert changed.kernel is not None


def stored_with(**changes: Any) -> dict[str, Any]:
    """What measuring a small case would store, with some numbers replaced."""
    costs = baseline.measure_case(SMALL, "sm_90", {})
    kernels = {name: cost.as_json() | changes for name, cost in costs.items()}
    return {**baseline.method(), "costs": {"sm_90": {SMALL.name: kernels}}}


def test_a_changed_kernel_that_got_worse_is_named() -> None:
    stored = stored_with(source="another", registers=8)
    costs = baseline.measure_case(SMALL, "sm_90", baseline.by_source(stored, "sm_90"))
    registers = costs["scale_kernel"].registers
    assert baseline.compare(stored, SMALL, "sm_90", costs) == [
        f"scale_kernel for sm_90 in {SMALL.name}: registers {registers} instead of 8"
    ]


def test_a_kernel_that_is_not_stored_is_named() -> None:
    stored = stored_with()
    costs = baseline.measure_case(SMALL, "sm_90", {})
    stored["costs"]["sm_90"][SMALL.name]["gone_kernel"] = stored["costs"]["sm_90"][SMALL.name].pop("scale_kernel")
    assert baseline.compare(stored, SMALL, "sm_90", costs) == [
        f"gone_kernel for sm_90 in {SMALL.name}: gone",
        f"scale_kernel for sm_90 in {SMALL.name}: not stored",
    ]


@pytest.mark.parametrize("part", ["triton", "counters"])
def test_numbers_of_another_triton_or_another_way_to_count_are_not_taken(part: str) -> None:
    stored = stored_with()
    assert baseline.by_source(stored, "sm_90") != {}
    assert baseline.by_source({**stored, part: "another"}, "sm_90") == {}


def test_worse_numbers_are_named() -> None:
    loop = {"instructions": 7.0, "load_width": 16}
    before: dict[str, Any] = {"source": "one", "registers": 40, "spills": 0, "reading": [loop]}
    now = copy.deepcopy(before) | {"source": "two", "registers": 41, "spills": 2}
    now["reading"][0] |= {"instructions": 9.0, "load_width": 2}
    assert baseline.regressions(before, now, "kernel") == [
        "kernel: spills 2 instead of 0",
        "kernel, reading loop: instructions 9.0 instead of 7.0",
        "kernel, reading loop: load_width 2 bytes instead of 16",
    ]
    assert baseline.regressions(before, {**before, "reading": []}, "kernel") == [
        "kernel: 0 reading loops instead of 1",
    ]


def test_kernels_drawn_by_lot_have_the_stored_costs() -> None:
    """Compiled anew in each run, so that a number that is stored wrongly can't stay."""
    stored = baseline.load()
    if any(stored[name] != value for name, value in baseline.method().items()):
        pytest.skip("the stored numbers are of another Triton's code")
    lot = random.SystemRandom()
    for target in lot.sample(list(TARGETS), 2):
        case = lot.choice(CASES)
        known = baseline.by_source(stored, target)
        for name, cost in baseline.measure_case(case, target, {}).items():
            assert cost == known.get(cost.source, cost), f"{name} for {target} in {case.name}"
