"""Loads, stores and atomics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .scalars import DTYPES, UNSIGNED, Array, Mask
from .syntax import Address, Group, Instruction, Operand, Parameter, UnsupportedPTX

if TYPE_CHECKING:
    from collections.abc import Callable

    from .threads import Executor, Threads

VECTORS = {"v2": 2, "v4": 4, "v8": 8}


def _parts(operand: Operand, instruction: Instruction) -> tuple[Operand, ...]:
    """The registers of a vector access; their number must be what the modifier says."""
    parts = operand.parts if isinstance(operand, Group) else (operand,)
    widths = [width for modifier, width in VECTORS.items() if instruction.has(modifier)] or [1]
    if widths != [len(parts)]:
        raise UnsupportedPTX(instruction.text)
    return parts


def addresses(threads: Threads, operand: Operand, instruction: Instruction, mask: Mask) -> Array:
    """Byte addresses of the threads of `mask`."""
    if not isinstance(operand, Address):
        raise UnsupportedPTX(instruction.text)
    kind = "u64" if instruction.has("global") else "u32"
    return threads.read(operand.base, kind)[mask].astype(np.int64) + operand.offset


def load_parameter(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    destination, parameter = instruction.operands
    if not isinstance(parameter, Parameter):
        raise UnsupportedPTX(instruction.text)
    value = threads.launch.parameters[parameter.name].astype(UNSIGNED[DTYPES[instruction.types[0]].itemsize])
    threads.write(destination, np.broadcast_to(value, threads.count), mask)


def load(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    destination, source = _without_cache_policy(instruction)
    parts, dtype = _parts(destination, instruction), DTYPES[instruction.types[0]]
    address, size = addresses(threads, source, instruction, mask), dtype.itemsize * len(parts)
    if instruction.has("global"):
        columns = threads.launch.memory.load(address, size, threads.user(mask)).view(dtype)
    else:
        columns = threads.shared.load(address, size, threads.index[mask]).view(dtype)
    value = np.zeros(threads.count, dtype)
    for column, register in enumerate(parts):
        value[mask] = columns[:, column]
        threads.write(register, value, mask)


def store(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    destination, source = _without_cache_policy(instruction)
    kind = instruction.types[0]
    values = np.stack([threads.read(part, kind)[mask] for part in _parts(source, instruction)], 1).view(np.uint8)
    address = addresses(threads, destination, instruction, mask)
    if instruction.has("global"):
        threads.launch.memory.store(address, values, threads.user(mask))
    else:
        threads.shared.store(address, values, threads.index[mask])


def _without_cache_policy(instruction: Instruction) -> list[Operand]:
    """The two operands of a load or store; a third is allowed as the policy of .L2::cache_hint."""
    if len(instruction.operands) != 2 + instruction.has("L2::cache_hint"):
        raise UnsupportedPTX(instruction.text)
    return instruction.operands[:2]


ATOMIC: dict[str, Callable[..., object]] = {
    "add": lambda old, value: old + value,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, value: value,
    "cas": lambda old, expected, value: value if old == expected else old,
    "inc": lambda old, limit: old.dtype.type(0) if old >= limit else old + old.dtype.type(1),
}


def atomic(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """atom and red: threads are served in order, which matters to floating-point sums only."""
    returns = instruction.opcode == "atom"
    (name,) = (modifier for modifier in instruction.modifiers if modifier in ATOMIC)
    destination, sources = instruction.operands[returns], instruction.operands[1 + returns :]
    kind = instruction.types[0]
    if len(sources) != 1 + (name == "cas"):
        raise UnsupportedPTX(instruction.text)
    address = addresses(threads, destination, instruction, mask)
    if instruction.has("global"):
        cells = threads.launch.memory.cells(address, DTYPES[kind])
    else:
        cells = threads.shared.cells(address, DTYPES[kind], threads.index[mask])
    values = [threads.read(source, kind)[mask] for source in sources]
    old = np.zeros(threads.count, DTYPES[kind])
    for position, (thread, cell) in enumerate(zip(np.flatnonzero(mask), cells, strict=True)):
        old[thread] = cell[0]
        cell[0] = ATOMIC[name](cell[0], *(value[position] for value in values))
    if returns:
        threads.write(instruction.operands[0], old, mask)


EXECUTORS: dict[str, Executor] = {
    "ld.param": load_parameter,
    "ld": load,
    "st": store,
    **dict.fromkeys(("atom", "red"), atomic),
}
