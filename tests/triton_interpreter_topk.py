"""The Triton kernels of top-K distillation in Triton's interpreter, with tiles so small that short rows cross many.

test_distillation_triton.py runs this file in a process of its own, as test_triton.py does with triton_interpreter.py.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import triton_36
from ptx.topk_inputs import awkward_inputs, random_inputs, weighted
from ptx.topk_operators import Inputs, Options, Outputs, assert_exact, assert_gradient, backward, exact, forward
from torch import Tensor

from xentile import _layout as layout
from xentile._triton import finish, topk_distillation, topk_support
from xentile._triton.launch import Rows
from xentile.reference import distillation_kernels

TILES = Rows(32, 32)
SPLIT = Rows(32, 32, splits=3)  # of the gradient alone
OFFERED = [
    (support, divergence)
    for support in layout.SUPPORTS
    for divergence in layout.DIVERGENCES
    if support != "sampled" or divergence == "forward_kl"
]
MIXED: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.5}

# numpy's warnings, about the infinities and NaN that are tested
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def interpreter_of_any_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_36.mend(monkeypatch)


def run(inputs: Inputs, options: Options, rows: Rows | None = TILES, **choices: Any) -> Outputs:
    implementation = functools.partial(topk_distillation.topk_distillation, rows=rows)
    return forward(implementation, inputs, options, **choices)


def run_backward(
    dloss: Tensor, inputs: Inputs, saved: Outputs, options: Options, rows: Rows | None = TILES, **choices: Any
) -> Tensor:
    implementation = functools.partial(topk_distillation.topk_distillation_backward, rows=rows)
    return backward(implementation, dloss, inputs, saved, options, **choices)


class TestEverySupportAndDivergence:
    @pytest.mark.parametrize(("support", "divergence"), OFFERED)
    def test_alone(self, support: str, divergence: str) -> None:
        options = Options.of(support, divergence)
        inputs = random_inputs(1, 131, 7, options=options, target=False)
        assert_exact(inputs, options, run(inputs, options))

    @pytest.mark.parametrize(("support", "divergence"), OFFERED)
    def test_with_cross_entropy_at_another_temperature(self, support: str, divergence: str) -> None:
        options = Options.of(support, divergence, **MIXED)
        inputs = random_inputs(1, 131, 7, options=options)
        assert_exact(inputs, options, run(inputs, options))


class TestRows:
    @pytest.mark.parametrize(
        ("support", "divergence", "k"),
        [
            ("truncated", "forward_kl", 7),
            ("renormalized", "jsd", 7),
            ("tail_bucket", "reverse_kl", 7),
            ("sampled", "forward_kl", 1),
        ],
    )
    def test_one_row_of_each_kind_that_breaks_kernels(self, support: str, divergence: str, k: int) -> None:
        options = Options.of(support, divergence, **MIXED)
        inputs = awkward_inputs(131, k, torch.float32, options)
        assert_exact(inputs, options, run(inputs, options))

    @pytest.mark.parametrize("support", ["truncated", "tail_bucket"])
    @pytest.mark.parametrize("size", [1, 9, 64])
    def test_support_of_the_whole_vocabulary(self, size: int, support: str) -> None:
        options = Options.of(support, **MIXED)
        inputs = random_inputs(2, size, size, options=options)
        assert_exact(inputs, options, run(inputs, options))

    def test_every_option_at_once(self) -> None:
        options = Options.of(
            "tail_bucket", "skew_forward_kl", ce_weight=0.5, kd_weight=0.25, softcap=8.0, logit_scale=0.75,
            temperature_squared=False, ignore_index=3,
        )  # fmt: skip
        inputs = weighted(random_inputs(6, 131, 7, options=options), groups=2)
        assert inputs.target is not None
        inputs.target[1] = 3
        assert_exact(inputs, options, run(inputs, options, groups=2))

    @pytest.mark.parametrize(("offset", "stride"), [(1, 70), (3, 81)])
    def test_rows_of_any_alignment(self, offset: int, stride: int) -> None:
        options = Options.of(**MIXED)
        inputs = random_inputs(3, 70, 20, options=options)
        memory = torch.full((3 * stride + offset,), torch.nan)  # what lies between the rows must not be read
        logits = memory[offset:].as_strided((3, 70), (stride, 1))
        logits.copy_(inputs.logits)
        inputs = inputs._replace(logits=logits)
        assert_exact(inputs, options, run(inputs, options))

    def test_half_precision_in_the_launchers_own_tiles(self) -> None:
        options = Options.of("tail_bucket", **MIXED)
        inputs = random_inputs(2, 1000, 20, torch.float16, options)
        assert_exact(inputs, options, run(inputs, options, rows=None))

    def test_more_tiles_than_a_word_has_bits(self) -> None:
        options = Options.of()
        inputs = random_inputs(1, 1000, 100, options=options)
        assert_exact(inputs, options, run(inputs, options))

    def test_a_tail_of_1e_30_keeps_its_digits(self) -> None:
        options = Options.of("tail_bucket")
        inputs = random_inputs(1, 131, 7, options=options, target=False)
        inputs.logits[0, inputs.ids[0].long()] += 69.0
        mass = exact(inputs, options).kd_loss
        actual = run(inputs, options)
        assert_exact(inputs, options, actual)
        assert (actual.kd_loss.double() / mass - 1).abs().max() < 1e-6

    @pytest.mark.parametrize("masked", [-1e10, -3e38])
    def test_whole_groups_of_masked_columns_count_nothing(self, masked: float) -> None:
        options = Options.of("tail_bucket", "forward_kl", **MIXED)
        inputs = random_inputs(2, 131, 7, options=options)
        inputs.logits[0, 32:] = masked
        inputs.logits[1, 20:90] = masked
        assert inputs.target is not None
        inputs.ids[:], inputs.target[:] = torch.arange(7), 9
        assert_exact(inputs, options, run(inputs, options))

    def test_a_divergence_of_nearly_equal_distributions_keeps_its_digits(self) -> None:
        options = Options.of("renormalized")
        inputs = random_inputs(4, 131, 7, options=options, target=False)
        at_support = inputs.logits.gather(1, inputs.ids.long())
        inputs.logits.scatter_(1, inputs.ids.long(), at_support * 0 + inputs.logprobs + 0.01 * at_support)
        wanted = exact(inputs, options).kd_loss
        assert wanted.max() < 1e-2
        assert (run(inputs, options).kd_loss.double() / wanted - 1).abs().max() < 1e-4


class TestGradient:
    @pytest.mark.parametrize("rows", [TILES, SPLIT], ids=["whole", "split"])
    @pytest.mark.parametrize(
        ("support", "others"),
        [
            ("truncated", {}),
            ("truncated", MIXED),
            ("renormalized", {}),
            ("renormalized", MIXED),
            ("tail_bucket", MIXED),
        ],
    )
    def test_backward_equals_the_fused_gradient(self, support: str, others: dict[str, Any], rows: Rows) -> None:
        options = Options.of(support, "jsd", **others)
        inputs = random_inputs(3, 131, 7, options=options)
        assert inputs.target is not None
        inputs.target[:] = torch.tensor([5, -100, 131])
        outputs = run(inputs, options)
        assert outputs.dlogits is not None
        assert torch.equal(run_backward(torch.ones(()), inputs, outputs, options, rows), outputs.dlogits)

    def test_gradient_over_the_logits(self) -> None:
        options = Options.of("tail_bucket", **MIXED)
        inputs = random_inputs(3, 131, 20, options=options)
        beside = run(inputs, options)
        forward_over = run(inputs._replace(logits=inputs.logits.clone()), options, inplace=True).dlogits
        copy = inputs._replace(logits=inputs.logits.clone())
        backward_over = run_backward(torch.ones(()), copy, beside, options, None, into=copy.logits)
        assert beside.dlogits is not None
        for over in (forward_over, backward_over):
            assert over is not None
            assert torch.equal(over, beside.dlogits)

    def test_gradient_of_each_token(self) -> None:
        options = Options.of("truncated", "tv", reduction=0, **MIXED)
        inputs = weighted(random_inputs(4, 70, 7, options=options), groups=1)
        dloss = torch.tensor([2.0, 5.0, 0.0, -1.5])
        outputs = run(inputs, options, gradient=False)
        assert_exact(inputs, options, outputs)
        assert_gradient(inputs, options, run_backward(dloss, inputs, outputs, options), exact(inputs, options), dloss)

    def test_gradient_that_is_there_is_kept_for_a_dloss_of_one(self) -> None:
        options = Options.of()
        inputs = random_inputs(3, 37, 7, options=options)
        outputs = run(inputs, options)
        for dloss in (1.0, 3.0):
            sevens = torch.full_like(inputs.logits, 7.0)
            run_backward(torch.tensor(dloss), inputs, outputs, options, into=sevens, filled=True)
            anew = run_backward(torch.tensor(dloss), inputs, outputs, options)
            assert torch.equal(sevens, torch.full_like(sevens, 7.0) if dloss == 1 else anew)


class TestReductions:
    @pytest.mark.parametrize("zero_if_empty", [False, True])
    @pytest.mark.parametrize("gradient", [False, True])
    @pytest.mark.parametrize("n", [0, 2])
    def test_mean_of_nothing(self, n: int, gradient: bool, zero_if_empty: bool) -> None:
        options = Options.of(zero_if_empty=zero_if_empty)
        inputs = random_inputs(n, 7, 3, options=options)
        assert inputs.target is not None
        inputs.target[:] = -100
        outputs = run(inputs, options, gradient=gradient)
        assert outputs.loss.item() == 0 if zero_if_empty else outputs.loss.isnan()
        if outputs.dlogits is not None:
            assert torch.equal(outputs.dlogits, torch.zeros(n, 7))

    @pytest.mark.parametrize("target", [False, True])
    @pytest.mark.parametrize("reduction", [1, 2])
    def test_many_tiles_of_tokens(self, reduction: int, target: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(finish, "BLOCK", 8)
        options = Options.of(reduction=reduction, ce_weight=0.5)
        inputs = weighted(random_inputs(11, 9, 3, options=options, target=target), groups=2)
        if inputs.target is not None:
            inputs.target[::3] = -100
        assert_exact(inputs, options, run(inputs, options, groups=2))

    def test_normalizer_replaces_the_count(self) -> None:
        options = Options.of()
        inputs = random_inputs(3, 9, 3, options=options)._replace(normalizer=torch.tensor(12.5))
        assert_exact(inputs, options, run(inputs, options))


def empty_support(rows: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Poisoned outputs of `topk_support`."""
    floats = (torch.full(shape, 7.0, dtype=dtype) for shape in ((rows, k), (rows,), (rows,)))
    return torch.full((rows, k), -7, dtype=torch.int32), *floats


