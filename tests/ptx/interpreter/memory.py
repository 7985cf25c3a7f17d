"""Global and shared memory: every access is checked for bounds and alignment, global ones are counted.

Global arrays live at made-up addresses, terabytes apart and 256-byte aligned as a GPU allocator gives them, so an index that
runs away meets no other array by chance. Shared memory starts as 0xFF bytes (NaN, -1), so missing initialisation shows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .scalars import Array, Mask
from .syntax import MemoryFault, SharedMemoryRace

ARGUMENT_SPACING = 1 << 44  # bytes between the addresses of two arguments
ALIGNMENT = 256  # bytes
SECTOR = 32  # bytes; the unit in which a GPU moves data between L2 and memory
WARP = 32  # threads


@dataclass
class Counts:
    """What a launch did. Keys of the dictionaries: the position of the argument. A request is one warp executing one access."""

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
    """One array at its address. `cells` is a copy, padded so that the widest access has a whole view of it."""

    start: int
    size: int
    argument: int
    cells: Array


class GlobalMemory:
    def __init__(self, arrays: list[tuple[int, int, Array]], counts: Counts) -> None:
        """arrays: (argument, address, the bytes as uint8)."""
        self.counts = counts
        self.arrays = sorted(arrays, key=lambda entry: entry[1])
        self.segments = []
        for argument, start, data in self.arrays:
            cells = np.zeros(-(-len(data) // ALIGNMENT) * ALIGNMENT, np.uint8)
            cells[: len(data)] = data
            self.segments.append(Segment(start, len(data), argument, cells))
        self.starts = np.array([segment.start for segment in self.segments], np.int64)

    def write_back(self) -> None:
        """Copy what the kernel stored into the caller's arrays."""
        for (_, _, data), segment in zip(self.arrays, self.segments, strict=True):
            data[:] = segment.cells[: segment.size]

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

    def load(self, address: Array, size: int, thread: Array) -> Array:
        """`size` bytes for each address: uint8 of shape (addresses, size)."""
        loaded = np.empty(len(address), f"V{size}")
        for segment, members in self.locate(address, size):
            loaded[members] = segment.cells.view(f"V{size}")[(address[members] - segment.start) // size]
            self.counts.loaded[segment.argument] += size * int(members.sum())
            requests, sectors = _traffic(address[members], size, thread[members])
            self.counts.load_requests[segment.argument] += requests
            self.counts.load_sectors[segment.argument] += sectors
        return loaded.view(np.uint8).reshape(-1, size)

    def store(self, address: Array, values: Array, thread: Array) -> None:
        """values: uint8 of shape (addresses, size)."""
        size = values.shape[1]
        cells = np.ascontiguousarray(values).view(f"V{size}").reshape(-1)
        for segment, members in self.locate(address, size):
            segment.cells.view(f"V{size}")[(address[members] - segment.start) // size] = cells[members]
            self.counts.stored[segment.argument] += size * int(members.sum())
            requests, sectors = _traffic(address[members], size, thread[members])
            self.counts.store_requests[segment.argument] += requests
            self.counts.store_sectors[segment.argument] += sectors

    def cells(self, address: Array, dtype: np.dtype) -> list[Array]:
        """For each address the one-element view that an atomic works on."""
        views: list[Array] = [np.empty(0)] * len(address)
        for segment, members in self.locate(address, dtype.itemsize):
            cells = segment.cells.view(dtype)
            self.counts.atomics[segment.argument] += int(members.sum())
            self.counts.float_atomics += int(members.sum()) * (dtype.kind == "f")
            for position in np.flatnonzero(members):
                index = (int(address[position]) - segment.start) // dtype.itemsize
                views[position] = cells[index : index + 1]
        return views


def _traffic(address: Array, size: int, thread: Array) -> tuple[int, int]:
    """(requests, sectors) of one access by these threads."""
    warp = thread // WARP
    sectors = (warp << 44) + (address % ARGUMENT_SPACING) // SECTOR
    return len(np.unique(warp)), len(np.unique(sectors)) * max(1, size // SECTOR)


class SharedMemory:
    """The shared memory of the blocks that run together, with a check for missing barriers.

    Two accesses of one byte by different threads, one of them storing a new value, need a barrier of the block between them;
    inside one warp a warp barrier is enough. For each byte its last writer and the lowest and highest reader are remembered.
    Lanes of one warp that store to one address in one instruction do not race: the hardware lets one of them win.
    """

    NOBODY_LOW, NOBODY_HIGH = np.iinfo(np.int32).max, -1

    def __init__(self, blocks: int, size: int, block: int) -> None:
        self.limit = size
        self.pitch = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        self.block = block
        total = blocks * self.pitch
        self.data = np.full(total, 0xFF, np.uint8)
        self.writer = np.full(total, self.NOBODY_HIGH, np.int32)
        self.lowest_reader = np.full(total, self.NOBODY_LOW, np.int32)
        self.highest_reader = np.full(total, self.NOBODY_HIGH, np.int32)

    def barrier(self, blocks: Array) -> None:
        """All threads of these blocks have met: what they did before is ordered before what follows."""
        self.writer.reshape(-1, self.pitch)[blocks] = self.NOBODY_HIGH
        self.lowest_reader.reshape(-1, self.pitch)[blocks] = self.NOBODY_LOW
        self.highest_reader.reshape(-1, self.pitch)[blocks] = self.NOBODY_HIGH

    def warp_barrier(self, warps: Array) -> None:
        """The threads of each of these warps (thread number // 32) have met."""
        self.writer[np.isin(self.writer // WARP, warps)] = self.NOBODY_HIGH
        one_warp = self.lowest_reader // WARP == self.highest_reader // WARP
        ordered = one_warp & np.isin(self.highest_reader // WARP, warps)
        self.lowest_reader[ordered], self.highest_reader[ordered] = self.NOBODY_LOW, self.NOBODY_HIGH

    def load(self, address: Array, size: int, thread: Array) -> Array:
        index, owner = self._bytes(address, size, thread)
        writer = self.writer[index]
        self._refuse((writer != self.NOBODY_HIGH) & (writer != owner), "loads what another thread stored")
        np.minimum.at(self.lowest_reader, index, owner)
        np.maximum.at(self.highest_reader, index, owner)
        return self.data[index]

    def store(self, address: Array, values: Array, thread: Array) -> None:
        index, owner = self._bytes(address, values.shape[1], thread)
        new = self.data[index] != values
        lowest, highest, writer = self.lowest_reader[index], self.highest_reader[index], self.writer[index]
        read_by_other = (highest != self.NOBODY_HIGH) & ((lowest != owner) | (highest != owner))
        self._refuse(new & read_by_other, "overwrites what another thread loaded")
        self._refuse(new & (writer != self.NOBODY_HIGH) & (writer != owner), "overwrites what another thread stored")
        self.data[index], self.writer[index] = values, owner
        lost = (self.data[index] != values) & (self.writer[index] // WARP != owner // WARP)
        self._refuse(lost, "stores another value than a thread of another warp")

    def cells(self, address: Array, dtype: np.dtype, thread: Array) -> list[Array]:
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
