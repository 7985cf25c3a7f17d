"""Named sets of losses that a sketch must get right: what training produces, and what breaks sketches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _lognormal(n: int, mean: float, std: float) -> Tensor:
    return torch.exp(torch.randn(n, generator=_generator()) * std + mean).clamp(max=255.0)


DISTRIBUTIONS: dict[str, Callable[[int], Tensor]] = {
    "pretraining": lambda n: _lognormal(n, 0.8, 0.8),  # broad, around 2 nats
    "fine-tuned": lambda n: _lognormal(n, -3.0, 3.0),  # most tokens nearly certain, six decades
    "half zeros": lambda n: _lognormal(n, 0.0, 1.0) * (torch.arange(n) % 2),
    "all equal": lambda n: torch.full((n,), 1.2345),
    "few distinct": lambda n: (torch.arange(n) % 5).float() * 0.7,
    "uniform at ln V": lambda n: torch.full((n,), 10.825) + torch.rand(n, generator=_generator()) * 1e-4,
    "bin edges": lambda n: 2.0 ** (torch.arange(n) % 30 - 23).float(),
    "tiny": lambda n: torch.rand(n, generator=_generator()) * 2.0**-22,
    "with outliers": lambda n: _lognormal(n, 0.0, 1.0).masked_fill(torch.arange(n) % 97 == 0, 200.0),
    "one value": lambda n: torch.tensor([3.25]),
}
