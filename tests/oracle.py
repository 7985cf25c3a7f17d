"""What is right, in float64, and how far from it a result may be.

The error allowed is derived, not chosen: twice that of plain PyTorch in the same dtype, and one rounding of the output.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sample(
    rows: int, size: int, dtype: torch.dtype = torch.float32, *, scale: float = 3.0, ignored: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Normal logits (rows, size) times scale, and targets of which a share is -100."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, size, generator=generator) * scale).to(dtype)
    target = torch.randint(0, size, (rows,), generator=generator)
    skip = torch.rand(rows, generator=generator) < ignored
    return logits, target.masked_fill(skip, -100)


def token_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Plain cross-entropy of each row in float64, by log1p of the rest, accurate to the last digits also near 0."""
    x = logits.double()
    x_t = x.gather(1, target[:, None])
    rest = torch.exp(x - x_t).scatter(1, target[:, None], 0.0).sum(1)
    return torch.log1p(rest)


def loss_and_gradient(function: Any, logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """function(logits as dtype) and its gradient for an upstream gradient of ones."""
    x = logits.detach().to(dtype, copy=True).requires_grad_()
    loss = function(x)
    loss.sum().backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def assert_within_budget(actual: Tensor, exact: Tensor, eager: Tensor, *, what: str = "") -> None:
    """|actual - exact| <= 2 * (largest error of eager) + one rounding in the dtype of actual."""
    if actual.dtype == torch.float64:  # the oracle itself is no more exact than this
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-14, equal_nan=True)
        return
    finite = torch.finfo(actual.dtype)
    error, reference = (actual.double() - exact).abs(), (eager.double() - exact).abs()
    band = exact.abs() * finite.eps + finite.smallest_normal * finite.eps
    budget = 2 * reference.max() + band if exact.numel() else band
    worst = (error - budget).argmax() if exact.numel() else None
    assert bool((error <= budget).all()), (
        f"{what}: error {error.flatten()[worst].item():.3e} exceeds {budget.flatten()[worst].item():.3e} "
        f"at {int(worst)}, exact {exact.flatten()[worst].item():.6e}; eager's largest {reference.max().item():.3e}"
    )


def eager_loss(target: Tensor, **options: Any) -> Any:
    """F.cross_entropy with fixed target and options, as a function of the logits."""
    return lambda x: F.cross_entropy(
        x, target, **{k: v.to(x.dtype) if k == "weight" else v for k, v in options.items()}
    )
