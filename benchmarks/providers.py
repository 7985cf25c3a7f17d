"""Every provider of every operation, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import cross_entropy_providers, distillation_providers
from benchmarks.provider import Provider, Unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.cases import Case
    from benchmarks.step import Loss

PROVIDERS: tuple[Provider, ...] = (*cross_entropy_providers.PROVIDERS, *distillation_providers.PROVIDERS)


def named(names: Sequence[str]) -> list[Provider]:
    """The providers of these names, whatever their operations, in listed order; all of them for no names."""
    known = list(dict.fromkeys(p.name for p in PROVIDERS))
    for name in names:
        if name not in known:
            raise ValueError(f"providers must be among {', '.join(known)}, got {name}")
    return [p for p in PROVIDERS if not names or p.name in names]


def build(
    providers: Sequence[Provider], case: Case, device: str
) -> tuple[list[tuple[Provider, Loss]], list[tuple[Provider, str]]]:
    """Splits the providers of the case's operation into those that can run it, with their computation, and the others,
    with the reason.
    """
    ready: list[tuple[Provider, Loss]] = []
    missing: list[tuple[Provider, str]] = []
    for provider in providers:
        if case.operation not in provider.operations:
            continue
        try:
            ready.append((provider, provider.build(case, device)))
        except Unavailable as reason:
            missing.append((provider, str(reason)))
    return ready, missing
