"""A teacher's top K in one canonical form, whatever was stored: tempered, without duplicates, ordered by id."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xentile.reference.cross_entropy import accumulation_dtype


class Support(NamedTuple):
    """Of N tokens, the columns that the teacher names, and its masses on them."""

    ids: Tensor  # (N, K) int32, ascending; absent entries are num_classes, at the end
    logprobs: Tensor  # (N, K) log-masses at the temperature; -inf where absent
    tail: Tensor  # (N,) log-mass of all other columns; -inf unless the support is tail_bucket
    mass: Tensor  # (N,) what the teacher gives to the K columns at the temperature; NaN where that is not known


def topk_support(
    ids: Tensor,
    logprobs: Tensor,
    log_z: Tensor | None = None,
    tail_logprob: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    *,
    num_classes: int,
    support: str,
    duplicates: str = "sum",
    fallback: str = "none",
) -> Support:
    """From ids (N, K), logprobs (N, K) at temperature 1, log_z and tail_logprob (N,), temperature () or (N,).

    With l the log-probabilities, u = l / T, and P the mass of the entries:

        truncated, tail_bucket              log p = u - log Z(T); the tail is what is left
        teacher_renormalized, renormalized  log p = u - logsumexp(u)
        sampled                             log p = l: weights that the temperature does not change

    An entry is absent if its id is negative or its logprob -inf. Equal ids become one entry, at temperature 1, where
    masses add. Ids from num_classes on are columns that the student lacks: they belong to the tail.
    """
    dtype = accumulation_dtype(logprobs.dtype)
    rows = ids.shape[0]
    t = torch.as_tensor(temperature, dtype=torch.float64, device=ids.device).expand(rows)
    key, log_p, repeated = _merged(ids.long(), logprobs.double(), duplicates)
    present = log_p != -torch.inf
    inside = present & (key < num_classes)
    u = log_p if support == "sampled" else log_p / t[:, None]
    total = _log_sum(u, present)
    mass = torch.full_like(total, torch.nan)
    tail = torch.full_like(total, -torch.inf)
    if support == "sampled":
        mass = _log_sum(u, inside).exp()
    elif support in ("teacher_renormalized", "renormalized"):
        if log_z is not None:
            mass = _log_sum(u - log_z.double()[:, None], inside).exp()
        mass = torch.where(t == 1, _log_sum(log_p, inside).exp(), mass)
        u = u - _log_sum(u, inside)[:, None]
    else:
        given = None if tail_logprob is None else tail_logprob.double()
        log_sum, tail = _normaliser(u, log_p, present, total, log_z, given, t, num_classes, fallback)
        u = u - log_sum[:, None]
        mass = _log_sum(u, inside).exp()
        tail = torch.logaddexp(tail, _log_sum(u, present & ~inside))
        tail = tail if support == "tail_bucket" else torch.full_like(tail, -torch.inf)

    order = torch.sort(torch.where(inside, key, num_classes), dim=1, stable=True)
    u = torch.where(inside, u, -torch.inf).gather(1, order.indices)
    if duplicates == "refuse":
        u, tail, mass = (v.masked_fill(repeated.reshape(-1, *[1] * (v.dim() - 1)), torch.nan) for v in (u, tail, mass))
    return Support(order.values.int(), u.to(dtype), tail.to(dtype), mass.to(dtype))


def _merged(ids: Tensor, logprobs: Tensor, duplicates: str) -> tuple[Tensor, Tensor, Tensor]:
    """Entries by id, log-mass at the first of equal ids and -inf at the others; and which rows (N,) had such."""
    absent = (ids < 0) | (logprobs == -torch.inf)
    key = torch.where(absent, torch.iinfo(torch.int64).max, ids)
    key, order = torch.sort(key, dim=1, stable=True)
    log_p = torch.where(absent, -torch.inf, logprobs).gather(1, order)
    again = torch.zeros_like(absent)
    again[:, 1:] = (key[:, 1:] == key[:, :-1]) & (log_p[:, 1:] != -torch.inf)
    if duplicates == "sum":
        slot = (~again).cumsum(1) - 1  # which of the different ids an entry belongs to
        top = torch.full_like(log_p, -torch.inf).scatter_reduce(1, slot, log_p, "amax")
        shift = torch.where(top.isfinite(), top, 0.0)
        sums = torch.zeros_like(log_p).scatter_add(1, slot, torch.exp(log_p - shift.gather(1, slot)))
        log_p = (shift + sums.log()).gather(1, slot)
    return key, torch.where(again, -torch.inf, log_p), again.any(1)


def _normaliser(
    u: Tensor,
    log_p: Tensor,
    present: Tensor,
    total: Tensor,
    log_z: Tensor | None,
    given: Tensor | None,
    t: Tensor,
    num_classes: int,
    fallback: str,
) -> tuple[Tensor, Tensor]:
    """(log Z, log of the tail's mass), (N,), from what is known or by the named fallback."""
    stored = torch.zeros_like(t) if log_z is None else log_z.double()
    tail = _log_rest(total - stored) if given is None else given
    if log_z is not None or fallback == "none":
        return stored, tail
    log_sum, guess = total, torch.full_like(total, -torch.inf)
    if fallback == "uniform_tail":
        tail_1 = _log_rest(_log_sum(log_p, present)) if given is None else given
        others = (num_classes - present.sum(1)).clamp(min=0).double()
        guess = torch.where(others > 0, others.log() * (1 - 1 / t) + tail_1 / t, -torch.inf)
        log_sum = torch.logaddexp(total, guess)
        guess = guess - log_sum
    exact = t == 1
    return torch.where(exact, 0.0, log_sum), torch.where(exact, tail, guess)


def _log_sum(x: Tensor, where: Tensor) -> Tensor:
    return torch.logsumexp(x.masked_fill(~where, -torch.inf), 1)


def _log_rest(log_mass: Tensor) -> Tensor:
    """log(1 - mass), -inf where the mass is 1 or, by the rounding of what was stored, more."""
    return torch.where(
        log_mass < 0, torch.log(-torch.expm1(log_mass)), torch.where(log_mass >= 0, -torch.inf, log_mass)
    )
