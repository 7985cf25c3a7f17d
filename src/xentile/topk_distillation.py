"""`topk_distillation_loss`: a student's logits against a teacher's top K."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from xentile import _check, _check_distillation, _layout
from xentile._distillation import SupportOptions, canonical

if TYPE_CHECKING:
    from torch import Tensor

    from xentile.distillation_output import DistillationOutput
    from xentile.sketch import LossSketch


def topk_distillation_loss(
    student_logits: Tensor,
    teacher_topk_ids: Tensor,
    teacher_topk_logprobs: Tensor,
    target: Tensor | None = None,
    *,
    support: str,
    divergence: str = "forward_kl",
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    teacher_log_z: Tensor | None = None,
    teacher_tail_logprob: Tensor | None = None,
    temperature_fallback: str | None = None,
    duplicate_ids: str = "sum",
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
    r"""Divergence of a student from what a teacher's top K says, and the cross-entropy beside it, in one pass.

    With q the student's probabilities over the whole vocabulary and p the teacher's, both at temperature T, S the K
    columns, P and Q the masses on them, a token with weight u costs

    .. math::
        \ell = u\,[w_{kd} T^2\, D(p \,\|\, q) + w_{ce}\, \mathrm{CE}]

    Five losses go by the name of top-K distillation, so `support` has no default. Terms of D are summed over

    ======================  ===================================  ============================================
    support                 classes                              the forward KL then is
    ======================  ===================================  ============================================
    truncated               S, p and q as they are               sum_S p log(p / q); may be negative
    teacher_renormalized    S, p / P and q as it is              P^-1 sum_S p log(p / (P q)): pushes q into S
    renormalized            S, p / P and q / Q                   blind to how much is outside S
    tail_bucket             S, and all the rest as one class     a lower bound of the dense KL
    sampled                 S, weights that need not sum to 1    -sum_S w log q (sparse logit sampling)
    ======================  ===================================  ============================================

    and `divergence` is one of

    ===================  ==========================================  ====================
    divergence           D                                           beta
    ===================  ==========================================  ====================
    forward_kl           KL(p || q)
    reverse_kl           KL(q || p)
    jsd                  beta KL(p || m) + (1 - beta) KL(q || m)     0.5; m = beta p + (1 - beta) q
    skew_forward_kl      KL(p || m)                                  0.1; m = beta p + (1 - beta) q
    skew_reverse_kl      KL(q || m)                                  0.1; m = (1 - beta) p + beta q
    tv                   sum |p - q| / 2
    ===================  ==========================================  ====================

    The gradient is exact for each (docs/distillation.md has the formulas and their sources).

    Args:
        student_logits: (..., V), float32, bfloat16, float16 or float64. Arithmetic is float32 (float64 for float64,
            through plain PyTorch).
        teacher_topk_ids: (..., K), int64 or int32, 1 <= K <= 1024, in any order. Negative ids are absent entries, so
            rows may have different numbers of them. Ids from V on are columns that the student lacks: their mass counts
            as tail.
        teacher_topk_logprobs: (..., K), floating point: log-probabilities at temperature 1 in nats, -inf where absent;
            for 'sampled' log(count / draws).
        target: (...), class indices for the cross-entropy. Where it is `ignore_index` the token is left out of
            everything.
        support: see above.
        divergence: see above.
        beta: see above; strictly between 0 and 1.
        temperature: T > 0, a number or a value a token (...). The cross-entropy is always at temperature 1.
        teacher_log_z: (...), log Z(T) of `teacher_topk` for this temperature: with it the tempered teacher is exact.
            'truncated' and 'tail_bucket' at T != 1 need it, or a `temperature_fallback`.
        teacher_tail_logprob: (...), log of the teacher's mass outside the K entries at this temperature, for
            'tail_bucket'. Without it 1 - P is taken, which has few digits where the teacher is sure.
        temperature_fallback: what to take for log Z(T) where it was not stored: 'renormalize' (no tail) or
            'uniform_tail' (the tail spread evenly over the other ids; teacher_tail_logprob is then at temperature 1).
        duplicate_ids: equal ids in a row: masses add ('sum'), the 'first' counts, or 'refuse': an error on a CPU or
            with `check`, NaN for the token elsewhere.
        scale_by_temperature_squared: keep T^2, which makes gradients comparable between temperatures (arXiv 1503.02531,
            section 2). Loss and gradient alike.
        kd_weight: at least 0.
        ce_weight: at least 0. With 0 the cross-entropy is only reported.
        ignore_index: as in `cross_entropy`.
        reduction: 'none', 'mean' or 'sum' over tokens, never over entries.
        softcap: as in `cross_entropy`; of the student.
        logit_scale: as in `cross_entropy`; of the student.
        token_weight: u, (...).
        normalizer: as in `cross_entropy`, what 'mean' divides by.
        all_ignored: as in `cross_entropy`, what a mean over no token is.
        group_ids: (...), the rows of the sketches that count a token.
        sketch: a LossSketch to count the cross-entropies in, in the same launch.
        kd_sketch: a LossSketch to count the divergences in, in the same launch.
        inplace: write the gradient over the student's logits, which have to be contiguous.
        check: raise for values out of range on any device, which waits for it.

    Returns:
        DistillationOutput, see there. Only `loss` carries a gradient, to the student's logits.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: naming the argument. Nothing is counted.

    Example:
        >>> teacher = teacher_topk(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), k=2)
        >>> known = {"support": "tail_bucket", "teacher_tail_logprob": teacher.tail_logprob[:, 0]}
        >>> student = torch.zeros(1, 4, requires_grad=True)
        >>> out = topk_distillation_loss(student, teacher.ids, teacher.logprobs, **known)
        >>> out.loss.backward()
        >>> out.teacher_mass, out.student_mass
        (tensor([0.8808]), tensor([0.5000]))
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
    _check.one_of(support, "support", _layout.SUPPORTS)
    _check.one_of(duplicate_ids, "duplicate_ids", _layout.DUPLICATES)
    if support == "sampled" and divergence != "forward_kl":
        raise ValueError(
            f"support 'sampled' estimates the forward KL: divergence must be 'forward_kl', got {divergence!r}"
        )
    if temperature_fallback is not None:
        _check.one_of(temperature_fallback, "temperature_fallback", _layout.FALLBACKS[1:])
    _check_distillation.topk(call, teacher_topk_ids, teacher_topk_logprobs, teacher_log_z, teacher_tail_logprob)
    needs_log_z = support in ("truncated", "tail_bucket") and call.tempered
    if needs_log_z and teacher_log_z is None and temperature_fallback is None:
        raise ValueError(
            f"teacher_log_z must be given for support {support!r} at a temperature other than 1: log Z(T) of "
            "teacher_topk, or temperature_fallback='renormalize' or 'uniform_tail'"
        )
    call.check_values(wait=check)
    size = student_logits.shape[-1]
    k = teacher_topk_ids.shape[-1]
    ids = teacher_topk_ids.reshape(-1, k).contiguous()
    if duplicate_ids == "refuse":
        _check_distillation.no_duplicates(ids, teacher_topk_logprobs, wait=check)
    exact = torch.float64 if call.dtype == torch.float64 else torch.float32
    logprobs = teacher_topk_logprobs.reshape(-1, k)
    logprobs = logprobs.to(exact) if torch.float64 in (exact, logprobs.dtype) else logprobs
    codes = SupportOptions(
        num_classes=size,
        support=_layout.SUPPORTS.index(support),
        duplicates=_layout.DUPLICATES.index(duplicate_ids),
        fallback=_layout.FALLBACKS.index(temperature_fallback or "none"),
        temperature=call.temperature,
    )
    known = (call.vector(teacher_log_z), call.vector(teacher_tail_logprob), call.token_temperature)
    teacher = canonical(ids, logprobs.contiguous(), *known, codes)
    return call.run(teacher.ids, teacher.logprobs, teacher.tail, support=codes.support, teacher_mass=teacher.mass)
