"""The ways in which fused cross-entropies have been wrong about addresses, buffers and graphs: a test or group each.

Each test writes its claim once, as a check of any implementation. Ours must pass it, and the buggy formula beside it
must fail it. Names carry the number of the class in the list of classes; docstrings name the public precedent.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from buggy import gradient, ours, per_token, softmax_gradient, tells_apart
from oracle import sample, token_losses
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import xentile as xt

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Iterator

# torch 2.13 warns about its own code while it traces an autograd.Function
COMPILES = pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"
)


def as_if_contiguous(t: Tensor) -> Tensor:
    """What a kernel reads that is given the pointer of t and assumes its strides."""
    strides = [1]
    for size in reversed(t.shape[1:]):
        strides.insert(0, strides[0] * size)
    return t.as_strided(t.shape, strides)


def test_04_each_row_has_its_own_upstream_gradient() -> None:
    """Liger #678: reduction='none' scaled every row by grad_output[0]."""
    x, target = sample(5, 9)
    upstream = torch.linspace(-1, 2, 5)
    exact = (softmax_gradient(x, target) * upstream[:, None]).float()

    def check(seen: Callable[[Tensor], Tensor]) -> None:
        torch.testing.assert_close(gradient(per_token, x, target, upstream=seen(upstream)), exact)

    tells_apart(check, lambda v: v, lambda v: v[0].expand(5), lambda v: v.sum().expand(5))


@pytest.mark.parametrize(
    "upstream",
    [torch.arange(12.0)[2:3].expand(2, 3), torch.arange(6.0).view(3, 2).t(), torch.arange(12.0)[1::2].view(2, 3)],
    ids=["stride 0", "transposed", "every other"],
)
def test_05_an_upstream_gradient_of_any_stride_is_read_right(upstream: Tensor) -> None:
    """TransformerEngine #2402: loss.sum().backward() sends a gradient of stride 0."""
    x, target = torch.randn(2, 9, 3), torch.randint(9, (2, 3))
    exact = torch.softmax(x, 1).sub(F.one_hot(target, 9).movedim(-1, 1)) * upstream[:, None]

    def check(seen: Callable[[Tensor], Tensor]) -> None:
        torch.testing.assert_close(gradient(per_token, x, target, upstream=seen(upstream)), exact)

    tells_apart(check, lambda v: v, as_if_contiguous)


def test_06_rows_that_do_not_follow_each_other_are_read_at_their_stride() -> None:
    """TransformerEngine #2734: (S, B, V) transposed has stride(-1) == 1, and rows B * V apart."""
    x, target = torch.randn(5, 3, 9)[:, 1], torch.arange(5)
    exact = token_losses(x, target).float()
    tells_apart(
        lambda seen: torch.testing.assert_close(per_token(seen(x), target), exact), lambda x: x, as_if_contiguous
    )


