"""One shard: a safetensors file of columns, a row a token."""

from __future__ import annotations

import hashlib
import itertools
import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from xentile.cache import packing
from xentile.cache.errors import DamagedCacheError, optional
from xentile.cache.files import write_whole
from xentile.cache.index import ShardEntry

if TYPE_CHECKING:
    from pathlib import Path

    from xentile.cache.header import CacheHeader
    from xentile.cache.packing import Columns

SAFETENSORS = "safetensors", "a top-K cache", "safetensors"


def columns(header: CacheHeader) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Dtype and shape, for one token, of every column; in the order in which a checksum takes them."""
    result = packing.columns(header.vocab_size, header.k)
    result["log_z"] = result["tail_logprob"] = (np.float32, (len(header.temperatures),))
    if header.has_token_ids:
        result["token_ids"] = (np.int32, ())
    return result


def checksum(sample_id: int | str, rows: Columns) -> int:
    """CRC-32 of a sample: of its id and its rows of every column."""
    value = zlib.crc32(json.dumps(sample_id).encode())
    for column in rows.values():
        value = zlib.crc32(np.ascontiguousarray(column).data, value)
    return value


def write(path: Path, header: CacheHeader, samples: dict[int | str, Columns]) -> ShardEntry:
    """Write samples into one file, whole or not at all; its line for the index."""
    numpy = optional("safetensors.numpy", *SAFETENSORS[1:])
    rows = {name: np.concatenate([sample[name] for sample in samples.values()]) for name in columns(header)}
    content = numpy.save(rows, _metadata(path, header))
    write_whole(path, content)
    return ShardEntry(
        shard=path.name,
        bytes=len(content),
        blake2b=_digest(content),
        samples=list(samples),
        tokens=[len(sample["logprob_top"]) for sample in samples.values()],
        crc32=[checksum(sample_id, sample) for sample_id, sample in samples.items()],
    )


class Shard:
    """An open shard, memory-mapped. Reading a sample checks the sample; `check` checks every byte."""

    def __init__(self, folder: Path, header: CacheHeader, entry: ShardEntry) -> None:
        """Open the file and see that it is the one that the index means."""
        self.path, self.entry = folder / entry.shard, entry
        self.header = header
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise self._damaged("it is missing") from None
        if size != entry.bytes:
            raise self._damaged(f"it has {size} bytes, {'fewer' if size < entry.bytes else 'more'} than {entry.bytes}")
        library = optional(*SAFETENSORS)
        try:
            file = library.safe_open(self.path, "numpy")
            slices = {name: file.get_slice(name) for name in columns(header)}
            metadata = file.metadata()
        except library.SafetensorError as error:
            raise self._damaged(f"safetensors says: {error}") from error
        if metadata != _metadata(self.path, header):
            raise self._damaged(f"it is another shard, or of another cache: {metadata}")
        for name, (dtype, shape) in columns(header).items():
            expected = [sum(entry.tokens), *shape]
            if slices[name].get_shape() != expected or slices[name].get_dtype() != _DTYPES[dtype]:
                raise self._damaged(f"its column {name} must be {_DTYPES[dtype]} of shape {expected}")
        self.slices: dict[str, Any] = slices
        self.spans = list(itertools.pairwise(itertools.accumulate(entry.tokens, initial=0)))

    def read(self, place: int) -> Columns:
        """The rows of the sample at this place; DamagedCacheError if they are not what was written."""
        start, end = self.spans[place]
        rows: Columns = {name: column[start:end] for name, column in self.slices.items()}
        sample_id = self.entry.samples[place]
        if checksum(sample_id, rows) != self.entry.crc32[place]:
            raise self._damaged("a checksum does not match", [sample_id])
        return rows

    def check(self) -> None:
        """Read every byte; DamagedCacheError that names each sample that differs."""
        wrong = []
        for place, sample_id in enumerate(self.entry.samples):
            try:
                self.read(place)
            except DamagedCacheError:
                wrong.append(sample_id)
        if wrong:
            raise self._damaged("checksums do not match", wrong)
        if _digest(self.path.read_bytes()) != self.entry.blake2b:
            raise DamagedCacheError(self.path, "bytes outside of its samples were changed; the samples are whole")

    def _damaged(self, what: str, sample_ids: list[int | str] | None = None) -> DamagedCacheError:
        return DamagedCacheError(self.path, what, self.entry.samples if sample_ids is None else sample_ids)


_DTYPES: dict[type[np.generic], str] = {np.uint8: "U8", np.float16: "F16", np.float32: "F32", np.int32: "I32"}


def _metadata(path: Path, header: CacheHeader) -> dict[str, str]:
    return {"format": "xentile top-K cache shard", "cache": header.digest(), "shard": path.name}


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
