"""Distillation losses as formulas: a student's logits against a teacher's top K, or against all of its logits.

With z the student's transformed logits, y = z / T, S the K columns of the support and t the target:

    lse_S = logsumexp of y over S      lse_tail = logsumexp of y over the other columns      D = lse_tail - lse_S
    log Q = -log(1 + e^D)              log(1 - Q) = -log(1 + e^-D)              log q_k = (y_k - lse_S) + log Q

so neither the mass of a saturated student nor what it leaves to the tail is a difference from 1. For every support and
divergence with terms f_c(p_c, q_c), G_c = q_c df/dq_c and E = sum_c G_c, the gradient is

    dKD/dy_c = G_c - q_c E

where a column outside the support has its share of the tail's, G_tail - (1 - Q) E, by its exponential.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xentile.reference import divergence as divergences
from xentile.reference.cross_entropy import accumulation_dtype, reduce_rows, rows_of, transform


class DistillationTerms(NamedTuple):
    """The outputs of both operators; all but `loss` are detached."""

    loss: Tensor  # () for mean and sum, (N,) for none
    denominator: Tensor  # () what the mean was divided by; 1 for none and sum
    kd_loss: Tensor  # (N,) the divergence in nats, without weights and T^2; 0 where ignored, NaN where out of range
    token_loss: Tensor  # (N,) plain cross-entropy; 0 without a target or where ignored, NaN where out of range
    student_mass: Tensor  # (N,) Q; 1 for a dense teacher


class Task(NamedTuple):
    """Options of a row's loss. temperature: a number, or (N,)."""

    support: str = "dense"
    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: Tensor | float = 1.0
    temperature_squared: bool = True
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    ignore_index: int = -100

    @property
    def closed(self) -> bool:
        """Whether teacher and student each sum to 1 over the classes that are compared."""
        return self.support in ("dense", "renormalized", "tail_bucket")


class Masses(NamedTuple):
    """Log-masses of the student in double, (N, C) and (N,). C classes: K columns, and the tail for tail_bucket."""

    z: Tensor  # (N, V)
    classes: Tensor  # (N, C) log q_c, those that the divergence compares
    conditional: Tensor  # (N, K) log(q_k / Q)
    inside: Tensor  # (N,) log Q
    outside: Tensor  # (N,) log(1 - Q)
    lse_tail: Tensor  # (N,) logsumexp of y over the columns outside the support
    on_support: Tensor  # (N, V) bool


def topk_distillation(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    target: Tensor | None,
    task: Task,
    *,
    token_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    reduction: str = "mean",
    zero_if_empty: bool = False,
) -> DistillationTerms:
    """Student logits (N, V) against a `Support`, differentiable in logits.

    A row's loss is u * (kd_weight * T^2 * KD + ce_weight * CE), T^2 only with temperature_squared. The forward KL on an
    open support, sum_S p log(p / q), is P * (sum_S bregman(p / P, q / Q) + log P - log Q).
    """
    valid, live, t, x = _rows(logits, target, task)
    student = _student(x, ids, task)
    log_p, log_q, present, log_total = _classes(logprobs, tail, student, task)
    if task.support == "sampled":
        kd = -torch.where(present, log_p.exp() * log_q, 0.0).sum(1)
    elif task.divergence == "forward_kl" and not task.closed:
        some = log_total != -torch.inf
        inside = torch.where(some, student.inside, 0.0)
        conditional = torch.where(present, student.conditional, 0.0)
        relative = divergences.bregman(log_p - torch.where(some, log_total, 0.0)[:, None], conditional)
        share = torch.where(present, relative, 0.0).sum(1)
        kd = torch.where(some, log_total.exp() * (share + torch.where(some, log_total, 0.0) - inside), 0.0)
    else:
        terms = divergences.terms(log_p, log_q, task.divergence, task.beta, task.closed)
        kd = torch.where(present, terms, 0.0).sum(1)
    return _losses(kd, x, student, valid, live, t, target, task, token_weight, normalizer, reduction, zero_if_empty)


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    task: Task,
    *,
    token_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    reduction: str = "mean",
    zero_if_empty: bool = False,
) -> DistillationTerms:
    """Student logits (N, V) against all logits (N, V) of a teacher, differentiable in the student's."""
    valid, live, t, x = _rows(logits, target, task)
    student = _dense_student(x, task)
    log_p, log_q, present = _compared(_teacher_logprobs(teacher_logits, valid, task), student.classes)
    terms = divergences.terms(log_p, log_q, task.divergence, task.beta, True)
    kd = torch.where(present, terms, 0.0).sum(1)
    return _losses(kd, x, student, valid, live, t, target, task, token_weight, normalizer, reduction, zero_if_empty)


