"""Compile what the launchers launch, for GPUs that are not here."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from collections.abc import Iterator


class Target(NamedTuple):
    """A GPU: how Triton names it, and the nominal figures of one well-known device with it, from its data sheet."""

    gpu: GPUTarget
    device: str
    processors: int
    gigahertz: float
    terabytes: float
    """Memory bandwidth a second."""
    lanes: int
    """Threads that a processor issues an instruction for in a clock."""
    special_lanes: int
    """The same for exponentials."""


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "A100", 108, 1.41, 2.04, 128, 16),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "H100", 132, 1.75, 3.35, 128, 16),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "B200", 148, 1.85, 8.0, 128, 16),
    "sm_120": Target(GPUTarget("cuda", 120, 32), "RTX 5090", 170, 2.41, 1.79, 128, 16),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "MI300X", 304, 2.1, 5.3, 64, 16),
}


class _Driver:
    """As much of a Triton driver as compiling needs. The target is the device, to keep Triton's caches apart."""

    def __init__(self, gpu: GPUTarget) -> None:
        self.gpu = gpu

    def get_current_device(self) -> str:
        return str(self.gpu.arch)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.gpu


@contextmanager
def compile_only(target: Target) -> Iterator[dict[str, Any]]:
    """Within it a Triton launch compiles for the target and stops there; yields kernel name -> compiled kernel."""
    compiled: dict[str, Any] = {}
    launch = JITFunction.run

    def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled[function.__name__] = launch(function, *args, grid=grid, warmup=True, **options)
        return compiled[function.__name__]

    previous = driver._active
    driver.set_active(_Driver(target.gpu))
    try:
        with mock.patch.object(JITFunction, "run", run):
            yield compiled
    finally:
        driver._active = previous
