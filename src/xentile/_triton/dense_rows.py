"""The kernels of distillation against a teacher's logits: one program a row for the forward, any part of a row for the
gradient alone.

Names as in epilogue.py; `teacher_ptr` (N, V) teacher logits of any float dtype with row stride `teacher_stride`;
`rows_ptr` (N, 6) what the backward needs: of the student m, r and r1 (`reduce_row`), of the teacher m and r, and E.
"""

import triton
import triton.language as tl

from xentile._triton.counting import count_value
from xentile._triton.dense_span import (
    compare,
    compare_rows,
    cut_both,
    gradient_span,
    reduce_row,
    softmax_of,
)
from xentile._triton.epilogue import UNSPECIALIZED, read_divisor, read_logit, read_target
from xentile._triton.row import HUGE, LOG2E, one_minus_exp, slope
from xentile._triton.span import part_of, write_target, zero_span
from xentile._triton.topk_divergence import log1p, times
from xentile._triton.topk_epilogue import temperature_of
from xentile._triton.topk_span import lost_in, reference_of

INTEGERS = [*UNSPECIALIZED, "teacher_ptr", "teacher_stride", "kd_groups"]


@triton.jit
def is_broken(m, r):
    """Whether a row has a NaN, +inf, or nothing but -inf."""
    return (tl.abs(m) > HUGE) | (r != r)


@triton.jit
def write_row(
    row, in_range, nothing, losses, statistics, t, kd_weight, ce_weight, token_weight, outputs, group_ptr, groups,
    kd_groups, SQUARED: tl.constexpr, TARGET: tl.constexpr, BITS: tl.constexpr, KD_BITS: tl.constexpr,
):  # fmt: skip
    """Losses, what the backward needs of one row, and its counts in the sketches.

    nothing: what a row that is not in_range has for its losses; t: the temperature.
    """
    row_loss_ptr, kd_loss_ptr, token_loss_ptr, rows_ptr, sketch_ptr, kd_sketch_ptr = outputs
    kd, ce = losses
    kd = tl.where(in_range, kd, nothing)
    ce = tl.where(in_range, ce, nothing)
    loss = times(kd_weight * (t * t if SQUARED else 1.0), kd)
    if TARGET:
        loss += times(ce_weight, ce)
    m, r, _, _, _, _ = statistics
    loss = tl.where(is_broken(m, r), float("nan"), loss)  # whatever the weights
    tl.store(row_loss_ptr + row, tl.where(in_range, loss * token_weight, nothing))
    tl.store(kd_loss_ptr + row, kd)
    tl.store(token_loss_ptr + row, ce)
    for i in tl.static_range(6):
        tl.store(rows_ptr + row * 6 + i, statistics[i])
    if sketch_ptr is not None:
        count_value(sketch_ptr, group_ptr, groups, row, ce, in_range, BITS)
    if kd_sketch_ptr is not None:
        count_value(kd_sketch_ptr, group_ptr, kd_groups, row, kd, in_range, KD_BITS)


@triton.jit
def write_gradient(
    x_row, teacher_row, dx_row, t, g, ce, statistics, heat, part, splits, V,
    beta, kd_weight, ce_weight, logit_scale, softcap,
    BLOCK: tl.constexpr, VEC: tl.constexpr, TOGETHER: tl.constexpr, TEACHER_TOGETHER: tl.constexpr,
    TRANSFORM: tl.constexpr, DIVERGENCE: tl.constexpr, TEMPERED: tl.constexpr, SQUARED: tl.constexpr,
    KD: tl.constexpr, CE: tl.constexpr,
):  # fmt: skip
    """Part `part` of `splits` of a gradient row: one formula everywhere, then the target over it.

    dx = k * (G - q * E) + h * softmax(z), and k * (G - q * E) - h * (1 - p_t) at the target, times dz/dx.
    """
    m, r, r1, m_teacher, r_teacher, expected = statistics
    temperature, c, _ = heat
    head, body = cut_both(dx_row, V, VEC)
    first, last = part_of(body, part, splits, BLOCK)
    student, teacher = softmax_of(m, r, c), softmax_of(m_teacher, r_teacher, c)
    k = 0.0
    a = 0.0
    if KD:
        k = g * kd_weight * logit_scale * (temperature if SQUARED else 1.0 / temperature)
        a = -times(k, expected)
    a1 = 0.0
    b1 = reference_of(m, LOG2E)
    at_target = 0.0
    if CE:
        h = g * ce_weight * logit_scale
        x_t, z_t = read_logit(x_row + t, t >= 0, logit_scale, softcap, TRANSFORM)
        y_t = tl.load(teacher_row + t, mask=t >= 0, other=float("-inf")).to(tl.float32)
        _, q_t, _f, slope_t = compare(x_t, y_t, student, teacher, c, beta, logit_scale, softcap, TRANSFORM, DIVERGENCE)
        at_target = q_t * a - h * one_minus_exp(ce)
        if KD:
            at_target += k * slope_t
        at_target *= slope(z_t, logit_scale, softcap, TRANSFORM)
        if TEMPERED:
            a1 = h * tl.exp2(lost_in(b1, m, LOG2E)) / (1.0 + r1)
        else:
            a += h
    tl.debug_barrier()  # in place: no thread may still be reading the row
    gradient_span(
        x_row, teacher_row, dx_row, first, last, tl.where(part == 0, 1, 0), head, body, V, student, teacher,
        (k, a, a1, b1), c, beta, logit_scale, softcap,
        BLOCK, VEC, TOGETHER, TEACHER_TOGETHER, TRANSFORM, DIVERGENCE, KD, CE and TEMPERED,
    )  # fmt: skip
    if CE:
        in_edges = (t < head) | (t >= head + body)
        here = tl.where(in_edges, part == 0, (t >= head + first) & (t < head + last))
        write_target(dx_row, t, at_target, here)


