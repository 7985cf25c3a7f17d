"""Numbers of one compiled kernel: what the budget, the baseline and the table are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from . import machine_code

if TYPE_CHECKING:
    from .machine_code import Loop
    from .targets import Launch, Target


class LoopCost(NamedTuple):
    """The hot loop of one pass over a row, per element that it loads."""

    instructions: float
    special: float
    load_width: int
    """Bytes of the narrowest load; likewise the store."""
    store_width: int


class Cost(NamedTuple):
    source: str
    """Digest of what was compiled (targets.py)."""
    instructions: int
    """Of the whole kernel, which is what one without a hot loop costs."""
    registers: int
    spills: int
    shared: int
    fences: int
    reading: tuple[LoopCost, ...] = ()
    writing: tuple[LoopCost, ...] = ()

    def as_json(self) -> dict[str, Any]:
        loops = {name: [loop._asdict() for loop in getattr(self, name)] for name in ("reading", "writing")}
        return self._asdict() | loops

    @staticmethod
    def from_json(stored: dict[str, Any]) -> Cost:
        loops = {name: tuple(LoopCost(**loop) for loop in stored[name]) for name in ("reading", "writing")}
        return Cost(**stored | loops)


# The kernels that stream rows or values, and in how many loops of what they do. The loops of the others are over
# tokens, or none.
READING = {
    "row_kernel": 1,
    "split_kernel": 1,
    "topk_row_kernel": 1,
    "dense_row_kernel": 3,  # the student's row, the teacher's, and both
    "teacher_kernel": 1,
    "tempered_kernel": 1,
    "bulk_kernel": 1,  # the other is over what a sketch has no bin for
}
WRITING = {
    "row_kernel": 1,
    "gradient_kernel": 1,
    "scale_kernel": 1,
    "topk_row_kernel": 1,
    "topk_gradient_kernel": 1,
    "dense_row_kernel": 1,
    "dense_gradient_kernel": 1,
}
ROWS = READING.keys() | WRITING.keys() | {"short_row_kernel", "short_gradient_kernel"}


def measure(name: str, launch: Launch, element_bytes: int, *, streams: bool) -> Cost:
    """streams: rows are too long for registers, so that there are loops over them."""
    code = machine_code.read(launch.kernel)
    return Cost(
        launch.source,
        len(code.instructions),
        code.registers,
        code.spills,
        code.shared,
        code.fences,
        _hottest(code.reading_loops(), READING.get(name, 0) * streams, element_bytes),
        _hottest(code.writing_loops(), WRITING.get(name, 0) * streams, element_bytes),
    )


def _hottest(loops: list[Loop], count: int, element_bytes: int) -> tuple[LoopCost, ...]:
    """The loops that stream most bytes in an iteration, in order."""
    hottest = sorted(loops, key=lambda loop: -loop.bytes_loaded)[:count]
    return tuple(_cost(loop, loop.bytes_loaded / element_bytes) for loop in loops if loop in hottest)


def _cost(loop: Loop, elements: float) -> LoopCost:
    return LoopCost(
        round(loop.instructions / elements, 3),
        round(loop.special / elements, 4),
        min(loop.loads),
        min(loop.stores, default=0),
    )


def predicted_fraction(loop: LoopCost, bytes_moved: float, target: Target) -> float:
    """A PREDICTION of the fraction of memory bandwidth that the loop reaches: 1 where memory is what limits it.

    The loop takes the longest of moving the bytes, issuing the instructions and computing the exponentials. Latency,
    occupancy, caches and the rest of the kernel are not in it.
    """
    clocks = target.processors * target.gigahertz * 1e9
    memory = bytes_moved / (target.terabytes * 1e12)
    issue = loop.instructions / (clocks * target.lanes)
    special = loop.special / (clocks * target.special_lanes)
    return memory / max(memory, issue, special)
