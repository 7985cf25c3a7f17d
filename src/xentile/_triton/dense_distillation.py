"""Launchers of `distillation` and its backward, with their schemas' signatures.

A forward is at most three launches, without a synchronisation: the divisor (only if the gradient needs one), the rows,
and the loss with the sums of the sketches. A row is always one program's in the forward, also if there are few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from xentile import _layout as layout
from xentile._triton import finish, launch
from xentile._triton.dense_rows import dense_gradient_kernel, dense_row_kernel
from xentile._triton.topk_distillation import _bits
from xentile._triton.topk_rows import topk_finish_kernel

if TYPE_CHECKING:
    from torch import Tensor


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    token_temperature: Tensor | None,
    group_ids: Tensor | None,
    loss: Tensor,
    denominator: Tensor,
    kd_loss: Tensor,
    token_loss: Tensor,
    rows: Tensor,
    sketch: Tensor | None,
    kd_sketch: Tensor | None,
    dlogits: Tensor | None,
    ignore_index: int,
    reduction: int,
    divergence: int,
    beta: float,
    temperature: float,
    temperature_squared: bool,
    kd_weight: float,
    ce_weight: float,
    softcap: float,
    logit_scale: float,
    zero_if_empty: bool,
    *,
    choice: launch.Rows | None = None,
) -> None:
    """Fill the outputs. `choice` overrides that of the launch, for tests."""
    n = logits.shape[0]
    device = launch.device_of(logits)
    kind = layout.REDUCTIONS[reduction]
    prepared = kind == "mean" and dlogits is not None and normalizer is None
    choice = choice or forward_rows(logits, teacher_logits, layout.DIVERGENCES[divergence], device)
    scalars = (divergence, beta, temperature, temperature_squared, kd_weight, ce_weight, softcap, logit_scale)
    arguments = _inputs(logits, teacher_logits, target, token_weight, token_temperature, ignore_index, *scalars)
    arguments |= _gradient_row(logits, teacher_logits, dlogits)
    arguments |= {
        "BLOCK": choice.block,
        "zero_if_empty": int(zero_if_empty),
        "normalizer_ptr": denominator if prepared else normalizer if kind == "mean" else None,
        "group_ptr": group_ids,
        "row_loss_ptr": loss if kind == "none" else torch.empty_like(kd_loss),
        "kd_loss_ptr": kd_loss,
        "token_loss_ptr": token_loss,
        "rows_ptr": rows,
        "loss_ptr": loss,
        "denominator_ptr": denominator,
        "sketch_ptr": sketch,
        "kd_sketch_ptr": kd_sketch,
        "groups": 1 if sketch is None else sketch.shape[0],
        "kd_groups": 1 if kd_sketch is None else kd_sketch.shape[0],
        "BITS": _bits(sketch),
        "KD_BITS": _bits(kd_sketch),
    }
    over_tokens = arguments | {
        "BLOCK": finish.BLOCK,
        "weight_ptr": None,
        "weight_sum_ptr": None,
        "REDUCTION": kind,
        "PREPARED": prepared,
        "GROUPED": group_ids is not None and any(s is not None and s.shape[0] > 1 for s in (sketch, kd_sketch)),
    }
    with launch.guard(logits):
        if prepared:
            launch.run(finish.prepare_kernel, (1,), over_tokens, finish.THREADS, device)
        if n > 0:
            launch.run(dense_row_kernel, (n,), arguments, choice.threads, device, choice.registers)
        tiles = triton.cdiv(n, finish.BLOCK) if sketch is not None or kd_sketch is not None else 1
        launch.run(topk_finish_kernel, (max(1, tiles),), over_tokens, 2 * finish.THREADS, device)  # for two sketches


def distillation_backward(
    dloss: Tensor,
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    token_temperature: Tensor | None,
    denominator: Tensor,
    token_loss: Tensor,
    rows: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    reduction: int,
    divergence: int,
    beta: float,
    temperature: float,
    temperature_squared: bool,
    kd_weight: float,
    ce_weight: float,
    softcap: float,
    logit_scale: float,
    filled: bool,
    *,
    choice: launch.Rows | None = None,
) -> None:
    """Fill dlogits, unless it is `filled` for a dloss of 1 and that is what dloss is.

    `choice` overrides that of the launch, for tests.
    """
    n = logits.shape[0]
    if n == 0:
        return
    device = launch.device_of(logits)
    choice = choice or backward_rows(logits, teacher_logits, device)
    scalars = (divergence, beta, temperature, temperature_squared, kd_weight, ce_weight, softcap, logit_scale)
    arguments = _inputs(logits, teacher_logits, target, token_weight, token_temperature, ignore_index, *scalars)
    arguments |= _gradient_row(logits, teacher_logits, dlogits)
    arguments |= {
        "N": n,
        "dloss_ptr": dloss,
        "dloss_stride": 0 if dloss.dim() == 0 else 1,
        "normalizer_ptr": denominator,
        "token_loss_ptr": token_loss,
        "rows_ptr": rows,
        "FILLED": filled,
        "BLOCK": choice.block,
        "splits": choice.splits,
    }
    # A gradient that is there already shall cost no more than a few programs that find that out.
    most = 8 * device.processors if filled else 2**31 - 1
    with launch.guard(logits):
        launch.run(dense_gradient_kernel, (min(n * choice.splits, most),), arguments, choice.threads, device)


def _inputs(
    logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    token_temperature: Tensor | None,
    ignore_index: int,
    divergence: int,
    beta: float,
    temperature: float,
    temperature_squared: bool,
    kd_weight: float,
    ce_weight: float,
    softcap: float,
    logit_scale: float,
) -> dict[str, Any]:
    """Scalars stay arguments of the compiled kernel; what they switch on or off is compiled in."""
    return {
        "N": logits.shape[0],
        "V": logits.shape[1],
        "x_ptr": logits,
        "x_stride": logits.stride(0),
        "teacher_ptr": teacher_logits,
        "teacher_stride": teacher_logits.stride(0),
        "VEC": 16 // min(logits.element_size(), teacher_logits.element_size()),
        "target_ptr": target,
        "token_weight_ptr": token_weight,
        "temperature_ptr": token_temperature,
        "ignore_index": ignore_index,
        "DIVERGENCE": layout.DIVERGENCES[divergence],
        "beta": beta,
        "temperature": temperature,
        "TEMPERED": token_temperature is not None or temperature != 1,
        "SQUARED": temperature_squared,
        "kd_weight": kd_weight,
        "KD": kd_weight != 0,
        "ce_weight": ce_weight,
        "CE": target is not None and ce_weight != 0,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "TRANSFORM": "softcap" if softcap else "scale" if logit_scale != 1 else "identity",
    }


def _gradient_row(logits: Tensor, teacher_logits: Tensor, dlogits: Tensor | None) -> dict[str, Any]:
    anchor = logits if dlogits is None else dlogits
    return {
        "dx_ptr": dlogits,
        "dx_stride": 0 if dlogits is None else dlogits.stride(0),
        "TOGETHER": _same_boundaries(logits, anchor),
        "TEACHER_TOGETHER": _same_boundaries(teacher_logits, anchor),
    }


def _same_boundaries(rows: Tensor, anchor: Tensor) -> bool:
    """Whether in each row the first column on a 16-byte boundary of `anchor` is on one of `rows`, too."""
    if rows.element_size() == anchor.element_size():
        pitch = (rows.stride(0) - anchor.stride(0)) * rows.element_size()
        return (rows.data_ptr() - anchor.data_ptr()) % 16 == 0 and (pitch % 16 == 0 or len(rows) <= 1)
    # The columns between two boundaries differ in number, so only column 0 is one of both.
    return all(
        x.data_ptr() % 16 == 0 and (x.stride(0) * x.element_size() % 16 == 0 or len(x) <= 1) for x in (rows, anchor)
    )


def _share(logits: Tensor, teacher_logits: Tensor) -> int:
    """Columns of a tile that a thread has, in whole groups: up to 64 bytes of both rows together."""
    return launch.IN_FLIGHT // (logits.element_size() + teacher_logits.element_size()) // 8 * 8


def forward_rows(logits: Tensor, teacher_logits: Tensor, divergence: str, device: launch.Device) -> launch.Rows:
    """How the rows of two tensors are launched."""
    n, v = logits.shape
    threads, share, registers = 1024, _share(logits, teacher_logits), 0
    if n >= device.processors:
        # As many rows at once as the cache has room for, which is what `launch.forward` counts: here of two tensors,
        # and also without a gradient, because they are read twice then.
        size = logits.element_size() + teacher_logits.element_size()
        threads = launch.forward(4 * device.processors, v, size, True, False, False, device).threads
    if divergence != "forward_kl":
        # 1024 threads have 64 registers each, which reverse_kl of a softcap is a few too many for.
        registers = 128 if threads == 1024 else 0
        threads = min(threads, 512)
    if divergence in ("jsd", "skew_forward_kl", "skew_reverse_kl"):
        share = 8  # the logarithms of a mixture, of 16 columns at once, don't fit in 128 registers either
    threads = max(device.warp_size, min(threads, triton.next_power_of_2(triton.cdiv(v, share))))
    return launch.Rows(threads * share, threads, registers=registers if threads == 512 else 0)


def backward_rows(logits: Tensor, teacher_logits: Tensor, device: launch.Device) -> launch.Rows:
    """For the gradient from what the forward saved: long rows are shared by many small programs."""
    v = logits.shape[1]
    share = _share(logits, teacher_logits)
    threads = max(device.warp_size, min(128, triton.next_power_of_2(triton.cdiv(v, share))))
    return launch.Rows(threads * share, threads, triton.cdiv(v, 4 * threads * share))
