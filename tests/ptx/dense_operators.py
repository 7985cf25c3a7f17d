"""The operators of distillation against a teacher's logits, as topk_operators.py has those of top-K distillation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xentile import _layout as layout
from xentile.reference import distillation as spec
from xentile.reference import distillation_kernels, transform
from xentile.reference.divergence import slopes

from .topk_operators import PER_EXPONENT, RELATIVE, TANH, Implementation, Scales, require


class Inputs(NamedTuple):
    """logits and teacher_logits (N, V); the rest as in the schemas of xentile/_schemas.py."""

    logits: Tensor
    teacher_logits: Tensor
    target: Tensor | None = None
    token_weight: Tensor | None = None
    normalizer: Tensor | None = None
    token_temperature: Tensor | None = None
    group_ids: Tensor | None = None

    def double(self) -> Inputs:
        """In float64 throughout."""
        return self._replace(
            **{name: x.double() for name, x in self._asdict().items() if x is not None and x.is_floating_point()}
        )


class Options(NamedTuple):
    ignore_index: int = -100
    reduction: int = 1
    divergence: int = 0
    beta: float = 0.25  # exact in float32, as are all numbers here: kernels take scalars in float32
    temperature: float = 1.0
    temperature_squared: bool = True
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    zero_if_empty: bool = False

    @classmethod
    def of(cls, divergence: str = "forward_kl", **others: Any) -> Options:
        """By name."""
        return cls(divergence=layout.DIVERGENCES.index(divergence), **others)

    def task(self, token_temperature: Tensor | None) -> spec.Task:
        """For the reference."""
        heat = self.temperature if token_temperature is None else token_temperature
        name = layout.DIVERGENCES[self.divergence]
        return spec.Task("dense", name, self.beta, heat, *self[5:10], self.ignore_index)


@dataclass
class Outputs:
    loss: Tensor
    denominator: Tensor
    kd_loss: Tensor
    token_loss: Tensor
    rows: Tensor
    sketch: Tensor | None
    kd_sketch: Tensor | None
    dlogits: Tensor | None

    def values(self) -> list[Tensor | None]:
        """In the order of the schema."""
        return [getattr(self, field.name) for field in fields(self)]


def forward(
    implementation: Implementation,
    inputs: Inputs,
    options: Options,
    *,
    gradient: bool = True,
    groups: int = 1,
    inplace: bool = False,
) -> Outputs:
    """Run `distillation` into poisoned outputs. groups: rows of both sketches, none without it."""
    logits, rows = inputs.logits, inputs.logits.shape[0]
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def floats(*shape: int) -> Tensor:
        return torch.full(shape, -77.0, dtype=acc)

    def state() -> Tensor | None:
        return torch.zeros(groups, layout.DEFAULT.width, dtype=torch.int64) if groups else None

    outputs = Outputs(
        loss=floats(rows) if options.reduction == 0 else floats(),
        denominator=floats(),
        kd_loss=floats(rows),
        token_loss=floats(rows),
        rows=floats(rows, 6),
        sketch=state() if inputs.target is not None else None,
        kd_sketch=state(),
        dlogits=logits if inplace else torch.full(logits.shape, -77.0, dtype=logits.dtype) if gradient else None,
    )
    implementation(*inputs, *outputs.values(), *options)
    return outputs


def exact(inputs: Inputs, options: Options, *, gradient: bool = True) -> Outputs:
    """What `forward` must give, in float64."""
    return forward(distillation_kernels.distillation, inputs.double(), options, gradient=gradient, groups=0)


def backward(
    implementation: Implementation,
    dloss: Tensor,
    inputs: Inputs,
    saved: Outputs,
    options: Options,
    *,
    into: Tensor | None = None,
    filled: bool = False,
) -> Tensor:
    """Run `distillation_backward` into a poisoned gradient, or `into` a tensor."""
    dlogits = torch.full(inputs.logits.shape, -77.0, dtype=inputs.logits.dtype) if into is None else into
    implementation(
        dloss,
        *inputs[:4],
        inputs.token_temperature,
        *(saved.denominator, saved.token_loss, saved.rows, dlogits),
        *options[:-1],
        filled,
    )
    return dlogits


def scales_of(inputs: Inputs, options: Options, wanted: Outputs) -> Scales:
    """Sizes of the terms that a divergence and its gradient add up, times what rounding log p and log q would change.

    A term of the divergence is of second order in log(q / p), so its error is of first order. That of tv is |p - q|.
    """
    inputs = inputs.double()
    task = options.task(inputs.token_temperature)
    valid, live, t, x = spec._rows(inputs.logits, inputs.target, task)
    student = spec._dense_student(x, task)
    log_p, log_q, present = spec._compared(spec._teacher_logprobs(inputs.teacher_logits, valid, task), student.classes)
    p, q = (torch.where(present, log.exp(), 0.0) for log in (log_p, log_q))
    size = torch.maximum(p, q)
    digits = torch.where(present, 1 + PER_EXPONENT / RELATIVE * (log_p.abs() + log_q.abs()).clamp(max=1e3), 0.0)
    first_order = 1.0 if task.divergence == "tv" else (log_q - log_p).abs().clamp(max=1)
    kd = (size * digits * first_order).sum(1)
    slope = torch.where(present, slopes(log_p, log_q, task.divergence, task.beta, True), 0.0).abs()
    if task.divergence != "forward_kl":
        slope = slope + size
    temperature = spec._per_row(task.temperature, x)
    scale = slope * digits + q * digits * (slope * digits).sum(1, keepdim=True)
    scale = task.kd_weight * scale * (temperature if task.temperature_squared else 1 / temperature)
    if task.ce_weight and inputs.target is not None:
        p_z = torch.softmax(student.z, 1)
        scale = scale + task.ce_weight * p_z * (1 - PER_EXPONENT / RELATIVE * p_z.clamp(1e-200).log())
        at_t = torch.arange(x.shape[1]) == t[:, None]
        scale = scale + at_t * task.ce_weight * (1 - p_z)
    scale = scale * task.logit_scale / wanted.denominator
    if inputs.token_weight is not None:
        scale = scale * inputs.token_weight[:, None]
    return Scales(torch.where(live, kd, 0.0), torch.where(live[:, None], scale, 0.0))


def assert_exact(inputs: Inputs, options: Options, actual: Outputs) -> Outputs:
    """All outputs against float64: real numbers within rounding, integers equal, every element written."""
    wanted = exact(inputs, options, gradient=actual.dlogits is not None)
    scales = scales_of(inputs, options, wanted)
    z_error = TANH * options.softcap
    kd_tolerance = (RELATIVE * (scales.kd + wanted.kd_loss.abs())).nan_to_num(0.0) + z_error + 1e-37
    require("kd_loss", actual.kd_loss, wanted.kd_loss, kd_tolerance)
    below = (-wanted.token_loss.abs().clamp(1e-37).log() - 16).clamp(min=0)
    ce_tolerance = (RELATIVE + PER_EXPONENT * below) * wanted.token_loss + z_error + 1e-37
    require("token_loss", actual.token_loss, wanted.token_loss, ce_tolerance)
    weight = torch.ones_like(kd_tolerance) if inputs.token_weight is None else inputs.token_weight.double()
    heat = options.temperature if inputs.token_temperature is None else inputs.token_temperature.double()
    loss = options.kd_weight * (heat**2 if options.temperature_squared else 1.0) * kd_tolerance
    loss = (loss + options.ce_weight * ce_tolerance) * weight
    total = loss if options.reduction == 0 else loss.nan_to_num(0.0).sum() / wanted.denominator
    require("loss", actual.loss, wanted.loss, total + RELATIVE * wanted.loss.abs())
    require("denominator", actual.denominator, wanted.denominator, RELATIVE * wanted.denominator)
    assert_counted(inputs, options, actual)
    if actual.dlogits is not None:
        assert_gradient(inputs, options, actual.dlogits, wanted)
    return wanted


def assert_counted(inputs: Inputs, options: Options, actual: Outputs) -> None:
    """Both sketches hold the integers that these per-token losses make."""
    terms = spec.DistillationTerms(actual.loss, actual.denominator, actual.kd_loss, actual.token_loss, actual.kd_loss)
    wanted = [None if state is None else torch.zeros_like(state) for state in (actual.sketch, actual.kd_sketch)]
    size = inputs.logits.shape[1]
    distillation_kernels.count(terms, inputs.target, inputs.group_ids, *wanted, options.ignore_index, size)
    for name, state, should in zip(("sketch", "kd_sketch"), (actual.sketch, actual.kd_sketch), wanted, strict=True):
        if state is not None and should is not None:
            differing = (state != should).nonzero().tolist()
            assert not differing, f"{name}: columns {differing}"


def assert_gradient(
    inputs: Inputs, options: Options, actual: Tensor, wanted: Outputs, dloss: Tensor | float = 1.0
) -> None:
    """Within one rounding of the output, plus the error of float32 arithmetic, in the rows that have a gradient."""
    assert wanted.dlogits is not None
    factor = torch.as_tensor(dloss, dtype=torch.float64)
    factor = factor[:, None] if factor.dim() else factor
    gradient = wanted.dlogits * factor
    kind = torch.finfo(actual.dtype)
    tolerance = gradient.abs() * kind.eps + kind.smallest_normal * kind.eps + 2.0**-120
    relative = 2 * RELATIVE
    if options.softcap:
        z = transform(inputs.logits.double(), options.logit_scale, options.softcap)
        relative = relative + TANH * (options.softcap + 1 / (1 - (z / options.softcap) ** 2).clamp(min=2.0**-20))
    tolerance = tolerance + relative * scales_of(inputs, options, wanted).gradient.nan_to_num(0.0) * factor.abs()
    defined = wanted.kd_loss.isfinite() | (wanted.dlogits == 0).all(1)
    require("gradient", actual[defined], gradient[defined], tolerance[defined])


def random_inputs(
    rows: int,
    size: int,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    *,
    seed: int = 0,
    scale: float = 3.0,
    target: bool = True,
) -> Inputs:
    """A teacher that knows something of the student: half of its logits are noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=generator) * scale
    teacher = (logits + scale * torch.randn(rows, size, generator=generator)) / 2
    drawn = torch.randint(0, size, (rows,), generator=generator)
    return Inputs(logits.to(dtype), teacher.to(teacher_dtype or dtype), drawn if target else None)


