"""`distillation_loss`: a student's logits against all logits of a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xentile import _check_distillation
from xentile._distillation import DENSE

if TYPE_CHECKING:
    from torch import Tensor

    from xentile.distillation_output import DistillationOutput
    from xentile.sketch import LossSketch


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    *,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    scale_by_temperature_squared: bool = True,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    all_ignored: str = "nan",
    group_ids: Tensor | None = None,
    sketch: LossSketch | None = None,
    kd_sketch: LossSketch | None = None,
    inplace: bool = False,
    check: bool = False,
) -> DistillationOutput:
    r"""Divergence of a student from a teacher over the whole vocabulary, and the cross-entropy beside it, in one pass.

    Both logits are streamed: neither a softmax nor a log-softmax of either is ever in memory, only the gradient. A
    token with weight u costs u [kd_weight T^2 D(p || q) + ce_weight CE], p and q the teacher's and the student's
    probabilities at temperature T. Every divergence is summed from terms that are at least 0: none is negative.

    Args:
        student_logits: (..., V), float32, bfloat16, float16 or float64.
        teacher_logits: (..., V), any of these dtypes. No gradient flows to it. Its own softcap or scale has to be
            applied before; logits of padding columns, that the student lacks, have to be cut off or set to -inf.
        target: (...), as in `topk_distillation_loss`.
        divergence: as there.
        beta: as there.
        temperature: as there.
        scale_by_temperature_squared: as there.
        kd_weight: as there.
        ce_weight: as there.
        ignore_index: as there.
        reduction: as there.
        softcap: as there.
        logit_scale: as there.
        token_weight: as there.
        normalizer: as there.
        all_ignored: as there.
        group_ids: as there.
        sketch: as there.
        kd_sketch: as there.
        inplace: as there.
        check: as there.

    Returns:
        DistillationOutput, see there. Only `loss` carries a gradient, to the student's logits.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: naming the argument. Nothing is counted.

    Example:
        >>> student = torch.zeros(1, 4, requires_grad=True)
        >>> out = distillation_loss(student, torch.tensor([[2.0, 1.0, 0.0, -1.0]]), temperature=2.0)
        >>> out.loss.backward()
        >>> out.kd_loss
        tensor([0.1412])
    """
    call = _check_distillation.Call.of(
        student_logits,
        target,
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        softcap=softcap,
        logit_scale=logit_scale,
        token_weight=token_weight,
        normalizer=normalizer,
        all_ignored=all_ignored,
        group_ids=group_ids,
        sketch=sketch,
        kd_sketch=kd_sketch,
        inplace=inplace,
    )
    _check_distillation.dense(call, teacher_logits)
    call.check_values(wait=check)
    return call.run(call.rows(teacher_logits), None, None, support=DENSE, teacher_mass=None)
