"""Distillation: xentile, plain PyTorch, torch.compile of it, and Liger-Kernel. One small function each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import expressions
from benchmarks.provider import Provider, Unavailable, gpu_package, package

if TYPE_CHECKING:
    from benchmarks.cases import Case
    from benchmarks.step import Loss

TOPK, DENSE, TEACHER = ("topk_distillation",), ("distillation",), ("teacher_topk",)


def _topk(case: Case, *, inplace: bool) -> Loss:
    xentile = package("xentile")
    options: dict[str, Any] = {"support": case.support, "temperature": case.temperature, "ce_weight": case.ce_weight}

    def loss(logits: Tensor, target: Tensor, ids: Tensor, logprobs: Tensor, log_z: Tensor, tail: Tensor) -> Tensor:
        out = xentile.topk_distillation_loss(
            logits,
            ids,
            logprobs,
            target if case.ce_weight else None,
            teacher_log_z=log_z if case.temperature != 1 else None,
            teacher_tail_logprob=tail if case.support == "tail_bucket" else None,
            inplace=inplace,
            **options,
        )
        result: Tensor = out.loss
        return result

    return loss


def _xentile_topk(case: Case, device: str) -> Loss:
    return _topk(case, inplace=False)


def _xentile_topk_inplace(case: Case, device: str) -> Loss:
    return _topk(case, inplace=True)


def _xentile_cross_entropy(case: Case, device: str) -> Loss:
    xentile = package("xentile")
    return lambda logits, target, *_: xentile.cross_entropy(logits, target).loss


def _xentile_cross_entropy_inplace(case: Case, device: str) -> Loss:
    xentile = package("xentile")
    return lambda logits, target, *_: xentile.cross_entropy(logits, target, inplace=True).loss


def _xentile_dense(case: Case, device: str) -> Loss:
    xentile = package("xentile")
    return lambda logits, teacher_logits: xentile.distillation_loss(logits, teacher_logits).loss


def _xentile_dense_inplace(case: Case, device: str) -> Loss:
    xentile = package("xentile")
    return lambda logits, teacher_logits: xentile.distillation_loss(logits, teacher_logits, inplace=True).loss


def _xentile_teacher(case: Case, device: str) -> Loss:
    xentile = package("xentile")

    def select(logits: Tensor) -> tuple[Tensor, Tensor]:
        teacher = xentile.teacher_topk(logits, case.k)
        return teacher.logprobs, teacher.ids

    return select


def _eager(case: Case, device: str) -> Loss:
    return expressions.plain(case)


def _compile(case: Case, device: str) -> Loss:
    # Shapes are compiled as constants, the best torch.compile can do; reset, so that no case inherits another's guards.
    torch.compiler.reset()
    compiled: Loss = torch.compile(expressions.mean(case), dynamic=False)
    return compiled


def _no_topk_loss(case: Case, device: str) -> Loss:
    raise Unavailable("it has no loss against a teacher's top K")


def _liger_kl_div(case: Case, device: str) -> Loss:
    loss = gpu_package("liger_kernel.transformers", device).LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return _of_log_probabilities(loss)


def _liger_jsd(case: Case, device: str) -> Loss:
    loss = gpu_package("liger_kernel.transformers", device).LigerJSD(beta=0.0)  # its forward KL
    return _of_log_probabilities(loss)


def _of_log_probabilities(loss: Loss) -> Loss:
    """Both of Liger's take log-probabilities: the log_softmax before it is PyTorch's."""
    return lambda logits, teacher_logits: loss(logits.log_softmax(-1), teacher_logits.log_softmax(-1))


PROVIDERS: tuple[Provider, ...] = (
    Provider("xentile", _xentile_topk, ours=True, operations=TOPK),
    Provider("xentile+inplace", _xentile_topk_inplace, ours=True, overwrites_logits=True, operations=TOPK),
    Provider("xentile.cross_entropy", _xentile_cross_entropy, ours=True, operations=TOPK, yardstick="training"),
    Provider(
        "xentile.cross_entropy+inplace",
        _xentile_cross_entropy_inplace,
        ours=True,
        overwrites_logits=True,
        operations=TOPK,
        yardstick="training",
    ),
    Provider("torch.eager", _eager, operations=TOPK),
    Provider("torch.compile", _compile, operations=TOPK),
    Provider("liger", _no_topk_loss, operations=TOPK),
    Provider("xentile", _xentile_dense, ours=True, operations=DENSE),
    Provider("xentile+inplace", _xentile_dense_inplace, ours=True, overwrites_logits=True, operations=DENSE),
    Provider("torch.eager", _eager, operations=DENSE),
    Provider("torch.compile", _compile, operations=DENSE),
    Provider("liger.kl_div", _liger_kl_div, operations=DENSE),
    Provider("liger.jsd", _liger_jsd, operations=DENSE),
    Provider("xentile", _xentile_teacher, ours=True, operations=TEACHER),
    Provider("torch.eager", _eager, operations=TEACHER),
)
