"""Telling a right implementation from a buggy one, and the few functions that both are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import xentile as xt

if TYPE_CHECKING:
    from collections.abc import Callable


def tells_apart(check: Callable[[Any], None], right: Any, *buggy: Any) -> None:
    """The claim holds for what is right, and fails for every buggy formula: a check that can't fail shows nothing."""
    check(right)
    for wrong in buggy:
        with pytest.raises(AssertionError):
            check(wrong)


def ours(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    return xt.cross_entropy(x, target, **options).loss


def gradient(function: Callable[..., Tensor], x: Tensor, *args: Any, upstream: Tensor | None = None) -> Tensor:
    """d function(x, *args) / dx, for an upstream gradient of the shape of the loss."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x, *args), x, upstream)[0]


def per_token(x: Tensor, target: Tensor) -> Tensor:
    return ours(x, target, reduction="none")


def softmax_gradient(x: Tensor, target: Tensor) -> Tensor:
    """d(sum of CE)/dx in float64."""
    return torch.softmax(x.double(), 1) - F.one_hot(target, x.shape[1])
