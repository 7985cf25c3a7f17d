"""The kernels of top-K distillation: one program a row for the forward, any part of a row for the gradient alone.

Names as in epilogue.py; `id_ptr`, `logprob_ptr` (N, K) and `tail_ptr` (N,) are what `topk_support` makes.
"""

import triton
import triton.language as tl

from xentile._triton.epilogue import UNSPECIALIZED, read_divisor, read_logit, read_target
from xentile._triton.finish import count_tokens, write_loss
from xentile._triton.span import cut, part_of, zero_span
from xentile._triton.topk_epilogue import coefficients, read_support, solve, temperature_of, write_row
from xentile._triton.topk_span import gradient_span, reduce_row

INTEGERS = [*UNSPECIALIZED, "K", "words", "kd_groups"]


@triton.jit
def write_gradient(
    x_row, dx_row, id_ptr, K, t, z, z_t, in_range, g, losses, parts, m, heat, part, splits, V,
    kd_weight, ce_weight, logit_scale, softcap,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, TRANSFORM: tl.constexpr, SUPPORT: tl.constexpr,
    TEMPERED: tl.constexpr, SQUARED: tl.constexpr, CE: tl.constexpr,
):  # fmt: skip
    """Part `part` of `splits` of a gradient row: one formula everywhere, then the support and the target over it.

    id_ptr: of the row's support, whose columns are read again: they need not be kept in registers until then.
    """
    VEC: tl.constexpr = 128 // dx_row.dtype.element_ty.primitive_bitwidth
    KD: tl.constexpr = SUPPORT != "renormalized"  # whether columns outside the support have a gradient of KD
    head, body = cut(dx_row, V, VEC)
    first, last = part_of(body, part, splits, BLOCK)
    with_edges = tl.where(part == 0, 1, 0)
    tl.debug_barrier()  # in place: no thread may still be reading the row
    if in_range:
        scales, at_support, at_target = coefficients(
            g, losses, parts, m, heat, z, z_t, kd_weight, ce_weight, logit_scale, softcap,
            TRANSFORM, SQUARED, CE, KD, TEMPERED,
        )  # fmt: skip
        if KD or CE:
            gradient_span(
                x_row, dx_row, first, last, with_edges, head, body, V, scales, logit_scale, softcap,
                BLOCK, VEC, TOGETHER, TRANSFORM, KD and CE and TEMPERED,
            )  # fmt: skip
        else:
            zero_span(dx_row, first, last, with_edges, head, body, V, BLOCK, VEC)
        tl.debug_barrier()
        i = tl.arange(0, WIDTH)
        column = tl.load(id_ptr + i, mask=i < K, other=V)
        here = is_in_part(column, first, last, with_edges, head, body) & (column < V)
        tl.store(dx_row + column, at_support.to(dx_row.dtype.element_ty), mask=here)
        alone = (t >= 0) & (tl.max((column == t).to(tl.int32), 0) == 0)
        here = is_in_part(t, first, last, with_edges, head, body) & alone
        tl.store(dx_row + t, at_target.to(dx_row.dtype.element_ty), mask=here)
    else:
        zero_span(dx_row, first, last, with_edges, head, body, V, BLOCK, VEC)


@triton.jit
def is_in_part(column, first, last, with_edges, head, body):
    in_edges = (column < head) | (column >= head + body)
    in_body = (column >= head + first) & (column < head + last)
    return tl.where(in_edges, with_edges, in_body.to(tl.int32)) != 0