@triton.jit
def zero_gradient(dx_row, part, splits, V, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Part `part` of `splits` of the gradient of a row without a loss."""
    head, body = cut_both(dx_row, V, VEC)
    first, last = part_of(body, part, splits, BLOCK)
    zero_span(dx_row, first, last, tl.where(part == 0, 1, 0), head, body, V, BLOCK, VEC)


@triton.jit(do_not_specialize=INTEGERS)
def dense_row_kernel(
    x_ptr, teacher_ptr, target_ptr, token_weight_ptr, normalizer_ptr, temperature_ptr, group_ptr,
    row_loss_ptr, kd_loss_ptr, token_loss_ptr, rows_ptr, sketch_ptr, kd_sketch_ptr, dx_ptr,
    V, x_stride: tl.int64, teacher_stride: tl.int64, dx_stride: tl.int64, groups, kd_groups, ignore_index: tl.int64,
    zero_if_empty, temperature, beta, kd_weight, ce_weight, softcap, logit_scale,
    BLOCK: tl.constexpr, VEC: tl.constexpr, TOGETHER: tl.constexpr, TEACHER_TOGETHER: tl.constexpr,
    TRANSFORM: tl.constexpr, DIVERGENCE: tl.constexpr, TEMPERED: tl.constexpr, SQUARED: tl.constexpr,
    KD: tl.constexpr, CE: tl.constexpr, BITS: tl.constexpr, KD_BITS: tl.constexpr,
):  # fmt: skip
    """One program a row: the losses and, with dx_ptr, the gradient; dense_span.py has the passes.

    KD, CE: whether the divergence and the cross-entropy have a gradient. TOGETHER, TEACHER_TOGETHER: whether the rows
    of student and teacher have the 16-byte boundaries of the gradient's, or of the student's if there is none.
    """
    TARGET: tl.constexpr = target_ptr is not None
    KEEP: tl.constexpr = "evict_first" if dx_ptr is None else "evict_last"
    row = tl.program_id(0).to(tl.int64)
    t, valid, in_range = read_target(target_ptr, row, row >= 0, ignore_index, V)
    t = tl.where(in_range & TARGET, t, -1)
    outputs = row_loss_ptr, kd_loss_ptr, token_loss_ptr, rows_ptr, sketch_ptr, kd_sketch_ptr
    if in_range:
        x_row, teacher_row = x_ptr + row * x_stride, teacher_ptr + row * teacher_stride
        token_weight = tl.load(token_weight_ptr + row) if token_weight_ptr is not None else 1.0
        heat = temperature_of(temperature_ptr, temperature, row, TEMPERED)
        c = heat[1]
        m, r, r1 = reduce_row(x_row, V, c, logit_scale, softcap, BLOCK, TRANSFORM, TEMPERED and TARGET)
        m_teacher, r_teacher, _ = reduce_row(teacher_row, V, c, 1.0, 0.0, BLOCK, "identity", False)
        head, body = cut_both(x_row if dx_ptr is None else dx_ptr + row * dx_stride, V, VEC)
        kd, expected = compare_rows(
            x_row, teacher_row, head, body, V, softmax_of(m, r, c), softmax_of(m_teacher, r_teacher, c), c, beta,
            logit_scale, softcap, BLOCK, VEC, KEEP, TOGETHER, TEACHER_TOGETHER, TRANSFORM, DIVERGENCE,
        )  # fmt: skip
        kd = tl.where(is_broken(m, r) | is_broken(m_teacher, r_teacher), float("nan"), kd)
        ce = 0.0
        if TARGET:
            _x_t, z_t = read_logit(x_row + t, in_range, logit_scale, softcap, TRANSFORM)
            ce = tl.where(is_broken(m, r), float("nan"), (m - z_t) + log1p(r1))
        statistics = m, r, r1, m_teacher, r_teacher, expected
        write_row(
            row, in_range, 0.0, (kd, ce), statistics, heat[0], kd_weight, ce_weight, token_weight, outputs, group_ptr,
            groups, kd_groups, SQUARED, TARGET, BITS, KD_BITS,
        )  # fmt: skip
        if dx_ptr is not None:
            g = tl.div_rn(token_weight + tl.zeros([], tl.float32), read_divisor(normalizer_ptr, zero_if_empty))
            write_gradient(
                x_row, teacher_row, dx_ptr + row * dx_stride, t, g, ce, statistics, heat, 0, 1, V,
                beta, kd_weight, ce_weight, logit_scale, softcap, BLOCK, VEC, TOGETHER, TEACHER_TOGETHER,
                TRANSFORM, DIVERGENCE, TEMPERED, SQUARED, KD, CE,
            )  # fmt: skip
    else:
        zero = tl.zeros([], tl.float32)
        write_row(
            row, in_range, tl.where(valid, float("nan"), 0.0), (0.0, 0.0), (zero, zero, zero, zero, zero, zero), 1.0,
            kd_weight, ce_weight, 0.0, outputs, group_ptr, groups, kd_groups, SQUARED, TARGET, BITS, KD_BITS,
        )  # fmt: skip
        if dx_ptr is not None:
            zero_gradient(dx_ptr + row * dx_stride, 0, 1, V, BLOCK, VEC)


@triton.jit(do_not_specialize=INTEGERS)
def dense_gradient_kernel(
    dloss_ptr, x_ptr, teacher_ptr, target_ptr, token_weight_ptr, normalizer_ptr, temperature_ptr, token_loss_ptr,
    rows_ptr, dx_ptr,
    N, V, x_stride: tl.int64, teacher_stride: tl.int64, dx_stride: tl.int64, dloss_stride, ignore_index: tl.int64,
    splits, temperature, beta, kd_weight, ce_weight, softcap, logit_scale,
    BLOCK: tl.constexpr, VEC: tl.constexpr, TOGETHER: tl.constexpr, TEACHER_TOGETHER: tl.constexpr,
    TRANSFORM: tl.constexpr, DIVERGENCE: tl.constexpr, TEMPERED: tl.constexpr, SQUARED: tl.constexpr,
    KD: tl.constexpr, CE: tl.constexpr, FILLED: tl.constexpr,
):  # fmt: skip
    """The gradient from what the forward saved; the other arguments as those of `gradient_kernel` in backward.py."""
    TARGET: tl.constexpr = target_ptr is not None
    items = N.to(tl.int64) * splits
    if FILLED:
        items = tl.where(tl.load(dloss_ptr) == 1.0, 0, items)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        row = N - 1 - item // splits
        part = (item % splits).to(tl.int32)
        t, _valid, in_range = read_target(target_ptr, row, row >= 0, ignore_index, V)
        t = tl.where(in_range & TARGET, t, -1)
        if in_range:
            heat = temperature_of(temperature_ptr, temperature, row, TEMPERED)
            at = rows_ptr + row * 6
            m, r, r1 = tl.load(at), tl.load(at + 1), tl.load(at + 2)
            m_teacher, r_teacher, expected = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
            g = tl.load(dloss_ptr + row * dloss_stride)
            if token_weight_ptr is not None:
                g *= tl.load(token_weight_ptr + row)
            g = tl.div_rn(g, tl.load(normalizer_ptr))
            write_gradient(
                x_ptr + row * x_stride, teacher_ptr + row * teacher_stride, dx_ptr + row * dx_stride, t, g,
                tl.load(token_loss_ptr + row), (m, r, r1, m_teacher, r_teacher, expected), heat, part, splits, V,
                beta, kd_weight, ce_weight, logit_scale, softcap, BLOCK, VEC, TOGETHER, TEACHER_TOGETHER,
                TRANSFORM, DIVERGENCE, TEMPERED, SQUARED, KD, CE,
            )  # fmt: skip
        else:
            zero_gradient(dx_ptr + row * dx_stride, part, splits, V, BLOCK, VEC)
