"""Who computes an operation: a name, and a function that builds the computation for a case.

It builds or raises `Unavailable` with the reason, which is listed beside the results. Packages are imported only when
asked for: none is needed to benchmark the others.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.cases import CROSS_ENTROPY

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.cases import Case
    from benchmarks.step import Loss


class Unavailable(Exception):
    """This provider can't run this case; the message says why."""


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[[Case, str], Loss]
    ours: bool = False
    overwrites_logits: bool = False  # the gradient is written over the logits: fresh ones are needed before every step
    operations: tuple[str, ...] = CROSS_ENTROPY
    yardstick: str = (
        ""  # the operation that it computes instead of the case's, on the same logits: others are timed by it
    )


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error


def gpu_package(name: str, device: str) -> Any:
    if device != "cuda":
        raise Unavailable(f"{name.partition('.')[0]} runs on CUDA devices only, this is {device}")
    return package(name)
