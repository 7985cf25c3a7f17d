"""The forward kernels: one program a row, or a few long rows split over many programs."""

import triton
import triton.language as tl

from xentile._triton.epilogue import (
    UNSPECIALIZED,
    read_divisor,
    read_logit,
    read_target,
    read_weights,
    write_row,
)
from xentile._triton.row import LOG2E, STEEP, coefficients, difference, is_steep, power, slope, transform
from xentile._triton.span import (
    cut,
    empty_state,
    finish_span,
    fold,
    gradient_span,
    groups_before,
    load_weight,
    part_of,
    reduce_span,
    target_tile_of,
    tile,
    write_edges,
    write_target,
    write_tile,
    zero_span,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def row_kernel(
    x_ptr, target_ptr, weight_ptr, weight_sum_ptr, token_weight_ptr, normalizer_ptr, group_ptr,
    row_loss_ptr, token_loss_ptr, lse_ptr, max_ptr, sum_ptr, predicted_ptr, correct_ptr, entropy_ptr, rank_ptr,
    sketch_ptr, dx_ptr,
    V, x_stride: tl.int64, dx_stride: tl.int64, groups, ignore_index: tl.int64, zero_if_empty,
    label_smoothing, z_loss, softcap, logit_scale,
    BLOCK: tl.constexpr, RESIDENT: tl.constexpr, TOGETHER: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """One program a row: reduce, epilogue and, with dx_ptr, the gradient.

    RESIDENT: the row fits in one tile, which stays in registers for the gradient (that needs TOGETHER). Otherwise the
    row is streamed, and its second read is meant to come from the L2 cache.
    """
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    ENTROPY: tl.constexpr = entropy_ptr is not None
    RANK: tl.constexpr = rank_ptr is not None
    KEEP: tl.constexpr = "evict_first" if dx_ptr is None else "evict_last"
    row = tl.program_id(0).to(tl.int64)
    t, valid, in_range = read_target(target_ptr, row, row >= 0, ignore_index, V)
    x_row = x_ptr + row * x_stride
    x_t, z_t = read_logit(x_row + t, in_range, logit_scale, softcap, TRANSFORM)
    weights = read_weights(weight_ptr, weight_sum_ptr, token_weight_ptr, row, t, in_range, V, SMOOTH)
    t = tl.where(in_range, t, -1)
    head, body = cut(x_row, V, VEC)
    if RESIDENT:
        read = valid.to(tl.int32)  # rows without a loss are not read
        live = groups_before(0, body * read, BLOCK, VEC)
        x_start = tl.multiple_of(x_row + head, 16) + tile(BLOCK, VEC)
        x = tl.load(x_start, mask=live, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        w = load_weight(weight_ptr, head + tile(BLOCK, VEC), live, SMOOTH)
        target_tile = target_tile_of(t, head, BLOCK, VEC)
        state = fold(
            empty_state(BLOCK // VEC), x, w, live, 0, target_tile, x_t, logit_scale, softcap,
            TRANSFORM, SMOOTH, ENTROPY, RANK,
        )  # fmt: skip
        reduction = finish_span(
            state, x_row, weight_ptr, 0, body * read, read, head, body, V, t, x_t, logit_scale, softcap,
            VEC, TRANSFORM, SMOOTH, ENTROPY, RANK,
        )  # fmt: skip
    else:
        reduction = 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0
        if valid:
            reduction = reduce_span(
                x_row, weight_ptr, 0, body, 1, head, body, V, t, x_t, logit_scale, softcap,
                BLOCK, VEC, KEEP, TRANSFORM, SMOOTH, ENTROPY, RANK,
            )  # fmt: skip
    outputs = (
        row_loss_ptr, token_loss_ptr, lse_ptr, max_ptr, sum_ptr,
        predicted_ptr, correct_ptr, entropy_ptr, rank_ptr, sketch_ptr,
    )  # fmt: skip
    ce, m, total = write_row(
        row, row >= 0, t, valid, in_range, z_t, reduction, weights, outputs, group_ptr, groups, V,
        logit_scale, softcap, label_smoothing, z_loss, TRANSFORM, SMOOTH, BITS,
    )  # fmt: skip
    if dx_ptr is not None:
        dx_row = dx_ptr + row * dx_stride
        head, body = cut(dx_row, V, VEC)
        if in_range:
            g = tl.div_rn(1.0, read_divisor(normalizer_ptr, zero_if_empty))
            scales, at_target = coefficients(
                g, weights, slope(z_t, logit_scale, softcap, TRANSFORM), ce, m, total, V,
                label_smoothing, z_loss, logit_scale, SMOOTH,
            )  # fmt: skip
            tl.debug_barrier()  # in place: no thread may still be reading the row
            write_edges(x_row, dx_row, weight_ptr, head, body, V, scales, logit_scale, softcap, VEC, TRANSFORM, SMOOTH)
            if RESIDENT:
                out = tl.multiple_of(dx_row + head, 16) + tile(BLOCK, VEC)
                live = groups_before(0, body, BLOCK, VEC)  # again: it need not be kept in registers until here
                write_tile(out, x, w, live, scales, logit_scale, softcap, "evict_first", TRANSFORM, SMOOTH)
            else:
                gradient_span(
                    x_row, dx_row, weight_ptr, 0, body, head, scales, logit_scale, softcap,
                    BLOCK, VEC, TOGETHER, TRANSFORM, SMOOTH,
                )  # fmt: skip
            write_target(dx_row, tl.load(target_ptr + row), at_target, True)
        else:
            zero_span(dx_row, 0, body, 1, head, body, V, BLOCK, VEC)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def split_kernel(
    x_ptr, target_ptr, weight_ptr, partial_ptr,
    V, x_stride: tl.int64, ignore_index: tl.int64, splits, softcap, logit_scale,
    BLOCK: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """The reduction of part `program_id(1)` of `splits` of a row, to partial_ptr (N, splits, 8) float32."""
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    t, valid, in_range = read_target(target_ptr, row, row >= 0, ignore_index, V)
    if valid:
        x_row = x_ptr + row * x_stride
        x_t = tl.load(x_row + t, mask=in_range, other=float("-inf")).to(tl.float32)
        t = tl.where(in_range, t, -1)
        head, body = cut(x_row, V, VEC)
        first, last = part_of(body, part, splits, BLOCK)
        x_max, rest, gap, deficit, seen, argmax, ahead = reduce_span(
            x_row, weight_ptr, first, last, (part == 0).to(tl.int32), head, body, V, t, x_t, logit_scale, softcap,
            BLOCK, VEC, "evict_first", TRANSFORM, SMOOTH, ENTROPY, RANK,
        )  # fmt: skip
        partial = partial_ptr + (row * splits + part) * 8
        tl.store(partial, x_max)
        tl.store(partial + 1, rest)
        tl.store(partial + 2, gap)
        tl.store(partial + 3, deficit)
        tl.store(partial + 4, seen)
        tl.store(partial + 5, argmax.to(tl.float32, bitcast=True))
        tl.store(partial + 6, ahead.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def combine_kernel(
    x_ptr, target_ptr, weight_ptr, weight_sum_ptr, token_weight_ptr, group_ptr, partial_ptr,
    row_loss_ptr, token_loss_ptr, lse_ptr, max_ptr, sum_ptr, predicted_ptr, correct_ptr, entropy_ptr, rank_ptr,
    sketch_ptr,
    V, x_stride: tl.int64, groups, ignore_index: tl.int64, splits, label_smoothing, z_loss, softcap, logit_scale,
    PARTS: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Join the parts of a row, and its epilogue. PARTS is the power of two from `splits` on."""
    row = tl.program_id(0).to(tl.int64)
    t, valid, in_range = read_target(target_ptr, row, row >= 0, ignore_index, V)
    _, z_t = read_logit(x_ptr + row * x_stride + t, in_range, logit_scale, softcap, TRANSFORM)
    weights = read_weights(weight_ptr, weight_sum_ptr, token_weight_ptr, row, t, in_range, V, SMOOTH)
    i = tl.arange(0, PARTS)
    here = i < splits * valid.to(tl.int32)  # the parts of a row without a loss were not written
    partial = partial_ptr + (row * splits + i) * 8
    m = tl.load(partial, mask=here, other=float("-inf"))
    rest = tl.load(partial + 1, mask=here, other=0.0)
    x_max = tl.max(m, 0)
    # The parts are relative to their exact maxima, so their distance is taken before the product with log2(e).
    z = transform(m, logit_scale, softcap, TRANSFORM)
    top = transform(x_max, logit_scale, softcap, TRANSFORM)
    nats, lost = difference(tl.maximum(top, -2 * STEEP), tl.maximum(z, -2 * STEEP))
    step = nats * LOG2E
    rescale = power(-step, -(tl.fma(nats, LOG2E, -step) + lost * LOG2E))
    rescale = tl.where(is_steep(top), (z == top).to(tl.float32), rescale)
    gap = 0.0
    if entropy_ptr is not None:
        gap = tl.sum(rescale * (tl.load(partial + 2, mask=here, other=0.0) + step * rest), 0)
        gap = tl.where(is_steep(top), 0.0, gap)
    deficit = 0.0
    if SMOOTH:
        seen = tl.load(partial + 4, mask=here, other=0.0)
        below = tl.where(seen > 0.0, top - z, 0.0) * LOG2E  # a part may be empty
        deficit = tl.sum(tl.load(partial + 3, mask=here, other=0.0) + below * seen, 0)
    ahead = 0
    if rank_ptr is not None:
        ahead = tl.sum(tl.load(partial + 6, mask=here, other=0.0).to(tl.int32, bitcast=True), 0)
    argmax = tl.load(partial + 5, mask=here, other=0.0).to(tl.int32, bitcast=True)
    argmax = tl.min(tl.where(here & (m == x_max), argmax, V), 0)
    reduction = x_max, tl.sum(rest * rescale, 0), gap, deficit, 0.0, argmax, ahead
    outputs = (
        row_loss_ptr, token_loss_ptr, lse_ptr, max_ptr, sum_ptr,
        predicted_ptr, correct_ptr, entropy_ptr, rank_ptr, sketch_ptr,
    )  # fmt: skip
    write_row(
        row, row >= 0, t, valid, in_range, z_t, reduction, weights, outputs, group_ptr, groups, V,
        logit_scale, softcap, label_smoothing, z_loss, TRANSFORM, SMOOTH, BITS,
    )  # fmt: skip
