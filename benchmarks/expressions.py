"""Each loss in plain PyTorch, a value a token: what people write today, and in float64 the exact function of the gate.

A function takes the inputs of its case (inputs.py). 16-bit logits are upcast by the caller where they must be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import CROSS_ENTROPY, DISTILLATION

if TYPE_CHECKING:
    from benchmarks.cases import Case

Loss = Callable[..., Tensor]  # of the inputs of a case


def tokens(case: Case) -> Loss:
    """The loss of each token, 0 where its target is ignored."""
    if case.operation == "topk_distillation":
        return _topk_distillation(case)
    return _distillation if case.operation == "distillation" else _cross_entropy


def counted(case: Case, target: Tensor) -> Tensor:
    """Which tokens the mean is over, bool (N,). Without a cross-entropy the target is not looked at."""
    reads_target = case.operation in CROSS_ENTROPY or case.ce_weight != 0
    return target != -100 if reads_target else torch.ones(case.tokens, dtype=torch.bool, device=target.device)


def mean(case: Case) -> Loss:
    """The mean loss of a distillation, in float32 at least: 16-bit log-probabilities leave 1 - sum(q) no digit."""
    each = tokens(case)

    def loss(logits: Tensor, second: Tensor, *teacher: Tensor) -> Tensor:
        losses = each(logits.float(), second.float() if second.is_floating_point() else second, *teacher)
        return losses.sum() / counted(case, second).sum() if case.ce_weight else losses.mean()

    return loss


def plain(case: Case) -> Callable[..., Any]:
    """What the library's error contract calls plain PyTorch."""
    if case.operation == "teacher_topk":
        return lambda logits: topk(case, logits)
    return mean(case) if case.operation in DISTILLATION else lambda logits, target, *_: F.cross_entropy(logits, target)


def topk(case: Case, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids (N, K) of the largest logits; no tail mass, no log Z of other temperatures."""
    values, ids = torch.topk(logits, case.k)
    return values - torch.logsumexp(logits, 1, keepdim=True), ids


def off_support(case: Case, logits: Tensor, *others: Tensor) -> Tensor:
    """The probabilities that make up an element of the gradient of a token (N, V), infinite on the support."""
    q = logits.softmax(-1)
    if case.operation == "distillation":
        return q + others[0].softmax(-1)
    target = others[0].clamp_min(0)[:, None]
    if case.operation != "topk_distillation":
        return q.scatter_(1, target, torch.inf)
    scale = case.temperature * (logits / case.temperature).softmax(-1) + case.ce_weight * q
    return (scale.scatter_(1, target, torch.inf) if case.ce_weight else scale).scatter_(1, others[1], torch.inf)


def _cross_entropy(logits: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


def _distillation(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_q, log_p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _topk_distillation(case: Case) -> Loss:
    t = case.temperature

    def losses(logits: Tensor, target: Tensor, ids: Tensor, logprobs: Tensor, log_z: Tensor, tail: Tensor) -> Tensor:
        log_q = (logits / t if t != 1 else logits).log_softmax(-1).gather(-1, ids)
        log_p = logprobs / t - log_z[:, None] if t != 1 else logprobs
        kd = (log_p.exp() * (log_p - log_q)).sum(-1)
        if case.support == "tail_bucket":
            # Where a student is saturated, float32 has no digit of this left: the floor keeps its logarithm finite.
            outside = (1 - log_q.exp().sum(-1)).clamp_min(torch.finfo(log_q.dtype).eps)
            kd = kd + tail.exp() * (tail - outside.log())
        if not case.ce_weight:
            return t * t * kd
        ce = F.cross_entropy(logits, target, reduction="none")
        return torch.where(target == -100, 0.0, t * t * kd + case.ce_weight * ce)

    return losses