@triton.jit(do_not_specialize=INTEGERS)
def topk_row_kernel(
    x_ptr, id_ptr, logprob_ptr, tail_ptr, target_ptr, token_weight_ptr, normalizer_ptr, temperature_ptr, group_ptr,
    row_loss_ptr, kd_loss_ptr, token_loss_ptr, mass_ptr, rest_ptr, sketch_ptr, kd_sketch_ptr, dx_ptr, bitmap_ptr,
    V, K, x_stride: tl.int64, dx_stride: tl.int64, words, groups, kd_groups, ignore_index: tl.int64, zero_if_empty,
    temperature, beta, kd_weight, ce_weight, softcap, logit_scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, TRANSFORM: tl.constexpr, SUPPORT: tl.constexpr,
    DIVERGENCE: tl.constexpr, TEMPERED: tl.constexpr, SQUARED: tl.constexpr, CE: tl.constexpr, BITS: tl.constexpr,
    KD_BITS: tl.constexpr,
):  # fmt: skip
    """One program a row: reduce, epilogue and, with dx_ptr, the gradient.

    bitmap_ptr (N, words): see topk_span.py. CE: whether the cross-entropy has a gradient.
    """
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    TARGET: tl.constexpr = target_ptr is not None
    KEEP: tl.constexpr = "evict_first" if dx_ptr is None else "evict_last"
    row = tl.program_id(0).to(tl.int64)
    t, valid, in_range = read_target(target_ptr, row, row >= 0, ignore_index, V)
    t = tl.where(in_range & TARGET, t, -1)
    x_row = x_ptr + row * x_stride
    outputs = row_loss_ptr, kd_loss_ptr, token_loss_ptr, mass_ptr, rest_ptr, sketch_ptr, kd_sketch_ptr
    token_weight = tl.load(token_weight_ptr + row) if token_weight_ptr is not None else 1.0
    if valid:
        heat = temperature_of(temperature_ptr, temperature, row, TEMPERED)
        head, body = cut(x_row, V, VEC)
        rest = reduce_row(
            x_row, bitmap_ptr + row * words, id_ptr + row * K, K, t, head, body, V, heat[1], logit_scale, softcap,
            BLOCK, VEC, WIDTH, KEEP, TRANSFORM, TEMPERED and TARGET,
        )  # fmt: skip
        column, z, log_p = read_support(
            x_row, id_ptr + row * K, logprob_ptr + row * K, K, V, logit_scale, softcap, WIDTH, TRANSFORM
        )
        _x_t, z_t = read_logit(x_row + t, t >= 0, logit_scale, softcap, TRANSFORM)
        losses, parts = solve(
            column, z, log_p, tl.load(tail_ptr + row), t, z_t, rest, heat, beta, SUPPORT, DIVERGENCE, TARGET
        )
        write_row(
            row, valid, in_range, losses, rest, heat[0], kd_weight, ce_weight, token_weight, outputs, group_ptr,
            groups, kd_groups, SQUARED, TARGET, BITS, KD_BITS,
        )  # fmt: skip
        if dx_ptr is not None:
            g = tl.div_rn(token_weight + tl.zeros([], tl.float32), read_divisor(normalizer_ptr, zero_if_empty))
            write_gradient(
                x_row, dx_ptr + row * dx_stride, id_ptr + row * K, K, t, z, z_t, in_range, g, losses, parts, rest[0],
                heat, 0, 1, V, kd_weight, ce_weight, logit_scale, softcap,
                BLOCK, WIDTH, TOGETHER, TRANSFORM, SUPPORT, TEMPERED, SQUARED, CE,
            )  # fmt: skip
    else:
        write_row(
            row, valid, in_range, (0.0, 0.0, 0.0, row < 0), (0.0, 0.0, 0.0), 1.0, kd_weight, ce_weight, 0.0, outputs,
            group_ptr, groups, kd_groups, SQUARED, TARGET, BITS, KD_BITS,
        )  # fmt: skip
        if dx_ptr is not None:
            dx_row = dx_ptr + row * dx_stride
            head, body = cut(dx_row, V, VEC)
            zero_span(dx_row, 0, body, 1, head, body, V, BLOCK, VEC)