def test_07_writing_over_the_logits_is_seen_by_autograd() -> None:
    """Liger #272: the gradient in the storage of an activation that another operation had saved."""
    target = torch.tensor([1, 0])

    def behind_the_back_of_autograd(x: Tensor, target: Tensor, inplace: bool) -> Tensor:
        x.data.copy_(torch.softmax(x.data, 1))
        return x.sum()

    def check(function: Any) -> None:
        x = torch.randn(2, 9, requires_grad=True) * 1
        version = x._version
        function(x, target, inplace=True)
        assert x._version > version

    tells_apart(check, ours, behind_the_back_of_autograd)
    x = torch.randn(2, 9, requires_grad=True) * 1
    loss = (x * x).sum() + ours(x, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_08_outputs_of_ignored_rows_are_written(compiled: bool) -> None:
    """Liger #1338: rows skipped by the kernel kept what was in memory. The tests fill it with NaN (conftest)."""
    x, target = sample(6, 9)
    target[[1, 4]] = -100

    def call(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return tuple(xt.cross_entropy(x, target, stats=("entropy", "target_rank")))[1:]

    def only_live_rows(x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        live = target != -100
        outputs = tuple(torch.empty_like(t) for t in call(x, target))
        for out, value in zip(outputs, call(x, target), strict=True):
            out[live] = value[live]
        return outputs

    def check(function: Any) -> None:
        token_loss, lse, predicted, correct, entropy, rank = (t[[1, 4]] for t in function(x, target))
        for zero in (token_loss, lse, correct, entropy):
            assert not zero.any()
        assert predicted.tolist() == rank.tolist() == [-1, -1]

    right = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    tells_apart(check, right, only_live_rows)
    assert not gradient(ours, x, target)[[1, 4]].any()


def test_10_rows_beyond_two_to_the_32_elements_are_read(tmp_path: pathlib.Path) -> None:
    """PyTorch #111484, fla #1080: row * stride in 32 bits.

    The rows are three pages of a sparse file, 2**31 + 8 elements apart. Only the offsets of logits are
    covered: a gradient of more than 2**31 elements would have to exist.
    """
    stride, size = 2**31 + 8, 1000
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + size, dtype=torch.bfloat16)
    values, target = sample(3, size, torch.bfloat16)
    exact, dx = token_losses(values, target), softmax_gradient(values, target)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    x = file.as_strided((3, size), (stride, 1))
    x.copy_(values)

    def high_bits_lost(bits: int) -> Tensor:
        return torch.stack([file[row * stride % 2**bits :][:size] for row in range(3)])

    def check(x: Tensor) -> None:
        torch.testing.assert_close(per_token(x, target).double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient(ours, x, target).double() * 3, dx, rtol=2**-7, atol=1e-30)

    tells_apart(check, x, high_bits_lost(31), high_bits_lost(32))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, (
        "256 MiB: nothing of that size was copied"
    )


@pytest.mark.parametrize("size", [7, 9, 17, 31, 1023])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_15_no_alignment_is_assumed(dtype: torch.dtype, size: int) -> None:
    """A vector load needs a pointer and a length that fit: labels at target[1:], logits anywhere, V with a tail."""
    values, target = sample(4, size, dtype)
    exact, dx = token_losses(values, target), softmax_gradient(values, target)
    labels = torch.cat([target[:1] + 1, target])[1:]

    def check(read: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        for offset in range(4):
            memory = torch.full((4 * size + 8,), 64.0, dtype=dtype, requires_grad=True) * 1
            inside = slice(offset, offset + 4 * size)
            x = memory[inside].view(4, size)
            x.data.copy_(values)
            for integers in (labels, labels.int()):
                torch.testing.assert_close(per_token(*read(x, integers)).double(), exact, rtol=1e-6, atol=0)
            ours(x, labels, reduction="sum", inplace=True)
            torch.testing.assert_close(x.double(), dx, rtol=torch.finfo(dtype).eps, atol=1e-7)
            memory.data[inside] = 64.0
            assert memory.eq(64.0).all(), "written beside the logits"

    def whole_vectors(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return x.masked_fill(torch.arange(size) >= size // 8 * 8, -torch.inf), labels

    def aligned_labels(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return x, labels.as_strided((4,), (1,), labels.storage_offset() // 2 * 2) % size

    tells_apart(check, lambda *both: both, whole_vectors, aligned_labels)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_16_the_kernel_runs_on_the_current_stream() -> None:
    """A launch on the default stream reads logits that the current one has not written yet."""
    values, target = (t.cuda() for t in sample(64, 1000))
    exact = token_losses(values, target).float()

    def check(function: Callable[[Tensor, Tensor], Tensor]) -> None:
        x, side = torch.zeros_like(values), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            x.copy_(values)
            losses = function(x, target)
        torch.cuda.synchronize()
        torch.testing.assert_close(losses, exact)

    def on_default_stream(x: Tensor, target: Tensor) -> Tensor:
        with torch.cuda.stream(torch.cuda.default_stream()):
            return per_token(x, target)

    tells_apart(check, per_token, on_default_stream)


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_16_the_kernel_runs_on_the_device_of_the_logits() -> None:
    """Triton launches on cuda:0 unless told. There is no buggy formula for this one: it crashes."""
    x, target = (t.to("cuda:1") for t in sample(64, 1000))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(per_token(x, target), token_losses(x, target).float())


@COMPILES
def test_17_a_number_that_changes_each_step_does_not_recompile() -> None:
    """Liger's row scale: a data-dependent Python number in the key of a cache. A 0-d tensor is no such key."""

    def check(as_argument: Callable[[Tensor], Any]) -> None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        step = torch.compile(lambda x, t, n: ours(x, t, normalizer=n), fullgraph=True, backend=counter)
        for ignored in range(4):
            x, target = sample(8, 9)
            target[:ignored] = -100
            step(x.requires_grad_(), target, as_argument((target != -100).sum())).backward()
        assert counter.frame_count == 1

    tells_apart(check, lambda n: n, float)


class OneBuffer(torch.autograd.Function):
    """The buggy form of handing out a gradient that the forward has computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor) -> Tensor:
        ctx.buffer = softmax_gradient(x, target).float()
        return F.cross_entropy(x, target, reduction="sum")

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        return ctx.buffer.mul_(dloss), None


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_21_a_second_backward_gives_the_same_gradient(reduction: str) -> None:
    """Liger #262: a buffer scaled in place, and owned by whoever asked first."""
    x, target = sample(4, 9)
    x.requires_grad_()

    def check(function: Any) -> None:
        loss = (function(x, target) * 2).sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        kept = first.clone()
        first.zero_()  # as an optimizer or a clipping may do
        (second,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(second, kept)

    tells_apart(check, lambda x, target: ours(x, target, reduction=reduction), OneBuffer.apply)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks, of which this process plays the first and no second exists."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def test_24_a_shard_is_never_taken_for_the_whole(mesh: DeviceMesh) -> None:
    """Apple CCE #31: a sharded tensor passed raw. What exists today: DTensor logits are refused, by the dispatcher."""
    x, target = sample(4, 10)
    exact = ours(x, target)

    def outcome(function: Any, labels: Any) -> Any:
        try:
            return function(DTensor.from_local(x[:, :5].contiguous(), mesh, [Shard(1)]), labels)
        except RuntimeError as error:
            return str(error)

    def right_or_refused(function: Any) -> None:
        for labels in (target, DTensor.from_local(target, mesh, [Replicate()])):
            result = outcome(function, labels)
            if isinstance(result, str):
                assert "DTensor" in result or "sharding strategy" in result
            else:
                torch.testing.assert_close(result, exact)

    tells_apart(right_or_refused, ours, lambda x, labels: ours(x.to_local(), target % 5))
