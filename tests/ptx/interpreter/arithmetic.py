"""Arithmetic and bit instructions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .scalars import SIGNED, UNSIGNED, Array, Mask, flush, fma_f32, fma_f64
from .syntax import Instruction, Integer, UnsupportedPTX

if TYPE_CHECKING:
    from .threads import Executor, Threads

Binary = Callable[[Array, Array], Array]


def _divide(a: Array, b: Array) -> Array:
    """Integers: truncated, as in C."""
    return a / b if a.dtype.kind == "f" else (a - np.fmod(a, b)) // b


BINARY: dict[str, Binary] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _divide,
    "rem": np.fmod,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "copysign": lambda sign, magnitude: np.copysign(magnitude, sign),
}
NAN_PROPAGATING: dict[str, Binary] = {"min": np.minimum, "max": np.maximum}
UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "sqrt": np.sqrt,
    "rcp": lambda x: 1 / x,
}
APPROXIMATE: dict[str, tuple[Callable[[Array], Array], float]] = {
    # function and the relative error it is given (lg2 near 1: absolute, see _approximate)
    "ex2": (np.exp2, 2.0**-22),
    "lg2": (np.log2, 2.0**-22),
    "rcp": (lambda x: 1 / x, 2.0**-23),
    "sqrt": (np.sqrt, 2.0**-23),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22.4),
    "tanh": (np.tanh, 2.0**-11),
}
DIVISION_ERROR = 2.0**-22.5  # div.full and div.approx: 2 units of the last place


def _inputs(threads: Threads, instruction: Instruction) -> list[Array]:
    """The sources, with packed pairs as (threads, 2) and narrow inputs of mixed instructions widened to float32."""
    if instruction.types == ("f32x2",):
        return [threads.read(operand, "b64").view(np.float32).reshape(-1, 2) for operand in instruction.operands[1:]]
    if len(instruction.types) == 2:  # f32.bf16: all but the last source are narrow
        *narrow, wide = instruction.operands[1:]
        values = [threads.read(operand, instruction.types[1]).astype(np.float32) for operand in narrow]
        return [*values, threads.read(wide, "f32")]
    values = threads.sources(instruction)
    return [flush(value) for value in values] if instruction.has("ftz") else values


def _output(threads: Threads, instruction: Instruction, value: Array, mask: Mask) -> None:
    if instruction.has("ftz"):
        value = flush(value)
    if instruction.types == ("f32x2",):
        value = np.ascontiguousarray(value).view(np.uint64).reshape(-1)
    threads.write(instruction.operands[0], value, mask)


def binary(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    operation = (NAN_PROPAGATING if instruction.has("NaN") else BINARY)[instruction.opcode]
    values = _inputs(threads, instruction)
    if not 2 <= len(values) <= (3 if instruction.opcode in NAN_PROPAGATING else 2):
        raise UnsupportedPTX(instruction.text)
    _output(threads, instruction, functools.reduce(operation, values).astype(values[0].dtype, copy=False), mask)


def unary(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    (value,) = _inputs(threads, instruction)
    _output(threads, instruction, UNARY[instruction.opcode](value), mask)


def approximate(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """The exact value off by a pseudo-random error, the same for the same input: hardware is no better than this."""
    (value,) = _inputs(threads, instruction)
    function, error = APPROXIMATE[instruction.opcode]
    exact = function(value.astype(np.float64))
    noise = error * _noise(value)
    if instruction.opcode == "ex2":
        noise[value == np.rint(value)] = 0  # powers of two are exact
    if instruction.opcode == "lg2":
        near_one = (value > 0.5) & (value < 2) & (value != 1)
        noisy = np.where(near_one, exact + noise, exact * (1 + noise))
    else:
        noisy = exact * (1 + noise)
    _output(threads, instruction, noisy.astype(value.dtype), mask)


def divide_approximately(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    numerator, denominator = _inputs(threads, instruction)
    exact = numerator.astype(np.float64) / denominator
    _output(threads, instruction, (exact * (1 + DIVISION_ERROR * _noise(denominator))).astype(np.float32), mask)


def _noise(value: Array) -> Array:
    """Numbers in [-1, 1) that depend on the bits of `value` alone."""
    bits = value.view(UNSIGNED[value.itemsize]).astype(np.uint64)
    mixed = (bits ^ bits >> np.uint64(29)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1


def multiply_wide(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """mul.wide: the whole product."""
    a, b = (_widened(value) for value in threads.sources(instruction))
    threads.write(instruction.operands[0], a * b, mask)


def multiply_high(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """mul.hi: the upper half of the product."""
    a, b = threads.sources(instruction)
    bits = 8 * a.itemsize
    if bits == 64:
        product = a.astype(object) * b.astype(object) >> 64
        threads.write(instruction.operands[0], product.astype(a.dtype), mask)
    else:
        threads.write(instruction.operands[0], (_widened(a) * _widened(b) >> bits).astype(a.dtype), mask)


def multiply_add(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """mad.lo, mad.wide."""
    destination, *factors, addend = instruction.operands
    (kind,) = instruction.types
    a, b = (threads.read(operand, kind) for operand in factors)
    if instruction.entry == "mad.wide":
        a, b, kind = _widened(a), _widened(b), f"{kind[0]}{2 * int(kind[1:])}"
    threads.write(destination, a * b + threads.read(addend, kind), mask)


def _widened(value: Array) -> Array:
    return value.astype((SIGNED if value.dtype.kind == "i" else UNSIGNED)[2 * value.itemsize])


def fused_multiply_add(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    a, b, c = _inputs(threads, instruction)
    _output(threads, instruction, (fma_f64 if c.dtype == np.float64 else fma_f32)(a, b, c), mask)


def shift(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """shl, shr: a distance of the width or more gives 0 (signed shr: the sign)."""
    destination, source, distance = instruction.operands
    value, by = threads.read(source, instruction.types[0]), threads.read(distance, "u32")
    bits = 8 * value.itemsize
    operation = np.left_shift if instruction.opcode == "shl" else np.right_shift
    shifted = operation(value, np.minimum(by, bits - 1).astype(value.dtype))
    if value.dtype.kind != "i":
        shifted = np.where(by < bits, shifted, 0).astype(value.dtype)
    threads.write(destination, shifted, mask)


def funnel_shift(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """shf: the 64 bits high:low shifted; the left shift returns the upper, the right shift the lower word."""
    low, high, distance = (threads.read(operand, "b32").astype(np.uint64) for operand in instruction.operands[1:])
    by = distance & np.uint64(31) if instruction.has("wrap") else np.minimum(distance, np.uint64(32))
    pair = high << np.uint64(32) | low
    result = pair << by >> np.uint64(32) if instruction.entry == "shf.l" else pair >> by
    threads.write(instruction.operands[0], (result & np.uint64(0xFFFFFFFF)).astype(np.uint32), mask)


def any_logic(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """lop3: bit 4a + 2b + c of the table is the result."""
    destination, *sources, table = instruction.operands
    if not isinstance(table, Integer):
        raise UnsupportedPTX(instruction.text)
    a, b, c = (threads.read(operand, "b32") for operand in sources)
    result = np.zeros(threads.count, np.uint32)
    for row in range(8):
        if table.value >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    threads.write(destination, result, mask)


def permute_bytes(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """prmt: each nibble of the selector picks one of 8 bytes; with its bit 3, that byte's sign."""
    destination, first, second, selector = instruction.operands
    pool = np.stack([threads.read(first, "b32"), threads.read(second, "b32")], 1).view(np.uint8)
    nibbles = threads.read(selector, "b32")[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
    picked = np.take_along_axis(pool, (nibbles & 7).astype(np.int64), 1)
    picked = np.where(nibbles & 8, np.where(picked & 0x80, 0xFF, 0), picked).astype(np.uint8)
    threads.write(destination, picked.view(np.uint32).reshape(-1), mask)


def extract_bits(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """bfe: `length` bits from `start`; the signed form repeats the top one."""
    destination, source, start_operand, length_operand = instruction.operands
    value = threads.read(source, instruction.types[0])
    start, length = (threads.read(operand, "u32") & 0xFF for operand in (start_operand, length_operand))
    if value.dtype.kind == "i":
        shifted = value.astype(np.int64) >> np.minimum(start, 63).astype(np.int64)
        up = np.clip(64 - length.astype(np.int64), 0, 63)
        field = np.where(length > 0, shifted << up >> up, 0)
    else:
        shifted = np.where(start < 64, value.astype(np.uint64) >> np.minimum(start, 63).astype(np.uint64), 0)
        ones = (np.uint64(1) << np.minimum(length, 63).astype(np.uint64)) - np.uint64(1)
        field = np.where(length < 64, shifted & ones, shifted)
    threads.write(destination, field.astype(value.dtype), mask)


def count_bits(threads: Threads, instruction: Instruction, mask: Mask) -> None:
    """popc, clz, bfind, brev from the bits, most significant first."""
    (value,) = threads.sources(instruction)
    width = 8 * value.itemsize
    bits = (value[:, None] >> np.arange(width, dtype=value.dtype)[::-1] & value.dtype.type(1)).astype(np.uint64)
    leading = np.where(bits.any(1), bits.argmax(1), width)
    if instruction.opcode == "brev":
        result = (bits << np.arange(width, dtype=np.uint64)).sum(1, dtype=np.uint64).astype(value.dtype)
    elif instruction.opcode == "bfind":
        result = (width - 1 - leading).astype(np.int32).view(np.uint32)  # no bit set: 0xFFFFFFFF
    else:
        result = (bits.sum(1) if instruction.opcode == "popc" else leading).astype(np.uint32)
    threads.write(instruction.operands[0], result, mask)


EXECUTORS: dict[str, Executor] = {
    **dict.fromkeys(("add", "sub", "mul", "mul.lo", "div", "div.rn", "rem", "min", "max", "copysign"), binary),
    **dict.fromkeys(("and", "or", "xor"), binary),
    **dict.fromkeys(("neg", "abs", "not", "sqrt.rn", "rcp.rn"), unary),
    **dict.fromkeys((f"{name}.approx" for name in APPROXIMATE), approximate),
    **dict.fromkeys(("div.full", "div.approx"), divide_approximately),
    **dict.fromkeys(("mad.lo", "mad.wide"), multiply_add),
    **dict.fromkeys(("shl", "shr"), shift),
    **dict.fromkeys(("shf.l", "shf.r"), funnel_shift),
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), count_bits),
    "mul.wide": multiply_wide,
    "mul.hi": multiply_high,
    "fma.rn": fused_multiply_add,
    "lop3": any_logic,
    "prmt": permute_bytes,
    "bfe": extract_bits,
}
