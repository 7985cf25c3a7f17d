r"""The top-K entries of a token as bytes, and back: a set of ids, exactly, and their log-probabilities in 12 bits each.

The ids of a token are sorted and stored as a set (Elias-Fano): of each id the lowest `low_bits(V, K)` bits as they are,
and the rest in unary, as one bit string in which the j-th one stands at `(id >> low_bits) + j`. That is about
log2(V / K) + 2 bits an id instead of log2(V), because the order of K things is worth log2(K!) bits. The order is not
lost: it is that of the log-probabilities, with ties by the lower id.

A log-probability l is stored as its drop d = l_top - l in steps of R / 4094, where R is the largest drop of the token.
l_top is float32, hence the top exact; R is float16, rounded up. The error of l is at most half a step and the rounding
of float32: on a range of 10 nats 0.0012, less than a third of what float16 makes of l with a third more bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Columns: TypeAlias = "dict[str, NDArray[Any]]"

MAX_VOCABULARY = 2**20
ID_BITS = 20
CODE_BITS = 12
TOP_CODE = 4094  # 4095 is left free, so that the key of an absent entry is above every other key
ABSENT_BELOW = (
    -1000.0
)  # in nats; e^-1000 is zero in every float, and what models write over masked entries is far below
ABSENT_KEY = np.uint32(0xFFFFFFFF)
ABSENT_ID = -1


def low_bits(vocab_size: int, k: int) -> int:
    """How many bits of an id are stored as they are: floor(log2(V / K)), or 0."""
    return max(0, (vocab_size // k).bit_length() - 1)


def columns(vocab_size: int, k: int) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Dtype and shape, for one token, of the columns of `pack`."""
    low = low_bits(vocab_size, k)
    return {
        "ids_low": (np.uint8, (_bytes(k * low),)),
        "ids_high": (np.uint8, (_bytes(_unary_length(vocab_size, k)),)),
        "logprob_codes": (np.uint8, (_bytes(k * CODE_BITS),)),
        "logprob_top": (np.float32, ()),
        "logprob_range": (np.float16, ()),
    }


def pack(ids: NDArray[np.int32], logprobs: NDArray[np.float32], vocab_size: int) -> Columns:
    """Columns of the entries (N, K) of N tokens, in any order, absent ones anywhere.

    An entry is absent if its id is negative or its log-probability below -1000. The others must have an id of their own
    in [0, vocab_size), and a log-probability that is finite and not above zero.
    """
    k = ids.shape[1]
    low = low_bits(vocab_size, k)
    present = (ids >= 0) & (logprobs >= ABSENT_BELOW)
    order = np.argsort(np.where(present, ids, vocab_size), axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    logprobs = np.take_along_axis(logprobs, order, axis=1)
    present = np.take_along_axis(present, order, axis=1)

    top = np.max(logprobs, axis=1, initial=-np.inf, where=present).astype(np.float32)
    drop = np.subtract(top[:, None], logprobs, out=np.zeros_like(logprobs), where=present)
    reach = _rounded_up(drop.max(axis=1, initial=0.0))
    scale = np.where(reach > 0, reach, np.float16(1)).astype(np.float32)
    codes = np.rint(drop / scale[:, None] * np.float32(TOP_CODE)).astype(np.uint32)

    ids = np.where(present, ids, 0).astype(np.uint32)
    row, column = np.nonzero(present)
    unary = np.zeros((len(ids), _unary_length(vocab_size, k)), dtype=np.bool_)
    unary[row, (ids >> low)[row, column] + column] = True
    return {
        "ids_low": pack_bits(ids & np.uint32((1 << low) - 1), low),
        "ids_high": np.packbits(unary, axis=1, bitorder="little"),
        "logprob_codes": pack_bits(codes, CODE_BITS),
        "logprob_top": top,
        "logprob_range": reach,
    }


def unpack(packed: Columns, vocab_size: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and log-probabilities (N, K), the most probable first, ties by the lower id, absent ones (-1, -inf) last."""
    low = low_bits(vocab_size, k)
    length = _unary_length(vocab_size, k)
    unary = np.unpackbits(packed["ids_high"], axis=1, count=length, bitorder="little")
    ones = np.flatnonzero(unary)
    place = np.arange(k)
    present = place < unary.sum(axis=1, dtype=np.int32)[:, None]
    high = np.zeros(present.shape, dtype=np.int32)
    high[present] = ones % length
    high -= place.astype(np.int32)

    keys = unpack_bits(packed["logprob_codes"], CODE_BITS, k)
    keys <<= np.uint32(ID_BITS)
    keys |= high.astype(np.uint32) << np.uint32(low) | unpack_bits(packed["ids_low"], low, k)
    keys[~present] = ABSENT_KEY
    keys.sort(axis=1)

    absent = keys == ABSENT_KEY
    ids = (keys & np.uint32(MAX_VOCABULARY - 1)).astype(np.int32)
    codes = (keys >> np.uint32(ID_BITS)).astype(np.float32)
    step = packed["logprob_range"].astype(np.float32) / np.float32(TOP_CODE)
    logprobs = packed["logprob_top"][:, None] - codes * step[:, None]
    ids[absent] = ABSENT_ID
    logprobs[absent] = -np.inf
    return ids, logprobs


def pack_bits(values: NDArray[np.uint32], width: int) -> NDArray[np.uint8]:
    """(N, K) integers of `width` bits, at most 20, as (N, ceil(K width / 8)) bytes, the lowest bit first."""
    n, k = values.shape
    out = np.zeros((n, _bytes(k * width)), dtype=np.uint8)
    for first, period, start, shift, count in _phases(width):
        shifted = values[:, first::period] << np.uint32(shift)
        for byte in range(count):
            out[:, start + byte :: width][:, : shifted.shape[1]] |= (shifted >> np.uint32(8 * byte)).astype(np.uint8)
    return out


def unpack_bits(packed: NDArray[np.uint8], width: int, k: int) -> NDArray[np.uint32]:
    """The inverse of `pack_bits`."""
    out = np.zeros((len(packed), k), dtype=np.uint32)
    mask = np.uint32((1 << width) - 1)
    for first, period, start, shift, count in _phases(width):
        values = out[:, first::period]
        for byte in range(count):
            values |= packed[:, start + byte :: width][:, : values.shape[1]].astype(np.uint32) << np.uint32(8 * byte)
        values >>= np.uint32(shift)
        values &= mask
    return out


def _phases(width: int) -> list[tuple[int, int, int, int, int]]:
    """Eight integers of `width` bits fill `width` bytes, so every eighth lies alike. For each of the eight: its number,
    eight, the first byte it touches, the place of its lowest bit in that byte, and how many bytes it touches.
    """
    if width == 0:
        return []
    return [(i, 8, i * width // 8, i * width % 8, _bytes(i * width % 8 + width)) for i in range(8)]


def _bytes(bits: int) -> int:
    return math.ceil(bits / 8)


def _unary_length(vocab_size: int, k: int) -> int:
    return ((vocab_size - 1) >> low_bits(vocab_size, k)) + k


def _rounded_up(values: NDArray[np.float32]) -> NDArray[np.float16]:
    near = values.astype(np.float16)
    return np.where(near < values, np.nextafter(near, np.float16(np.inf)), near)
