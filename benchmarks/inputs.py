"""Random inputs of a case: the logits first, then what its operation takes beside them.

forward, training    logits (N, V), target (N,)
topk_distillation    logits, target, ids (N, K), logprobs (N, K), log_z (N,), tail (N,)
distillation         logits, teacher_logits (N, V)
teacher_topk         logits
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.cases import Case

Inputs = tuple[Tensor, ...]


def make_inputs(case: Case, seed: int, device: str, ignored: float = 0.0) -> Inputs:
    """Inputs of the case's operation, equal for equal seeds; `ignored` of the targets (int64), if any, are -100.

    The target's logit is raised by 0 to 20 nats, row by row: token losses then run from above ln V to far below 1e-3,
    and the target is the row's maximum in some rows and not in others, as it is while a model trains.
    """
    generator = torch.Generator(device).manual_seed(seed)
    n, v = case.tokens, case.vocab
    logits = torch.randn(n, v, generator=generator, dtype=case.torch_dtype, device=device).mul_(2)
    target = torch.randint(v, (n,), generator=generator, device=device)
    logits.scatter_add_(1, target[:, None], _raised(case, generator).to(case.torch_dtype))
    if case.operation == "teacher_topk":
        return (logits,)
    if case.operation == "distillation":
        teacher = torch.randn(n, v, generator=generator, dtype=case.torch_dtype, device=device).mul_(2)
        teacher.scatter_add_(1, target[:, None], _raised(case, generator).to(case.torch_dtype))
        return logits, teacher
    if ignored:
        skipped = torch.rand(n, generator=generator, device=device) < ignored
    known = _sparse_teacher(case, target, generator) if case.operation == "topk_distillation" else ()
    return logits, target.masked_fill(skipped, -100) if ignored else target, *known


def _raised(case: Case, generator: torch.Generator) -> Tensor:
    return torch.rand(case.tokens, 1, generator=generator, device=generator.device).mul_(20)


def _sparse_teacher(case: Case, target: Tensor, generator: torch.Generator) -> Inputs:
    """What a cache holds of a teacher whose tail is even: its masses at any temperature are then known exactly, without
    an (N, V) tensor. The target is among the K ids; the others are drawn one from each K-th of the vocabulary, so that
    no two are equal and each is in a cache line of its own, as a teacher's are.
    """
    n, k, width = case.tokens, case.k, case.vocab // case.k
    device = generator.device
    ids = torch.arange(k, device=device) * width + torch.randint(width, (n, k), generator=generator, device=device)
    slot = (target // width).clamp_max(k - 1)[:, None]
    ids.scatter_(1, slot, target[:, None])
    scores = torch.randn(n, k, generator=generator, dtype=torch.float64, device=device).mul_(2)
    scores.scatter_add_(1, slot, _raised(case, generator).double())
    outside = torch.randn(n, 1, generator=generator, dtype=torch.float64, device=device) + math.log(k) / 2
    logprobs, order = torch.log_softmax(torch.cat([scores, outside], 1), 1)[:, :k].sort(1, descending=True)
    rest = torch.log1p(-logprobs.exp().sum(1))
    t = case.temperature
    rest = math.log(case.vocab - k) * (1 - 1 / t) + rest / t
    log_z = torch.logaddexp(torch.logsumexp(logprobs / t, 1), rest)
    return ids.gather(1, order), logprobs.float(), log_z.float(), (rest - log_z).float()
