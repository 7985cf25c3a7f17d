"""The message of a DDSketch (ddsketch.proto of DataDog's sketches) as protobuf bytes, and back. Needs no protobuf.

Only what a histogram of positive values needs is here: an index mapping, a store of counts, and the count of zeros.

    DDSketch {IndexMapping mapping = 1; Store positiveValues = 2; Store negativeValues = 3; double zeroCount = 4}
    IndexMapping {double gamma = 1; double indexOffset = 2; Interpolation interpolation = 3}
    Store {map<sint32, double> binCounts = 1; repeated double contiguousBinCounts = 2;
           sint32 contiguousBinIndexOffset = 3}
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LINEAR = 1  # of Interpolation
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


@dataclass
class Store:
    """Counts by index."""

    counts: dict[int, float] = field(default_factory=dict)


@dataclass
class Message:
    """A DDSketch as it is stored."""

    gamma: float = 0.0
    index_offset: float = 0.0
    interpolation: int = 0
    positive: Store = field(default_factory=Store)
    negative: Store = field(default_factory=Store)
    zero_count: float = 0.0


def encode(message: Message) -> bytes:
    """The message as protobuf bytes; counts contiguous from the lowest index to the highest."""
    mapping = _double(1, message.gamma) + _double(2, message.index_offset) + _varint(3, message.interpolation)
    stores = (_encode_store(message.positive), _encode_store(message.negative))
    fields = (mapping, *stores)
    return b"".join(_bytes(number, f) for number, f in enumerate(fields, 1)) + _double(4, message.zero_count)


def _encode_store(store: Store) -> bytes:
    if not store.counts:
        return b""
    first, last = min(store.counts), max(store.counts)
    row = [store.counts.get(index, 0.0) for index in range(first, last + 1)]
    zigzag = 2 * first if first >= 0 else -2 * first - 1
    return _bytes(2, struct.pack(f"<{len(row)}d", *row)) + _varint(3, zigzag)


def _double(number: int, value: float) -> bytes:
    return _base128(number << 3 | _FIXED64) + struct.pack("<d", value)


def _varint(number: int, value: int) -> bytes:
    return _base128(number << 3 | _VARINT) + _base128(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _base128(number << 3 | _BYTES) + _base128(len(value)) + value


def _base128(value: int) -> bytes:
    """An unsigned integer in groups of 7 bits, lowest first, the high bit set in all but the last."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode(data: bytes) -> Message:
    """The message in protobuf bytes; unknown fields are skipped.

    Raises:
        ValueError: if the bytes end early, or are no such message.
    """
    message = Message()
    for number, wire, value in _fields(data):
        if (number, wire) == (1, _BYTES):
            _decode_mapping(value, message)
        elif (number, wire) == (2, _BYTES):
            _decode_store(value, message.positive)
        elif (number, wire) == (3, _BYTES):
            _decode_store(value, message.negative)
        elif (number, wire) == (4, _FIXED64):
            message.zero_count = _as_double(value)
    return message


def _decode_mapping(data: bytes, message: Message) -> None:
    for number, wire, value in _fields(data):
        if (number, wire) == (1, _FIXED64):
            message.gamma = _as_double(value)
        elif (number, wire) == (2, _FIXED64):
            message.index_offset = _as_double(value)
        elif (number, wire) == (3, _VARINT):
            message.interpolation = _as_integer(value)


def _decode_store(data: bytes, store: Store) -> None:
    """Counts may be sparse, contiguous, or both, and then they add up."""
    row: list[float] = []
    first = 0
    for number, wire, value in _fields(data):
        if (number, wire) == (1, _BYTES):
            entry = {n: v for n, _, v in _fields(value)}
            index = _signed(entry.get(1, b"\0"))
            store.counts[index] = store.counts.get(index, 0.0) + _as_double(entry.get(2, bytes(8)))
        elif number == 2 and wire in (_BYTES, _FIXED64):  # packed, or one by one
            if len(value) % 8:
                raise ValueError("data is no DDSketch message: a row of counts is cut off")
            row += struct.unpack(f"<{len(value) // 8}d", value)
        elif (number, wire) == (3, _VARINT):
            first = _signed(value)
    for index, count in enumerate(row, first):
        if count:
            store.counts[index] = store.counts.get(index, 0.0) + count


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The number, wire type and bytes of each field."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            start, (_, end) = at, _read_varint(data, at)
        elif wire == _BYTES:
            size, start = _read_varint(data, at)
            end = start + size
        elif wire in (_FIXED64, _FIXED32):
            start, end = at, at + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError(f"data is no DDSketch message: wire type {wire} at byte {at}")
        if end > len(data):
            raise ValueError(f"data is no DDSketch message: it ends at byte {len(data)}, a field at {end}")
        yield key >> 3, wire, data[start:end]
        at = end


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer that starts at a byte, and where it ends."""
    for size in range(1, 11):
        if at + size > len(data):
            raise ValueError(f"data is no DDSketch message: it ends at byte {len(data)}, within a number")
        if data[at + size - 1] < 0x80:
            return sum((byte & 0x7F) << 7 * i for i, byte in enumerate(data[at : at + size])), at + size
    raise ValueError(f"data is no DDSketch message: no number at byte {at}")


def _as_integer(value: bytes) -> int:
    return _read_varint(value, 0)[0]


def _signed(value: bytes) -> int:
    """A zigzag integer: 0, -1, 1, -2, ..."""
    n = _as_integer(value)
    return -(n + 1 >> 1) if n & 1 else n >> 1


def _as_double(value: bytes) -> float:
    if len(value) != 8:
        raise ValueError(f"data is no DDSketch message: a number must have 8 bytes, got {len(value)}")
    return float(struct.unpack("<d", value)[0])
