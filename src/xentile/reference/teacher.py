"""What a distillation loss needs of a teacher: its top-K, and the masses of the rest at every temperature.

With l_v = log p_v at temperature 1, the tempered probabilities are

    p_T(v) = exp(l_v / T - log_z(T)),    log_z(T) = logsumexp_v(l_v / T)

so that log_z, 4 bytes a temperature, makes a stored top-K exact at that temperature. It cannot be recovered from K
entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xentile.reference.cross_entropy import accumulation_dtype, transform


class TeacherTopK(NamedTuple):
    """What `xentile.teacher_topk` returns; see there."""

    ids: Tensor
    """(..., K) int32, by falling logit; of equal ones the lower id first."""
    logprobs: Tensor
    """(..., K) float32, log-probabilities at temperature 1 in nats; -inf where the logit is."""
    log_z: Tensor
    """(..., T) float32, logsumexp over the vocabulary of logprob / temperature; 0 for temperature 1."""
    tail_logprob: Tensor
    """(..., T) float32, log of the mass that is not in the top K, at each temperature; -inf if there is none."""


def teacher_topk(
    logits: Tensor, k: int, temperatures: Tensor, softcap: float = 0.0, logit_scale: float = 1.0
) -> TeacherTopK:
    """Top k of logits (N, V) for temperatures (T,). Rows with NaN, +inf or nothing but -inf: NaN, with ids 0..k-1."""
    x = logits.to(accumulation_dtype(logits.dtype))
    # compared before the transform, whose rounding could make equal what was not
    ids = torch.sort(x, dim=1, descending=True, stable=True).indices[:, :k]
    z = transform(x, logit_scale, softcap)
    below = z - z.gather(1, ids[:, :1])  # <= 0: relative to the maximum, which keeps the digits of a peaked row
    in_top = torch.zeros_like(x, dtype=torch.bool).scatter_(1, ids, True)
    is_first = torch.zeros_like(in_top).scatter_(1, ids[:, :1], True)

    tempered = below[:, :, None] / temperatures.to(x.dtype)  # (N, V, T)
    tail = torch.logsumexp(tempered.masked_fill(in_top[:, :, None], -torch.inf), 1)
    log_sum = torch.log1p(torch.exp(tempered).masked_fill(is_first[:, :, None], 0.0).sum(1))
    log_sum_1 = torch.log1p(torch.exp(below).masked_fill(is_first, 0.0).sum(1, keepdim=True))
    logprobs = below.gather(1, ids) - log_sum_1
    log_z = torch.where(temperatures == 1, 0.0, log_sum - log_sum_1 / temperatures)

    maximum = z.amax(1, keepdim=True)  # NaN if there is one
    broken = ~maximum.isfinite()
    return TeacherTopK(
        ids=torch.where(broken, torch.arange(k, device=x.device), ids).int(),
        logprobs=logprobs.masked_fill(broken, torch.nan).float(),
        log_z=log_z.masked_fill(broken, torch.nan).float(),
        tail_logprob=(tail - log_sum).masked_fill(broken, torch.nan).float(),
    )
