"""Every test: a fixed seed, uninitialised memory filled with NaN, and the device it is asked to run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def seeded_and_poisoned() -> Iterator[None]:
    """An output that a kernel forgets to write is NaN (or the largest integer), never a lucky zero."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
