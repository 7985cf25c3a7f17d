"""A sketch file comes back as it was, and no damage to it goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from typing import TYPE_CHECKING

import pytest
import torch
from distributions import DISTRIBUTIONS
from hypothesis import given, settings
from hypothesis import strategies as st

import xentile as xt
from xentile import persistence
from xentile.persistence import DIGEST, LENGTHS, MAGIC, START, load, save
from xentile.streams import WindowedSketch

if TYPE_CHECKING:
    import pathlib


def filled(**options: int) -> xt.LossSketch:
    sketch = xt.LossSketch(**options)
    groups = options.get("groups", 1)
    values = torch.cat([DISTRIBUTIONS["fine-tuned"](300), torch.tensor([torch.nan, torch.inf, -1.0, 300.0])])
    sketch.update(values, group_ids=torch.arange(len(values)) % groups)
    return sketch


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, bytes]:
    path = tmp_path_factory.mktemp("damage") / "run 1.sketch"
    save(filled(precision=4), path)
    return path, path.read_bytes()


def signed(content: bytes) -> bytes:
    """The content with the digest that belongs to it: what a careful forger would write."""
    return content + hashlib.blake2b(content, digest_size=DIGEST).digest()


def forged(header: dict[str, object], payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return signed(MAGIC + LENGTHS.pack(1, len(text), len(payload)) + text + payload)


def assert_refused(path: pathlib.Path, content: bytes, match: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("precision", [1, 7, 10])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_file_brings_back_the_same_sketch(
    precision: int, groups: int, weighted: bool, tmp_path: pathlib.Path, device: torch.device
) -> None:
    sketch = filled(precision=precision, groups=groups, weighted=weighted)
    save(sketch.to(device), tmp_path / "sketch")
    assert load(tmp_path / "sketch") == sketch
    assert load(str(tmp_path / "sketch"), device).device == sketch.to(device).device
    load(tmp_path / "sketch").update(torch.tensor([1.0]))  # it is no read-only view of the file


def test_the_methods_save_and_load(tmp_path: pathlib.Path) -> None:
    sketch = filled()
    sketch.save(tmp_path / "sketch")
    assert xt.LossSketch.load(tmp_path / "sketch") == sketch


def test_large_and_negative_numbers_come_back(tmp_path: pathlib.Path) -> None:
    sketch = xt.LossSketch(precision=1)
    sketch.state.random_(-(2**63), 2**63 - 1)
    save(sketch, tmp_path / "sketch")
    assert load(tmp_path / "sketch") == sketch


def test_equal_sketches_give_equal_files(tmp_path: pathlib.Path) -> None:
    save(filled(), tmp_path / "a")
    save(filled().clone(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saving_replaces_a_file_and_leaves_no_other(tmp_path: pathlib.Path) -> None:
    save(filled(), tmp_path / "sketch")
    save(filled(precision=3), tmp_path / "sketch")
    assert load(tmp_path / "sketch") == filled(precision=3)
    assert [path.name for path in tmp_path.iterdir()] == ["sketch"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    save(filled(), tmp_path / "sketch")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(filled(precision=3), tmp_path / "sketch")
    assert load(tmp_path / "sketch") == filled()
    assert [path.name for path in tmp_path.iterdir()] == ["sketch"]


def test_every_flipped_bit_is_noticed(written: tuple[pathlib.Path, bytes]) -> None:
    path, content = written
    for place in range(8 * (START + 20)):  # every bit of what steers the reading
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        assert_refused(path, bytes(flipped), "is damaged: |must be a file of LossSketch.save")


@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_change_of_any_bytes_is_noticed(written: tuple[pathlib.Path, bytes], data: st.DataObject) -> None:
    path, content = written
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 64)))
    other = data.draw(st.binary(max_size=64).filter(lambda new: new != content[start:end]))
    assert_refused(path, content[:start] + other + content[end:], "is damaged: |must be a file of LossSketch.save")


@given(content=st.binary(max_size=200))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_signed_content_is_refused_with_a_clear_error(written: tuple[pathlib.Path, bytes], content: bytes) -> None:
    assert_refused(written[0], signed(MAGIC + content), "is damaged: |has format")


def test_the_error_says_what_is_wrong(written: tuple[pathlib.Path, bytes]) -> None:
    path, content = written
    size, whole = len(content), content[:-DIGEST]
    middle = size // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    newer = whole[: len(MAGIC)] + struct.pack("<I", 2) + whole[len(MAGIC) + 4 :]
    for damaged, match in [
        (content[:-1], f"is damaged: it has {size - 1} bytes, fewer than the {size} it needs"),
        (content[:15], "is damaged: it ends after 15 bytes, before the end of its header"),
        (content + b"\0", f"is damaged: it has {size + 1} bytes, more than the {size} it needs"),
        (flipped, "is damaged: its checksum does not match its content"),
        (content.replace(b"\n", b"\r\n", 1), "must be a file of LossSketch.save, but does not begin with"),
        (b"", "must be a file of LossSketch.save, but does not begin with"),
        (signed(newer), "has format 2, of a later version of xentile: this one reads 1"),
        (signed(whole + b"\0"), f"is damaged: it has {size + 1} bytes, more than the {size} it needs"),
    ]:
        assert_refused(path, damaged, match)


@pytest.mark.parametrize(
    ("change", "payload", "match"),
    [
        ({"groups": 2}, None, "its header contradicts itself"),
        ({"dtype": ">i8"}, None, "its header contradicts itself"),
        ({"comment": "more"}, None, "its header contradicts itself"),
        ({"groups": 0, "shape": [0, 80]}, b"", r"state must have shape \(G, width\)"),
        ({"groups": 2, "shape": [2, 80]}, None, "its payload is not 2 x 80 integers"),
        ({}, bytes(80 * 8 + 1), "its payload is not 1 x 80 integers"),
        ({}, bytes(80 * 8 - 8), "its payload is not 1 x 80 integers"),
        ({}, bytes(2**24), "its payload is not 1 x 80 integers"),  # many times what it says: not inflated
        ({"precision": 11, "shape": [1, 65552]}, bytes(65552 * 8), r"state must have shape \(G, width\)"),
        ({"precision": 10**5}, None, "."),
        ({"groups": 10**30, "shape": [10**30, 80]}, None, "."),
        ({"precision": "7"}, None, "."),
    ],
)
def test_a_signed_lie_is_refused(
    change: dict[str, object], payload: bytes | None, match: str, tmp_path: pathlib.Path
) -> None:
    header = persistence._header(1, 1, False) | change
    packed = zlib.compress(bytes(80 * 8) if payload is None else payload, 1)
    assert_refused(tmp_path / "sketch", forged(header, packed), f"is damaged: .*{match}")


def test_a_signed_payload_that_ends_too_early_or_too_late_is_refused(tmp_path: pathlib.Path) -> None:
    packed = zlib.compress(bytes(80 * 8))
    for payload in (packed[:-1], packed + b"\0"):
        content = forged(persistence._header(1, 1, False), payload)
        assert_refused(tmp_path / "sketch", content, "its payload is not 1 x 80 integers")


@pytest.mark.parametrize("header", [b"", b"[]", b"{}", b"null", b"\xff", b'{"precision": 1}'])
def test_a_header_of_another_kind_is_refused(header: bytes, tmp_path: pathlib.Path) -> None:
    assert_refused(tmp_path / "sketch", signed(MAGIC + LENGTHS.pack(1, len(header), 0) + header), "is damaged: ")


def test_a_missing_file_is_a_missing_file(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")


def test_only_a_sketch_is_saved(tmp_path: pathlib.Path) -> None:
    with pytest.raises(TypeError, match="sketch must be a LossSketch, got WindowedSketch"):
        save(WindowedSketch(2), tmp_path / "stream")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
