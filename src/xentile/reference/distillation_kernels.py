"""The reference of the distillation operators, with the signatures of the schemas in xentile/_schemas.py."""

from __future__ import annotations

import torch
from torch import Tensor

from xentile import _layout as layout
from xentile.reference import distillation as spec
from xentile.reference.cross_entropy import accumulation_dtype, transform
from xentile.reference.sketch import add_columns, sketch_update
from xentile.reference.support import topk_support as canonical_support


def topk_support(
    ids: Tensor,
    logprobs: Tensor,
    log_z: Tensor | None,
    tail_logprob: Tensor | None,
    token_temperature: Tensor | None,
    sorted_ids: Tensor,
    sorted_logprobs: Tensor,
    tail: Tensor,
    mass: Tensor,
    num_classes: int,
    support: int,
    duplicates: int,
    fallback: int,
    temperature: float,
) -> None:
    results = canonical_support(
        ids,
        logprobs,
        log_z,
        tail_logprob,
        temperature if token_temperature is None else token_temperature,
        num_classes=num_classes,
        support=layout.SUPPORTS[support],
        duplicates=layout.DUPLICATES[duplicates],
        fallback=layout.FALLBACKS[fallback],
    )
    for out, result in zip((sorted_ids, sorted_logprobs, tail, mass), results, strict=True):
        out.copy_(result)


def topk_distillation(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    token_temperature: Tensor | None,
    group_ids: Tensor | None,
    loss: Tensor,
    denominator: Tensor,
    kd_loss: Tensor,
    token_loss: Tensor,
    student_mass: Tensor,
    rest: Tensor,
    sketch: Tensor | None,
    kd_sketch: Tensor | None,
    dlogits: Tensor | None,
    ignore_index: int,
    reduction: int,
    support: int,
    divergence: int,
    beta: float,
    temperature: float,
    temperature_squared: bool,
    kd_weight: float,
    ce_weight: float,
    softcap: float,
    logit_scale: float,
    zero_if_empty: bool,
) -> None:
    scalars = (temperature, temperature_squared, kd_weight, ce_weight, softcap, logit_scale, ignore_index)
    task = _task(layout.SUPPORTS[support], divergence, beta, token_temperature, *scalars)
    terms = spec.topk_distillation(
        logits,
        ids,
        logprobs,
        tail,
        target,
        task,
        token_weight=token_weight,
        normalizer=normalizer,
        reduction=layout.REDUCTIONS[reduction],
        zero_if_empty=zero_if_empty,
    )
    outputs = (loss, denominator, kd_loss, token_loss, student_mass)
    for out, value in zip(outputs, terms, strict=True):
        out.copy_(value)
    rest.copy_(_rest(logits, ids, target, task))
    count(terms, target, group_ids, sketch, kd_sketch, ignore_index, logits.shape[1])
    if dlogits is not None:
        one = torch.ones_like(denominator)
        saved = (target, token_weight, terms.denominator, task)
        dlogits.copy_(spec.topk_distillation_gradient(one, logits, ids, logprobs, tail, *saved))


def topk_distillation_backward(
    dloss: Tensor,
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    token_temperature: Tensor | None,
    denominator: Tensor,
    token_loss: Tensor,
    rest: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    reduction: int,
    support: int,
    divergence: int,
    beta: float,
    temperature: float,
    temperature_squared: bool,
    kd_weight: float,
    ce_weight: float,
    softcap: float,
    logit_scale: float,
    filled: bool,
) -> None:
    scalars = (temperature, temperature_squared, kd_weight, ce_weight, softcap, logit_scale, ignore_index)
    task = _task(layout.SUPPORTS[support], divergence, beta, token_temperature, *scalars)
    saved = (target, token_weight, denominator, task)
    dlogits.copy_(spec.topk_distillation_gradient(dloss, logits, ids, logprobs, tail, *saved))


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    token_temperature: Tensor | None,
    group_ids: Tensor | None,
    loss: Tensor,
    denominator: Tensor,
    kd_loss: Tensor,
    token_loss: Tensor,
    rows: Tensor,
    sketch: Tensor | None,
    kd_sketch: Tensor | None,
    dlogits: Tensor | None,
    ignore_index: int,
    reduction: int,
    divergence: int,
    beta: float,
    temperature: float,
    temperature_squared: bool,
    kd_weight: float,
    ce_weight: float,
    softcap: float,
    logit_scale: float,
    zero_if_empty: bool,
) -> None:
    scalars = (temperature, temperature_squared, kd_weight, ce_weight, softcap, logit_scale, ignore_index)
    task = _task("dense", divergence, beta, token_temperature, *scalars)
    terms = spec.distillation(
        logits,
        teacher_logits,
        target,
        task,
        token_weight=token_weight,
        normalizer=normalizer,
        reduction=layout.REDUCTIONS[reduction],
        zero_if_empty=zero_if_empty,
    )
    for out, value in zip((loss, denominator, kd_loss, token_loss), terms[:4], strict=True):
        out.copy_(value)
    rows.zero_()  # the backward below starts from the logits again
    count(terms, target, group_ids, sketch, kd_sketch, ignore_index, logits.shape[1])
    if dlogits is not None:
        one = torch.ones_like(denominator)
        saved = (target, token_weight, terms.denominator, task)
        dlogits.copy_(spec.distillation_gradient(one, logits, teacher_logits, *saved))


