"""What vLLM and SGLang answer, as entries of a cache."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import xentile as xt
from xentile import __main__ as command
from xentile.cache.importers import from_sglang, from_vllm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VOCAB, K = 50, 3
TOKENS = [7, 3, 9, 3]


def logprobs() -> torch.Tensor:
    """Of a teacher that read TOKENS, row i after token i."""
    return torch.randn(len(TOKENS), VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(
        1
    )


def vllm_answer(entry: Callable[[float, int, str], Any] | None = None) -> list[Any]:
    """As the server makes it: the first K, and the token of the prompt where it is not among them."""
    make = entry or (lambda logprob, rank, text: {"logprob": logprob, "rank": rank, "decoded_token": text})
    answer: list[Any] = [None]
    for row, token in zip(logprobs(), TOKENS[1:], strict=False):
        order = row.argsort(descending=True).tolist()
        kept = order[:K] if token in order[:K] else [*order[:K], token]
        answer.append({str(i): make(row[i].item(), order.index(i) + 1, "?") for i in kept})
    return answer


def sglang_answer() -> list[Any]:
    top = logprobs().topk(K)
    pairs = zip(top.values[:-1].tolist(), top.indices[:-1].tolist(), strict=True)
    return [None, *([[value, token, "?"] for value, token in zip(*pair, strict=True)] for pair in pairs)]


def assert_the_first(entries: Any, k: int) -> None:
    rows = logprobs()[:-1]
    top = rows.topk(k)
    assert torch.equal(entries.ids.long(), top.indices)
    torch.testing.assert_close(entries.logprobs, top.values.float())
    tail = rows.scatter(1, top.indices, -torch.inf).logsumexp(1, keepdim=True)
    torch.testing.assert_close(entries.tail_logprob, tail.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(entries.log_z, torch.zeros(len(rows), 1))


@pytest.mark.parametrize("k", [1, 2, K])
def test_vllm_and_sglang_give_the_first_k_and_the_tail(k: int) -> None:
    assert_the_first(from_vllm(vllm_answer(), k, TOKENS), k)
    assert_the_first(from_sglang(sglang_answer(), k), k)


def test_the_token_of_the_prompt_that_vllm_adds_is_left_out_by_its_rank() -> None:
    """With room for K + 1 it would make a support with a hole; there it is kept only if it is the next."""
    entries = from_vllm(vllm_answer(), K)
    assert (entries.ids >= 0).all()
    wider = from_vllm(vllm_answer(), K + 1)
    rank = [logprobs()[i].argsort(descending=True).tolist().index(t) + 1 for i, t in enumerate(TOKENS[1:])]
    assert [(row[K] >= 0).item() for row in wider.ids] == [r == K + 1 for r in rank]


def test_entries_of_vllm_may_be_objects_or_numbers() -> None:
    known = from_vllm(vllm_answer(), K)
    objects = from_vllm(vllm_answer(lambda logprob, rank, text: SimpleNamespace(logprob=logprob, rank=rank)), K)
    numbers = from_vllm(vllm_answer(lambda logprob, rank, text: logprob), K)
    for other in (objects, numbers):
        assert torch.equal(other.ids, known.ids)
        assert torch.equal(other.tail_logprob, known.tail_logprob)


def test_a_mass_that_rounds_above_one_leaves_no_tail() -> None:
    entries = from_sglang([None, [[1e-7, 4, "?"]]], 1)
    assert entries.tail_logprob.item() == -math.inf


BAD_VLLM: dict[str, tuple[Any, str]] = {
    "nothing": ([], "prompt_logprobs must have None first and then at least one position"),
    "one position": ([None], "prompt_logprobs must have None first and then at least one position"),
    "entries first": ([{"1": -1.0}, {"1": -1.0}], "prompt_logprobs must have None first"),
    "None later": ([None, {"1": -1.0}, None], "prompt_logprobs must have the server's entries, got None at position 2"),
    "no logprob": ([None, {"1": {"rank": 1}}], "must have the server's entries, got .*rank.* at position 1"),
    "no number": ([None, {"a": -1.0}], "must have the server's entries, got .* at position 1"),
    "temperature": (
        [None, {"1": -0.1, "2": -0.1}],
        "at temperature 1, got a sum of probabilities of 1.80967 at position 1",
    ),
    "NaN": ([None, {"1": math.nan}], "at temperature 1, got a sum of probabilities of nan at position 1"),
}


@pytest.mark.parametrize(("answer", "message"), BAD_VLLM.values(), ids=BAD_VLLM)
def test_what_is_no_answer_of_vllm_is_refused(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_vllm(answer, 2)


@pytest.mark.parametrize("answer", [[None, [[-1.0]]], [None, [-1.0]], [None, 3], [None, None]])
def test_what_is_no_answer_of_sglang_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError, match=r"input_top_logprobs must have the server's entries, got .* at position 1"):
        from_sglang(answer, 2)


def test_a_prompt_that_is_shifted_against_the_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="token_ids must be as many as prompt_logprobs, 4, got 3"):
        from_vllm(vllm_answer(), K, TOKENS[1:])
    other = int(logprobs()[0].argmin())
    with pytest.raises(
        ValueError, match=f"token_ids must be those of prompt_logprobs, which has no {other} at position 1"
    ):
        from_vllm(vllm_answer(), K, [TOKENS[0], other, *TOKENS[2:]])


def records(source: str) -> list[dict[str, Any]]:
    if source == "vllm":
        choice = {"prompt_logprobs": vllm_answer(), "prompt_token_ids": TOKENS}
        return [{"id": "a", "choices": [choice]}, {"id": "b", "choices": [choice, choice]}, choice]
    answer = {"input_top_logprobs": sglang_answer()}
    return [
        {"text": "", "prompt_token_ids": TOKENS, "meta_info": answer | {"id": "a"}},
        {"sample_id": "b", "prompt_token_ids": TOKENS, **answer},
    ]


def run(*arguments: Any) -> int:
    return command.main(["cache", *map(str, arguments)])


@pytest.mark.parametrize(("source", "ids"), [("vllm", ["a", "b/0", "b/1", 2]), ("sglang", ["a", "b"])])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_file_of_answers_becomes_a_cache(
    source: str, ids: list[Any], suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = records(source)
    text = json.dumps(answers) if suffix == "json" else "\n".join(map(json.dumps, answers))
    (tmp_path / f"answers.{suffix}").write_text(text)
    options = ["--out", tmp_path / "cache", "--k", K, "--teacher", "t", "--vocab-size", VOCAB]
    for added in (len(ids), 0):  # a second run skips what is there
        assert run("import", source, tmp_path / f"answers.{suffix}", *options) == 0
        assert f"{added} samples added, {len(ids) - added} were there already" in capsys.readouterr().out
    cache = xt.TopKCache(tmp_path / "cache")
    assert cache.sample_ids == ids
    cached = cache[ids[0]]
    assert cached.token_ids is not None
    assert cached.token_ids.tolist() == TOKENS[:-1]
    assert torch.equal(cached.ids.long(), logprobs()[:-1].topk(K).indices)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"answers.json must be JSON, but Expecting property name"),
        ('[{"id": 1}]', "record 0 must have prompt_logprobs: was the server asked for it?"),
        ("[1]", "record 0 must be a JSON object, got int"),
        (
            json.dumps([{"id": None, "prompt_logprobs": [None, {"1": -1.0}]}]),
            "sample_id must be int or str, got NoneType",
        ),
        (json.dumps([{"prompt_logprobs": [None, {"99": -1.0}]}]), "entries.ids must be below vocab_size 50, got 99"),
    ],
)
def test_a_file_that_is_not_what_a_server_answers_is_an_error_in_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "answers.json").write_text(content)
    options = ["--out", tmp_path / "cache", "--k", K, "--teacher", "t", "--vocab-size", VOCAB]
    assert run("import", "vllm", tmp_path / "answers.json", *options) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
