"""What the two distillation losses have in common: checked arguments, flattened to the operators' form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xentile import _check, _layout
from xentile._distillation import DENSE, Inputs, Options, run
from xentile.cross_entropy import indices, scalar
from xentile.distillation_output import DistillationOutput
from xentile.sketch import LossSketch

BETAS = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}
"""Divergences with a parameter, and its default: the symmetric one, and that of DistiLLM (arXiv 2402.03898)."""

LARGEST_K = 1024


@dataclass
class Call:
    """The arguments of a call, without its teacher."""

    logits: Tensor
    target: Tensor | None
    options: Options  # without the support
    token_weight: Tensor | None
    normalizer: Tensor | float | None
    token_temperature: Tensor | None
    group_ids: Tensor | None
    sketch: LossSketch | None
    kd_sketch: LossSketch | None
    inplace: bool

    @staticmethod
    def of(
        logits: Any,
        target: Any,
        *,
        divergence: str,
        beta: float | None,
        temperature: float | Tensor,
        scale_by_temperature_squared: bool,
        kd_weight: float,
        ce_weight: float,
        ignore_index: int,
        reduction: str,
        softcap: float | None,
        logit_scale: float,
        token_weight: Tensor | None,
        normalizer: Tensor | float | None,
        all_ignored: str,
        group_ids: Tensor | None,
        sketch: LossSketch | None,
        kd_sketch: LossSketch | None,
        inplace: bool,
    ) -> Call:
        """Check everything whose value can be known without waiting for the device."""
        _check.logits(logits, "student_logits")
        shape = tuple(logits.shape[:-1])
        _check.one_of(divergence, "divergence", _layout.DIVERGENCES)
        _check.one_of(reduction, "reduction", _layout.REDUCTIONS)
        _check.one_of(all_ignored, "all_ignored", ("nan", "zero"))
        _target(target, shape, ce_weight, sketch)
        _check.token_weight(token_weight, shape)
        _check.normalizer(normalizer, reduction, logits.device)
        state = _state(sketch, "sketch")
        kd_state = _state(kd_sketch, "kd_sketch")
        _check.group_ids(group_ids, shape, sketch if sketch is not None else kd_sketch)
        if isinstance(temperature, Tensor):
            _per_token(temperature, "temperature", shape)
        tensors = {"target": target, "token_weight": token_weight, "group_ids": group_ids}
        tensors["temperature"] = temperature if isinstance(temperature, Tensor) else None
        _check.same_device(logits, "student_logits", **tensors, sketch=state, kd_sketch=kd_state)
        _check.inplace(inplace, logits, name="student_logits", vocab_last=True)
        options = Options(
            ignore_index=_check.integer(ignore_index, "ignore_index"),
            reduction=_layout.REDUCTIONS.index(reduction),
            support=DENSE,
            divergence=_layout.DIVERGENCES.index(divergence),
            beta=_beta(beta, divergence),
            temperature=1.0 if isinstance(temperature, Tensor) else _check.positive(temperature, "temperature"),
            temperature_squared=bool(scale_by_temperature_squared),
            kd_weight=_check.at_least_zero(kd_weight, "kd_weight"),
            ce_weight=_check.at_least_zero(ce_weight, "ce_weight"),
            softcap=0.0 if softcap is None else _check.positive(softcap, "softcap"),
            logit_scale=_check.positive(logit_scale, "logit_scale"),
            zero_if_empty=all_ignored == "zero",
        )
        call = Call(logits, target, options, token_weight, normalizer, None, group_ids, sketch, kd_sketch, inplace)
        if isinstance(temperature, Tensor):
            call.token_temperature = call.vector(temperature)
        return call

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    @property
    def temperature(self) -> float:
        """The number; 1 where there is one for each token."""
        return self.options.temperature

    @property
    def tempered(self) -> bool:
        """Whether a temperature other than 1 can occur."""
        return self.token_temperature is not None or self.temperature != 1

    def rows(self, x: Tensor) -> Tensor:
        """(..., V) as (N, V) with stride 1 in the last dimension."""
        x = x.detach() if x is not self.logits else x
        flat = x.reshape(-1, x.shape[-1])
        return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()

    def vector(self, x: Tensor | None) -> Tensor | None:
        """A value a token, (N,), in the dtype of the arithmetic."""
        if x is None:
            return None
        return x.expand(self.logits.shape[:-1]).reshape(-1).to(self.dtype).contiguous()

    def check_values(self, *, wait: bool) -> None:
        """Values out of range: on a CPU, or where the caller accepts to wait for the device."""
        if self.token_temperature is not None:
            _check.all_positive(self.token_temperature, "temperature", wait=wait)
        if self.target is not None:
            _check.target_range(indices(self.target), self.logits.shape[-1], self.options.ignore_index, wait=wait)
        if self.group_ids is not None:
            for sketch in (self.sketch, self.kd_sketch):
                if sketch is not None:
                    _check.group_range(self.group_ids.reshape(-1).long(), sketch.groups, wait=wait)

    def run(
        self,
        teacher: Tensor,
        logprobs: Tensor | None,
        tail: Tensor | None,
        *,
        support: int,
        teacher_mass: Tensor | None,
    ) -> DistillationOutput:
        """Compute, and give per-token results the shape of the tokens."""
        shape = self.logits.shape[:-1]
        inputs = Inputs(
            logits=self.rows(self.logits),
            teacher=teacher,
            logprobs=logprobs,
            tail=tail,
            target=None if self.target is None else indices(self.target),
            token_weight=self.vector(self.token_weight),
            normalizer=scalar(self.normalizer, self.dtype, self.logits.device),
            token_temperature=self.token_temperature,
            group_ids=None if self.group_ids is None else self.group_ids.reshape(-1).long().contiguous(),
            state=None if self.sketch is None else self.sketch.state,
            kd_state=None if self.kd_sketch is None else self.kd_sketch.state,
        )
        loss, kd_loss, token_loss, mass = run(inputs, self.options._replace(support=support), inplace=self.inplace)
        return DistillationOutput(
            loss=loss.reshape(shape) if self.options.reduction == 0 else loss,
            kd_loss=kd_loss.reshape(shape),
            token_loss=None if self.target is None else token_loss.reshape(shape),
            teacher_mass=None if teacher_mass is None else teacher_mass.reshape(shape),
            student_mass=None if support == DENSE else mass.reshape(shape),
            counted=None if self.target is None else self.target != self.options.ignore_index,
        )


def topk(call: Call, ids: Any, logprobs: Any, log_z: Any, tail_logprob: Any) -> None:
    """The tensors of a sparse teacher."""
    shape = tuple(call.logits.shape[:-1])
    if _check.tensor(ids, "teacher_topk_ids").dtype not in (torch.int64, torch.int32):
        raise TypeError(f"teacher_topk_ids must be int64 or int32, got {_check.dtype_name(ids.dtype)}")
    if ids.dim() == 0 or tuple(ids.shape[:-1]) != shape or not 1 <= ids.shape[-1] <= LARGEST_K:
        raise ValueError(
            f"teacher_topk_ids must have shape (*{shape}, K) with K in [1, {LARGEST_K}], got {tuple(ids.shape)}"
        )
    if _check.tensor(logprobs, "teacher_topk_logprobs").shape != ids.shape:
        raise ValueError(
            f"teacher_topk_logprobs must have the shape of teacher_topk_ids, {tuple(ids.shape)}, "
            f"got {tuple(logprobs.shape)}"
        )
    _check.floating(logprobs, "teacher_topk_logprobs", TypeError)
    named = {"teacher_log_z": log_z, "teacher_tail_logprob": tail_logprob}
    for name, value in named.items():
        if value is not None:
            _per_token(value, name, shape)
    everything = {"teacher_topk_ids": ids, "teacher_topk_logprobs": logprobs, **named}
    _check.same_device(call.logits, "student_logits", **everything)
    _no_gradient(**everything)


def dense(call: Call, teacher_logits: Any) -> None:
    """The logits of a dense teacher."""
    _check.logits(teacher_logits, "teacher_logits")
    if teacher_logits.shape != call.logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits, {tuple(call.logits.shape)}, "
            f"got {tuple(teacher_logits.shape)}: cut the columns that only one of them has"
        )
    _check.same_device(call.logits, "student_logits", teacher_logits=teacher_logits)
    _no_gradient(teacher_logits=teacher_logits)


def no_duplicates(ids: Tensor, logprobs: Tensor, *, wait: bool) -> None:
    """ValueError for an id that a row has twice, where values can be read."""
    if _check.values_hidden() or not (wait or ids.device.type == "cpu"):
        return
    absent = (ids < 0) | (logprobs.reshape(ids.shape) == -torch.inf)
    different = torch.where(absent, -1, ids).sort(1).values
    again = ((different[:, 1:] == different[:, :-1]) & (different[:, 1:] >= 0)).nonzero()
    if len(again):
        row = int(again[0, 0])
        raise ValueError(
            f"teacher_topk_ids must be different within a token with duplicate_ids='refuse', got "
            f"{int(different[row, int(again[0, 1])])} twice at flat position {row}"
        )


def _target(target: Any, shape: tuple[int, ...], ce_weight: Any, sketch: Any) -> None:
    if target is None:
        if _check.number(ce_weight, "ce_weight") != 0:
            raise ValueError(f"ce_weight must be 0 without a target, got {ce_weight}")
        if sketch is not None:
            raise ValueError("sketch counts cross-entropies: it needs a target (kd_sketch counts divergences)")
        return
    if tuple(_check.tensor(target, "target").shape) != shape:
        raise ValueError(f"target must have the shape of student_logits without V, {shape}, got {tuple(target.shape)}")
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long, Int or Byte, but got {_check.dtype_name(target.dtype)}")


def _state(sketch: Any, name: str) -> Tensor | None:
    if sketch is None:
        return None
    _check.instance(sketch, name, LossSketch)
    _check.unweighted(sketch)
    state: Tensor = sketch.state
    return state


def _beta(beta: Any, divergence: str) -> float:
    if divergence not in BETAS:
        if beta is not None:
            raise ValueError(f"beta must be None for divergence {divergence!r}, got {beta}")
        return 0.5
    value = BETAS[divergence] if beta is None else _check.number(beta, "beta")
    if not 0 < value < 1:
        raise ValueError(
            f"beta must be between 0 and 1, both excluded, got {beta}: at the ends {divergence!r} is 0 or another one"
        )
    return value


def _per_token(value: Any, name: str, shape: tuple[int, ...]) -> None:
    if tuple(_check.tensor(value, name).shape) not in (shape, ()):
        raise ValueError(f"{name} must have one entry a token, {shape}, or be 0-d, got shape {tuple(value.shape)}")
    _check.floating(value, name, TypeError)


def _no_gradient(**tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} must not require a gradient, as none flows to the teacher: pass {name}.detach()")
