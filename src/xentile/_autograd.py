"""Autograd over the operators, and the choice between them and the differentiable reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xentile import _gradient, _layout, reference
from xentile._ops import ops
from xentile.reference import kernels

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None"]


class Inputs(NamedTuple):
    """Tensors, flattened: logits (N, V), target (N,) or probabilities (N, V); vectors in the accumulation dtype."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    token_weight: Tensor | None
    normalizer: Tensor | None
    group_ids: Tensor | None
    state: Tensor | None


class Options(NamedTuple):
    """Scalars, in the order of the operators' schemas."""

    ignore_index: int
    reduction: int
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float
    zero_if_empty: bool


def run(inputs: Inputs, options: Options, *, soft: bool, entropy: bool, target_rank: bool, inplace: bool) -> Results:
    """(loss, token_loss, lse, predicted, correct, entropy, target_rank), the last two None unless asked for."""
    if recomputing():
        inputs = inputs._replace(state=None)
    if soft or transformed() or any(t is not None and t.requires_grad for t in inputs[2:5]):
        return _through_reference(inputs, options, soft, entropy, target_rank)
    compiling = torch.compiler.is_compiling()
    overwrite = inplace and not compiling  # a compiler plans memory itself
    if torch.is_grad_enabled() and inputs.logits.requires_grad:
        # In compiled code the gradient is left to the backward, which could not scale a saved one in place.
        apply: Any = CrossEntropyFunction.apply
        results: Results = apply(*inputs, *options, entropy, target_rank, overwrite, not compiling)
        return results
    return _forward(inputs, options, entropy, target_rank, None)[0]


def recomputing() -> bool:
    """Whether this forward runs inside a backward: activation checkpointing repeats it, and a batch must count once."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def transformed() -> bool:
    return torch._C._are_functorch_transforms_active()


def _forward(
    inputs: Inputs, options: Options, entropy: bool, target_rank: bool, dlogits: Tensor | None
) -> tuple[Results, tuple[Tensor, ...]]:
    """Allocate the outputs and launch: (results, what the backward needs of them)."""
    logits = inputs.logits
    rows = logits.shape[0]
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty((rows,) if options.reduction == 0 else (), dtype=acc)
    denominator = logits.new_empty((), dtype=acc)
    token_loss, lse, row_max, sum_exp = (logits.new_empty(rows, dtype=acc) for _ in range(4))
    predicted = logits.new_empty(rows, dtype=torch.int64)
    correct = logits.new_empty(rows, dtype=torch.bool)
    entropies = logits.new_empty(rows, dtype=acc) if entropy else None
    ranks = logits.new_empty(rows, dtype=torch.int64) if target_rank else None
    outputs = (loss, denominator, token_loss, lse, row_max, sum_exp, predicted, correct, entropies, ranks)
    ops.cross_entropy.default(*inputs[:6], *outputs, inputs.state, dlogits, *options)
    return (loss, token_loss, lse, predicted, correct, entropies, ranks), (denominator, token_loss, row_max, sum_exp)


class CrossEntropyFunction(torch.autograd.Function):
    """The operator with its gradient; when that is written and handed out is said in _gradient.py."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        inputs, options = Inputs(*args[:7]), Options(*args[7:14])
        entropy, target_rank, inplace, fused = args[14:]
        fused = fused and options.reduction != 0
        dlogits = _gradient.reserve(ctx, inputs.logits, fused=fused, inplace=inplace)
        results, rows = _forward(inputs, options, entropy, target_rank, dlogits)
        saved = _gradient.launched(ctx, inputs.logits)
        ctx.options = options
        weights = (inputs.weight, inputs.token_weight, inputs.normalizer)
        ctx.save_for_backward(saved, inputs.target, *weights, *rows)
        ctx.mark_non_differentiable(*(t for t in results[1:] if t is not None))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> Any:
        none = (None,) * 17
        if dloss is None:
            return (None, *none)
        if torch.is_grad_enabled():
            return (_differentiable_gradient(ctx, dloss), *none)
        logits, target, weight, token_weight, _normalizer, *rows = ctx.saved_tensors

        def fill(dlogits: Tensor, filled: bool) -> None:
            inputs = (dloss.contiguous(), logits, target, weight, token_weight, *rows)
            ops.cross_entropy_backward.default(*inputs, dlogits, *ctx.options[:6], filled)

        return (_gradient.hand_out(ctx, dloss, logits, fill), *none)


def _differentiable_gradient(ctx: Any, dloss: Tensor) -> Tensor:
    """create_graph=True: the gradient as a differentiable function of logits and dloss, through the reference."""
    _gradient.refuse_inplace(ctx)
    logits, target, weight, token_weight, normalizer, *_ = ctx.saved_tensors
    inputs = Inputs(logits, target, weight, token_weight, normalizer, None, None)
    loss = _reference_terms(inputs, ctx.options, soft=False).loss
    gradient: Tensor = torch.autograd.grad(loss, logits, dloss, create_graph=True)[0]
    return gradient


def _reference_terms(inputs: Inputs, options: Options, soft: bool) -> reference.Terms:
    scalars = options._asdict() | {"reduction": _layout.REDUCTIONS[options.reduction]}
    scalars |= {"token_weight": inputs.token_weight, "normalizer": inputs.normalizer}
    if soft:
        scalars.pop("ignore_index")
        return reference.soft_cross_entropy(inputs.logits, inputs.target, inputs.weight, **scalars)
    return reference.cross_entropy(inputs.logits, inputs.target, inputs.weight, **scalars)


def _through_reference(inputs: Inputs, options: Options, soft: bool, entropy: bool, target_rank: bool) -> Results:
    """Plain PyTorch: for torch.func transforms, class probabilities, and gradients of the weights or the normalizer."""
    if inputs.state is not None and transformed():
        raise ValueError(
            "sketch= can't be updated inside a torch.func transform: return token_loss, and update it outside"
        )
    terms = _reference_terms(inputs, options, soft)
    if inputs.state is not None:
        kernels.count(inputs.state, terms, inputs.group_ids)
    optional = (terms.entropy if entropy else None, terms.target_rank if target_rank else None)
    return (terms.loss, terms.token_loss, terms.lse, terms.predicted, terms.correct, *optional)
