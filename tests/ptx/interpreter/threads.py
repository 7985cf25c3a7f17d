"""The threads that run together: their registers, and the scheduler.

Thread t of the batch belongs to block t // block of the batch. All threads of a batch run one instruction at a time; those at
the lowest program counter go first, so divergent paths meet again where they join.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .memory import WARP, Counts, GlobalMemory, SharedMemory
from .scalars import DTYPES, SIGNED, UNSIGNED, Array, Mask, bf16_to_f32, bits_of
from .syntax import (
    Complement,
    Deadlock,
    Discard,
    FloatBits,
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

BLOCK_BARRIERS = frozenset({"bar.sync", "barrier.sync"})
WARP_BARRIERS = frozenset({"bar.warp", "shfl.sync", "vote.sync", "redux.sync", "elect.sync"})


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
        self.end = len(launch.program.code)
        self.counter = np.zeros(self.count, np.int64)  # == end: the thread has exited
        self.waiting = np.zeros(self.count, bool)

    def _special_registers(self) -> dict[str, Array]:
        width, height, _ = self.launch.grid
        block = (self.block_index % width, self.block_index // width % height, self.block_index // (width * height))
        special = {"%laneid": self.lane, "%warpid": self.thread // WARP}
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
            instruction = code[position]
            if instruction.entry in BLOCK_BARRIERS or instruction.entry in WARP_BARRIERS:
                group = self._meet(instruction, group)
                if not group.any():
                    continue
            self.counter[group] = position + 1
            mask = group
            if instruction.guard:
                mask = group & (self.registers[instruction.guard.register.name] ^ instruction.guard.negated)
            active = int(np.count_nonzero(mask))
            if active:
                self.launch.counts.instructions += active
                self._execute(executors[instruction.entry], instruction, mask)
        raise Deadlock(f"{self.launch.program.name}: step limit reached: an endless loop, or blocks that wait for each other")

    def _next_group(self) -> tuple[int, Mask]:
        """The lowest program counter of the threads that can go on, and who is there; (end, ...) when all have exited."""
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
            self.shared.barrier(np.unique(self.index[complete] // self.launch.block))
        elif instruction.entry == "bar.warp":
            self.shared.warp_barrier(np.unique(self.index[complete] // WARP))
        return complete

    def _execute(self, executor: Executor, instruction: Instruction, mask: Mask) -> None:
        try:
            executor(self, instruction, mask)
        except (MemoryFault, SharedMemoryRace) as fault:
            what, position = fault.args
            thread = np.flatnonzero(mask)[position]
            where = f"block {self.block_index[thread]} thread {self.thread[thread]}"
            raise type(fault)(f"{self.launch.program.name}: {what}, {where}: {instruction.text}") from None

    # registers

    def read(self, operand: Operand, kind: str) -> Array:
        """An operand as an array of the PTX type `kind`, one element a thread. bf16 is widened to float32."""
        if isinstance(operand, Complement):
            return ~self.registers[operand.register.name]
        dtype = DTYPES[kind]
        if isinstance(operand, Integer):
            if dtype.kind == "f" and operand.value:
                raise UnsupportedPTX(f"integer {operand.value} read as {kind}")
            pattern = np.array(operand.value & ((1 << 8 * dtype.itemsize) - 1), UNSIGNED[dtype.itemsize])
            raw: Array = np.broadcast_to(pattern, self.count)
        elif isinstance(operand, FloatBits):
            raw = np.broadcast_to(np.array(operand.bits, UNSIGNED[operand.size]), self.count)
        elif isinstance(operand, Special):
            raw = self.special[operand.name]
        elif isinstance(operand, Register):
            raw = self.registers[operand.name]
        else:
            raise UnsupportedPTX(f"operand {operand} read as {kind}")
        if kind == "pred":
            return raw.astype(bool, copy=False)
        if raw.dtype == bool or raw.itemsize < dtype.itemsize:
            raise UnsupportedPTX(f"operand {operand} read as {kind}")
        value = raw.astype(UNSIGNED[dtype.itemsize], copy=False).view(dtype)
        return bf16_to_f32(value) if kind == "bf16" else value

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
