"""Whether a cache is what was written, and whether its rows belong to its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from xentile.cache import index
from xentile.cache.errors import DamagedCacheError
from xentile.cache.progress import progress

if TYPE_CHECKING:
    from pathlib import Path

    from xentile.cache.index import ShardEntry
    from xentile.cache.reader import TopKCache

SHIFTS = (0, 1, 2)
ALIGNMENT_SAMPLES = 256  # enough to tell the shifts apart: the right one is the teacher's accuracy


def damages(cache: TopKCache) -> list[tuple[ShardEntry, DamagedCacheError]]:
    """Read every byte of every shard; the shards that are not what was written, and what is wrong with each."""
    found = []
    with progress("verify", "B", sum(entry.bytes for entry in cache.shards)) as bar:
        for number, entry in enumerate(cache.shards):
            try:
                cache.shard(number).check()
            except DamagedCacheError as error:
                found.append((entry, error))
            bar.update(entry.bytes)
    return found


def unlisted(cache: TopKCache) -> list[Path]:
    """Shards that no index lists: written whole by a writer that was killed before it could say so."""
    listed = {entry.shard for entry in cache.shards}
    return sorted(path for path in cache.folder.glob("shard-*.safetensors") if path.name not in listed)


def drop(cache: TopKCache, damaged: list[ShardEntry]) -> None:
    """Take shards out of the index, so that a writer takes their samples for missing and writes them again.

    Raises:
        ValueError: if a writer is at work on the rank of one of them.
    """
    names = {entry.shard for entry in damaged}
    for rank in cache.ranks:
        if names & {entry.shard for entry in rank.shards}:
            lock = index.Appender(rank.path)
            try:
                index.replace(rank.path, [entry for entry in lock.found.shards if entry.shard not in names])
            finally:
                lock.close(finished=False)


def hits_by_shift(cache: TopKCache) -> dict[int, float] | None:
    """How often the token at i + shift is among the entries of row i, for a few shifts; None without tokens.

    "Row i predicts token i + 1", so the share at shift 1 is high, and that at 0 or 2 about as low as chance. Where that
    is not so, the rows or the tokens were shifted when the cache was written.
    """
    if not cache.header.has_token_ids:
        return None
    counts = dict.fromkeys(SHIFTS, 0)
    rows = 0
    for sample_id in cache.sample_ids[:ALIGNMENT_SAMPLES]:
        entries = cache[sample_id]
        assert entries.token_ids is not None
        compared = len(entries.token_ids) - max(SHIFTS)
        if compared > 0:
            rows += compared
            for shift in SHIFTS:
                tokens = entries.token_ids[shift : shift + compared, None]
                counts[shift] += int(torch.count_nonzero((entries.ids[:compared] == tokens).any(dim=1)))
    return {shift: count / rows for shift, count in counts.items()} if rows else None
