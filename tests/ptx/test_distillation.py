"""The machine code of the top-K distillation kernels against float64, from the package's own launchers down.

What the interpreter of triton_interpreter_topk.py cannot show: bfloat16, contraction, vector loads of any alignment,
atomics, races, and the tiles that the launchers choose.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from xentile._triton import topk_distillation, topk_support
from xentile.reference import distillation_kernels

from .device import Launch, pretended_gpu
from .topk_inputs import awkward_inputs, random_inputs, weighted
from .topk_operators import Inputs, Options, Outputs, assert_exact, assert_gradient, backward, exact, forward

MIXED: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5}
ONE_EXPONENTIAL, TWO_EXPONENTIALS = Options.of("tail_bucket", ce_weight=0.5), Options.of("tail_bucket", **MIXED)


class Result(NamedTuple):
    outputs: Outputs
    launches: list[Launch]


def run(architecture: int, inputs: Inputs, options: Options, *, races: bool = False, **choices: Any) -> Result:
    with pretended_gpu(architecture, races=races) as launches:
        outputs = forward(topk_distillation.topk_distillation, inputs, options, **choices)
    return Result(outputs, launches)


def run_backward(dloss: torch.Tensor, inputs: Inputs, saved: Outputs, options: Options) -> torch.Tensor:
    with pretended_gpu(90):
        return backward(topk_distillation.topk_distillation_backward, dloss, inputs, saved, options)


@pytest.mark.parametrize(
    ("architecture", "dtype", "size", "k", "support", "divergence", "others"),
    [
        (80, torch.float32, 50257, 64, "truncated", "forward_kl", MIXED),
        (80, torch.bfloat16, 50257, 20, "renormalized", "jsd", MIXED),
        (80, torch.bfloat16, 1000, 5, "teacher_renormalized", "tv", {}),
        (90, torch.float32, 1000, 64, "sampled", "forward_kl", {}),
        (90, torch.float32, 7, 7, "tail_bucket", "skew_forward_kl", MIXED),
        (90, torch.bfloat16, 50257, 64, "tail_bucket", "reverse_kl", {}),
        (90, torch.float16, 5003, 1000, "truncated", "skew_reverse_kl", MIXED | {"softcap": 16.0}),
        (100, torch.bfloat16, 1000, 64, "tail_bucket", "forward_kl", MIXED),
        (120, torch.float32, 1000, 64, "truncated", "forward_kl", {}),
    ],
)
def test_losses_and_gradient(
    architecture: int, dtype: torch.dtype, size: int, k: int, support: str, divergence: str, others: dict[str, Any]
) -> None:
    options = Options.of(support, divergence, **others)
    inputs = random_inputs(2, size, k, dtype, options, target=bool(others))
    assert_exact(inputs, options, run(architecture, inputs, options).outputs)


@pytest.mark.parametrize("size", [9, 1000, 20011])
@pytest.mark.parametrize(("architecture", "dtype"), [(80, torch.float32), (90, torch.bfloat16)])
def test_one_row_of_each_kind_that_breaks_kernels(architecture: int, dtype: torch.dtype, size: int) -> None:
    inputs = awkward_inputs(size, 7, dtype, TWO_EXPONENTIALS)
    assert_exact(inputs, TWO_EXPONENTIALS, run(architecture, inputs, TWO_EXPONENTIALS).outputs)


def test_every_option_at_once() -> None:
    options = Options.of(
        "tail_bucket", "jsd", ce_weight=0.5, kd_weight=0.25, softcap=8.0, logit_scale=0.75, ignore_index=3
    )
    inputs = weighted(random_inputs(6, 1000, 20, torch.bfloat16, options), groups=2)
    assert inputs.target is not None
    inputs.target[1] = 3
    assert_exact(inputs, options, run(90, inputs, options, groups=2).outputs)


@pytest.mark.parametrize("shift", [1, 7])
def test_rows_that_start_anywhere(shift: int) -> None:
    """A view whose rows begin at every alignment, between columns of NaN that must not be read."""
    inputs = random_inputs(6, 5003, 64, torch.bfloat16, ONE_EXPONENTIAL)
    wide = torch.full((6, 5003 + 2 * shift), torch.nan, dtype=torch.bfloat16)
    wide[:, shift:-shift] = inputs.logits
    inputs = inputs._replace(logits=wide[:, shift:-shift])
    assert_exact(inputs, ONE_EXPONENTIAL, run(90, inputs, ONE_EXPONENTIAL).outputs)


def test_rows_more_than_two_to_the_31_elements_apart() -> None:
    """Offsets in 64 bits: the same machine code, the second row far away; aligned, so that the sums have one order."""
    from .interpreter import Scattered

    inputs = random_inputs(2, 5008, 20, torch.bfloat16, ONE_EXPONENTIAL)
    outputs, launches = run(90, inputs, ONE_EXPONENTIAL, gradient=False)
    stride = 2**31 + 8
    rows = [row.contiguous().view(torch.uint8).numpy() for row in inputs.logits]
    losses = outputs.kd_loss.clone()
    outputs.kd_loss.fill_(torch.nan)
    launches[0].again(x_ptr=Scattered({0: rows[0], 2 * stride: rows[1]}), x_stride=stride)
    assert torch.equal(outputs.kd_loss, losses)


@pytest.mark.parametrize("options", [ONE_EXPONENTIAL, TWO_EXPONENTIALS], ids=["one", "two"])
def test_backward_equals_the_fused_gradient(options: Options) -> None:
    inputs = random_inputs(3, 70001, 20, torch.bfloat16, options)
    assert inputs.target is not None
    inputs.target[1] = -100
    outputs = run(90, inputs, options).outputs
    assert outputs.dlogits is not None
    assert torch.equal(run_backward(torch.ones(()), inputs, outputs, options), outputs.dlogits)


def test_backward_with_a_gradient_per_row() -> None:
    options = TWO_EXPONENTIALS._replace(reduction=0)
    inputs = random_inputs(4, 5003, 20, torch.bfloat16, options)
    dloss = torch.tensor([2.0, 5.0, 0.0, -1.5])
    outputs = run(90, inputs, options, gradient=False).outputs
    gradient = run_backward(dloss, inputs, outputs, options)
    assert_gradient(inputs, options, gradient, exact(inputs, options), dloss)


@pytest.mark.parametrize("size", [1000, 50257])
def test_gradient_over_the_logits_equals_the_gradient_beside_them(size: int) -> None:
    """And no thread stores where another may still read, nor reads a bit before it is set."""
    inputs = random_inputs(2, size, 64, torch.bfloat16, TWO_EXPONENTIALS)
    beside = run(90, inputs, TWO_EXPONENTIALS).outputs.dlogits
    copy = inputs._replace(logits=inputs.logits.clone())
    over = run(90, copy, TWO_EXPONENTIALS, inplace=True, races=True).outputs.dlogits
    assert beside is not None
    assert over is not None
    assert torch.equal(over, beside)


def bytes_of(launches: list[Launch], tensor_name: str, kind: str) -> int:
    return sum(done.named[kind][tensor_name] for done in launches)


def test_the_row_is_read_twice_and_written_once() -> None:
    """And the groups with a column of the support once more; the bitmap is small beside the row."""
    inputs = random_inputs(2, 50257, 64, torch.bfloat16, ONE_EXPONENTIAL)
    _, launches = run(90, inputs, ONE_EXPONENTIAL)
    nbytes, groups = inputs.logits.nbytes, 2 * 64 * 16
    assert 2 * nbytes <= bytes_of(launches, "x_ptr", "loaded") <= 1.05 * (2 * nbytes + groups)
    assert nbytes < bytes_of(launches, "dx_ptr", "stored") <= 1.01 * nbytes
    assert bytes_of(launches, "bitmap_ptr", "stored") <= 0.05 * nbytes


def test_ignored_rows_are_not_read() -> None:
    inputs = random_inputs(3, 5003, 20, torch.bfloat16, ONE_EXPONENTIAL)
    assert inputs.target is not None
    inputs.target[:] = -100
    _, launches = run(90, inputs, ONE_EXPONENTIAL)
    assert bytes_of(launches, "x_ptr", "loaded") == 0


@pytest.mark.parametrize("k", [1, 20, 1024])
def test_support_equals_the_specification(k: int) -> None:
    ids = torch.stack([torch.randperm(3000)[:k] for _ in range(3)])
    ids[0, 0], ids[1, k // 2] = -1, 2999
    ids[2, -1] = int(ids[2, 0])
    logprobs = (torch.randn(3, k).log_softmax(1) - 0.125).bfloat16()
    ours, wanted = (
        (torch.empty(3, k, dtype=torch.int32), torch.empty(3, k), torch.empty(3), torch.empty(3)) for _ in range(2)
    )
    scalars = (2900, 3, 0, 2, 2.0)  # tail_bucket, sum, uniform_tail
    with pretended_gpu(90):
        topk_support.topk_support(ids, logprobs, None, None, None, *ours, *scalars)
    distillation_kernels.topk_support(ids, logprobs, None, None, None, *wanted, *scalars)
    assert torch.equal(ours[0], wanted[0])
    for actual, should in zip(ours[1:], wanted[1:], strict=True):
        torch.testing.assert_close(actual, should, rtol=2e-7, atol=2e-7)
