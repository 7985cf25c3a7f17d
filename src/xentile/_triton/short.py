"""Short rows, several of them a program: forward and gradient, each row held by a few threads.

With a warp a row, what is done once a row (losses, statistics, coefficients: some 300 instructions) costs more than
the logits. Here a row has LANES threads, so few that each holds up to 64 logits, and a warp does that work for all of
its rows at once.

The tile of a program is [GROUPS, ROWS, LANES, VEC]. In this order Triton deals the threads of a warp to LANES first
and to ROWS then, so a thread holds GROUPS groups of VEC logits, of one row. V is a multiple of VEC, and all rows are
aligned to a group. As in span.py the target's whole group is left out of the sum, and read again for what else is in
it; so is the group with the maximum, for its column.
"""

import triton
import triton.language as tl

from xentile._triton.epilogue import UNSPECIALIZED, read_divisor, read_logit, read_target, read_weights, write_row
from xentile._triton.row import LOG2E, coefficients, is_steep, residue, scale_of, slope, transform
from xentile._triton.span import load_weight, write_tile

NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def across(row):
    """A vector of rows as a tile [1, ROWS, 1, 1]."""
    return row[:, None][None, :, :][:, :, :, None]


@triton.jit
def tile_of(V, GROUPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """(lane, step, group, inside) of a tile, but for its rows.

    lane + step are the columns, step what differs within a thread, for addresses with constant offsets. group: its
    number. inside: whether it is one of the row.
    """
    lane = (tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :])[None, None, :, :]
    step = (tl.arange(0, GROUPS) * (LANES * VEC))[:, None, None, None]
    group = tl.arange(0, GROUPS)[:, None, None, None] * LANES + tl.arange(0, LANES)[None, None, :, None]
    return lane, step, group, group * VEC < V


@triton.jit
def over_row(x, combine: tl.constexpr):
    """The maximum, minimum or sum over a tile, a vector of rows."""
    if combine == "max":
        return tl.max(tl.max(tl.max(x, 3), 0), 1)
    if combine == "min":
        return tl.min(tl.min(tl.min(x, 3), 0), 1)
    return tl.sum(tl.sum(tl.sum(x, 3), 0), 1)


@triton.jit
def read_again(x_row, group, wanted, VEC: tl.constexpr):
    """(columns, logits) [1, ROWS, LANES, VEC] of one group for each thread, -inf where none is wanted."""
    columns = group * VEC + tl.arange(0, VEC)[None, None, None, :]
    x = tl.load(across(x_row) + columns, mask=wanted, other=float("-inf"))
    return columns, x.to(tl.float32)


@triton.jit
def first_maximum(x_row, group_max, x_max, group, V, VEC: tl.constexpr):
    """The lowest column with the maximum of its row, V where nothing is above -inf: such a row may not be readable."""
    wanted = across(tl.where(x_max > float("-inf"), x_max, float("nan")))
    best = tl.min(tl.where(group_max == wanted, group, NOWHERE), 0, keep_dims=True)
    columns, x = read_again(x_row, best, best < NOWHERE, VEC)
    return over_row(tl.where(x == wanted, columns, V), "min")


