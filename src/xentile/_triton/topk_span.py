"""Reducing a row of student logits without its support and its target, and writing the dense part of its gradient.

As in span.py, the row is cut into groups of 16 bytes, and groups with an excluded column are left out of the tiles: a
bitmap with a bit a group, in global memory that stays in the cache, says which. That costs the tiles two instructions a
group, whatever K is. The groups left out, together with the two edges of the
row, are read again at the end, [K, VEC] and [4 * VEC], without the excluded columns.

Bit b of word w in a chunk of 32 * W groups stands for group b * W + w, so that neighbouring threads read neighbouring
words. W is a quarter of a tile's groups: a thread keeps one word for each four groups it owns, eight tiles long.
"""

import triton
import triton.language as tl

from xentile._triton.row import HUGE, LOG2E, STEEP, difference, power, slope, transform
from xentile._triton.span import edges, edges_and_target, groups_before, target_group_of, tile

CHUNK = tl.constexpr(8)  # tiles
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def reference_of(z, c):
    """The b of exp2(fma(z_j, c, -b)), c = log2(e) / T, for a maximum z; from -STEEP on, so that no inf - inf
    arises and no exponential is large.
    """
    return tl.maximum(z * c, -STEEP)


@triton.jit
def lost_in(b, z, c):
    """B - z * c without rounding the product, for b = reference_of(z, c); 0 where that is beyond STEEP."""
    return tl.where(tl.abs(z * c) <= STEEP, tl.fma(-z, c, b), 0.0)


@triton.jit
def clear(bitmap, body, BLOCK: tl.constexpr, VEC: tl.constexpr):
    WORDS: tl.constexpr = BLOCK // VEC // 4
    for first in range(0, tl.cdiv(body, CHUNK * BLOCK) * WORDS, WORDS):
        tl.store(bitmap + first + tl.arange(0, WORDS), tl.zeros([WORDS], tl.int32))


