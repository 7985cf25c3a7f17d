"""The gradient kernels, from the statistics that a forward saved: any part of any row by itself, or several rows."""

import triton
import triton.language as tl

from xentile._triton.epilogue import UNSPECIALIZED, read_divisor, read_logit, read_target, read_weights
from xentile._triton.row import coefficients, slope
from xentile._triton.short import across, tile_of, write_rows
from xentile._triton.span import cut, gradient_span, load_weight, part_of, write_edges, write_target, zero_span


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_kernel(
    dloss_ptr, x_ptr, target_ptr, weight_ptr, weight_sum_ptr, token_weight_ptr, normalizer_ptr,
    token_loss_ptr, max_ptr, sum_ptr, dx_ptr,
    N, V, x_stride: tl.int64, dx_stride: tl.int64, dloss_stride, ignore_index: tl.int64, zero_if_empty, splits,
    label_smoothing, z_loss, softcap, logit_scale,
    BLOCK: tl.constexpr, TOGETHER: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """The gradient from what the forward saved. The N * splits parts of rows are dealt out to the programs in turn.

    dloss_ptr: the gradient of the loss, read at row * dloss_stride; None means 1.
    FILLED: dx holds the gradient for a loss gradient of 1 already, so that nothing is to be done if it is 1.
    """
    items = N.to(tl.int64) * splits
    if FILLED:
        items = tl.where(tl.load(dloss_ptr) == 1.0, 0, items)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # The rows that the forward read last come first: they are in the cache.
        row = N - 1 - item // splits
        write_part(
            row, (item % splits).to(tl.int32), dloss_ptr, x_ptr, target_ptr, weight_ptr, weight_sum_ptr,
            token_weight_ptr, normalizer_ptr, token_loss_ptr, max_ptr, sum_ptr, dx_ptr,
            V, x_stride, dx_stride, dloss_stride, ignore_index, zero_if_empty, splits,
            label_smoothing, z_loss, softcap, logit_scale, BLOCK, TOGETHER, TRANSFORM, SMOOTH,
        )  # fmt: skip


@triton.jit
def write_part(
    row, part, dloss_ptr, x_ptr, target_ptr, weight_ptr, weight_sum_ptr, token_weight_ptr, normalizer_ptr,
    token_loss_ptr, max_ptr, sum_ptr, dx_ptr, V, x_stride, dx_stride, dloss_stride, ignore_index,
    zero_if_empty, splits, label_smoothing, z_loss, softcap, logit_scale,
    BLOCK: tl.constexpr, TOGETHER: tl.constexpr, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Part `part` of `splits` of a gradient row; see `gradient_kernel`."""
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    t, _valid, in_range = read_target(target_ptr, row, row >= 0, ignore_index, V)
    x_row = x_ptr + row * x_stride
    dx_row = dx_ptr + row * dx_stride
    head, body = cut(dx_row, V, VEC)
    first, last = part_of(body, part, splits, BLOCK)
    if in_range:
        _x_t, z_t = read_logit(x_row + t, in_range, logit_scale, softcap, TRANSFORM)
        weights = read_weights(weight_ptr, weight_sum_ptr, token_weight_ptr, row, t, in_range, V, SMOOTH)
        dloss = 1.0
        if dloss_ptr is not None:
            dloss = tl.load(dloss_ptr + row * dloss_stride)
        g = tl.div_rn(dloss, read_divisor(normalizer_ptr, zero_if_empty))
        scales, at_target = coefficients(
            g, weights, slope(z_t, logit_scale, softcap, TRANSFORM), tl.load(token_loss_ptr + row),
            tl.load(max_ptr + row), tl.load(sum_ptr + row), V, label_smoothing, z_loss, logit_scale, SMOOTH,
        )  # fmt: skip
        tl.debug_barrier()  # in place: all threads must have read the target's logit
        gradient_span(
            x_row, dx_row, weight_ptr, first, last, head, scales, logit_scale, softcap,
            BLOCK, VEC, TOGETHER, TRANSFORM, SMOOTH,
        )  # fmt: skip
        if part == 0:
            write_edges(x_row, dx_row, weight_ptr, head, body, V, scales, logit_scale, softcap, VEC, TRANSFORM, SMOOTH)
        in_edges = (t < head) | (t >= head + body)
        write_target(dx_row, t, at_target, tl.where(in_edges, part == 0, (t >= head + first) & (t < head + last)))
    else:
        zero_span(dx_row, first, last, (part == 0).to(tl.int32), head, body, V, BLOCK, VEC)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def short_gradient_kernel(
    dloss_ptr, x_ptr, target_ptr, weight_ptr, weight_sum_ptr, token_weight_ptr, normalizer_ptr,
    token_loss_ptr, max_ptr, sum_ptr, dx_ptr,
    N, V, x_stride: tl.int64, dx_stride: tl.int64, dloss_stride, ignore_index: tl.int64, zero_if_empty,
    label_smoothing, z_loss, softcap, logit_scale,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
    TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """`gradient_kernel` for tiles of short rows, as `short_row_kernel` has them, dealt out to the programs in turn."""
    BYTES: tl.constexpr = VEC * x_ptr.dtype.element_ty.primitive_bitwidth // 8
    tiles = tl.cdiv(N, ROWS)
    if FILLED:
        tiles = tl.where(tl.load(dloss_ptr) == 1.0, 0, tiles)
    lane, step, _group, inside = tile_of(V, GROUPS, LANES, VEC)
    w = load_weight(weight_ptr, lane + step, inside, SMOOTH)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.full([ROWS], tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        here = row < N
        t, _valid, in_range = read_target(target_ptr, row, here, ignore_index, V)
        in_range &= here
        x_row = tl.multiple_of(x_ptr + row * x_stride, [BYTES])
        _x_t, z_t = read_logit(x_row + t, in_range, logit_scale, softcap, TRANSFORM)
        weights = read_weights(weight_ptr, weight_sum_ptr, token_weight_ptr, row, t, in_range, V, SMOOTH)
        dloss = tl.full([ROWS], 1.0, tl.float32)
        if dloss_ptr is not None:
            dloss = tl.load(dloss_ptr + row * dloss_stride, mask=in_range, other=0.0)
        scales, at_target = coefficients(
            tl.div_rn(dloss, read_divisor(normalizer_ptr, zero_if_empty)), weights,
            slope(z_t, logit_scale, softcap, TRANSFORM), tl.load(token_loss_ptr + row, mask=in_range, other=0.0),
            tl.load(max_ptr + row, mask=in_range, other=0.0), tl.load(sum_ptr + row, mask=in_range, other=1.0), V,
            label_smoothing, z_loss, logit_scale, SMOOTH,
        )  # fmt: skip
        live = inside & across(in_range)
        x = tl.load(across(x_row) + lane + step, mask=live, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dx_row = tl.multiple_of(dx_ptr + row * dx_stride, [BYTES])
        write_rows(
            across(dx_row) + lane + step, dx_row, x, w, inside, t, here, in_range, scales, at_target,
            logit_scale, softcap, TRANSFORM, SMOOTH,
        )  # fmt: skip
