"""What is done once a row of a top-K distillation: the losses and the gradient's coefficients from the support, the
target and (m, r, r1) of all other columns (`reduce_row`).

Masses are kept twice, as numbers and as logarithms. A number keeps its digits however small it is; a logarithm near 0
keeps those of what is missing to 1. Vectors are those of the support, [WIDTH]; absent entries have z = log p = -inf.
"""

import triton
import triton.language as tl

from xentile._triton.counting import count_value
from xentile._triton.row import HUGE, LN2, LOG2E, difference, one_minus_exp, row_terms, slope, transform
from xentile._triton.topk_divergence import LOG2E_LOW, divergence, exp_of, log1p, open_forward_kl, times
from xentile._triton.topk_span import lost_in, reference_of

LOWEST = tl.constexpr(-1e30)  # a distance in nats beyond which exp is 0 at any temperature that is a float32's


@triton.jit
def temperature_of(temperature_ptr, temperature, row, TEMPERED: tl.constexpr):
    """(T, c, what is missing from c to log2(e) / T)."""
    if TEMPERED:
        t = tl.zeros([], tl.float32) + temperature
        if temperature_ptr is not None:
            t = tl.load(temperature_ptr + row)
        c = LOG2E / t
        missing = (tl.fma(-c, t, LOG2E) + LOG2E_LOW) / t
    else:
        t = tl.full([], 1.0, tl.float32)
        c = tl.full([], LOG2E, tl.float32)
        missing = tl.full([], LOG2E_LOW, tl.float32)
    return t, c, missing


@triton.jit
def weight(z, top, c, missing):
    """exp((z - top) / T), 0 for z = -inf, with no digits lost to a large exponent."""
    d, lost = difference(tl.where(z < -HUGE, -HUGE, z), tl.where(top < -HUGE, -HUGE, top))
    d = tl.where(d < LOWEST, LOWEST, d)
    power = d * c
    rest = tl.fma(d, c, -power) + (lost * c + d * missing)
    e = tl.where(power < -150.0, 0.0, tl.exp2(power) * (1.0 + rest * LN2))
    return tl.where(z == float("-inf"), 0.0, e)


@triton.jit
def read_support(x_row, id_ptr, logprob_ptr, K, V, logit_scale, softcap, WIDTH: tl.constexpr, TRANSFORM: tl.constexpr):
    """(column, z, log p) of a row's support; V, -inf and -inf where absent."""
    i = tl.arange(0, WIDTH)
    column = tl.load(id_ptr + i, mask=i < K, other=V)
    inside = column < V
    log_p = tl.load(logprob_ptr + i, mask=inside, other=float("-inf"))
    x = tl.load(x_row + column, mask=inside, other=float("-inf")).to(tl.float32)
    return column, tl.where(inside, transform(x, logit_scale, softcap, TRANSFORM), float("-inf")), log_p


@triton.jit
def student_masses(z, z_t, rest, temperature):
    """The student's masses of the support, of its entries and of the tail.

    z_t: the target's, -inf if that is in the support. Returns top, the maximum of all z; (q, log q) of the entries
    relative to the support; (Q, log Q) and (1 - Q, log(1 - Q)); and what the tail is a sum of: its maximum and sum.
    """
    t, c, missing = temperature
    m, r, _ = rest
    top_s = tl.max(z, 0)
    e = weight(z, top_s, c, missing)
    at_top = (z == top_s) & (z > float("-inf"))
    others = tl.sum(tl.where(at_top, 0.0, e), 0) + tl.maximum(tl.sum(at_top.to(tl.float32), 0) - 1.0, 0.0)
    log_sum = log1p(others)
    sum_s = tl.where(top_s > float("-inf"), 1.0 + others, 0.0)
    log_share = tl.where(z > float("-inf"), (z - top_s) / t - log_sum, z)  # also of a NaN
    top_r = tl.maximum(m, z_t)
    sum_r = r * weight(m, top_r, c, missing) + weight(z_t, top_r, c, missing)

    top = tl.maximum(top_s, top_r)
    support = sum_s * weight(top_s, top, c, missing)
    tail = sum_r * weight(top_r, top, c, missing)
    total = support + tail
    lead = tl.where(sum_r > 0.0, (top_r - top_s) / t + (tl.log(sum_r) - log_sum), float("-inf"))
    above = log1p(tl.minimum(support, tail) / tl.maximum(support, tail))
    log_support = tl.where(support >= tail, -above, -(lead + above))
    log_tail = tl.where(support >= tail, lead - above, -above)
    shares = e / tl.where(sum_s > 0.0, sum_s, 1.0), log_share
    return top, shares, (support / total, log_support), (tail / total, log_tail), (top_r, sum_r)


