"""Rows for the top-K distillation operators: ordinary ones, and one of each kind that breaks kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from xentile.reference import distillation_kernels

from .topk_operators import Inputs, Options

PLAIN = Options()


def canonical(ids: Tensor, logprobs: Tensor, size: int, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, logprobs, tail) as `topk_support` makes them of entries at temperature 1."""
    rows = ids.shape[0]
    support = torch.empty_like(ids, dtype=torch.int32), torch.empty(ids.shape)
    tail, mass = torch.empty(rows), torch.empty(rows)
    distillation_kernels.topk_support(
        ids, logprobs, None, None, None, *support, tail, mass, size, options.support, 0, 0, 1.0
    )
    return *support, tail


def random_inputs(
    rows: int,
    size: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    options: Options = PLAIN,
    *,
    seed: int = 0,
    scale: float = 3.0,
    target: bool = True,
) -> Inputs:
    """A teacher that knows something of the student: half of its logits are noise."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=generator) * scale
    teacher = (logits + scale * torch.randn(rows, size, generator=generator)) / 2
    logprobs, ids = teacher.log_softmax(1).topk(min(k, size), 1)
    drawn = torch.randint(0, size, (rows,), generator=generator)
    return Inputs(logits.to(dtype), *canonical(ids, logprobs, size, options), drawn if target else None)


def weighted(inputs: Inputs, groups: int) -> Inputs:
    """With weights and temperatures of tokens, and groups of which one token's does not exist."""
    rows = inputs.logits.shape[0]
    generator = torch.Generator().manual_seed(1)
    group_ids = torch.randint(0, groups, (rows,), generator=generator)
    group_ids[rows // 2] = groups
    return inputs._replace(
        token_weight=torch.rand(rows, generator=generator) + 0.5,
        token_temperature=torch.tensor([1.0, 2.0, 0.75, 4.0]).repeat(rows)[:rows],
        group_ids=group_ids,
    )


def awkward_inputs(size: int, k: int, dtype: torch.dtype, options: Options) -> Inputs:
    """One row of each kind."""
    rows, last = 18, size - 1
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(rows, size, generator=generator) * 3).to(dtype)
    ids = torch.stack([torch.randperm(size, generator=generator)[:k] for _ in range(rows)])
    logprobs = torch.randn(rows, k, generator=generator).log_softmax(1) - 0.125
    target = torch.randint(0, size, (rows,), generator=generator)
    logits[0], target[0] = torch.nan, options.ignore_index  # never read
    target[1], target[2] = size, -5  # out of range
    ids[3] = torch.arange(k)  # the first groups and the head
    ids[4] = torch.arange(size - k, size)  # the last ones and the tail
    ids[5] = torch.arange(k) * max(1, (size - 1) // k)  # far apart
    ids[6] = -1  # nothing
    logprobs[7, k // 2 :] = -torch.inf  # ragged
    target[8] = ids[8, 0]
    ids[9], target[9] = torch.arange(size // 2, size // 2 + k) % size, size // 2 + k  # beside the support, in its group
    target[9] = min(int(target[9]), last)
    logits[10, ids[10, 0]] = 40.0  # saturated on the support
    outside = torch.tensor(sorted(set(range(size)) - set(ids[11].tolist()))[-1:] or [0])
    logits[11, outside] = 40.0  # and outside of it
    logits[12, size // 2], logits[13, ids[13, 0]], logits[14] = torch.nan, torch.inf, -torch.inf
    logits[15, ids[15]] = -torch.inf
    logits[15, last] = 1.0
    logits[16] = 2.5
    logits[17, : size - 1] = -torch.inf
    target[17] = last
    return Inputs(logits, *canonical(ids, logprobs, size, options), target)