class TestSupport:
    @pytest.mark.parametrize("support", range(len(layout.SUPPORTS)), ids=layout.SUPPORTS)
    @pytest.mark.parametrize(
        ("stored", "fallback"),
        [
            ("", "renormalize"),
            ("", "uniform_tail"),
            ("log_z", "none"),
            ("tail", "uniform_tail"),
            ("log_z tail", "none"),
        ],
    )
    def test_canonical_form(self, stored: str, fallback: str, support: int) -> None:
        """Rows with duplicates, absent entries, ids beyond the vocabulary, and nothing at all; three temperatures."""
        rows, k, size = 6, 13, 40
        ids = torch.stack([torch.randperm(50)[:k] for _ in range(rows)])
        logprobs = (torch.randn(rows, k) * 2).log_softmax(1) - 0.125
        ids[0, [3, 7]] = int(ids[0, 1])
        ids[1, 0], ids[1, 5], ids[4] = -1, 2**40, int(ids[4, 0])
        logprobs[2, 4], logprobs[3] = -torch.inf, -torch.inf
        log_z = torch.rand(rows) + 1 if "log_z" in stored else None
        tail = -torch.rand(rows) - 1 if "tail" in stored else None
        heat = torch.tensor([1.0, 2.0, 0.75]).repeat(2)
        for duplicates in range(len(layout.DUPLICATES)):
            scalars = (size, support, duplicates, layout.FALLBACKS.index(fallback), 1.0)
            ours, wanted = (empty_support(rows, k, dtype) for dtype in (torch.float32, torch.float64))
            topk_support.topk_support(ids, logprobs, log_z, tail, heat, *ours, *scalars)
            distillation_kernels.topk_support(ids, logprobs.double(), log_z, tail, heat, *wanted, *scalars)
            assert torch.equal(ours[0], wanted[0])
            for actual, should in zip(ours[1:], wanted[1:], strict=True):
                torch.testing.assert_close(actual, should.float(), rtol=2e-7, atol=2e-7, equal_nan=True)

    @pytest.mark.parametrize(
        ("k", "dtype"), [(1, torch.float32), (2, torch.float16), (33, torch.float32), (600, torch.float16)]
    )
    def test_every_k_and_dtype(self, k: int, dtype: torch.dtype) -> None:
        ids = torch.stack([torch.randperm(5000)[:k] for _ in range(2)]).int()
        logprobs = torch.randn(2, k).log_softmax(1).to(dtype)
        outputs = empty_support(2, k)
        topk_support.topk_support(ids, logprobs, None, None, None, *outputs, 5000, 0, 0, 0, 1.0)
        order = ids.argsort(1)
        assert torch.equal(outputs[0], ids.gather(1, order))
        assert torch.equal(outputs[1], logprobs.float().gather(1, order))
