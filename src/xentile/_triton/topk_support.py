"""Kernel and launcher of `topk_support`, with its schema's signature; what it means: reference/support.py.

A row has at most 1024 entries, so everything about it fits in the registers of a few warps: a sort of (id, position),
and sums in double, because log(1 - mass) of a stored mass near 1 has no digits to lose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from xentile import _layout as layout
from xentile._triton import launch

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = tl.constexpr(1024)  # the largest K
ABSENT = tl.constexpr(2**53 - 1)  # the id that sorts last; larger ids than this less 1, of no vocabulary, are one id


@triton.jit
def log_sum(x, where):
    """Logsumexp of those of the doubles x; -inf of none."""
    x = tl.where(where, x, float("-inf"))
    top = tl.max(x, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(tl.sum(tl.exp(x - top), 0))


@triton.jit
def log_add(a, b):
    top = tl.maximum(a, b)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return shift + tl.log(tl.exp(a - shift) + tl.exp(b - shift))


@triton.jit
def log_rest(log_mass):
    """log(1 - mass); -inf where the stored masses sum to 1 or more."""
    return tl.where(log_mass >= 0.0, float("-inf"), tl.log(1.0 - tl.exp(log_mass)))


@triton.jit
def read_entry(id_ptr, logprob_ptr, i, mask):
    """(id, log-mass in double) of the entries i of a row; ABSENT and -inf where there is none."""
    column = tl.load(id_ptr + i, mask=mask, other=-1).to(tl.int64)
    log_p = tl.load(logprob_ptr + i, mask=mask, other=float("-inf")).to(tl.float64)
    present = (column >= 0) & (log_p != float("-inf"))
    column = tl.where(present, tl.minimum(column, ABSENT - 1), ABSENT)
    return column, tl.where(present, log_p, float("-inf"))


@triton.jit
def log_sum_of_equals(column, id_ptr, logprob_ptr, K):
    """For each id the logsumexp of all entries of the row that have it. Twice K steps, in rows with duplicates only."""
    top = tl.full(column.shape, float("-inf"), tl.float64)
    for j in range(K):
        other, log_p = read_entry(id_ptr, logprob_ptr, j, j < K)
        top = tl.where(other == column, tl.maximum(top, log_p), top)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros(column.shape, tl.float64)
    for j in range(K):
        other, log_p = read_entry(id_ptr, logprob_ptr, j, j < K)
        total += tl.where(other == column, tl.exp(log_p - shift), 0.0)
    return shift + tl.log(total)


@triton.jit
def normalizer(u, log_p, present, log_z, given, t, V, FALLBACK: tl.constexpr):
    """(log Z, log of the tail's mass) of the supports that are not renormalised, from what is known, or the fallback.

    log_z, given: of the row, None where they were not stored; given is the tail's.
    """
    stored = t * 0.0
    if log_z is not None:
        stored = log_z
    total = log_sum(u, present)
    tail = log_rest(total - stored)
    if given is not None:
        tail = given
    if log_z is None and FALLBACK != "none":
        log_total = total
        guess = t * 0.0 + float("-inf")
        if FALLBACK == "uniform_tail":
            tail_1 = log_rest(log_sum(log_p, present))
            if given is not None:
                tail_1 = given
            others = tl.maximum(V - tl.sum(present.to(tl.int32), 0), 0).to(tl.float64)
            spread = tl.log(tl.maximum(others, 1.0)) * (1.0 - 1.0 / t) + tail_1 / t
            spread = tl.where(others > 0.0, spread, float("-inf"))
            log_total = log_add(total, spread)
            guess = spread - log_total
        tail = tl.where(t == 1.0, tail, guess)
        stored = tl.where(t == 1.0, 0.0, log_total)
    return stored, tail


@triton.jit(do_not_specialize=["K", "V"])
def support_kernel(
    id_ptr, logprob_ptr, log_z_ptr, tail_logprob_ptr, temperature_ptr,
    sorted_id_ptr, sorted_logprob_ptr, tail_ptr, mass_ptr, K, V, temperature,
    SUPPORT: tl.constexpr, DUPLICATES: tl.constexpr, FALLBACK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a row of K entries; WIDTH is the power of two from K on."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    column, log_p = read_entry(id_ptr + row * K, logprob_ptr + row * K, i, i < K)
    order = tl.sort(column * POSITIONS + i)
    column = order // POSITIONS
    log_p = tl.gather(log_p, (order % POSITIONS).to(tl.int32), 0)
    again = (i > 0) & (column < ABSENT) & (tl.gather(column, tl.maximum(i - 1, 0), 0) == column)
    repeated = tl.max(again.to(tl.int32), 0) > 0
    if repeated & (DUPLICATES == "sum"):
        log_p = log_sum_of_equals(column, id_ptr + row * K, logprob_ptr + row * K, K)
    present = (column < ABSENT) & (again == 0)
    inside = present & (column < V)

    t = tl.zeros([], tl.float64) + temperature
    if temperature_ptr is not None:
        t = tl.load(temperature_ptr + row).to(tl.float64)
    u = log_p if SUPPORT == "sampled" else log_p / t
    log_z = tl.load(log_z_ptr + row).to(tl.float64) if log_z_ptr is not None else None
    tail = t * 0.0 + float("-inf")
    if SUPPORT == "sampled":
        log_mass = log_sum(u, inside)
    elif SUPPORT == "teacher_renormalized" or SUPPORT == "renormalized":
        log_mass = t * float("nan")  # what was not stored, no renormalised mass tells
        if log_z_ptr is not None:
            log_mass = log_sum(u - log_z, inside)
        log_mass = tl.where(t == 1.0, log_sum(log_p, inside), log_mass)
        u -= log_sum(u, inside)
    else:
        given = tl.load(tail_logprob_ptr + row).to(tl.float64) if tail_logprob_ptr is not None else None
        log_total, rest = normalizer(u, log_p, present, log_z, given, t, V, FALLBACK)
        u -= log_total
        log_mass = log_sum(u, inside)
        if SUPPORT == "tail_bucket":
            tail = log_add(rest, log_sum(u, present & (inside == 0)))
    poison = tl.where(repeated, float("nan"), 0.0) if DUPLICATES == "refuse" else 0.0

    # Sorted but for the holes that duplicates leave: what counts moves up, the absent ones follow.
    counts = inside.to(tl.int32)
    absent = 1 - counts
    place = tl.where(inside, tl.cumsum(counts, 0) - 1, tl.sum(counts, 0) + tl.cumsum(absent, 0) - 1)
    out = row * K + place
    tl.store(sorted_id_ptr + out, tl.where(inside, column, V).to(tl.int32), mask=place < K)
    tl.store(sorted_logprob_ptr + out, (tl.where(inside, u, float("-inf")) + poison).to(tl.float32), mask=place < K)
    tl.store(tail_ptr + row, (tail + poison).to(tl.float32))
    tl.store(mass_ptr + row, (tl.exp(log_mass) + poison).to(tl.float32))


def topk_support(
    ids: Tensor,
    logprobs: Tensor,
    log_z: Tensor | None,
    tail_logprob: Tensor | None,
    token_temperature: Tensor | None,
    sorted_ids: Tensor,
    sorted_logprobs: Tensor,
    tail: Tensor,
    mass: Tensor,
    num_classes: int,
    support: int,
    duplicates: int,
    fallback: int,
    temperature: float,
) -> None:
    """Fill sorted_ids, sorted_logprobs (N, K), tail and mass (N,) from ids and logprobs (N, K)."""
    rows, k = ids.shape
    if rows == 0:
        return
    device = launch.device_of(ids)
    width = triton.next_power_of_2(k)
    arguments = {
        "id_ptr": ids,
        "logprob_ptr": logprobs,
        "log_z_ptr": log_z,
        "tail_logprob_ptr": tail_logprob,
        "temperature_ptr": token_temperature,
        "sorted_id_ptr": sorted_ids,
        "sorted_logprob_ptr": sorted_logprobs,
        "tail_ptr": tail,
        "mass_ptr": mass,
        "K": k,
        "V": num_classes,
        "temperature": temperature,
        "SUPPORT": layout.SUPPORTS[support],
        "DUPLICATES": layout.DUPLICATES[duplicates],
        "FALLBACK": layout.FALLBACKS[fallback],
        "WIDTH": width,
    }
    with launch.guard(ids):
        # Four entries a thread: a sort of them is an exchange within a warp up to K = 128.
        launch.run(support_kernel, (rows,), arguments, max(device.warp_size, width // 4), device)
