"""Global and shared memory: every access is checked for bounds and alignment, global ones are counted.

Global arrays live at made-up addresses, terabytes apart and 256-byte aligned as a GPU allocator gives them, so an index
that runs away meets no other array by chance. Shared memory starts as 0xFF bytes (NaN, -1), so missing initialisation
shows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .races import Uses
from .syntax import MemoryFault, SharedMemoryRace

if TYPE_CHECKING:
    from .scalars import Array, Mask

ARGUMENT_SPACING = 1 << 44  # bytes between the addresses of two arguments
ALIGNMENT = 256  # bytes
SECTOR = 32  # bytes; the unit in which a GPU moves data between L2 and memory
WARP = 32  # threads


@dataclass
class Counts:
    """What a launch did, by position of the argument. A request is one warp executing one access."""

    loaded: Counter[int] = field(default_factory=Counter)
    stored: Counter[int] = field(default_factory=Counter)
    load_requests: Counter[int] = field(default_factory=Counter)
    load_sectors: Counter[int] = field(default_factory=Counter)
    store_requests: Counter[int] = field(default_factory=Counter)
    store_sectors: Counter[int] = field(default_factory=Counter)
    atomics: Counter[int] = field(default_factory=Counter)
    float_atomics: int = 0
    instructions: int = 0
    """Executed by a thread, those with a false guard excluded."""


@dataclass
class Segment:
    """One array at its address. `cells` is a copy, padded so that every aligned access is an element of a view."""

    start: int
    size: int
    argument: int
    cells: Array
    uses: Uses | None = None

    @property
    def lead(self) -> int:
        """Bytes of padding in front of the array."""
        return self.start % ALIGNMENT

    def bytes_at(self, address: Array, size: int) -> Array:
        """Positions in `cells` of the bytes of these accesses, (accesses, size)."""
        return (address - (self.start - self.lead))[:, None] + np.arange(size)

    def view(self, address: Array, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """The memory as elements of `dtype`, and which of them these addresses mean."""
        return self.cells.view(dtype), (address - (self.start - self.lead)) // dtype.itemsize


class User(NamedTuple):
    """Of each access the thread, by its number in the launch, and how many barriers it has passed."""

    thread: Array
    epoch: Array


class GlobalMemory:
    def __init__(self, arrays: list[tuple[int, int, Array]], counts: Counts, races_of_block: int | None) -> None:
        """arrays: (argument, address, the bytes as uint8). races_of_block: threads of a block, to look for races."""
        self.counts = counts
        self.arrays = sorted(arrays, key=lambda entry: entry[1])
        self.segments = []
        for argument, start, data in self.arrays:
            lead = start % ALIGNMENT
            cells = np.zeros(-(-(lead + len(data)) // ALIGNMENT) * ALIGNMENT, np.uint8)
            cells[lead : lead + len(data)] = data
            uses = Uses(len(cells), races_of_block) if races_of_block else None
            self.segments.append(Segment(start, len(data), argument, cells, uses))
        self.starts = np.array([segment.start for segment in self.segments], np.int64)

    def write_back(self) -> None:
        """Copy what the kernel stored into the caller's arrays."""
        for (_, _, data), segment in zip(self.arrays, self.segments, strict=True):
            data[:] = segment.cells[segment.lead : segment.lead + segment.size]

    def locate(self, address: Array, size: int) -> list[tuple[Segment, Mask]]:
        """The segments that accesses of `size` bytes fall in, each with the accesses that do. Raises MemoryFault."""
        misaligned = address % size != 0
        if misaligned.any():
            raise MemoryFault(f"misaligned {size}-byte access", int(np.flatnonzero(misaligned)[0]))
        which = np.searchsorted(self.starts, address, side="right") - 1
        found = []
        for index in np.unique(which):
            members = which == index
            segment = self.segments[index]
            outside = members & (address + size > segment.start + segment.size) if index >= 0 else members
            if outside.any():
                raise MemoryFault(f"out of bounds {size}-byte access", int(np.flatnonzero(outside)[0]))
            found.append((segment, members))
        return found

    def load(self, address: Array, size: int, user: User) -> Array:
        """`size` bytes for each address: uint8 of shape (addresses, size)."""
        loaded, thread = np.empty(len(address), f"V{size}"), user.thread
        for segment, members in self.locate(address, size):
            if segment.uses:
                segment.uses.load(segment.bytes_at(address[members], size), thread[members], user.epoch[members])
            cells, index = segment.view(address[members], np.dtype(f"V{size}"))
            loaded[members] = cells[index]
            self.counts.loaded[segment.argument] += size * int(members.sum())
            requests, sectors = _traffic(address[members], size, thread[members])
            self.counts.load_requests[segment.argument] += requests
            self.counts.load_sectors[segment.argument] += sectors
        return loaded.view(np.uint8).reshape(-1, size)

    def store(self, address: Array, values: Array, user: User) -> None:
        """values: uint8 of shape (addresses, size)."""
        size, thread = values.shape[1], user.thread
        new = np.ascontiguousarray(values).view(f"V{size}").reshape(-1)
        for segment, members in self.locate(address, size):
            if segment.uses:
                where = segment.bytes_at(address[members], size)
                changes = segment.cells[where] != values[members]
                segment.uses.store(where, thread[members], user.epoch[members], changes)
            cells, index = segment.view(address[members], np.dtype(f"V{size}"))
            cells[index] = new[members]
            self.counts.stored[segment.argument] += size * int(members.sum())
            requests, sectors = _traffic(address[members], size, thread[members])
            self.counts.store_requests[segment.argument] += requests
            self.counts.store_sectors[segment.argument] += sectors

    def cells(self, address: Array, dtype: np.dtype[Any]) -> list[Array]:
        """For each address the one-element view that an atomic works on."""
        views: list[Array] = [np.empty(0)] * len(address)
        for segment, members in self.locate(address, dtype.itemsize):
            cells, index = segment.view(address[members], dtype)
            self.counts.atomics[segment.argument] += int(members.sum())
            self.counts.float_atomics += int(members.sum()) * (dtype.kind == "f")
            for position, cell in zip(np.flatnonzero(members), index, strict=True):
                views[position] = cells[cell : cell + 1]
        return views


