"""Comparison, selection, conversion and moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import BINARY
from .scalars import DTYPES, UNSIGNED, Array, Mask, bf16_to_f32, f32_to_bf16, flush
from .syntax import Group, Instruction, Operand, UnsupportedPTX

if TYPE_CHECKING:
    from collections.abc import Callable

    from .threads import Executor, Threads

COMPARE: dict[str, Callable[[Array, Array], Mask]] = {
    **dict.fromkeys(("eq",), np.equal),
    **dict.fromkeys(("ne",), np.not_equal),
    **dict.fromkeys(("lt", "lo"), np.less),  # lo, ls, hi, hs: the unsigned spellings
    **dict.fromkeys(("le", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "hi"), np.greater),
    **dict.fromkeys(("ge", "hs"), np.greater_equal),
}
UNORDERED = {f"{relation}u": relation for relation in ("eq", "ne", "lt", "le", "gt", "ge")}  # true when one side is NaN
HALVES = ("bf16x2", "f16x2")
ROUNDING: dict[str, Callable[[Array], Array]] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def set_predicate(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """setp: compare, then optionally combine with a predicate. Of packed pairs p|q are the lower and the upper."""
    destination, first, second, *combined = instruction.operands
    relation, *combination = (modifier for modifier in instruction.modifiers if modifier != "ftz")
    (kind,) = instruction.types
    if kind in HALVES:
        if combination or combined or not isinstance(destination, Group):
            raise UnsupportedPTX(instruction.text)
        (a_low, a_high), (b_low, b_high) = (_halves(threads, operand, kind) for operand in (first, second))
        lower, upper = destination.parts
        threads.write(lower, _compare(relation, a_low, b_low), mask)
        threads.write(upper, _compare(relation, a_high, b_high), mask)
        return
    a, b = (threads.read(operand, kind) for operand in (first, second))
    if instruction.has("ftz"):
        a, b = flush(a), flush(b)
    result = _compare(relation, a, b)
    if combination:
        (operation,), (predicate,) = combination, combined
        result = BINARY[operation](result, threads.read(predicate, "pred"))
    elif combined:
        raise UnsupportedPTX(instruction.text)
    threads.write(destination, result, mask)


def _halves(threads: Threads, operand: Operand, kind: str) -> tuple[Array, Array]:
    """The lower and the upper of a packed pair of 16-bit floats, as float32."""
    pair = threads.read(operand, "b32")
    low, high = (pair & np.uint32(0xFFFF)).astype(np.uint16), (pair >> np.uint32(16)).astype(np.uint16)
    if kind == "bf16x2":
        return bf16_to_f32(low), bf16_to_f32(high)
    return low.view(np.float16).astype(np.float32), high.view(np.float16).astype(np.float32)


def _compare(relation: str, a: Array, b: Array) -> Mask:
    if a.dtype.kind != "f":
        return COMPARE[relation](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if relation in ("nan", "num"):
        return unordered if relation == "nan" else ~unordered
    if relation in UNORDERED:
        return COMPARE[UNORDERED[relation]](a, b) | unordered
    return COMPARE[relation](a, b) & ~unordered


def select(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """selp: the first source where the predicate holds."""
    destination, first, second, predicate = instruction.operands
    a, b = (threads.read(operand, instruction.types[0]) for operand in (first, second))
    threads.write(destination, np.where(threads.read(predicate, "pred"), a, b), mask)


def select_by_sign(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """slct: the first source where the third is not negative."""
    destination, first, second, sign = instruction.operands
    a, b = (threads.read(operand, instruction.types[0]) for operand in (first, second))
    threads.write(destination, np.where(threads.read(sign, instruction.types[1]) >= 0, a, b), mask)


def convert(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """cvt: rounding to nearest where a float is narrowed or an integer becomes a float; to integers with saturation."""
    destination, *sources = instruction.operands
    to, of = instruction.types
    values = [threads.read(source, of) for source in sources]
    if instruction.has("ftz") or instruction.entry == "cvt.ftz":
        values = [flush(value) for value in values]
    if instruction.has("relu"):
        values = [np.where(value > 0, value, np.float32(0)) for value in values]
    if to in HALVES:
        upper, lower = (_narrow(value, to[:-2]).astype(np.uint32) for value in values)
        threads.write(destination, upper << 16 | lower, mask)
        return
    (value,) = values
    if to in ("bf16", "f16"):
        threads.write(destination, _narrow(value, to), mask)
        return
    rounding = instruction.entry.removeprefix("cvt.")
    if rounding in ROUNDING:
        value = ROUNDING[rounding](value)
    if instruction.has("sat"):
        raise UnsupportedPTX(instruction.text)
    if value.dtype.kind == "f" and DTYPES[to].kind in "iu":
        value = _saturate(value, DTYPES[to])
    threads.write(destination, value.astype(DTYPES[to]), mask)


def _narrow(value: Array, to: str) -> Array:
    """Bits of a 16-bit float."""
    return f32_to_bf16(value) if to == "bf16" else value.astype(np.float16).view(np.uint16)


def _saturate(value: Array, dtype: np.dtype[Any]) -> Array:
    """A whole float as an integer: clamped to the range, NaN gives 0."""
    limits = np.iinfo(dtype)
    exact = np.where(np.isnan(value), 0, value).astype(np.float64)
    inside = np.where((exact > limits.min) & (exact < limits.max), exact, 0).astype(dtype)
    below = np.where(exact <= limits.min, dtype.type(limits.min), inside)
    return np.where(exact >= limits.max, dtype.type(limits.max), below)


def move(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """mov (also packing and unpacking of vectors), cvta."""
    destination, source = instruction.operands
    (kind,) = instruction.types
    size = DTYPES[kind].itemsize
    if isinstance(destination, Group):
        part = UNSIGNED[size // len(destination.parts)]
        pieces = np.ascontiguousarray(threads.read(source, kind)).view(part).reshape(threads.count, -1).copy()
        for column, register in enumerate(destination.parts):
            threads.write(register, pieces[:, column], mask)
    elif isinstance(source, Group):
        part_kind = f"b{8 * size // len(source.parts)}"
        pieces = np.stack([threads.read(part, part_kind) for part in source.parts], 1)
        threads.write(destination, pieces.view(UNSIGNED[size]).reshape(-1), mask)
    else:
        threads.write(destination, threads.read(source, kind), mask)


EXECUTORS: dict[str, Executor] = {
    "setp": set_predicate,
    "selp": select,
    "slct": select_by_sign,
    **dict.fromkeys(("mov", "cvta", "cvta.to"), move),
    **dict.fromkeys(("cvt", "cvt.ftz", "cvt.rn", *(f"cvt.{name}" for name in ROUNDING)), convert),
}
