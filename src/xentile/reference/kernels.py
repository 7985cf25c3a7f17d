"""The reference as operator kernels, with the signatures of the schemas in _schemas.py: they fill their outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xentile import _layout as layout
from xentile import reference
from xentile.reference.sketch import add_columns


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    group_ids: Tensor | None,
    loss: Tensor,
    denominator: Tensor,
    token_loss: Tensor,
    lse: Tensor,
    row_max: Tensor,
    sum_exp: Tensor,
    predicted: Tensor,
    correct: Tensor,
    entropy: Tensor | None,
    target_rank: Tensor | None,
    sketch: Tensor | None,
    dlogits: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    zero_if_empty: bool,
) -> None:
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    options |= {"softcap": softcap, "logit_scale": logit_scale}
    terms = reference.cross_entropy(
        logits,
        target,
        weight,
        token_weight=token_weight,
        normalizer=normalizer,
        reduction=layout.REDUCTIONS[reduction],
        zero_if_empty=zero_if_empty,
        **options,
    )
    filled = (loss, denominator, token_loss, lse, row_max, sum_exp, predicted, correct, entropy, target_rank)
    for out, value in zip(filled, terms, strict=True):
        if out is not None:
            out.copy_(value)
    if sketch is not None:
        count(sketch, terms, group_ids)
    if dlogits is not None:
        one = torch.ones_like(denominator)
        saved = (terms.denominator, terms.token_loss, terms.row_max, terms.sum_exp)
        gradient = reference.cross_entropy_gradient(one, logits, target, weight, token_weight, *saved, **options)
        dlogits.copy_(gradient)


def count(sketch: Tensor, terms: reference.Terms, group_ids: Tensor | None) -> None:
    """Tokens with a target count by their loss; ignored and out-of-range ones each in a column of their own."""
    live = terms.predicted >= 0
    reference.sketch_update(terms.token_loss.float(), live, None, group_ids, sketch, 1)
    special = torch.where(terms.predicted == -1, layout.IGNORED, layout.OUT_OF_RANGE)
    add_columns(sketch, special, (~live).long(), group_ids)


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor,
    token_loss: Tensor,
    row_max: Tensor,
    sum_exp: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    filled: bool,
) -> None:
    gradient = reference.cross_entropy_gradient(
        dloss,
        logits,
        target,
        weight,
        token_weight,
        denominator,
        token_loss,
        row_max,
        sum_exp,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    dlogits.copy_(gradient)


def scale_(x: Tensor, scale: Tensor) -> None:
    x.mul_(scale)


def sketch_update(
    values: Tensor, mask: Tensor | None, weights: Tensor | None, group_ids: Tensor | None, sketch: Tensor, unit: int
) -> None:
    reference.sketch_update(values, mask, weights, group_ids, sketch, unit)


def sketch_quantile(sketch: Tensor, q: Tensor, value: Tensor, lower: Tensor, upper: Tensor, interpolation: int) -> None:
    results = reference.sketch_quantile(sketch, q, layout.INTERPOLATIONS[interpolation])
    for out, result in zip((value, lower, upper), results, strict=True):
        out.copy_(result)


def radix_counts(
    x: Tensor, mask: Tensor | None, weights: Tensor | None, prefixes: Tensor, shift: int, bits: int, counts: Tensor
) -> None:
    reference.radix_counts(x, mask, weights, prefixes, shift, bits, counts)


def host_quantile(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    q: Tensor,
    value: Tensor,
    counted: Tensor,
    interpolation: int,
    omit_nan: bool,
) -> None:
    results = reference.host_quantile(x, mask, weights, q, interpolation, omit_nan)
    for out, result in zip((value, counted), results, strict=True):
        out.copy_(result)


def teacher_topk(
    logits: Tensor,
    temperatures: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    log_z: Tensor,
    tail_logprob: Tensor,
    softcap: float,
    logit_scale: float,
) -> None:
    results = reference.teacher_topk(logits, ids.shape[1], temperatures, softcap, logit_scale)
    for out, result in zip((ids, logprobs, log_z, tail_logprob), results, strict=True):
        out.copy_(result)


def first_bad_target(target: Tensor, num_classes: int, ignore_index: int) -> int:
    return _first((target != ignore_index) & ((target < 0) | (target >= num_classes)))


def first_bad_group(group_ids: Tensor, num_groups: int) -> int:
    return _first((group_ids < 0) | (group_ids >= num_groups))


def _first(bad: Tensor) -> int:
    where = bad.nonzero()
    return int(where[0, 0]) if len(where) else -1


def isa() -> str:
    return "none"


def empty_gradient(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def empty_cache() -> None:
    pass
