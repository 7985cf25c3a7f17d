"""No damage to a cache goes unnoticed: what was changed is named, with the samples that it concerns."""

from __future__ import annotations

import json
import pickle
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import teachers

import xentile as xt
from xentile.cache import DamagedCacheError, TopKCacheWriter, index, verify
from xentile.cache import header as headers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COUNT = 8


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "cache"
    teachers.write(folder, range(COUNT), shard_tokens=12)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "cache")


def read_all(folder: Path) -> dict[int | str, list[list[Any]]]:
    cache = xt.TopKCache(folder)
    return {sample_id: [t.tolist() for t in cache[sample_id] if t is not None] for sample_id in cache}


def attempt(read: Callable[[], Any]) -> Any:
    """What is read, or the error that says why it is not."""
    try:
        return read()
    except ValueError as error:
        return error


def damaged_samples(folder: Path) -> set[int | str]:
    """The samples that can't be read, and are named."""
    cache = xt.TopKCache(folder)
    results = {sample_id: attempt(lambda sample_id=sample_id: cache[sample_id]) for sample_id in cache}
    lost = {sample_id for sample_id, result in results.items() if isinstance(result, DamagedCacheError)}
    assert all(sample_id in results[sample_id].sample_ids for sample_id in lost)
    return lost


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_every_flipped_byte_of_a_shard_is_noticed_and_its_samples_named(folder: Path, written: Path) -> None:
    """By reading, where the flip concerns a sample: a sample comes back as it was or not at all. By verify, always."""
    whole = read_all(written)
    entry = xt.TopKCache(folder).shards[1]
    path = folder / entry.shard
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    for number, place in enumerate([*range(0, header_end, 7), *range(header_end, len(content), 3)]):
        flip(path, place, number % 8)
        cache = xt.TopKCache(folder)
        for sample_id in entry.samples:
            cached = attempt(lambda cache=cache, sample_id=sample_id: cache[sample_id])
            if isinstance(cached, DamagedCacheError):
                assert (cached.path, sample_id in cached.sample_ids) == (path, True)
            else:
                assert [t.tolist() for t in cached if t is not None] == whole[sample_id]
        found = verify.damages(cache)
        assert [damaged.shard for damaged, _ in found] == [entry.shard], f"byte {place}"
        flip(path, place, number % 8)
    assert verify.damages(xt.TopKCache(folder)) == []


def test_a_flip_in_the_rows_of_a_sample_costs_that_sample_alone(folder: Path) -> None:
    entry = xt.TopKCache(folder).shards[0]
    path = folder / entry.shard
    content = path.read_bytes()
    flip(path, 8 + int.from_bytes(content[:8], "little"))  # the first byte of the first column
    assert damaged_samples(folder) == {entry.samples[0]}
    with pytest.raises(DamagedCacheError, match=rf"{entry.shard} is damaged: .* this concerns 1 sample: 0"):
        xt.TopKCache(folder)[0]


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_shard_is_named_with_its_samples(folder: Path, size: int) -> None:
    entry = xt.TopKCache(folder).shards[1]
    path = folder / entry.shard
    path.write_bytes(path.read_bytes()[:size])
    assert damaged_samples(folder) == set(entry.samples)
    expected = rf"is damaged: it has \d+ bytes, fewer than {entry.bytes}; this concerns {len(entry.samples)} samples: "
    with pytest.raises(DamagedCacheError, match=expected + ", ".join(map(str, entry.samples))):
        xt.TopKCache(folder)[entry.samples[0]]


def test_a_shard_that_grew_or_is_missing_is_named(folder: Path) -> None:
    first, second = xt.TopKCache(folder).shards[:2]
    with open(folder / first.shard, "ab") as file:
        file.write(b"\0")
    (folder / second.shard).unlink()
    with pytest.raises(DamagedCacheError, match=f"{first.shard} is damaged: it has .* bytes, more than {first.bytes}"):
        xt.TopKCache(folder)[first.samples[0]]
    with pytest.raises(DamagedCacheError, match=f"{second.shard} is damaged: it is missing"):
        xt.TopKCache(folder)[second.samples[0]]
    assert damaged_samples(folder) == {*first.samples, *second.samples}


def test_swapped_shards_are_noticed(tmp_path: Path) -> None:
    """Of one size, so that only what the shard says of itself tells them apart."""
    with TopKCacheWriter(tmp_path, teachers.header(), shard_tokens=1) as writer:
        for number in (0, 5):
            writer.add(number, *teachers.sample(number))
    first, second = (tmp_path / entry.shard for entry in xt.TopKCache(tmp_path).shards)
    assert first.stat().st_size == second.stat().st_size
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    assert damaged_samples(tmp_path) == {0, 5}
    with pytest.raises(DamagedCacheError, match="it is another shard, or of another cache"):
        xt.TopKCache(tmp_path)[0]


def test_a_shard_of_another_cache_is_noticed(folder: Path, tmp_path: Path) -> None:
    with TopKCacheWriter(tmp_path / "other", teachers.header(teacher="another"), shard_tokens=12) as writer:
        for number in range(COUNT):
            writer.add(number, *teachers.sample(number))
    entry = xt.TopKCache(folder).shards[0]
    shutil.copy(tmp_path / "other" / entry.shard, folder / entry.shard)
    assert damaged_samples(folder) == set(entry.samples)