def topk_distillation_gradient(
    dloss: Tensor,
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor,
    task: Task,
) -> Tensor:
    """The gradient in closed form, (N, V) in the dtype of logits."""
    _, live, t, x = _rows(logits, target, task)
    student = _student(x, ids, task)
    log_p, log_q, present, _ = _classes(logprobs, tail, student, task)
    slope = divergences.slopes(log_p, log_q, task.divergence, task.beta, task.closed)
    slope = torch.where(present, slope, 0.0)
    expected = slope.sum(1, keepdim=True)
    at_class = slope - torch.where(present, log_q.exp(), 0.0) * expected
    k = ids.shape[1]
    y = student.z / _per_row(task.temperature, x)
    dense = torch.zeros_like(y)
    if task.support != "renormalized":
        rest = at_class[:, k:].sum(1) if task.support == "tail_bucket" else -student.outside.exp() * expected[:, 0]
        some = student.lse_tail != -torch.inf
        shift = torch.where(some, student.lse_tail, 0.0)[:, None]
        dense = torch.where(some[:, None] & ~student.on_support, rest[:, None] * torch.exp(y - shift), 0.0)
    columns = torch.where(ids < x.shape[1], ids, 0).long()
    dy = dense.scatter_add(1, columns, torch.where(ids < x.shape[1], at_class[:, :k], 0.0))
    return _gradient(dy, dloss, logits, student, live, t, target, token_weight, denominator, task)


def distillation_gradient(
    dloss: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor,
    task: Task,
) -> Tensor:
    """The gradient of `distillation` in closed form."""
    valid, live, t, x = _rows(logits, target, task)
    student = _dense_student(x, task)
    log_p, log_q, present = _compared(_teacher_logprobs(teacher_logits, valid, task), student.classes)
    slope = torch.where(present, divergences.slopes(log_p, log_q, task.divergence, task.beta, True), 0.0)
    dy = slope - torch.where(present, log_q.exp(), 0.0) * slope.sum(1, keepdim=True)
    return _gradient(dy, dloss, logits, student, live, t, target, token_weight, denominator, task)


def _rows(logits: Tensor, target: Tensor | None, task: Task) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As in cross_entropy, where without a target every row is live."""
    if target is not None:
        return rows_of(logits, target, task.ignore_index)
    every = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    return every, every, torch.zeros_like(every, dtype=torch.int64), logits.to(accumulation_dtype(logits.dtype))


def _per_row(value: Tensor | float, like: Tensor) -> Tensor:
    """(N, 1) or () in double."""
    value = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    return value[:, None] if value.dim() else value


def _student(x: Tensor, ids: Tensor, task: Task) -> Masses:
    size = x.shape[1]
    present = ids < size
    columns = torch.where(present, ids, 0).long()
    on_support = torch.zeros(x.shape[0], size + 1, dtype=torch.bool, device=x.device)
    on_support = on_support.scatter(1, torch.where(present, ids, size).long(), True)[:, :size]
    z = transform(x, task.logit_scale, task.softcap).double()
    y = z / _per_row(task.temperature, x)
    y_support = torch.where(present, y.gather(1, columns), -torch.inf)
    lse_support, conditional = _normalised(y_support)
    lse_tail = _log_sum(y.masked_fill(on_support, -torch.inf))
    gap = lse_tail - lse_support
    inside, outside = -_softplus(gap), -_softplus(-gap)
    classes = conditional
    if task.support != "renormalized":
        classes = torch.where(present, conditional, 0.0) + inside[:, None]
        classes = torch.where(present, classes, -torch.inf)
    if task.support == "tail_bucket":
        classes = torch.cat([classes, outside[:, None]], 1)
    return Masses(z, classes, conditional, inside, outside, lse_tail, on_support)


def _dense_student(x: Tensor, task: Task) -> Masses:
    z = transform(x, task.logit_scale, task.softcap).double()
    lse, classes = _normalised(z / _per_row(task.temperature, x))
    nowhere = torch.full_like(lse, -torch.inf)
    return Masses(z, classes, classes, torch.zeros_like(lse), nowhere, nowhere, torch.ones_like(z, dtype=torch.bool))


def _classes(logprobs: Tensor, tail: Tensor, student: Masses, task: Task) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_compared` returns, and the log of the teacher's sum (N,)."""
    log_p = logprobs.double()
    if task.support == "tail_bucket":
        log_p = torch.cat([log_p, tail.double()[:, None]], 1)
    total = torch.logsumexp(log_p, 1)
    if task.support == "teacher_renormalized":  # 1, whatever its rounding
        total = torch.where(total == -torch.inf, total, total * 0.0)
    entries = torch.ones_like(log_p, dtype=torch.bool)
    entries[:, : logprobs.shape[1]] = logprobs != -torch.inf
    return *_compared(torch.where(entries, log_p, -torch.inf), student.classes.masked_fill(~entries, -torch.inf)), total