@triton.jit
def reduce_rows(
    x, w, inside, group, columns, x_row, V, t, x_t, logit_scale, softcap,
    TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """What `reduce_span` returns, a vector of rows each, for the tile x.

    w: class weights. inside: where there are columns. group [GROUPS, 1, LANES, 1]: numbers of the groups.
    """
    LANES: tl.constexpr = x.shape[2]
    VEC: tl.constexpr = x.shape[3]
    group_max = tl.max(x, 3, keep_dims=True)
    x_max = over_row(group_max, "max")
    top = transform(x_max, logit_scale, softcap, TRANSFORM)
    c, b = scale_of(top)
    shift = residue(top, b)
    scale = tl.exp2(shift)
    arg = tl.fma(transform(x, logit_scale, softcap, TRANSFORM), across(c), -across(b))
    if TRANSFORM == "softcap":  # which makes -softcap of the -inf outside
        arg = tl.where(inside, arg, float("-inf"))
    e = tl.exp2(arg)

    target_group = across(tl.where(t < 0, -1, t // VEC))
    counts = group != target_group
    own = target_group == target_group // LANES * LANES + tl.arange(0, LANES)[None, None, :, None]
    near, near_x = read_again(x_row, tl.broadcast_to(target_group, own.shape), own & across(t >= 0), VEC)
    near_arg = tl.fma(transform(near_x, logit_scale, softcap, TRANSFORM), across(c), -across(b))
    near_e = tl.where(own & across(t >= 0) & (near != across(t)), tl.exp2(near_arg), 0.0)
    rest = over_row(tl.where(counts, tl.sum(e, 3, keep_dims=True), 0.0), "sum") + over_row(near_e, "sum")
    gap = 0.0
    if ENTROPY:
        terms = tl.sum(tl.where(e > 0.0, -arg * e, 0.0), 3, keep_dims=True)
        gap = over_row(tl.where(counts, terms, 0.0), "sum")
        gap += over_row(tl.where(near_e > 0.0, -near_arg * near_e, 0.0), "sum")
        gap = (gap - shift * rest) * scale
    deficit = 0.0
    if SMOOTH:
        deficit = over_row(tl.where(inside, -arg * w, 0.0), "sum") - shift * over_row(w, "sum")
        deficit *= tl.where(is_steep(top), LOG2E, 1.0)
    ahead = 0
    if RANK:
        before = (x > across(x_t)) | ((x == across(x_t)) & (columns < across(t)))
        ahead = over_row(before.to(tl.int32), "sum")
    return x_max, rest * scale, gap, deficit, 0.0, first_maximum(x_row, group_max, x_max, group, V, VEC), ahead


@triton.jit
def write_rows(
    out, dx_row, x, w, inside, t, here, in_range, scales, at_target, logit_scale, softcap,
    TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the tile x to the pointers `out`; zeros in rows without a target."""
    c, b, a, k = scales
    tl.debug_barrier()  # in place: no thread may still be reading the rows
    scales = across(c), across(b), across(a), across(k) if SMOOTH else k
    live = inside & across(in_range)
    write_tile(out, x, w, live, scales, logit_scale, softcap, "evict_first", TRANSFORM, SMOOTH)
    # Zeros by stores of their own: that is cheaper than to choose between zero and each element.
    dead = inside & across(here & (in_range == 0))
    tl.store(out, tl.zeros(x.shape, out.dtype.element_ty), mask=dead, eviction_policy="evict_first")
    tl.debug_barrier()
    tl.store(dx_row + t, at_target.to(dx_row.dtype.element_ty), mask=in_range)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def short_row_kernel(
    x_ptr, target_ptr, weight_ptr, weight_sum_ptr, token_weight_ptr, normalizer_ptr, group_ptr,
    row_loss_ptr, token_loss_ptr, lse_ptr, max_ptr, sum_ptr, predicted_ptr, correct_ptr, entropy_ptr, rank_ptr,
    sketch_ptr, dx_ptr,
    N, V, x_stride: tl.int64, dx_stride: tl.int64, groups, ignore_index: tl.int64, zero_if_empty,
    label_smoothing, z_loss, softcap, logit_scale,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Rows [i, i + 1) * ROWS for program i: reduce, epilogue and, with dx_ptr, the gradient."""
    BYTES: tl.constexpr = VEC * x_ptr.dtype.element_ty.primitive_bitwidth // 8
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < N
    t, valid, in_range = read_target(target_ptr, row, here, ignore_index, V)
    valid &= here
    in_range &= here
    x_row = tl.multiple_of(x_ptr + row * x_stride, [BYTES])
    x_t, z_t = read_logit(x_row + t, in_range, logit_scale, softcap, TRANSFORM)
    weights = read_weights(weight_ptr, weight_sum_ptr, token_weight_ptr, row, t, in_range, V, SMOOTH)
    t = tl.where(in_range, t, -1)

    lane, step, group, inside = tile_of(V, GROUPS, LANES, VEC)
    x = tl.load(
        across(x_row) + lane + step, mask=inside & across(valid), other=float("-inf"), eviction_policy="evict_first"
    ).to(tl.float32)
    w = load_weight(weight_ptr, lane + step, inside, SMOOTH)
    reduction = reduce_rows(
        x, w, inside, group, lane + step, x_row, V, t, x_t, logit_scale, softcap,
        TRANSFORM, SMOOTH, entropy_ptr is not None, rank_ptr is not None,
    )  # fmt: skip
    outputs = (
        row_loss_ptr, token_loss_ptr, lse_ptr, max_ptr, sum_ptr,
        predicted_ptr, correct_ptr, entropy_ptr, rank_ptr, sketch_ptr,
    )  # fmt: skip
    ce, m, total = write_row(
        row, here, t, valid, in_range, z_t, reduction, weights, outputs, group_ptr, groups, V,
        logit_scale, softcap, label_smoothing, z_loss, TRANSFORM, SMOOTH, BITS,
    )  # fmt: skip
    if dx_ptr is not None:
        g = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), read_divisor(normalizer_ptr, zero_if_empty))
        scales, at_target = coefficients(
            g, weights, slope(z_t, logit_scale, softcap, TRANSFORM), ce, m, total, V,
            label_smoothing, z_loss, logit_scale, SMOOTH,
        )  # fmt: skip
        dx_row = tl.multiple_of(dx_ptr + row * dx_stride, [BYTES])
        w = load_weight(weight_ptr, lane + step, inside, SMOOTH)  # again: it need not be kept in registers until here
        write_rows(
            across(dx_row) + lane + step, dx_row, x, w, inside, t, here, in_range, scales, at_target,
            logit_scale, softcap, TRANSFORM, SMOOTH,
        )  # fmt: skip
