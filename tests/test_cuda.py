"""What only a GPU can show: graphs, streams, no synchronisation, offsets beyond 2**31. Skipped without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from oracle import loss_and_gradient, sample, token_losses
from torch import Tensor

import xentile as xt

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.compile's and Triton's own
]
SIZES = (1, 7, 1000, 4096, 50257, 128256, 262144)


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [t.cuda() for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 64, 300])
def test_token_losses_and_gradients_at_real_sizes(rows: int, size: int, dtype: torch.dtype) -> None:
    logits, target = on_gpu(*sample(rows, size, dtype, ignored=0.1))
    live = target != -100
    out = xt.cross_entropy(logits, target)
    exact = token_losses(logits[live], target[live])
    torch.testing.assert_close(out.token_loss[live].double(), exact, rtol=1e-6, atol=1e-12)
    expected = loss_and_gradient(lambda x: F.cross_entropy(x, target), logits, torch.float64)[1]
    actual = loss_and_gradient(lambda x: xt.cross_entropy(x, target).loss, logits, dtype)[1]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        actual.double(), expected, rtol=max(eps, 2e-6), atol=torch.finfo(dtype).tiny, equal_nan=True
    )


def test_a_training_step_does_not_wait_for_the_device(no_synchronisation: None) -> None:
    logits, target = torch.randn(64, 5000, device="cuda", requires_grad=True), torch.zeros(64, device="cuda").long()
    sketch, normalizer = xt.LossSketch("cuda"), torch.full((), 60.0, device="cuda")
    for options in ({}, {"normalizer": normalizer}, {"reduction": "none"}, {"label_smoothing": 0.1, "z_loss": 0.1}):
        out = xt.cross_entropy(logits, target, sketch=sketch, stats=("entropy", "target_rank"), **options)
        out.loss.sum().backward()
        out.quantile([0.1, 0.5])
        sketch.quantile([0.1, 0.5])


@pytest.mark.parametrize(("rows", "size"), [(64, 1000), (16, 128256), (300, 50257)])
def test_a_captured_step_replays(rows: int, size: int) -> None:
    """1000 replays on changing data equal eager steps, gradient, counts and quantiles included."""
    logits, target = on_gpu(*sample(rows, size))
    x, q = logits.clone().requires_grad_(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, device="cuda")
    criterion = xt.CrossEntropyLoss(all_ignored="zero").cuda()

    def step() -> tuple[Tensor, Tensor]:
        x.grad = None
        loss = criterion(x, target)
        loss.backward()
        return loss.detach(), criterion.sketch.quantile(q)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    criterion.sketch.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, quantiles = step()
    captured_grad = x.grad
    criterion.sketch.reset()
    eager = xt.LossSketch("cuda")
    for seed in range(1000):
        with torch.no_grad():
            x.copy_(logits.roll(seed, 1))
        graph.replay()
        if seed % 250 == 0:
            expected = loss_and_gradient(lambda y: xt.cross_entropy(y, target).loss, x, torch.float32)
            assert torch.equal(loss, expected[0])
            assert torch.equal(captured_grad, expected[1])
        xt.cross_entropy(x.detach(), target, sketch=eager)
    assert criterion.sketch == eager
    assert torch.equal(quantiles, eager.quantile(q))


def test_compiled_step_with_cuda_graphs() -> None:
    criterion = xt.CrossEntropyLoss().cuda()
    logits, target = on_gpu(*sample(64, 3000))
    function = torch.compile(lambda x, t: criterion(x, t), fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        loss, gradient = loss_and_gradient(lambda x: function(x, target), logits, torch.float32)
        expected = loss_and_gradient(lambda x: F.cross_entropy(x, target), logits, torch.float32)
        torch.testing.assert_close((loss, gradient), expected)
    assert int(criterion.sketch.count() + criterion.sketch.ignored_count()) == 5 * 64


def test_a_side_stream_is_respected() -> None:
    logits, target = on_gpu(*sample(64, 50257))
    expected = xt.cross_entropy(logits, target).token_loss.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = logits * 1.0
        out = xt.cross_entropy(late, target)
    stream.synchronize()
    assert torch.equal(out.token_loss, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_current() -> None:
    logits, target = (t.to("cuda:1") for t in sample(64, 50257))
    out = xt.cross_entropy(logits.requires_grad_(), target)
    out.loss.backward()
    assert out.token_loss.device == logits.device
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, target))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_than_two_to_the_31_logits(reduction: str) -> None:
    rows, size = 8500, 262144  # 2.2e9 logits, 4.5 GB in bfloat16 and as much for the gradient
    logits = torch.randn(1, size, device="cuda", dtype=torch.bfloat16).expand(rows, size).contiguous()
    target = torch.arange(rows, device="cuda") % size
    out = xt.cross_entropy(logits.requires_grad_(), target, reduction=reduction)
    out.loss.sum().backward()
    assert logits.grad is not None
    probability = torch.softmax(logits[-1].double(), 0)
    expected = probability.clone()
    expected[rows - 1] -= 1
    scale = rows if reduction == "mean" else 1
    torch.testing.assert_close(logits.grad[-1].double() * scale, expected, rtol=2**-8, atol=1e-9)
    torch.testing.assert_close(out.token_loss[-1].double(), -probability[rows - 1].log(), rtol=1e-6, atol=0)


def test_a_bad_target_is_nan_counted_and_raises_on_request() -> None:
    logits, _ = on_gpu(*sample(4, 1000))
    target = torch.tensor([1, 1000, -7, -100], device="cuda")
    sketch = xt.LossSketch("cuda")
    out = xt.cross_entropy(logits.requires_grad_(), target, sketch=sketch, reduction="none")
    out.loss.sum().backward()
    assert out.token_loss.isnan().tolist() == [False, True, True, False]
    assert out.out_of_range == sketch.out_of_range_count() == 2
    assert logits.grad is not None
    assert not bool(logits.grad[1:].any())
    with pytest.raises(IndexError, match="Target 1000 is out of bounds"):
        xt.cross_entropy(logits, target, check=True)
