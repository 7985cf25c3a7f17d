"""A writer killed in the middle of a write loses the shard in flight and nothing else; ranks write side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import teachers
import torch
from teachers import header, sample

import xentile as xt
from xentile.cache import CachedTopK, TopKCacheWriter, files, shard, verify
from xentile.cache.index import Appender

COUNT = 40

# Writes samples 0 to 39, and is killed by SIGKILL in the middle of the third shard, index line or rename it writes.
KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
import teachers
from xentile.cache import files, index
calls = 0

def third_time():
    global calls
    calls += 1
    return calls == 3

if {where!r} == "shard":
    class Half:
        def __init__(self, file):
            self.file = file
        def __enter__(self):
            return self
        def __exit__(self, *error):
            raise AssertionError("killed before")
        def write(self, content):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    def half_open(path, mode):
        file = open(path, mode)
        return Half(file) if "shard-" in path.name and third_time() else file
    files.open = half_open
elif {where!r} == "rename":
    rename = Path.replace
    def killed(self, target):
        if "shard-" in self.name and third_time():
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)
    Path.replace = killed
else:
    write = index.Appender._write
    def killed(self, entry):
        if third_time():
            self.file.write(index._line(entry)[:50])
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, entry)
    index.Appender._write = killed
teachers.write(Path({folder!r}), range(40))
"""


