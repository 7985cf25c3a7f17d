"""Autograd over the distillation operators, and the choice between them and the differentiable reference.

One class serves both operators: a dense teacher's logits stand where a sparse one has ids, logprobs and tail.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xentile import _gradient, _layout
from xentile._autograd import recomputing, transformed
from xentile._ops import ops
from xentile.reference import distillation as spec
from xentile.reference.distillation_kernels import count
from xentile.reference.support import Support, topk_support

DENSE = -1
"""The code of no support: the teacher's logits are all there."""

Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""loss, kd_loss, token_loss, student_mass"""


class Inputs(NamedTuple):
    """Tensors, flattened: logits (N, V); vectors (N,) in the accumulation dtype."""

    logits: Tensor
    teacher: Tensor  # ids (N, K) of a Support, or logits (N, V)
    logprobs: Tensor | None  # (N, K), None if dense
    tail: Tensor | None  # (N,), None if dense
    target: Tensor | None
    token_weight: Tensor | None
    normalizer: Tensor | None
    token_temperature: Tensor | None
    group_ids: Tensor | None
    state: Tensor | None
    kd_state: Tensor | None


class Options(NamedTuple):
    """Scalars, in the order of the operators' schemas; the dense one has no support."""

    ignore_index: int
    reduction: int
    support: int
    divergence: int
    beta: float
    temperature: float
    temperature_squared: bool
    kd_weight: float
    ce_weight: float
    softcap: float
    logit_scale: float
    zero_if_empty: bool

    @property
    def of_operator(self) -> tuple[Any, ...]:
        """Without the last one, which only a forward takes."""
        options = self[:-1]
        return options if self.support != DENSE else (*options[:2], *options[3:])


class SupportOptions(NamedTuple):
    """Scalars of the operator topk_support."""

    num_classes: int
    support: int
    duplicates: int
    fallback: int
    temperature: float


def canonical(
    ids: Tensor,
    logprobs: Tensor,
    log_z: Tensor | None,
    tail_logprob: Tensor | None,
    token_temperature: Tensor | None,
    options: SupportOptions,
) -> Support:
    """`Support` of ids and logprobs (N, K)."""
    if logprobs.dtype == torch.float64 or transformed():
        return topk_support(
            ids,
            logprobs,
            log_z,
            tail_logprob,
            options.temperature if token_temperature is None else token_temperature,
            num_classes=options.num_classes,
            support=_layout.SUPPORTS[options.support],
            duplicates=_layout.DUPLICATES[options.duplicates],
            fallback=_layout.FALLBACKS[options.fallback],
        )
    sorted_ids = torch.empty_like(ids, dtype=torch.int32, memory_format=torch.contiguous_format)
    masses = torch.empty_like(ids, dtype=torch.float32, memory_format=torch.contiguous_format)
    tail, mass = (logprobs.new_empty(ids.shape[0], dtype=torch.float32) for _ in range(2))
    inputs = (ids, logprobs, log_z, tail_logprob, token_temperature)
    ops.topk_support.default(*inputs, sorted_ids, masses, tail, mass, *options)
    return Support(sorted_ids, masses, tail, mass)


def run(inputs: Inputs, options: Options, *, inplace: bool) -> Results:
    """The losses, of which the first one carries the gradient."""
    if recomputing():
        inputs = inputs._replace(state=None, kd_state=None)
    differentiable = any(t is not None and t.requires_grad for t in (inputs.token_weight, inputs.normalizer))
    double = torch.float64 in (inputs.logits.dtype, inputs.teacher.dtype)  # nobody trains in it
    if transformed() or differentiable or double:
        return _through_reference(inputs, options)
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and inputs.logits.requires_grad:
        # In compiled code the gradient is left to the backward, which could not scale a saved one in place.
        apply: Any = DistillationFunction.apply
        results: Results = apply(*inputs, *options, inplace and not compiling, not compiling)
        return results
    return _forward(inputs, options, None)[0]


