"""A parsed kernel and its launch on numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import access, arithmetic, data, warp
from .memory import ARGUMENT_SPACING, WARP, Counts, GlobalMemory
from .parser import parse
from .scalars import DTYPES, UNSIGNED, Array
from .threads import Executor, Launch, Threads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXECUTORS: dict[str, Executor] = {**arithmetic.EXECUTORS, **data.EXECUTORS, **access.EXECUTORS, **warp.EXECUTORS}
THREADS_AT_ONCE = 8192  # enough to amortise numpy's cost a call; more would leave the processor's cache


@dataclass(frozen=True)
class Offset:
    """A pointer to `byte` of an array, as a view that does not start at an aligned address."""

    array: Array
    byte: int


@dataclass(frozen=True)
class Scattered:
    """A pointer to a huge array of which only these pieces exist: byte offset -> array."""

    pieces: Mapping[int, Array]


Argument = Array | Offset | Scattered | int | float | None


class Kernel:
    def __init__(self, ptx: str, name: str | None = None) -> None:
        """Parse one .entry function (by name, or the first)."""
        self.program = parse(ptx, name)

    def launch(
        self,
        grid: Sequence[int],
        arguments: Sequence[Argument],
        *,
        block: int | None = None,
        shared: int = 0,
        block_order: Sequence[int] | None = None,
        races: bool = False,
        step_limit: int = 10**7,
    ) -> Counts:
        """Run all blocks.

        arguments: C-contiguous numpy arrays (or Offset, Scattered) for pointers, numbers for scalars. The same array
        twice is the same memory. Missing trailing arguments (Triton's hidden scratch pointers) are null.
        shared: bytes of dynamic shared memory. block_order: the order in which blocks are taken, for a kernel that
        must not depend on it. races: also look for races in global memory (slow).
        """
        block = block or self.program.block
        if not block or block % WARP:
            raise ValueError("the block size must be a multiple of 32")
        width, height, depth = (*grid, 1, 1)[:3]
        counts = Counts()
        parameters, memory = self._bind(
            [*arguments, *[None] * (len(self.program.parameters) - len(arguments))], counts, block if races else None
        )
        launch = Launch(self.program, (width, height, depth), block, shared, parameters, memory, counts, step_limit)
        order = np.arange(width * height * depth) if block_order is None else np.asarray(block_order)
        at_once = max(1, THREADS_AT_ONCE // block)
        with np.errstate(all="ignore"):
            for first in range(0, len(order), at_once):
                Threads(launch, order[first : first + at_once]).run(EXECUTORS)
        memory.write_back()
        return counts

    def _bind(
        self, arguments: Sequence[Argument], counts: Counts, races_of_block: int | None
    ) -> tuple[dict[str, Array], GlobalMemory]:
        """Parameter values as raw bits, and the memory behind the pointers."""
        pieces: list[tuple[int, int, Array]] = []
        known: dict[int, int] = {}
        parameters = {}
        for position, ((name, kind), argument) in enumerate(zip(self.program.parameters, arguments, strict=True)):
            dtype = DTYPES[kind]
            base = (position + 1) * ARGUMENT_SPACING
            if isinstance(argument, Scattered):
                pieces += [(position, base + offset, _bytes(array, name)) for offset, array in argument.pieces.items()]
                value: float = base
            elif isinstance(argument, Offset | np.ndarray):
                array, byte = (argument.array, argument.byte) if isinstance(argument, Offset) else (argument, 0)
                if array.ctypes.data not in known or not array.size:
                    known[array.ctypes.data] = base
                    pieces.append((position, base, _bytes(array, name)))
                value = known[array.ctypes.data] + byte
            else:
                value = argument or 0
            if dtype.kind == "f":
                parameters[name] = np.array(value, dtype).view(UNSIGNED[dtype.itemsize])
            else:
                parameters[name] = np.array(int(value) & ((1 << 8 * dtype.itemsize) - 1), UNSIGNED[dtype.itemsize])
        return parameters, GlobalMemory(pieces, counts, races_of_block)


def _bytes(array: Array, name: str) -> Array:
    if not array.flags.c_contiguous:
        raise ValueError(f"the array for {name} is not contiguous")
    return array.reshape(-1).view(np.uint8)
