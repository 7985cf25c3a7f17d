"""Numbers of one compiled kernel: what the budget, the baseline and the table are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from . import machine_code

if TYPE_CHECKING:
    from .machine_code import Loop
    from .targets import Target


class LoopCost(NamedTuple):
    """The hot loop of one phase, per element of the row that it streams."""

    instructions: float
    special: float
    load_width: int
    """Bytes of the narrowest load; likewise the store."""
    store_width: int


class Cost(NamedTuple):
    instructions: int
    """Of the whole kernel, which is what one without a hot loop costs."""
    registers: int
    spills: int
    shared: int
    fences: int
    reading: LoopCost | None
    writing: LoopCost | None

    def as_json(self) -> dict[str, Any]:
        return {
            name: value._asdict() if isinstance(value, LoopCost) else value
            for name, value in self._asdict().items()
            if value is not None
        }


# The kernels that stream rows, and what they do in their hot loops. The loops of the others are over tokens, or none.
READING = {"row_kernel", "split_kernel", "topk_row_kernel"}
WRITING = {"row_kernel", "gradient_kernel", "topk_row_kernel", "topk_gradient_kernel"}
ROWS = READING | WRITING | {"short_row_kernel", "short_gradient_kernel"}


def measure(name: str, compiled: Any, element_bytes: int) -> Cost:
    code = machine_code.read(compiled)
    reading = code.reading_loops() if name in READING else []
    writing = code.writing_loops() if name in WRITING else []
    return Cost(
        len(code.instructions),
        code.registers,
        code.spills,
        code.shared,
        code.fences,
        _hottest(reading, element_bytes),
        _hottest(writing, element_bytes),
    )


def _hottest(loops: list[Loop], element_bytes: int) -> LoopCost | None:
    """The loop that streams most bytes in an iteration."""
    if not loops:
        return None
    loop = max(loops, key=lambda loop: loop.bytes_loaded)
    elements = loop.bytes_loaded / element_bytes
    return LoopCost(
        round(loop.instructions / elements, 3),
        round(loop.special / elements, 4),
        min(loop.loads),
        min(loop.stores, default=0),
    )


def predicted_fraction(loop: LoopCost, bytes_moved: int, target: Target) -> float:
    """A PREDICTION of the fraction of memory bandwidth that the loop reaches: 1 where memory is what limits it.

    The loop takes the longest of moving the bytes, issuing the instructions and computing the exponentials. Latency,
    occupancy, caches and the rest of the kernel are not in it.
    """
    clocks = target.processors * target.gigahertz * 1e9
    memory = bytes_moved / (target.terabytes * 1e12)
    issue = loop.instructions / (clocks * target.lanes)
    special = loop.special / (clocks * target.special_lanes)
    return memory / max(memory, issue, special)
