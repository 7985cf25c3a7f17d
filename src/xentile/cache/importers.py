"""Entries of a sample from what inference servers answer.

Servers answer log-probabilities at temperature 1 and no tail. The tail is log(1 - sum p), computed in float64, and as a
difference it cancels: of a tail mass near or below the rounding of the server's log-probabilities (1e-7 in float32, and
more where the model computed in bfloat16) nothing is left. A cache written by `xt.teacher_topk` has it exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from xentile.cache.writer import Entries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

MASS_ABOVE_ONE = 1e-2  # what rounding makes of the sum of probabilities, bfloat16 included


def from_vllm(
    prompt_logprobs: Sequence[Mapping[Any, Any] | None], k: int, token_ids: Sequence[int] | None = None
) -> Entries:
    """The entries of one prompt from vLLM's `prompt_logprobs`.

    Args:
        prompt_logprobs: for each position of the prompt None (the first) or {token id: entry}, an entry a
            `{"logprob": ..., "rank": ...}`, an object with such attributes, or a number. Token ids may be strings, as
            in JSON. Position i + 1 becomes row i.
        k: how many entries to keep, the most probable; among equal ones the lower id. The token of the prompt, which
            vLLM adds where it is not among the first, is left out where its rank is above k.
        token_ids: the tokens of the prompt. vLLM answers the log-probability of each of them, so that a prompt that is
            not the one of the answer, or is shifted against it, is recognised.

    Returns:
        Entries with ids and logprobs (L - 1, k), log_z and tail_logprob (L - 1, 1), for temperatures=(1.0,).

    Raises:
        ValueError: if an argument is not as above.

    Example:
        >>> entries = from_vllm([None, {"7": {"logprob": -0.5, "rank": 1}, "3": {"logprob": -3.0, "rank": 9}}], k=1)
        >>> entries.ids, entries.tail_logprob.exp()
        (tensor([[7]]), tensor([[0.3935]]))
    """
    name = "prompt_logprobs"
    positions = _positions(prompt_logprobs, lambda position: map(_vllm_entry, position.items()), name)
    if token_ids is not None:
        if len(token_ids) != len(positions) + 1:
            raise ValueError(f"token_ids must be as many as {name}, {len(positions) + 1}, got {len(token_ids)}")
        for place, (position, token_id) in enumerate(zip(positions, token_ids[1:], strict=True), 1):
            if all(entry.token_id != token_id for entry in position):
                raise ValueError(f"token_ids must be those of {name}, which has no {token_id} at position {place}")
    return _entries(positions, k, name)


def from_sglang(input_top_logprobs: Sequence[Sequence[Sequence[Any]] | None], k: int) -> Entries:
    """The entries of one prompt from SGLang's `input_top_logprobs`, asked for with `logprob_start_len=0`.

    Args:
        input_top_logprobs: for each position of the prompt None (the first) or a list of (logprob, token id, text).
            Position i + 1 becomes row i.
        k: how many entries to keep, the most probable; among equal ones the lower id.

    Returns:
        As `from_vllm`.

    Raises:
        ValueError: if an argument is not as above.
    """
    name = "input_top_logprobs"
    return _entries(_positions(input_top_logprobs, lambda position: map(_sglang_entry, position), name), k, name)


def samples(records: Sequence[Any], source: str) -> Iterator[tuple[Any, Any, Any]]:
    """(sample id, positions, token ids or None) of the records of a JSON file of a server's answers.

    A record of vLLM has `prompt_logprobs`, itself or in its `choices`, one of SGLang `input_top_logprobs`, itself or in
    its `meta_info`. Its sample id is its `sample_id`, or its `id` (SGLang: that in `meta_info`), or its number; of more
    than one choice `id/number`. The tokens of the prompt are its `prompt_token_ids`.
    """
    field = FIELDS[source]
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"record {number} must be a JSON object, got {type(record).__name__}")
        parts = record.get("choices") or [record.get("meta_info") or record]
        for choice, part in enumerate(parts):
            if not isinstance(part, dict) or part.get(field) is None:
                raise ValueError(f"record {number} must have {field}: was the server asked for it?")
            sample_id = record.get("sample_id", record.get("id", part.get("id", number)))
            tokens = part.get("prompt_token_ids", record.get("prompt_token_ids"))
            yield (sample_id if len(parts) == 1 else f"{sample_id}/{choice}"), part[field], tokens


FIELDS = {"vllm": "prompt_logprobs", "sglang": "input_top_logprobs"}


def sample(source: str, answer: Any, k: int, token_ids: Sequence[int] | None) -> tuple[Entries, Tensor | None]:
    """The entries of an answer of a server, and the tokens to which its rows belong: all but the last."""
    if source == "vllm":
        entries = from_vllm(answer, k, token_ids)
    else:
        entries = from_sglang(answer, k)
        if token_ids is not None and len(token_ids) != len(answer):
            raise ValueError(f"prompt_token_ids must be as many as positions, {len(answer)}, got {len(token_ids)}")
    return entries, None if token_ids is None else torch.tensor(token_ids[:-1])


class _Entry(NamedTuple):
    logprob: float
    token_id: int
    rank: int


def _vllm_entry(item: tuple[Any, Any]) -> _Entry:
    token_id, entry = item
    if isinstance(entry, (int, float)):
        return _Entry(float(entry), int(token_id), 1)
    if isinstance(entry, dict):
        return _Entry(float(entry["logprob"]), int(token_id), entry.get("rank") or 1)
    return _Entry(float(entry.logprob), int(token_id), entry.rank or 1)


def _sglang_entry(entry: Sequence[Any]) -> _Entry:
    return _Entry(float(entry[0]), int(entry[1]), 1)


def _positions(answer: Sequence[Any], parse: Callable[[Any], Iterator[_Entry]], name: str) -> list[list[_Entry]]:
    """The entries at every position but the first, which has none."""
    if len(answer) < 2 or answer[0] is not None:
        raise ValueError(f"{name} must have None first and then at least one position with entries, got {answer!r:.80}")
    result = []
    for place, position in enumerate(answer[1:], 1):
        try:
            result.append(list(parse(position)))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} must have the server's entries, got {position!r:.80} at position {place}"
            ) from error
    return result


def _entries(positions: list[list[_Entry]], k: int, name: str) -> Entries:
    ids = torch.full((len(positions), k), -1)
    logprobs = torch.full((len(positions), k), -torch.inf, dtype=torch.float64)
    for row, position in enumerate(positions):
        kept = sorted((entry for entry in position if entry.rank <= k), key=lambda e: (-e.logprob, e.token_id))[:k]
        ids[row, : len(kept)] = torch.tensor([entry.token_id for entry in kept], dtype=torch.int64)
        logprobs[row, : len(kept)] = torch.tensor([entry.logprob for entry in kept], dtype=torch.float64)
    mass = logprobs.exp().sum(1, keepdim=True)
    if (bad := (~(mass <= 1 + MASS_ABOVE_ONE)).nonzero()).numel():
        row = int(bad[0, 0])
        total = f"{mass[row].item():g} at position {row + 1}"
        raise ValueError(f"{name} must be log-probabilities at temperature 1, got a sum of probabilities of {total}")
    tail = torch.log1p(-mass.clamp(max=1.0))
    return Entries(ids, logprobs.float(), torch.zeros(len(positions), 1), tail.float())
