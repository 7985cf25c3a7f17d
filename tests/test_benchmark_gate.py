"""The gate of the benchmark suite: no number without it, and what it lets through is the function that is meant."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import expressions
from benchmarks.cases import CROSS_ENTROPY, DISTILLATION, DTYPES, Case, select
from benchmarks.errors import Errors
from benchmarks.gate import check
from benchmarks.inputs import make_inputs
from benchmarks.measure import Plan, measure
from benchmarks.provider import Provider
from benchmarks.providers import build, named

if TYPE_CHECKING:
    from benchmarks.step import Loss

SMALL = Case("resnet50", 64, "float32", "training", ("headline",))
PLAN = Plan(seconds=0.01, min_rounds=3, max_rounds=3, pair_min_rounds=3)
DISTILLATIONS = [case for case in select("ci") if case.operation in DISTILLATION]
KL = Case("resnet50", 16, "float32", "distillation")
TOPK = Case("resnet50", 16, "float32", "topk_distillation", k=5, support="truncated")
TEACHER = Case("resnet50", 16, "float32", "teacher_topk", k=5)


def planted(loss: Loss, *, ours: bool = True) -> Provider:
    return Provider("planted", lambda case, device: loss, ours=ours)


def verdict(loss: Loss, dtype: str = "float32", operation: str = "training", *, ours: bool = True) -> bool:
    case = Case("resnet50", 64, dtype, operation)
    provider = planted(loss, ours=ours)
    return check(case, [(provider, loss)], make_inputs(case, 0, "cpu", ignored=0.1))["planted"].passed


class _Spoiled(torch.autograd.Function):
    """The right loss, with a gradient that `spoil` has changed."""

    @staticmethod
    def forward(ctx, logits, target, spoil):
        ctx.save_for_backward(logits, target)
        ctx.spoil = spoil
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx, dloss):
        logits, target = ctx.saved_tensors
        gradient = torch.softmax(logits, 1)
        gradient[torch.arange(len(target)), target.clamp_min(0)] -= 1
        gradient *= ((target != -100) / (target != -100).sum())[:, None]
        ctx.spoil(gradient)
        return gradient * dloss, None, None


def spoiled(spoil) -> Loss:
    return lambda logits, target: _Spoiled.apply(logits, target, spoil)


def test_the_gate_passes_eager_itself() -> None:
    assert all(verdict(F.cross_entropy, dtype, op) for dtype in DTYPES for op in CROSS_ENTROPY)


def test_the_gate_passes_a_gradient_that_was_not_spoiled() -> None:
    assert verdict(spoiled(lambda gradient: None))


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "peer"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, t: F.cross_entropy(x, t) * 1.001,
        lambda x, t: F.cross_entropy(x, t, reduction="sum") / len(t),
        lambda x, t: F.cross_entropy(x, t) * float("nan"),
        spoiled(lambda gradient: gradient[:, -1].zero_()),
        spoiled(lambda gradient: gradient[5].neg_()),
        spoiled(lambda gradient: gradient[7, 13].fill_(float("nan"))),
    ],
    ids=["scaled", "ignored tokens counted", "nan", "column not written", "row of wrong sign", "nan element"],
)
def test_the_gate_refuses_another_function(loss: Loss, ours: bool) -> None:
    assert not verdict(loss, ours=ours)


def test_the_gate_holds_us_to_the_contract_and_a_peer_to_the_same_function() -> None:
    def slightly_off(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.double(), target) * (1 + 4e-7)

    assert not verdict(slightly_off, operation="forward", ours=True)
    assert verdict(slightly_off, operation="forward", ours=False)


def test_a_provider_that_raises_is_refused_with_its_message() -> None:
    def broken(logits: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nsecond line")

    (row,) = measure(SMALL, [planted(broken)], "cpu", PLAN)
    assert (row["status"], row["reason"]) == ("refused", "RuntimeError: no kernel")


def test_a_refused_provider_gets_no_time() -> None:
    (row,) = measure(SMALL, [planted(lambda x, t: F.cross_entropy(x, t) * 2)], "cpu", PLAN)
    assert row["status"] == "refused"
    assert "seconds" not in row


# Distillation


def refused(case: Case, loss: Loss) -> bool:
    provider = Provider("planted", lambda case, device: loss, ours=True)
    return not check(case, [(provider, loss)], make_inputs(case, 0, "cpu"))["planted"].passed


@pytest.mark.parametrize("case", DISTILLATIONS, ids=lambda case: case.name)
def test_the_gate_passes_xentile_plain_pytorch_and_the_yardstick(case: Case) -> None:
    pytest.importorskip("xentile")
    ready, _ = build([p for p in named([]) if p.name != "torch.compile"], case, "cpu")
    verdicts = check(case, ready, make_inputs(case, 0, "cpu", ignored=0.1))
    assert {"xentile", "torch.eager"} <= verdicts.keys()
    assert [(name, verdict.reason) for name, verdict in verdicts.items() if not verdict.passed] == []


class _LastColumnNotWritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_fill(1, torch.tensor([gradient.shape[1] - 1]), 0.0)


@pytest.mark.parametrize("case", [c for c in DISTILLATIONS if c.operation != "teacher_topk"], ids=lambda c: c.name)
def test_the_gate_refuses_a_distillation_that_leaves_a_column_out(case: Case) -> None:
    exact = expressions.plain(case)
    assert refused(case, lambda logits, *others: exact(_LastColumnNotWritten.apply(logits), *others))


def test_the_gate_refuses_another_divergence() -> None:
    def reverse(logits: Tensor, teacher_logits: Tensor) -> Tensor:
        log_q, log_p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    assert refused(KL, reverse)
    assert not refused(KL, expressions.plain(KL))


def test_the_gate_refuses_another_support() -> None:
    bucket = replace(TOPK, support="tail_bucket")
    assert refused(TOPK, expressions.plain(bucket))
    assert not refused(TOPK, expressions.plain(TOPK))


def test_the_gate_refuses_another_temperature_with_the_cross_entropy_beside_it() -> None:
    mixed = replace(TOPK, temperature=2.0, ce_weight=0.5)
    assert refused(mixed, expressions.plain(replace(mixed, temperature=2.1)))
    assert refused(mixed, expressions.plain(replace(mixed, ce_weight=0.51)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda logprobs, ids: (logprobs + 1e-4, ids),
        lambda logprobs, ids: (logprobs, ids.roll(1, 1)),
        lambda logprobs, ids: (logprobs * float("nan"), ids),
    ],
    ids=["off", "ids in another order", "nan"],
)
def test_the_gate_refuses_a_wrong_top_k(spoil) -> None:
    assert refused(TEACHER, lambda logits: spoil(*expressions.topk(TEACHER, logits)))
    assert not refused(TEACHER, lambda logits: expressions.topk(TEACHER, logits))


def test_a_budget_without_bound_lets_nothing_pass() -> None:
    assert Errors().within(Errors(1.0, 1.0, 1.0))
    assert not Errors().within(Errors(1.0, float("inf"), 1.0))
