"""The operators as functions that allocate poisoned outputs for an implementation to fill, and what these must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xentile import _layout as layout
from xentile import reference
from xentile.reference import kernels

POISON = -77  # of integer outputs; floats are NaN

Implementation = Callable[..., None]


class Inputs(NamedTuple):
    """logits (N, V), target (N,); the rest as in the schemas of xentile/_schemas.py."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None = None
    token_weight: Tensor | None = None
    normalizer: Tensor | None = None
    group_ids: Tensor | None = None

    def double(self) -> Inputs:
        return self._replace(
            logits=self.logits.double(),
            **{n: t.double() for n in ("weight", "token_weight", "normalizer") if (t := getattr(self, n)) is not None},
        )


class Options(NamedTuple):
    ignore_index: int = -100
    reduction: int = 1
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    zero_if_empty: bool = False


PLAIN = Options()


def steep_inputs(size: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Rows of logits so large that float32 has no digits for their distances. `size` is 40 or more."""
    rows = []
    for large in (1.2e9, 3e9, 1e20, 3e38):
        one, tied, below, equal, masked = torch.randn(5, size, dtype=torch.float64).unbind()
        one[3] = large  # the target
        tied[[3, 9, size - 1]] = large
        below[size // 2] = large
        equal[:] = -large
        masked[8:40] = -large  # whole groups, and whole tiles of small ones
        rows += [one, tied, below, equal, masked]
    logits = torch.stack(rows).to(dtype)
    return Inputs(logits, torch.full((len(rows),), 3))


@dataclass
class Outputs:
    loss: Tensor
    denominator: Tensor
    token_loss: Tensor
    lse: Tensor
    row_max: Tensor
    sum_exp: Tensor
    predicted: Tensor
    correct: Tensor
    entropy: Tensor | None
    target_rank: Tensor | None
    sketch: Tensor | None
    dlogits: Tensor | None

    def items(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def forward(
    implementation: Implementation,
    inputs: Inputs,
    options: Options = PLAIN,
    *,
    statistics: bool = True,
    gradient: bool = True,
    groups: int = 1,
    inplace: bool = False,
) -> Outputs:
    """Run `cross_entropy` into poisoned outputs. groups: rows of the sketch, none without it."""
    logits, rows = inputs.logits, inputs.logits.shape[0]
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def floats(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=acc)

    outputs = Outputs(
        loss=floats(rows) if options.reduction == 0 else floats(),
        denominator=floats(),
        **{name: floats(rows) for name in ("token_loss", "lse", "row_max", "sum_exp")},
        predicted=torch.full((rows,), POISON),
        correct=torch.full((rows,), 99, dtype=torch.uint8).view(torch.bool),
        entropy=floats(rows) if statistics else None,
        target_rank=torch.full((rows,), POISON) if statistics else None,
        sketch=torch.zeros(groups, layout.DEFAULT.width, dtype=torch.int64) if groups else None,
        dlogits=logits if inplace else torch.full(logits.shape, torch.nan, dtype=logits.dtype) if gradient else None,
    )
    implementation(*inputs, *(value for _, value in outputs.items()), *options)
    return outputs


def exact(inputs: Inputs, options: Options = PLAIN, *, gradient: bool = True) -> Outputs:
    """What `forward` must give, in float64."""
    return forward(kernels.cross_entropy, inputs.double(), options, gradient=gradient, groups=0)


def backward(
    implementation: Implementation,
    dloss: Tensor,
    inputs: Inputs,
    saved: Outputs,
    options: Options = PLAIN,
    *,
    filled: Tensor | None = None,
) -> Tensor:
    """Run `cross_entropy_backward` into a poisoned gradient, or over one for an upstream gradient of 1."""
    poison = torch.full(inputs.logits.shape, torch.nan, dtype=inputs.logits.dtype)
    dlogits = poison if filled is None else filled
    implementation(
        dloss,
        *inputs[:4],
        *(saved.denominator, saved.token_loss, saved.row_max, saved.sum_exp, dlogits),
        *options[:-1],
        filled is not None,
    )
    return dlogits


def counted(inputs: Inputs, token_loss: Tensor, predicted: Tensor, groups: int) -> Tensor:
    """The sketch that these token losses make."""
    sketch = torch.zeros(groups, layout.DEFAULT.width, dtype=torch.int64)
    terms = reference.Terms(*[token_loss] * len(reference.Terms._fields))
    kernels.count(sketch, terms._replace(predicted=predicted), inputs.group_ids)
    return sketch


# How far a float32 computation may be from float64. Relative: the hardware's exp2 (2^-22), and roundings of sums. Of
# an exponential also the rounding of its exponent, by the distance from the maximum. Of tanh: 2^-21, as CUDA's own.
RELATIVE = 1e-6
PER_EXPONENT = 2.0**-23
TANH = 2.0**-21


def far_below(value: Tensor) -> Tensor:
    """Of a loss of exp(-16) and less: how far below the maximum the logits are that make it."""
    return (-value.abs().clamp(1e-37).log() - 16).clamp(min=0)


def assert_close(name: str, actual: Tensor, wanted: Tensor, relative: float, absolute: float = 1e-37) -> None:
    """Equal within the tolerance; the same infinities and NaN."""
    wanted = wanted.double()
    tolerance = (relative + PER_EXPONENT * far_below(wanted)) * wanted.abs() + absolute
    _require(name, actual.double(), wanted, tolerance)


def assert_gradient(inputs: Inputs, options: Options, actual: Tensor, wanted: Outputs, scale: float = 1.0) -> None:
    """Within one rounding of the output, plus the error of float32 arithmetic, which smoothing may let cancel."""
    assert wanted.dlogits is not None
    z = reference.transform(inputs.logits.double(), options.logit_scale, options.softcap)
    below = (wanted.row_max[:, None] - z).nan_to_num(0.0, 0.0, 0.0).clamp(max=200)
    relative = RELATIVE + PER_EXPONENT * torch.maximum(below, far_below(wanted.token_loss)[:, None].nan_to_num(0.0))
    if options.softcap:
        relative = relative + TANH * (options.softcap + 1 / (1 - (z / options.softcap) ** 2).clamp(min=2.0**-20))
    smooth = options.label_smoothing / z.shape[1] / wanted.denominator.abs() * abs(scale)
    exact_gradient = wanted.dlogits.double() * scale
    kind = torch.finfo(actual.dtype)
    rounding = exact_gradient.abs() * kind.eps + kind.smallest_normal * kind.eps
    single = (
        relative * (exact_gradient.abs() + 2 * smooth) + 2.0**-125
    )  # exponentials below float32's normal range are 0
    _require("gradient", actual.double(), exact_gradient, single + rounding)


def _require(name: str, actual: Tensor, wanted: Tensor, tolerance: Tensor) -> None:
    error = (actual - wanted).abs()
    fine = (error <= tolerance) | (actual == wanted) | (actual.isnan() & wanted.isnan())
    if not bool(fine.all()):
        worst = int(torch.where(fine, -1.0, error.nan_to_num(torch.inf)).flatten().argmax())
        where = [int(index) for index in torch.unravel_index(torch.tensor(worst), actual.shape)]
        got, should = actual.flatten()[worst].item(), wanted.flatten()[worst].item()
        raise AssertionError(f"{name}: {got!r} at {where} of {list(actual.shape)}, exactly {should!r}")


def assert_exact(inputs: Inputs, options: Options, actual: Outputs, *, wanted: Outputs | None = None) -> Outputs:
    """All outputs against float64: real numbers within rounding, integers equal, every element written."""
    wanted = wanted or exact(inputs, options, gradient=actual.dlogits is not None)
    z_error = TANH * options.softcap
    for name in ("token_loss", "lse", "row_max", "sum_exp", "entropy", "loss", "denominator"):
        value = getattr(actual, name)
        if value is not None:
            absolute = 1e-6 if name in ("lse", "entropy") else 1e-37
            relative = RELATIVE + (z_error if name == "sum_exp" else 0)
            should = getattr(wanted, name)
            if name in ("row_max", "sum_exp"):  # of no use beside a loss of NaN
                value, should = (torch.where(wanted.token_loss.isnan(), 0.0, side) for side in (value, should))
            assert_close(name, value, should, relative, absolute + (name != "denominator") * z_error)
    finite = wanted.token_loss.isfinite() | (wanted.predicted < 0)  # a row of NaN has no maximum
    for name in ("predicted", "correct", "target_rank"):
        value = getattr(actual, name)
        if value is not None:
            got, should = value.long()[finite], getattr(wanted, name).long()[finite]
            assert torch.equal(got, should), f"{name}: {got.tolist()} instead of {should.tolist()}"
    if actual.sketch is not None:
        sketch = counted(inputs, actual.token_loss, wanted.predicted, len(actual.sketch))
        differing = (actual.sketch != sketch).nonzero().tolist()
        assert not differing, f"sketch: columns {differing} hold {actual.sketch[actual.sketch != sketch].tolist()}"
    if actual.dlogits is not None:
        assert_gradient(inputs, options, actual.dlogits, wanted)
    return wanted