def _forward(inputs: Inputs, options: Options, dlogits: Tensor | None) -> tuple[Results, tuple[Tensor, ...]]:
    """Allocate the outputs and launch: (results, what the backward needs of them)."""
    logits = inputs.logits
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if options.reduction == 0 else (), dtype=torch.float32)
    denominator = logits.new_empty((), dtype=torch.float32)
    kd_loss, token_loss, student_mass = (logits.new_empty(rows, dtype=torch.float32) for _ in range(3))
    after = (inputs.state, inputs.kd_state, dlogits, *options.of_operator, options.zero_if_empty)
    outputs = (loss, denominator, kd_loss, token_loss)
    if options.support == DENSE:
        saved = logits.new_empty(rows, 6, dtype=torch.float32)
        ops.distillation.default(logits, inputs.teacher, *inputs[4:9], *outputs, saved, *after)
    else:
        saved = logits.new_empty(rows, 3, dtype=torch.float32)
        ops.topk_distillation.default(*inputs[:9], *outputs, student_mass, saved, *after)
    return (loss, kd_loss, token_loss, student_mass), (denominator, token_loss, saved)


class DistillationFunction(torch.autograd.Function):
    """Either operator with its gradient; when that is written and handed out is said in _gradient.py."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        inputs, options = Inputs(*args[:11]), Options(*args[11:23])
        inplace, fused = args[23:]
        fused = fused and options.reduction != 0
        dlogits = _gradient.reserve(ctx, inputs.logits, fused=fused, inplace=inplace)
        results, rows = _forward(inputs, options, dlogits)
        saved = _gradient.launched(ctx, inputs.logits)
        ctx.options = options
        ctx.save_for_backward(saved, *inputs[1:8], *rows)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> Any:
        none = (None,) * 24
        if dloss is None:
            return (None, *none)
        if torch.is_grad_enabled():
            return (_differentiable_gradient(ctx, dloss), *none)
        logits, teacher, logprobs, tail, target, token_weight, _normalizer, temperature, *rows = ctx.saved_tensors
        options = ctx.options

        def fill(dlogits: Tensor, filled: bool) -> None:
            rest = (target, token_weight, temperature, *rows, dlogits, *options.of_operator, filled)
            if options.support == DENSE:
                ops.distillation_backward.default(dloss.contiguous(), logits, teacher, *rest)
            else:
                ops.topk_distillation_backward.default(dloss.contiguous(), logits, teacher, logprobs, tail, *rest)

        return (_gradient.hand_out(ctx, dloss, logits, fill), *none)


def _differentiable_gradient(ctx: Any, dloss: Tensor) -> Tensor:
    """create_graph=True: the gradient as a differentiable function of logits and dloss, through the reference."""
    _gradient.refuse_inplace(ctx)
    logits, teacher, logprobs, tail, target, token_weight, normalizer, temperature, *_ = ctx.saved_tensors
    weights = (token_weight, normalizer, temperature)
    inputs = Inputs(logits, teacher, logprobs, tail, target, *weights, None, None, None)
    loss = _terms(inputs, ctx.options).loss
    gradient: Tensor = torch.autograd.grad(loss, inputs.logits, dloss, create_graph=True)[0]
    return gradient


def _terms(inputs: Inputs, options: Options) -> spec.DistillationTerms:
    dense = options.support == DENSE
    task = spec.Task(
        support="dense" if dense else _layout.SUPPORTS[options.support],
        divergence=_layout.DIVERGENCES[options.divergence],
        temperature=options.temperature if inputs.token_temperature is None else inputs.token_temperature,
        **{name: getattr(options, name) for name in ("beta", "temperature_squared", "kd_weight", "ce_weight")},
        **{name: getattr(options, name) for name in ("softcap", "logit_scale", "ignore_index")},
    )
    reduced: dict[str, Any] = {"token_weight": inputs.token_weight, "normalizer": inputs.normalizer}
    reduced |= {"reduction": _layout.REDUCTIONS[options.reduction], "zero_if_empty": options.zero_if_empty}
    if dense:
        return spec.distillation(inputs.logits, inputs.teacher, inputs.target, task, **reduced)
    ids, logprobs, tail = inputs[1:4]
    return spec.topk_distillation(inputs.logits, ids, logprobs, tail, inputs.target, task, **reduced)  # type: ignore[arg-type]


def _through_reference(inputs: Inputs, options: Options) -> Results:
    """Plain PyTorch: float64, torch.func transforms, and gradients of token_weight or the normalizer."""
    states = (inputs.state, inputs.kd_state)
    if transformed() and any(state is not None for state in states):
        raise ValueError("sketch= can't be updated inside a torch.func transform: return the losses, update it outside")
    terms = _terms(inputs, options)
    count(terms, inputs.target, inputs.group_ids, *states, options.ignore_index, inputs.logits.shape[1])
    return terms.loss, terms.kd_loss, terms.token_loss, terms.student_mass
