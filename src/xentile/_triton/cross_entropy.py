"""Launchers of the operators `cross_entropy`, `cross_entropy_backward` and `scale_`, with their schemas' signatures.

A forward is a handful of launches on the current stream, without a synchronisation: `prepare` (only if the gradient
needs a divisor or the sum of the class weights), the rows, and `finish` (the loss, and the sums of the sketch).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from xentile import _layout as layout
from xentile._triton import finish, launch
from xentile._triton.backward import gradient_kernel, short_gradient_kernel
from xentile._triton.forward import combine_kernel, row_kernel, split_kernel
from xentile._triton.scale import scale_kernel
from xentile._triton.short import short_row_kernel

PARTIALS = 8
"""float32 numbers that a part of a split row leaves."""


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    group_ids: Tensor | None,
    loss: Tensor,
    denominator: Tensor,
    token_loss: Tensor,
    lse: Tensor,
    row_max: Tensor,
    sum_exp: Tensor,
    predicted: Tensor,
    correct: Tensor,
    entropy: Tensor | None,
    target_rank: Tensor | None,
    sketch: Tensor | None,
    dlogits: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    zero_if_empty: bool,
    *,
    rows: launch.Rows | None = None,
) -> None:
    """Fill the outputs. `rows` overrides the choice of `launch.forward`, for tests."""
    n, v = logits.shape
    device = launch.device_of(logits)
    aligned = dlogits is not None and _aligned_alike(logits, dlogits)
    smooth = label_smoothing != 0
    alignment = min(_alignment(logits), 16 if dlogits is None else _alignment(dlogits))
    size = logits.element_size()
    weighted = weight is not None
    rows = rows or launch.forward(n, v, size, dlogits is not None, aligned, smooth, device, alignment, weighted)
    kind = layout.REDUCTIONS[reduction]
    # The forward alone divides at the end. A gradient must know the divisor before the first row.
    prepared = kind == "mean" and dlogits is not None and normalizer is None
    groups = 1 if sketch is None else sketch.shape[0]
    arguments = _inputs(logits, target, weight, token_weight, ignore_index, zero_if_empty)
    arguments |= _options(label_smoothing, z_loss, softcap, logit_scale)
    arguments |= {
        "N": n,
        "group_ptr": group_ids,
        "groups": groups,
        "normalizer_ptr": denominator if prepared else normalizer if kind == "mean" else None,
        "row_loss_ptr": loss if kind == "none" else torch.empty_like(token_loss),
        "token_loss_ptr": token_loss,
        "lse_ptr": lse,
        "max_ptr": row_max,
        "sum_ptr": sum_exp,
        "predicted_ptr": predicted,
        "correct_ptr": correct,
        "entropy_ptr": entropy,
        "rank_ptr": target_rank,
        "sketch_ptr": sketch,
        "BITS": 0 if sketch is None else layout.Layout.of_width(sketch.shape[1]).mantissa_bits,
        "loss_ptr": loss,
        "denominator_ptr": denominator,
        "REDUCTION": kind,
        "PREPARED": prepared,
        "GROUPED": group_ids is not None and groups > 1,
    }
    arguments |= _gradient_arguments(None, dlogits, aligned, False)
    with launch.guard(logits):
        _prepare(arguments, prepared, device)
        if n > 0:
            _forward_rows(arguments, rows, device)
        tiles = triton.cdiv(n, finish.BLOCK) if sketch is not None else 1
        launch.run(finish.finish_kernel, (max(1, tiles),), arguments | {"BLOCK": finish.BLOCK}, finish.THREADS, device)


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor,
    token_loss: Tensor,
    row_max: Tensor,
    sum_exp: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    filled: bool,
    *,
    rows: launch.Rows | None = None,
) -> None:
    """Fill dlogits, unless it is `filled` for a dloss of 1 and that is what dloss is.

    `rows` overrides the choice of `launch.backward`, for tests.
    """
    n, v = logits.shape
    device = launch.device_of(logits)
    arguments = _inputs(logits, target, weight, token_weight, ignore_index, zero_if_empty=False)
    arguments |= _options(label_smoothing, z_loss, softcap, logit_scale)
    arguments |= _gradient_arguments(dloss, dlogits, _aligned_alike(logits, dlogits), filled)
    arguments |= {
        "N": n,
        "normalizer_ptr": denominator,
        "token_loss_ptr": token_loss,
        "max_ptr": row_max,
        "sum_ptr": sum_exp,
    }
    with launch.guard(logits):
        _prepare(arguments, False, device)
        if n > 0:
            alignment = min(_alignment(logits), _alignment(dlogits))
            smooth = arguments["SMOOTH"]
            rows = rows or launch.backward(v, logits.element_size(), smooth, device, alignment)
            _gradient_rows(arguments, rows, device)


def scale_(x: Tensor, scale: Tensor) -> None:
    """X *= scale; the device decides whether there is anything to do."""
    device = launch.device_of(x)
    arguments = {"x_ptr": x, "scale_ptr": scale, "n": x.numel(), "BLOCK": 4096, "TILES": 4}
    programs = triton.cdiv(x.numel(), 4096 * 4)
    if programs > 0:
        with launch.guard(x):
            launch.run(scale_kernel, (programs,), arguments, 128, device)


def _inputs(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    zero_if_empty: bool,
) -> dict[str, Any]:
    """Kernel arguments that all launches share."""
    return {
        "x_ptr": logits,
        "x_stride": logits.stride(0),
        "V": logits.shape[1],
        "target_ptr": target,
        "weight_ptr": weight,
        "token_weight_ptr": token_weight,
        "ignore_index": ignore_index,
        "zero_if_empty": int(zero_if_empty),
    }


def _options(label_smoothing: float, z_loss: float, softcap: float, logit_scale: float) -> dict[str, Any]:
    """Scalars stay arguments of the compiled kernel; what they switch on or off is compiled in."""
    return {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "SMOOTH": label_smoothing != 0,
        "TRANSFORM": "softcap" if softcap else "scale" if logit_scale != 1 else "identity",
    }


def _gradient_arguments(dloss: Tensor | None, dlogits: Tensor | None, aligned: bool, filled: bool) -> dict[str, Any]:
    return {
        "dloss_ptr": dloss,
        "dloss_stride": 0 if dloss is None or dloss.dim() == 0 else 1,
        "dx_ptr": dlogits,
        "dx_stride": 0 if dlogits is None else dlogits.stride(0),
        "TOGETHER": aligned,
        "FILLED": filled,
    }


def _aligned_alike(logits: Tensor, dlogits: Tensor) -> bool:
    """Whether each row of the gradient lies at the same offset from a 16-byte boundary as its row of logits."""
    pitch = (logits.stride(0) - dlogits.stride(0)) * logits.element_size()
    return (logits.data_ptr() - dlogits.data_ptr()) % 16 == 0 and (pitch % 16 == 0 or logits.shape[0] <= 1)


def _alignment(x: Tensor) -> int:
    """The bytes, up to 16, of which the address of each row of a matrix is a multiple."""
    pitch = x.stride(0) * x.element_size() if x.shape[0] > 1 else 0
    return math.gcd(x.data_ptr(), pitch, 16)


def _prepare(arguments: dict[str, Any], divisor: bool, device: launch.Device) -> None:
    """Compute the divisor of the mean, if it is wanted, and the sum of the class weights, if smoothing needs it."""
    weighted = arguments["SMOOTH"] and arguments["weight_ptr"] is not None
    arguments["weight_sum_ptr"] = arguments["weight_ptr"].new_empty(()) if weighted else None
    if divisor or weighted:
        wanted = arguments | {
            "denominator_ptr": arguments["denominator_ptr"] if divisor else None,
            "BLOCK": finish.BLOCK,
        }
        launch.run(finish.prepare_kernel, (1,), wanted, finish.THREADS, device)


def _forward_rows(arguments: dict[str, Any], rows: launch.Rows, device: launch.Device) -> None:
    if rows.lanes:
        tile = _short_tile(rows)
        programs = triton.cdiv(arguments["N"], tile["ROWS"])
        launch.run(short_row_kernel, (programs,), arguments | tile, rows.threads, device)
        return
    n, splits = arguments["N"], rows.splits
    chosen = arguments | {"BLOCK": rows.block, "RESIDENT": rows.resident, "splits": splits}
    if splits == 1:
        launch.run(row_kernel, (n,), chosen, rows.threads, device)
        return
    chosen["partial_ptr"] = arguments["token_loss_ptr"].new_empty(n * splits * PARTIALS)
    chosen["ENTROPY"], chosen["RANK"] = arguments["entropy_ptr"] is not None, arguments["rank_ptr"] is not None
    launch.run(split_kernel, (n, splits), chosen, rows.threads, device)
    chosen["PARTS"] = triton.next_power_of_2(splits)
    launch.run(combine_kernel, (n,), chosen, device.warp_size, device)
    if arguments["dx_ptr"] is not None:
        _gradient_rows(arguments, rows, device)


def _gradient_rows(arguments: dict[str, Any], rows: launch.Rows, device: launch.Device) -> None:
    # A gradient that is there already shall cost no more than a few programs that find that out.
    most = 8 * device.processors if arguments["FILLED"] else 2**31 - 1
    if rows.lanes:
        tile = _short_tile(rows)
        programs = triton.cdiv(arguments["N"], tile["ROWS"])
        launch.run(short_gradient_kernel, (min(programs, most),), arguments | tile, rows.threads, device)
        return
    chosen = arguments | {"BLOCK": rows.block, "splits": rows.splits}
    launch.run(gradient_kernel, (min(arguments["N"] * rows.splits, most),), chosen, rows.threads, device)


def _short_tile(rows: launch.Rows) -> dict[str, int]:
    """The shape of the tile of a program that has several rows."""
    groups = rows.block // (rows.lanes * rows.vector)
    return {"GROUPS": groups, "ROWS": rows.threads // rows.lanes, "LANES": rows.lanes, "VEC": rows.vector}
