"""Races in global memory: who used each byte during a launch, and whether anything orders two uses of one byte.

Threads of one block are ordered by its barriers: a use is older if fewer barriers had been passed. Threads of different
blocks are never ordered. Storing the value that is there already is no race, and atomics are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .syntax import GlobalMemoryRace

if TYPE_CHECKING:
    from .scalars import Array, Mask


class Uses:
    """The uses of the bytes of one array. A thread is a number in the whole launch, an epoch the barriers it passed."""

    NOBODY_LOW, NOBODY_HIGH = np.iinfo(np.int32).max, -1

    def __init__(self, size: int, block: int) -> None:
        self.block = block
        self.writer = np.full(size, self.NOBODY_HIGH, np.int32)
        self.written = np.zeros(size, np.int32)
        self.first_reader = np.full(size, self.NOBODY_LOW, np.int32)
        self.last_reader = np.full(size, self.NOBODY_HIGH, np.int32)
        self.read = np.zeros(size, np.int32)

    def load(self, index: Array, thread: Array, epoch: Array) -> None:
        """index: the bytes (accesses, size) that `thread` (accesses,) loads in its `epoch`."""
        thread, epoch = thread[:, None], epoch[:, None]
        writer = self.writer[index]
        stored = (writer != self.NOBODY_HIGH) & (writer != thread)
        self._refuse(stored & self._unordered(writer, thread, self.written[index], epoch), "loads what another stored")
        # of the reads before a barrier of the same block none can race any more
        first, last = self.first_reader[index], self.last_reader[index]
        settled = (self.read[index] < epoch) & (first // self.block == thread // self.block)
        settled &= last // self.block == thread // self.block
        self.first_reader[index[settled]], self.last_reader[index[settled]] = self.NOBODY_LOW, self.NOBODY_HIGH
        np.minimum.at(self.first_reader, index, np.broadcast_to(thread, index.shape))
        np.maximum.at(self.last_reader, index, np.broadcast_to(thread, index.shape))
        self.read[index] = epoch

    def store(self, index: Array, thread: Array, epoch: Array, changes: Mask) -> None:
        """As `load`; changes (accesses, size): where the value is not the one that is there."""
        thread, epoch = thread[:, None], epoch[:, None]
        writer = self.writer[index]
        stored = (writer != self.NOBODY_HIGH) & (writer != thread)
        stored &= self._unordered(writer, thread, self.written[index], epoch)
        self._refuse(changes & stored, "overwrites what another stored")
        for reader in (self.first_reader[index], self.last_reader[index]):
            loaded = (reader != self.NOBODY_LOW) & (reader != self.NOBODY_HIGH) & (reader != thread)
            loaded &= self._unordered(reader, thread, self.read[index], epoch)
            self._refuse(changes & loaded, "overwrites what another loaded")
        self.writer[index], self.written[index] = thread, epoch

    def _unordered(self, other: Array, thread: Array, then: Array, now: Array) -> Mask:
        unordered: Mask = (other // self.block != thread // self.block) | (then >= now)
        return unordered

    @staticmethod
    def _refuse(racing: Mask, what: str) -> None:
        if racing.any():
            raise GlobalMemoryRace(f"{what} thread, with no barrier between", int(np.flatnonzero(racing.any(1))[0]))
