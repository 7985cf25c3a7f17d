"""The Triton kernels in Triton's interpreter, on CPU tensors, with tiles so small that short rows cross many.

test_triton.py runs this file in a process of its own, with TRITON_INTERPRET=1: the choice is made when kernels are
imported. What the interpreter cannot show (bfloat16, contraction, alignment, races) the PTX interpreter in tests/ptx
does.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import triton_36
from ptx.operators import PLAIN, Inputs, Options, Outputs, assert_exact, backward, exact, forward, steep_inputs

from xentile import _layout as layout
from xentile._triton import cross_entropy as triton_cross_entropy
from xentile._triton import finish
from xentile._triton import sketch as triton_sketch
from xentile._triton.launch import Rows
from xentile.reference import kernels

MEAN, SUM, NONE = (layout.REDUCTIONS.index(name) for name in ("mean", "sum", "none"))
EVERYTHING = Options(label_smoothing=0.1, z_loss=1e-3, softcap=5.0, logit_scale=0.7, ignore_index=3)

STREAMED, SPLIT, RESIDENT = Rows(32, 32), Rows(32, 32, splits=3), Rows(256, 32, resident=True)
SEVERAL = None  # rows a program: the launcher's own choice for short ones
LAUNCHES = pytest.mark.parametrize(
    "rows", [STREAMED, SPLIT, RESIDENT, SEVERAL], ids=["streamed", "split", "resident", "several"]
)

# numpy's warnings, about the infinities and NaN that are tested
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def interpreter_of_any_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_36.mend(monkeypatch)


def run(inputs: Inputs, options: Options = PLAIN, rows: Rows | None = None, **choices: Any) -> Outputs:
    return forward(functools.partial(triton_cross_entropy.cross_entropy, rows=rows), inputs, options, **choices)


def run_backward(
    dloss: torch.Tensor, inputs: Inputs, saved: Outputs, options: Options, rows: Rows | None
) -> torch.Tensor:
    implementation = functools.partial(triton_cross_entropy.cross_entropy_backward, rows=rows)
    return backward(implementation, dloss, inputs, saved, options)


def sample(n: int, v: int, dtype: torch.dtype = torch.float32) -> Inputs:
    return Inputs(torch.randn(n, v).mul(3).to(dtype), torch.randint(0, v, (n,)))


def weighted(inputs: Inputs, groups: int) -> Inputs:
    """With class and token weights, and group ids of which one does not exist."""
    n, v = inputs.logits.shape
    group_ids = torch.randint(0, groups, (n,))
    group_ids[0] = -1
    return inputs._replace(weight=torch.rand(v) + 0.5, token_weight=torch.rand(n) + 0.5, group_ids=group_ids)


class TestRows:
    @LAUNCHES
    @pytest.mark.parametrize("v", [1, 7, 131])
    def test_plain_loss_statistics_and_gradient(self, v: int, rows: Rows | None) -> None:
        inputs = sample(3, v)
        inputs.target[1] = -100
        assert_exact(inputs, PLAIN, run(inputs, rows=rows))

    @LAUNCHES
    @pytest.mark.parametrize("v", [7, 131])
    def test_every_option_at_once(self, v: int, rows: Rows | None) -> None:
        inputs = weighted(sample(4, v), groups=2)
        inputs.target[2] = EVERYTHING.ignore_index
        assert_exact(inputs, EVERYTHING, run(inputs, EVERYTHING, rows, groups=2))

    @LAUNCHES
    def test_half_precision(self, rows: Rows | None) -> None:
        inputs = sample(3, 131, torch.float16)
        inputs.logits[0, 5] = 65504.0
        inputs.target[0] = 5
        assert_exact(inputs, PLAIN, run(inputs, rows=rows))

    @LAUNCHES
    def test_tiles_of_minus_infinity(self, rows: Rows | None) -> None:
        inputs = sample(3, 131)
        inputs.logits[0, :120] = -torch.inf
        inputs.logits[1, 1:] = -torch.inf
        inputs.target[:2] = torch.tensor([125, 0])
        inputs.logits[2, 40] = -torch.inf
        inputs.target[2] = 40  # the loss is infinite, its gradient is not
        assert_exact(inputs, PLAIN, run(inputs, rows=rows))

    @LAUNCHES
    def test_rows_that_are_not_numbers(self, rows: Rows | None) -> None:
        inputs = sample(4, 70)
        inputs.logits[0, 3], inputs.logits[1, 69], inputs.logits[2] = torch.nan, torch.inf, -torch.inf
        inputs.logits[3, 5] = torch.inf
        inputs.target[3] = 5  # the target itself, which is not in the sum
        outputs = run(inputs, PLAIN._replace(reduction=NONE), rows, gradient=False)
        assert outputs.token_loss.isnan().all()
        assert outputs.lse.isnan().all()
        assert int(outputs.sketch[0, layout.NAN]) == 4

    @LAUNCHES
    @pytest.mark.parametrize("scale", [1.0, 0.75])
    def test_logits_too_large_for_distances(self, scale: float, rows: Rows | None) -> None:
        inputs, options = steep_inputs(131), PLAIN._replace(logit_scale=scale)
        outputs = run(inputs, options, rows)
        assert_exact(inputs, options, outputs)
        assert torch.equal(run_backward(torch.tensor(1.0), inputs, outputs, options, rows), outputs.dlogits)

    @LAUNCHES
    def test_smoothing_over_logits_too_large_for_distances(self, rows: Rows | None) -> None:
        inputs = weighted(steep_inputs(131), groups=1)
        inputs = inputs._replace(logits=inputs.logits.clamp(-1e20, 1e20))  # above, the sum of distances overflows
        options = PLAIN._replace(label_smoothing=0.1, reduction=NONE)
        assert_exact(inputs, options, run(inputs, options, rows, gradient=False))

    @LAUNCHES
    def test_a_nan_is_not_lost_among_logits_too_large_for_distances(self, rows: Rows | None) -> None:
        inputs = steep_inputs(131)
        inputs.logits[:, 50] = torch.nan
        assert run(inputs, rows=rows, gradient=False).token_loss.isnan().all()

    @LAUNCHES
    def test_row_max_is_that_of_the_reference(self, rows: Rows | None) -> None:
        inputs = sample(6, 131)
        inputs.target[:] = 3
        inputs.logits[0, 50], inputs.logits[1, 3], inputs.logits[2] = torch.nan, torch.nan, torch.nan
        inputs.logits[3], inputs.logits[4, 50] = -torch.inf, torch.inf
        wanted = exact(inputs).row_max.float()
        assert torch.equal(run(inputs, rows=rows, gradient=False).row_max.nan_to_num(7.0), wanted.nan_to_num(7.0))

    @LAUNCHES
    def test_ignored_rows_do_not_poison(self, rows: Rows | None) -> None:
        inputs = sample(3, 70)
        inputs.logits[1] = torch.nan
        inputs.target[1] = -100
        outputs = run(inputs, rows=rows)
        assert_exact(inputs, PLAIN, outputs)
        assert outputs.dlogits is not None
        assert torch.equal(outputs.dlogits[1], torch.zeros(70))

    @LAUNCHES
    def test_targets_out_of_range_touch_nothing(self, rows: Rows | None) -> None:
        inputs = weighted(sample(3, 37), groups=1)
        inputs.target[1], inputs.target[2] = 37, -5
        assert_exact(inputs, EVERYTHING, run(inputs, EVERYTHING, rows))

    @LAUNCHES
    def test_ties_go_to_the_first_column(self, rows: Rows | None) -> None:
        inputs = sample(3, 131)
        inputs.logits[0] = 1.5
        inputs.logits[1, [20, 77, 130]] = 50.0
        inputs.target[:2] = torch.tensor([64, 77])
        inputs.logits[2, 0] = inputs.logits[2, 130] = 60.0
        inputs.target[2] = 130
        outputs = assert_exact(inputs, PLAIN, run(inputs, rows=rows))
        assert outputs.predicted.tolist() == [0, 20, 0]

    @LAUNCHES
    def test_small_losses_keep_their_digits(self, rows: Rows | None) -> None:
        inputs = sample(8, 131)
        inputs.logits[torch.arange(8), inputs.target] += torch.linspace(5, 30, 8)
        actual, wanted = run(inputs, rows=rows), exact(inputs)
        relative = (actual.token_loss / wanted.token_loss - 1).abs()
        assert float(wanted.token_loss.min()) < 1e-7
        assert float(relative.max()) < 1e-6

    @LAUNCHES
    def test_a_shift_does_not_cost_digits(self, rows: Rows | None) -> None:
        inputs = sample(3, 70)
        inputs.logits.copy_((inputs.logits * 64).round() / 64 - 1e4)  # exact in float32 at this size
        assert_exact(inputs, PLAIN, run(inputs, rows=rows))

    @pytest.mark.parametrize("rows", [STREAMED, SPLIT, SEVERAL], ids=["streamed", "split", "several"])
    @pytest.mark.parametrize(("offset", "stride"), [(1, 70), (3, 81)])
    def test_rows_of_any_alignment(self, offset: int, stride: int, rows: Rows | None) -> None:
        memory = torch.full((4 * stride + offset,), torch.nan)  # what lies between the rows must not be read
        logits = memory[offset:].as_strided((4, 70), (stride, 1))
        logits.copy_(torch.randn(4, 70))
        inputs = Inputs(logits, torch.tensor([0, 69, 1, 68]))
        assert_exact(inputs, PLAIN, run(inputs, rows=rows))

    @LAUNCHES
    def test_target_of_32_bits(self, rows: Rows | None) -> None:
        inputs = sample(3, 37)
        inputs = inputs._replace(target=inputs.target.int())
        assert_exact(inputs, PLAIN, run(inputs, rows=rows))

    @pytest.mark.parametrize("ignore_index", [2**62, -(2**63), 1])
    def test_any_ignore_index(self, ignore_index: int) -> None:
        inputs = sample(3, 37)
        inputs.target[1] = ignore_index
        options = PLAIN._replace(ignore_index=ignore_index)
        assert_exact(inputs, options, run(inputs, options))

    @LAUNCHES
    @pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
    def test_backward_equals_the_fused_gradient(self, options: Options, rows: Rows | None) -> None:
        inputs = weighted(sample(3, 131), groups=1)
        outputs = run(inputs, options, rows)
        gradient = run_backward(torch.ones(()), inputs, outputs, options, rows)
        assert outputs.dlogits is not None
        assert torch.equal(gradient, outputs.dlogits)

    @LAUNCHES
    def test_gradient_over_the_logits(self, rows: Rows | None) -> None:
        inputs = sample(3, 131)
        beside = run(inputs, rows=rows).dlogits
        over = run(inputs._replace(logits=inputs.logits.clone()), rows=rows, inplace=True).dlogits
        assert beside is not None
        assert over is not None
        assert torch.equal(over, beside)

    @pytest.mark.parametrize("reduction", [MEAN, SUM])
    def test_gradient_that_is_there_is_kept_for_a_dloss_of_one(self, reduction: int) -> None:
        inputs, options = sample(3, 37), PLAIN._replace(reduction=reduction)
        outputs = run(inputs, options)
        for dloss in (1.0, 3.0):
            filled = torch.full_like(inputs.logits, 7.0)
            implementation = triton_cross_entropy.cross_entropy_backward
            backward(implementation, torch.tensor(dloss), inputs, outputs, options, filled=filled)
            anew = run_backward(torch.tensor(dloss), inputs, outputs, options, None)
            assert torch.equal(filled, torch.full_like(filled, 7.0) if dloss == 1 else anew)


class TestReductions:
    @pytest.mark.parametrize("zero_if_empty", [False, True])
    @pytest.mark.parametrize("gradient", [False, True])
    @pytest.mark.parametrize("n", [0, 2])
    def test_mean_of_nothing(self, n: int, gradient: bool, zero_if_empty: bool) -> None:
        inputs = sample(n, 7)
        inputs.target[:] = -100
        outputs = run(inputs, PLAIN._replace(zero_if_empty=zero_if_empty), gradient=gradient)
        assert outputs.loss.item() == 0 if zero_if_empty else outputs.loss.isnan()
        if outputs.dlogits is not None:
            assert torch.equal(outputs.dlogits, torch.zeros(n, 7))

    def test_weights_that_sum_to_zero_give_no_gradient_on_request(self) -> None:
        inputs = sample(3, 7)._replace(token_weight=torch.zeros(3))
        outputs = run(inputs, PLAIN._replace(zero_if_empty=True))
        assert outputs.loss.item() == 0
        assert torch.equal(outputs.dlogits, torch.zeros(3, 7))

    @pytest.mark.parametrize("gradient", [False, True])
    def test_normalizer_replaces_the_count(self, gradient: bool) -> None:
        inputs = sample(3, 7)._replace(normalizer=torch.tensor(12.5))
        outputs = run(inputs, gradient=gradient)
        assert outputs.denominator.item() == 12.5
        assert_exact(inputs, PLAIN, outputs)

    def test_the_loss_has_the_same_bits_with_a_gradient_and_without(self) -> None:
        inputs = weighted(sample(5, 37), groups=1)
        assert torch.equal(run(inputs, gradient=True).loss, run(inputs, gradient=False).loss)

    @pytest.mark.parametrize("gradient", [False, True])
    def test_many_tiles_of_tokens(self, gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(finish, "BLOCK", 8)
        inputs = weighted(sample(21, 9), groups=2)
        inputs.target[::3] = -100
        assert_exact(inputs, PLAIN, run(inputs, gradient=gradient, groups=2))


VALUES = [0.0, -0.0, -1.0, -5e-6, 1e-40, 2.0**-24, 255.99, 256.0, 3e38, 2.0**24 * 3, torch.inf, -torch.inf, torch.nan]


class TestSketch:
    @pytest.mark.parametrize("bulk", [False, True])
    @pytest.mark.parametrize(("groups", "grouped"), [(1, False), (1, True), (3, True)])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_update_equals_the_specification(
        self, groups: int, grouped: bool, bulk: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(triton_sketch, "BULK_FROM", 1 if bulk else 1 << 18)
        values = torch.cat([torch.tensor(VALUES), torch.rand(200) * 10.0 ** torch.randint(-9, 4, (200,))])
        mask = torch.rand(values.shape) < 0.8
        weights = torch.rand(values.shape) * 3 if weighted else None
        if weights is not None:
            weights[:5] = torch.tensor([torch.nan, -1.0, 1e30, torch.inf, 2.0**-21])
        group_ids = torch.randint(-1, groups + 1, values.shape) if grouped else None
        unit = 1 << 20 if weighted else 1
        ours, wanted = (torch.zeros(groups, layout.DEFAULT.width, dtype=torch.int64) for _ in range(2))
        for _ in range(2):
            triton_sketch.sketch_update(values, mask, weights, group_ids, ours, unit)
            kernels.sketch_update(values, mask, weights, group_ids, wanted, unit)
        assert torch.equal(ours, wanted)

    @pytest.mark.parametrize("interpolation", range(len(layout.INTERPOLATIONS)))
    @pytest.mark.parametrize("bits", [3, 7])
    def test_quantiles_equal_the_specification(self, bits: int, interpolation: int) -> None:
        state = torch.zeros(3, layout.Layout(bits).width, dtype=torch.int64)
        kernels.sketch_update(torch.rand(50) * 9, None, None, None, state[:1], 1)
        kernels.sketch_update(torch.tensor(VALUES), None, None, None, state[1:2], 1)  # row 2 stays empty
        q = torch.tensor([0.0, 0.01, 0.25, 0.5, 0.77, 0.99, 1.0], dtype=torch.float64)
        ours, wanted = ([torch.full((3, 7), -1.0) for _ in range(3)] for _ in range(2))
        triton_sketch.sketch_quantile(state, q, *ours, interpolation)
        kernels.sketch_quantile(state, q, *wanted, interpolation)
        assert torch.equal(torch.stack(ours).nan_to_num(-7.0), torch.stack(wanted).nan_to_num(-7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("n", [0, 5, 20000])
def test_scale(n: int, offset: int, dtype: torch.dtype) -> None:
    x = torch.randn(n + offset).to(dtype)[offset:]
    for scale in (1.0, 0.3):
        wanted = x * torch.tensor(scale)
        triton_cross_entropy.scale_(x, torch.tensor(scale))
        assert torch.equal(x, wanted)
