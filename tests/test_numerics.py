"""The promises about digits, against float64: small losses, huge and tiny logits, infinities, NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_within_budget, loss_and_gradient, token_losses
from torch import Tensor

import xentile as xt


def confident(rows: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Rows whose target leads by 0 to 30 nats: losses from 20 down to 1e-9, as a fine-tuned model has them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, size, generator=generator)
    target = torch.randint(0, size, (rows,), generator=generator)
    logits[torch.arange(rows), target] += torch.linspace(0, 35, rows)
    return logits.to(dtype), target


@pytest.mark.parametrize("size", [100, 32000])
def test_small_losses_keep_their_digits(size: int, device: torch.device) -> None:
    logits, target = (t.to(device) for t in confident(400, size))
    exact = token_losses(logits, target)
    relative = (xt.cross_entropy(logits, target).token_loss.double() - exact).abs() / exact
    assert float(exact.min()) < 1e-9
    assert float(relative[exact > 1e-7].max()) < 1e-6
    assert float(relative.max()) < 1e-5  # and below 1e-7 as well


def test_lse_minus_logit_would_lose_them() -> None:
    """The formula that every other fused kernel uses, held to the same check, fails it."""
    logits, target = confident(400, 32000)
    exact = token_losses(logits, target)
    usual = torch.logsumexp(logits, 1) - logits.gather(1, target[:, None])[:, 0]
    small = (exact > 1e-7) & (exact < 1e-4)
    assert float(((usual.double() - exact).abs() / exact)[small].max()) > 0.1
    assert bool((usual[small] <= 0).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_never_negative_and_zero_only_where_the_truth_is(dtype: torch.dtype, device: torch.device) -> None:
    logits, target = (t.to(device) for t in confident(500, 3000, dtype))
    loss = xt.cross_entropy(logits, target).token_loss
    assert bool((loss > 0).all())
    lone = torch.full((1, 3000), -torch.inf, dtype=dtype, device=device)
    lone[0, 7] = 1.0
    assert xt.cross_entropy(lone, torch.tensor([7], device=device)).token_loss == 0


@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_huge_and_tiny_logits(scale: float, device: torch.device) -> None:
    logits = (torch.randn(20, 3000, generator=torch.Generator().manual_seed(0)) * scale).to(device)
    target = torch.arange(20, device=device)
    function = lambda x: F.cross_entropy(x, target, reduction="sum")  # noqa: E731
    exact = loss_and_gradient(function, logits, torch.float64)
    eager = loss_and_gradient(function, logits, torch.float32)
    ours = loss_and_gradient(lambda x: xt.cross_entropy(x, target, reduction="sum").loss, logits, torch.float32)
    for a, e, plain in zip(ours, exact, eager, strict=True):
        assert_within_budget(a, e, plain)


def test_half_precision_logits_near_the_largest(device: torch.device) -> None:
    logits = torch.full((2, 1000), -65504.0, dtype=torch.float16, device=device)
    logits[:, 3] = 65504.0
    target = torch.tensor([3, 4], device=device)
    out = xt.cross_entropy(logits.requires_grad_(), target, reduction="sum")
    assert out.token_loss.tolist() == [0.0, 131008.0]
    out.loss.backward()
    assert logits.grad is not None
    assert logits.grad[1, 3:5].tolist() == [1.0, -1.0]
    assert int(logits.grad.count_nonzero()) == 2


@pytest.mark.parametrize("size", [5, 4096, 10_000])
@pytest.mark.parametrize("where", ["start", "end"])
def test_all_but_a_few_entries_minus_infinity(size: int, where: str, device: torch.device) -> None:
    logits = torch.full((3, size), -torch.inf, device=device)
    live = slice(0, 3) if where == "start" else slice(size - 3, size)
    logits[:, live] = torch.tensor([[1.0, 2.0, 3.0]], device=device)
    target = torch.tensor([live.start, live.start + 1, (live.start + 3) % size], device=device)  # the last at -inf
    gradient = loss_and_gradient(lambda x: xt.cross_entropy(x, target, reduction="sum").loss, logits, torch.float32)[1]
    out = xt.cross_entropy(logits, target)
    torch.testing.assert_close(out.token_loss, F.cross_entropy(logits, target, reduction="none"), rtol=1e-6, atol=0)
    assert out.token_loss[2] == torch.inf
    outside = torch.ones(size, dtype=torch.bool, device=device)
    outside[live] = False
    assert bool((gradient[:2, outside] == 0).all())


def test_nan_and_infinity_are_seen_and_counted_not_hidden(device: torch.device) -> None:
    logits = torch.randn(5, 3000, device=device)
    logits[0, 2999], logits[1, 0], logits[2] = torch.nan, torch.inf, -torch.inf
    target = torch.tensor([1, 1, 1, 1, -100], device=device)
    logits[4] = torch.nan  # ignored
    sketch = xt.LossSketch(device)
    out = xt.cross_entropy(logits, target, sketch=sketch)
    assert out.token_loss.isnan().tolist() == [True, True, True, False, False]
    assert out.loss.isnan()
    assert sketch.nan_count() == 3
    assert sketch.count() == 1
    assert sketch.ignored_count() == 1


def test_gradient_of_a_row_with_nan_is_nan_and_other_rows_are_clean(device: torch.device) -> None:
    logits = torch.randn(3, 500, device=device)
    logits[1, 3] = torch.nan
    target = torch.tensor([1, 2, 3], device=device)
    gradient = loss_and_gradient(lambda x: xt.cross_entropy(x, target, reduction="none").loss, logits, torch.float32)[1]
    assert bool(gradient[1].isnan().all())
    assert bool(gradient[[0, 2]].isfinite().all())


def test_softcap_is_exact_near_zero_and_bounded_far_away(device: torch.device) -> None:
    logits = torch.cat([torch.randn(4, 500) * 1e-3, torch.randn(4, 500) * 1e4]).to(device)
    target = torch.arange(8, device=device)
    exact = F.cross_entropy(30 * torch.tanh(logits.double() / 30), target, reduction="none")
    eager = F.cross_entropy(30 * torch.tanh(logits / 30), target, reduction="none")
    out = xt.cross_entropy(logits, target, softcap=30.0)
    assert_within_budget(out.token_loss, exact, eager)
    assert float(out.lse.abs().max()) <= 30 + torch.log(torch.tensor(500.0)).item()
