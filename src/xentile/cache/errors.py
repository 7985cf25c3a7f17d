"""What is raised for damaged files, and how the optional package behind the files is found."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_NAMED = 8  # sample ids that a message spells out


class DamagedCacheError(ValueError):
    """A file of a cache is not what its writer wrote.

    Attributes:
        path: the file.
        sample_ids: the samples that can't be read because of it; empty if that is not known.
    """

    def __init__(self, path: Path, what: str, sample_ids: Sequence[int | str] = ()) -> None:
        """The message names the file, what is wrong with it, and the samples."""
        self.path, self.what, self.sample_ids = path, what, tuple(sample_ids)
        samples = f"; this concerns {named(sample_ids)}" if sample_ids else ""
        super().__init__(f"{path} is damaged: {what}{samples}")

    def __reduce__(self) -> tuple[Any, ...]:  # raised in the workers of a DataLoader, hence pickled
        return type(self), (self.path, self.what, self.sample_ids)


def named(sample_ids: Sequence[int | str]) -> str:
    """`3 samples: 1, 2, 5`, and no more than a line of them."""
    shown = ", ".join(map(repr, sample_ids[:MAX_NAMED]))
    count = f"{len(sample_ids)} sample{'s' if len(sample_ids) != 1 else ''}"
    return f"{count}: {shown}{', ...' if len(sample_ids) > MAX_NAMED else ''}"


def optional(module: str, purpose: str, package: str) -> Any:
    """An optional module, or an ImportError that says what needs it and what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{purpose} needs {module}, which is not installed: pip install {package}") from error
