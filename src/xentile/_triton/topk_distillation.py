"""Launchers of `topk_distillation` and its backward, with their schemas' signatures.

A forward is at most three launches, without a synchronisation: the divisor (only if the gradient needs one), the rows,
and the loss with the sums of the sketches. A long row is always one program's in the forward, also if there are few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from xentile import _layout as layout
from xentile._triton import finish, launch
from xentile._triton.cross_entropy import _aligned_alike
from xentile._triton.topk_rows import topk_finish_kernel, topk_gradient_kernel, topk_row_kernel

if TYPE_CHECKING:
    from torch import Tensor


def topk_distillation(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    token_temperature: Tensor | None,
    group_ids: Tensor | None,
    loss: Tensor,
    denominator: Tensor,
    kd_loss: Tensor,
    token_loss: Tensor,
    student_mass: Tensor,
    rest: Tensor,
    sketch: Tensor | None,
    kd_sketch: Tensor | None,
    dlogits: Tensor | None,
    ignore_index: int,
    reduction: int,
    support: int,
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
    rows: launch.Rows | None = None,
) -> None:
    """Fill the outputs. `rows` overrides the choice of the launch, for tests."""
    n, v = logits.shape
    device = launch.device_of(logits)
    kind = layout.REDUCTIONS[reduction]
    prepared = kind == "mean" and dlogits is not None and normalizer is None
    aligned = dlogits is not None and _aligned_alike(logits, dlogits)
    twice = target is not None and (token_temperature is not None or temperature != 1)
    rows = rows or forward_rows(n, v, ids.shape[1], logits.element_size(), dlogits is not None, twice, device)
    arguments = _inputs(logits, ids, logprobs, tail, target, token_weight, token_temperature, ignore_index)
    scalars = (support, divergence, beta, temperature, temperature_squared, kd_weight, ce_weight, softcap, logit_scale)
    arguments |= _options(target, token_temperature, *scalars)
    arguments |= {
        "N": n,
        "zero_if_empty": int(zero_if_empty),
        "normalizer_ptr": denominator if prepared else normalizer if kind == "mean" else None,
        "weight_ptr": None,
        "weight_sum_ptr": None,
        "group_ptr": group_ids,
        "row_loss_ptr": loss if kind == "none" else torch.empty_like(kd_loss),
        "kd_loss_ptr": kd_loss,
        "token_loss_ptr": token_loss,
        "mass_ptr": student_mass,
        "rest_ptr": rest,
        "loss_ptr": loss,
        "denominator_ptr": denominator,
        "sketch_ptr": sketch,
        "kd_sketch_ptr": kd_sketch,
        "groups": 1 if sketch is None else sketch.shape[0],
        "kd_groups": 1 if kd_sketch is None else kd_sketch.shape[0],
        "BITS": _bits(sketch),
        "KD_BITS": _bits(kd_sketch),
        "GROUPED": group_ids is not None and any(s is not None and s.shape[0] > 1 for s in (sketch, kd_sketch)),
        "REDUCTION": kind,
        "PREPARED": prepared,
        "dx_ptr": dlogits,
        "dx_stride": 0 if dlogits is None else dlogits.stride(0),
        "TOGETHER": aligned,
    }
    with launch.guard(logits):
        if prepared:
            launch.run(finish.prepare_kernel, (1,), arguments | {"BLOCK": finish.BLOCK}, finish.THREADS, device)
        if n > 0:
            words = _bitmap_words(v, rows.block, 16 // logits.element_size())
            bitmap = torch.empty((n, words), dtype=torch.int32, device=logits.device)
            chosen = arguments | {"bitmap_ptr": bitmap, "words": words, "BLOCK": rows.block}
            launch.run(topk_row_kernel, (n,), chosen, rows.threads, device, rows.registers)
        tiles = triton.cdiv(n, finish.BLOCK) if sketch is not None or kd_sketch is not None else 1
        chosen = arguments | {"BLOCK": finish.BLOCK}
        launch.run(topk_finish_kernel, (max(1, tiles),), chosen, 2 * finish.THREADS, device)  # for two sketches


def topk_distillation_backward(
    dloss: Tensor,
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    token_temperature: Tensor | None,
    denominator: Tensor,
    token_loss: Tensor,
    rest: Tensor,
    dlogits: Tensor,
    ignore_index: int,
    reduction: int,
    support: int,
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
    rows: launch.Rows | None = None,
) -> None:
    """Fill dlogits, unless it is `filled` for a dloss of 1 and that is what dloss is.

    `rows` overrides the choice of the launch, for tests.
    """
    n, v = logits.shape
    if n == 0:
        return
    device = launch.device_of(logits)
    # In place, a part of a row would overwrite the logits of the support that the others still need.
    whole = dlogits.data_ptr() == logits.data_ptr()
    rows = rows or backward_rows(v, logits.element_size(), whole, device)
    arguments = _inputs(logits, ids, logprobs, tail, target, token_weight, token_temperature, ignore_index)
    scalars = (support, divergence, beta, temperature, temperature_squared, kd_weight, ce_weight, softcap, logit_scale)
    arguments |= _options(target, token_temperature, *scalars)
    arguments |= {
        "N": n,
        "dloss_ptr": dloss,
        "dloss_stride": 0 if dloss.dim() == 0 else 1,
        "normalizer_ptr": denominator,
        "rest_ptr": rest,
        "dx_ptr": dlogits,
        "dx_stride": dlogits.stride(0),
        "TOGETHER": _aligned_alike(logits, dlogits),
        "FILLED": filled,
        "BLOCK": rows.block,
        "splits": rows.splits,
    }
    # A gradient that is there already shall cost no more than a few programs that find that out.
    most = 8 * device.processors if filled else 2**31 - 1
    with launch.guard(logits):
        launch.run(topk_gradient_kernel, (min(n * rows.splits, most),), arguments, rows.threads, device)


def _inputs(
    logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    token_temperature: Tensor | None,
    ignore_index: int,
) -> dict[str, Any]:
    return {
        "x_ptr": logits,
        "x_stride": logits.stride(0),
        "V": logits.shape[1],
        "id_ptr": ids,
        "logprob_ptr": logprobs,
        "tail_ptr": tail,
        "K": ids.shape[1],
        "WIDTH": triton.next_power_of_2(ids.shape[1]),
        "target_ptr": target,
        "token_weight_ptr": token_weight,
        "temperature_ptr": token_temperature,
        "ignore_index": ignore_index,
    }


def _options(
    target: Tensor | None,
    token_temperature: Tensor | None,
    support: int,
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
        "SUPPORT": layout.SUPPORTS[support],
        "DIVERGENCE": layout.DIVERGENCES[divergence],
        "beta": beta,
        "temperature": temperature,
        "TEMPERED": token_temperature is not None or temperature != 1,
        "SQUARED": temperature_squared,
        "kd_weight": kd_weight,
        "ce_weight": ce_weight,
        "CE": target is not None and ce_weight != 0,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "TRANSFORM": "softcap" if softcap else "scale" if logit_scale != 1 else "identity",
    }


def _bits(sketch: Tensor | None) -> int:
    return 0 if sketch is None else layout.Layout.of_width(sketch.shape[1]).mantissa_bits


def _bitmap_words(v: int, block: int, vec: int) -> int:
    """int32 numbers a row of the bitmap of groups that topk_span.py keeps: one for 32 groups, in whole chunks."""
    return triton.cdiv(v, 8 * block) * (block // vec // 4)


def forward_rows(
    n: int, v: int, k: int, itemsize: int, gradient: bool, twice: bool, device: launch.Device
) -> launch.Rows:
    """How n rows of v logits against k columns are launched. twice: two exponentials a logit."""
    share = launch.IN_FLIGHT // itemsize
    if n < device.processors:
        threads = 1024
    elif gradient:  # as many rows at once as the cache has room for, which is what `launch.forward` counts
        threads = launch.forward(4 * device.processors, v, itemsize, True, False, False, device).threads
    else:
        threads = 128 if n >= 4 * device.processors else 512
    registers = 0
    if twice:
        share //= 2  # two more numbers a slot
    if (twice or threads == 1024) and threads // 2 >= k:
        # Half the threads have registers for as many bytes in flight, and what is done once a row costs half as much.
        # That needs a few more than 64 at two exponentials a logit; a thread has at most one column of the support.
        threads, share, registers = threads // 2, 2 * share, 128
    # Not more than the row needs, and the groups of the support are a tile too: of 16 bytes for each of its columns.
    needed = max(device.warp_size, min(threads, triton.next_power_of_2(triton.cdiv(v, share))), k // 2)
    needed = triton.next_power_of_2(needed)
    return launch.Rows(needed * share, needed, registers=registers if needed == threads else 0)


def backward_rows(v: int, itemsize: int, whole: bool, device: launch.Device) -> launch.Rows:
    """For the gradient from what the forward saved. whole: a row is one program's."""
    share = launch.IN_FLIGHT // itemsize
    threads = max(device.warp_size, min(256 if whole else 128, triton.next_power_of_2(triton.cdiv(v, share))))
    # Each program repeats what is to be done once a row; 16 tiles pay for it.
    return launch.Rows(threads * share, threads, 1 if whole else triton.cdiv(v, 16 * threads * share))
