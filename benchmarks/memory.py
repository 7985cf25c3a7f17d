"""Peak memory of one step beyond what was allocated before it, and the choice of allocator on CPUs.

CUDA: torch's allocator counts. CPU: the kernel's high-water mark of resident memory (Linux lets a process reset it),
which sees native scratch buffers as well as tensors. Pages that freed tensors left mapped would be missed, so free
memory is given back first, that which xentile keeps included.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import xentile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_DEFAULTS = {_M_TRIM_THRESHOLD: 128 * 1024, _M_MMAP_MAX: 65536}
_RETAIN = {_M_TRIM_THRESHOLD: 2**31 - 1, _M_MMAP_MAX: 0}


def peak(step: Callable[[], object], device: str) -> int | None:
    """Bytes that `step` needs at its worst moment, its result included; None where it can't be known."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
        result = step()
        del result
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def trim() -> None:
    """Gives free memory back to the system."""
    xentile.empty_cache()
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)


@contextmanager
def allocator(kind: str) -> Iterator[None]:
    """`default`: as torch ships; on Linux each large tensor is mapped anew, and its pages are faulted in by whoever
    writes first. `retained`: glibc keeps freed memory mapped, as the jemalloc and tcmalloc of PyTorch's tuning guide
    do.
    """
    if kind == "default":
        yield
        return
    if (libc := _libc()) is None:
        raise OSError("the retained allocator needs glibc")
    try:
        for parameter, value in _RETAIN.items():
            libc.mallopt(parameter, value)
        yield
    finally:
        for parameter, value in _DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
