"""The mathematics of one row as device functions, without pointers; each works on scalars and on tensors.

Products and sums are rounded as written: launches switch the contraction of a * b + c off, and `tl.fma` says where
one is meant. So the fused and the separate gradient agree bit for bit, and no contraction gets at differences of
large numbers.

exp(z - reference) is exp2(fma(z, log2(e), -b)), one instruction before the exponential. The reference b is *defined*
as the rounded product of the maximum and log2(e), so its rounding costs no accuracy: `residue` accounts for it, once
a row. Of a maximum beyond STEEP that rounding would be too large; but of such a row only the maxima themselves count.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HUGE = tl.constexpr(1e38)  # |z / T| beyond it counts as infinite in distillation
STEEP = tl.constexpr(2.0**30)  # float32 numbers beyond it are 128 or more apart, so all but the largest have no mass
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def one_minus_exp(x):
    """1 - exp(-x) for x >= 0; where that cancels, by a polynomial (Chebyshev, relative error 4e-10 up to 1)."""
    p = tl.fma(x, 1.692812738188617e-05, -0.00018832475596752826)
    p = tl.fma(p, x, 0.0013822415707908575)
    p = tl.fma(p, x, -0.0083310502613978)
    p = tl.fma(p, x, 0.041666290209609255)
    p = tl.fma(p, x, -0.16666664326437414)
    p = tl.fma(p, x, 0.4999999997614524)
    return tl.where(x < 1.0, tl.fma(-x * x, p, x), 1.0 - exp(-x))


@triton.jit
def tanh(x):
    """From exp2; where that would cancel, from a polynomial in x^2 (Chebyshev, relative error 2e-9 up to 1/2)."""
    s = x * x
    p = tl.fma(s, -0.006942934839264657, 0.021470679127817624)
    p = tl.fma(p, s, -0.05393346841274365)
    p = tl.fma(p, s, 0.133332257703681)
    p = tl.fma(p, s, -0.3333333279653526)
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.5, tl.fma(x * s, p, x), tl.where(x < 0, -large, large))


@triton.jit
def transform(x, logit_scale, softcap, TRANSFORM: tl.constexpr):
    """Z of a logit x."""
    if TRANSFORM == "softcap":
        x = tanh(x * (logit_scale / softcap)) * softcap
    elif TRANSFORM == "scale":
        x = x * logit_scale
    return x


@triton.jit
def slope(z, logit_scale, softcap, TRANSFORM: tl.constexpr):
    """dz/dx over logit_scale, from z."""
    u = z * (1.0 / softcap) if TRANSFORM == "softcap" else z
    return 1.0 - u * u if TRANSFORM == "softcap" else 1.0


@triton.jit
def reference_of(m):
    """The b that stands for a maximum m; from -STEEP on, so that no inf - inf arises and no exponential is large."""
    return tl.maximum(m, -STEEP) * LOG2E


@triton.jit
def residue(m, b):
    """B - m * log2(e) without rounding the product, for b = reference_of(m); 0 where m is steep or not finite."""
    return tl.where(tl.abs(m) <= STEEP, tl.fma(-m, LOG2E, b), 0.0)


@triton.jit
def is_steep(m):
    """Whether a row with the maximum m is one of those of which only the maxima count."""
    return (tl.abs(m) > STEEP) & (tl.abs(m) < INFINITY)


@triton.jit
def scale_of(m):
    """(c, b) of e_j = exp2(fma(z_j, c, -b)) for a row with the maximum m. Of a steep row c is 1, and so e_j is 1 for
    a maximum and 2^-128 at most for the others.
    """
    steep = is_steep(m)
    return tl.where(steep, 1.0, LOG2E), tl.where(steep, m, reference_of(m))


@triton.jit
def difference(a, b):
    """(a - b, what its rounding lost): TwoSum."""
    d = a - b
    part = d - a
    return d, (a - (d - part)) - (b + part)


@triton.jit
def power(d, lost):
    """2^(d + lost) for a `lost` far below 1: d = 40 carries a rounding of 2e-6, which would go into a whole sum."""
    return tl.exp2(d) * (1.0 + lost * LN2)


@triton.jit
def row_terms(m, z_t, rest, gap):
    """(CE, log S, S, entropy) of a row from its maximum m, its target's z_t (-inf if there is none), and the sums
    over j != t rest = sum e_j and gap = sum e_j * (m - z_j) / ln 2, e_j = exp(z_j - m). NaN where m is not finite, as
    in PyTorch.
    """
    below = m - z_t
    e_t = tl.where(below == INFINITY, 0.0, exp(-below))  # a target of NaN is not lost
    total = rest + e_t
    log_s = tl.log(total)
    # The target is the maximum: total = 1 + rest, and the quotient undoes the rounding of that sum.
    precise = tl.where(total == 1.0, rest, log_s * (rest / (total - 1.0)))
    log_s = tl.where(z_t == m, precise, log_s)
    log_s = tl.where(tl.abs(m) < INFINITY, log_s, float("nan"))
    entropy = log_s + (gap * LN2 + tl.where(e_t > 0.0, e_t * below, 0.0)) / total
    return tl.where(z_t == m, log_s, below + log_s), log_s, total, entropy


@triton.jit
def coefficients(g, weights, slope_t, ce, m, total, V, label_smoothing, z_loss, logit_scale, SMOOTH: tl.constexpr):
    """((c, b, a, k), at_target): dx_j = (a * exp2(fma(z_j, c, -b)) - k * w_j) * slope_j, and dx_t = at_target.

    g: dloss / denominator. weights: (w_t, sum of w, token weight). 1 - p_t comes from CE, not from S - exp(z_t - m).
    """
    w_t, w_sum, token_weight = weights
    c, b = scale_of(m)
    hard = (1.0 - label_smoothing) * w_t
    z_term = tl.where(z_loss == 0.0, 0.0, 2.0 * z_loss * (m + tl.log(total)))
    p_t = exp(-ce)
    a = hard + z_term
    at_target = z_term * p_t - hard * one_minus_exp(ce)
    k = 0.0
    if SMOOTH:
        smooth = label_smoothing / V
        a += smooth * w_sum
        at_target += smooth * (w_sum * p_t - w_t)
        k = g * token_weight * logit_scale * smooth
    g = g * token_weight * logit_scale
    return (c, b, g * a * (tl.exp2(residue(m, b)) / total), k), g * at_target * slope_t


@triton.jit
def gradient(z, w, scales, slope_z, SMOOTH: tl.constexpr):
    """Dx at a column other than the target; see `coefficients`."""
    c, b, a, k = scales
    dx = tl.exp2(tl.fma(z, c, -b)) * a
    if SMOOTH:
        dx -= k * w
    return dx * slope_z