def kill_in_the_middle(folder: Path, where: str) -> None:
    path = [str(Path(__file__).parent), str(Path(xt.__file__).parent.parent)]
    code = KILLED.format(path=path, where=where, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def contents(folder: Path) -> dict[int | str, CachedTopK]:
    cache = xt.TopKCache(folder)
    return {sample_id: cache[sample_id] for sample_id in cache}


def assert_same(a: dict[int | str, CachedTopK], b: dict[int | str, CachedTopK]) -> None:
    assert a.keys() == b.keys()
    for sample_id, cached in a.items():
        for x, y in zip(cached, b[sample_id], strict=True):
            assert torch.equal(x, y)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("where", ["shard", "rename", "index"])
def test_a_killed_writer_resumes_to_what_an_uninterrupted_one_writes(tmp_path: Path, where: str) -> None:
    teachers.write(tmp_path / "whole", range(COUNT))
    whole = contents(tmp_path / "whole")
    kill_in_the_middle(tmp_path / "killed", where)

    left = xt.TopKCache(tmp_path / "killed")
    assert [len(rank.shards) for rank in left.ranks] == [2], "two shards were whole"
    assert not left.ranks[0].closed
    assert verify.damages(left) == []
    assert len(verify.unlisted(left)) == (where == "index")
    assert_same(contents(tmp_path / "killed"), {i: whole[i] for i in left})

    teachers.write(tmp_path / "killed", range(COUNT))
    assert_same(contents(tmp_path / "killed"), whole)
    resumed = xt.TopKCache(tmp_path / "killed")
    assert resumed.ranks[0].closed
    assert verify.damages(resumed) == []
    assert verify.unlisted(resumed) == []
    assert not [path for path in (tmp_path / "killed").iterdir() if path.name.startswith(files.UNFINISHED)]


def test_an_exception_in_the_loop_keeps_the_samples_added_before_it(tmp_path: Path) -> None:
    def interrupted() -> None:
        with TopKCacheWriter(tmp_path, header()) as writer:
            writer.add(0, *sample(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    cache = xt.TopKCache(tmp_path)
    assert cache.sample_ids == [0]
    assert not cache.ranks[0].closed


def test_a_full_disk_leaves_no_half_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    def fill() -> None:
        with TopKCacheWriter(tmp_path, header()) as writer:
            writer.add(0, *sample(0))
            writer.flush()
            writer.add(1, *sample(1))
            monkeypatch.setattr(os, "fsync", full_disk)
            writer.flush()

    with pytest.raises(OSError, match="no space left"):
        fill()
    monkeypatch.undo()
    assert xt.TopKCache(tmp_path).sample_ids == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "header.json",
        "index-00000.jsonl",
        "shard-00000-000000.safetensors",
    ]


def test_a_reader_beside_a_writer_sees_whole_shards(tmp_path: Path) -> None:
    with TopKCacheWriter(tmp_path, header(), shard_tokens=8) as writer:
        for number in range(6):
            writer.add(number, *sample(number))
            seen = xt.TopKCache(tmp_path)
            assert verify.damages(seen) == []
        assert len(seen) == 5
    assert len(xt.TopKCache(tmp_path)) == 6


def test_ranks_write_side_by_side_and_are_read_as_one(tmp_path: Path) -> None:
    with (
        TopKCacheWriter(tmp_path, header(), rank=1, shard_tokens=10) as one,
        TopKCacheWriter(tmp_path, header(), rank=0, shard_tokens=10) as zero,
    ):
        for number in range(10):
            (one if number % 2 else zero).add(number, *sample(number))
    teachers.write(tmp_path / "alone", range(10))
    assert_same(contents(tmp_path), contents(tmp_path / "alone"))


def test_a_sample_that_two_ranks_wrote_is_read_from_the_lower(tmp_path: Path) -> None:
    """As where a distributed sampler repeats samples to give every rank as many."""
    with TopKCacheWriter(tmp_path, header(), rank=1) as one, TopKCacheWriter(tmp_path, header(), rank=0) as zero:
        one.add("same", *sample(1))
        zero.add("same", *sample(2))
    cache = xt.TopKCache(tmp_path)
    assert len(cache) == 1
    assert cache["same"].length == 5


def test_a_writer_knows_the_samples_of_every_rank(tmp_path: Path) -> None:
    teachers.write(tmp_path, range(3), rank=1)
    with TopKCacheWriter(tmp_path, header(), rank=0) as writer:
        assert [number in writer for number in range(4)] == [True, True, True, False]


@pytest.mark.skipif(os.name == "nt", reason="locks are POSIX")
def test_two_writers_of_one_rank_are_refused(tmp_path: Path) -> None:
    with (
        TopKCacheWriter(tmp_path, header()),
        pytest.raises(ValueError, match=r"rank must be one that no other writer writes now, but .* is locked"),
    ):
        TopKCacheWriter(tmp_path, header())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": "other"}, "teacher must be that of the cache in .*, 'made up', got 'other'"),
        ({"k": 8}, "k must be that of the cache in .*, 16, got 8"),
        ({"temperatures": (1.0,)}, r"temperatures must be that of the cache in .*, \(1.0, 2.0\), got \(1.0,\)"),
    ],
)
def test_a_writer_with_another_header_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    teachers.write(tmp_path, range(1))
    with pytest.raises(ValueError, match=message):
        TopKCacheWriter(tmp_path, header(**change))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rank": -1}, ValueError, "rank must be at least 0, got -1"),
        ({"rank": "0"}, TypeError, "rank must be an integer, got str"),
        ({"shard_tokens": 0}, ValueError, "shard_tokens must be at least 1, got 0"),
    ],
)
def test_options_of_a_writer_that_cannot_be_are_refused(
    tmp_path: Path, options: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        TopKCacheWriter(tmp_path, header(), **options)  # type: ignore[arg-type]


def test_dropped_shards_are_written_again(tmp_path: Path) -> None:
    teachers.write(tmp_path / "whole", range(COUNT))
    teachers.write(tmp_path / "damaged", range(COUNT))
    cache = xt.TopKCache(tmp_path / "damaged")
    entry = cache.shards[1]
    path = tmp_path / "damaged" / entry.shard
    path.write_bytes(path.read_bytes()[:-1])
    found = [entry for entry, _ in verify.damages(xt.TopKCache(tmp_path / "damaged"))]
    assert found == [entry]
    verify.drop(cache, found)
    with pytest.raises(KeyError):
        xt.TopKCache(tmp_path / "damaged")[entry.samples[0]]
    teachers.write(tmp_path / "damaged", range(COUNT))
    assert_same(contents(tmp_path / "damaged"), contents(tmp_path / "whole"))


def test_shards_are_safetensors_files(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    teachers.write(tmp_path, range(3))
    cache = xt.TopKCache(tmp_path)
    columns = safetensors.load_file(tmp_path / cache.shards[0].shard)
    assert columns.keys() == shard.columns(cache.header).keys()
    assert torch.equal(columns["log_z"], torch.cat([sample(number)[0].log_z for number in range(3)]))


def test_an_index_is_locked_only_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "index-00000.jsonl"
    Appender(path).close(finished=True)
    again = Appender(path)
    assert again.found.closed
    again.close(finished=False)
