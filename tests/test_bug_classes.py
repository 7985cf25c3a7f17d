"""The ways in which fused cross-entropies have been wrong about numbers: a test or group each.

Each test writes its claim once, as a check of any implementation. Ours must pass it, and the buggy formula beside it
must fail it. Names carry the number of the class in the list of classes; docstrings name the public precedent.
The other half is in test_bug_classes_memory.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from buggy import gradient, ours, per_token, softmax_gradient, tells_apart
from oracle import sample, token_losses
from torch import Tensor, nn

import xentile as xt
from xentile import reference

INF, NAN = float("inf"), float("nan")


# ------------------------------------------------------------------------------------------- values that are not finite


@pytest.mark.parametrize("finite", [0, 4095, 4096, 9_999], ids=lambda i: f"finite at {i}")
def test_01_a_tile_entirely_minus_infinity_contributes_nothing(finite: int) -> None:
    """flash-attention #1930: (-inf) - (-inf) = NaN in a tile whose maximum is -inf."""
    x = torch.full((1, 10_000), -INF)
    x[0, finite], x[0, 7_000] = 1.0, 2.0
    target = torch.tensor([finite])
    exact = token_losses(x, target).float()

    def merged_tiles(x: Tensor, target: Tensor) -> Tensor:
        tiles = x[0].view(-1, 1000)
        m = tiles.amax(1)
        s = torch.exp(tiles - m[:, None]).sum(1)
        lse = m.max() + (s * torch.exp(m - m.max())).sum().log()
        return (lse - x[0, target[0]])[None]

    tells_apart(lambda f: torch.testing.assert_close(f(x, target), exact), per_token, merged_tiles)
    dx = gradient(per_token, x, target)
    torch.testing.assert_close(dx.sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert dx.count_nonzero() == 2


@pytest.mark.parametrize("poison", [NAN, INF, -INF], ids=str)
def test_02_an_ignored_row_poisons_nothing(poison: float) -> None:
    """0 * NaN = NaN, in the loss where rows are masked by a product, in the gradient where p * 0 is written."""
    x, target = sample(4, 9)
    harmless, target[2] = x.clone(), -100
    x[2] = poison

    def check(function: Any) -> None:
        assert function(x, target).isfinite()
        assert torch.equal(gradient(function, x, target), gradient(function, harmless, target))

    def masked_by_product(x: Tensor, target: Tensor) -> Tensor:
        mask = (target != -100).float()
        return (F.cross_entropy(x, target.clamp(min=0), reduction="none") * mask).sum() / mask.sum()

    tells_apart(check, ours, masked_by_product)
    check(lambda x, target: reference.cross_entropy(x, target).loss)  # differentiated by autograd, not in closed form


def test_20_a_probability_that_underflows_keeps_its_loss() -> None:
    """llm.c took -log(prob); others lse - x_t, which has no digit left of a loss below 1e-7."""
    x = torch.tensor([[0.0, 200.0], [17.0, 0.0], [40.0, 0.0], [100.0, 0.0], [600.0, 0.0]])
    target = torch.tensor([0, 0, 0, 0, 1])
    exact = token_losses(x, target)

    def check(function: Any) -> None:
        torch.testing.assert_close(function(x, target).double(), exact, rtol=1e-6, atol=3e-45)

    def log_of_softmax(x: Tensor, target: Tensor) -> Tensor:
        return -torch.softmax(x, 1).gather(1, target[:, None])[:, 0].log()

    def lse_minus_target(x: Tensor, target: Tensor) -> Tensor:
        return torch.logsumexp(x, 1) - x.gather(1, target[:, None])[:, 0]

    tells_apart(check, per_token, log_of_softmax, lse_minus_target)


# ---------------------------------------------------------------------------------------------- digits in low precision


@pytest.mark.parametrize("probability", [0.9, 0.995, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_03_the_gradient_of_the_target_is_rounded_once(dtype: torch.dtype, probability: float) -> None:
    """Liger #1268: p rounded to bf16 and read back has lost 1 - p."""
    x = torch.zeros(1, 64, dtype=dtype)
    x[0, 5] = torch.logit(torch.tensor(probability)) + torch.tensor(63.0).log()
    target = torch.tensor([5])
    exact = softmax_gradient(x, target)
    half = torch.finfo(dtype).eps / 2

    def read_modify_write(x: Tensor, target: Tensor) -> Tensor:
        dx = torch.softmax(x.float(), 1).to(x.dtype)
        dx[0, target[0]] -= 1
        return dx

    def check(function: Any) -> None:
        torch.testing.assert_close(function(x, target).double(), exact, rtol=1.01 * half, atol=2**-25)

    tells_apart(check, lambda x, target: gradient(ours, x, target), read_modify_write)


def test_11_counts_and_sums_do_not_overflow_in_half_precision() -> None:
    """PyTorch #85791: 100,003 tokens are more than the largest fp16; 257 is no bf16."""

    def in_logits_dtype(x: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(x.float(), target, reduction="none").to(x.dtype)
        return losses.sum() / torch.tensor(float(len(target)), dtype=x.dtype)

    for dtype, tokens in ((torch.float16, 100_003), (torch.bfloat16, 257)):
        x, target = sample(tokens, 4, dtype)
        mean = token_losses(x, target).mean()
        exact = softmax_gradient(x, target) / tokens
        rounding = {"rtol": torch.finfo(dtype).eps, "atol": 2**-25}  # half of the smallest fp16

        def check(function: Any, x: Tensor = x, target: Tensor = target, mean: Tensor = mean) -> None:
            torch.testing.assert_close(function(x, target).double(), mean, rtol=1e-6, atol=0)

        tells_apart(check, ours, in_logits_dtype)
        torch.testing.assert_close(gradient(ours, x, target).double(), exact, **rounding)


def test_12_token_losses_are_float32_for_bf16_logits() -> None:
    """Stored in bf16, 4096 losses take a few hundred values, and a percentile is one of them."""
    x, target = sample(4096, 64, torch.bfloat16)
    exact = token_losses(x, target)

    def check(losses: Tensor) -> None:
        torch.testing.assert_close(losses.double(), exact, rtol=1e-6, atol=0)
        assert len(losses.unique()) > 4000

    tells_apart(check, xt.cross_entropy(x, target).token_loss, F.cross_entropy(x, target, reduction="none"))


def test_18_float32_results_are_stored_with_all_their_bits() -> None:
    """Liger #1430: a copy hint of 16 bits for a value of 32."""
    x, target = sample(5, 100)
    exact = softmax_gradient(x, target)

    def check(stored: Any) -> None:
        torch.testing.assert_close(stored(per_token(x, target)).double(), token_losses(x, target), rtol=1e-6, atol=0)
        dx = gradient(per_token, x, target, upstream=torch.ones(5))
        torch.testing.assert_close(stored(dx).double(), exact, rtol=4e-6, atol=1e-9)

    tells_apart(check, lambda t: t, lambda t: t.bfloat16().float())


def test_22_mixed_dtypes_under_autocast_lose_nothing_to_the_lower_one() -> None:
    """What exists of the class today: bf16 logits of an autocast linear layer beside float32 weights.

    The fused linear layer, whose dW the class is about, is not built.
    """
    layer, hidden = nn.Linear(16, 50), torch.randn(8, 16)
    target, weight = torch.randint(50, (8,)), torch.rand(50)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer(hidden)
        loss = ours(logits, target, weight=weight)
    assert logits.dtype == torch.bfloat16
    exact = F.cross_entropy(logits.double(), target, weight.double())

    def check(value: Tensor) -> None:
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)

    tells_apart(check, loss, F.cross_entropy(logits, target, weight.bfloat16()))
    (dw,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(exact, layer.weight)
    assert dw.dtype == torch.float32
    torch.testing.assert_close(dw, theirs, rtol=2e-2, atol=1e-4)


# ------------------------------------------------------------------------------------------ what is counted and divided


def test_09_micro_batches_with_a_common_normalizer_add_up_to_the_whole_batch() -> None:
    """Liger #802: a mean of means weighs a token by how many others its micro-batch, or its rank, happened to have."""
    x, target = sample(12, 9)
    target[[0, 1, 2, 3, 5]] = -100
    parts = list(zip(x.split([4, 2, 6]), target.split([4, 2, 6]), strict=True))
    whole, total = ours(x, target), (target != -100).sum()

    def accumulated(loss_of_part: Any) -> None:
        torch.testing.assert_close(sum(loss_of_part(*part) for part in parts), whole)
        torch.testing.assert_close(
            torch.cat([gradient(loss_of_part, *part) for part in parts]), gradient(ours, x, target)
        )

    tells_apart(
        accumulated,
        lambda x, target: ours(x, target, normalizer=total, all_ignored="zero"),
        lambda x, target: ours(x, target, all_ignored="zero") / len(parts),
    )


def test_13_a_batch_without_weight_is_nan_or_zero_as_asked() -> None:
    """PyTorch gives NaN for no token and for a weight of 0; torchtune #2341 and others want 0, and gradients of 0."""
    x, target = torch.randn(4, 9), torch.arange(4)
    none = torch.full((4,), -100)
    cases: list[tuple[Tensor, Tensor, Tensor | None]] = [(x, none, None), (x, target, torch.zeros(9))]
    cases.append((x[:0], target[:0], None))

    def is_zero(function: Any) -> None:
        for x, target, weight in cases:
            assert function(x, target, weight=weight) == 0
            assert not gradient(lambda x: function(x, target, weight=weight), x).any()  # noqa: B023

    def is_nan(function: Any) -> None:
        for x, target, weight in cases:
            assert function(x, target, weight=weight).isnan()

    def at_least_one(x: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return F.cross_entropy(x, target, weight, reduction="sum") / (target != -100).sum().clamp(min=1)

    tells_apart(is_zero, lambda x, target, weight: ours(x, target, weight=weight, all_ignored="zero"), F.cross_entropy)
    tells_apart(is_nan, ours, at_least_one)


@pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("bad", [-1, -9, 9, 2**40])
def test_14_a_target_out_of_range_is_never_a_number(bad: int) -> None:
    """Liger #588: a label of -1 that is not ignore_index read the logit before the row.

    A CPU raises IndexError. Where no value can be looked at (a GPU, compiled code), the loss is NaN, the gradient 0,
    and the token is counted.
    """
    x, target = sample(4, 9)
    target[2] = bad
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        ours(x, target)

    def wraps_around(x: Tensor, target: Tensor) -> Tensor:
        return torch.logsumexp(x, 1) - x.gather(1, target[:, None] % x.shape[1])[:, 0]

    def check(function: Any) -> None:
        losses = function(x, target)
        assert losses.isnan().tolist() == [False, False, True, False]
        assert not gradient(lambda x: function(x, target).sum(), x)[2].any()

    sketch = xt.LossSketch()
    compiled = torch.compile(
        lambda x, target: xt.cross_entropy(x, target, reduction="none", sketch=sketch).loss, backend="aot_eager"
    )
    tells_apart(check, compiled, wraps_around)
    assert sketch.out_of_range_count() == 2  # once with and once without a gradient
    assert sketch.count() == 6


def test_19_shards_of_the_vocabulary_smooth_over_the_whole_of_it() -> None:
    """What exists of the class today: lse of uneven shards combines to that of the row, and V is that of the whole.

    The operator for tensor parallelism itself is not built.
    """
    x, target, eps = *sample(6, 50), 0.1
    whole = ours(x, target, label_smoothing=eps, reduction="none")
    shards = x.split([17, 17, 16], 1)

    def combined(divisors: list[int]) -> Tensor:
        lse = torch.stack([xt.cross_entropy(shard, target * 0).lse for shard in shards]).logsumexp(0)
        smooth = sum((lse[:, None] - s).sum(1) / v for s, v in zip(shards, divisors, strict=True))
        return (1 - eps) * (lse - x.gather(1, target[:, None])[:, 0]) + eps * smooth

    tells_apart(lambda v: torch.testing.assert_close(combined(v), whole), [50] * 3, [s.shape[1] for s in shards])


def test_23_padding_columns_of_the_vocabulary_count_nowhere() -> None:
    """Liger's HAS_PADDING: a slice logits[:, :V] is read at the row stride of the padded matrix, without a copy."""
    padded, target = sample(5, 64)
    target %= 50
    padded[:, 50:] = 100.0
    exact = F.cross_entropy(padded[:, :50].contiguous(), target, label_smoothing=0.1)

    def check(view: Any) -> None:
        out = xt.cross_entropy(view(padded), target, label_smoothing=0.1)
        torch.testing.assert_close(out.loss, exact)
        assert torch.equal(out.predicted, padded[:, :50].argmax(1))
        assert not gradient(lambda p: ours(view(p), target), padded)[:, 50:].any()

    tells_apart(check, lambda p: p[:, :50], lambda p: p)
