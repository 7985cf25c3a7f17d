"""Reducing a span of one row, and writing its gradient.

A row starts at any element, so it is cut in three: `head` elements up to the next 16-byte boundary, the `body` of
whole 16-byte groups, and the tail of less than a group. The body goes through vector loads in tiles [BLOCK // VEC,
VEC], where a thread owns the VEC logits of a group; the two edges are one small vector of 2 * VEC elements. Nothing
is read outside the row, and nothing in the compiled code depends on V or the strides.

The target must not be in the sum. Testing every column for it would cost two instructions a logit; instead its whole
group is left out of the tiles and added, without the target, at the end. Likewise the gradient is written everywhere
by one formula, and over the target's after a barrier.
"""

import triton
import triton.language as tl

from xentile._triton.row import (
    LOG2E,
    difference,
    gradient,
    is_steep,
    power,
    reference_of,
    residue,
    slope,
    transform,
)


@triton.jit
def cut(start, V, VEC: tl.constexpr):
    """(head, body) in elements, of the row of V elements at pointer `start`."""
    BYTES: tl.constexpr = 16 // VEC
    head = tl.minimum((-start.to(tl.int64) & 15) // BYTES, V).to(tl.int32)
    return head, (V - head) // VEC * VEC


@triton.jit
def tile(BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Offsets [BLOCK // VEC, VEC] of a tile."""
    return tl.arange(0, BLOCK // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def groups_before(first, last, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Mask [BLOCK // VEC, 1] of a tile at `first`: one bit for a whole group, so that the masked access is a vector
    too.
    """
    return (first + tl.arange(0, BLOCK // VEC) * VEC < last)[:, None]


@triton.jit
def edges(head, body, V, wanted, VEC: tl.constexpr):
    """(columns, valid) of the head and the tail, [2 * VEC]; wanted is 1, or 0 for a program that leaves them to
    another one.
    """
    i = tl.arange(0, 2 * VEC)
    columns = tl.where(i < VEC, i, head + body + i - VEC)
    return columns, tl.where(i < VEC, i < head * wanted, columns < V * wanted)


@triton.jit
def part_of(body, part, splits, BLOCK: tl.constexpr):
    """[first, last) of a part of the body, in whole tiles but for the last one."""
    size = tl.cdiv(tl.cdiv(body, BLOCK), splits) * BLOCK
    return tl.minimum(part * size, body), tl.minimum(part * size + size, body)


@triton.jit
def load_weight(weight, columns, valid, SMOOTH: tl.constexpr):
    """Class weights where smoothing sums over them; 1 without weights, and 0 in invalid columns."""
    w = tl.full(columns.shape, 1.0, tl.float32)
    if SMOOTH:
        if weight is not None:
            w = tl.load(weight + columns, mask=valid)
        if valid is not None:
            w = tl.where(valid, w, 0.0)
    return w


@triton.jit
def empty_state(G: tl.constexpr):
    """The state of G slots that have seen nothing; see `fold`."""
    zero = tl.zeros([G], tl.float32)
    lowest = tl.full([G], float("-inf"), tl.float32)
    none = tl.zeros([G], tl.int32)
    return lowest, none, reference_of(lowest), zero, zero, zero, zero, none


@triton.jit
def fold(
    state, x, w, valid, k, target_tile, x_t, logit_scale, softcap,
    TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Add the tile x [G, VEC] at k of the body to the state of its G slots.

    m         maximum of x, and `best`, the k of the tile that brought it
    b, rest   the reference, and the sum of e_j = exp2(z_j * log2(e) - b)
    gap       the sum of e_j * (b - z_j * log2(e))      (for the entropy)
    deficit   the sum of w_j * (b - z_j * log2(e)), and `seen`, the sum of w_j      (for label smoothing)
    ahead     how many columns rank before the target

    rest, gap and ahead leave the target's group out: where k is target_tile [G]. `valid` is a mask [G, 1], or None.
    The maximum of a group is taken first, so that the running sum is rescaled once for VEC logits.
    """
    m, best, b, rest, gap, deficit, seen, ahead = state
    group_max = tl.max(x, 1)
    best = tl.where(group_max > m, k, best)
    m = tl.maximum(m, group_max)
    b_new = reference_of(transform(m, logit_scale, softcap, TRANSFORM))
    arg = tl.fma(transform(x, logit_scale, softcap, TRANSFORM), LOG2E, -b_new[:, None])
    counts = target_tile != k
    if SMOOTH:
        below = -arg * w
        if valid is not None:
            below = tl.where(valid, below, 0.0)
        deficit += seen * (b_new - b) + tl.sum(below, 1)
        seen += tl.sum(w + 0.0, 1)  # Triton 3.6 fails to compile the sum of a load in a loop
    if RANK:
        before = (x > x_t) | ((x == x_t) & (k < target_tile)[:, None])
        if valid is not None:
            before &= valid
        ahead += tl.where(counts, tl.sum(before.to(tl.int32), 1), 0)
    if valid is not None and TRANSFORM == "softcap":  # which makes -softcap of the -inf in invalid columns
        arg = tl.where(valid, arg, float("-inf"))
    e = tl.exp2(arg)
    rescale = tl.exp2(b - b_new)
    if ENTROPY:
        more = tl.sum(tl.where(e > 0.0, -arg * e, 0.0), 1)
        gap = rescale * (gap + (b_new - b) * rest) + tl.where(counts, more, 0.0)
    rest = rest * rescale + tl.where(counts, tl.sum(e, 1), 0.0)
    return m, best, b_new, rest, gap, deficit, seen, ahead


@triton.jit
def finish_span(
    state, row, weight, first, last, with_edges, head, body, V, t, x_t, logit_scale, softcap,
    VEC: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Join slots, edges and the target's group to (x_max, rest, gap, deficit, seen, argmax, ahead), scalars.

    rest, gap and ahead are without the target; sums are relative to the maximum itself, not its rounded reference.
    """
    m, best, b, rest, gap, deficit, seen, ahead = state
    columns, is_edge, valid = edges_and_target(first, last, with_edges, head, body, V, t, VEC)
    x = tl.load(row + columns, mask=valid, other=float("-inf")).to(tl.float32)
    x_max = tl.maximum(tl.max(m, 0), tl.max(x, 0))
    # The lowest column with the maximum: among these, or in the first group that has it, which is read again.
    slots = tl.arange(0, m.shape[0]) * VEC
    winner = tl.min(tl.where(m == x_max, head + best + slots, V), 0) + tl.arange(0, VEC)
    known = (winner >= head + first) & (winner < head + last)
    winner_x = tl.load(row + winner, mask=known, other=float("nan")).to(tl.float32)
    argmax = tl.min(tl.where(winner_x == x_max, winner, V), 0)
    argmax = tl.minimum(argmax, tl.min(tl.where(valid & (x == x_max), columns, V), 0))

    top = transform(x_max, logit_scale, softcap, TRANSFORM)
    b_top = reference_of(top)
    shift = residue(top, b_top)
    arg = tl.fma(transform(x, logit_scale, softcap, TRANSFORM), LOG2E, -b_top)
    e = tl.where(valid & (columns != t), tl.exp2(arg), 0.0)
    step, lost = difference(b, b_top)
    rescale = power(step, lost)
    rest_all = tl.sum(rest * rescale, 0) + tl.sum(e, 0)
    gap_all = 0.0
    if ENTROPY:
        gap_all = tl.sum(rescale * (gap - step * rest), 0) + tl.sum(tl.where(e > 0.0, -arg * e, 0.0), 0)
        gap_all = (gap_all - shift * rest_all) * tl.exp2(shift)
    deficit_all = 0.0
    seen_all = 0.0
    if SMOOTH:
        w = load_weight(weight, columns, valid & is_edge, SMOOTH)
        seen_all = tl.sum(seen, 0) + tl.sum(w, 0)
        deficit_all = tl.sum(deficit - seen * step, 0) + tl.sum(tl.where(valid & is_edge, -arg * w, 0.0), 0)
        deficit_all -= shift * seen_all
    if is_steep(top):
        rest_all, deficit_all = finish_steep(
            row, weight, first, last, with_edges, head, body, V, t, top, logit_scale, softcap,
            2 * VEC, TRANSFORM, SMOOTH,
        )  # fmt: skip
        gap_all = 0.0 * rest_all
    ahead_all = 0
    if RANK:
        before = valid & ((x > x_t) | ((x == x_t) & (columns < t)))
        ahead_all = tl.sum(ahead, 0) + tl.sum(before.to(tl.int32), 0)
    return x_max, rest_all * tl.exp2(shift), gap_all, deficit_all, seen_all, argmax, ahead_all


@triton.jit
def finish_steep(
    row, weight, first, last, with_edges, head, body, V, t, top, logit_scale, softcap,
    WIDTH: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """(rest, deficit) of a span whose maximum `top` is steep, see row.py: it is read again to count the maxima."""
    rest = tl.zeros([WIDTH], tl.float32)
    deficit = tl.zeros([WIDTH], tl.float32)
    for k in range(0, V, WIDTH):
        columns = k + tl.arange(0, WIDTH)
        wanted = (columns < head * with_edges) | ((columns >= head + body) & (columns < V * with_edges))
        wanted |= (columns >= head + first) & (columns < head + last)
        x = tl.load(row + columns, mask=wanted, other=float("-inf")).to(tl.float32)
        z = transform(x, logit_scale, softcap, TRANSFORM)
        is_top = tl.where(z < top, 0.0, tl.where(z >= top, 1.0, float("nan")))
        rest += tl.where(wanted & (columns != t), is_top, 0.0)
        if SMOOTH:
            w = load_weight(weight, columns, wanted, SMOOTH)
            deficit += tl.where(wanted, (top - z) * w, 0.0)
    return tl.sum(rest, 0), tl.sum(deficit, 0) * LOG2E


@triton.jit
def edges_and_target(first, last, with_edges, head, body, V, t, VEC: tl.constexpr):
    """(columns, is_edge, valid) [4 * VEC]: head, tail, and the target's group if [first, last) of the body has it."""
    i = tl.arange(0, 4 * VEC)
    group = target_group_of(t, head, VEC)
    columns = tl.where(i < VEC, i, head + tl.where(i < 2 * VEC, body + i - VEC, group + i - 2 * VEC))
    edge = tl.where(i < VEC, i < head * with_edges, columns < V * with_edges)
    in_span = ((group >= first) & (group < last)).to(tl.int32)
    return columns, i < 2 * VEC, tl.where(i < 2 * VEC, edge, i < 3 * VEC * in_span)


@triton.jit
def target_group_of(t, head, VEC: tl.constexpr):
    """Where in the body the target's group begins; negative if the target is before the body, or there is none."""
    return tl.where(t < head, -VEC, (t - head) // VEC * VEC)


@triton.jit
def target_tile_of(t, head, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """[BLOCK // VEC]: for each slot, where the tile would begin in which it has the target's group."""
    return target_group_of(t, head, VEC) - tl.arange(0, BLOCK // VEC) * VEC


@triton.jit
def reduce_span(
    row, weight, first, last, with_edges, head, body, V, t, x_t, logit_scale, softcap,
    BLOCK: tl.constexpr, VEC: tl.constexpr, KEEP: tl.constexpr, TRANSFORM: tl.constexpr,
    SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """`finish_span` of columns [first, last) of the body of the row at pointer `row`, and its edges if `with_edges`.

    t is the target's column, -1 if there is none; x_t its logit. KEEP: the eviction policy of the loads.
    """
    state = empty_state(BLOCK // VEC)
    start = tl.multiple_of(row + head, 16)
    offsets = tile(BLOCK, VEC)
    target_tile = target_tile_of(t, head, BLOCK, VEC)
    full = first + (last - first) // BLOCK * BLOCK
    for k in range(first, full, BLOCK):
        x = tl.load(start + k + offsets, eviction_policy=KEEP).to(tl.float32)
        w = load_weight(weight, head + k + offsets, None, SMOOTH)
        state = fold(state, x, w, None, k, target_tile, x_t, logit_scale, softcap, TRANSFORM, SMOOTH, ENTROPY, RANK)
    if full < last:
        valid = groups_before(full, last, BLOCK, VEC)
        x = tl.load(start + full + offsets, mask=valid, other=float("-inf"), eviction_policy=KEEP).to(tl.float32)
        w = load_weight(weight, head + full + offsets, valid, SMOOTH)
        state = fold(state, x, w, valid, full, target_tile, x_t, logit_scale, softcap, TRANSFORM, SMOOTH, ENTROPY, RANK)
    return finish_span(
        state, row, weight, first, last, with_edges, head, body, V, t, x_t, logit_scale, softcap,
        VEC, TRANSFORM, SMOOTH, ENTROPY, RANK,
    )  # fmt: skip


@triton.jit
def write_tile(
    out, x, w, valid, scales, logit_scale, softcap, HINT: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr
):
    """Store the gradient of some logits x to the pointers `out`."""
    z = transform(x, logit_scale, softcap, TRANSFORM)
    dx = gradient(z, w, scales, slope(z, logit_scale, softcap, TRANSFORM), SMOOTH)
    tl.store(out, dx.to(out.dtype.element_ty), mask=valid, eviction_policy=HINT)


@triton.jit
def write_edges(
    row, out, weight, head, body, V, scales, logit_scale, softcap,
    VEC: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the head and the tail."""
    columns, valid = edges(head, body, V, 1, VEC)
    x = tl.load(row + columns, mask=valid, other=0.0).to(tl.float32)
    w = load_weight(weight, columns, valid, SMOOTH)
    tl.debug_barrier()  # in place: the vector is so short that several threads load each element, and one stores it
    write_tile(out + columns, x, w, valid, scales, logit_scale, softcap, "", TRANSFORM, SMOOTH)


@triton.jit
def write_target(out, t, at_target, here):
    """The target's gradient over the one that the common formula gave it."""
    tl.debug_barrier()
    tl.store(out + t, at_target.to(out.dtype.element_ty), mask=here)


@triton.jit
def gradient_span(
    row, out, weight, first, last, head, scales, logit_scale, softcap,
    BLOCK: tl.constexpr, VEC: tl.constexpr, TOGETHER: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Write columns [first, last) of the body of a gradient row to `out`, backwards: the last logits are still in the
    cache.

    `head` is that of `out`. TOGETHER says that the row of logits has the same alignment; if not, only the stores are
    vectors.
    """
    start = tl.multiple_of(row + head, 16) if TOGETHER else row + head
    out_start = tl.multiple_of(out + head, 16)
    offsets = tile(BLOCK, VEC)
    full = first + (last - first) // BLOCK * BLOCK
    if full < last:
        valid = groups_before(full, last, BLOCK, VEC)
        x = tl.load(start + full + offsets, mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        w = load_weight(weight, head + full + offsets, valid, SMOOTH)
        write_tile(
            out_start + full + offsets, x, w, valid, scales, logit_scale, softcap, "evict_first", TRANSFORM, SMOOTH
        )
    for forth in range(first, full, BLOCK):
        back = first + full - BLOCK - forth
        x = tl.load(start + back + offsets, eviction_policy="evict_first").to(tl.float32)
        w = load_weight(weight, head + back + offsets, None, SMOOTH)
        write_tile(
            out_start + back + offsets, x, w, None, scales, logit_scale, softcap, "evict_first", TRANSFORM, SMOOTH
        )


@triton.jit
def zero_span(out, first, last, with_edges, head, body, V, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """The gradient of a row without a target: zeros, without reading the logits."""
    out_start = tl.multiple_of(out + head, 16)
    offsets = tile(BLOCK, VEC)
    zeros = tl.zeros([BLOCK // VEC, VEC], out.dtype.element_ty)
    for column in range(first, last, BLOCK):
        valid = groups_before(column, last, BLOCK, VEC)
        tl.store(out_start + column + offsets, zeros, mask=valid, eviction_policy="evict_first")
    columns, valid = edges(head, body, V, with_edges, VEC)
    tl.store(out + columns, tl.zeros([2 * VEC], out.dtype.element_ty), mask=valid)
