"""Writing a cache while a teacher runs."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xentile.cache import index, packing, shard
from xentile.cache.errors import optional
from xentile.cache.files import remove_unfinished

if TYPE_CHECKING:
    import os
    from types import TracebackType

    from numpy.typing import NDArray

    from xentile.cache.header import CacheHeader
    from xentile.cache.packing import Columns

ABOVE_ZERO = 1e-3  # a log-probability may be so much above 0: what rounding to bfloat16 makes of a certain token


class Entries(NamedTuple):
    """The top-K entries of the L tokens of a sample, on the CPU: fields as `xt.teacher_topk` returns them."""

    ids: Tensor  # (L, K)
    logprobs: Tensor  # (L, K)
    log_z: Tensor  # (L, T)
    tail_logprob: Tensor  # (L, T)


class TopKCacheWriter:
    """Writes samples into a cache, in shards; a context manager.

    A shard appears whole or not at all, so a killed writer loses the samples since the last shard and no other. Opened
    again with the same header, on the same folder, it goes on: `sample_id in writer` says what is there already.

    Several processes may write into one folder at the same time, each as a `rank` of its own. A sample that two ranks
    wrote is read from the lower rank.

    Args:
        folder: made if it is not there.
        header: what the cache holds; must be that of the cache if the folder has one.
        rank: which of the processes that write into the folder this is.
        shard_tokens: a shard is written when the samples added since the last one have so many tokens.

    Raises:
        ValueError: if the header is not that of the cache in the folder, or another process is writing the rank.
        DamagedCacheError: if the header or the index in the folder is damaged.

    Example:
        >>> import tempfile
        >>> from xentile.cache import CacheHeader, TopKCacheWriter
        >>> folder = tempfile.mkdtemp()
        >>> logits = torch.randn(5, 100)  # of a teacher that read five tokens
        >>> with TopKCacheWriter(folder, CacheHeader("random", vocab_size=100, k=4)) as writer:
        ...     writer.add("first", teacher_topk(logits, 4))
        >>> cached = TopKCache(folder)["first"]
        >>> cached.ids.shape, cached.logprobs.dtype
        (torch.Size([5, 4]), torch.float32)
    """

    def __init__(
        self, folder: str | os.PathLike[str], header: CacheHeader, *, rank: int = 0, shard_tokens: int = 2**17
    ) -> None:
        optional(*shard.SAFETENSORS)
        self.folder, self.header = Path(folder), header
        self.rank, self.shard_tokens = _at_least(0, rank, "rank"), _at_least(1, shard_tokens, "shard_tokens")
        self.folder.mkdir(parents=True, exist_ok=True)
        header.write(self.folder)
        self._index = index.Appender(self.folder / index.INDEX.format(rank=self.rank))
        try:
            remove_unfinished(self.folder, f"shard-{self.rank:05d}-")
            self._written = {s for rank in index.read_all(self.folder) for e in rank.shards for s in e.samples}
        except BaseException:
            self._index.close(finished=False)
            raise
        self._next_shard = 1 + max((_number(entry.shard) for entry in self._index.found.shards), default=-1)
        self._pending: dict[int | str, Columns] = {}
        self._pending_tokens = 0

    def __contains__(self, sample_id: int | str) -> bool:
        """Whether the sample is in the cache, of any rank as of when this writer opened it, or was added here."""
        return sample_id in self._written or sample_id in self._pending

    def add(self, sample_id: int | str, entries: Any, token_ids: Tensor | None = None) -> None:
        """Add the entries of one sample: row i is what the teacher predicts after the tokens up to i.

        Args:
            sample_id: a name or a number, not yet in the cache. 1 and "1" are two samples.
            entries: what `xt.teacher_topk` returns for logits (L, V), or anything with its fields `ids` and `logprobs`
                (L, K), `log_z` and `tail_logprob` (L, T), on any device. An entry is absent if its id is negative or
                its log-probability below -1000 (-inf in particular); the order is free.
            token_ids: (L,) integers, the tokens that the teacher read; if the header says `has_token_ids`.

        Raises:
            ValueError, TypeError: if an argument is not as above; nothing is added then.
        """
        self._check_id(sample_id)
        checked = self._checked(entries)
        columns = packing.pack(
            _array(checked.ids, np.int32), _array(checked.logprobs, np.float32), self.header.vocab_size
        )
        columns["log_z"] = _array(checked.log_z, np.float32)
        columns["tail_logprob"] = _array(checked.tail_logprob, np.float32)
        length = len(checked.ids)
        if self.header.has_token_ids:
            columns["token_ids"] = self._checked_token_ids(token_ids, length)
        elif token_ids is not None:
            raise ValueError("token_ids must be None, because the header says has_token_ids=False")
        self._pending[sample_id] = columns
        self._pending_tokens += length
        if self._pending_tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write the samples added since the last shard as one, now."""
        if self._pending:
            path = self.folder / index.SHARD.format(rank=self.rank, number=self._next_shard)
            self._index.append(shard.write(path, self.header, self._pending))
            self._next_shard += 1
            self._written.update(self._pending)
            self._pending, self._pending_tokens = {}, 0

    def close(self) -> None:
        """Write what is left, and that this rank is finished. More can be added by another writer later."""
        self.flush()
        self._index.close(finished=True)

    def __enter__(self) -> TopKCacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; after an error, keep the whole samples without saying that the rank is finished."""
        if kind is None:
            self.close()
            return
        try:
            self.flush()
        finally:
            self._index.close(finished=False)

    def _check_id(self, sample_id: int | str) -> None:
        if isinstance(sample_id, bool) or not isinstance(sample_id, (int, str)):
            raise TypeError(f"sample_id must be int or str, got {type(sample_id).__name__}")
        if sample_id in self:
            raise ValueError(f"sample_id must not be in the cache yet, got {sample_id!r}: see `sample_id in writer`")

    def _checked(self, entries: Any) -> Entries:
        """The entries on the CPU, each of its shape and of values that can be stored."""
        header = self.header
        try:
            tensors = Entries(*(torch.as_tensor(getattr(entries, name)).detach().cpu() for name in Entries._fields))
        except AttributeError as error:
            raise TypeError(f"entries must have the fields of xt.teacher_topk's result, got {error}") from None
        length = tensors.ids.shape[0] if tensors.ids.ndim else 0
        if length == 0:
            raise ValueError(f"entries.ids must have at least one row, got shape {list(tensors.ids.shape)}")
        last = {"ids": header.k, "logprobs": header.k}
        for name, tensor in tensors._asdict().items():
            expected = [length, last.get(name, len(header.temperatures))]
            if list(tensor.shape) != expected:
                raise ValueError(f"entries.{name} must have shape {expected}, got {list(tensor.shape)}")
        if tensors.ids.is_floating_point() or tensors.ids.dtype == torch.bool:
            raise TypeError(f"entries.ids must be integers, got {tensors.ids.dtype}")
        _check_values(tensors, header.vocab_size)
        return tensors

    def _checked_token_ids(self, token_ids: Tensor | None, length: int) -> NDArray[np.int32]:
        if token_ids is None:
            raise ValueError("token_ids must be given, because the header says has_token_ids=True")
        tokens = torch.as_tensor(token_ids).detach().cpu()
        if tokens.is_floating_point() or list(tokens.shape) != [length]:
            raise ValueError(f"token_ids must be integers of shape [{length}], got {tokens.dtype} {list(tokens.shape)}")
        return _array(tokens, np.int32)


def _check_values(entries: Entries, vocab_size: int) -> None:
    ids, logprobs = entries.ids.long(), entries.logprobs.float()
    for name in ("logprobs", "log_z", "tail_logprob"):
        if (bad := getattr(entries, name).isnan().nonzero()).numel():
            raise ValueError(
                f"entries.{name} must not be NaN, as in row {bad[0, 0].item()}: a logit was NaN or infinite"
            )
    for name in ("logprobs", "tail_logprob"):
        values = getattr(entries, name)
        if (bad := (values > ABOVE_ZERO).nonzero()).numel():
            row, value = bad[0, 0].item(), values.max().item()
            raise ValueError(f"entries.{name} must be logarithms of probabilities, at most 0, got {value} (row {row})")
    if entries.log_z.isinf().any():
        raise ValueError("entries.log_z must be finite, got infinity")
    present = (ids >= 0) & (logprobs >= packing.ABSENT_BELOW)
    if (bad := (present & (ids >= vocab_size)).nonzero()).numel():
        row, column = bad[0].tolist()
        raise ValueError(
            f"entries.ids must be below vocab_size {vocab_size}, got {ids[row, column].item()} (row {row})"
        )
    distinct = torch.where(present, ids, -1 - torch.arange(ids.shape[1])).sort(dim=1).values
    if (bad := (distinct.diff(dim=1) == 0).nonzero()).numel():
        row, column = bad[0].tolist()
        raise ValueError(f"entries.ids must differ within a row, got {distinct[row, column].item()} twice (row {row})")


def _array(tensor: Tensor, dtype: type[np.generic]) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy(), dtype=dtype)


def _at_least(least: int, value: Any, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return number


def _number(shard_name: str) -> int:
    return int(Path(shard_name).stem.rsplit("-", 1)[1])
