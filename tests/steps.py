"""Steps for the tests of streams."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from distributions import DISTRIBUTIONS

import xentile as xt

if TYPE_CHECKING:
    from collections.abc import Iterator


def steps_of(count: int, size: int = 50) -> Iterator[torch.Tensor]:
    """Steps of uneven size, some empty, with the distribution changing from one to the next, and special values."""
    names = itertools.cycle(DISTRIBUTIONS)
    special = torch.tensor([torch.inf, torch.nan, -1.0, 300.0, 0.0])
    for step, name in zip(range(count), names, strict=False):
        values = DISTRIBUTIONS[name](1 + step * 7 % size)
        yield torch.cat([values, special[step % 5 : step % 5 + 1]]) if step % 4 else values[:0]


def sketch_of(values: torch.Tensor, **options: int) -> xt.LossSketch:
    sketch = xt.LossSketch(values.device, **options)
    sketch.update(values)
    return sketch