def distillation_backward(
    dloss: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    token_temperature: Tensor | None,
    denominator: Tensor,
    token_loss: Tensor,
    rows: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    reduction: int,
    divergence: int,
    beta: float,
    temperature: float,
    temperature_squared: bool,
    kd_weight: float,
    ce_weight: float,
    softcap: float,
    logit_scale: float,
    filled: bool,
) -> None:
    scalars = (temperature, temperature_squared, kd_weight, ce_weight, softcap, logit_scale, ignore_index)
    task = _task("dense", divergence, beta, token_temperature, *scalars)
    saved = (target, token_weight, denominator, task)
    dlogits.copy_(spec.distillation_gradient(dloss, logits, teacher_logits, *saved))


def _task(
    support: str, divergence: int, beta: float, token_temperature: Tensor | None, temperature: float, *scalars: float
) -> spec.Task:
    t = temperature if token_temperature is None else token_temperature
    squared, kd_weight, ce_weight, softcap, logit_scale, ignore_index = scalars
    name = layout.DIVERGENCES[divergence]
    return spec.Task(
        support, name, beta, t, bool(squared), kd_weight, ce_weight, softcap, logit_scale, int(ignore_index)
    )


def _rest(logits: Tensor, ids: Tensor, target: Tensor | None, task: spec.Task) -> Tensor:
    """The maximum of z over the columns that are neither in the support nor the target, and the sums relative to it."""
    size = logits.shape[1]
    z = transform(logits.to(accumulation_dtype(logits.dtype)), task.logit_scale, task.softcap)
    valid = torch.ones_like(z[:, 0], dtype=torch.bool)
    out = torch.zeros(z.shape[0], size + 1, dtype=torch.bool, device=z.device).scatter_(1, ids.long(), True)
    if target is not None:
        valid = target != task.ignore_index
        out.scatter_(1, torch.where((target >= 0) & (target < size), target, size).long()[:, None], True)
    z = z.masked_fill(out[:, :size], -torch.inf)
    m = z.amax(1, keepdim=True)
    below = z - torch.where(m == -torch.inf, 0.0, m)
    t = torch.as_tensor(task.temperature, dtype=z.dtype, device=z.device)
    tempered = below / (t[:, None] if t.dim() else t)
    rest = torch.cat([m, tempered.exp().sum(1, keepdim=True), below.exp().sum(1, keepdim=True)], 1)
    return torch.where(valid[:, None], rest, 0.0)


def count(
    terms: spec.DistillationTerms,
    target: Tensor | None,
    group_ids: Tensor | None,
    sketch: Tensor | None,
    kd_sketch: Tensor | None,
    ignore_index: int,
    size: int,
) -> None:
    """Both sketches by the rules of cross_entropy."""
    valid = torch.ones_like(terms.kd_loss, dtype=torch.bool) if target is None else target != ignore_index
    live = valid if target is None else valid & (target >= 0) & (target < size)
    special = torch.where(valid, layout.OUT_OF_RANGE, layout.IGNORED)
    for state, values in ((sketch, terms.token_loss), (kd_sketch, terms.kd_loss)):
        if state is not None:
            sketch_update(values.float(), live, None, group_ids, state, 1)
            add_columns(state, special, (~live).long(), group_ids)
