"""Divergences between a teacher's masses p and a student's q over some classes, term by term and without cancellation.

Classes are the K columns of a support, with or without the rest of the vocabulary as one more, or all V columns. They
are `closed` if p and q each sum to 1 over them. Then terms that cancel in the sum may be added to make every term at
least 0, which is what keeps a small divergence from being a difference of rounding errors:

    bregman(a, b) = a log(a / b) - a + b >= 0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def bregman(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Give a log(a / b) - a + b from logarithms; b where a = 0, inf where b = 0 < a. Differentiable in both."""
    a, b = log_a.exp(), log_b.exp()
    nothing = log_a == -torch.inf
    d = torch.where(nothing, 0.0, log_b - log_a)
    close = d.abs() < 0.5
    near, far = torch.where(close, d, 0.0), torch.where(close, 0.0, d)
    return torch.where(nothing, b, torch.where(close, a * (torch.expm1(near) - near), b - a - a * far))


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q)."""
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def terms(log_p: Tensor, log_q: Tensor, divergence: str, beta: float, closed: bool) -> Tensor:
    """f_c of each class, whose sum is the divergence (for the forward KL of an open support see `distillation`)."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        return bregman(log_p, log_q) if closed else p * (log_p - log_q)
    if divergence == "reverse_kl":
        return bregman(log_q, log_p) if closed else _expectation(q, log_q, log_p)
    if divergence == "jsd":
        log_m = log_mixture(log_p, log_q, beta)
        return beta * bregman(log_p, log_m) + (1 - beta) * bregman(log_q, log_m)
    if divergence == "skew_forward_kl":
        log_m = log_mixture(log_p, log_q, beta)
        return bregman(log_p, log_m) if closed else p * (log_p - log_m)
    if divergence == "skew_reverse_kl":
        log_m = log_mixture(log_p, log_q, 1 - beta)
        return bregman(log_q, log_m) if closed else _expectation(q, log_q, log_m)
    return 0.5 * torch.exp(torch.maximum(log_p, log_q)) * -torch.expm1(-(log_p - log_q).abs())


def slopes(log_p: Tensor, log_q: Tensor, divergence: str, beta: float, closed: bool) -> Tensor:
    """G_c = q_c df/dq_c of each class, up to what cancels in G_c - q_c sum(G) if the classes are closed."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "forward_kl":
        return -p
    if divergence == "reverse_kl":
        return _expectation(q, log_q, log_p) + (0.0 if closed else q)
    if divergence == "jsd":
        return (1 - beta) * _expectation(q, log_q, log_mixture(log_p, log_q, beta))
    if divergence == "skew_forward_kl":
        return -(1 - beta) * torch.exp(log_p + log_q - log_mixture(log_p, log_q, beta))
    if divergence == "skew_reverse_kl":
        log_m = log_mixture(log_p, log_q, 1 - beta)
        return _expectation(q, log_q, log_m) + (1 - beta) * torch.exp(log_p + log_q - log_m)
    return 0.5 * q * torch.sign(log_q - log_p)


def _expectation(q: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """Q log(q / p), 0 where q = 0."""
    some = q > 0
    return torch.where(some, q * torch.where(some, log_q - log_p, 0.0), 0.0)
