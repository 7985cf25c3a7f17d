"""Loss, gradient and statistics of `cross_entropy` against float64, over options, dtypes and shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_within_budget, loss_and_gradient, sample, token_losses
from torch import Tensor

import xentile as xt
from xentile import _layout as layout
from xentile import reference

# Tails of every vector width and both sides of a block; GPT-2's odd vocabulary; one column.
SIZES = (1, 2, 3, 7, 8, 9, 31, 1000, 1023, 1024, 1025, 4095, 4097, 50257)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "full smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.3},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 30.0, "logit_scale": 1.7},
}


def reference_loss(target: Tensor, **options: Any) -> Any:
    """The specification in the dtype of its input: in float64 the oracle, in a low dtype cast up first like plain
    PyTorch."""
    options = {**options, "softcap": options.get("softcap", 0.0)}
    return lambda x: reference.cross_entropy(x, target, options.get("weight"), **_without(options, "weight")).loss


def plain_pytorch(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    """What a user would write in the dtype of the logits."""
    z = x * options.get("logit_scale", 1.0)
    if options.get("softcap"):
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    loss = F.cross_entropy(z, target, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    return (loss + options.get("z_loss", 0.0) * torch.logsumexp(z, 1) ** 2 * (target != -100)).sum()


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k not in names}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradient_match_float64(size: int, dtype: torch.dtype, device: torch.device) -> None:
    logits, target = (t.to(device) for t in sample(5, size, dtype, ignored=0.2, seed=size))
    exact = loss_and_gradient(reference_loss(target, reduction="sum"), logits, torch.float64)
    eager = loss_and_gradient(lambda x: plain_pytorch(x, target), logits, dtype)
    actual = loss_and_gradient(lambda x: xt.cross_entropy(x, target, reduction="sum").loss, logits, dtype)
    for what, a, e, plain in zip(("loss", "gradient"), actual, exact, eager, strict=True):
        assert_within_budget(a, e, plain, what=what)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 257, 5000])
def test_every_option_matches_float64(name: str, dtype: torch.dtype, size: int, device: torch.device) -> None:
    logits, target = (t.to(device) for t in sample(6, size, dtype, ignored=0.2, seed=1))
    exact = loss_and_gradient(reference_loss(target, reduction="sum", **OPTIONS[name]), logits, torch.float64)
    eager = loss_and_gradient(lambda x: plain_pytorch(x, target, **OPTIONS[name]), logits, dtype)
    ours = lambda x: xt.cross_entropy(x, target, reduction="sum", **OPTIONS[name]).loss  # noqa: E731
    for what, a, e, plain in zip(
        ("loss", "gradient"), loss_and_gradient(ours, logits, dtype), exact, eager, strict=True
    ):
        assert_within_budget(a, e, plain, what=what)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", ["class", "token", "both"])
def test_weights_match_the_specification(reduction: str, weighted: str, device: torch.device) -> None:
    logits, target = (t.to(device) for t in sample(9, 300, torch.float64, ignored=0.2))
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
    weight = torch.rand(300, device=device).double() if weighted != "token" else None
    options["token_weight"] = torch.rand(9, device=device).double() if weighted != "class" else None
    exact = loss_and_gradient(reference_loss(target, weight=weight, **options), logits, torch.float64)
    actual = loss_and_gradient(lambda x: xt.cross_entropy(x, target, weight, **options).loss, logits, torch.float32)
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=2e-6)


def test_normalizer_replaces_what_the_mean_divides_by() -> None:
    logits, target = sample(8, 50, ignored=0.3)
    total = xt.cross_entropy(logits, target, reduction="sum").loss
    for normalizer in (13, 13.0, torch.tensor(13), torch.tensor(13.0)):
        torch.testing.assert_close(xt.cross_entropy(logits, target, normalizer=normalizer).loss, total / 13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_match_the_specification(dtype: torch.dtype, device: torch.device) -> None:
    logits, target = (t.to(device) for t in sample(40, 700, dtype, ignored=0.2))
    logits[:, 350:] = logits[:, :350]  # every maximum is tied
    out = xt.cross_entropy(logits, target, stats=("entropy", "target_rank"))
    expected = reference.cross_entropy(logits.double(), target)
    for name in ("token_loss", "lse", "entropy"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(expected, name), rtol=1e-6, atol=1e-6)
    for name in ("predicted", "correct", "target_rank"):
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    assert torch.equal(out.correct, (out.target_rank == 0) & (target != -100))  # type: ignore[operator]


@pytest.mark.parametrize("size", [1, 1000])
def test_empty_batch(size: int) -> None:
    logits, target = torch.empty(0, size, requires_grad=True), torch.empty(0, dtype=torch.int64)
    assert xt.cross_entropy(logits, target).loss.isnan()
    assert xt.cross_entropy(logits, target, all_ignored="zero").loss == 0
    assert xt.cross_entropy(logits, target, reduction="sum").loss == 0
    assert xt.cross_entropy(logits, target, reduction="none").loss.shape == (0,)
    xt.cross_entropy(logits, target).loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, size)


@given(
    rows=st.integers(1, 5),
    size=st.integers(1, 2100),
    shift=st.floats(-100, 100, width=16),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_shifting_a_row_changes_nothing_and_gradients_sum_to_zero(
    rows: int, size: int, shift: float, scale: float, seed: int
) -> None:
    logits, target = sample(rows, size, torch.float64, scale=scale, seed=seed)
    loss, gradient = loss_and_gradient(lambda x: xt.cross_entropy(x, target).loss, logits, torch.float64)
    shifted, _ = loss_and_gradient(lambda x: xt.cross_entropy(x, target).loss, logits + shift, torch.float64)
    torch.testing.assert_close(loss, shifted, rtol=1e-10, atol=1e-11)
    assert float(gradient.sum(1).abs().max()) < 1e-14


@given(rows=st.integers(1, 6), size=st.integers(2, 600), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_permuting_classes_permutes_the_gradient(rows: int, size: int, seed: int) -> None:
    logits, target = sample(rows, size, seed=seed)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    position = torch.empty_like(order).scatter_(0, order, torch.arange(size))
    loss, gradient = loss_and_gradient(lambda x: xt.cross_entropy(x, target).loss, logits, torch.float32)
    other, permuted = loss_and_gradient(
        lambda x: xt.cross_entropy(x, position[target]).loss, logits[:, order], torch.float32
    )
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient[:, order], permuted, rtol=1e-5, atol=1e-8)


def test_a_row_does_not_depend_on_its_batch(device: torch.device) -> None:
    logits, target = (t.to(device) for t in sample(64, 3000))
    whole = xt.cross_entropy(logits, target).token_loss
    alone = torch.stack([xt.cross_entropy(logits[i : i + 1], target[i : i + 1]).token_loss[0] for i in range(64)])
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 3.0}])
def test_percentiles_are_of_the_plain_loss(options: dict[str, Any]) -> None:
    logits, target = sample(200, 100, ignored=0.3)
    sketch = xt.LossSketch()
    out = xt.cross_entropy(logits, target, sketch=sketch, token_weight=torch.rand(200), **options)
    plain = token_losses(
        reference.transform(logits.double(), softcap=options.get("softcap", 0.0)), target.clamp(min=0)
    )[target != -100]
    expected = torch.quantile(plain, torch.tensor([0.1, 0.5, 0.9]).double())
    for quantiles in (out.quantile([0.1, 0.5, 0.9]), sketch.quantile([0.1, 0.5, 0.9])):
        torch.testing.assert_close(quantiles.double(), expected, rtol=2.0**-7, atol=0)
    assert sketch.ignored_count() == (target == -100).sum()
    assert sketch.count() == (target != -100).sum()


def test_fused_sketch_equals_updating_from_the_token_losses(device: torch.device) -> None:
    logits, target = (t.to(device) for t in sample(500, 200, ignored=0.3))
    ids = torch.randint(0, 3, (500,)).to(device)
    fused, later = xt.LossSketch(device, groups=3), xt.LossSketch(device, groups=3)
    out = xt.cross_entropy(logits, target, sketch=fused, group_ids=ids)
    later.update(out.token_loss, target != -100, group_ids=ids)
    fused.state[:, layout.IGNORED] = 0
    assert fused == later


def test_repeated_runs_are_bitwise_equal(device: torch.device) -> None:
    logits, target = (t.to(device) for t in sample(300, 1000, ignored=0.1))
    run = lambda x: xt.cross_entropy(x, target, label_smoothing=0.1).loss  # noqa: E731
    first = loss_and_gradient(run, logits, torch.float32)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, loss_and_gradient(run, logits, torch.float32), strict=True))


def test_thread_count_does_not_change_a_bit() -> None:
    logits, target = sample(300, 1000, ignored=0.1)
    run = lambda x: xt.cross_entropy(x, target).loss  # noqa: E731
    first = loss_and_gradient(run, logits, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        second = loss_and_gradient(run, logits, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_summary_is_one_readable_block() -> None:
    logits, target = sample(100, 50, ignored=0.1)
    text = xt.cross_entropy(logits, target, stats=("entropy", "target_rank")).summary()
    for part in ("tokens", "mean", "p50", "p99", "max", "top-1 accuracy", "entropy", "median target rank", "ignored"):
        assert part in text