def test_every_flipped_bit_of_the_header_is_noticed(folder: Path) -> None:
    path = folder / headers.NAME
    content = path.read_bytes()
    before = xt.TopKCache(folder).header
    for place in range(len(content)):
        flip(path, place, place % 8)
        cache = attempt(lambda: xt.TopKCache(folder))
        if isinstance(cache, ValueError):
            assert str(path) in str(cache)
        else:  # one kind of space became another
            assert cache.header == before
            assert json.loads(path.read_bytes()) == json.loads(content)
        flip(path, place, place % 8)


def signed(contents: dict[str, Any]) -> str:
    contents = {key: value for key, value in contents.items() if key != "blake2b"}
    return json.dumps(contents | {"blake2b": headers._digest(contents)})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: signed(c | {"version": 2}), "has version 2 of the format: this xentile reads 1"),
        (lambda c: signed(c | {"format": "zip"}), "must have format 'xentile top-K cache', got 'zip'"),
        (lambda c: json.dumps(c | {"k": 8}), "header.json is damaged: its checksum does not match its content"),
        (lambda c: signed({key: c[key] for key in c if key != "teacher"}), "header.json is damaged: it has no teacher"),
        (lambda c: signed(c | {"k": 0}), r"k must be in \[1, 500\], got 0"),
        (lambda c: json.dumps(c)[:-20], "header.json is damaged: it is no header of a top-K cache"),
        (lambda c: "[]", "header.json is damaged: it is no header of a top-K cache"),
        (lambda c: "{}", "header.json is damaged: it is no header of a top-K cache"),
        (lambda c: "", "header.json is damaged: it is no header of a top-K cache"),
    ],
)
def test_a_header_of_another_version_or_content_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], str], match: str
) -> None:
    path = folder / headers.NAME
    path.write_text(change(json.loads(path.read_text())))
    for opened in (xt.TopKCache, lambda folder: TopKCacheWriter(folder, teachers.header())):
        with pytest.raises(ValueError, match=match):
            opened(folder)


def test_every_flipped_bit_of_a_finished_index_is_noticed(folder: Path, written: Path) -> None:
    """A flip in the last line alone can look like a writer that was killed; no sample is in it."""
    whole = read_all(written)
    path = folder / "index-00000.jsonl"
    content = path.read_bytes()
    last_line = content[:-1].rindex(b"\n")
    for place in range(len(content)):
        flip(path, place, place % 8)
        read = attempt(lambda: index.read(path))
        if isinstance(read, DamagedCacheError):
            assert read.path == path
        else:
            assert place > last_line
            assert sum(len(entry.samples) for entry in read.shards) == len(whole)
        flip(path, place, place % 8)


def test_a_damaged_index_is_refused_by_reader_and_writer_and_the_line_named(folder: Path) -> None:
    flip(folder / "index-00000.jsonl", 60)
    for opened in (xt.TopKCache, lambda folder: TopKCacheWriter(folder, teachers.header())):
        with pytest.raises(DamagedCacheError, match="the checksum of line 1 does not match its content"):
            opened(folder)


def test_what_follows_a_finished_index_is_damage(folder: Path) -> None:
    with open(folder / "index-00000.jsonl", "ab") as file:
        file.write(b'{"crc32": 1')
    with pytest.raises(DamagedCacheError, match="something follows the line that closes it"):
        xt.TopKCache(folder)


def test_the_error_crosses_processes(folder: Path) -> None:
    """As from the worker of a DataLoader."""
    error = DamagedCacheError(folder, "it is missing", [1, "a"])
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.sample_ids) == (str(error), folder, (1, "a"))


def test_a_message_names_no_more_samples_than_fit(folder: Path) -> None:
    error = DamagedCacheError(folder, "it is missing", list(range(1000)))
    assert str(error).endswith("is damaged: it is missing; this concerns 1000 samples: 0, 1, 2, 3, 4, 5, 6, 7, ...")


def test_rows_that_were_shifted_against_their_tokens_show(tmp_path: Path) -> None:
    """A teacher that knows what comes next: its rows hit the token at i + 1, and shifted rows that at i + 2."""
    tokens = teachers.logits(40).argmax(1)
    certain = 20.0 * (tokens.roll(-1)[:, None] == tokens.new_tensor(range(teachers.VOCAB)))
    for name, shift in (("right", 0), ("shifted", -1)):
        entries = xt.teacher_topk(certain.roll(shift, 0) + teachers.logits(40, seed=1) / 10, 2)
        with TopKCacheWriter(tmp_path / name, teachers.header(k=2, temperatures=(1.0,))) as writer:
            writer.add("a", entries, tokens)
    right = verify.hits_by_shift(xt.TopKCache(tmp_path / "right"))
    shifted = verify.hits_by_shift(xt.TopKCache(tmp_path / "shifted"))
    assert right is not None
    assert shifted is not None
    assert (right[1], shifted[2]) == (1.0, 1.0)
    assert max(right[0], right[2], shifted[0], shifted[1]) < 0.5
