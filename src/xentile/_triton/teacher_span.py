"""Sums over a row of teacher logits, in slots: slot s of a tile has the groups of 16 bytes at s * VEC of every tile.

Each slot keeps its own maximum and its sum relative to that. So once the whole row has been seen, whole slots can be
left out of the sum again, those that the top K can be in; their logits are few, and are read once more.

Exponents are differences that are then scaled, exp2((z - m) * c) with c = log2(e) / T, and not fma(z, c, -b): T comes
from the user, and b = m * c of a cold one has rounded away what z - m is.
"""

import triton
import triton.language as tl

from xentile._triton.row import LOG2E, transform
from xentile._triton.span import edges, groups_before, tile
from xentile._triton.teacher_keys import key_of

LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum for slots of -inf, so that no inf - inf arises


@triton.jit
def scale_of(temperature):
    """The c of a temperature, kept finite and normal: what it is multiplied with may be 0 or infinite."""
    return tl.minimum(tl.maximum(tl.div_rn(LOG2E, temperature), 1e-37), 1e38)


@triton.jit
def reference_of(m, logit_scale, softcap, TRANSFORM: tl.constexpr):
    """The finite z that the sum of a slot with maximum logit m is relative to."""
    return tl.maximum(transform(m, logit_scale, softcap, TRANSFORM), LOWEST)


@triton.jit
def fold(state, x, valid, first, c, logit_scale, softcap, TRANSFORM: tl.constexpr):
    """Add a tile x [G, W] to the state of its G slots, -inf where `valid` does not hold (None: it does everywhere).

    m           maximum of x, and `best`, the `first` of the first tile that has it
    b, r        the reference, and the sum of exp2((z - b) * c)
    """
    m, best, b, r = state
    largest = tl.max(x, 1)
    best = tl.where(largest > m, first, best)
    m = tl.maximum(m, largest)
    b_new = reference_of(m, logit_scale, softcap, TRANSFORM)
    e = tl.exp2((transform(x, logit_scale, softcap, TRANSFORM) - b_new[:, None]) * c)
    if valid is not None and TRANSFORM == "softcap":  # which makes -softcap of the -inf there
        e = tl.where(valid, e, 0.0)
    return m, best, b_new, r * tl.exp2((b - b_new) * c) + tl.sum(e, 1)


@triton.jit
def empty_state(G: tl.constexpr):
    nothing = tl.full([G], float("-inf"), tl.float32)
    zero = tl.zeros([G], tl.float32)
    return nothing, tl.zeros([G], tl.int32), zero + LOWEST, zero


