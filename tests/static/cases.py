"""The launches whose machine code is held to a budget: what training and evaluation of real models launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from xentile import _layout as layout
from xentile._triton import cross_entropy, sketch, topk_distillation, topk_support

from .targets import Target, compile_only

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

MEAN = layout.REDUCTIONS.index("mean")


class Case(NamedTuple):
    """rows x size logits; operator: forward, training (forward with its gradient) or backward, of cross-entropy or
    (topk_...) of distillation against k columns.
    """

    operator: str
    rows: int
    size: int
    dtype: torch.dtype
    k: int = 0
    temperature: float = 1.0

    @property
    def name(self) -> str:
        top = f" K = {self.k} T = {self.temperature:g}" if self.k else ""
        return f"{self.operator} {self.rows} x {self.size} {str(self.dtype).removeprefix('torch.')}{top}"

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
    Case("topk_support", 8192, 1, torch.float32, 64),
    *(Case("topk_forward", *_LONG, torch.bfloat16, k) for k in (64, 1024)),
    *(Case("topk_training", *_LONG, dtype, 64) for dtype in (torch.bfloat16, torch.float32)),
    *(Case("topk_training", *shape, torch.bfloat16, 64, 2.0) for shape in (_LONG, _ODD)),
    Case("topk_training", 65536, 1000, torch.bfloat16, 64),
    Case("topk_backward", *_LONG, torch.bfloat16, 64, 2.0),
]


def _launch(case: Case) -> None:
    """Call the launcher with tensors that have shapes and no memory."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if case.k:
        _launch_topk(case, new)
        return
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


def _launch_topk(case: Case, new: Callable[..., Tensor]) -> None:
    """Distillation with a target, truncated support and forward KL."""
    rows, k = case.rows, case.k
    teacher = new(rows, k, dtype=torch.int32), new(rows, k), new(rows)
    if case.operator == "topk_support":
        topk_support.topk_support(*teacher[:2], None, None, None, *teacher, new(rows), case.size, 3, 0, 0, 1.0)
        return
    logits, target = new(rows, case.size, dtype=case.dtype), new(rows, dtype=torch.int64)
    options: tuple[Any, ...] = (-100, MEAN, 0, 0, 0.5, case.temperature, True, 1.0, 0.5, 0.0, 1.0)
    dlogits = torch.empty_like(logits) if case.operator != "topk_forward" else None
    if case.operator == "topk_backward":
        saved = (new(), new(rows), new(rows, 3), dlogits)
        topk_distillation.topk_distillation_backward(
            new(), logits, *teacher, target, None, None, *saved, *options, False
        )
        return
    states = (new(1, layout.DEFAULT.width, dtype=torch.int64) for _ in range(2))
    outputs = (new(), new(), new(rows), new(rows), new(rows), new(rows, 3), *states, dlogits)
    topk_distillation.topk_distillation(logits, *teacher, target, None, None, None, None, *outputs, *options, False)


def compile_case(case: Case, target: Target) -> dict[str, Any]:
    """Kernel name -> what Triton compiled for it."""
    with compile_only(target) as compiled:
        _launch(case)
    return compiled
