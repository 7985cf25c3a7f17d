"""What a cache says of itself: one JSON file, written first, the same for every writer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import operator
from typing import TYPE_CHECKING, Any

from xentile.cache.errors import DamagedCacheError
from xentile.cache.files import write_whole
from xentile.cache.packing import MAX_VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

NAME = "header.json"
FORMAT = "xentile top-K cache"
VERSION = 1
ALIGNMENT = "row i predicts token i + 1"
STORAGE = {  # of each token; packing.py says what the bytes mean
    "ids": "sorted, Elias-Fano",
    "logprobs": "top in float32, drops from it in 12 bits",
    "log_z": "float32",
    "tail_logprob": "float32",
    "token_ids": "int32",
}
MAX_K = 1024


@dataclasses.dataclass(frozen=True)
class CacheHeader:
    """What a cache holds, and of which teacher.

    Args:
        teacher: the name of the teacher, for people.
        vocab_size: V, the columns of the teacher's logits, at most 2^20.
        k: how many entries a token has at most.
        temperatures: those for which log Z and the tail are stored, in this order.
        tokenizer_hash: `tokenizer_hash(tokenizer)` of the teacher's tokenizer, or None.
        has_token_ids: whether the tokens that the teacher read are stored too, 4 bytes each.
    """

    teacher: str
    vocab_size: int
    k: int
    temperatures: tuple[float, ...] = (1.0,)
    tokenizer_hash: str | None = None
    has_token_ids: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, str) or not self.teacher:
            raise ValueError(f"teacher must be the name of the teacher, got {self.teacher!r}")
        vocab_size = _integer_up_to(MAX_VOCABULARY, self.vocab_size, "vocab_size")
        object.__setattr__(self, "vocab_size", vocab_size)
        object.__setattr__(self, "k", _integer_up_to(min(MAX_K, vocab_size), self.k, "k"))
        object.__setattr__(self, "temperatures", _temperatures(self.temperatures))
        if self.tokenizer_hash is not None and not isinstance(self.tokenizer_hash, str):
            raise TypeError(f"tokenizer_hash must be a str or None, got {type(self.tokenizer_hash).__name__}")
        if not isinstance(self.has_token_ids, bool):
            raise TypeError(f"has_token_ids must be bool, got {type(self.has_token_ids).__name__}")

    def temperature_index(self, temperature: float) -> int:
        """Which column of log Z is of this temperature; ValueError that names those stored if none is."""
        if temperature not in self.temperatures:
            stored = ", ".join(map(str, self.temperatures))
            raise ValueError(f"temperature must be one that the cache stores, {stored}, got {temperature}")
        return self.temperatures.index(temperature)

    def digest(self) -> str:
        """What every shard of the cache carries, so that one of another cache is recognised."""
        return _digest(self._contents())

    def _contents(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self) | {"temperatures": list(self.temperatures)}
        return {"format": FORMAT, "version": VERSION, "alignment": ALIGNMENT, "storage": STORAGE, **fields}

    def write(self, folder: Path) -> None:
        """Write the header into an empty folder; in one that has a header, see that it is this one."""
        if (folder / NAME).exists():
            self._compare(CacheHeader.read(folder), folder)
            return
        import xentile  # only now: the package imports this module

        contents = self._contents() | {"library_version": xentile.__version__}
        text = json.dumps(contents | {"blake2b": _digest(contents)}, indent=2) + "\n"
        write_whole(folder / NAME, text.encode())

    def _compare(self, other: CacheHeader, folder: Path) -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                raise ValueError(f"{field.name} must be that of the cache in {folder}, {theirs!r}, got {mine!r}")

    @classmethod
    def read(cls, folder: Path) -> CacheHeader:
        """The header of a cache; ValueError if it is damaged, is none, or is of a later version."""
        path = folder / NAME
        if not path.exists():
            raise FileNotFoundError(f"{folder} must be a folder with a top-K cache, but has no {NAME}")
        try:
            contents = json.loads(path.read_bytes())
            form, version, digest = contents["format"], contents["version"], contents.pop("blake2b")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedCacheError(path, f"it is no header of a top-K cache ({error!r})") from error
        if _digest(contents) != digest:  # of every version, so that damage is told from what is too new
            raise DamagedCacheError(path, "its checksum does not match its content")
        if form != FORMAT:
            raise ValueError(f"{path} must have format {FORMAT!r}, got {form!r}")
        if version != VERSION:
            raise ValueError(f"{path} has version {version} of the format: this xentile reads {VERSION}")
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in contents]:
            raise DamagedCacheError(path, f"it has no {missing[0]}")
        return cls(**{name: contents[name] for name in names})


def tokenizer_hash(tokenizer: Any) -> str:
    """Digest of the vocabulary of a tokenizer, anything with `get_vocab()`: equal ids then mean equal tokens.

    Example:
        >>> class Letters:
        ...     def get_vocab(self):
        ...         return {"a": 0, "b": 1}
        >>> tokenizer_hash(Letters())
        '6c8768266a81d97978d7d526ddbe4e07'
    """
    vocabulary = sorted((int(index), token) for token, index in tokenizer.get_vocab().items())
    return _digest(vocabulary)


def _digest(contents: Any) -> str:
    text = json.dumps(contents, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _integer_up_to(most: int, value: Any, name: str) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if not 1 <= value <= most:
        raise ValueError(f"{name} must be in [1, {most}], got {value}")
    return value


def _temperatures(values: Any) -> tuple[float, ...]:
    try:
        temperatures = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        raise TypeError(f"temperatures must be a sequence of numbers, got {values!r}") from None
    if not temperatures or not all(0 < t < math.inf for t in temperatures):
        raise ValueError(f"temperatures must be one or more numbers, finite and above 0, got {values!r}")
    if len(set(temperatures)) < len(temperatures):
        raise ValueError(f"temperatures must differ from one another, got {values!r}")
    return temperatures
