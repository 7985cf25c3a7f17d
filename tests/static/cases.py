"""The launches whose machine code is held to a budget: what training and evaluation of real models launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from xentile import _layout as layout
from xentile._triton import cross_entropy, sketch

from .targets import Target, compile_only

if TYPE_CHECKING:
    from torch import Tensor

MEAN = layout.REDUCTIONS.index("mean")


class Case(NamedTuple):
    """rows x size logits; operator: forward, training (forward with its gradient) or backward."""

    operator: str
    rows: int
    size: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.operator} {self.rows} x {self.size} {str(self.dtype).removeprefix('torch.')}"

    @property
    def streams(self) -> bool:
        """Rows too long for registers, so there is a hot loop to look at."""
        return self.size > 16384


_LONG, _ODD, _SPLIT = (8192, 128256), (8192, 50257), (64, 262144)
_SHORT = [(65536, 10), (65536, 256), (65536, 1000), (16384, 5003)]  # a program has 128, 8 and 2 of them, or one
CASES = [
    *(
        Case(operator, *_LONG, dtype)
        for operator in ("forward", "training")
        for dtype in (torch.bfloat16, torch.float32)
    ),
    Case("forward", *_LONG, torch.float16),
    *(Case(operator, *_ODD, torch.bfloat16) for operator in ("forward", "backward")),
    *(Case(operator, *shape, torch.bfloat16) for shape in _SHORT for operator in ("forward", "training")),
    Case("backward", 65536, 256, torch.bfloat16),
    *(Case(operator, *_SPLIT, torch.bfloat16) for operator in ("forward", "training")),
    Case("sketch", 8192, 1, torch.float32),
]


def _launch(case: Case) -> None:
    """Call the launcher with tensors that have shapes and no memory."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if case.operator == "sketch":
        state = new(4, layout.DEFAULT.width, dtype=torch.int64)
        sketch.sketch_update(new(case.rows), None, None, None, state, 1)
        quantiles = new(5, dtype=torch.float64)
        sketch.sketch_quantile(state, quantiles, new(4, 5), new(4, 5), new(4, 5), 0)
        return
    rows = case.rows
    logits, target = new(rows, case.size, dtype=case.dtype), new(rows, dtype=torch.int64)
    options: tuple[Any, ...] = (-100, MEAN, 0.0, 0.0, 0.0, 1.0)
    if case.operator == "backward":
        saved = (new(), new(rows), new(rows), new(rows))
        cross_entropy.cross_entropy_backward(
            new(), logits, target, None, None, *saved, torch.empty_like(logits), *options, False
        )
        return
    losses = (new(), new(), *(new(rows) for _ in range(4)))
    statistics = (new(rows, dtype=torch.int64), new(rows, dtype=torch.bool), None, None)
    state = new(1, layout.DEFAULT.width, dtype=torch.int64)
    dlogits = torch.empty_like(logits) if case.operator == "training" else None
    cross_entropy.cross_entropy(
        logits, target, None, None, None, None, *losses, *statistics, state, dlogits, *options, False
    )


def compile_case(case: Case, target: Target) -> dict[str, Any]:
    """Kernel name -> what Triton compiled for it."""
    with compile_only(target) as compiled:
        _launch(case)
    return compiled
