"""`python -m xentile cache`: a teacher run into a cache, looked at, verified and mended."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import teachers
import torch

import xentile as xt
from xentile import __main__ as command
from xentile.cache import TopKCacheWriter, progress, teacher

if TYPE_CHECKING:
    from pathlib import Path

VOCAB = 256


class Model:
    """What of a model of transformers is used: a bigram model over bytes that knows the text."""

    def __init__(self, text: bytes) -> None:
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCAB))
        self.table = torch.zeros(VOCAB, VOCAB)
        for a, b in itertools.pairwise(text):
            self.table[a, b] += 1
        self.read = 0

    def to(self, device: str) -> Model:
        assert device == "cpu"
        return self

    def eval(self) -> Model:
        return self

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        self.read += input_ids.numel()
        return SimpleNamespace(logits=self.table[input_ids])


TEXT = "the cat sat on the mat; the dog sat on the log. " * 5


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    model = Model(TEXT.encode())

    class Tokenizer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

        def get_vocab(self) -> dict[str, int]:
            return {chr(i): i for i in range(VOCAB)}

    def from_pretrained(pretrained_model_name_or_path: str, **options: str) -> Any:
        return model if options.pop("dtype", None) else Tokenizer()

    loader = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=loader, AutoModelForCausalLM=loader))
    return model


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*arguments: Any) -> int:
    return command.main(["cache", *map(str, arguments)])


def test_build_inspect_verify(model: Model, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", tmp_path / "cache", "--k", 8, "--temperatures", 1, 2, "--context", 32]
    assert run("build", "folder/bigrams", text, *options) == 0
    assert model.read == len(TEXT)
    cache = xt.TopKCache(tmp_path / "cache", temperature=2.0)
    assert cache.header.teacher == "bigrams"
    assert cache.sample_ids[:2] == ["text.txt:0", "text.txt:32"]
    cached = cache["text.txt:32"]
    expected = xt.teacher_topk(model.table[torch.tensor(list(TEXT.encode()[32:64]))], 8, temperatures=(2.0,))
    torch.testing.assert_close(cached.log_z, expected.log_z[:, 0])
    assert torch.equal(cached.ids[:, 0], expected.ids[:, 0])
    capsys.readouterr()

    assert run("build", "folder/bigrams", text, *options) == 0
    assert model.read == len(TEXT), "what is there is not read again"
    assert f"0 of {len(TEXT)} tokens of rank 0 read now" in capsys.readouterr().out

    assert run("inspect", tmp_path / "cache") == 0
    shown = capsys.readouterr().out
    for line in (
        "teacher        bigrams",
        "temperatures   1.0, 2.0",
        "tokens         240, ",
        "1 shards, 240 tokens, fin",
    ):
        assert line in shown

    assert run("verify", tmp_path / "cache") == 0
    shown = capsys.readouterr().out
    assert "among the entries of row i: token i + 1 in 100.0%" in shown
    assert "1 shards, 8 samples: every byte is as written" in shown


def test_ranks_build_one_cache_of_npy_files(model: Model, tmp_path: Path) -> None:
    np.save(tmp_path / "documents.npy", np.arange(40, dtype=np.uint16).reshape(4, 10))
    for rank in (0, 1):
        options = ["--out", tmp_path / "cache", "--k", 2, "--context", 5, "--rank", rank, "--world-size", 2]
        assert run("build", "bigrams", tmp_path / "documents.npy", *options) == 0
    cache = xt.TopKCache(tmp_path / "cache")
    assert sorted(cache) == [f"documents.npy:{i}:{start}" for i in range(4) for start in (0, 5)]
    assert {rank.path.name for rank in cache.ranks} == {"index-00000.jsonl", "index-00001.jsonl"}
    assert model.read == 40


def test_verify_names_damage_and_drops_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teachers.write(tmp_path, range(8), shard_tokens=12)
    entry = xt.TopKCache(tmp_path).shards[0]
    path = tmp_path / entry.shard
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert run("verify", tmp_path) == 1
    shown = capsys.readouterr().out
    assert f"{path} is damaged: checksums do not match; this concerns 1 sample: {entry.samples[-1]}" in shown
    assert f"1 of {len(xt.TopKCache(tmp_path).shards)} shards are damaged" in shown

    assert run("verify", tmp_path, "--drop-damaged") == 1
    assert f"dropped {len(entry.samples)} samples: 0, 1, 2" in capsys.readouterr().out
    assert run("verify", tmp_path) == 0 or "seems not to predict" in capsys.readouterr().out
    teachers.write(tmp_path, range(8))
    assert sorted(xt.TopKCache(tmp_path)) == list(range(8))


def test_verify_fails_where_rows_seem_shifted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = torch.arange(40)
    entries = xt.teacher_topk(10.0 * torch.eye(teachers.VOCAB)[:40], 1)  # row i says token i
    with TopKCacheWriter(tmp_path, teachers.header(k=1, temperatures=(1.0,))) as writer:
        writer.add("a", entries, tokens)
    assert run("verify", tmp_path) == 1
    assert "row i seems not to predict token i + 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", 2, "--world-size", 2], "--rank must be in [0, 2), got 2"),
        (["--context", 0], "--context and --batch-size must be at least 1, got 0 and 4"),
        (["--k", 1000], "k must be in [1, 256], got 1000"),
        (["--temperatures", 0], "temperatures must be one or more numbers, finite and above 0, got (0.0,)"),
    ],
)
def test_wrong_options_are_an_error_in_one_line(
    model: Model, text: Path, options: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("build", "bigrams", text, "--out", tmp_path / "cache", *options) == 1
    assert capsys.readouterr().err == f"error: {message}\n"
    assert model.read == 0


@pytest.mark.parametrize("action", ["inspect", "verify"])
def test_a_folder_without_a_cache_is_an_error_in_one_line(
    action: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(action, tmp_path) == 1
    assert capsys.readouterr().err == f"error: {tmp_path} must be a folder with a top-K cache, but has no header.json\n"


@pytest.mark.parametrize(("name", "module"), [("bigrams", "transformers"), ("bigrams.gguf", "gguf")])
def test_what_a_teacher_needs_is_named_where_it_is_missing(
    model: Model,
    name: str,
    module: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run("build", name, text, "--out", tmp_path / "cache") == 1
    assert f"needs {module}, which is not installed: pip install {module}" in capsys.readouterr().err


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((1, 2, 3), np.int64)])
def test_an_npy_of_no_token_ids_is_refused(array: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"a.npy must hold integers with 1 or 2 dimensions, got .*"):
        teacher.read_tokens([tmp_path / "a.npy"], None)


def test_files_of_one_name_are_refused(text: Path, model: Model) -> None:
    tokenizer = sys.modules["transformers"].AutoTokenizer.from_pretrained("bigrams")
    with pytest.raises(ValueError, match=r"files must have different names, got text.txt twice"):
        teacher.read_tokens([text, text], tokenizer)


def test_padding_columns_of_the_teacher_are_no_part_of_it(tmp_path: Path) -> None:
    logits = teachers.logits(6, 40)
    padded = torch.cat([logits, torch.full((6, 24), 50.0)], dim=1)
    with TopKCacheWriter(tmp_path, teachers.header(vocab_size=40, k=4, temperatures=(1.0,))) as writer:
        teacher.extract(writer, [teacher.Sample("a", torch.arange(6))], lambda tokens: padded[tokens])
    assert torch.equal(xt.TopKCache(tmp_path)["a"].ids[:, 0].long(), logits.argmax(1))


def test_batches_are_of_one_length() -> None:
    seen = []

    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tokens.shape))
        return teachers.logits(tokens.numel()).reshape(*tokens.shape, -1)

    class Writer(SimpleNamespace):
        def __contains__(self, sample_id: object) -> bool:
            return sample_id == 2

    writer = Writer(header=teachers.header(), add=lambda *arguments: None)
    samples = [teacher.Sample(i, torch.arange(length)) for i, length in enumerate([4, 4, 4, 4, 3, 4])]
    assert teacher.extract(writer, samples, logits_of, batch_size=2) == 19
    assert seen == [(2, 4), (1, 4), (1, 3), (1, 4)]


def test_without_tqdm_progress_is_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with progress.progress("teacher", "tokens", 10) as bar:
        bar.update(4)
        bar.update(6)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" tokens")[0] for line in lines] == [
        "teacher: 4 of 10",
        "teacher: 10 of 10",
        "teacher: 10 of 10",
    ]
