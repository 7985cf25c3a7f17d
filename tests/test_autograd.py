"""Backward in every form trainers use: repeated, differentiated, checkpointed, in place, scaled, under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_within_budget, loss_and_gradient, sample
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import xentile as xt

OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "none"},
    {"reduction": "sum", "label_smoothing": 0.2},
    {"z_loss": 0.1, "softcap": 4.0, "logit_scale": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_and_gradgradcheck(options: dict[str, Any]) -> None:
    logits, target = sample(4, 9, torch.float64, ignored=0.2)
    function = lambda x: xt.cross_entropy(x, target, **options).loss  # noqa: E731
    assert torch.autograd.gradcheck(function, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(function, logits)


@pytest.mark.parametrize("which", ["weight", "token_weight", "normalizer", "probabilities"])
def test_weights_and_probabilities_are_differentiable(which: str) -> None:
    logits, target = sample(4, 5, torch.float64)
    size = {"weight": (5,), "token_weight": (4,), "normalizer": (), "probabilities": (4, 5)}[which]
    value = torch.rand(size, dtype=torch.float64).add(0.5).requires_grad_()

    def function(x: Tensor, v: Tensor) -> Tensor:
        if which == "probabilities":
            return xt.cross_entropy(x, v).loss
        return xt.cross_entropy(x, target, **{which: v}).loss

    assert torch.autograd.gradcheck(function, (logits.requires_grad_(), value))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_twice_gives_the_same_bits(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    logits, target = (t.to(device) for t in sample(16, 700, dtype, ignored=0.2))
    x = logits.requires_grad_()
    loss = xt.cross_entropy(x, target, **options).loss.sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, x, retain_graph=True)
    (third,) = torch.autograd.grad(loss, x)
    assert torch.equal(kept, second)
    assert torch.equal(kept, third)
    assert torch.equal(first, kept)  # a later backward does not write into an earlier result


@pytest.mark.parametrize("scale", [1.0, 0.5, 65536.0])
def test_an_upstream_gradient_scales(scale: float, device: torch.device) -> None:
    logits, target = (t.to(device) for t in sample(16, 700))
    expected = loss_and_gradient(lambda x: xt.cross_entropy(x, target).loss, logits, torch.float32)[1] * scale
    actual = loss_and_gradient(lambda x: xt.cross_entropy(x, target).loss * scale, logits, torch.float32)[1]
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_gradients_accumulate_in_a_leaf_and_leave_the_buffer_alone() -> None:
    logits, target = sample(16, 700)
    x = logits.clone().requires_grad_()
    for _ in range(3):
        xt.cross_entropy(x, target).loss.backward()
    (single,) = torch.autograd.grad(xt.cross_entropy(x, target).loss, x)
    torch.testing.assert_close(x.grad, 3 * single)


def test_gradient_penalty_has_its_effect() -> None:
    logits, target = sample(4, 50)

    def penalised(loss_function: Any) -> Tensor:
        x = logits.clone().requires_grad_()
        loss = loss_function(x)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + 100 * g.pow(2).sum()).backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(
        penalised(lambda x: xt.cross_entropy(x, target).loss), penalised(lambda x: F.cross_entropy(x, target))
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_a_batch_once(use_reentrant: bool) -> None:
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(30, 8)
    target = torch.randint(0, 30, (12,))
    sketch = xt.LossSketch()
    by_hand = xt.LossSketch()

    def head(h: Tensor) -> Tensor:
        out = xt.cross_entropy(h @ weight.T, target, sketch=sketch)
        by_hand.update(out.token_loss)
        return out.loss

    checkpoint(head, hidden, use_reentrant=use_reentrant).backward()
    assert sketch.count() == by_hand.count() == 12
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, target), hidden)
    torch.testing.assert_close(hidden.grad, expected)


def head(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (leaf), logits computed from it, target."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(12, 8, generator=generator, requires_grad=True)
    logits = hidden @ torch.randn(30, 8, generator=generator).T
    return hidden, logits, torch.randint(0, 30, (12,), generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_inplace_writes_the_gradient_over_the_logits(reduction: str) -> None:
    hidden, logits, target = head()
    F.cross_entropy(logits, target, reduction=reduction).sum().backward()
    expected, hidden2 = hidden.grad, None
    hidden2, logits, target = head()
    version, address = logits._version, logits.data_ptr()
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    seen: list[int] = []
    xt.cross_entropy(logits, target, reduction=reduction, inplace=True).loss.sum().backward()
    torch.testing.assert_close(hidden2.grad, expected)
    assert seen == [address]
    assert logits._version > version


def test_inplace_makes_other_uses_of_the_logits_fail_loudly() -> None:
    _hidden, logits, target = head()
    square = logits.square().sum()  # saves the logits
    loss = xt.cross_entropy(logits, target, inplace=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + square).backward()


def test_inplace_second_backward_is_refused() -> None:
    _hidden, logits, target = head()
    loss = xt.cross_entropy(logits, target, inplace=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=True: the first backward handed out the gradient"):
        loss.backward()


def test_inplace_without_gradient_leaves_the_logits_alone() -> None:
    logits, target = sample(5, 40)
    before = logits.clone()
    xt.cross_entropy(logits, target, inplace=True)
    assert torch.equal(logits, before)


def test_logits_changed_between_forward_and_backward_are_refused() -> None:
    _, logits, target = head()
    loss = xt.cross_entropy(logits, target).loss
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_scaled_backward_twice_gives_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    logits, target = (t.to(device) for t in sample(16, 700, dtype))
    x = logits.requires_grad_()
    loss = xt.cross_entropy(x, target).loss * 3
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_the_logits_are_never_written_to() -> None:
    logits, target = sample(5, 40)
    x = logits.clone().requires_grad_()
    xt.cross_entropy(x, target).loss.backward()
    assert torch.equal(x.detach(), logits)
    assert x._version == 0


def test_only_the_loss_carries_a_gradient() -> None:
    logits, target = sample(5, 40)
    out = xt.cross_entropy(logits.requires_grad_(), target, stats=("entropy", "target_rank"))
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in out[1:])


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_stride_zero_and_transposed_upstream_gradients(reduction: str) -> None:
    logits, target = torch.randn(4, 20, 6), torch.randint(0, 20, (4, 6))
    upstream = torch.rand(6, 4).T if reduction == "none" else torch.tensor(2.0)
    for dloss in (upstream, torch.ones(1).expand_as(upstream) if reduction == "none" else upstream):
        gradients = []
        for function in (lambda x: xt.cross_entropy(x, target, reduction=reduction).loss, None):
            x = logits.clone().requires_grad_()
            loss = function(x) if function else F.cross_entropy(x, target, reduction=reduction)
            loss.backward(dloss)
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients)


def test_autocast_leaves_the_loss_in_float32() -> None:
    hidden, weight, target = torch.randn(8, 16, requires_grad=True), torch.randn(50, 16), torch.randint(0, 50, (8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = hidden @ weight.T
        out = xt.cross_entropy(logits, target)
    assert logits.dtype == torch.bfloat16
    assert out.loss.dtype == out.token_loss.dtype == torch.float32
    out.loss.backward()
    x = logits.detach()
    exact = loss_and_gradient(lambda y: F.cross_entropy(y, target), x, torch.float64)
    eager = loss_and_gradient(lambda y: F.cross_entropy(y, target), x, torch.bfloat16)
    actual = loss_and_gradient(lambda y: xt.cross_entropy(y, target).loss, x, torch.bfloat16)
    for a, e, plain in zip(actual, exact, eager, strict=True):
        assert_within_budget(a, e, plain)
