r"""Which samples are where: for each rank one JSON Lines file, to which its writer appends a line for each shard.

A line is `{"crc32": ..., "entry": {...}}`, the checksum that of the entry. A shard counts once its line is there, and
its line is appended when the shard is on the disk. The last line of a writer that finished says so. Where that is
missing, an incomplete last line is what a killed writer left, and is passed over; anywhere else it is damage.
"""

from __future__ import annotations

import json
import os
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from xentile.cache.errors import DamagedCacheError
from xentile.cache.files import sync_folder, write_whole

if TYPE_CHECKING:
    from io import BufferedRandom
    from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

SHARD = "shard-{rank:05d}-{number:06d}.safetensors"
INDEX = "index-{rank:05d}.jsonl"


class ShardEntry(NamedTuple):
    """One shard: its file, and its samples in the order of their rows."""

    shard: str
    bytes: int
    blake2b: str  # of the whole file
    samples: list[int | str]
    tokens: list[int]
    crc32: list[int]  # of each sample: its id and its part of every column


class RankIndex(NamedTuple):
    """What one rank has written."""

    path: Path
    shards: list[ShardEntry]
    closed: bool  # the last writer finished
    length: int  # bytes that are complete lines


def read(path: Path) -> RankIndex:
    """The index of a rank; DamagedCacheError if a line of it was changed."""
    content = path.read_bytes()
    *lines, rest = content.split(b"\n")
    shards: list[ShardEntry] = []
    closed = False
    for number, line in enumerate(lines, 1):
        entry = _entry(line)
        if entry is None:
            raise DamagedCacheError(path, f"the checksum of line {number} does not match its content")
        closed = "closed" in entry
        if not closed:
            shards.append(ShardEntry(**entry))
    if closed and rest:
        raise DamagedCacheError(path, "something follows the line that closes it")
    return RankIndex(path, shards, closed, len(content) - len(rest))


def read_all(folder: Path) -> list[RankIndex]:
    """The indices of all ranks, in the order of the ranks."""
    return [read(path) for path in sorted(folder.glob("index-*.jsonl"))]


def replace(path: Path, shards: list[ShardEntry]) -> None:
    """Write an index anew, of these shards, not closed."""
    write_whole(path, b"".join(_line(shard._asdict()) for shard in shards))


class Appender:
    """The index of one rank, open for its one writer."""

    def __init__(self, path: Path) -> None:
        """Open or make the file, cut off what a killed writer left, and lock out every other writer of the rank."""
        self.file: BufferedRandom = open(path, "a+b")  # noqa: SIM115  # closed by close(), and by the system on a kill
        try:
            if fcntl is not None:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise ValueError(f"rank must be one that no other writer writes now, but {path} is locked") from None
        except OSError:
            pass  # a file system without locks
        try:
            self.found = read(path)
        except DamagedCacheError:
            self.file.close()
            raise
        self.file.truncate(self.found.length)
        sync_folder(path.parent)

    def append(self, entry: ShardEntry) -> None:
        """Add a shard that is on the disk."""
        self._write(entry._asdict())

    def close(self, finished: bool) -> None:
        """Close the file, with the line that says so if the writer finished."""
        if not self.file.closed:
            if finished:
                self._write({"closed": True})
            self.file.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self.file.write(_line(entry))
        self.file.flush()
        os.fsync(self.file.fileno())


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps({"crc32": _checksum(entry), "entry": entry}, separators=(",", ":")).encode() + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry of a line, or None if it is not what was written."""
    try:
        outer = json.loads(line)
        return outer["entry"] if outer["crc32"] == _checksum(outer["entry"]) else None
    except (ValueError, TypeError, KeyError):
        return None


def _checksum(entry: Any) -> int:
    return zlib.crc32(json.dumps(entry, separators=(",", ":"), sort_keys=True).encode())
