"""Kernel and launcher of `teacher_topk`, with its schema's signature; what it means: reference/teacher.py.

The logits are read once, for the top K and for the masses at temperature 1, and once more for each other temperature;
the host does not know which these are. That the tail is what is not in the top K is seen to afterwards:
teacher_span.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from xentile._triton import launch
from xentile._triton.epilogue import UNSPECIALIZED
from xentile._triton.row import LOG2E, transform
from xentile._triton.span import cut
from xentile._triton.teacher_keys import EVERYTHING, column_of, logit_of
from xentile._triton.teacher_selection import list_slots, lower_bound, select, slot_keys
from xentile._triton.teacher_span import is_broken, leave_out, reduce_tiles, scale_of, tail_of
from xentile._triton.topk_divergence import exp_of, log1p

if TYPE_CHECKING:
    from torch import Tensor

INTEGERS = [*UNSPECIALIZED, "K", "temperatures", "limit", "room"]


@triton.jit
def read_top(candidate_ptr, K, logit_scale, softcap, KEPT: tl.constexpr, TRANSFORM: tl.constexpr):
    """(keys, last, z, z_0) of the top K [KEPT] that `select` has left: z from rank K on is -inf, z_0 the largest."""
    rank = tl.arange(0, KEPT)
    keys = tl.load(candidate_ptr + rank, mask=rank < K, other=EVERYTHING)
    z = transform(logit_of(keys), logit_scale, softcap, TRANSFORM)
    z = tl.where(rank < K, z, float("-inf"))
    return keys, tl.min(keys, 0), z, tl.sum(tl.where(rank == 0, z, 0.0), 0)


@triton.jit
def log_masses(z, z_0, tail, temperature):
    """(log of the sum of exp((z - z_0) / T) over the row, log of the tail's share of it); tail: from `tail_of`."""
    others = tl.where(tl.arange(0, z.shape[0]) > 0, z - z_0, float("-inf"))
    top, total = tail
    top = tl.div_rn(top - z_0, temperature)
    inside = tl.sum(exp_of(tl.div_rn(others, temperature)), 0)  # without the first, which is 1
    outside = total * exp_of(top)
    log_sum = log1p(inside + outside)
    # Either of the two loses digits where the other is used: next to a share of 1, and where `outside` is 0 in float32.
    dominates = outside > 1.0 + inside
    share = -log1p((1.0 + inside) / tl.where(dominates, outside, 1.0))
    return log_sum, tl.where(dominates, share, tl.log(total) + top - log_sum)


@triton.jit
def write_top(id_ptr, logprob_ptr, row, K, ids, logprobs):
    rank = tl.arange(0, ids.shape[0])
    tl.store(id_ptr + row * K + rank, ids, mask=rank < K)
    tl.store(logprob_ptr + row * K + rank, logprobs, mask=rank < K)


@triton.jit
def write_masses(log_z_ptr, tail_ptr, row, temperatures, log_z, tail):
    for t in range(temperatures):
        tl.store(log_z_ptr + row * temperatures + t, log_z)
        tl.store(tail_ptr + row * temperatures + t, tail)


@triton.jit(do_not_specialize=INTEGERS)
def teacher_kernel(
    x_ptr, id_ptr, logprob_ptr, log_z_ptr, tail_ptr, slot_ptr, candidate_ptr, search_ptr,
    V, K, x_stride: tl.int64, temperatures, limit, room, softcap, logit_scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """One program a row: the top K, and the masses as if all temperatures were 1.

    Scratch: slot_ptr (N, limit) the slots that were read again; candidate_ptr (N, room), of which the first K are the
    top keys in the end; search_ptr (N, 2) the bound and how many slots reach it.
    """
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * x_stride
    head, body = cut(x_row, V, VEC)
    m, best, r = reduce_tiles(x_row, head, body, LOG2E, logit_scale, softcap, BLOCK, VEC, TRANSFORM)
    if is_broken(x_row, m, r, head, body, V, logit_scale, softcap, VEC, TRANSFORM):
        nan = tl.full([KEPT], float("nan"), tl.float32)
        write_top(id_ptr, logprob_ptr, row, K, tl.arange(0, KEPT), nan)
        write_masses(log_z_ptr, tail_ptr, row, temperatures, float("nan"), float("nan"))
    else:
        slot_ptr += row * limit
        candidate_ptr += row * room
        keys = slot_keys(m, best, head, body, VEC)
        low = lower_bound(keys, K, limit)
        out = keys >= low
        others = leave_out(m, r, out, LOG2E, logit_scale, softcap, TRANSFORM)
        listed = list_slots(slot_ptr, out, WIDTH)
        tl.store(search_ptr + row * 2, low)
        tl.store(search_ptr + row * 2 + 1, listed.to(tl.int64))
        select(x_row, slot_ptr, listed, low, candidate_ptr, head, body, V, BLOCK, VEC, WIDTH, KEPT)
        top_keys, last, z, z_0 = read_top(candidate_ptr, K, logit_scale, softcap, KEPT, TRANSFORM)
        tail = tail_of(
            x_row, others, slot_ptr, listed, last, head, body, V, LOG2E, logit_scale, softcap,
            BLOCK, VEC, WIDTH, TRANSFORM,
        )  # fmt: skip
        log_sum, log_tail = log_masses(z, z_0, tail, 1.0)
        write_top(id_ptr, logprob_ptr, row, K, column_of(top_keys), z - z_0 - log_sum)
        write_masses(log_z_ptr, tail_ptr, row, temperatures, 0.0, log_tail)


@triton.jit(do_not_specialize=INTEGERS)
def tempered_kernel(
    x_ptr, temperature_ptr, logprob_ptr, log_z_ptr, tail_ptr, slot_ptr, candidate_ptr, search_ptr,
    V, K, x_stride: tl.int64, temperatures, limit, room, softcap, logit_scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr, TRANSFORM: tl.constexpr,
):  # fmt: skip
    """Program (n, t): the masses of row n at temperature t, if that is not 1. Scratch as the other kernel left it."""
    VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    temperature = tl.load(temperature_ptr + tl.program_id(1))
    if temperature != 1.0:
        row = tl.program_id(0).to(tl.int64)
        log_sum_1 = -tl.load(logprob_ptr + row * K)
        if log_sum_1 == log_sum_1:
            c = scale_of(temperature)
            slot_ptr += row * limit
            x_row = x_ptr + row * x_stride
            head, body = cut(x_row, V, VEC)
            low = tl.load(search_ptr + row * 2)
            listed = tl.load(search_ptr + row * 2 + 1).to(tl.int32)
            m, best, r = reduce_tiles(x_row, head, body, c, logit_scale, softcap, BLOCK, VEC, TRANSFORM)
            out = slot_keys(m, best, head, body, VEC) >= low
            others = leave_out(m, r, out, c, logit_scale, softcap, TRANSFORM)
            _, last, z, z_0 = read_top(candidate_ptr + row * room, K, logit_scale, softcap, KEPT, TRANSFORM)
            tail = tail_of(
                x_row, others, slot_ptr, listed, last, head, body, V, c, logit_scale, softcap,
                BLOCK, VEC, WIDTH, TRANSFORM,
            )  # fmt: skip
            log_sum, log_tail = log_masses(z, z_0, tail, temperature)
            at = row * temperatures + tl.program_id(1)
            tl.store(log_z_ptr + at, log_sum - tl.div_rn(log_sum_1, temperature))
            tl.store(tail_ptr + at, log_tail)


def teacher_topk(
    logits: Tensor,
    temperatures: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    log_z: Tensor,
    tail_logprob: Tensor,
    softcap: float,
    logit_scale: float,
    *,
    rows: launch.Rows | None = None,
) -> None:
    """Fill ids, logprobs (N, K), log_z, tail_logprob (N, T). `rows` overrides the choice of the launch, for tests."""
    n, v = logits.shape
    if n == 0:
        return
    k = ids.shape[1]
    device = launch.device_of(logits)
    rows = rows or choose_rows(n, v, k, logits.element_size(), device)
    limit = max(16, k + k // 4)  # narrowing the search by one step costs as much as reading some slots again
    kept = max(16, triton.next_power_of_2(k))
    width = rows.threads
    room = kept + max(width, 32)  # what was kept, and a tile; or the edges, before the first tile
    arguments = {
        "x_ptr": logits,
        "temperature_ptr": temperatures,
        "id_ptr": ids,
        "logprob_ptr": logprobs,
        "log_z_ptr": log_z,
        "tail_ptr": tail_logprob,
        "slot_ptr": torch.empty((n, limit), dtype=torch.int32, device=logits.device),
        "candidate_ptr": torch.empty((n, room), dtype=torch.int64, device=logits.device),
        "search_ptr": torch.empty((n, 2), dtype=torch.int64, device=logits.device),
        "V": v,
        "K": k,
        "x_stride": logits.stride(0),
        "temperatures": temperatures.shape[0],
        "limit": limit,
        "room": room,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "BLOCK": rows.block,
        "WIDTH": width,
        "KEPT": kept,
        "TRANSFORM": "softcap" if softcap else "scale" if logit_scale != 1 else "identity",
    }
    with launch.guard(logits):
        launch.run(teacher_kernel, (n,), arguments, rows.threads, device, rows.registers)
        launch.run(tempered_kernel, (n, temperatures.shape[0]), arguments, rows.threads, device)


def choose_rows(n: int, v: int, k: int, itemsize: int, device: launch.Device) -> launch.Rows:
    """How n rows of v logits are launched for their k largest."""
    share = 2 * launch.IN_FLIGHT // itemsize
    # Eight slots a thread, because what is done once a row costs half as much with half the threads. So there are
    # eight slots or more for each of the k at 256 threads, and those read again are a small part of the row. More
    # threads for a larger k, and for a row that has a processor to itself.
    threads = 512 if k > 256 or n <= device.processors else 256
    threads = min(threads, triton.next_power_of_2(triton.cdiv(v, share)))
    threads = max(device.warp_size, threads, triton.next_power_of_2(k) // 4)  # the sort is of twice as many keys
    # So a processor has room for two rows of 256 threads; Triton 3.6's compiler would rather have three, and spill.
    return launch.Rows(threads * share, threads, registers=128 if threads >= 256 else 0)
