"""The keys and the operator of `quantile`, its tracing, and that no GPU is waited for."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from oracle import DTYPES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xentile as xt
from xentile._ops import ops
from xentile.reference import quantile as spec


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_are_ordered_as_values_and_invertible(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    keys, nan = spec.key_of(x), x.isnan()
    assert (keys[nan] == 2**16 - 1).all()
    assert ((keys[~nan] < 2**16 - 1) & (keys[~nan] >= 0)).all()
    order = keys[~nan].argsort()
    assert (x[~nan][order].double().diff() >= 0).all()
    assert torch.equal(spec.value_of_key(keys[~nan], dtype), x[~nan].double())


def bit_patterns(dtype: torch.dtype, n: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (n,)).view(dtype)[:n].contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["all", "mask", "weights", "both"])
def test_native_counts_equal_the_reference(dtype: torch.dtype, option: str, device: torch.device) -> None:
    """Random bit patterns: every exponent, NaN payloads, subnormals. A prefix may occur twice, or in no value."""
    n = 40_001  # two threads
    x = bit_patterns(dtype, n)
    x[: n // 3] = 0.0
    mask = torch.rand(n) < 0.5 if option in ("mask", "both") else None
    weights = torch.randint(0, 2**31, (n,)) if option in ("weights", "both") else None
    shift, prefixes = 8 * dtype.itemsize, torch.zeros(1, dtype=torch.int64)
    for bits in spec.DIGITS[dtype]:
        shift -= bits
        wanted = torch.full((len(prefixes), 1 << bits), 3)
        actual = wanted.to(device, copy=True)
        spec.radix_counts(x, mask, weights, prefixes, shift, bits, wanted)
        inputs = [None if t is None else t.to(device) for t in (x, mask, weights, prefixes)]
        ops.radix_counts(*inputs, shift, bits, actual)
        assert torch.equal(actual.cpu(), wanted)
        sample = torch.cat([x[:1], x[-7:], x[-1:], torch.tensor([1.0], dtype=dtype)])
        prefixes = spec._shift(spec.key_of(sample), shift)


@pytest.mark.parametrize("n", [0, 1, 300, 5003, 40_001])  # none, one, all sorted, a few sorted, two threads
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ["all", "mask", "weights", "both"])
def test_one_call_equals_the_reference(dtype: torch.dtype, option: str, n: int) -> None:
    """Of random bit patterns, of numbers that have few prefixes, and of ties: of NaN, infinities and both zeros too."""
    mask = torch.rand(n) < 0.5 if option in ("mask", "both") else None
    weights = torch.rand(n, dtype=torch.float64) if option in ("weights", "both") else None
    q = torch.cat([torch.linspace(-0.01, 1.01, 103, dtype=torch.float64), torch.tensor([torch.nan])])
    names = ("inverted_cdf",) if weights is not None else spec.INTERPOLATIONS if n == 300 else ("linear",)
    for x in (bit_patterns(dtype, n), 1 + torch.rand(n).to(dtype) / 8, torch.randint(-1, 2, (n,)).to(dtype)):
        for name in names:
            for omit_nan in (False, True):
                arguments = (x, mask, weights, q)
                value, counted = spec.host_quantile(*arguments, spec.INTERPOLATIONS.index(name), omit_nan)
                actual = torch.empty_like(q, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
                found = torch.empty_like(counted)
                ops.host_quantile(*arguments, actual, found, spec.INTERPOLATIONS.index(name), omit_nan)
                torch.testing.assert_close(actual, value.to(actual.dtype), rtol=0, atol=0, equal_nan=True)
                assert torch.equal(found, counted)


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
def test_a_bad_weight_makes_every_value_nan_and_is_reported(bad: float) -> None:
    x, q, weights = torch.rand(3), torch.rand(4).double(), torch.tensor([1.0, bad, 1.0]).double()
    value, counted = torch.zeros(4), torch.zeros(2, dtype=torch.int64)
    ops.host_quantile(x, None, weights, q, value, counted, spec.INTERPOLATIONS.index("inverted_cdf"), False)
    assert value.isnan().all()
    assert counted.tolist() == [-1, -1]
    wanted, reported = spec.host_quantile(x, None, weights, q, spec.INTERPOLATIONS.index("inverted_cdf"), False)
    assert wanted.isnan().all()
    assert torch.equal(reported, counted)
    ops.host_quantile(x, weights == 1, weights, q, value, counted, spec.INTERPOLATIONS.index("inverted_cdf"), False)
    assert counted.tolist() == [2**31, 0]  # in units of 2**-30: one that is masked out is not looked at


def test_a_call_on_a_cpu_takes_few_torch_calls() -> None:
    """Each takes about as long as selecting from a hundred values."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += 1
            return func(*args, **(kwargs or {}))

    x, q = torch.rand(100), torch.tensor([0.1, 0.5], dtype=torch.float64)
    for options in ({}, {"mask": x > 0.1}, {"weights": x, "interpolation": "inverted_cdf"}):
        with Count() as count:
            xt.quantile(x, q, **options)  # type: ignore[arg-type]
        assert count.calls <= 6, options


