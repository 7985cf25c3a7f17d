"""Every operation of a training step on a GPU: no synchronisation, CUDA graphs, whole graphs of torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import sample
from torch import Tensor

import xentile as xt

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.compile's and Triton's own
]
ROWS, SIZE, K = 32, 5000, 16


class Inputs:
    """A student's logits, targets, a teacher's logits and its top K: the same numbers on every device."""

    def __init__(self, device: str) -> None:
        logits, target = sample(ROWS, SIZE, ignored=0.1)
        self.logits, self.target = logits.to(device).requires_grad_(), target.to(device)
        self.teacher_logits = sample(ROWS, SIZE, seed=1)[0].to(device)
        self.teacher = xt.teacher_topk(self.teacher_logits, K, temperatures=(2.0,))
        self.sketch, self.kd_sketch = xt.LossSketch(device), xt.LossSketch(device)
        self.q = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, device=device)

    def change(self, shift: int) -> None:
        """Other numbers in the same memory."""
        with torch.no_grad():
            for t in (self.logits, self.teacher_logits):
                t.copy_(t.roll(shift, 1))


def cross_entropy(x: Inputs) -> tuple[Tensor, ...]:
    out = xt.cross_entropy(x.logits, x.target, sketch=x.sketch, stats=("entropy", "target_rank"))
    return out.loss, out.token_loss


def sketch(x: Inputs) -> tuple[Tensor, ...]:
    x.sketch.update(x.teacher_logits[0].abs())
    return x.sketch.quantile(x.q), x.sketch.mean(), x.sketch.count()


def topk_distillation(x: Inputs) -> tuple[Tensor, ...]:
    out = xt.topk_distillation_loss(
        x.logits,
        x.teacher.ids,
        x.teacher.logprobs,
        x.target,
        support="tail_bucket",
        temperature=2.0,
        teacher_log_z=x.teacher.log_z[:, 0],
        teacher_tail_logprob=x.teacher.tail_logprob[:, 0],
        ce_weight=0.5,
        sketch=x.sketch,
        kd_sketch=x.kd_sketch,
    )
    return out.loss, out.kd_loss


def distillation(x: Inputs) -> tuple[Tensor, ...]:
    out = xt.distillation_loss(x.logits, x.teacher_logits, x.target, divergence="jsd", ce_weight=0.5, sketch=x.sketch)
    return out.loss, out.kd_loss


def teacher_topk(x: Inputs) -> tuple[Tensor, ...]:
    return tuple(xt.teacher_topk(x.teacher_logits, K, temperatures=(1.0, 2.0)))


Operation = Callable[[Inputs], tuple[Tensor, ...]]
each_operation = pytest.mark.parametrize(
    "operation",
    [cross_entropy, sketch, topk_distillation, distillation, teacher_topk],
    ids=lambda operation: operation.__name__,
)


def step(operation: Operation, x: Inputs) -> tuple[Tensor, ...]:
    """What the operation returns, and the gradient if there is one."""
    results = operation(x)
    if not results[0].requires_grad:
        return results
    return *(t.detach() for t in results), *torch.autograd.grad(results[0], x.logits)


@each_operation
def test_small_inputs_give_what_a_cpu_gives(operation: Operation) -> None:
    """Also what compute-sanitizer watches in benchmarks/gpu.sh."""
    for on_gpu, on_cpu in zip(step(operation, Inputs("cuda")), step(operation, Inputs("cpu")), strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-5, atol=1e-7)


@each_operation
def test_a_step_does_not_wait_for_the_device(operation: Operation) -> None:
    x = Inputs("cuda")
    step(operation, x)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(operation, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_operation
def test_a_captured_step_replays_on_other_numbers(operation: Operation) -> None:
    x = Inputs("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(operation, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(operation, x)
    for shift in (1, 2, 3):
        x.change(shift)
        x.sketch.reset()
        graph.replay()
        replayed = [t.clone() for t in captured]
        x.sketch.reset()
        for actual, expected in zip(replayed, step(operation, x), strict=True):
            assert torch.equal(actual, expected)


@each_operation
def test_a_step_compiles_into_one_graph(operation: Operation) -> None:
    x = Inputs("cuda")
    expected = step(operation, x)
    x.sketch.reset()
    for actual, wanted in zip(step(torch.compile(operation, fullgraph=True), x), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
