"""Running a teacher into a cache: any function from tokens to logits, or a causal language model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from xentile.cache.errors import optional
from xentile.cache.progress import progress
from xentile.reference import TeacherTopK
from xentile.teacher import teacher_topk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from xentile.cache.writer import TopKCacheWriter


class Sample(NamedTuple):
    """What the teacher reads at once."""

    sample_id: int | str
    token_ids: Tensor  # (L,) int64


@torch.no_grad()
def extract(
    writer: TopKCacheWriter,
    samples: Iterable[Sample],
    logits_of: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 1,
    total: int | None = None,
) -> int:
    """Run a teacher over samples and add what it answers to a cache. Those that are in it already are skipped.

    Args:
        writer: of the cache; its header says K, the temperatures, and whether the tokens are stored.
        samples: what the teacher reads. Consecutive ones of one length are run in batches.
        logits_of: tokens (B, L) int64 to logits (B, L, V) or wider; columns above the header's V must be padding.
        batch_size: the most samples in a batch.
        total: the number of tokens, for the progress bar.

    Returns:
        The number of tokens that the teacher read.

    Example:
        >>> import tempfile
        >>> from xentile.cache import CacheHeader, TopKCacheWriter
        >>> table = torch.randn(50, 50)  # a teacher that looks at one token
        >>> samples = [Sample("a", torch.arange(6)), Sample("b", torch.arange(9))]
        >>> with TopKCacheWriter(tempfile.mkdtemp(), CacheHeader("bigram", 50, k=4)) as writer:
        ...     extract(writer, samples, lambda tokens: table[tokens])
        15
    """
    header = writer.header
    done = 0
    with progress("teacher", "tokens", total) as bar:
        for batch in _batches(samples, batch_size):
            todo = [sample for sample in batch if sample.sample_id not in writer]
            if todo:
                logits = logits_of(torch.stack([sample.token_ids for sample in todo]))[..., : header.vocab_size]
                entries = teacher_topk(logits, header.k, temperatures=header.temperatures)
                for place, (sample_id, token_ids) in enumerate(todo):
                    part = TeacherTopK(*(field[place] for field in entries))
                    writer.add(sample_id, part, token_ids if header.has_token_ids else None)
            done += sum(len(sample.token_ids) for sample in todo)
            bar.update(sum(len(sample.token_ids) for sample in batch))
    return done


def windows(documents: Mapping[str, Tensor], context: int) -> Iterator[Sample]:
    """Cut each document into pieces of `context` tokens, the last one shorter; `name:start` is the sample id.

    Example:
        >>> [sample.sample_id for sample in windows({"book": torch.arange(5)}, 2)]
        ['book:0', 'book:2', 'book:4']
    """
    for name, tokens in documents.items():
        for start in range(0, len(tokens), context):
            yield Sample(f"{name}:{start}", tokens[start : start + context])


class CausalLM(NamedTuple):
    """A teacher and its tokenizer."""

    logits_of: Callable[[Tensor], Tensor]
    tokenizer: Any
    vocab_size: int


def load_causal_lm(name: str, *, device: str = "cpu", dtype: str = "auto") -> CausalLM:
    """A causal language model of transformers: a name, a folder, or a `.gguf` file (for which gguf must be installed).

    Args:
        name: what `from_pretrained` takes, or the path of a GGUF file.
        device: where it runs.
        dtype: of its weights, a name in torch; "auto" takes that of the file.

    Raises:
        ImportError: if transformers is not installed.
    """
    transformers = optional("transformers", "running a teacher", "transformers")
    path = Path(name)
    where = {"pretrained_model_name_or_path": name}
    if path.suffix == ".gguf":
        optional("gguf", "a teacher in a GGUF file", "gguf")
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=dtype).to(device).eval()

    def logits_of(token_ids: Tensor) -> Tensor:
        return model(input_ids=token_ids.to(device), use_cache=False).logits

    return CausalLM(logits_of, tokenizer, model.config.get_text_config().vocab_size)


def read_tokens(paths: Iterable[Path], tokenizer: Any) -> dict[str, Tensor]:
    """Token ids of files by name: `.npy` holds integers (L,) or documents (N, L), anything else is text in UTF-8."""
    documents: dict[str, Tensor] = {}
    for path in paths:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
                raise ValueError(f"{path} must hold integers with 1 or 2 dimensions, got {array.dtype} {array.shape}")
            tokens = torch.from_numpy(array.astype(np.int64))
            named = (
                {path.name: tokens} if array.ndim == 1 else {f"{path.name}:{i}": row for i, row in enumerate(tokens)}
            )
        else:
            text = path.read_text(encoding="utf-8")
            named = {path.name: torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)}
        if repeated := documents.keys() & named.keys():
            raise ValueError(f"files must have different names, got {sorted(repeated)[0]} twice")
        documents |= named
    return documents


def _batches(samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Consecutive samples of one length, at most so many."""
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) == batch_size or len(sample.token_ids) != len(batch[0].token_ids)):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch
