"""The Triton kernels of distillation against a teacher's logits in Triton's interpreter, with tiles of 32 columns.

test_dense_triton.py runs this file in a process of its own, as test_triton.py does with triton_interpreter.py.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import triton_36
from ptx.dense_operators import (
    Inputs,
    Options,
    Outputs,
    assert_exact,
    assert_gradient,
    awkward_inputs,
    backward,
    exact,
    forward,
    random_inputs,
    weighted,
)
from torch import Tensor

from xentile import _layout as layout
from xentile._triton import dense_distillation
from xentile._triton.launch import Rows

TILES = Rows(32, 32)
SPLIT = Rows(32, 32, splits=3)  # of the gradient alone
MIXED: dict[str, Any] = {"temperature": 2.5, "ce_weight": 0.5}
NONE = layout.REDUCTIONS.index("none")

# numpy's warnings, about the infinities and NaN that are tested
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def interpreter_of_any_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_36.mend(monkeypatch)


def run(inputs: Inputs, options: Options, choice: Rows | None = TILES, **others: Any) -> Outputs:
    return forward(functools.partial(dense_distillation.distillation, choice=choice), inputs, options, **others)


def run_backward(
    dloss: Tensor, inputs: Inputs, saved: Outputs, options: Options, choice: Rows | None = TILES, **others: Any
) -> Tensor:
    implementation = functools.partial(dense_distillation.distillation_backward, choice=choice)
    return backward(implementation, dloss, inputs, saved, options, **others)


class TestEveryDivergence:
    @pytest.mark.parametrize("target", [False, True], ids=["alone", "with cross-entropy"])
    @pytest.mark.parametrize("temperature", [1.0, 2.5, None], ids=["1", "2.5", "per token"])
    @pytest.mark.parametrize("divergence", layout.DIVERGENCES)
    def test_loss_and_gradient(self, divergence: str, temperature: float | None, target: bool) -> None:
        options = Options.of(divergence, temperature=temperature or 1.0, ce_weight=0.5 * target)
        rows = 2 if temperature is None else 1
        inputs = random_inputs(rows, 43, target=target)
        if temperature is None:
            inputs = inputs._replace(token_temperature=torch.tensor([0.75, 4.0]))
        assert_exact(inputs, options, run(inputs, options))

    @pytest.mark.parametrize("divergence", layout.DIVERGENCES)
    def test_backward_in_parts_equals_the_fused_gradient(self, divergence: str) -> None:
        options = Options.of(divergence, **MIXED)
        inputs = random_inputs(1, 75)
        outputs = run(inputs, options)
        assert torch.equal(run_backward(torch.ones(()), inputs, outputs, options, SPLIT), outputs.dlogits)


class TestRows:
    def test_every_option_at_once(self) -> None:
        options = Options.of(
            "skew_forward_kl", ce_weight=0.5, kd_weight=0.25, softcap=8.0, logit_scale=0.75, temperature_squared=False,
            ignore_index=3,
        )  # fmt: skip
        inputs = weighted(random_inputs(5, 43), groups=2)
        assert inputs.target is not None
        inputs.target[1] = 3
        assert_exact(inputs, options, run(inputs, options, groups=2))

    @pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
    def test_one_row_of_each_kind_that_breaks_kernels(self, divergence: str) -> None:
        options = Options.of(divergence, **MIXED)
        inputs = awkward_inputs(43)
        assert_exact(inputs, options, run(inputs, options))

    def test_a_broken_teacher_costs_no_cross_entropy_without_a_divergence(self) -> None:
        options = Options.of(kd_weight=0.0, ce_weight=1.0, reduction=NONE)
        inputs = random_inputs(2, 43)
        inputs.teacher_logits[0, 3] = torch.nan
        outputs = run(inputs, options)
        assert outputs.kd_loss.isnan().tolist() == [True, False]
        assert outputs.loss.isfinite().all()
        assert_exact(inputs, options, outputs)

    @pytest.mark.parametrize("v", [1, 3, 32])
    def test_rows_of_no_tile_and_of_whole_tiles(self, v: int) -> None:
        options = Options.of(**MIXED)
        inputs = random_inputs(2, v)
        assert_exact(inputs, options, run(inputs, options))

    @pytest.mark.parametrize("teacher_offset", [1, 2])
    def test_rows_of_any_alignment(self, teacher_offset: int) -> None:
        options = Options.of(**MIXED)
        inputs = random_inputs(3, 43)
        spread = []
        for x, offset, stride in zip(inputs[:2], (1, teacher_offset), (46, 57), strict=True):
            memory = torch.full((3 * stride + offset,), torch.nan)  # what lies between the rows must not be read
            spread.append(memory[offset:].as_strided((3, 43), (stride, 1)))
            spread[-1].copy_(x)
        inputs = inputs._replace(logits=spread[0], teacher_logits=spread[1])
        assert_exact(inputs, options, run(inputs, options))

    @pytest.mark.parametrize(
        ("dtype", "teacher_dtype"), [(torch.float16, torch.float32), (torch.float32, torch.float16)]
    )
    def test_formats_may_differ(self, dtype: torch.dtype, teacher_dtype: torch.dtype) -> None:
        options = Options.of(**MIXED)
        inputs = random_inputs(2, 43, dtype, teacher_dtype)
        assert_exact(inputs, options, run(inputs, options))

    @pytest.mark.parametrize("masked", [-1e10, -1e30])
    def test_whole_groups_of_masked_columns_count_nothing(self, masked: float) -> None:
        options = Options.of("forward_kl", **MIXED)
        inputs = random_inputs(2, 131)
        inputs.logits[:, 20:90] = masked
        inputs.teacher_logits[:, 20:100] = masked
        assert inputs.target is not None
        inputs.target[:] = 9
        assert_exact(inputs, options, run(inputs, options))

    def test_a_divergence_of_1e_13_keeps_its_digits(self) -> None:
        options = Options.of(ce_weight=1.0, reduction=NONE)
        inputs = random_inputs(2, 43)
        inputs.logits[:, 5], inputs.teacher_logits[:, 5] = 40.0, 42.0
        assert inputs.target is not None
        inputs.target[:] = 5
        actual, wanted = run(inputs, options), exact(inputs, options)
        assert float(wanted.kd_loss.max()) < 1e-12
        for name in ("kd_loss", "token_loss"):
            assert (getattr(actual, name).double() / getattr(wanted, name) - 1).abs().max() < 1e-5

    def test_equal_rows_have_neither_loss_nor_gradient(self) -> None:
        options = Options.of()
        inputs = random_inputs(2, 43, target=False)
        inputs = inputs._replace(teacher_logits=inputs.logits.clone())
        outputs = run(inputs, options)
        assert torch.equal(outputs.kd_loss, torch.zeros(2))
        assert torch.equal(outputs.dlogits, torch.zeros(2, 43))


class TestGradient:
    def test_over_the_logits(self) -> None:
        options = Options.of(**MIXED)
        inputs = random_inputs(2, 75)
        beside = run(inputs, options).dlogits
        over = run(inputs._replace(logits=inputs.logits.clone()), options, inplace=True).dlogits
        assert torch.equal(over, beside)

    def test_of_each_row_of_reduction_none(self) -> None:
        options = Options.of(reduction=NONE, **MIXED)
        inputs = random_inputs(3, 43)
        assert inputs.target is not None
        inputs.target[1] = -100
        saved = run(inputs, options, gradient=False)
        dloss = torch.tensor([0.5, 3.0, -2.0])
        actual = run_backward(dloss, inputs, saved, options, SPLIT)
        assert_gradient(inputs, options, actual, exact(inputs, options), dloss)

    def test_that_is_there_is_kept_for_a_dloss_of_one(self) -> None:
        options = Options.of(**MIXED)
        inputs = random_inputs(2, 43)
        outputs = run(inputs, options)
        for dloss in (1.0, 3.0):
            filled = torch.full_like(inputs.logits, 7.0)
            run_backward(torch.tensor(dloss), inputs, outputs, options, into=filled, filled=True)
            anew = run_backward(torch.tensor(dloss), inputs, outputs, options)
            assert torch.equal(filled, torch.full_like(filled, 7.0) if dloss == 1 else anew)

    @pytest.mark.parametrize("zero_if_empty", [False, True])
    def test_of_the_mean_of_nothing_is_zero(self, zero_if_empty: bool) -> None:
        options = Options.of(zero_if_empty=zero_if_empty)
        inputs = random_inputs(2, 7)
        assert inputs.target is not None
        inputs.target[:] = -100
        outputs = run(inputs, options)
        assert outputs.loss.item() == 0 if zero_if_empty else outputs.loss.isnan()
        assert torch.equal(outputs.dlogits, torch.zeros(2, 7))
