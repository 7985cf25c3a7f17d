"""Reading a cache at random while a student trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xentile.cache import index, packing
from xentile.cache.errors import optional
from xentile.cache.header import CacheHeader
from xentile.cache.shard import SAFETENSORS, Shard

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from xentile.cache.packing import Columns


class CachedTopK(NamedTuple):
    """Entries of a teacher, ready for `xt.topk_distillation_loss`: of one sample (L, ...), or of a batch (B, L, ...).

    Row i is what the teacher predicts after the tokens up to i, hence belongs to the student's logits at i and, as a
    target, to token i + 1. In a batch, samples shorter than the longest are padded with rows that say that all of the
    mass is in the tail: ids -1, logprobs -inf, log_z and tail_logprob 0.
    """

    ids: Tensor  # (..., K) int32, the most probable first; -1 where absent
    logprobs: Tensor  # (..., K) float32, nats, at temperature 1; -inf where absent
    log_z: Tensor  # (...) float32: p_T(k) = exp(logprobs[k] / T - log_z)
    tail_logprob: Tensor  # (...) float32, nats, at temperature T: log of the mass that is not of `ids`
    token_ids: Tensor | None  # (...) int32, what the teacher read; -1 where padded; None if the cache has none
    length: Tensor  # () or (B,) int64: rows that are not padding


class TopKCache:
    """A cache of a teacher's top-K entries, read by sample id.

    It is a map-style dataset whose keys are sample ids, and can be pickled and forked:
    `DataLoader(cache, sampler=cache.sample_ids, batch_size=8, collate_fn=TopKCache.collate, num_workers=2)`. A dataset
    of your own calls `cache[sample_id]` or `cache.batch(sample_ids)`.

    Ids, log Z, the tails and the largest log-probability of each token come back exactly, the others within 1 / 8180 of
    the range of the token's log-probabilities.

    Args:
        folder: where a `TopKCacheWriter` wrote; it may still be writing.
        temperature: for which log Z and the tail are returned; one that the cache stores.
        k: how many entries a token has, at most the stored number, which is the default. The mass of those left out
            goes into the tail, by addition alone.
        tokenizer_hash: if given, must be that of the teacher's tokenizer: see `xentile.cache.tokenizer_hash`.

    Raises:
        FileNotFoundError: if there is no cache in the folder.
        DamagedCacheError: if a file is not what was written; shards are checked when a sample is read from them.
        ValueError: if an argument is not as above, or the cache has a later version of the format.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        temperature: float = 1.0,
        k: int | None = None,
        tokenizer_hash: str | None = None,
    ) -> None:
        optional(*SAFETENSORS)
        self.folder = Path(folder)
        self.header = header = CacheHeader.read(self.folder)
        self.temperature = temperature
        self.k = header.k if k is None else k
        self._column = header.temperature_index(temperature)
        if isinstance(self.k, bool) or not isinstance(self.k, int) or not 1 <= self.k <= header.k:
            raise ValueError(f"k must be an integer in [1, {header.k}], got {k!r}")
        if tokenizer_hash not in (None, header.tokenizer_hash):
            theirs = header.tokenizer_hash
            raise ValueError(
                f"tokenizer_hash must be that of the teacher's tokenizer, {theirs!r}, got {tokenizer_hash!r}"
            )
        self.ranks = index.read_all(self.folder)
        self.shards = [entry for rank in self.ranks for entry in rank.shards]
        self._places: dict[int | str, tuple[int, int]] = {}
        for number, entry in enumerate(self.shards):
            for place, sample_id in enumerate(entry.samples):
                self._places.setdefault(sample_id, (number, place))  # of two ranks that wrote it, the lower
        self.sample_ids: list[int | str] = list(self._places)
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        """The number of samples."""
        return len(self._places)

    def __iter__(self) -> Iterator[int | str]:
        """The sample ids, as a dict does."""
        return iter(self.sample_ids)

    def __contains__(self, sample_id: int | str) -> bool:
        return sample_id in self._places

    def __getitem__(self, sample_id: int | str) -> CachedTopK:
        """The entries of one sample; KeyError if it is not in the cache."""
        rows = self._read(sample_id)
        return CachedTopK(*self._unpacked(rows), torch.tensor(len(rows["logprob_top"])))

    def batch(self, sample_ids: Sequence[int | str]) -> CachedTopK:
        """The entries of several samples, (B, L, ...) with L the length of the longest; unpacked all at once."""
        if not sample_ids:
            raise ValueError("sample_ids must name at least one sample, got none")
        samples = [self._read(sample_id) for sample_id in sample_ids]
        rows = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
        lengths = [len(sample["logprob_top"]) for sample in samples]
        *columns, tokens = self._unpacked(rows)
        split = [column.split(lengths) for column in columns if column is not None]
        return _padded(split, None if tokens is None else tokens.split(lengths), lengths)

    @staticmethod
    def collate(samples: Sequence[CachedTopK]) -> CachedTopK:
        """Several `cache[sample_id]` as the batch that `cache.batch` makes of them: a `collate_fn` for a DataLoader."""
        *columns, tokens, lengths = zip(*samples, strict=True)
        return _padded(columns, None if tokens[0] is None else tokens, [int(length) for length in lengths])

    def shard(self, number: int) -> Shard:
        """One of `shards`, opened and kept open."""
        if number not in self._open:
            self._open[number] = Shard(self.folder, self.header, self.shards[number])
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # a memory map belongs to its process

    def _read(self, sample_id: int | str) -> Columns:
        try:
            number, place = self._places[sample_id]
        except (KeyError, TypeError):
            example = f", such as {self.sample_ids[0]!r}" if self.sample_ids else ""
            raise KeyError(f"sample id {sample_id!r} is not one of the {len(self)} of the cache{example}") from None
        return self.shard(number).read(place)

    def _unpacked(self, rows: Columns) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        ids, logprobs = packing.unpack(rows, self.header.vocab_size, self.header.k)
        log_z, tail = rows["log_z"][:, self._column], rows["tail_logprob"][:, self._column]
        if self.k < self.header.k:
            tail = _with_rest(tail, logprobs[:, self.k :] / np.float32(self.temperature) - log_z[:, None])
            ids, logprobs = ids[:, : self.k], logprobs[:, : self.k]
        tokens = _tensor(rows["token_ids"]) if self.header.has_token_ids else None
        return _tensor(ids), _tensor(logprobs), _tensor(log_z), _tensor(tail), tokens


def _padded(columns: Sequence[Sequence[Tensor]], token_ids: Sequence[Tensor] | None, lengths: list[int]) -> CachedTopK:
    """A batch of the columns ids, logprobs, log_z and tail_logprob of samples, and of their tokens if there are any."""
    ids, logprobs, log_z, tail_logprob = map(_rectangle, columns, (packing.ABSENT_ID, -torch.inf, 0.0, 0.0))
    tokens = None if token_ids is None else _rectangle(token_ids, -1)
    return CachedTopK(ids, logprobs, log_z, tail_logprob, tokens, torch.tensor(lengths))


def _rectangle(samples: Sequence[Tensor], padding: float) -> Tensor:
    arrays = [sample.numpy() for sample in samples]  # not pad_sequence: its threads cost more than the copy
    shape = len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]
    padded = np.full(shape, padding, dtype=arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(padded)


def _with_rest(tail: NDArray[Any], rest: NDArray[Any]) -> NDArray[Any]:
    """log(e^tail + sum e^rest) of each row: a sum of positive terms, so nothing cancels."""
    terms = torch.from_numpy(np.concatenate([tail[:, None], rest], axis=1))
    return terms.logsumexp(dim=1).numpy()


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
