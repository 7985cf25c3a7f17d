"""Control flow, and what the 32 threads of a warp do together. Waiting at barriers is the scheduler's business."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .access import addresses
from .arithmetic import BINARY, NAN_PROPAGATING
from .memory import WARP
from .syntax import Discard, Group, Instruction, Label, Operand, UnsupportedPTX
from .table import WITHOUT_EFFECT
from .threads import BLOCK_BARRIERS, Executor, Threads

if TYPE_CHECKING:
    from .scalars import Array, Mask

ALL_LANES = 0xFFFFFFFF
SEGMENT = {"up": 0, "down": 31, "bfly": 31, "idx": 31}  # the operand that says: the whole warp is one segment


def branch(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    (target,) = instruction.operands
    if not isinstance(target, Label):
        raise UnsupportedPTX(instruction.text)
    threads.counter[mask] = target.position


def leave(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    threads.counter[mask] = threads.end


def nothing(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """Barriers (the scheduler has done the waiting) and cache hints."""


def _rows(threads: Threads, instruction: Instruction, source: Operand, kind: str, mask: Mask) -> Array:
    """A source as (warps, 32); whole warps must take part, and say so in the member mask."""
    members = threads.read(instruction.operands[-1], "b32")[mask]
    lanes = mask.reshape(-1, WARP)
    if (members != ALL_LANES).any() or (lanes.any(1) & ~lanes.all(1)).any():
        raise UnsupportedPTX(f"not all 32 threads of the warp take part: {instruction.text}")
    return threads.read(source, kind).reshape(-1, WARP)


def shuffle(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    destination, source, distance, segment, _ = instruction.operands
    (mode,) = instruction.modifiers
    if (threads.read(segment, "u32")[mask] != SEGMENT[mode]).any():
        raise UnsupportedPTX(f"a shuffle within a part of the warp: {instruction.text}")
    value = _rows(threads, instruction, source, "b32", mask).reshape(-1)
    by = threads.read(distance, "s32").astype(np.int64)
    lane = {"bfly": threads.lane ^ by, "up": threads.lane - by, "down": threads.lane + by, "idx": by & 31}[mode]
    inside = (lane >= 0) & (lane < WARP)
    origin = threads.index - threads.lane + np.where(inside, lane, threads.lane)
    register, predicate = destination.parts if isinstance(destination, Group) else (destination, Discard())
    threads.write(register, value[origin], mask)
    threads.write(predicate, inside, mask)


def reduce(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    destination, source, _ = instruction.operands
    name, *others = instruction.modifiers
    rows = _rows(threads, instruction, source, instruction.types[0], mask)
    if "abs" in others:
        rows = np.abs(rows)
    operation = (NAN_PROPAGATING if "NaN" in others else BINARY)[name]
    threads.write(destination, np.repeat(operation.reduce(rows, axis=1).astype(rows.dtype), WARP), mask)  # type: ignore[attr-defined]


def vote(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    destination, source, _ = instruction.operands
    (mode,) = instruction.modifiers
    rows = _rows(threads, instruction, source, "pred", mask)
    if mode == "ballot":
        result: Array = (rows.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
    else:
        result = np.any(rows, 1) if mode == "any" else np.all(rows, 1)
    threads.write(destination, np.repeat(result, WARP), mask)


def elect(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """One thread of the warp, here the first."""
    destination, members = instruction.operands
    _rows(threads, instruction, members, "b32", mask)
    if not isinstance(destination, Group):
        raise UnsupportedPTX(instruction.text)
    leader, predicate = destination.parts
    threads.write(leader, np.zeros(threads.count, np.uint32), mask)
    threads.write(predicate, threads.lane == 0, mask)


def _matrices(instruction: Instruction, registers: Operand) -> tuple[Operand, ...]:
    """The registers of an ldmatrix or stmatrix, one for each matrix of 8 rows of 8 elements of 16 bits."""
    parts = registers.parts if isinstance(registers, Group) else (registers,)
    if not instruction.has("m8n8") or not instruction.has(f"x{len(parts)}"):
        raise UnsupportedPTX(instruction.text)
    return parts


def _row_givers(threads: Threads, instruction: Instruction, count: int, mask: Mask) -> Mask:
    """Who gives the address of a matrix row: the first 8 lanes those of the first matrix, and so on."""
    lanes = mask.reshape(-1, WARP)
    if (lanes.any(1) & ~lanes.all(1)).any():
        raise UnsupportedPTX(f"not all 32 threads of the warp take part: {instruction.text}")
    return mask & (threads.lane < 8 * count)


def _transposed(matrices: Array, instruction: Instruction) -> Array:
    return np.swapaxes(matrices, -1, -2) if instruction.has("trans") else matrices


def load_matrix(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """ldmatrix: lane 4r + c gets elements 2c and 2c + 1 of row r of each matrix."""
    destination, source = instruction.operands
    parts = _matrices(instruction, destination)
    givers = _row_givers(threads, instruction, len(parts), mask)
    address = addresses(threads, source, instruction, givers)
    rows = threads.shared.load(address, 16, threads.index[givers]).view(np.uint16).reshape(-1, len(parts), 8, 8)
    fragments = np.ascontiguousarray(_transposed(rows, instruction)).view(np.uint32)  # (warps, matrices, 8, 4)
    value = np.zeros(threads.count, np.uint32)
    for matrix, register in enumerate(parts):
        value[mask] = fragments[:, matrix].reshape(-1)
        threads.write(register, value, mask)


def store_matrix(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """stmatrix: the opposite of ldmatrix."""
    destination, source = instruction.operands
    parts = _matrices(instruction, source)
    givers = _row_givers(threads, instruction, len(parts), mask)
    fragments = np.stack([threads.read(part, "b32")[mask].reshape(-1, 8, 4) for part in parts], 1)
    rows = np.ascontiguousarray(_transposed(np.ascontiguousarray(fragments).view(np.uint16), instruction))
    address = addresses(threads, destination, instruction, givers)
    threads.shared.store(address, rows.view(np.uint8).reshape(-1, 16), threads.index[givers])


EXECUTORS: dict[str, Executor] = {
    "bra": branch,
    **dict.fromkeys(("ret", "exit"), leave),
    **dict.fromkeys((*BLOCK_BARRIERS, "bar.warp", *WITHOUT_EFFECT), nothing),
    "shfl.sync": shuffle,
    "redux.sync": reduce,
    "vote.sync": vote,
    "elect.sync": elect,
    "ldmatrix.sync": load_matrix,
    "stmatrix.sync": store_matrix,
}