@triton.jit(do_not_specialize=INTEGERS)
def topk_gradient_kernel(
    dloss_ptr, x_ptr, id_ptr, logprob_ptr, tail_ptr, target_ptr, token_weight_ptr, normalizer_ptr, temperature_ptr,
    rest_ptr, dx_ptr,
    N, V, K, x_stride: tl.int64, dx_stride: tl.int64, dloss_stride, ignore_index: tl.int64, splits,
    temperature, beta, kd_weight, ce_weight, softcap, logit_scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr, TRANSFORM: tl.constexpr, SUPPORT: tl.constexpr,
    DIVERGENCE: tl.constexpr, TEMPERED: tl.constexpr, SQUARED: tl.constexpr, CE: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """The gradient from what the forward saved; the other arguments as those of `gradient_kernel` in backward.py."""
    TARGET: tl.constexpr = target_ptr is not None
    items = N.to(tl.int64) * splits
    if FILLED:
        items = tl.where(tl.load(dloss_ptr) == 1.0, 0, items)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row = N - 1 - item // splits
        part = (item % splits).to(tl.int32)
        t, valid, in_range = read_target(target_ptr, row, row >= 0, ignore_index, V)
        t = tl.where(in_range & TARGET, t, -1)
        x_row = x_ptr + row * x_stride
        heat = temperature_of(temperature_ptr, temperature, row, TEMPERED)
        k = K * valid.to(tl.int32)  # of an ignored row nothing is read
        column, z, log_p = read_support(
            x_row, id_ptr + row * K, logprob_ptr + row * K, k, V, logit_scale, softcap, WIDTH, TRANSFORM
        )
        _x_t, z_t = read_logit(x_row + t, t >= 0, logit_scale, softcap, TRANSFORM)
        m, r, r1 = (tl.load(rest_ptr + row * 3), tl.load(rest_ptr + row * 3 + 1), tl.load(rest_ptr + row * 3 + 2))
        losses, parts = solve(
            column, z, log_p, tl.load(tail_ptr + row), t, z_t, (m, r, r1), heat, beta, SUPPORT, DIVERGENCE, TARGET
        )
        g = tl.load(dloss_ptr + row * dloss_stride)
        if token_weight_ptr is not None:
            g *= tl.load(token_weight_ptr + row)
        g = tl.div_rn(g, tl.load(normalizer_ptr))
        write_gradient(
            x_row, dx_ptr + row * dx_stride, id_ptr + row * K, K, t, z, z_t, in_range, g, losses, parts, m,
            heat, part, splits, V, kd_weight, ce_weight, logit_scale, softcap,
            BLOCK, WIDTH, TOGETHER, TRANSFORM, SUPPORT, TEMPERED, SQUARED, CE,
        )  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS)
def topk_finish_kernel(
    target_ptr, token_weight_ptr, normalizer_ptr, group_ptr, row_loss_ptr, kd_loss_ptr, token_loss_ptr,
    loss_ptr, denominator_ptr, sketch_ptr, kd_sketch_ptr,
    N, V, groups, kd_groups, ignore_index: tl.int64, zero_if_empty,
    REDUCTION: tl.constexpr, PREPARED: tl.constexpr, GROUPED: tl.constexpr, BITS: tl.constexpr, KD_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As `finish_kernel`, with a sketch for each of the two losses."""
    if tl.program_id(0) == 0:
        if REDUCTION != "none":
            write_loss(
                target_ptr, None, token_weight_ptr, normalizer_ptr, row_loss_ptr, loss_ptr, denominator_ptr, N, V,
                ignore_index, zero_if_empty, REDUCTION == "mean", PREPARED, BLOCK,
            )  # fmt: skip
        if REDUCTION != "mean":
            tl.store(denominator_ptr, 1.0)
    if sketch_ptr is not None:
        count_tokens(
            target_ptr, group_ptr, token_loss_ptr, sketch_ptr, N, V, groups, ignore_index, GROUPED, BITS, BLOCK
        )
    if kd_sketch_ptr is not None:
        count_tokens(
            target_ptr, group_ptr, kd_loss_ptr, kd_sketch_ptr, N, V, kd_groups, ignore_index, GROUPED, KD_BITS, BLOCK
        )
