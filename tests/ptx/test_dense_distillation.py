"""The machine code of dense distillation against float64, from the package's own launchers down."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from xentile import _layout as layout
from xentile._triton import dense_distillation as triton

from .dense_operators import (
    Inputs,
    Options,
    Outputs,
    assert_exact,
    awkward_inputs,
    backward,
    forward,
    random_inputs,
    weighted,
)
from .device import Launch, pretended_gpu

MACHINES = [
    pytest.param(architecture, dtype, id=f"sm_{architecture}-{str(dtype).removeprefix('torch.')}")
    for architecture in (80, 90)
    for dtype in (torch.float32, torch.bfloat16)
]
TWO_MACHINES = [MACHINES[0], MACHINES[3]]
MIXED: dict[str, Any] = {"temperature": 2.5, "ce_weight": 0.5}


class Result(NamedTuple):
    outputs: Outputs
    launches: list[Launch]


def run(architecture: int, inputs: Inputs, options: Options, *, races: bool = False, **choices: Any) -> Result:
    with pretended_gpu(architecture, races=races) as launches:
        outputs = forward(triton.distillation, inputs, options, **choices)
    return Result(outputs, launches)


def gradient_of(architecture: int, inputs: Inputs, saved: Outputs, options: Options, **choices: Any) -> Tensor:
    with pretended_gpu(architecture):
        return backward(triton.distillation_backward, torch.ones(()), inputs, saved, options, **choices)


def rows_of(launches: list[Launch]) -> Launch:
    return next(done for done in launches if done.name == "dense_row_kernel")


@pytest.mark.parametrize("divergence", layout.DIVERGENCES)
@pytest.mark.parametrize(("architecture", "dtype"), TWO_MACHINES)
def test_loss_and_gradient(architecture: int, dtype: torch.dtype, divergence: str) -> None:
    options = Options.of(divergence)
    inputs = random_inputs(2, 1000, dtype, target=False)
    outputs = run(architecture, inputs, options).outputs
    assert_exact(inputs, options, outputs)
    assert torch.equal(gradient_of(architecture, inputs, outputs, options), outputs.dlogits)


@pytest.mark.parametrize("divergence", layout.DIVERGENCES)
@pytest.mark.parametrize(("architecture", "dtype"), TWO_MACHINES)
def test_with_cross_entropy_at_another_temperature(architecture: int, dtype: torch.dtype, divergence: str) -> None:
    options = Options.of(divergence, **MIXED)
    inputs = random_inputs(2, 131, dtype)
    outputs = run(architecture, inputs, options).outputs
    assert_exact(inputs, options, outputs)
    assert torch.equal(gradient_of(architecture, inputs, outputs, options), outputs.dlogits)


@pytest.mark.parametrize(("architecture", "dtype"), MACHINES)
def test_every_option_at_once(architecture: int, dtype: torch.dtype) -> None:
    options = Options.of(
        "reverse_kl", ce_weight=0.5, kd_weight=0.25, softcap=20.0, logit_scale=0.75, temperature_squared=False,
        ignore_index=3, zero_if_empty=True,
    )  # fmt: skip
    inputs = weighted(random_inputs(5, 131, dtype), groups=2)
    assert inputs.target is not None
    inputs.target[1] = 3
    assert_exact(inputs, options, run(architecture, inputs, options, groups=2).outputs)


@pytest.mark.parametrize("size", [1, 7, 50257])
@pytest.mark.parametrize(("architecture", "dtype"), TWO_MACHINES)
def test_rows_of_any_length(architecture: int, dtype: torch.dtype, size: int) -> None:
    options = Options.of("jsd", ce_weight=0.5)
    inputs = random_inputs(2, size, dtype)
    outputs = run(architecture, inputs, options).outputs
    assert_exact(inputs, options, outputs)
    assert torch.equal(gradient_of(architecture, inputs, outputs, options), outputs.dlogits)


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_reverse_kl", "tv"])
@pytest.mark.parametrize(("architecture", "dtype"), TWO_MACHINES)
def test_one_row_of_each_kind_that_breaks_kernels(architecture: int, dtype: torch.dtype, divergence: str) -> None:
    options = Options.of(divergence, **MIXED)
    inputs = awkward_inputs(131, dtype)
    assert_exact(inputs, options, run(architecture, inputs, options).outputs)


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
@pytest.mark.parametrize("size", [1000, 1003])
def test_formats_may_differ(dtype: torch.dtype, teacher_dtype: torch.dtype, size: int) -> None:
    options = Options.of(ce_weight=0.5)
    inputs = random_inputs(3, size, dtype, teacher_dtype)
    outputs = run(90, inputs, options).outputs
    assert_exact(inputs, options, outputs)
    assert torch.equal(gradient_of(90, inputs, outputs, options), outputs.dlogits)


@pytest.mark.parametrize(("shift", "teacher_shift"), [(1, 1), (3, 5)])
def test_rows_that_start_anywhere(shift: int, teacher_shift: int) -> None:
    """Views whose rows begin at every alignment, between columns of NaN that must not be read."""
    options = Options.of(ce_weight=0.5)
    inputs = random_inputs(3, 1003, torch.bfloat16)
    wide = torch.full((2, 3, 1003 + 10), torch.nan, dtype=torch.bfloat16)
    views = wide[0, :, shift : shift + 1003], wide[1, :, teacher_shift : teacher_shift + 1003]
    for view, x in zip(views, inputs[:2], strict=True):
        view.copy_(x)
    inputs = inputs._replace(logits=views[0], teacher_logits=views[1])
    assert_exact(inputs, options, run(90, inputs, options).outputs)


def test_rows_more_than_two_to_the_31_elements_apart() -> None:
    """Offsets in 64 bits: the same machine code with the second rows far away."""
    from .interpreter import Scattered

    inputs = random_inputs(2, 1000, torch.bfloat16)
    outputs, launches = run(90, inputs, Options.of(ce_weight=0.5), gradient=False)
    stride = 2**31 + 8
    far = []
    for x in inputs[:2]:
        first, second = (row.contiguous().view(torch.uint8).numpy() for row in x)
        far.append(Scattered({0: first, 2 * stride: second}))
    losses = [outputs.kd_loss.clone(), outputs.token_loss.clone()]
    outputs.kd_loss.fill_(torch.nan)
    outputs.token_loss.fill_(torch.nan)
    rows_of(launches).again(x_ptr=far[0], teacher_ptr=far[1], x_stride=stride, teacher_stride=stride)
    assert torch.equal(torch.stack([outputs.kd_loss, outputs.token_loss]), torch.stack(losses))


@pytest.mark.parametrize("size", [1003, 50257])
def test_gradient_over_the_logits_equals_the_gradient_beside_them(size: int) -> None:
    """And no thread stores where another may still read."""
    options = Options.of("reverse_kl", ce_weight=0.5)
    inputs = random_inputs(2, size, torch.bfloat16)
    beside = run(90, inputs, options).outputs
    over = run(90, inputs._replace(logits=inputs.logits.clone()), options, inplace=True, races=True).outputs
    assert torch.equal(over.dlogits, beside.dlogits)
    logits = inputs.logits.clone()
    assert torch.equal(gradient_of(90, inputs._replace(logits=logits), beside, options, into=logits), beside.dlogits)


def test_losses_have_the_same_bits_with_a_gradient_and_without() -> None:
    inputs, options = random_inputs(2, 1003, torch.bfloat16), Options.of(ce_weight=0.5)
    with_gradient, without = (run(90, inputs, options, gradient=gradient).outputs for gradient in (True, False))
    assert torch.equal(with_gradient.kd_loss, without.kd_loss)
    assert torch.equal(with_gradient.token_loss, without.token_loss)


def test_three_reads_of_both_rows_and_one_write() -> None:
    inputs = random_inputs(2, 50257, torch.bfloat16)
    done = rows_of(run(90, inputs, Options.of(ce_weight=0.5)).launches)
    nbytes = inputs.logits.nbytes
    for name in ("x_ptr", "teacher_ptr"):
        assert 3 * nbytes <= done.bytes_loaded(name) <= 1.02 * 3 * nbytes
    assert done.bytes_stored("dx_ptr") == nbytes + 2 * 2  # the target's element is written over


def test_ignored_rows_are_not_read() -> None:
    inputs = random_inputs(3, 1003, torch.bfloat16)
    assert inputs.target is not None
    inputs.target[:] = -100
    done = rows_of(run(90, inputs, Options.of(ce_weight=0.5)).launches)
    assert done.bytes_loaded("x_ptr") == done.bytes_loaded("teacher_ptr") == 0
    assert done.bytes_stored("dx_ptr") == inputs.logits.nbytes


def test_a_row_is_counted_by_one_atomic_a_sketch() -> None:
    inputs = random_inputs(3, 1003, torch.bfloat16)
    done = rows_of(run(90, inputs, Options.of(ce_weight=0.5)).launches)
    assert done.named["atomics"].total() == 2 * len(inputs.logits)
