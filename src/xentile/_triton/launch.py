"""How many programs of how many threads: pure functions of the shape, the dtype and the device, with the reasons
beside the numbers.

Nothing is tuned at run time: a choice depends on nothing that is measured, so a launch is the same in every process
and in every CUDA graph. The reasons are counts of bytes, registers and threads; no number here was found by timing.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

IN_FLIGHT = 64
"""Bytes of a tile a thread has when rows are streamed: four 16-byte loads in flight, in 48 to 64 registers."""


@dataclass(frozen=True)
class Device:
    """What the choices depend on. arch: compute capability (90), or the name of an AMD GPU."""

    arch: int | str = 90
    warp_size: int = 32
    processors: int = 132
    l2_bytes: int = 50 << 20


@dataclass(frozen=True)
class Rows:
    """A launch over rows. block: columns a tile; splits: programs a row; resident: the row stays in registers.

    lanes: if not 0, a program has several rows, each held by so many threads, which load `vector` logits at once.
    registers: as many as a thread may have, where NVIDIA's compiler by itself would sooner spill than take them, or
    would take more and leave no room for a second program; 0: its own choice.
    """

    block: int
    threads: int
    splits: int = 1
    resident: bool = False
    lanes: int = 0
    vector: int = 1
    registers: int = 0


# (processors, bytes of L2) of a well-known GPU of each architecture, where the real device can't be asked.
_TYPICAL = {
    80: (108, 40 << 20),
    90: (132, 50 << 20),
    100: (148, 126 << 20),
    120: (170, 96 << 20),
    "gfx942": (304, 4 << 20),
}


def device_of(tensor: torch.Tensor) -> Device:
    """The device of a tensor; for one on the CPU (interpreter, compile-only) what Triton believes to be active."""
    if tensor.is_cuda:
        return _cuda_device(tensor.device.index)
    if triton.knobs.runtime.interpret:
        return Device()
    target = triton.runtime.driver.active.get_current_target()
    return Device(target.arch, target.warp_size, *_TYPICAL.get(target.arch, _TYPICAL[90]))


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    arch = properties.gcnArchName if torch.version.hip else properties.major * 10 + properties.minor
    return Device(arch, properties.warp_size, properties.multi_processor_count, properties.L2_cache_size)


def guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one, because Triton launches on the current one. Free where it is already."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def run(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], threads: int, device: Device, registers: int = 0
) -> None:
    """Launch a kernel with those of the arguments that it names.

    Contraction of a * b + c is off: row.py says where a fused multiply-add is meant.
    """
    named = {name: arguments[name] for name in kernel.arg_names}
    # AMD's compiler has no such option.
    options = {"maxnreg": registers} if registers and isinstance(device.arch, int) else {}
    kernel[grid](**named, num_warps=max(1, threads // device.warp_size), enable_fp_fusion=False, **options)


def forward(
    n: int,
    v: int,
    itemsize: int,
    gradient: bool,
    together: bool,
    smooth: bool,
    device: Device,
    alignment: int = 0,
    weighted: bool = False,
) -> Rows:
    """For `cross_entropy`: n rows of v logits of `itemsize` bytes.

    together: logits and gradient rows have one alignment. smooth: the loss has label smoothing. alignment: in bytes, of
    each of these rows, up to 16; 0 for a kernel that takes one row a program. weighted: there are class weights.
    """
    if alignment and (several := _several_rows(v, itemsize, alignment, smooth, device)):
        return several
    width = _width(v, itemsize, device)
    if width <= 8192 and (together or not gradient):
        # Short rows stay in registers, so that nothing is read twice. Up to 256 threads a row: with more, the
        # registers of a processor hold a single row, and its memory accesses pause while that one is summed up.
        # Without a gradient a thread has room for 128 bytes of logits, over which the fixed work of a row (some 350
        # instructions) is spread.
        share = 32 if gradient else 128 // itemsize
        return Rows(width, max(device.warp_size, width // share), resident=True)

    share = IN_FLIGHT // itemsize
    splits = min(triton.cdiv(4 * device.processors, max(n, 1)), triton.cdiv(v, 16384), 128)
    if n < device.processors and splits > 1:
        return Rows(128 * share, 128, splits)
    threads = 128
    if gradient:
        # The second read should find the row in the L2 cache, where it shares the room with the gradient on its way
        # out. On average half of each row is still to be read again; so as many rows at once as make up 3/5 of the
        # cache. A processor holds 1024 threads of 64 registers, hence 1024 threads a row if there is room for one row
        # only.
        rows = int(0.6 * device.l2_bytes) // (v * itemsize * device.processors)
        threads = {0: 1024, 1: 1024, 2: 512, 3: 512}.get(rows, 256)
        if smooth:
            share //= 2  # its two more sums a slot don't fit in 64 registers otherwise
            if weighted:
                threads = min(threads, 512)  # nor do the class weights of a tile
    elif n < 4 * device.processors:
        threads = 512  # few rows: each must bring the threads that fill its processor
    return Rows(threads * share, threads)


def backward(v: int, itemsize: int, smooth: bool, device: Device, alignment: int) -> Rows:
    """For the gradient from saved statistics: no sum over the row, so long rows are shared by many small programs."""
    if several := _several_rows(v, itemsize, alignment, smooth, device):
        return several
    share = IN_FLIGHT // itemsize
    block = min(_width(v, itemsize, device), 128 * share)
    # Four tiles a program pay for its coefficients; more only lengthen the tail of the launch.
    return Rows(block, max(device.warp_size, block // share), splits=triton.cdiv(v, 4 * block))


def _several_rows(v: int, itemsize: int, alignment: int, smooth: bool, device: Device) -> Rows | None:
    """For rows so short that a warp has two of them or more; None for others.

    A row's share of the instructions (PTX of sm_90, bfloat16, with the gradient) is 9 for V = 2, 14 for 10, 20 for 32,
    66 for 100, 127 for 256 and 516 for 1000; a warp for each row executes 470 up to V = 256, and 790 for 1000.
    """
    width = triton.next_power_of_2(v)
    vector = math.gcd(alignment, v * itemsize) // itemsize
    # Up to 64 logits a thread, in 128 registers: 16 warps a processor hold 128 bytes a thread, 64 KiB. Up to 16 groups,
    # each with an address, a mask and a store of its own. Class weights need as many registers as the logits.
    held = min(32 if smooth else 64, 16 * vector)
    # Of groups of a single logit a thread must not hold neighbours: Triton would lay the threads along the groups.
    lanes = max(width // held, min(width, 2) // vector, 1)
    if lanes > 16:
        return None
    # The work of a row is done in another layout than its sums. Within a warp that is a few shuffles, across warps
    # barriers; with one thread a row it is nothing, and larger programs are fewer.
    return Rows(width, device.warp_size * (4 if lanes == 1 else 1), lanes=lanes, vector=vector)


def _width(v: int, itemsize: int, device: Device) -> int:
    """The smallest tile that holds a row, at least one 16-byte group a thread of a warp."""
    return max(triton.next_power_of_2(v), 16 // itemsize * device.warp_size)
