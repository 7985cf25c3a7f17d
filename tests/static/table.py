"""The costs as a table to read, with a prediction of the speed on devices that were not measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .cases import CASES
from .measure import ROWS, predicted_fraction
from .targets import TARGETS

if TYPE_CHECKING:
    from .baseline import Costs
    from .measure import Cost

HEADER = (
    f"{'launch':52}{'target':8}{'kernel':22}{'loop':9}{'instr/el':>9}{'special/el':>11}"
    f"{'load':>6}{'store':>6}{'regs':>6}{'spills':>7}  {'PREDICTED':10}"
)
FOOTER = """\
instr/el, special/el: instructions and exponentials of the hot loop, per element. load, store: bytes of the narrowest
access. PREDICTED: fraction of the memory bandwidth of one device, from these counts and data-sheet figures; nothing
here was measured on a GPU."""


def table(measured: Costs) -> str:
    lines = [HEADER, "-" * len(HEADER)]
    for case in CASES:
        for target, by_case in measured.items():
            start = f"{case.name:52}{target:8}"
            for kernel, cost in by_case[case.name].items():
                lines += [start + line for line in _lines(kernel, cost, target, case.dtype.itemsize)]
    return "\n".join([*lines, FOOTER])


def _lines(kernel: str, cost: Cost, target: str, itemsize: int) -> list[str]:
    registers = f"{cost.registers:6}{cost.spills:7}"
    stored = 0.5 if kernel.startswith("dense") else 1  # elements for each that is loaded
    lines = []
    for phase, loops, moved in (("reading", cost.reading, 1), ("writing", cost.writing, 1 + stored)):
        for loop in loops:
            fraction = predicted_fraction(loop, moved * itemsize, TARGETS[target])
            lines.append(
                f"{kernel:22}{phase:9}{loop.instructions:9.2f}{loop.special:11.3f}{loop.load_width:6}{loop.store_width:6}"
                f"{registers}  {fraction:.0%} of {TARGETS[target].device}"
            )
    if kernel in ROWS and not lines:  # rows that stay in registers
        lines.append(f"{kernel:22}{f'{cost.instructions} instructions a thread':41}{registers}")
    return lines