@triton.jit
def leave_out(bitmap, column, mask, head, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Mark the groups of columns of the body."""
    WORDS: tl.constexpr = BLOCK // VEC // 4
    group = (column - head) // VEC
    word = group // (32 * WORDS) * WORDS + group % WORDS
    tl.atomic_or(bitmap + word, 1 << (group // WORDS % 32), mask=mask, sem="relaxed")


@triton.jit
def words_of(bitmap, chunk, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """[BLOCK // VEC]: for each group of a tile, a word whose bit 4 * i is that of the group in tile i of the chunk."""
    WORDS: tl.constexpr = BLOCK // VEC // 4
    slot = tl.arange(0, BLOCK // VEC)
    # .cg: what atomics wrote is in the L2 cache
    return tl.load(bitmap + chunk * WORDS + slot % WORDS, cache_modifier=".cg") >> (slot // WORDS)


@triton.jit
def fold(state, x, kept, valid, c, logit_scale, softcap, TRANSFORM: tl.constexpr, TWICE: tl.constexpr):
    """Add a tile x [G, VEC] to the state of its G slots, but for groups that are not `kept` [G].

    m        maximum of x
    b, r     the reference at the temperature, and the sum of exp2(z_j * c - b)
    b1, r1   the same at temperature 1 if TWICE
    """
    m, b, r, b1, r1 = state
    m = tl.where(kept, tl.maximum(m, tl.max(x, 1)), m)
    top = transform(m, logit_scale, softcap, TRANSFORM)
    z = transform(x, logit_scale, softcap, TRANSFORM)
    b, r = add_exponentials(z, kept, valid, top, c, b, r)
    if TWICE:
        b1, r1 = add_exponentials(z, kept, valid, top, LOG2E, b1, r1)
    return m, b, r, b1, r1


@triton.jit
def add_exponentials(z, kept, valid, top, c, b, r):
    b_new = reference_of(top, c)
    e = tl.exp2(tl.fma(z, c, -b_new[:, None]))
    if valid is not None:  # a softcap makes -softcap of the -inf there
        e = tl.where(valid, e, 0.0)
    return b_new, r * tl.exp2(b - b_new) + tl.where(kept, tl.sum(e, 1), 0.0)


@triton.jit
def reduce_tiles(
    row, bitmap, head, body, c, logit_scale, softcap,
    BLOCK: tl.constexpr, VEC: tl.constexpr, KEEP: tl.constexpr, TRANSFORM: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """The state, see `fold`, of the body of the row at pointer `row`."""
    G: tl.constexpr = BLOCK // VEC
    zero = tl.zeros([G], tl.float32)
    nothing = tl.full([G], float("-inf"), tl.float32)
    state = nothing, zero - HUGE, zero, zero - HUGE, zero
    start = tl.multiple_of(row + head, 16)
    offsets = tile(BLOCK, VEC)
    full = body // BLOCK * BLOCK
    words = tl.zeros([G], tl.int32)
    for first in range(0, body, CHUNK * BLOCK):
        words = words_of(bitmap, first // (CHUNK * BLOCK), BLOCK, VEC)
        for k in range(first, tl.minimum(first + CHUNK * BLOCK, full), BLOCK):
            x = tl.load(start + k + offsets, eviction_policy=KEEP).to(tl.float32)
            kept = (words & (1 << ((k - first) // BLOCK * 4))) == 0
            state = fold(state, x, kept, None, c, logit_scale, softcap, TRANSFORM, TWICE)
    if full < body:
        valid = groups_before(full, body, BLOCK, VEC)
        x = tl.load(start + full + offsets, mask=valid, other=float("-inf"), eviction_policy=KEEP).to(tl.float32)
        kept = (words & (1 << (full // BLOCK % CHUNK * 4))) == 0
        state = fold(state, x, kept, valid, c, logit_scale, softcap, TRANSFORM, TWICE)
    return state


@triton.jit
def shared_groups(row, column, id_ptr, K, head, body, V, t, VEC: tl.constexpr):
    """Logits [K, VEC] of the groups that were left out for the support, once each, -inf in excluded columns.

    column: [WIDTH] the support of the row, which is at id_ptr.
    """
    i = tl.arange(0, column.shape[0])
    group = (column - head) // VEC
    before = tl.load(id_ptr + i - 1, mask=(i > 0) & (i < K), other=-1)
    again = (before >= head) & ((before - head) // VEC == group)
    read = (column >= head) & (column < head + body) & (again == 0)
    columns = (head + group * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    wanted = read[:, None] & (columns != t)
    for near in tl.static_range(VEC):  # the ids of a group follow one another
        other = tl.load(id_ptr + i + near, mask=i + near < K, other=V)
        wanted &= columns != other[:, None]
    return tl.load(row + columns, mask=wanted, other=float("-inf")).to(tl.float32), wanted


@triton.jit
def edges_and_target_group(row, column, id_ptr, K, present, head, body, V, t, VEC: tl.constexpr):
    """Logits [4 * VEC] of the edges and of the target's group, unless that is a support's, -inf in excluded columns.

    present: how many columns the support has. They are sorted: those in the head come first, those in the tail last.
    """
    in_body = (column >= head) & (column < head + body)
    shared = in_body & ((column - head) // VEC * VEC == target_group_of(t, head, VEC))
    columns, is_edge, wanted = edges_and_target(0, body, 1, head, body, V, t, VEC)
    wanted &= (tl.where(is_edge, 0, tl.max(shared.to(tl.int32), 0)) == 0) & (columns != t)
    for near in tl.static_range(VEC):
        first = tl.load(id_ptr + tl.minimum(near, K - 1))
        last = tl.load(id_ptr + tl.maximum(present - 1 - near, 0))
        wanted &= (columns != first) & (columns != last)
    return tl.load(row + columns, mask=wanted, other=float("-inf")).to(tl.float32), wanted


@triton.jit
def sum_of(top, b, r, groups, in_groups, small, in_small, c):
    """Sum of exp2((z - top) * c) over slots (reference b, sum r) and the z of two tensors where they count. NaN where
    top * c is beyond STEEP.
    """
    b_top = reference_of(top, c)
    step, lost = difference(b, b_top)
    total = tl.sum(r * power(step, lost), 0)
    e = tl.where(in_groups, tl.exp2(tl.fma(groups, c, -b_top)), 0.0)
    total += tl.sum(tl.sum(e, 1), 0)
    total += tl.sum(tl.where(in_small, tl.exp2(tl.fma(small, c, -b_top)), 0.0), 0)
    return tl.where(top * c > STEEP, float("nan"), total * tl.exp2(lost_in(b_top, top, c)))


@triton.jit
def reduce_row(
    row, bitmap, id_ptr, K, t, head, body, V, c, logit_scale, softcap, BLOCK: tl.constexpr, VEC: tl.constexpr,
    WIDTH: tl.constexpr, KEEP: tl.constexpr, TRANSFORM: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """(m, r, r1) of the columns that are neither in the support nor t: the maximum of z, -inf of nothing, and the sums
    of exp((z - m) / T) and exp(z - m). c: log2(e) / T. t: -1 without a target. id_ptr: of the row's support.
    """
    clear(bitmap, body, BLOCK, VEC)
    tl.debug_barrier()
    i = tl.arange(0, WIDTH)
    left_out = tl.load(id_ptr + i, mask=i < K, other=V)
    leave_out(bitmap, left_out, (left_out >= head) & (left_out < head + body), head, BLOCK, VEC)
    leave_out(bitmap, t, (t >= head) & (t < head + body), head, BLOCK, VEC)
    tl.debug_barrier()
    m, b, r, b1, r1 = reduce_tiles(row, bitmap, head, body, c, logit_scale, softcap, BLOCK, VEC, KEEP, TRANSFORM, TWICE)
    column = tl.load(id_ptr + i, mask=i < K, other=V)  # again: it need not be kept in registers over the tiles
    present = tl.sum((column < V).to(tl.int32), 0)
    groups, in_groups = shared_groups(row, column, id_ptr, K, head, body, V, t, VEC)
    small, in_small = edges_and_target_group(row, column, id_ptr, K, present, head, body, V, t, VEC)
    x_max = tl.maximum(tl.max(m, 0), tl.maximum(tl.max(tl.max(groups, 1), 0), tl.max(small, 0)))
    top = transform(x_max, logit_scale, softcap, TRANSFORM)
    groups = transform(groups, logit_scale, softcap, TRANSFORM)
    small = transform(small, logit_scale, softcap, TRANSFORM)
    total = sum_of(top, b, r, groups, in_groups, small, in_small, c)
    total_1 = total
    if TWICE:
        total_1 = sum_of(top, b1, r1, groups, in_groups, small, in_small, LOG2E)
    return tl.where(total == 0.0, float("-inf"), top), total, total_1


@triton.jit
def write_tile(
    out, x, valid, scales, logit_scale, softcap, HINT: tl.constexpr, TRANSFORM: tl.constexpr, TWICE: tl.constexpr
):
    """Store the dense gradient a * exp2(z * c - b), or with a second such term, of some logits."""
    a, b, c, a1, b1 = scales
    z = transform(x, logit_scale, softcap, TRANSFORM)
    dx = tl.exp2(tl.fma(z, c, -b)) * a
    if TWICE:
        dx += tl.exp2(tl.fma(z, LOG2E, -b1)) * a1
    dx *= slope(z, logit_scale, softcap, TRANSFORM)
    tl.store(out, dx.to(out.dtype.element_ty), mask=valid, eviction_policy=HINT)


@triton.jit
def gradient_span(
    row, out, first, last, with_edges, head, body, V, scales, logit_scale, softcap,
    BLOCK: tl.constexpr, VEC: tl.constexpr, TOGETHER: tl.constexpr, TRANSFORM: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """Write columns [first, last) of the body of a gradient row to `out`, last tile first, and the edges.

    head, body: of `out`. TOGETHER says that the row of logits has the same alignment.
    """
    columns, in_edges = edges(head, body, V, with_edges, VEC)
    x_edges = tl.load(row + columns, mask=in_edges, other=0.0).to(tl.float32)
    tl.debug_barrier()  # in place: the vector is so short that several threads load each element, and one stores it
    write_tile(out + columns, x_edges, in_edges, scales, logit_scale, softcap, "", TRANSFORM, TWICE)
    start = tl.multiple_of(row + head, 16) if TOGETHER else row + head
    out_start = tl.multiple_of(out + head, 16)
    offsets = tile(BLOCK, VEC)
    full = first + (last - first) // BLOCK * BLOCK
    if full < last:
        valid = groups_before(full, last, BLOCK, VEC)
        at = full + offsets
        x = tl.load(start + at, mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        write_tile(out_start + at, x, valid, scales, logit_scale, softcap, "evict_first", TRANSFORM, TWICE)
    for forth in range(first, full, BLOCK):
        at = first + full - BLOCK - forth + offsets
        x = tl.load(start + at, eviction_policy="evict_first").to(tl.float32)
        write_tile(out_start + at, x, None, scales, logit_scale, softcap, "evict_first", TRANSFORM, TWICE)
