"""A pretended GPU: `kernel[grid](*tensors)` compiles for that GPU as ever, and its PTX runs on the CPU tensors.

The package's own launchers run unchanged: their choice of kernel, grid and options, Triton's specialisation on the
alignment of pointers, and the machine code (as PTX) are what a GPU would get.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .interpreter import Counts, Kernel, Offset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .interpreter.kernel import Argument


@dataclass
class Launch:
    """One kernel launch that was executed."""

    name: str
    grid: tuple[int, ...]
    compiled: Any
    arguments: dict[str, Argument]
    counts: Counts
    named: dict[str, Counter[str]] = field(init=False)

    def __post_init__(self) -> None:
        names = list(self.arguments)
        kinds = {"loaded": self.counts.loaded, "stored": self.counts.stored, "atomics": self.counts.atomics}
        self.named = {kind: Counter({names[at]: n for at, n in counter.items()}) for kind, counter in kinds.items()}

    def bytes_loaded(self, argument: str) -> int:
        return self.named["loaded"][argument]

    def bytes_stored(self, argument: str) -> int:
        return self.named["stored"][argument]

    def again(self, **changed: Argument) -> Counts:
        """The same machine code with other arguments."""
        return execute(self.compiled, self.grid, list((self.arguments | changed).values()))


class _Driver:
    """As much of a Triton driver as compiling needs. The architecture is the device, to keep Triton's caches apart."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


parse = functools.lru_cache(maxsize=None)(Kernel)


def execute(compiled: Any, grid: tuple[int, ...], arguments: list[Argument], **how: Any) -> Counts:
    return parse(compiled.asm["ptx"]).launch(grid, arguments, shared=compiled.metadata.shared, **how)


@contextmanager
def pretended_gpu(architecture: int, *, last_block_first: bool = False, races: bool = False) -> Iterator[list[Launch]]:
    """Within it Triton kernels run on CPU tensors as PTX for sm_<architecture>; yields the launches, in order.

    Compilation stops at the PTX. The blocks of a grid run in groups, from the first or from the last. races: look for
    races in global memory, too.
    """
    launches: list[Launch] = []
    compile_only = JITFunction.run

    def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compile_only(function, *args, grid=grid, warmup=True, **options)
        parameters = function.signature.parameters
        bound = function.signature.bind(*args, **{name: value for name, value in options.items() if name in parameters})
        bound.apply_defaults()
        kinds = compiled.src.signature
        passed = {name: _argument(value) for name, value in bound.arguments.items() if kinds[name] != "constexpr"}
        order = range(math.prod(grid))
        how = {"block_order": order[::-1] if last_block_first else order, "races": races}
        counts = execute(compiled, tuple(grid), list(passed.values()), **how)
        launches.append(Launch(function.__name__, tuple(grid), compiled, passed, counts))
        return compiled

    previous = driver._active
    driver.set_active(_Driver(architecture))
    try:
        without_assembler = mock.patch.object(CUDABackend, "make_cubin", return_value=b"")
        with mock.patch.object(JITFunction, "run", run), without_assembler:
            yield launches
    finally:
        driver._active = previous


def _argument(value: Any) -> Argument:
    """A tensor as its whole storage and the byte where it starts."""
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() % 16:
        raise ValueError("the interpreter places arrays at aligned addresses; this tensor's memory is not aligned")
    whole = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    return Offset(whole, value.storage_offset() * value.element_size())
