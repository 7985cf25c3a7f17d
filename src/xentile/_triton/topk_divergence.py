"""Divergences of one class as device functions; the formulas are those of reference/divergence.py.

Each works on the masses p and q of teacher and student and on their logarithms, in float32. Where p and q are close,
what is wanted is a difference of second order, which only a polynomial in d = log q - log p gives with its digits.
"""

import triton
import triton.language as tl

from xentile._triton.row import HUGE, LN2, LOG2E, one_minus_exp

LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)  # log2(e) less its float32


@triton.jit
def exp_of(x):
    """exp(x) without the rounding of x * log2(e), which would cost x = -40 a relative error of 1e-6."""
    x = tl.where(x < -HUGE, -HUGE, x)
    power = x * LOG2E
    lost = tl.fma(x, LOG2E, -power) + x * LOG2E_LOW
    return tl.where(power < -150.0, 0.0, tl.exp2(power) * (1.0 + lost * LN2))


@triton.jit
def log1p(x):
    """For x > -1: the quotient undoes the rounding of 1 + x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.where(x < HUGE, tl.log(u) * (x / (u - 1.0)), tl.log(x)))


@triton.jit
def bregman(a, b, d):
    """Give a log(a / b) - a + b for d = log(b / a): b where a = 0, inf where b = 0 < a."""
    # (exp(d) - 1 - d) / d^2 (Chebyshev, relative error 6e-9 up to 1)
    s = tl.fma(d, 2.806280257061644e-06, 2.5358512239392894e-05)
    s = tl.fma(s, d, 0.0001983810196879432)
    s = tl.fma(s, d, 0.0013885396911890169)
    s = tl.fma(s, d, 0.008333339675917317)
    s = tl.fma(s, d, 0.041666736595234066)
    s = tl.fma(s, d, 0.1666666664684211)
    s = tl.fma(s, d, 0.499999997814217)
    return tl.where(a == 0.0, b, tl.where(tl.abs(d) < 1.0, a * (d * d * s), b - a - a * d))


@triton.jit
def log_mixture(d, w):
    """log(1 - w + w exp(d)) for 0 <= w <= 1: how far a mixture lies above its first part, d being the second's lead."""
    gap = one_minus_exp(tl.abs(d))
    mixed = tl.maximum(d, 0.0) + log1p(tl.where(d > 0.0, w - 1.0, -w) * gap)
    return tl.where(w == 0.0, 0.0, tl.where(w == 1.0, d, mixed))


@triton.jit
def share(p, mixture):
    """What p is of a mixture with it; 0 of nothing."""
    return tl.where(p == 0.0, 0.0, p / mixture)


@triton.jit
def times(q, x):
    """The product q * x, 0 where q = 0 also for an infinite x."""
    return tl.where(q == 0.0, 0.0, q * x)


@triton.jit
def divergence(p, q, log_p, log_q, beta, KIND: tl.constexpr, CLOSED: tl.constexpr):
    """(f, G) of classes: f sums to the divergence, and G = q df/dq, up to what cancels on closed supports.

    forward_kl of an open support is `open_forward_kl` instead.
    """
    d = tl.where(log_p == log_q, 0.0, log_q - log_p)  # also of nothing and nothing
    if KIND == "forward_kl":
        f = bregman(p, q, d)
        slope = -p
    elif KIND == "reverse_kl":
        product = times(q, d)
        f = bregman(q, p, -d) if CLOSED else product
        slope = product if CLOSED else product + q
    elif KIND == "jsd":
        m = beta * p + (1.0 - beta) * q
        above_q = log_mixture(-d, beta)
        f = beta * bregman(p, m, log_mixture(d, 1.0 - beta)) + (1.0 - beta) * bregman(q, m, above_q)
        slope = (beta - 1.0) * times(q, above_q)
    elif KIND == "skew_forward_kl":
        m = beta * p + (1.0 - beta) * q
        above_p = log_mixture(d, 1.0 - beta)
        f = bregman(p, m, above_p) if CLOSED else -times(p, above_p)
        slope = (beta - 1.0) * times(q, share(p, m))
    elif KIND == "skew_reverse_kl":
        m = (1.0 - beta) * p + beta * q
        above_q = log_mixture(-d, 1.0 - beta)
        product = -times(q, above_q)
        f = bregman(q, m, above_q) if CLOSED else product
        slope = product + (1.0 - beta) * times(q, share(p, m))
    else:
        f = 0.5 * tl.maximum(p, q) * one_minus_exp(tl.abs(d))
        slope = tl.where(d > 0.0, 0.5 * q, tl.where(d < 0.0, -0.5 * q, 0.0))
    return f, slope


@triton.jit
def open_forward_kl(p, log_p, log_share, log_q_total, SUPPORT: tl.constexpr):
    """sum_S p log(p / q) of the vectors of a support; log_share: of q_k / Q, and Q = exp(log_q_total).

    It is P (sum_S bregman(p / P, q / Q) + log P - log Q), in which nothing cancels but the two masses.
    """
    total = 1.0
    log_total = 0.0
    if SUPPORT == "truncated":
        total = tl.sum(p, 0)
        log_total = tl.log(total)
    log_p -= log_total
    d = tl.where(log_p == log_share, 0.0, log_share - log_p)
    inner = tl.sum(bregman(exp_of(log_p), exp_of(log_share), d), 0)
    kd = total * (inner + log_total - log_q_total)
    return tl.where(tl.max(p, 0) == 0.0, 0.0, kd)
