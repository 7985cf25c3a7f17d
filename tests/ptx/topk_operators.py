"""The top-K distillation operators as functions that allocate poisoned outputs, and what these must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xentile import _layout as layout
from xentile.reference import distillation as spec
from xentile.reference import distillation_kernels, transform
from xentile.reference.divergence import slopes

Implementation = Callable[..., None]


class Inputs(NamedTuple):
    """logits (N, V), a canonical support (N, K) with its tail (N,); the rest as in xentile/_schemas.py."""

    logits: Tensor
    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    target: Tensor | None = None
    token_weight: Tensor | None = None
    normalizer: Tensor | None = None
    token_temperature: Tensor | None = None
    group_ids: Tensor | None = None

    def double(self) -> Inputs:
        """In float64 throughout."""
        wide = {name: value.double() for name, value in self._asdict().items() if _is_float(value)}
        return self._replace(**wide)


def _is_float(value: Tensor | None) -> bool:
    return value is not None and value.is_floating_point()


class Options(NamedTuple):
    ignore_index: int = -100
    reduction: int = 1
    support: int = 0
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
    def of(cls, support: str = "truncated", divergence: str = "forward_kl", **others: Any) -> Options:
        """By names."""
        codes = layout.SUPPORTS.index(support), layout.DIVERGENCES.index(divergence)
        return cls(support=codes[0], divergence=codes[1], **others)

    def task(self, token_temperature: Tensor | None) -> spec.Task:
        """For the reference."""
        return spec.Task(
            layout.SUPPORTS[self.support],
            layout.DIVERGENCES[self.divergence],
            self.beta,
            self.temperature if token_temperature is None else token_temperature,
            *self[6:11],
            self.ignore_index,
        )


@dataclass
class Outputs:
    loss: Tensor
    denominator: Tensor
    kd_loss: Tensor
    token_loss: Tensor
    student_mass: Tensor
    rest: Tensor
    sketch: Tensor | None
    kd_sketch: Tensor | None
    dlogits: Tensor | None

    def items(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def forward(
    implementation: Implementation,
    inputs: Inputs,
    options: Options,
    *,
    gradient: bool = True,
    groups: int = 1,
    inplace: bool = False,
) -> Outputs:
    """Run `topk_distillation` into poisoned outputs. groups: rows of both sketches, none without it."""
    logits, rows = inputs.logits, inputs.logits.shape[0]
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def floats(*shape: int) -> Tensor:
        return torch.full(shape, -77.0, dtype=acc)

    def state() -> Tensor | None:
        return torch.zeros(groups, layout.DEFAULT.width, dtype=torch.int64) if groups else None

    outputs = Outputs(
        loss=floats(rows) if options.reduction == 0 else floats(),
        denominator=floats(),
        **{name: floats(rows) for name in ("kd_loss", "token_loss", "student_mass")},
        rest=floats(rows, 3),
        sketch=state() if inputs.target is not None else None,
        kd_sketch=state(),
        dlogits=logits if inplace else torch.full(logits.shape, -77.0, dtype=logits.dtype) if gradient else None,
    )
    implementation(*inputs, *(value for _, value in outputs.items()), *options)
    return outputs


def exact(inputs: Inputs, options: Options, *, gradient: bool = True) -> Outputs:
    """What `forward` must give, in float64."""
    return forward(distillation_kernels.topk_distillation, inputs.double(), options, gradient=gradient, groups=0)


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
    """Run `topk_distillation_backward` into a poisoned gradient, or `into` a tensor."""
    dlogits = torch.full(inputs.logits.shape, -77.0, dtype=inputs.logits.dtype) if into is None else into
    implementation(
        dloss,
        *inputs[:6],
        inputs.token_temperature,
        *(saved.denominator, saved.token_loss, saved.rest, dlogits),
        *options[:-1],
        filled,
    )
    return dlogits


# How far float32 arithmetic may be from float64, relative; and of an exponential also the rounding of its exponent.
RELATIVE = 1e-6
PER_EXPONENT = 2.0**-23
TANH = 2.0**-21


class Scales(NamedTuple):
    """What errors are relative to, in float64."""

    kd: Tensor  # (N,)
    gradient: Tensor  # (N, V)


def scales_of(inputs: Inputs, options: Options, wanted: Outputs) -> Scales:
    """Sizes of the terms that a divergence and its gradient add up, times what rounding log q by 1 would change.

    A term of a closed support is of second order in log(q / p); one of an open support is not.
    """
    inputs = inputs.double()
    task = options.task(inputs.token_temperature)
    _, live, t, x = spec._rows(inputs.logits, inputs.target, task)
    student = spec._student(x, inputs.ids, task)
    log_p, log_q, present, _ = spec._classes(inputs.logprobs, inputs.tail, student, task)
    p, q = (torch.where(present, log.exp(), 0.0) for log in (log_p, log_q))
    size = torch.maximum(p, q)
    digits = torch.where(present, 1 + PER_EXPONENT / RELATIVE * (log_p.abs() + log_q.abs()).clamp(max=1e3), 0.0)
    first_order = (log_q - log_p).abs().clamp(max=1) if task.closed else 1.0
    kd = (size * digits * first_order).sum(1)

    slope = torch.where(present, slopes(log_p, log_q, task.divergence, task.beta, task.closed), 0.0).abs()
    if task.divergence != "forward_kl":
        slope = slope + size
    each = slope * digits + q * (slope * digits).sum(1, keepdim=True)
    k = inputs.ids.shape[1]
    temperature = spec._per_row(task.temperature, x)
    y = student.z / temperature
    below = student.lse_tail[:, None] - y
    rest = (each[:, k:].sum(1) if each.shape[1] > k else 0.0) + student.outside.exp() * slope.sum(1)
    dense = rest[:, None] * torch.exp(-below) * (1 + below.abs().clamp(max=1e3) * PER_EXPONENT / RELATIVE)
    dense = torch.where(student.on_support, 0.0, dense).nan_to_num(0.0)
    columns = torch.where(inputs.ids < x.shape[1], inputs.ids, 0).long()
    scale = dense.scatter_add(1, columns, torch.where(inputs.ids < x.shape[1], each[:, :k], 0.0))
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


def require(name: str, actual: Tensor, wanted: Tensor, tolerance: Tensor | float) -> None:
    actual, wanted = actual.double(), wanted.double()
    error = (actual - wanted).abs()
    fine = (error <= tolerance) | (actual == wanted) | (actual.isnan() & wanted.isnan())
    if not bool(fine.all()):
        ratio = torch.where(fine, -1.0, (error / tolerance).nan_to_num(torch.inf))
        worst = int(ratio.flatten().argmax())
        where = [int(index) for index in torch.unravel_index(torch.tensor(worst), actual.shape)]
        got, should = actual.flatten()[worst].item(), wanted.flatten()[worst].item()
        times = ratio.flatten()[worst].item()
        raise AssertionError(
            f"{name}: {got!r} at {where} of {list(actual.shape)}, exactly {should!r}; {times:.3g} times the tolerance"
        )


def assert_exact(inputs: Inputs, options: Options, actual: Outputs) -> Outputs:
    """All outputs against float64: real numbers within rounding, integers equal, every element written."""
    wanted = exact(inputs, options, gradient=actual.dlogits is not None)
    scales = scales_of(inputs, options, wanted)
    z_error = TANH * options.softcap
    kd_tolerance = RELATIVE * (scales.kd + wanted.kd_loss.abs()) + z_error + 1e-37
    require("kd_loss", actual.kd_loss, wanted.kd_loss, kd_tolerance)
    below = (-wanted.token_loss.abs().clamp(1e-37).log() - 16).clamp(min=0)
    require(
        "token_loss",
        actual.token_loss,
        wanted.token_loss,
        (RELATIVE + PER_EXPONENT * below) * wanted.token_loss + z_error + 1e-37,
    )
    finite = ~wanted.kd_loss.isnan()
    mass = wanted.student_mass
    require(
        "student_mass",
        actual.student_mass[finite],
        mass[finite],
        (RELATIVE - PER_EXPONENT * mass.clamp(1e-37).log())[finite] * mass[finite] + z_error,
    )
    weight = torch.ones_like(kd_tolerance) if inputs.token_weight is None else inputs.token_weight.double()
    heat = options.temperature if inputs.token_temperature is None else inputs.token_temperature.double()
    loss = options.kd_weight * (heat**2 if options.temperature_squared else 1.0) * kd_tolerance
    loss = (loss + options.ce_weight * (RELATIVE * wanted.token_loss + z_error)) * weight
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
    """Within one rounding of the output, plus the error of float32 arithmetic. Not of rows without a loss."""
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
    tolerance = tolerance + relative * scales_of(inputs, options, wanted).gradient * factor.abs()
    defined = ~wanted.kd_loss.isnan() | (wanted.dlogits == 0).all(1)
    require("gradient", actual[defined], gradient[defined], tolerance[defined])
