"""The memory of a gradient is kept for the next one, and still belongs to the system."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import xentile as xt
from xentile._ops import NATIVE_UNAVAILABLE, ops

pytestmark = pytest.mark.skipif(
    NATIVE_UNAVAILABLE is not None or sys.platform != "linux", reason="the memory is kept by csrc/cpu on Linux"
)
ROWS, COLUMNS = 320, 32000  # 39 MiB in float32: more than the least that is kept
BYTES = ROWS * COLUMNS * 4
NEARLY = 0.95 * BYTES  # the kernel marks some of the last pages a little later


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    xt.empty_cache()


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def lazily_free() -> int:
    """Bytes of this process that the system may take whenever it likes."""
    return 1024 * sum(map(int, re.findall(r"^LazyFree: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.MULTILINE)))


def gradient(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ops.empty_gradient.default(torch.empty(rows, COLUMNS, dtype=dtype)).fill_(1)


def test_next_step_has_no_page_faults_for_its_gradient() -> None:
    logits = torch.randn(ROWS, COLUMNS, requires_grad=True)
    target = torch.randint(0, COLUMNS, (ROWS,))
    for _ in range(2):
        logits.grad = None
        before = faults()
        xt.cross_entropy(logits, target).loss.backward()
    # 19 pages of 2 MiB at least, 10000 of 4 KiB; what is left is the allocator's own
    assert faults() - before < 16


def test_kept_memory_belongs_to_the_system() -> None:
    dlogits = gradient()
    used = lazily_free()
    del dlogits
    assert lazily_free() - used >= NEARLY


def test_memory_in_use_does_not() -> None:
    dlogits = gradient()
    del dlogits
    before = lazily_free()
    _again = gradient()
    assert lazily_free() <= before - NEARLY


def test_two_gradients_alive_never_share_memory() -> None:
    first, second = gradient(), gradient()
    second.fill_(2)
    assert bool((first == 1).all())
    assert bool((second == 2).all())


def test_a_shorter_batch_uses_the_memory_of_a_longer_one() -> None:
    long = gradient(rows=ROWS + 64)
    address = long.data_ptr()
    del long
    short = gradient()
    assert short.data_ptr() == address
    assert short.shape == (ROWS, COLUMNS)
    assert short.is_contiguous()


def test_a_longer_batch_leaves_nothing_of_a_shorter_one() -> None:
    short = gradient()
    del short
    assert lazily_free() >= NEARLY
    _long = gradient(rows=2 * ROWS)
    assert lazily_free() < NEARLY


def test_at_most_two_are_kept() -> None:
    before = lazily_free()
    three = [gradient() for _ in range(3)]
    three.clear()
    assert 2 * NEARLY <= lazily_free() - before < 3 * NEARLY


def test_empty_cache_gives_it_back() -> None:
    dlogits = gradient()
    del dlogits
    xt.empty_cache()
    assert lazily_free() < NEARLY


def test_gradients_outlive_empty_cache() -> None:
    dlogits = gradient()
    xt.empty_cache()
    assert bool((dlogits == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_gets_its_own_kind_of_tensor(dtype: torch.dtype) -> None:
    rows = 1 + (32 << 20) // (COLUMNS * dtype.itemsize)
    strided = torch.empty(rows, COLUMNS + 8, dtype=dtype)[:, :COLUMNS]
    dlogits = ops.empty_gradient.default(strided)
    assert (dlogits.dtype, dlogits.shape, dlogits.is_contiguous()) == (dtype, strided.shape, True)
    assert dlogits.data_ptr() % (2 << 20) == 0  # only such memory can have huge pages


def test_small_gradients_are_torchs_own() -> None:
    assert ops.empty_gradient.default(torch.empty(2, 3)).untyped_storage().resizable()
    assert not gradient().untyped_storage().resizable()


def test_threads_may_take_and_give_back_at_once() -> None:
    wrong: list[int] = []

    def work(mark: int) -> None:
        for _ in range(8):
            dlogits = gradient().fill_(mark)
            if not bool((dlogits == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_environment_can_forbid_it() -> None:
    script = (
        "import torch, xentile\n"
        "dlogits = torch.ops.xentile.empty_gradient(torch.empty(320, 32000))\n"
        "assert dlogits.untyped_storage().resizable()"
    )
    environment = os.environ | {"XENTILE_KEEP_MEMORY": "0"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
