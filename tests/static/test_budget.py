"""Machine code against its budget: hard limits, and no worse than what is stored. No GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import triton

from . import baseline
from .cases import BFLOAT16, CASES, FLOAT32, Case
from .targets import TARGETS

if TYPE_CHECKING:
    from .measure import Cost


def costs(case: Case, target: str) -> dict[str, Cost]:
    """Kernel -> cost."""
    return baseline.measured()[target][case.name]


def named(*names: str) -> list[Case]:
    """The cases that the names begin."""
    found = [case for case in CASES if case.name.startswith(names)]
    assert len(found) >= len(names)
    return found


EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
STREAMING = [case for case in CASES if case.streams and not case.option.startswith("every")]
"""Without class weights, which begin anywhere beside a row."""


@EVERY_CASE
def test_nothing_spills_and_counting_needs_no_fence(case: Case) -> None:
    found = [
        f"{name} for {target}: {cost.spills} spills, {cost.fences} fences"
        for target in TARGETS
        for name, cost in costs(case, target).items()
        if cost.spills or cost.fences
    ]
    assert found == []


@pytest.mark.parametrize("case", STREAMING, ids=[case.name for case in STREAMING])
def test_hot_loops_load_and_store_sixteen_bytes(case: Case) -> None:
    for target in TARGETS:
        reading, writing = (baseline.hot_loops(costs(case, target), phase) for phase in ("reading", "writing"))
        passes = 3 if case.operator.startswith("dense") else 2 if case.operator == "teacher" else 1
        assert (len(reading), len(writing)) == (passes * case.reduces, case.writes), target
        assert {loop.load_width for loop in reading + writing} == {16}, target
        assert {loop.store_width for loop in writing} <= {16}, target


def test_bfloat16_forward_on_hopper_has_eight_instructions_and_little_more_than_one_exponential() -> None:
    for case in CASES:
        if case.operator in ("forward", "topk_forward") and case.dtype.itemsize == 2 and case.streams:
            [loop] = baseline.hot_loops(costs(case, "sm_90"), "reading")
            assert loop.instructions <= 8, f"{case.name}: {loop.instructions} instructions an element"
            assert loop.special <= 1.2, f"{case.name}: {loop.special} special-function operations an element"


def test_dense_forward_kl_and_its_gradient_take_70_instructions_a_column_on_hopper() -> None:
    [case] = named("dense_training 8192 x 128256 bfloat16 forward_kl")
    cost = costs(case, "sm_90")["dense_row_kernel"]
    student, teacher, both = cost.reading
    of_both = both.instructions + cost.writing[0].instructions
    assert student.instructions + teacher.instructions + 2 * of_both <= 70


def test_the_teachers_only_pass_takes_nine_instructions_and_little_more_than_one_exponential_on_hopper() -> None:
    for dtype in (BFLOAT16, FLOAT32):
        [case] = (case for case in named("teacher") if case.dtype == dtype and case.k == 64)
        [loop] = costs(case, "sm_90")["teacher_kernel"].reading
        assert loop.instructions <= 9
        assert loop.special <= 1.25


def test_a_processor_has_room_for_two_rows_of_a_teachers_common_top_k() -> None:
    """512 threads of 128 registers are all that a processor has."""
    [case] = named("teacher 8192 x 128256 bfloat16 K = 64")
    for target in ("sm_80", "sm_90"):
        assert costs(case, target)["teacher_kernel"].registers <= 128


def test_many_values_of_a_sketch_take_28_instructions_each_and_four_programs_a_processor_on_hopper() -> None:
    """Fewer than a data-sheet H100 executes while it reads a value."""
    [case] = named("sketch 1048576 x 1 float32")
    cost = costs(case, "sm_90")["bulk_kernel"]
    assert cost.reading[0].instructions <= 28
    assert 4 * 256 * cost.registers <= 65536


@EVERY_CASE
def test_nothing_got_worse_than_the_stored_baseline(case: Case) -> None:
    stored = baseline.load()
    if stored["triton"] != triton.__version__:
        pytest.skip("the stored numbers are of another Triton's code")
    found = [line for target in TARGETS for line in baseline.compare(stored, case, target, costs(case, target))]
    assert not found, "\n".join(["python -m tests.static.baseline stores new numbers", *found])
