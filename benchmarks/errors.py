"""Errors against float64, and the budgets they must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_CHUNK = 1 << 20  # elements compared in float64 at a time: 8 MiB, which malloc reuses and does not map anew


@dataclass
class Errors:
    """Largest absolute errors. For teacher_topk `loss` is that of the log-probabilities."""

    loss: float = 0.0
    gradient: float = 0.0
    off_target: float = 0.0

    def within(self, budget: Errors) -> bool:
        # Not `self > budget`: a NaN must fail. And a budget without bound would let anything pass.
        pairs = [(getattr(self, name), getattr(budget, name)) for name in vars(self)]
        return all(error <= allowed and math.isfinite(allowed) for error, allowed in pairs)

    def budget(self, rounding: Errors) -> Errors:
        """What the contract allows where plain PyTorch has these errors."""
        return Errors(**{name: 2 * getattr(self, name) + getattr(rounding, name) for name in vars(self)})

    def scaled(self, factor: float) -> Errors:
        return Errors(**{name: factor * value for name, value in vars(self).items()})


@dataclass
class Verdict:
    passed: bool
    errors: Errors = field(default_factory=Errors)
    budget: Errors = field(default_factory=Errors)
    reason: str = ""


def chunks(rows: int, vocab: int) -> Iterator[slice]:
    height = max(1, _CHUNK // vocab)
    return (slice(first, min(rows, first + height)) for first in range(0, rows, height))


def worse(so_far: float, error: Tensor) -> float:
    largest = error.max().item() if error.numel() else 0.0
    return largest if not largest <= so_far else so_far  # keeps a NaN


def exact_rows(inputs: tuple[Tensor, ...], rows: Tensor | slice) -> tuple[Tensor, ...]:
    """These rows, floating-point numbers in float64."""
    return tuple(t[rows].to(torch.float64) if t.is_floating_point() else t[rows] for t in inputs)
