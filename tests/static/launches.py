"""Call the launcher of a case with tensors that have shapes and no memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from xentile import _layout as layout
from xentile._triton import (
    cross_entropy,
    dense_distillation,
    quantile,
    sketch,
    teacher_topk,
    topk_distillation,
    topk_support,
)

from .targets import compile_only

if TYPE_CHECKING:
    from collections.abc import Container

    from torch import Tensor

    from .cases import Case
    from .targets import Launch, Target

MEAN = layout.REDUCTIONS.index("mean")


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _logits(case: Case) -> Tensor:
    return _new(case.rows, case.size, dtype=case.dtype)


def _targets(case: Case) -> Tensor:
    return _new(case.rows, dtype=torch.int64)


def _state(groups: int = 1) -> Tensor:
    return _new(groups, layout.DEFAULT.width, dtype=torch.int64)


def _gradient(case: Case) -> Tensor | None:
    return _logits(case) if case.writes else None


def _cross_entropy(case: Case) -> None:
    rows, everything = case.rows, case.option == "every option"
    weights = (_new(case.size), _new(rows)) if everything else (None, None)
    losses = _new(), _new(), *(_new(rows) for _ in range(4))
    statistics = _targets(case), _new(rows, dtype=torch.bool)
    extra = (_new(rows), _targets(case)) if everything else (None, None)
    scalars = (0.1, 1e-4, 30.0, 1.5) if everything else (0.0, 0.0, 0.0, 1.0)
    cross_entropy.cross_entropy(
        _logits(case), _targets(case), *weights, None, None, *losses, *statistics, *extra, _state(), _gradient(case),
        -100, MEAN, *scalars, False,
    )  # fmt: skip


def _backward(case: Case) -> None:
    saved = _new(), *(_new(case.rows) for _ in range(3))
    inputs = _new(), _logits(case), _targets(case), None, None
    cross_entropy.cross_entropy_backward(*inputs, *saved, _logits(case), -100, MEAN, 0.0, 0.0, 0.0, 1.0, False)


def _sketch(case: Case) -> None:
    """Updating, and reading quantiles."""
    rows, state = case.rows, _state(4 if case.option else 1)
    mask = _new(rows, dtype=torch.bool)
    options = (mask, _new(rows), _targets(case), state, 2**20) if case.option else (None, None, None, state, 1)
    sketch.sketch_update(_new(rows), *options)
    sketch.sketch_quantile(state, _new(5, dtype=torch.float64), *(_new(state.shape[0], 5) for _ in range(3)), 0)


def _quantile(case: Case) -> None:
    """Counting the first digit, and the next."""
    width = 8 * case.dtype.itemsize
    weights = _new(case.rows, dtype=torch.int64) if case.option else None
    for targets, shift in ((1, width - 8), (10, width - 16)):
        prefixes, counts = (_new(*shape, dtype=torch.int64) for shape in ((targets,), (targets, 256)))
        quantile.radix_counts(_new(case.rows, dtype=case.dtype), None, weights, prefixes, shift, 8, counts)


def _teacher_columns(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return _new(case.rows, case.k, dtype=torch.int32), _new(case.rows, case.k), _new(case.rows)


def _topk_support(case: Case) -> None:
    columns = _teacher_columns(case)
    options = case.size, layout.SUPPORTS.index("tail_bucket"), 0, 0, case.temperature
    topk_support.topk_support(*columns[:2], None, None, None, *columns, _new(case.rows), *options)


_Scalars = tuple[int, int, int, float, float, bool, float, float, float, float]


def _topk_scalars(case: Case) -> _Scalars:
    """With a target, truncated support and forward KL."""
    return MEAN, 0, 0, 0.5, case.temperature, True, 1.0, 0.5, 0.0, 1.0


def _topk(case: Case) -> None:
    rows = case.rows
    outputs = _new(), _new(), _new(rows), _new(rows), _new(rows), _new(rows, 3), _state(), _state(), _gradient(case)
    inputs = _logits(case), *_teacher_columns(case), _targets(case), None, None, None, None
    topk_distillation.topk_distillation(*inputs, *outputs, -100, *_topk_scalars(case), False)


def _topk_backward(case: Case) -> None:
    inputs = _new(), _logits(case), *_teacher_columns(case), _targets(case), None, None
    saved = _new(), _new(case.rows), _new(case.rows, 3), _logits(case)
    topk_distillation.topk_distillation_backward(*inputs, *saved, -100, *_topk_scalars(case), False)


def _dense_scalars(case: Case) -> tuple[Any, ...]:
    """With a target; a softcap where there is a temperature."""
    softcap = 0.0 if case.temperature == 1 else 20.0
    return MEAN, layout.DIVERGENCES.index(case.option), 0.5, case.temperature, True, 1.0, 0.5, softcap, 1.0


def _dense(case: Case) -> None:
    rows = case.rows
    inputs = _logits(case), _logits(case), _targets(case), None, None, None, None
    outputs = _new(), _new(), _new(rows), _new(rows), _new(rows, 6), _state(), _state(), _gradient(case)
    dense_distillation.distillation(*inputs, *outputs, -100, *_dense_scalars(case), False)


def _dense_backward(case: Case) -> None:
    inputs = _new(), _logits(case), _logits(case), _targets(case), None, None
    saved = _new(), _new(case.rows), _new(case.rows, 6), _logits(case)
    dense_distillation.distillation_backward(*inputs, *saved, -100, *_dense_scalars(case), False)


def _teacher(case: Case) -> None:
    rows = case.rows
    outputs = _new(rows, case.k, dtype=torch.int32), _new(rows, case.k), _new(rows, 1), _new(rows, 1)
    teacher_topk.teacher_topk(_logits(case), _new(1), *outputs, 0.0, 1.0)


_LAUNCHERS = {
    "forward": _cross_entropy,
    "training": _cross_entropy,
    "backward": _backward,
    "scale": lambda case: cross_entropy.scale_(_logits(case), _new()),
    "sketch": _sketch,
    "quantile": _quantile,
    "topk_support": _topk_support,
    "topk_forward": _topk,
    "topk_training": _topk,
    "topk_backward": _topk_backward,
    "dense_forward": _dense,
    "dense_training": _dense,
    "dense_backward": _dense_backward,
    "teacher": _teacher,
}


def compile_case(case: Case, target: Target, known: Container[str] = ()) -> dict[str, Launch]:
    """Kernel name -> its launch, compiled unless its source is `known`."""
    with compile_only(target, known) as launches:
        _LAUNCHERS[case.operator](case)
    return launches
