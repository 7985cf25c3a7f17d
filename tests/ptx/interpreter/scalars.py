"""PTX types as numpy dtypes, and the roundings that numpy does not have.

Registers hold raw unsigned bits; an instruction gives them a type. The formats without a numpy dtype (bf16 and
the packed pairs) stay raw bits and are converted by the instruction that knows them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

UNSIGNED: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, type[np.signedinteger]] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}

_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
_RAW = {"pred": np.bool_, "bf16": np.uint16, "f16x2": np.uint32, "bf16x2": np.uint32, "f32x2": np.uint64}
DTYPES: dict[str, np.dtype[Any]] = {
    **{f"{kind}{8 * size}": np.dtype(dtype) for size, dtype in UNSIGNED.items() for kind in "ub"},
    **{f"s{8 * size}": np.dtype(dtype) for size, dtype in SIGNED.items()},
    **{kind: np.dtype(dtype) for kind, dtype in (_FLOATS | _RAW).items()},
}

SMALLEST_NORMAL = np.float32(2.0**-126)


def bits_of(value: Array) -> Array:
    """The same bytes as unsigned integers."""
    return value.view(UNSIGNED[value.itemsize])


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(value: Array) -> Array:
    """bf16 bits of float32 values: nearest even, the canonical NaN of NVIDIA."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def flush(value: Array) -> Array:
    """`.ftz`: float32 subnormals become zero and keep their sign; other types have no such mode."""
    if value.dtype != np.float32:
        return value
    return np.where(np.abs(value) < SMALLEST_NORMAL, np.copysign(np.float32(0), value), value)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and what the rounding lost."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32 values, rounded once.

    The product is exact in float64. The float64 sum is not, and rounding it again to float32 errs where it lies
    half-way between two float32 values (or is subnormal in float32): there the sum is first rounded to odd, which a
    second rounding can't misread.
    """
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + addend
    half_way = total.view(np.uint64) & np.uint64(0x1FFFFFFF) == 0x10000000
    doubtful = half_way | (np.abs(total) < SMALLEST_NORMAL)
    if doubtful.any():
        picked = np.nonzero(doubtful & np.isfinite(total))  # f32x2 has two axes
        rounded, lost = _two_sum(product[picked], addend[picked])
        even = (rounded.view(np.uint64) & np.uint64(1)) == 0
        away = np.where((lost > 0) == (rounded > 0), 1, -1)
        moved = (rounded.view(np.int64) + away).view(np.float64)
        total[picked] = np.where((lost != 0) & even & (rounded != 0), moved, rounded)
    return total.astype(np.float32)


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float64 values with the product kept in two parts: nearly always, but not always, rounded once."""

    def split(x: Array) -> tuple[Array, Array]:
        high = x * 134217729.0
        high = high - (high - x)
        return high, x - high

    product = a * b
    (a_high, a_low), (b_high, b_low) = split(a), split(b)
    lost_in_product = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total, lost_in_sum = _two_sum(product, c)
    exact = total + (lost_in_product + lost_in_sum)
    return np.where(np.isfinite(exact), exact, total)
