"""The threads that run together: their registers, and the scheduler.

Thread t of the batch belongs to block t // block of the batch. All threads of a batch run one instruction at a time;
those at the lowest program counter go first, so divergent paths meet again where they join.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .memory import WARP, Counts, GlobalMemory, SharedMemory, User
from .scalars import DTYPES, SIGNED, UNSIGNED, Array, Mask, bf16_to_f32, bits_of
from .syntax import (
    Complement,
    Deadlock,
    Discard,
    FloatBits,
    GlobalMemoryRace,
    Instruction,
    Integer,
    MemoryFault,
    Operand,
    Program,
    Register,
    SharedMemoryRace,
    Special,
    UnsupportedPTX,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOCK_BARRIERS = frozenset({"bar.sync", "barrier.sync"})
WARP_BARRIERS = frozenset(
    {"bar.warp", "shfl.sync", "vote.sync", "redux.sync", "elect.sync", "ldmatrix.sync", "stmatrix.sync"}
)
MEETINGS = BLOCK_BARRIERS | WARP_BARRIERS
JUMPS = frozenset({"bra", "ret", "exit"})


class Executor(Protocol):
    """Runs one instruction for the threads of `mask`."""

    def __call__(self, threads: Threads, instruction: Instruction, mask: Mask, /) -> None: ...


@dataclass(frozen=True)
class Launch:
    """What all blocks of a launch share."""

    program: Program
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    parameters: Mapping[str, Array]
    memory: GlobalMemory
    counts: Counts
    step_limit: int


class Threads:
    def __init__(self, launch: Launch, blocks: Array) -> None:
        """blocks: the linear indices of the blocks of this batch."""
        self.launch = launch
        self.count = len(blocks) * launch.block
        self.index = np.arange(self.count)
        self.thread = self.index % launch.block
        self.lane = self.thread % WARP
        self.block_index = np.repeat(blocks, launch.block)
        self.shared = SharedMemory(len(blocks), launch.program.shared_bytes + launch.shared_bytes, launch.block)
        # unset registers hold 0xFF bytes (NaN, -1, true): whoever reads one before writing it shows it
        self.registers: dict[str, Array] = {
            name: np.ones(self.count, bool)
            if kind == "pred"
            else np.full(self.count, -1, SIGNED[DTYPES[kind].itemsize]).view(UNSIGNED[DTYPES[kind].itemsize])
            for name, kind in launch.program.registers.items()
        }
        self.special = self._special_registers()
        self.constants: dict[tuple[Operand, np.dtype[Any]], Array] = {}
        self.end = len(launch.program.code)
        self.counter = np.zeros(self.count, np.int64)  # == end: the thread has exited
        self.waiting = np.zeros(self.count, bool)
        self.epoch = np.zeros(self.count, np.int32)  # barriers of the block that the thread has passed

    def _special_registers(self) -> dict[str, Array]:
        width, height, _ = self.launch.grid
        block = (self.block_index % width, self.block_index // width % height, self.block_index // (width * height))
        special: dict[str, Array] = {"%laneid": self.lane, "%warpid": self.thread // WARP}
        for axis, name in enumerate("xyz"):
            special[f"%tid.{name}"] = self.thread if axis == 0 else np.zeros(self.count)
            special[f"%ntid.{name}"] = np.full(self.count, self.launch.block if axis == 0 else 1)
            special[f"%ctaid.{name}"] = block[axis]
            special[f"%nctaid.{name}"] = np.full(self.count, self.launch.grid[axis])
        return {name: value.astype(np.uint32) for name, value in special.items()}

    # scheduling

    def run(self, executors: Mapping[str, Executor]) -> None:
        code = self.launch.program.code
        for _ in range(self.launch.step_limit):
            position, group = self._next_group()
            if position == self.end:
                return
            if code[position].entry in MEETINGS:
                group = self._meet(code[position], group)
            if group.any():
                self._run_from(position, group, executors)
        raise Deadlock(
            f"{self.launch.program.name}: step limit reached: an endless loop, or blocks that wait for each other"
        )

    def _run_from(self, position: int, group: Mask, executors: Mapping[str, Executor]) -> None:
        """Run the group until it branches, reaches a barrier, or catches up with threads that are ahead."""
        code = self.launch.program.code
        ahead = int(self.counter[~group & ~self.waiting].min(initial=self.end))
        while True:
            instruction = code[position]
            position += 1
            if instruction.entry in JUMPS:
                self.counter[group] = position
                self._execute(executors[instruction.entry], instruction, group)
                return
            self._execute(executors[instruction.entry], instruction, group)
            if position >= ahead or code[position].entry in MEETINGS:
                self.counter[group] = position
                return

    def _next_group(self) -> tuple[int, Mask]:
        """The lowest program counter of threads that can go on, and who is there; (end, ...) when all have exited."""
        ready = np.where(self.waiting, self.end, self.counter) if self.waiting.any() else self.counter
        position = int(ready.min())
        if position == self.end and self.waiting.any():
            position = self._completed_barrier()
        return position, self.counter == position

    def _completed_barrier(self) -> int:
        """Everybody waits or has exited: the barrier whose missing threads are those that have exited."""
        positions = [int(position) for position in np.unique(self.counter[self.waiting])]
        code = self.launch.program.code
        for position in positions:
            if self._complete(code[position], self.counter == position).any():
                return position
        raise Deadlock(f"{self.launch.program.name}: live threads never reach the barrier: {code[positions[0]].text}")

    def _complete(self, instruction: Instruction, group: Mask) -> Mask:
        """The threads of the group whose whole warp or block is here or has exited."""
        size = WARP if instruction.entry in WARP_BARRIERS else self.launch.block
        arrived = (group | (self.counter == self.end)).reshape(-1, size).all(1)
        return np.repeat(arrived, size) & group

    def _meet(self, instruction: Instruction, group: Mask) -> Mask:
        """The threads for which the barrier is complete; the rest of the group waits."""
        complete = self._complete(instruction, group)
        self.waiting = (self.waiting | group) & ~complete
        if instruction.entry in BLOCK_BARRIERS:
            self.epoch[complete] += 1
            self.shared.barrier(np.unique(self.index[complete] // self.launch.block))
        elif instruction.entry == "bar.warp":
            self.shared.warp_barrier(np.unique(self.index[complete] // WARP))
        return complete

    def _execute(self, executor: Executor, instruction: Instruction, group: Mask) -> None:
        mask = group
        if instruction.guard:
            mask = group & (self.registers[instruction.guard.register.name] ^ instruction.guard.negated)
        active = int(np.count_nonzero(mask))
        if not active:
            return
        self.launch.counts.instructions += active
        try:
            executor(self, instruction, mask)
        except (MemoryFault, SharedMemoryRace, GlobalMemoryRace) as fault:
            what, position = fault.args
            thread = np.flatnonzero(mask)[position]
            where = f"block {self.block_index[thread]} thread {self.thread[thread]}"
            raise type(fault)(f"{self.launch.program.name}: {what}, {where}: {instruction.text}") from None

    def user(self, mask: Mask) -> User:
        """Who accesses global memory."""
        number = self.block_index[mask] * self.launch.block + self.thread[mask]
        return User(number, self.epoch[mask])

    # registers

    def read(self, operand: Operand, kind: str) -> Array:
        """An operand as an array of the PTX type `kind`, one element a thread. bf16 is widened to float32."""
        if isinstance(operand, Complement):
            return ~self.registers[operand.register.name]
        dtype = DTYPES[kind]
        if isinstance(operand, Register):
            raw = self.registers[operand.name]
        elif isinstance(operand, Special):
            raw = self.special[operand.name]
        else:
            raw = self._constant(operand, dtype)
        if kind == "pred":
            return raw.astype(bool, copy=False)
        if raw.dtype == bool or raw.itemsize < dtype.itemsize:
            raise UnsupportedPTX(f"operand {operand} read as {kind}")
        value = raw.astype(UNSIGNED[dtype.itemsize], copy=False).view(dtype)
        return bf16_to_f32(value) if kind == "bf16" else value

    def _constant(self, operand: Operand, dtype: np.dtype[Any]) -> Array:
        """The raw bits of an immediate, once for every thread."""
        key = (operand, dtype)
        if key not in self.constants:
            if isinstance(operand, FloatBits):
                bits, size = operand.bits, operand.size
            elif isinstance(operand, Integer) and not (dtype.kind == "f" and operand.value):
                bits, size = operand.value & ((1 << 8 * dtype.itemsize) - 1), dtype.itemsize
            else:
                raise UnsupportedPTX(f"operand {operand} read as {dtype}")
            self.constants[key] = np.full(self.count, bits, UNSIGNED[size])
        return self.constants[key]

    def write(self, operand: Operand, value: Array, mask: Mask) -> None:
        """Store to a register: a signed value is sign-extended to it, any other zero-extended."""
        if isinstance(operand, Discard):
            return
        if not isinstance(operand, Register):
            raise UnsupportedPTX(f"destination {operand}")
        register = self.registers[operand.name]
        if register.dtype == bool:
            if value.dtype != bool:
                raise UnsupportedPTX(f"{value.dtype} written to predicate {operand.name}")
        elif value.dtype.kind == "i":
            value = bits_of(value.astype(SIGNED[register.itemsize]))
        else:
            value = bits_of(value).astype(register.dtype, copy=False)
        np.copyto(register, value, where=mask)

    def sources(self, instruction: Instruction) -> list[Array]:
        """All operands after the destination in the instruction's type (its only one)."""
        (kind,) = instruction.types
        return [self.read(operand, kind) for operand in instruction.operands[1:]]
