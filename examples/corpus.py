"""Text that every Python has: its documentation (`pydoc_data.topics`) and the sources of its standard library.

A document is one documentation topic or one source file. Documents are split by a checksum of their names, so the
held-out text is the same in every run and shares no document with the training text.
"""

import sysconfig
import zlib
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

DOCUMENTATION, SOURCES = "documentation", "standard library"
END = "<end>"  # follows every document
HELD_OUT_SHARE = 10  # one document in so many is held out
# Not prose and not code worth predicting: tests, character tables, and the documentation itself as one literal.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"})


class Corpus(NamedTuple):
    """Token ids of the training text, and of the held-out text of each kind."""

    vocabulary: int
    train: Tensor  # (tokens,) int64
    held_out: dict[str, Tensor]  # kind -> (tokens,) int64
    characters: int  # of the whole text


def documents(max_characters: int) -> dict[tuple[str, str], str]:
    """(kind, name) -> text, in a fixed order, up to `max_characters` in all."""
    library = Path(sysconfig.get_path("stdlib"))
    found: dict[tuple[str, str], str] = {(DOCUMENTATION, name): topics[name] for name in sorted(topics)}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if not SKIPPED_FOLDERS.intersection(name.parts):
            found[SOURCES, name.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    total = 0
    kept = {}
    for key, text in found.items():
        if total >= max_characters:
            break
        kept[key] = text
        total += len(text)
    return kept


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level byte-pair encoding (BPE): every text can be encoded, and none needs an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def is_held_out(key: tuple[str, str]) -> bool:
    """Whether a document (kind, name) is kept from training."""
    return zlib.crc32("/".join(key).encode()) % HELD_OUT_SHARE == 0


def load(vocabulary: int, max_characters: int) -> Corpus:
    """Read, split and encode the text; the tokenizer sees the training documents only."""
    texts = documents(max_characters)
    held = {key for key in texts if is_held_out(key)}
    tokenizer = train_tokenizer((text for key, text in texts.items() if key not in held), vocabulary)

    def encode(keys: Iterable[tuple[str, str]]) -> Tensor:
        encodings = tokenizer.encode_batch([texts[key] + END for key in keys])
        return torch.tensor([token for encoding in encodings for token in encoding.ids], dtype=torch.int64)

    return Corpus(
        vocabulary=tokenizer.get_vocab_size(),
        train=encode(key for key in texts if key not in held),
        held_out={kind: encode(key for key in sorted(held) if key[0] == kind) for kind in (DOCUMENTATION, SOURCES)},
        characters=sum(map(len, texts.values())),
    )


def windows(tokens: Tensor, context: int) -> Tensor:
    """(windows, context + 1): inputs and, shifted by one, targets. The last, shorter piece is dropped."""
    return tokens.unfold(0, context + 1, context) if len(tokens) > context else tokens.new_empty(0, context + 1)
