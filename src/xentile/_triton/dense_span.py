"""Three passes over a row of a student's logits and the row of its teacher's.

1. Of each row by itself: the maximum, and the sum of the exponentials of all columns but that maximum. So neither
   log(1 + sum) nor a loss of 1e-20 loses digits to a 1, whatever column the target is, and the tiles need not know it.
2. Of both together: the divergence and E = sum of G, term by term (topk_divergence.py).
3. Of both together: the gradient.

Each pass starts where the one before it ended, in what the cache holds for sure. A row is cut in head, groups and tail
as in span.py, in the first pass at the 16-byte boundaries of its own memory. Then one of the rows decides for both;
if the other's boundaries are elsewhere, its loads are narrow ones, of what the first pass brought to the cache.
"""

import triton
import triton.language as tl

from xentile._triton.row import HUGE, LN2, LOG2E, STEEP, difference, power, slope, transform
from xentile._triton.span import cut, edges, groups_before, tile
from xentile._triton.topk_divergence import divergence, log1p
from xentile._triton.topk_span import lost_in, reference_of


@triton.jit
def join(top_a, others_a, top_b, others_b):
    """(largest, sum of all others) of two sets of numbers that are given in the same way. The sum keeps a NaN."""
    smaller = tl.minimum(top_a, top_b, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(top_a, top_b), others_a + others_b + smaller


@triton.jit
def add_exponentials(state, z, valid, m, c):
    """Add a tile z [G, VEC] to the state (b, top, others) of its G slots, whose maximum is m from now on.

    b       the reference
    top     exp2(z_j * c - b) of the largest z_j
    others  the sum of exp2(z_j * c - b) of all others
    """
    b, top, others = state
    b_new = reference_of(m, c)
    e = tl.exp2(tl.fma(z, c, -b_new[:, None]))
    if valid is not None:  # a softcap makes -softcap of the -inf there
        e = tl.where(valid, e, 0.0)
    rescale = tl.exp2(b - b_new)
    top_here, others_here = tl.reduce((e, tl.zeros_like(e)), 1, join)
    top, others = join(top * rescale, others * rescale, top_here, others_here)
    return b_new, top, others


@triton.jit
def fold(m, state, state_1, x, valid, c, logit_scale, softcap, TRANSFORM: tl.constexpr, TWICE: tl.constexpr):
    """Add a tile of logits x [G, VEC] to the maxima m of its slots, and to what is summed at c and at temperature 1."""
    m = tl.maximum(m, tl.max(x, 1))
    top = transform(m, logit_scale, softcap, TRANSFORM)
    z = transform(x, logit_scale, softcap, TRANSFORM)
    state = add_exponentials(state, z, valid, top, c)
    if TWICE:
        state_1 = add_exponentials(state_1, z, valid, top, LOG2E)
    return m, state, state_1


@triton.jit
def join_slots(state, z, valid, top, c):
    """The sum over all columns but the largest of exp((z_j - top) * c), from the slots' state and the edges' z. NaN
    where |top * c| is beyond STEEP: there float32 has no digits left for what is between two logits.
    """
    b, tops, others = state
    b_top = reference_of(top, c)
    step, lost = difference(b, b_top)
    rescale = power(step, lost)
    top_slots, others_slots = tl.reduce((tops * rescale, others * rescale), 0, join)
    e = tl.where(valid, tl.exp2(tl.fma(z, c, -b_top)), 0.0)
    top_edges, others_edges = tl.reduce((e, tl.zeros_like(e)), 0, join)
    _, total = join(top_slots, others_slots, top_edges, others_edges)
    return tl.where(tl.abs(top * c) > STEEP, float("nan"), total * tl.exp2(lost_in(b_top, top, c)))


@triton.jit
def reduce_row(
    row, V, c, logit_scale, softcap,
    BLOCK: tl.constexpr, TRANSFORM: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """(m, r, r1) of the row at pointer `row`: the maximum of z, and the sums of exp((z - m) / T) and exp(z - m) over
    all columns but one that has the maximum. c: log2(e) / T.
    """
    VEC: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth
    G: tl.constexpr = BLOCK // VEC
    head, body = cut(row, V, VEC)
    zero = tl.zeros([G], tl.float32)
    m = tl.full([G], float("-inf"), tl.float32)
    state = zero - HUGE, zero, zero
    state_1 = zero - HUGE, zero, zero
    start = tl.multiple_of(row + head, 16)
    offsets = tile(BLOCK, VEC)
    full = body // BLOCK * BLOCK
    for k in range(0, full, BLOCK):
        x = tl.load(start + k + offsets, eviction_policy="evict_last").to(tl.float32)
        m, state, state_1 = fold(m, state, state_1, x, None, c, logit_scale, softcap, TRANSFORM, TWICE)
    if full < body:
        valid = groups_before(full, body, BLOCK, VEC)
        at = start + full + offsets
        x = tl.load(at, mask=valid, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        m, state, state_1 = fold(m, state, state_1, x, valid, c, logit_scale, softcap, TRANSFORM, TWICE)
    columns, valid = edges(head, body, V, 1, VEC)
    x = tl.load(row + columns, mask=valid, other=float("-inf")).to(tl.float32)
    top = transform(tl.maximum(tl.max(m, 0), tl.max(x, 0)), logit_scale, softcap, TRANSFORM)
    z = transform(x, logit_scale, softcap, TRANSFORM)
    r = join_slots(state, z, valid, top, c)
    r1 = r
    if TWICE:
        r1 = join_slots(state_1, z, valid, top, LOG2E)
    return top, r, r1


@triton.jit
def softmax_of(m, others, c):
    """What `mass_of` needs, from the maximum and the sum of all other exponentials relative to it."""
    b = reference_of(m, c)
    lost = lost_in(b, m, c)
    return b, lost, tl.exp2(lost) / (1.0 + others), log1p(others)


@triton.jit
def mass_of(z, c, softmax):
    """(q, log q) of logits z. At the maximum, log q = -log(1 + others) keeps all its digits."""
    b, lost, scale, log_total = softmax
    exponent = tl.fma(z, c, -b)
    return tl.exp2(exponent) * scale, tl.fma(exponent + lost, LN2, -log_total)


@triton.jit
def compare(
    x, x_teacher, student, teacher, c, beta, logit_scale, softcap, TRANSFORM: tl.constexpr, DIVERGENCE: tl.constexpr
):
    """(z, q, f, G) of some columns."""
    z = transform(x, logit_scale, softcap, TRANSFORM)
    q, log_q = mass_of(z, c, student)
    p, log_p = mass_of(x_teacher, c, teacher)
    f, slopes = divergence(p, q, log_p, log_q, beta, DIVERGENCE, True)
    return z, q, f, slopes


@triton.jit
def cut_both(row, V, VEC: tl.constexpr):
    """(head, body) at the 16-byte boundaries of `row`, in groups of VEC elements, which may be more than 16 bytes."""
    head, _ = cut(row, V, 128 // row.dtype.element_ty.primitive_bitwidth)
    return head, (V - head) // VEC * VEC


@triton.jit
def aligned(row, head, TOGETHER: tl.constexpr):
    """Where the groups of a row begin; TOGETHER: the row that was cut has the same boundaries."""
    return tl.multiple_of(row + head, 16) if TOGETHER else row + head


@triton.jit
def compare_rows(
    row, teacher_row, head, body, V, student, teacher, c, beta, logit_scale, softcap,
    BLOCK: tl.constexpr, VEC: tl.constexpr, KEEP: tl.constexpr, TOGETHER: tl.constexpr, TEACHER_TOGETHER: tl.constexpr,
    TRANSFORM: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """(KD, E) of two rows, the last tile first. KEEP: the eviction policy of the loads."""
    kd = tl.zeros([BLOCK // VEC], tl.float32)
    expected = tl.zeros([BLOCK // VEC], tl.float32)
    start = aligned(row, head, TOGETHER)
    teacher_start = aligned(teacher_row, head, TEACHER_TOGETHER)
    offsets = tile(BLOCK, VEC)
    full = body // BLOCK * BLOCK
    if full < body:
        valid = groups_before(full, body, BLOCK, VEC)
        at = full + offsets
        x = tl.load(start + at, mask=valid, other=0.0, eviction_policy=KEEP).to(tl.float32)
        y = tl.load(teacher_start + at, mask=valid, other=0.0, eviction_policy=KEEP).to(tl.float32)
        _, _, f, slopes = compare(x, y, student, teacher, c, beta, logit_scale, softcap, TRANSFORM, DIVERGENCE)
        kd += tl.sum(tl.where(valid, f, 0.0), 1)
        expected += tl.sum(tl.where(valid, slopes, 0.0), 1)
    for forth in range(0, full, BLOCK):
        at = full - BLOCK - forth + offsets
        x = tl.load(start + at, eviction_policy=KEEP).to(tl.float32)
        y = tl.load(teacher_start + at, eviction_policy=KEEP).to(tl.float32)
        _, _, f, slopes = compare(x, y, student, teacher, c, beta, logit_scale, softcap, TRANSFORM, DIVERGENCE)
        kd += tl.sum(f, 1)
        expected += tl.sum(slopes, 1)
    columns, valid = edges(head, body, V, 1, VEC)
    x = tl.load(row + columns, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(teacher_row + columns, mask=valid, other=0.0).to(tl.float32)
    _, _, f, slopes = compare(x, y, student, teacher, c, beta, logit_scale, softcap, TRANSFORM, DIVERGENCE)
    kd_all = tl.sum(kd, 0) + tl.sum(tl.where(valid, f, 0.0), 0)
    expected_all = -1.0  # of forward_kl, where G = -p
    if DIVERGENCE != "forward_kl":
        expected_all = tl.sum(expected, 0) + tl.sum(tl.where(valid, slopes, 0.0), 0)
    return kd_all, expected_all


@triton.jit
def write_tile(
    out, x, x_teacher, valid, student, teacher, scales, c, beta, logit_scale, softcap, HINT: tl.constexpr,
    TRANSFORM: tl.constexpr, DIVERGENCE: tl.constexpr, KD: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """Store the gradient k * G + a * q of some columns, or with a third term a1 * exp(z), to the pointers `out`.

    KD: whether k is not 0. TWICE: whether a1 is not.
    """
    k, a, a1, b1 = scales
    z, q, _f, slopes = compare(x, x_teacher, student, teacher, c, beta, logit_scale, softcap, TRANSFORM, DIVERGENCE)
    dx = q * a
    if KD:
        dx += slopes * k  # both rounded: equal rows have no gradient of forward_kl at all
    if TWICE:
        dx = tl.fma(tl.exp2(tl.fma(z, LOG2E, -b1)), a1, dx)
    dx *= slope(z, logit_scale, softcap, TRANSFORM)
    tl.store(out, dx.to(out.dtype.element_ty), mask=valid, eviction_policy=HINT)


@triton.jit
def gradient_span(
    row, teacher_row, out, first, last, with_edges, head, body, V, student, teacher, scales, c, beta,
    logit_scale, softcap,
    BLOCK: tl.constexpr, VEC: tl.constexpr, TOGETHER: tl.constexpr, TEACHER_TOGETHER: tl.constexpr,
    TRANSFORM: tl.constexpr, DIVERGENCE: tl.constexpr, KD: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """Write columns [first, last) of the body of a gradient row to `out`, and its edges if `with_edges`.

    head, body: of `out`.
    """
    columns, in_edges = edges(head, body, V, with_edges, VEC)
    x_edges = tl.load(row + columns, mask=in_edges, other=0.0).to(tl.float32)
    y_edges = tl.load(teacher_row + columns, mask=in_edges, other=0.0).to(tl.float32)
    tl.debug_barrier()  # in place: the vector is so short that several threads load each element, and one stores it
    write_tile(
        out + columns, x_edges, y_edges, in_edges, student, teacher, scales, c, beta, logit_scale, softcap, "",
        TRANSFORM, DIVERGENCE, KD, TWICE,
    )  # fmt: skip
    start = aligned(row, head, TOGETHER)
    teacher_start = aligned(teacher_row, head, TEACHER_TOGETHER)
    out_start = tl.multiple_of(out + head, 16)
    offsets = tile(BLOCK, VEC)
    full = first + (last - first) // BLOCK * BLOCK
    for k in range(first, full, BLOCK):
        x = tl.load(start + k + offsets, eviction_policy="evict_first").to(tl.float32)
        y = tl.load(teacher_start + k + offsets, eviction_policy="evict_first").to(tl.float32)
        write_tile(
            out_start + k + offsets, x, y, None, student, teacher, scales, c, beta, logit_scale, softcap, "evict_first",
            TRANSFORM, DIVERGENCE, KD, TWICE,
        )  # fmt: skip
    if full < last:
        valid = groups_before(full, last, BLOCK, VEC)
        at = full + offsets
        x = tl.load(start + at, mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = tl.load(teacher_start + at, mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        write_tile(
            out_start + at, x, y, valid, student, teacher, scales, c, beta, logit_scale, softcap, "evict_first",
            TRANSFORM, DIVERGENCE, KD, TWICE,
        )  # fmt: skip
