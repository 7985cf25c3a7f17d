"""Distillation losses in a training loop: what counts, autograd, compile, sketches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from oracle import loss_and_gradient
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import xentile as xt

ROWS, SIZE = 10, 60
LOSSES = ("truncated", "teacher_renormalized", "renormalized", "tail_bucket", "sampled", "dense")


class Batch:
    """Student logits, targets, and a loss of them by its name."""

    def __init__(self, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> None:
        self.student = torch.randn(rows, SIZE, dtype=dtype)
        self.teacher_logits = torch.randn(rows, SIZE, dtype=dtype) * 2
        self.target = torch.randint(0, SIZE, (rows,))
        self.teacher = xt.teacher_topk(self.teacher_logits, 5)

    def call(self, student: Tensor, kind: str, **options: Any) -> xt.DistillationOutput:
        if kind == "dense":
            return xt.distillation_loss(student, self.teacher_logits, self.target, **options)
        t = self.teacher
        options |= {"support": kind, "teacher_tail_logprob": t.tail_logprob[:, 0]}
        return xt.topk_distillation_loss(student, t.ids, t.logprobs, self.target, **options)

    def gradient(self, kind: str, **options: Any) -> tuple[Tensor, Tensor]:
        return loss_and_gradient(lambda x: self.call(x, kind, **options).loss, self.student, self.student.dtype)


MIX: dict[str, Any] = {"kd_weight": 0.6, "ce_weight": 0.4}


@pytest.mark.parametrize("kind", LOSSES)
def test_an_ignored_token_is_left_out_of_everything(kind: str) -> None:
    batch = Batch()
    batch.target[::3] = -100
    batch.student[0] = torch.nan  # and is not even read
    keep = batch.target != -100
    sketch, kd_sketch = xt.LossSketch(), xt.LossSketch()
    loss, gradient = batch.gradient(kind, **MIX, sketch=sketch, kd_sketch=kd_sketch)
    out = batch.call(batch.student, kind, **MIX, reduction="none")
    torch.testing.assert_close(loss, out.loss[keep].mean())
    assert not gradient[~keep].any()
    assert not out.kd_loss[~keep].any()
    for s in (sketch, kd_sketch):
        assert (int(s.count()), int(s.ignored_count())) == (int(keep.sum()), int((~keep).sum()))


@pytest.mark.parametrize("kind", LOSSES)
def test_both_sketches_count_what_is_returned(kind: str) -> None:
    batch = Batch()
    batch.target[1] = -100
    groups = torch.randint(0, 2, (ROWS,))
    fused = [xt.LossSketch(groups=2) for _ in range(2)]
    out = batch.call(batch.student, kind, sketch=fused[0], kd_sketch=fused[1], group_ids=groups)
    for sketch, values in zip(fused, (out.token_loss, out.kd_loss), strict=True):
        alone = xt.LossSketch(groups=2)
        assert values is not None
        alone.update(values, out.counted, group_ids=groups)
        assert torch.equal(sketch.count(), alone.count())
        q = [0.0, 0.3, 0.5, 1.0]
        torch.testing.assert_close(sketch.quantile(q), alone.quantile(q), rtol=0, atol=0)
    assert int(fused[0].ignored_count().sum()) == 1
    torch.testing.assert_close(out.quantile(0.5), out.sketch().quantile(0.5))
    torch.testing.assert_close(out.kd_quantile(0.5), out.kd_sketch().quantile(0.5))
    assert "divergence" in out.summary()


@pytest.mark.parametrize("kind", LOSSES)
def test_token_losses_are_those_of_cross_entropy(kind: str) -> None:
    batch = Batch()
    out = batch.call(batch.student, kind, temperature=1.0)
    torch.testing.assert_close(
        out.token_loss, xt.cross_entropy(batch.student, batch.target).token_loss, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kind", LOSSES)
def test_reductions_weights_and_normalizers(kind: str) -> None:
    batch = Batch()
    weight = torch.rand(ROWS)
    rows = batch.call(batch.student, kind, **MIX, reduction="none").loss
    weighted = batch.call(batch.student, kind, **MIX, token_weight=weight).loss
    torch.testing.assert_close(weighted, (rows * weight).sum() / weight.sum())
    torch.testing.assert_close(batch.call(batch.student, kind, **MIX, reduction="sum").loss, rows.sum())
    divided = batch.call(batch.student, kind, **MIX, normalizer=torch.tensor(40.0)).loss
    torch.testing.assert_close(divided, rows.sum() / 40)


@pytest.mark.parametrize("kind", LOSSES)
def test_an_empty_mean_is_nan_or_zero_on_request(kind: str) -> None:
    batch = Batch()
    batch.target[:] = -100
    loss, _ = batch.gradient(kind)
    assert loss.isnan()
    loss, gradient = batch.gradient(kind, all_ignored="zero")
    assert float(loss) == 0.0
    assert not gradient.any()
    assert Batch(0).call(torch.zeros(0, SIZE), kind).loss.isnan()


@pytest.mark.parametrize("kind", LOSSES)
def test_leading_dimensions_are_kept(kind: str) -> None:
    batch = Batch()
    flat = batch.call(batch.student, kind, reduction="none")
    shape = (2, 5)
    batch.target, batch.teacher_logits = batch.target.reshape(shape), batch.teacher_logits.reshape(2, 5, SIZE)
    batch.teacher = xt.teacher_topk(batch.teacher_logits, 5)
    student = batch.student.reshape(2, 5, SIZE)
    t = batch.teacher
    if kind == "dense":
        out = batch.call(student, kind, reduction="none")
    else:
        known: dict[str, Any] = {"support": kind, "teacher_tail_logprob": t.tail_logprob[..., 0]}
        out = xt.topk_distillation_loss(student, t.ids, t.logprobs, batch.target, **known, reduction="none")
    assert out.loss.shape == out.kd_loss.shape == shape
    assert torch.equal(out.loss.flatten(), flat.loss)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_second_backward_gives_the_same_gradient(kind: str) -> None:
    batch = Batch()
    x = batch.student.requires_grad_()
    loss = batch.call(x, kind, **MIX).loss
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (scaled,) = torch.autograd.grad(loss, x, torch.tensor(3.0))
    torch.testing.assert_close(scaled, 3 * first)


@pytest.mark.parametrize("kind", LOSSES)
def test_an_expanded_upstream_gradient_is_right(kind: str) -> None:
    """The gradient of a sum has stride 0."""
    batch = Batch()
    x = batch.student.requires_grad_()
    (gradient,) = torch.autograd.grad(batch.call(x, kind, reduction="none").loss.sum(), x)
    torch.testing.assert_close(gradient, batch.gradient(kind, reduction="sum")[1])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "tv"])
@pytest.mark.parametrize("kind", LOSSES)
def test_gradients_pass_gradcheck_twice(kind: str, divergence: str) -> None:
    if kind == "sampled" and divergence != "forward_kl":
        divergence = "forward_kl"
    batch = Batch(3, torch.float64)
    batch.target[0] = -100

    def function(x: Tensor) -> Tensor:
        return batch.call(x, kind, divergence=divergence, temperature=1.0, **MIX).loss

    x = batch.student.requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_gradient_penalty_has_its_effect(kind: str) -> None:
    """create_graph=True on float32, where the first gradient comes from the kernels."""
    batch, penalties = Batch(), []
    for dtype in (torch.float32, torch.float64):
        x = batch.student.detach().to(dtype).requires_grad_()
        (g,) = torch.autograd.grad(batch.call(x, kind, **MIX).loss, x, create_graph=True)
        penalties.append(torch.autograd.grad(g.square().sum(), x)[0])
    torch.testing.assert_close(penalties[0].double(), penalties[1], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", LOSSES)
def test_inplace_writes_the_gradient_over_the_logits(kind: str, reduction: str) -> None:
    batch = Batch()
    expected = batch.gradient(kind, **MIX, reduction=reduction)[1]
    x = batch.student.clone().requires_grad_()
    logits = x * 1.0
    loss = batch.call(logits, kind, **MIX, reduction=reduction, inplace=True).loss
    loss.sum().backward()
    assert torch.equal(x.grad, expected)
    assert torch.equal(logits.detach(), expected)
    with pytest.raises(RuntimeError):
        loss.sum().backward()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_logits_are_not_written_to(kind: str) -> None:
    batch = Batch()
    before = batch.student.clone()
    batch.gradient(kind, **MIX)
    assert torch.equal(batch.student, before)


def test_recomputation_is_not_counted() -> None:
    batch, sketch, kd_sketch = Batch(), xt.LossSketch(), xt.LossSketch()
    x = batch.student.requires_grad_()
    function: Any = lambda x: batch.call(x, "truncated", sketch=sketch, kd_sketch=kd_sketch).loss  # noqa: E731
    checkpoint(function, x, use_reentrant=False).backward()
    assert int(sketch.count()) == int(kd_sketch.count()) == ROWS


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", LOSSES)
def test_compiled_equals_eager_without_graph_breaks(kind: str) -> None:
    torch._dynamo.reset()
    batch, sketches = Batch(), [xt.LossSketch() for _ in range(2)]
    eager = batch.gradient(kind, **MIX, kd_sketch=sketches[0])
    function = torch.compile(lambda x: batch.call(x, kind, **MIX, kd_sketch=sketches[1]).loss, fullgraph=True)
    actual = loss_and_gradient(function, batch.student, torch.float32)
    torch.testing.assert_close(actual, eager, rtol=0, atol=0)
    assert sketches[0] == sketches[1]


@pytest.mark.parametrize("kind", LOSSES)
def test_torch_func_transforms_agree_with_backward(kind: str) -> None:
    batch = Batch()
    expected = batch.gradient(kind, **MIX)[1]
    actual = torch.func.grad(lambda x: batch.call(x, kind, **MIX).loss)(batch.student)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_same_bits_for_any_number_of_threads(kind: str) -> None:
    batch, results = Batch(400), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(batch.gradient(kind, **MIX))
    torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", LOSSES)
def test_broken_logits_are_seen(kind: str) -> None:
    for value in (torch.nan, torch.inf):
        batch = Batch()
        batch.student[4, 50] = value
        out = batch.call(batch.student, kind, reduction="none", ce_weight=1.0)
        assert out.loss[4].isnan()
        assert out.kd_loss[4].isnan()
        assert int(out.loss.isnan().sum()) == 1