def weighted(inputs: Inputs, groups: int) -> Inputs:
    """With weights and temperatures of tokens, and groups of which one token's does not exist."""
    rows = inputs.logits.shape[0]
    generator = torch.Generator().manual_seed(1)
    group_ids = torch.randint(0, groups, (rows,), generator=generator)
    group_ids[rows // 2] = groups
    return inputs._replace(
        token_weight=torch.rand(rows, generator=generator) + 0.5,
        token_temperature=torch.tensor([1.0, 2.0, 0.75, 4.0]).repeat(rows)[:rows],
        group_ids=group_ids,
    )


def awkward_inputs(size: int, dtype: torch.dtype = torch.float32, ignore_index: int = -100) -> Inputs:
    """One row of each kind."""
    inputs = random_inputs(17, size, dtype, seed=2)
    x, teacher, target = inputs[:3]
    assert target is not None
    last = size - 1
    x[0], teacher[0], target[0] = torch.nan, torch.nan, ignore_index  # never read
    target[1], target[2] = size, -5  # out of range
    x[3, last // 2], x[4, 0], x[5] = torch.nan, torch.inf, -torch.inf
    teacher[6, last], teacher[7, last // 2], teacher[8] = torch.nan, torch.inf, -torch.inf
    teacher[9, : size // 3] = -torch.inf  # nothing of it in whole tiles
    x[10, : size // 3] = -torch.inf  # an infinite divergence, if the teacher has something there
    x[11, size // 2 :] = teacher[11, size // 2 :] = -torch.inf  # neither has anything there
    target[11] = 0
    x[12, last] = teacher[12, last] = 40.0  # saturated on the same column
    target[12] = last
    x[13, 0] = teacher[13, last] = 40.0  # and on different ones
    x[14] = teacher[14] = 2.5  # ties
    x[15] = teacher[15]  # no divergence
    x[16, 0] = x[16, last] = 60.0  # two maxima, of which the target is one
    target[16] = last
    return inputs
