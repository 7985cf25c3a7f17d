"""A progress bar on stderr: tqdm's where it is installed, a plain line otherwise."""

from __future__ import annotations

import importlib
import sys
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import TracebackType

PLAIN_SECONDS = 5.0  # between two plain lines


class Progress(Protocol):
    """What of tqdm is used here."""

    def update(self, n: int) -> object:
        """So many more are done."""

    def __enter__(self) -> Progress: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> object: ...


def progress(label: str, unit: str, total: int | None = None) -> Progress:
    """A bar to be used in a `with`, and told of progress by `update(n)`."""
    try:
        tqdm = importlib.import_module("tqdm").tqdm
    except ModuleNotFoundError:
        return PlainProgress(label, unit, total)
    bar: Progress = tqdm(desc=label, unit=f" {unit}", total=total, unit_scale=True)
    return bar


class PlainProgress:
    """A line every few seconds, and one at the end."""

    def __init__(self, label: str, unit: str, total: int | None) -> None:
        self.label, self.unit, self.total = label, unit, total
        self.done = 0
        self.start = self.last = time.monotonic()

    def update(self, n: int) -> None:
        """So many more are done."""
        self.done += n
        if time.monotonic() - self.last >= PLAIN_SECONDS:
            self._print()

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._print()

    def _print(self) -> None:
        self.last = time.monotonic()
        of = f" of {self.total:,}" if self.total is not None else ""
        rate = self.done / max(self.last - self.start, 1e-9)
        print(f"{self.label}: {self.done:,}{of} {self.unit}, {rate:,.0f} a second", file=sys.stderr, flush=True)
