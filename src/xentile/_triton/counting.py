"""The loss sketch as device functions: the column of a value, counting one, and adding up a tile. Layout:
xentile/_layout.py.
"""

import triton
import triton.language as tl

from xentile import _layout as layout

E_MIN, E_MAX = tl.constexpr(layout.E_MIN), tl.constexpr(layout.E_MAX)
LOWEST, HIGHEST = tl.constexpr(2.0**layout.E_MIN), tl.constexpr(2.0**layout.E_MAX)
LIMIT, WEIGHED_LIMIT = tl.constexpr(layout.LIMIT), tl.constexpr(layout.WEIGHED_LIMIT)
ZERO, OVERFLOW, INF, NAN = (tl.constexpr(c) for c in (layout.ZERO, layout.OVERFLOW, layout.INF, layout.NAN))
IGNORED, OUT_OF_RANGE, BAD_GROUP = (tl.constexpr(c) for c in (layout.IGNORED, layout.OUT_OF_RANGE, layout.BAD_GROUP))
SUM_HI, SUM_LO = (tl.constexpr(column) for column, _ in layout.SUM_LIMBS)
SQ_HI, SQ_MID, SQ_LO = (tl.constexpr(column) for column, _ in layout.SQUARE_LIMBS)
# Doubles next to it are as far apart as what one of the limb stands for.
SUM_HI_ROUND, SUM_LO_ROUND = (tl.constexpr(1.5 * 2.0 ** (52 + exponent)) for _, exponent in layout.SUM_LIMBS)
SQ_HI_ROUND, SQ_MID_ROUND, SQ_LO_ROUND = (
    tl.constexpr(1.5 * 2.0 ** (52 + exponent)) for _, exponent in layout.SQUARE_LIMBS
)
MAX_KEY, MIN_KEY = tl.constexpr(layout.MAX_KEY), tl.constexpr(layout.MIN_KEY)
SPECIAL = tl.constexpr(layout.SPECIAL)


@triton.jit
def width_of(BITS: tl.constexpr):
    """Columns of a state whose bins have BITS mantissa bits."""
    return SPECIAL + ((E_MAX - E_MIN) << BITS)


@triton.jit
def edge_of(i, BITS: tl.constexpr):
    """Where bin i begins, float32."""
    return ((i + ((127 + E_MIN) << BITS)) << (23 - BITS)).to(tl.float32, bitcast=True)


@triton.jit
def column_of(value, BITS: tl.constexpr):
    """The column, int32, that counts a float32 value."""
    column = (value.to(tl.int32, bitcast=True) >> (23 - BITS)) - ((127 + E_MIN) << BITS) + SPECIAL
    column = tl.where(value < LOWEST, ZERO, column)
    column = tl.where(value >= HIGHEST, OVERFLOW, column)
    column = tl.where(value == float("inf"), INF, column)
    return tl.where((value != value) | (value == float("-inf")), NAN, column)


@triton.jit
def value_of_key(key):
    """The float32 with an order-preserving key, int64."""
    bits = tl.where(key >= 0, key, key ^ 0x7FFFFFFF)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def rint(x):
    """To the nearest integer, half to even, for 0 <= x < 2^52 in float64: 2^52 leaves no room for a fraction."""
    return (x + 4503599627370496.0) - 4503599627370496.0


@triton.jit
def read_group(group_ptr, groups, row, mask):
    """(group, known) of the tokens `row`; group 0 where it is not known."""
    group = row.to(tl.int64) * 0
    known = mask
    if group_ptr is not None:
        group = tl.load(group_ptr + row, mask=mask, other=0).to(tl.int64)
        known = mask & (group >= 0) & (group < groups)
        group = tl.where(known, group, 0)
    return group, known


@triton.jit
def count_value(sketch_ptr, group_ptr, groups, row, value, mask, BITS: tl.constexpr):
    """+1 for the value's bin. Relaxed and with the result unused, it is a single reduction without a fence."""
    group, known = read_group(group_ptr, groups, row, mask)
    column = group * width_of(BITS) + column_of(value, BITS)
    tl.atomic_add(sketch_ptr + column, known.to(tl.int64), mask=known, sem="relaxed")


