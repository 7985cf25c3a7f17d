"""Compile what the launchers launch, for GPUs that are not here."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from collections.abc import Container, Iterator


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
        return f"static {self.gpu.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.gpu


class Launch(NamedTuple):
    source: str
    """A digest of all that the machine code depends on: the kernel and every function and constant that it reaches,
    the types, constants and options of the launch, the target, and Triton.
    """
    kernel: Any
    """What Triton compiled; None where the source was known."""


_CACHE = tempfile.TemporaryDirectory()  # not the usual one: there the PTX tests leave kernels without machine code
_SOURCES: dict[str, str] = {}  # Triton's hash of a compiled kernel -> source


def _digest(function: JITFunction, key: str, target: Target) -> str:
    environment = sorted(get_cache_invalidating_env_vars().items())
    parts = triton.__version__, target.gpu, function.cache_key, key, environment
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@contextmanager
def compile_only(target: Target, known: Container[str] = ()) -> Iterator[dict[str, Launch]]:
    """Within it a Triton launch compiles for the target and stops there, or sooner where its source is `known`; yields
    kernel name -> launch.
    """
    launches: dict[str, Launch] = {}
    source = ""
    launch = JITFunction.run

    def before_compiling(*, key: str, fn: Any, **_: Any) -> bool:
        nonlocal source
        source = _digest(fn.jit_function, key, target)
        return source in known

    def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        nonlocal source
        source = ""
        kernel = launch(function, *args, grid=grid, warmup=True, **options)
        if source and kernel:
            _SOURCES[kernel.hash] = source
        # Of what this process has compiled before, Triton does not ask again whether it is to be compiled.
        launches[function.__name__] = Launch(source or _SOURCES[kernel.hash], kernel)
        return kernel

    previous = driver._active
    driver.set_active(_Driver(target.gpu))
    try:
        with (
            mock.patch.dict(os.environ, TRITON_CACHE_DIR=_CACHE.name),
            mock.patch.object(JITFunction, "run", run),
            mock.patch.object(triton.knobs.runtime, "jit_cache_hook", before_compiling),
        ):
            yield launches
    finally:
        driver._active = previous
