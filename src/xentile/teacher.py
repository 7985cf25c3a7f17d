"""`teacher_topk`: what to keep of a teacher's logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from xentile import _check, reference
from xentile._ops import ops
from xentile.reference import TeacherTopK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

LARGEST_K = 1024


def teacher_topk(
    logits: Tensor,
    k: int,
    *,
    temperatures: Sequence[float] = (1.0,),
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TeacherTopK:
    r"""The k most probable tokens of a teacher, with all that a distillation loss needs to be exact.

    .. math::
        l_v = \log p_v, \qquad p_T(v) = e^{l_v / T - \log Z(T)}, \qquad \log Z(T) = \log\textstyle\sum_v e^{l_v / T}

    log Z(T) and the tail's mass cannot be recovered from k entries; here they cost no second pass over the logits.
    The tail is a sum of its own: 1 - sum(p) in float32 has no digits left where the teacher is sure.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64. No gradient flows.
        k: 1 to min(V, 1024).
        temperatures: T temperatures > 0 at which the teacher will be used.
        softcap: the teacher's own, c * tanh(z / c); None for none.
        logit_scale: the teacher's own, a factor on its logits.

    Returns:
        TeacherTopK: ids (..., k) int32 by falling logit (of equal ones the lower id first, -inf last); logprobs
        (..., k) float32 in nats at temperature 1; log_z and tail_logprob (..., T) float32. A row with NaN, +inf or
        nothing but -inf gives NaN.

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: naming the argument. Nothing is computed.

    Example:
        >>> teacher = teacher_topk(torch.tensor([[2.0, 0.0, 1.0, 0.0]]), 2)
        >>> teacher.ids
        tensor([[0, 2]], dtype=torch.int32)
        >>> teacher.logprobs.exp().sum() + teacher.tail_logprob.exp()
        tensor([[1.]])
    """
    _check.logits(logits, "logits")
    size = logits.shape[-1]
    if not 1 <= _check.integer(k, "k") <= min(size, LARGEST_K):
        raise ValueError(f"k must be in [1, {min(size, LARGEST_K)}], got {k}")
    values = [_check.positive(t, "temperatures") for t in _check.sequence(temperatures, "temperatures")]
    cap = 0.0 if softcap is None else _check.positive(softcap, "softcap")
    scale = _check.positive(logit_scale, "logit_scale")

    rows = logits.detach().reshape(-1, size)
    rows = rows if rows.stride(1) == 1 or size == 1 else rows.contiguous()
    shape, n = logits.shape[:-1], rows.shape[0]
    tempered = _check.numbers(values, "temperatures", logits.device).float()
    if rows.dtype == torch.float64:  # nobody's teacher: no kernel is made for it
        return _shaped(reference.teacher_topk(rows, k, tempered, cap, scale), shape)
    ids = torch.empty(n, k, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(n, k, device=logits.device)
    log_z, tail = (torch.empty(n, len(values), device=logits.device) for _ in range(2))
    ops.teacher_topk.default(rows, tempered, ids, logprobs, log_z, tail, cap, scale)
    return _shaped(TeacherTopK(ids, logprobs, log_z, tail), shape)


def _shaped(result: TeacherTopK, shape: torch.Size) -> TeacherTopK:
    return TeacherTopK(*(t.reshape(*shape, t.shape[1]) for t in result))