@triton.jit
def add(sketch_ptr, group, column: tl.constexpr, amount, mask, BITS: tl.constexpr, GROUPED: tl.constexpr):
    """Add int64 amounts of a tile to one column; without groups as one sum."""
    if GROUPED:
        tl.atomic_add(sketch_ptr + group * width_of(BITS) + column, amount, mask=mask, sem="relaxed")
    else:
        total = tl.sum(tl.where(mask, amount, 0), 0)
        tl.atomic_add(sketch_ptr + column, total, mask=total != 0, sem="relaxed")


@triton.jit
def raise_to(sketch_ptr, group, column: tl.constexpr, key, mask, BITS: tl.constexpr, GROUPED: tl.constexpr):
    """The larger of one column and the int64 keys of a tile."""
    if GROUPED:
        tl.atomic_max(sketch_ptr + group * width_of(BITS) + column, key, mask=mask, sem="relaxed")
    else:
        largest = tl.max(tl.where(mask, key, 0), 0)
        tl.atomic_max(sketch_ptr + column, largest, mask=largest > 0, sem="relaxed")


@triton.jit
def limb_of(rounded, ROUND: tl.constexpr):
    """What a sum to ROUND counts in its bits, int64: there is nothing to multiply or to convert."""
    return rounded.to(tl.int64, bitcast=True) - tl.full([], ROUND, tl.float64).to(tl.int64, bitcast=True)


@triton.jit
def move_limb(
    sketch_ptr, group, column: tl.constexpr, x, ROUND: tl.constexpr, mask, BITS: tl.constexpr, GROUPED: tl.constexpr
):  # fmt: skip
    """Add what is a multiple of the limb's unit in float64 x to the limb, and return the rest. All of it is exact."""
    rounded = x + ROUND
    add(sketch_ptr, group, column, limb_of(rounded, ROUND), mask, BITS, GROUPED)
    return x - (rounded - ROUND)


@triton.jit
def count_values(sketch_ptr, group, value, amount, weight, known, BITS: tl.constexpr, GROUPED: tl.constexpr):
    """Count a tile of values, each with an int64 amount that is not 0 where it is known; weight: of `add_moments`."""
    column = group * width_of(BITS) + column_of(value, BITS)
    tl.atomic_add(sketch_ptr + column, amount, mask=known, sem="relaxed")
    add_moments(sketch_ptr, group, value, weight, known, BITS, GROUPED)


@triton.jit
def add_moments(sketch_ptr, group, value, weight, mask, BITS: tl.constexpr, GROUPED: tl.constexpr):
    """Everything about the values of a tile but their bins: the limbs of their sums, and the extremes.

    weight: float64, or None if all weigh 1. The limbs are integers: the result does not depend on the order of programs
    and atomics.
    """
    seen = mask & (value == value) & (value != float("-inf"))
    finite = seen & (value != float("inf"))
    x = tl.where(finite, value, 0.0).to(tl.float64)
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    square = x * x
    if weight is not None:
        x = tl.minimum(tl.maximum(x * weight, -WEIGHED_LIMIT), WEIGHED_LIMIT)
        square = tl.minimum(square * weight, LIMIT * LIMIT)
    x = move_limb(sketch_ptr, group, SUM_HI, x, SUM_HI_ROUND, finite, BITS, GROUPED)
    move_limb(sketch_ptr, group, SUM_LO, x, SUM_LO_ROUND, finite, BITS, GROUPED)
    square = move_limb(sketch_ptr, group, SQ_HI, square, SQ_HI_ROUND, finite, BITS, GROUPED)
    square = move_limb(sketch_ptr, group, SQ_MID, square, SQ_MID_ROUND, finite, BITS, GROUPED)
    move_limb(sketch_ptr, group, SQ_LO, square, SQ_LO_ROUND, finite, BITS, GROUPED)
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)
    raise_to(sketch_ptr, group, MAX_KEY, key + 2147483649, seen, BITS, GROUPED)
    raise_to(sketch_ptr, group, MIN_KEY, 2147483648 - key, seen, BITS, GROUPED)