def _compared(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p, log q, present), (N, C), with 0 for both where a class has neither: nothing of it shall be a NaN."""
    present = (log_p != -torch.inf) | (log_q != -torch.inf)
    return torch.where(present, log_p, 0.0), torch.where(present, log_q, 0.0), present


def _teacher_logprobs(teacher_logits: Tensor, valid: Tensor, task: Task) -> Tensor:
    y = teacher_logits.double() / _per_row(task.temperature, teacher_logits)
    y = torch.where(valid[:, None], y, 0.0)
    log_p = _normalised(y)[1]
    return torch.where(y.amax(1, keepdim=True).isfinite(), log_p, torch.nan)


def _losses(
    kd: Tensor,
    x: Tensor,
    student: Masses,
    valid: Tensor,
    live: Tensor,
    t: Tensor,
    target: Tensor | None,
    task: Task,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    reduction: str,
    zero_if_empty: bool,
) -> DistillationTerms:
    broken = ~x.amax(1).isfinite()
    ce = _cross_entropy(student.z, t) if target is not None else torch.zeros_like(kd)
    row = torch.zeros_like(kd)
    if task.kd_weight:
        squared = torch.as_tensor(task.temperature, dtype=torch.float64, device=x.device) ** 2
        row = row + task.kd_weight * (squared if task.temperature_squared else 1.0) * kd
    if task.ce_weight and target is not None:
        row = row + task.ce_weight * ce
    counted = torch.ones_like(row)
    if token_weight is not None:
        row, counted = row * token_weight, counted * token_weight
    bad = (valid & ~live) | (valid & broken)
    row = torch.where(live, row, 0.0).masked_fill(bad, torch.nan).to(x.dtype)
    counted = torch.where(live, counted, 0.0).to(x.dtype)
    loss, denominator = reduce_rows(row, counted, normalizer, reduction, zero_if_empty)

    def per_token(value: Tensor) -> Tensor:
        return torch.where(valid, value.detach(), 0.0).to(x.dtype)

    return DistillationTerms(
        loss=loss,
        denominator=denominator.detach(),
        kd_loss=per_token(kd).masked_fill(bad, torch.nan),
        token_loss=per_token(ce).masked_fill(bad & (target is not None), torch.nan),
        student_mass=per_token(student.inside.exp()),
    )


def _cross_entropy(z: Tensor, t: Tensor) -> Tensor:
    at_target = torch.arange(z.shape[1], device=z.device) == t[:, None]
    return _softplus(_log_sum(z.masked_fill(at_target, -torch.inf)) - z.gather(1, t[:, None])[:, 0])


def _gradient(
    dy: Tensor,
    dloss: Tensor,
    logits: Tensor,
    student: Masses,
    live: Tensor,
    t: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor,
    task: Task,
) -> Tensor:
    """From dKD/dy (N, V): weights, temperature, the cross-entropy's part and the transform of the logits."""
    z = student.z
    temperature = _per_row(task.temperature, z)
    dz = torch.zeros_like(z)
    if task.kd_weight:
        dz = task.kd_weight * (temperature if task.temperature_squared else 1 / temperature) * dy
    if task.ce_weight and target is not None:
        p = torch.softmax(z, 1)
        p = p.scatter(1, t[:, None], torch.expm1(-_cross_entropy(z, t))[:, None])
        dz = dz + task.ce_weight * p
    g = (dloss / denominator).double().expand(z.shape[0])
    if token_weight is not None:
        g = g * token_weight
    dz = dz * g[:, None] * task.logit_scale
    if task.softcap:
        dz = dz * (1 - (z / task.softcap) ** 2)
    return torch.where(live[:, None], dz, 0.0).to(logits.dtype)


def _log_sum(x: Tensor) -> Tensor:
    """Logsumexp over the columns, -inf if all are, with a gradient of 0 then."""
    m = x.detach().amax(1, keepdim=True)
    shift = torch.where(m == -torch.inf, 0.0, m)
    total = torch.exp(x - shift).sum(1)
    some = total > 0
    return torch.where(some | total.isnan(), shift[:, 0] + torch.where(some, total, 1.0).log(), -torch.inf)


def _normalised(y: Tensor) -> tuple[Tensor, Tensor]:
    """(logsumexp, y - logsumexp), where an entry that has nearly all the mass keeps its digits."""
    top = y.argmax(1, keepdim=True)
    at_top = y.gather(1, top)
    shift = torch.where(at_top == -torch.inf, 0.0, at_top)
    others = torch.exp(y - shift).scatter(1, top, 0.0).sum(1, keepdim=True)
    log_sum = torch.log1p(others)
    lse = torch.where(at_top == -torch.inf, -torch.inf, shift + log_sum)[:, 0]
    return lse, (y - shift) - log_sum


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(torch.zeros_like(x), x)
