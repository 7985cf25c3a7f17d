"""Which columns of a row are its K largest, from the maxima of its slots (teacher_span.py), without reading it again.

The key of a slot is that of its maximum, with the first column of the first group that has it. If K slots reach a key
`low`, each has a column that does, so the K largest columns do, too, and all of them lie in slots that do. How many
slots that are is counted in registers, and as their keys differ it can be as few as K: of any row, also of one that
is all equal. A column is compared with `low` by its group's first column, as its slot was.
"""

import triton
import triton.language as tl

from xentile._triton.span import edges
from xentile._triton.teacher_keys import EVERYTHING, NOTHING, key_of
from xentile._triton.teacher_span import elements_of, read_slots


@triton.jit
def slot_keys(m, best, head, body, VEC: tl.constexpr):
    """[G]; NOTHING of a slot without a group. m, best: as `reduce_tiles` returns them."""
    at = tl.arange(0, m.shape[0]) * VEC
    return tl.where(at < body, key_of(m, head + best + at), NOTHING)


@triton.jit
def lower_bound(keys, K, limit):
    """What at least K and at most `limit` >= K of the keys reach, or all of them if these are fewer than K."""
    count = tl.sum((keys > NOTHING).to(tl.int32), 0)
    low = tl.where(count < K, NOTHING + 1, tl.min(tl.where(keys > NOTHING, keys, EVERYTHING), 0))
    high = tl.max(keys, 0) + 1
    # Halving the interval takes a handful of steps for logits: it begins where they do, and may end anywhere between
    # K and the limit.
    while count > limit:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        reached = tl.sum((keys >= middle).to(tl.int32), 0)
        low = tl.where(reached >= K, middle, low)
        high = tl.where(reached >= K, high, middle)
        count = tl.where(reached >= K, reached, count)
    return low


@triton.jit
def list_slots(slot_ptr, out, WIDTH: tl.constexpr):
    """Write the slots where `out` [G] holds, and return how many these are. WIDTH: how many threads there are."""
    G: tl.constexpr = out.shape[0]
    APART: tl.constexpr = WIDTH if WIDTH < G else G
    # Slots so far apart are one thread's, and follow one another in the list: the scan is over threads, not over slots.
    wanted = tl.reshape(out.to(tl.int32), [G // APART, APART])
    count = tl.sum(wanted, 0)
    end = tl.cumsum(count, 0)
    place = (end - count)[None, :] + tl.cumsum(wanted, 0) - 1
    tl.store(slot_ptr + tl.reshape(place, [G]), tl.arange(0, G), mask=out)
    tl.debug_barrier()
    return tl.max(end, 0)


@triton.jit
def append(candidate_ptr, count, keys, wanted):
    """Store those of the keys that are wanted after the `count` that are there, and return how many are now."""
    place = tl.cumsum(wanted.to(tl.int32), 0)
    tl.store(candidate_ptr + count + place - 1, keys, mask=wanted)
    return count + tl.max(place, 0)


@triton.jit
def keep_largest(candidate_ptr, count, KEPT: tl.constexpr):
    """Leave at most KEPT of the candidates, the largest, in falling order; returns how many these are."""
    i = tl.arange(0, 2 * KEPT)
    rounds = tl.maximum(tl.cdiv(count, KEPT) - 1, 1)
    for done in range(rounds):  # from the last candidates to the first ones
        at = (rounds - 1 - done) * KEPT + i
        tl.debug_barrier()
        keys = tl.sort(tl.load(candidate_ptr + at, mask=at < count, other=NOTHING), descending=True)
        tl.debug_barrier()
        tl.store(candidate_ptr + at, keys, mask=(i < KEPT) & (at < count))
        count = tl.minimum(count, (rounds - done) * KEPT)
    tl.debug_barrier()
    return count


@triton.jit
def select(
    row, slot_ptr, listed, low, candidate_ptr, head, body, V,
    BLOCK: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Leave the KEPT largest keys of a row, or all of it, in falling order at candidate_ptr."""
    columns, in_edges = edges(head, body, V, 1, VEC)
    keys = key_of(tl.load(row + columns, mask=in_edges, other=float("-inf")).to(tl.float32), columns)
    count = append(candidate_ptr, 0, keys, in_edges & (keys >= low))
    size = tl.maximum(elements_of(listed, body, BLOCK, VEC), 1)
    for first in range(0, size, WIDTH):
        x, column, group, valid = read_slots(row, slot_ptr, listed, first, head, body, BLOCK, VEC, WIDTH)
        count = append(candidate_ptr, count, key_of(x, column), valid & (key_of(x, group) >= low))
        # Seldom before the end: about as many columns as slots reach the bound. But all of a slot's might.
        if (count > KEPT) | (first + WIDTH >= size):
            count = keep_largest(candidate_ptr, count, KEPT)