@triton.jit
def reduce_tiles(
    row, head, body, c, logit_scale, softcap, BLOCK: tl.constexpr, VEC: tl.constexpr, TRANSFORM: tl.constexpr
):
    """(m, best, r), see `fold`, of each slot of the body of the row at pointer `row`."""
    state = empty_state(BLOCK // VEC)
    start = tl.multiple_of(row + head, 16)
    offsets = tile(BLOCK, VEC)
    full = body // BLOCK * BLOCK
    for k in range(0, full, BLOCK):
        x = tl.load(start + k + offsets).to(tl.float32)
        state = fold(state, x, None, k, c, logit_scale, softcap, TRANSFORM)
    if full < body:
        valid = groups_before(full, body, BLOCK, VEC)
        x = tl.load(start + full + offsets, mask=valid, other=float("-inf")).to(tl.float32)
        state = fold(state, x, valid, full, c, logit_scale, softcap, TRANSFORM)
    m, best, _b, r = state
    return m, best, r


@triton.jit
def join_slots(m, r, c, logit_scale, softcap, TRANSFORM: tl.constexpr):
    """(m, r) of all slots together."""
    top = tl.max(m, 0)
    b = reference_of(m, logit_scale, softcap, TRANSFORM)
    b_top = reference_of(top, logit_scale, softcap, TRANSFORM)
    return top, tl.sum(r * tl.exp2((b - b_top) * c), 0)


@triton.jit
def leave_out(m, r, out, c, logit_scale, softcap, TRANSFORM: tl.constexpr):
    """(m, r) of all slots but some together: two numbers, so that no thread keeps its slots any longer."""
    m = tl.where(out, float("-inf"), m)
    return join_slots(m, tl.where(out, 0.0, r), c, logit_scale, softcap, TRANSFORM)


@triton.jit
def elements_of(listed, body, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """How many elements `listed` slots have, if the last tile is full."""
    return tl.cdiv(body, BLOCK) * listed * VEC


@triton.jit
def read_slots(row, slot_ptr, listed, first, head, body, BLOCK: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr):
    """(x, column, group, valid) [WIDTH] of the elements `first`, ... of the `listed` slots at slot_ptr, tile by tile.

    group: the first column of the 16 bytes that a column is in.
    """
    i = first + tl.arange(0, WIDTH)
    there = i < elements_of(listed, body, BLOCK, VEC)
    slot = tl.load(slot_ptr + i // VEC % tl.maximum(listed, 1), mask=there, other=0)
    group = i // VEC // tl.maximum(listed, 1) * BLOCK + slot * VEC
    valid = there & (group < body)
    group += head
    column = group + i % VEC
    # Not in vectors: threads would need as many candidates' places and keys at once.
    x = tl.load(row + column, mask=valid, other=float("-inf")).to(tl.float32)
    return x, column, group, valid


@triton.jit
def reduce_rest(
    row, slot_ptr, listed, last, head, body, c, logit_scale, softcap,
    BLOCK: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """(m, r) of the listed slots without the columns whose keys are `last` or more."""
    state = empty_state(WIDTH)
    for first in range(0, elements_of(listed, body, BLOCK, VEC), WIDTH):
        x, column, _group, valid = read_slots(row, slot_ptr, listed, first, head, body, BLOCK, VEC, WIDTH)
        valid &= key_of(x, column) < last
        x = tl.where(valid, x, float("-inf"))
        state = fold(state, x[:, None], valid[:, None], first, c, logit_scale, softcap, TRANSFORM)
    m, _best, _b, r = state
    return join_slots(m, r, c, logit_scale, softcap, TRANSFORM)


@triton.jit
def tail_of(
    row, others, slot_ptr, listed, last, head, body, V, c, logit_scale, softcap,
    BLOCK: tl.constexpr, VEC: tl.constexpr, WIDTH: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """(top, total) of the columns with keys less than `last`: their maximum, and their sum of exp2((z - top) * c).

    others: (m, r) of the slots that are not listed.
    """
    m, r = others
    m_rest, r_rest = reduce_rest(
        row, slot_ptr, listed, last, head, body, c, logit_scale, softcap, BLOCK, VEC, WIDTH, TRANSFORM
    )
    columns, in_edges = edges(head, body, V, 1, VEC)
    x = tl.load(row + columns, mask=in_edges, other=float("-inf")).to(tl.float32)
    in_edges &= key_of(x, columns) < last
    x = tl.where(in_edges, x, float("-inf"))
    top = reference_of(tl.maximum(tl.maximum(m, m_rest), tl.max(x, 0)), logit_scale, softcap, TRANSFORM)
    total = r * tl.exp2((reference_of(m, logit_scale, softcap, TRANSFORM) - top) * c)
    total += r_rest * tl.exp2((reference_of(m_rest, logit_scale, softcap, TRANSFORM) - top) * c)
    e = tl.exp2((transform(x, logit_scale, softcap, TRANSFORM) - top) * c)
    return top, total + tl.sum(tl.where(in_edges, e, 0.0), 0)


@triton.jit
def is_broken(row, m, r, head, body, V, logit_scale, softcap, VEC: tl.constexpr, TRANSFORM: tl.constexpr):
    """Whether a z of the row is NaN or +inf, which make NaN of a slot's sum, or all of them are -inf."""
    columns, in_edges = edges(head, body, V, 1, VEC)
    x = tl.load(row + columns, mask=in_edges, other=float("-inf")).to(tl.float32)
    x_max = tl.maximum(tl.max(m, 0), tl.max(x, 0))
    nothing = transform(x_max, logit_scale, softcap, TRANSFORM) == float("-inf")
    finite = transform(tl.where(in_edges, x, 0.0), logit_scale, softcap, TRANSFORM) < float("inf")
    broken = tl.max((r != r).to(tl.int32), 0) | tl.max(1 - finite.to(tl.int32), 0)
    return (broken != 0) | nothing
