"""Teachers for the tests of the cache, and caches of what they say."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import xentile as xt
from xentile.cache import CacheHeader, TopKCacheWriter

if TYPE_CHECKING:
    from pathlib import Path

VOCAB, K, TEMPERATURES = 500, 16, (1.0, 2.0)


def logits(rows: int, vocab_size: int = VOCAB, seed: int = 0) -> Tensor:
    """Rows of every sharpness, as of a language model: from nearly certain to nearly flat."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.logspace(-1, 1, rows)[torch.randperm(rows, generator=generator)]
    return torch.randn(rows, vocab_size, generator=generator) * sharpness[:, None]


def header(**changes: Any) -> CacheHeader:
    fields: dict[str, Any] = {"teacher": "made up", "vocab_size": VOCAB, "k": K, "temperatures": TEMPERATURES}
    return CacheHeader(**fields | {"has_token_ids": True} | changes)


@functools.cache
def sample(number: int) -> tuple[xt.TeacherTopK, Tensor]:
    """Entries and tokens of a sample, which its number decides."""
    length = 3 + number % 5
    return xt.teacher_topk(logits(length, seed=number), K, temperatures=TEMPERATURES), torch.arange(length) + number


def write(folder: Path, numbers: range, *, rank: int = 0, shard_tokens: int = 20) -> None:
    """Write samples into a cache, those missing in it."""
    with TopKCacheWriter(folder, header(), rank=rank, shard_tokens=shard_tokens) as writer:
        for number in numbers:
            if number not in writer:
                writer.add(number, *sample(number))
