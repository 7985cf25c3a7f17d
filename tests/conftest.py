"""Every test: a fixed seed, uninitialised memory filled with NaN, and the device it is asked to run on.

Without Triton the tests of its kernels are left out.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

collect_ignore = [] if find_spec("triton") else ["ptx", "static", "test_triton.py"]


@pytest.fixture(scope="session", autouse=True)
def fresh_compiler_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled Triton kernels are kept for the session, in a folder of their own."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


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