@triton.jit
def compare(
    z, log_p, log_p_tail, inside_mass, outside_mass, shares, beta,
    SUPPORT: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """(KD, G - q E of the entries, G - q E of the tail); see reference/distillation.py."""
    CLOSED: tl.constexpr = SUPPORT == "renormalized" or SUPPORT == "tail_bucket"
    mass, log_mass = inside_mass
    q, log_share = shares
    log_q = log_share
    if SUPPORT != "renormalized":
        q = q * mass
        log_q = tl.where(log_share == float("-inf"), log_share, log_share + log_mass)
    p = exp_of(log_p)
    if SUPPORT == "sampled":
        f = -times(p, log_q)
        kd = tl.sum(f, 0)
        slopes = -p
    elif DIVERGENCE == "forward_kl" and not CLOSED:
        kd = open_forward_kl(p, log_p, log_share, log_mass, SUPPORT)
        slopes = -p
    else:
        f, slopes = divergence(p, q, log_p, log_q, beta, DIVERGENCE, CLOSED)
        kd = tl.sum(f, 0)
    expected = tl.sum(slopes, 0)
    q_tail, log_q_tail = outside_mass
    slope_tail = 0.0
    if SUPPORT == "tail_bucket":
        f_tail, slope_tail = divergence(exp_of(log_p_tail), q_tail, log_p_tail, log_q_tail, beta, DIVERGENCE, True)
        kd += f_tail
        expected += slope_tail
    return kd, slopes - q * expected, slope_tail - q_tail * expected


@triton.jit
def solve(
    column, z, log_p, log_p_tail, t, z_t, rest, temperature, beta,
    SUPPORT: tl.constexpr, DIVERGENCE: tl.constexpr, TARGET: tl.constexpr,
):  # fmt: skip
    """((KD, CE, Q, broken), parts) of a row. broken: it has no losses. parts: what `coefficients` works on."""
    _, c, missing = temperature
    m, _, r1 = rest
    at_t = (column == t) & TARGET
    apart = TARGET & (tl.max(at_t.to(tl.int32), 0) == 0)
    z_apart = tl.where(apart, z_t, float("-inf"))
    top, shares, inside, outside, tail = student_masses(z, z_apart, rest, temperature)
    kd, at_support, at_tail = compare(z, log_p, log_p_tail, inside, outside, shares, beta, SUPPORT, DIVERGENCE)
    broken = (tl.abs(top) > HUGE) | (inside[0] != inside[0])  # +inf, NaN, or nothing but -inf
    ce = 0.0
    ce_parts = 0.0, 0.0
    if TARGET:
        weights = tl.where(at_t, 0.0, weight(z, top, LOG2E, LOG2E_LOW))
        others = r1 * weight(m, top, LOG2E, LOG2E_LOW)
        ce, _, total_1, _ = row_terms(top, z_t, others + tl.sum(weights, 0), 0.0)
        ce = tl.where(broken, float("nan"), ce)
        at_entries = tl.where(at_t, -one_minus_exp(ce), weights / total_1)
        ce_parts = at_entries, weight(m, top, LOG2E, LOG2E_LOW) / total_1
    # Of a column in the tail, the share of the tail's gradient is its share of the tail's mass.
    top_r, sum_r = tail
    per_weight = tl.where(sum_r > 0.0, at_tail / sum_r, 0.0)
    kd_parts = at_support, per_weight * weight(m, top_r, c, missing), per_weight * weight(z_apart, top_r, c, missing)
    return (tl.where(broken, float("nan"), kd), ce, inside[0], broken), (kd_parts, ce_parts)


@triton.jit
def coefficients(
    g, losses, parts, m, temperature, z, z_t, kd_weight, ce_weight, logit_scale, softcap,
    TRANSFORM: tl.constexpr, SQUARED: tl.constexpr, CE: tl.constexpr, KD: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """(scales of `write_tile`, dx of the support, dx of a target outside of it). g: dloss / denominator, weighted.

    KD, CE: which of the two has a gradient outside the support.
    """
    kd_parts, ce_parts = parts  # in two steps: Triton 3.6 fails at nested targets
    at_support, dense, at_target = kd_parts
    ce_support, ce_dense = ce_parts
    t, c, _ = temperature
    k = times(kd_weight, g * logit_scale * (t if SQUARED else 1.0 / t))
    b = reference_of(m, c)
    b1 = reference_of(m, LOG2E)
    support = times(k, at_support)
    a = 0.0
    a1 = 0.0
    target = 0.0
    if KD:
        a = times(k, dense) * tl.exp2(lost_in(b, m, c))
        target = times(k, at_target)
    if CE:
        h = g * ce_weight * logit_scale
        a1 = times(h, ce_dense) * tl.exp2(lost_in(b1, m, LOG2E))
        support += times(h, ce_support)
        target -= times(h, one_minus_exp(losses[1]))
    support *= slope(z, logit_scale, softcap, TRANSFORM)
    target *= slope(z_t, logit_scale, softcap, TRANSFORM)
    # Without a temperature, or without KD there, one exponential is enough.
    scales = (a, b, c, a1, b1) if KD and TEMPERED else (a + a1, b1, LOG2E, 0.0, 0.0)
    return scales, support, target


@triton.jit
def write_row(
    row, valid, in_range, losses, rest, t, kd_weight, ce_weight, token_weight, outputs, group_ptr, groups, kd_groups,
    SQUARED: tl.constexpr, TARGET: tl.constexpr, BITS: tl.constexpr, KD_BITS: tl.constexpr,
):  # fmt: skip
    """Losses, statistics and what the backward needs of one row, and its counts in the sketches."""
    row_loss_ptr, kd_loss_ptr, token_loss_ptr, mass_ptr, rest_ptr, sketch_ptr, kd_sketch_ptr = outputs
    kd, ce, mass, broken = losses
    m, r, r1 = rest
    nothing = tl.where(valid, float("nan"), 0.0)
    kd = tl.where(in_range, kd, nothing)
    loss = times(kd_weight * (t * t if SQUARED else 1.0), kd)
    if TARGET:
        ce = tl.where(in_range, ce, nothing)
        loss += times(ce_weight, ce)
    loss = tl.where(in_range, tl.where(broken, float("nan"), loss), nothing)  # whatever the weights
    tl.store(row_loss_ptr + row, loss * token_weight)
    tl.store(kd_loss_ptr + row, kd)
    tl.store(token_loss_ptr + row, ce)
    tl.store(mass_ptr + row, tl.where(valid, mass, 0.0))
    tl.store(rest_ptr + row * 3, tl.where(valid, m, 0.0))
    tl.store(rest_ptr + row * 3 + 1, tl.where(valid, r, 0.0))
    tl.store(rest_ptr + row * 3 + 2, tl.where(valid, r1, 0.0))
    if sketch_ptr is not None:
        count_value(sketch_ptr, group_ptr, groups, row, ce, in_range, BITS)
    if kd_sketch_ptr is not None:
        count_value(kd_sketch_ptr, group_ptr, kd_groups, row, kd, in_range, KD_BITS)
