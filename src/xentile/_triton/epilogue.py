"""What every row kernel does around the logits: reading what belongs to a row, and writing its losses and statistics.

Names here and in the kernels: N rows, V columns; `x_ptr` (N, V) logits with row stride `x_stride`; vectors are (N,)
unless said otherwise. A pointer that is None switches its feature off at compile time.
"""

import triton
import triton.language as tl

from xentile._triton.counting import count_value
from xentile._triton.row import INFINITY, LN2, row_terms, transform

UNSPECIALIZED = [
    *("N", "V", "x_stride", "dx_stride", "groups", "ignore_index", "zero_if_empty", "splits", "dloss_stride"),
    *("x_ptr", "dx_ptr"),
]
"""Arguments whose values choose no variant. For integers, one for 1 and one for multiples of 16 would be compiled for
nothing. `cut` finds the alignment of rows at run time; and told that a tensor is small, the AMD backend would load it
without `multiple_of`."""


@triton.jit
def read_target(target_ptr, row, mask, ignore_index, V):
    """(t, valid, in_range): t int32, 0 where it is no column. Without targets every row counts."""
    if target_ptr is None:
        t = row.to(tl.int64) * 0
        valid = mask
        in_range = mask
    else:
        t = tl.load(target_ptr + row, mask=mask, other=0).to(tl.int64)
        valid = t != ignore_index
        in_range = valid & (t >= 0) & (t < V)
    return tl.where(in_range, t, 0).to(tl.int32), valid, in_range


@triton.jit
def read_logit(x_ptr, in_range, logit_scale, softcap, TRANSFORM: tl.constexpr):
    """(x_t, z_t) of the target, -inf where there is none."""
    x_t = tl.load(x_ptr, mask=in_range, other=float("-inf")).to(tl.float32)
    return x_t, tl.where(in_range, transform(x_t, logit_scale, softcap, TRANSFORM), -INFINITY)


@triton.jit
def read_weights(weight_ptr, weight_sum_ptr, token_weight_ptr, row, t, mask, V, SMOOTH: tl.constexpr):
    """(w_t, sum of w, token weight), each 1, V or 1 when it was not given."""
    w_t = 1.0
    w_sum = V.to(tl.float32)
    token_weight = 1.0
    if weight_ptr is not None:
        w_t = tl.load(weight_ptr + t, mask=mask, other=0.0)
        if SMOOTH:
            w_sum = tl.load(weight_sum_ptr)
    if token_weight_ptr is not None:
        token_weight = tl.load(token_weight_ptr + row, mask=mask, other=0.0)
    return w_t, w_sum, token_weight


@triton.jit
def read_divisor(normalizer_ptr, zero_if_empty):
    """What the mean divides by, 1 without a pointer; infinity makes 0 of an empty batch."""
    divisor = 1.0
    if normalizer_ptr is not None:
        divisor = tl.load(normalizer_ptr)
    return tl.where((zero_if_empty != 0) & (divisor == 0.0), INFINITY, divisor)


@triton.jit
def write_row(
    row, mask, t, valid, in_range, z_t, reduction, weights, outputs, group_ptr, groups, V,
    logit_scale, softcap, label_smoothing, z_loss, TRANSFORM: tl.constexpr, SMOOTH: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """The epilogue of one row, or of a vector of rows: losses, statistics, and one count in the sketch.

    reduction: what `reduce_span` returns. outputs: pointers. Returns (ce, m, S), what the gradient needs.
    """
    x_max, rest, gap, deficit, _, argmax, ahead = reduction
    (
        row_loss_ptr,
        token_loss_ptr,
        lse_ptr,
        max_ptr,
        sum_ptr,
        predicted_ptr,
        correct_ptr,
        entropy_ptr,
        rank_ptr,
        sketch_ptr,
    ) = outputs
    w_t, w_sum, token_weight = weights
    m = transform(x_max, logit_scale, softcap, TRANSFORM)
    ce, log_s, total, entropy = row_terms(m, z_t, rest, gap)
    lse = m + log_s
    loss = (1.0 - label_smoothing) * w_t * ce
    if SMOOTH:
        loss += label_smoothing / V * (deficit * LN2 + w_sum * log_s)
    loss += tl.where(z_loss == 0.0, 0.0, z_loss * lse * lse)  # 0 * inf where lse^2 overflows
    loss *= token_weight
    predicted = tl.where(argmax < V, argmax, 0)  # a row of NaN has no maximum
    nothing = tl.where(valid, float("nan"), 0.0)

    tl.store(row_loss_ptr + row, tl.where(in_range, loss, nothing), mask=mask)
    tl.store(token_loss_ptr + row, tl.where(in_range, ce, nothing), mask=mask)
    tl.store(lse_ptr + row, tl.where(valid, lse, 0.0), mask=mask)
    has_nan = ((rest != rest) & (m < INFINITY)) | (z_t != z_t)
    tl.store(max_ptr + row, tl.where(valid, tl.where(has_nan, float("nan"), m), 0.0), mask=mask)
    tl.store(sum_ptr + row, tl.where(valid, total, 0.0), mask=mask)
    tl.store(predicted_ptr + row, tl.where(in_range, predicted, tl.where(valid, -2, -1)).to(tl.int64), mask=mask)
    tl.store(correct_ptr + row, in_range & (predicted == t), mask=mask)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, tl.where(valid, entropy, 0.0), mask=mask)
    if rank_ptr is not None:
        tl.store(rank_ptr + row, tl.where(in_range, ahead, -1).to(tl.int64), mask=mask)
    if sketch_ptr is not None:
        count_value(sketch_ptr, group_ptr, groups, row, ce, mask & in_range, BITS)
    return ce, m, total