def _traffic(address: Array, size: int, thread: Array) -> tuple[int, int]:
    """(requests, sectors) of one access by these threads."""
    warp = thread // WARP
    sectors = (warp << 44) + (address % ARGUMENT_SPACING) // SECTOR
    return len(np.unique(warp)), len(np.unique(sectors)) * max(1, size // SECTOR)


class _Users:
    """Who used each byte of shared memory since the last barrier: the lowest and highest thread, and, of the uses that
    a warp barrier has ordered within their warp, the lowest and highest warp."""

    NOBODY_LOW, NOBODY_HIGH = np.iinfo(np.int32).max, -1

    def __init__(self, blocks: int, pitch: int) -> None:
        self.pitch = pitch
        shape = blocks * pitch
        self.first_thread, self.first_warp = (np.full(shape, self.NOBODY_LOW, np.int32) for _ in range(2))
        self.last_thread, self.last_warp = (np.full(shape, self.NOBODY_HIGH, np.int32) for _ in range(2))

    def note(self, index: Array, thread: Array) -> None:
        np.minimum.at(self.first_thread, index, thread)
        np.maximum.at(self.last_thread, index, thread)

    def others(self, index: Array, thread: Array) -> Mask:
        """Where somebody else has used the byte, with nothing to order that use before this one."""
        found = np.zeros(index.shape, bool)
        for first, last, own in (
            (self.first_thread, self.last_thread, thread),
            (self.first_warp, self.last_warp, thread // WARP),
        ):
            used = last[index] != self.NOBODY_HIGH
            found |= used & ((first[index] != own) | (last[index] != own))
        return found

    def barrier(self, blocks: Array) -> None:
        for first, last in ((self.first_thread, self.last_thread), (self.first_warp, self.last_warp)):
            first.reshape(-1, self.pitch)[blocks] = self.NOBODY_LOW
            last.reshape(-1, self.pitch)[blocks] = self.NOBODY_HIGH

    def warp_barrier(self, warps: Array) -> None:
        warp = self.last_thread // WARP
        ordered = (self.last_thread != self.NOBODY_HIGH) & (self.first_thread // WARP == warp) & np.isin(warp, warps)
        self.first_warp[ordered] = np.minimum(self.first_warp[ordered], warp[ordered])
        self.last_warp[ordered] = np.maximum(self.last_warp[ordered], warp[ordered])
        self.first_thread[ordered], self.last_thread[ordered] = self.NOBODY_LOW, self.NOBODY_HIGH


class SharedMemory:
    """The shared memory of the blocks that run together, with a check for missing barriers.

    Two accesses of one byte by different threads, one of them storing a new value, need a barrier of the block between
    them; inside one warp a warp barrier is enough. Lanes of one warp that store to one address in one instruction do
    not race: the hardware lets one win.
    """

    def __init__(self, blocks: int, size: int, block: int) -> None:
        self.limit = size
        self.pitch = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        self.block = block
        self.data = np.full(blocks * self.pitch, 0xFF, np.uint8)
        self.readers, self.writers = _Users(blocks, self.pitch), _Users(blocks, self.pitch)

    def barrier(self, blocks: Array) -> None:
        """All threads of these blocks have met: what they did before is ordered before what follows."""
        self.readers.barrier(blocks)
        self.writers.barrier(blocks)

    def warp_barrier(self, warps: Array) -> None:
        """The threads of each of these warps (thread number // 32) have met."""
        self.readers.warp_barrier(warps)
        self.writers.warp_barrier(warps)

    def load(self, address: Array, size: int, thread: Array) -> Array:
        index, owner = self._bytes(address, size, thread)
        self._refuse(self.writers.others(index, owner), "loads what another thread stored")
        self.readers.note(index, owner)
        return self.data[index]

    def store(self, address: Array, values: Array, thread: Array) -> None:
        index, owner = self._bytes(address, values.shape[1], thread)
        new = self.data[index] != values
        self._refuse(new & self.readers.others(index, owner), "overwrites what another thread loaded")
        self._refuse(new & self.writers.others(index, owner), "overwrites what another thread stored")
        self.data[index] = values
        self.writers.note(index, owner)
        one_warp = self.writers.first_thread[index] // WARP == self.writers.last_thread[index] // WARP
        self._refuse((self.data[index] != values) & ~one_warp, "stores another value than a thread of another warp")

    def cells(self, address: Array, dtype: np.dtype[Any], thread: Array) -> list[Array]:
        """For each address the one-element view that an atomic works on; atomics do not race with each other."""
        index, _ = self._bytes(address, dtype.itemsize, thread)
        return [self.data[start : start + dtype.itemsize].view(dtype) for start in index[:, 0]]

    def _bytes(self, address: Array, size: int, thread: Array) -> tuple[Array, Array]:
        """Positions of the bytes in `data` (accesses, size) and the thread of each, after the checks."""
        misaligned = address % size != 0
        if misaligned.any():
            raise MemoryFault(f"misaligned {size}-byte shared access", int(np.flatnonzero(misaligned)[0]))
        outside = (address < 0) | (address + size > self.limit)
        if outside.any():
            raise MemoryFault(f"out of bounds {size}-byte shared access", int(np.flatnonzero(outside)[0]))
        index = ((thread // self.block) * self.pitch + address)[:, None] + np.arange(size)
        return index, np.broadcast_to(thread[:, None].astype(np.int32), index.shape)

    @staticmethod
    def _refuse(racing: Mask, what: str) -> None:
        if racing.any():
            raise SharedMemoryRace(f"{what}, with no barrier between", int(np.flatnonzero(racing.any(1))[0]))