def test_torch_func_maps_over_rows() -> None:
    x, weights = torch.randn(3, 200), torch.rand(3, 200)
    rows = torch.vmap(lambda row: xt.quantile(row, [0.1, 0.5]))(x)
    assert torch.equal(rows, torch.stack([xt.quantile(row, [0.1, 0.5]) for row in x]))
    options = {"interpolation": "inverted_cdf"}
    rows = torch.vmap(lambda row, w: xt.quantile(row, 0.3, weights=w, **options))(x, weights)  # type: ignore[arg-type]
    assert rows.tolist() == [xt.quantile(r, 0.3, weights=w, **options) for r, w in zip(x, weights, strict=True)]  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_it_compiles_without_graph_breaks() -> None:
    x, q, mask = torch.randn(1000), torch.tensor([0.1, 0.5]), torch.rand(1000) < 0.5
    weights = torch.rand(1000)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x: Tensor, q: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        plain = xt.quantile(x, q, mask=mask)
        return plain, xt.quantile(x, q, weights=weights, interpolation="inverted_cdf")

    plain, weighted = call(x, q, mask, weights)
    assert torch.equal(plain, xt.quantile(x, q, mask=mask))
    assert torch.equal(weighted, xt.quantile(x, q, weights=weights, interpolation="inverted_cdf"))


def test_a_gpu_is_not_waited_for() -> None:
    """Fake CUDA tensors have no values: whatever waits for the device raises."""
    with torch._subclasses.FakeTensorMode():
        for dtype in DTYPES:
            x, q = torch.randn(8, 10, device="cuda").to(dtype), torch.rand(3, device="cuda")
            for options in ({"mask": x > 0}, {"weights": x.abs(), "interpolation": "inverted_cdf"}):
                answer = xt.quantile(x, q, nan_policy="omit", **options)
                assert answer.shape == q.shape
                assert answer.device == x.device
                assert answer.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


TRITON_EQUALS_REFERENCE = """
import pytest
import torch
import triton_36
from xentile._triton.quantile import radix_counts
from xentile.reference import quantile as spec

triton_36.mend(pytest.MonkeyPatch())
torch.manual_seed(0)
n = 9001
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = torch.randint(-2**63, 2**63 - 1, (n,)).view(dtype)[:n].contiguous()
    x[:3000] = 0.0
    mask, weights = torch.rand(n) < 0.7, torch.randint(0, 2**31, (n,))
    for options in ((None, None), (mask, None), (mask, weights)):
        shift, prefixes = 8 * dtype.itemsize, torch.zeros(1, dtype=torch.int64)
        for bits in spec.DIGITS[dtype]:
            shift -= bits
            wanted = torch.full((len(prefixes), 1 << bits), 3)
            actual = wanted.clone()
            spec.radix_counts(x, *options, prefixes, shift, bits, wanted)
            radix_counts(x, *options, prefixes, shift, bits, actual)
            assert torch.equal(actual, wanted), (dtype, shift)
            prefixes = spec._shift(spec.key_of(x[[0, 0, 3001, 4000]]), shift)
"""


def test_triton_counts_equal_the_reference_in_the_interpreter() -> None:
    """In a process of its own, because Triton decides at import whether it interprets. No statement about a GPU."""
    pytest.importorskip("triton")
    paths = pathlib.Path(xt.__file__).parents[1], pathlib.Path(__file__).parent
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-W", "error", "-c", TRITON_EQUALS_REFERENCE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
