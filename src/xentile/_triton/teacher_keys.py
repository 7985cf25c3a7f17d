"""A logit and its column as one int64 that orders them: the logit above, how far the column is from the last one below.

All keys of a row are different, and of equal logits the lower column has the larger key.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**63))  # less than any key, as EVERYTHING is more
EVERYTHING = tl.constexpr(2**63 - 1)
LAST = tl.constexpr(2**31 - 1)  # x ^ LAST is LAST - x for 0 <= x <= LAST


@triton.jit
def key_of(x, column):
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # zeros of both signs are equal
    order = tl.where(bits < 0, bits ^ LAST, bits)
    return (order.to(tl.int64) << 32) + (column ^ LAST)


@triton.jit
def logit_of(key):
    order = (key >> 32).to(tl.int32)
    return tl.where(order < 0, order ^ LAST, order).to(tl.float32, bitcast=True)


@triton.jit
def column_of(key):
    return key.to(tl.int32) ^ LAST
