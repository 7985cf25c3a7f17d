"""Counting many values of one group, where a GPU should wait for nothing but memory.

A program has a histogram of its own in shared memory: many equal values, such as the losses of tokens that the model is
sure of, would otherwise queue at one address. Each thread has its share of the sums in registers until the end. Values
outside [0, 2^8) would need more than that: they are left out, and counted by a second loop, which other programs skip.
"""

import triton
import triton.language as tl

from xentile._triton.counting import (
    E_MAX,
    E_MIN,
    MAX_KEY,
    MIN_KEY,
    SPECIAL,
    SQ_LO,
    SQ_LO_ROUND,
    SQ_MID,
    SQ_MID_ROUND,
    SUM_HI,
    SUM_HI_ROUND,
    SUM_LO,
    SUM_LO_ROUND,
    ZERO,
    count_values,
    limb_of,
)
from xentile._triton.shared_histogram import counted, counts_of, empty

VEC = tl.constexpr(4)
"""Values a load: 16 bytes."""
LOADS = tl.constexpr(4)
"""Of a thread, in flight at once."""


@triton.jit
def tile(THREADS: tl.constexpr):
    """Offsets [LOADS * THREADS, VEC]: a thread has every THREADS-th row."""
    return tl.arange(0, LOADS * THREADS)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def by_thread(x):
    """[LOADS, THREADS]: from one number a row of a tile, with those of a thread in a column."""
    return tl.reshape(x, [LOADS, x.shape[0] // LOADS])


@triton.jit
def per_thread(x):
    """The sum of what a thread has, [THREADS]."""
    return tl.sum(by_thread(tl.sum(x, 1)), 0)


@triton.jit
def is_regular(bits):
    """Whether float32 bits are of a value in [0, 2^8); a negative one is larger as an unsigned integer."""
    return bits.to(tl.uint32, bitcast=True) < ((127 + E_MAX) << 23)


@triton.jit
def limbs_of(a, b, HI: tl.constexpr, LO: tl.constexpr):
    """The two limbs of a * b, whose product is exact, as sums of each thread, int64 [THREADS]."""
    high = tl.fma(a, b, HI)
    low = tl.fma(a, b, (HI + LO) - high)
    return per_thread(limb_of(high, HI)), per_thread(limb_of(low, LO))


@triton.jit
def add_to(sketch_ptr, column, amount):
    tl.atomic_add(sketch_ptr + column, amount, mask=amount != 0, sem="relaxed")


@triton.jit
def read_mask(mask_ptr, i, inside):
    """Whether the values at i count, bool; inside: whether there are values."""
    keep = inside
    if mask_ptr is not None:
        keep &= tl.load(mask_ptr + i, mask=inside, other=0) != 0
    return keep


@triton.jit
def count_regular(
    value_ptr, mask_ptr, sketch_ptr, whole, unit, DECLARATION: tl.constexpr, BITS: tl.constexpr, THREADS: tl.constexpr
):
    """Count what is regular in this program's tiles of values [0, whole), all of them full; returns how much is not."""
    BLOCK: tl.constexpr = LOADS * THREADS * VEC
    BINS: tl.constexpr = (E_MAX - E_MIN) << BITS
    FIRST: tl.constexpr = (127 + E_MIN) << BITS
    offsets = tile(THREADS)
    histogram = empty(DECLARATION, BINS)
    below, others, strays = tl.zeros([THREADS], tl.int32), tl.zeros([THREADS], tl.int32), tl.zeros([THREADS], tl.int32)
    smallest, largest = tl.full([THREADS], 2147483647, tl.int32), tl.zeros([THREADS], tl.int32)
    sum_hi, sum_lo = tl.zeros([THREADS], tl.int64), tl.zeros([THREADS], tl.int64)
    sq_mid, sq_lo = tl.zeros([THREADS], tl.int64), tl.zeros([THREADS], tl.int64)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, whole, tl.num_programs(0).to(tl.int64) * BLOCK):
        bits = tl.load(value_ptr + first + offsets).to(tl.int32, bitcast=True)
        keep = read_mask(mask_ptr, first + offsets, offsets >= 0)
        regular = keep & is_regular(bits)
        strays += per_thread((keep & (regular == 0)).to(tl.int32))
        others += per_thread((regular == 0).to(tl.int32))
        smallest = tl.minimum(smallest, tl.min(by_thread(tl.min(tl.where(regular, bits, 2147483647), 1)), 0))
        bits = tl.where(regular, bits, 0)
        largest = tl.maximum(largest, tl.max(by_thread(tl.max(bits, 1)), 0))
        # What is in no bin is counted in the first one too, and taken out in the end: cheaper than to count it nowhere.
        below += per_thread((bits < (FIRST << (23 - BITS))).to(tl.int32))
        bin = tl.maximum((bits >> (23 - BITS)) - FIRST, 0)
        histogram = counted(histogram, bin, DECLARATION, BINS)
        x = bits.to(tl.float32, bitcast=True).to(tl.float64)
        hi, lo = limbs_of(x, 1.0, SUM_HI_ROUND, SUM_LO_ROUND)
        sum_hi, sum_lo = sum_hi + hi, sum_lo + lo
        mid, lo = limbs_of(x, x, SQ_MID_ROUND, SQ_LO_ROUND)
        sq_mid, sq_lo = sq_mid + mid, sq_lo + lo
    below_bins = tl.sum(below, 0)
    bin = tl.arange(0, BINS)
    counts = counts_of(histogram, DECLARATION, BINS) - tl.where(bin == 0, below_bins, 0)
    tl.atomic_add(sketch_ptr + SPECIAL + bin, counts.to(tl.int64) * unit, mask=counts != 0, sem="relaxed")
    add_to(sketch_ptr, ZERO, (below_bins - tl.sum(others, 0)).to(tl.int64) * unit)
    add_to(sketch_ptr, SUM_HI, tl.sum(sum_hi, 0))
    add_to(sketch_ptr, SUM_LO, tl.sum(sum_lo, 0))
    add_to(sketch_ptr, SQ_MID, tl.sum(sq_mid, 0))
    add_to(sketch_ptr, SQ_LO, tl.sum(sq_lo, 0))
    low, high = tl.min(smallest, 0), tl.max(largest, 0)
    some = low <= high
    tl.atomic_max(sketch_ptr + MAX_KEY, high.to(tl.int64) + 2147483649, mask=some, sem="relaxed")
    tl.atomic_max(sketch_ptr + MIN_KEY, 2147483648 - low.to(tl.int64), mask=some, sem="relaxed")
    return tl.sum(strays, 0)


@triton.jit(do_not_specialize=["n", "unit"])
def bulk_kernel(
    value_ptr, mask_ptr, sketch_ptr, n: tl.int64, unit: tl.int64,
    DECLARATION: tl.constexpr, BITS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Add values (n,) where mask (n,) holds; each program takes every num_programs-th tile."""
    BLOCK: tl.constexpr = LOADS * THREADS * VEC
    PART: tl.constexpr = 2 * THREADS  # small, because its registers are the first loop's too
    whole = n // BLOCK * BLOCK
    strays = count_regular(value_ptr, mask_ptr, sketch_ptr, whole, unit, DECLARATION, BITS, THREADS)
    start, step = tl.program_id(0).to(tl.int64) * BLOCK, tl.num_programs(0).to(tl.int64) * BLOCK
    if strays == 0:  # there is but the last tile, if it is this program's and not full
        start += tl.maximum((whole - start + step - 1) // step, 0) * step
    for first in range(start, n, step):
        for part in range(0, BLOCK, PART):
            i = first + part + tl.arange(0, PART)
            keep = read_mask(mask_ptr, i, i < n)
            value = tl.load(value_ptr + i, mask=keep, other=0.0)
            keep &= (i >= whole) | (is_regular(value.to(tl.int32, bitcast=True)) == 0)
            amount = tl.where(keep, unit, 0)
            count_values(sketch_ptr, i * 0, value, amount, None, keep, BITS, False)
