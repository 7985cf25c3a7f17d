"""Writing a teacher's entries by sample and reading them at random: what comes back, and what is refused."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import teachers
import torch
from teachers import TEMPERATURES, VOCAB, K, header, sample

import xentile as xt
from xentile.cache import CachedTopK, CacheHeader, TopKCacheWriter, tokenizer_hash
from xentile.cache.shard import columns

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "cache"
    teachers.write(path, range(COUNT))
    return path


def assert_equal(a: CachedTopK, b: CachedTopK) -> None:
    for name, x, y in zip(CachedTopK._fields, a, b, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_sample_comes_back(folder: Path, temperature: float) -> None:
    cache = xt.TopKCache(folder, temperature=temperature)
    column = TEMPERATURES.index(temperature)
    for number in (COUNT - 1, 0, 7):
        entries, tokens = sample(number)
        cached = cache[number]
        assert [t.dtype for t in cached] == [torch.int32, *[torch.float32] * 3, torch.int32, torch.int64]
        assert torch.equal(cached.ids.sort().values, entries.ids.sort().values)
        assert torch.equal(cached.log_z, entries.log_z[:, column])
        assert torch.equal(cached.tail_logprob, entries.tail_logprob[:, column])
        assert torch.equal(cached.token_ids, tokens.int())
        assert torch.equal(cached.logprobs[:, 0], entries.logprobs[:, 0])
        span = entries.logprobs[:, :1] - entries.logprobs[:, -1:]
        assert ((cached.logprobs - entries.logprobs).abs() <= span / 8180).all()
        assert cached.length == len(tokens)


def test_a_cached_sample_goes_into_the_loss_as_it_is(folder: Path) -> None:
    entries = xt.TopKCache(folder, temperature=2.0).batch([3, 4])
    student = torch.randn(*entries.ids.shape[:2], VOCAB, requires_grad=True)
    target = torch.where(torch.arange(entries.ids.shape[1]) < entries.length[:, None], 0, -100)
    out = xt.topk_distillation_loss(
        student,
        entries.ids,
        entries.logprobs,
        target,
        support="tail_bucket",
        temperature=2.0,
        teacher_log_z=entries.log_z,
        teacher_tail_logprob=entries.tail_logprob,
    )
    out.loss.backward()
    assert out.loss.isfinite()
    assert out.loss > 0


def test_a_batch_is_its_samples_padded_with_rows_that_have_all_their_mass_in_the_tail(folder: Path) -> None:
    cache = xt.TopKCache(folder)
    numbers = [4, 0, 11]
    batch = cache.batch(numbers)
    assert batch.length.tolist() == [7, 3, 4]
    assert batch.ids.shape == (3, 7, K)
    for row, number in enumerate(numbers):
        single = cache[number]
        for name in ("ids", "logprobs", "log_z", "tail_logprob", "token_ids"):
            assert torch.equal(getattr(batch, name)[row, : single.length], getattr(single, name))
    padding = [getattr(batch, name)[1, 3:].unique().tolist() for name in CachedTopK._fields[:5]]
    assert padding == [[-1], [-torch.inf], [0.0], [0.0], [-1]]
    assert_equal(batch, xt.TopKCache.collate([cache[number] for number in numbers]))


def test_fewer_entries_are_those_of_a_teacher_asked_for_fewer(folder: Path) -> None:
    for column, temperature in enumerate(TEMPERATURES):
        cached = xt.TopKCache(folder, k=5, temperature=temperature)[9]
        fewer = xt.teacher_topk(teachers.logits(len(cached.ids), seed=9), 5, temperatures=TEMPERATURES)
        assert torch.equal(cached.ids, fewer.ids)
        torch.testing.assert_close(cached.tail_logprob, fewer.tail_logprob[:, column], rtol=1e-3, atol=1e-3)


def test_it_is_a_dataset_for_workers(folder: Path) -> None:
    """Forked here; the pickled copy is what a spawned worker gets."""
    cache = xt.TopKCache(folder)
    cache[0]  # opens a shard in this process
    copy = pickle.loads(pickle.dumps(cache))
    loader = torch.utils.data.DataLoader(
        copy, sampler=cache.sample_ids, batch_size=8, collate_fn=xt.TopKCache.collate, num_workers=2
    )
    batches = list(loader)
    assert len(batches) == 3
    for start, batch in zip((0, 8, 16), batches, strict=True):
        assert_equal(batch, cache.batch(cache.sample_ids[start : start + 8]))


def test_it_counts_and_finds_its_samples(folder: Path) -> None:
    cache = xt.TopKCache(folder)
    assert len(cache) == COUNT
    assert list(cache) == cache.sample_ids == list(range(COUNT))
    assert 3 in cache
    assert "3" not in cache
    assert len(cache.shards) > 1


def test_a_number_and_its_digits_are_two_samples(tmp_path: Path) -> None:
    with TopKCacheWriter(tmp_path, header()) as writer:
        writer.add(1, *sample(1))
        writer.add("1", *sample(2))
    cache = xt.TopKCache(tmp_path)
    assert (cache[1].length, cache["1"].length) == (4, 5)


def test_absent_entries_come_back_last_and_their_order_does_not_matter(tmp_path: Path) -> None:
    ids = torch.tensor([[3, -1, 8], [-1, -1, -1]])
    logprobs = torch.tensor([[-2.0, -0.5, -1.0], [-1.0, -2.0, -torch.inf]])
    entries = xt.TeacherTopK(ids, logprobs, torch.zeros(2, 1), torch.tensor([[-0.7], [0.0]]))
    with TopKCacheWriter(tmp_path, CacheHeader("made up", 10, 3)) as writer:
        writer.add("a", entries)
    cached = xt.TopKCache(tmp_path)["a"]
    assert cached.ids.tolist() == [[8, 3, -1], [-1, -1, -1]]
    assert cached.logprobs.tolist() == [[-1.0, -2.0, -torch.inf], [-torch.inf] * 3]
    assert cached.token_ids is None


@pytest.mark.parametrize(("vocab_size", "k"), [(1, 1), (2, 1), (5, 5), (1000, 1), (2**20, 3)])
def test_every_vocabulary_and_k_has_its_columns(tmp_path: Path, vocab_size: int, k: int) -> None:
    entries = xt.teacher_topk(teachers.logits(2, vocab_size), k)
    with TopKCacheWriter(tmp_path, CacheHeader("made up", vocab_size, k)) as writer:
        writer.add("a", entries)
    assert torch.equal(xt.TopKCache(tmp_path)["a"].ids.sort().values, entries.ids.sort().values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_log_probabilities_of_any_dtype_are_taken(tmp_path: Path, dtype: torch.dtype, device: torch.device) -> None:
    entries = xt.TeacherTopK(*(t.to(device) for t in sample(1)[0]))
    with TopKCacheWriter(tmp_path, header(has_token_ids=False)) as writer:
        writer.add("a", entries._replace(ids=entries.ids.long(), logprobs=entries.logprobs.to(dtype)))
    assert torch.equal(xt.TopKCache(tmp_path)["a"].logprobs[:, 0], entries.logprobs[:, 0].to(dtype).float().cpu())


def test_the_files_are_small(tmp_path: Path) -> None:
    """At most 240 bytes a token at K = 64, one temperature and the largest vocabulary, all files counted."""
    rows, vocab_size = 2048, 2**20
    generator = np.random.default_rng(0)
    ids = torch.from_numpy(np.stack([generator.choice(vocab_size, 64, replace=False) for _ in range(rows)]))
    logprobs = -torch.rand(rows, 64).sort().values
    entries = xt.TeacherTopK(ids, logprobs - 5, torch.zeros(rows, 1), torch.full((rows, 1), -1.0))
    with TopKCacheWriter(tmp_path, CacheHeader("made up", vocab_size, 64)) as writer:
        for part in range(8):
            writer.add(f"document {part}", xt.TeacherTopK(*(t[part * 256 :][:256] for t in entries)))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 240 * rows


def test_the_blocks_of_the_documentation_run_one_after_the_other(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs/teacher_cache.md").read_text()
    names: dict[str, object] = {"folder": tmp_path}
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/teacher_cache.md", "exec"), names)


@pytest.mark.parametrize(("vocab_size", "size"), [(2**20, 238), (151936, 216)])
def test_a_token_takes_the_bytes_that_the_documentation_says(vocab_size: int, size: int) -> None:
    stored = columns(header(vocab_size=vocab_size, k=64, temperatures=(1.0,), has_token_ids=False))
    assert sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in stored.values()) == size


def test_a_tokenizer_is_its_vocabulary() -> None:
    class Tokenizer:
        def __init__(self, vocabulary: dict[str, int]) -> None:
            self.get_vocab = lambda: vocabulary

    assert tokenizer_hash(Tokenizer({"a": 0, "b": 1})) == tokenizer_hash(Tokenizer({"b": 1, "a": 0}))
    assert tokenizer_hash(Tokenizer({"a": 0, "b": 1})) != tokenizer_hash(Tokenizer({"a": 1, "b": 0}))


ENTRIES, TOKENS = sample(2)
NAN = ENTRIES.logprobs.clone().index_fill_(0, torch.tensor([3]), torch.nan)
# sample_id, changes of the entries, token_ids, type, what the message says
REFUSED: dict[str, tuple[Any, dict[str, Any], Any, type[Exception], str]] = {
    "id float": (1.5, {}, TOKENS, TypeError, "sample_id must be int or str, got float"),
    "id bool": (True, {}, TOKENS, TypeError, "sample_id must be int or str, got bool"),
    "id twice": ("there", {}, TOKENS, ValueError, "sample_id must not be in the cache yet, got 'there'"),
    "no rows": (
        1,
        {"ids": ENTRIES.ids[:0]},
        TOKENS,
        ValueError,
        r"entries.ids must have at least one row, got shape \[0",
    ),
    "ids of other K": (1, {"ids": ENTRIES.ids[:, 1:]}, TOKENS, ValueError, r"entries.ids must have shape \[5, 16\]"),
    "ids float": (
        1,
        {"ids": ENTRIES.ids.float()},
        TOKENS,
        TypeError,
        "entries.ids must be integers, got torch.float32",
    ),
    "ids too large": (1, {"ids": ENTRIES.ids + VOCAB}, TOKENS, ValueError, r"below vocab_size 500, got \d+ \(row 0\)"),
    "ids twice": (1, {"ids": ENTRIES.ids * 0 + 7}, TOKENS, ValueError, r"differ within a row, got 7 twice \(row 0\)"),
    "logprobs shorter": (
        1,
        {"logprobs": ENTRIES.logprobs[1:]},
        TOKENS,
        ValueError,
        r"logprobs must have shape \[5, 16\]",
    ),
    "logprobs NaN": (1, {"logprobs": NAN}, TOKENS, ValueError, "entries.logprobs must not be NaN, as in row 3"),
    "probabilities": (
        1,
        {"logprobs": ENTRIES.logprobs.exp()},
        TOKENS,
        ValueError,
        "must be logarithms of probabilities",
    ),
    "log_z 1-d": (1, {"log_z": ENTRIES.log_z[:, 0]}, TOKENS, ValueError, r"log_z must have shape \[5, 2\], got \[5\]"),
    "log_z inf": (1, {"log_z": ENTRIES.log_z + torch.inf}, TOKENS, ValueError, "log_z must be finite, got infinity"),
    "tail > 0": (1, {"tail_logprob": ENTRIES.log_z * 0 + 1}, TOKENS, ValueError, "tail_logprob must be logarithms"),
    "no tokens": (1, {}, None, ValueError, "token_ids must be given, because the header says has_token_ids=True"),
    "tokens shorter": (1, {}, TOKENS[1:], ValueError, r"token_ids must be integers of shape \[5\], got .* \[4\]"),
    "tokens float": (1, {}, TOKENS.float(), ValueError, "token_ids must be integers .* got torch.float32"),
}


@pytest.mark.parametrize(("sample_id", "changes", "tokens", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_stored_is_refused_and_the_rest_is_written(
    sample_id: Any, changes: dict[str, Any], tokens: Any, kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with TopKCacheWriter(tmp_path, header()) as writer:
        writer.add("there", *sample(0))
        with pytest.raises(kind, match=message):
            writer.add(sample_id, ENTRIES._replace(**changes), tokens)
        writer.add("after", *sample(1))
    assert xt.TopKCache(tmp_path).sample_ids == ["there", "after"]


def test_tokens_are_refused_where_the_header_has_none_and_so_is_a_tuple(tmp_path: Path) -> None:
    with TopKCacheWriter(tmp_path, header(has_token_ids=False)) as writer:
        with pytest.raises(ValueError, match="token_ids must be None, because the header says has_token_ids=False"):
            writer.add(0, *sample(0))
        with pytest.raises(TypeError, match=r"entries must have the fields of xt.teacher_topk's result"):
            writer.add(0, tuple(sample(0)[0]))


HEADERS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "teacher empty": ({"teacher": ""}, ValueError, "teacher must be the name of the teacher, got ''"),
    "V float": ({"vocab_size": 5.0}, TypeError, "vocab_size must be an integer, got float"),
    "V too large": ({"vocab_size": 2**20 + 1}, ValueError, r"vocab_size must be in \[1, 1048576\], got 1048577"),
    "k 0": ({"k": 0}, ValueError, r"k must be in \[1, 500\], got 0"),
    "k > V": ({"k": 501}, ValueError, r"k must be in \[1, 500\], got 501"),
    "k > 1024": ({"k": 1025, "vocab_size": 5000}, ValueError, r"k must be in \[1, 1024\], got 1025"),
    "no temperature": ({"temperatures": ()}, ValueError, r"temperatures must be one or more numbers, .* got \(\)"),
    "temperature 0": ({"temperatures": (1.0, 0.0)}, ValueError, "temperatures must be .* above 0"),
    "temperature twice": ({"temperatures": (1, 1.0)}, ValueError, "temperatures must differ from one another"),
    "temperature number": ({"temperatures": 1.0}, TypeError, "temperatures must be a sequence of numbers, got 1.0"),
    "hash bytes": ({"tokenizer_hash": b"a"}, TypeError, "tokenizer_hash must be a str or None, got bytes"),
    "tokens 1": ({"has_token_ids": 1}, TypeError, "has_token_ids must be bool, got int"),
}


@pytest.mark.parametrize(("changes", "kind", "message"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_cannot_be_is_refused(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        header(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 3.0}, "temperature must be one that the cache stores, 1.0, 2.0, got 3.0"),
        ({"k": 17}, r"k must be an integer in \[1, 16\], got 17"),
        ({"k": 0}, r"k must be an integer in \[1, 16\], got 0"),
        ({"k": True}, r"k must be an integer in \[1, 16\], got True"),
        ({"tokenizer_hash": "ab"}, "tokenizer_hash must be that of the teacher's tokenizer, None, got 'ab'"),
    ],
)
def test_what_the_cache_has_not_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        xt.TopKCache(folder, **options)


@pytest.mark.parametrize("sample_id", [COUNT, "0", [1], None])
def test_a_sample_that_is_not_there_is_named(folder: Path, sample_id: Any) -> None:
    with pytest.raises(KeyError, match=r"is not one of the 20 of the cache, such as 0") as caught:
        xt.TopKCache(folder)[sample_id]
    assert repr(sample_id) in str(caught.value)


@pytest.mark.parametrize("sample_ids", [[], ()])
def test_an_empty_batch_is_refused(folder: Path, sample_ids: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="sample_ids must name at least one sample, got none"):
        xt.TopKCache(folder).batch(sample_ids)


def test_a_folder_without_a_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must be a folder with a top-K cache, but has no header.json"):
        xt.TopKCache(tmp_path)


def test_where_safetensors_is_missing_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="a top-K cache needs safetensors, which is not installed: pip install safet"):
        xt.TopKCache(tmp_path)
