r"""A sketch in a file that is complete or not there, and that is refused when it is damaged.

Layout, all integers little-endian:

    8 bytes     b"XENTILE\n"
    3 * uint32  format (1), length of the header, length of the payload
    header      JSON: precision, groups, weighted, and dtype and shape of the payload
    payload     the state, int64, compressed by zlib
    32 bytes    BLAKE2b of everything before

Every later format begins with the same 12 bytes and ends with the same digest, so that a file that is too new can be
told from one that is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xentile import _check
from xentile._layout import Layout
from xentile.sketch import LossSketch

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC = b"XENTILE\n"
FORMAT = 1
LENGTHS = struct.Struct("<III")  # format, length of the header, length of the payload
DIGEST = 32  # bytes
START = len(MAGIC) + LENGTHS.size


def save(sketch: LossSketch, path: str | os.PathLike[str]) -> None:
    """Write a sketch to a file, which is replaced whole or not at all. Waits for the device.

    Equal sketches give equal files, on whatever device they are.
    """
    _check.instance(sketch, "sketch", LossSketch)
    path = Path(path)
    header = json.dumps(_header(sketch.precision, sketch.groups, sketch.weighted)).encode()
    payload = zlib.compress(sketch.state.cpu().numpy().astype("<i8").tobytes())
    content = MAGIC + LENGTHS.pack(FORMAT, len(header), len(payload)) + header + payload
    # A name of its own for each writer: ranks that save to one path each write a whole file, and the last one stays.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(unfinished, "xb") as file:
            file.write(content + _digest(content))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], device: torch.device | str | None = None) -> LossSketch:
    """Read a sketch that `save` wrote, onto a device (the CPU by default).

    Raises:
        ValueError: if the file is damaged in any way, is no sketch, or was written by a later version.
    """
    path = Path(path)
    content = path.read_bytes()
    if content[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} must be a file of LossSketch.save, but does not begin with {MAGIC!r}")
    if len(content) < START + DIGEST or content[-DIGEST:] != _digest(content[:-DIGEST]):
        raise ValueError(f"{path} is damaged: {_damage(content)}")
    version, header_size, payload_size = LENGTHS.unpack_from(content, len(MAGIC))
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, of a later version of xentile: this one reads {FORMAT}")
    if len(content) != START + header_size + payload_size + DIGEST:
        raise ValueError(f"{path} is damaged: {_damage(content)}")
    try:
        header = json.loads(content[START : START + header_size])
        state = _decompressed(content[START + header_size : -DIGEST], header)
        sketch = LossSketch.from_state(torch.from_numpy(state), weighted=header["weighted"])
    except (ValueError, TypeError, KeyError, OverflowError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return sketch if device is None else sketch.to(device)


def _header(precision: int, groups: int, weighted: bool) -> dict[str, Any]:
    shape = [groups, Layout(precision).width]
    return {"precision": precision, "groups": groups, "weighted": weighted, "dtype": "<i8", "shape": shape}


def _decompressed(payload: bytes, header: dict[str, Any]) -> NDArray[np.int64]:
    """The state; ValueError if it or the header is not what this format has."""
    if header != _header(header["precision"], header["groups"], header["weighted"]):
        raise ValueError(f"its header contradicts itself: {header}")
    rows, columns = header["shape"]
    inflater = zlib.decompressobj()
    data = inflater.decompress(payload, rows * columns * 8 + 1)  # no more than that: a small file can hide gigabytes
    if len(data) != rows * columns * 8 or not inflater.eof or inflater.unused_data:
        raise ValueError(f"its payload is not {rows} x {columns} integers")
    return np.frombuffer(data, "<i8").astype(np.int64).reshape(rows, columns)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def _damage(content: bytes) -> str:
    """What a wrong checksum probably comes from."""
    if len(content) < START:
        return f"it ends after {len(content)} bytes, before the end of its header"
    _, header_size, payload_size = LENGTHS.unpack_from(content, len(MAGIC))
    expected = START + header_size + payload_size + DIGEST
    if len(content) == expected:
        return "its checksum does not match its content"
    return f"it has {len(content)} bytes, {'fewer' if len(content) < expected else 'more'} than the {expected} it needs"
