"""Every misuse of the distillation losses has a message that says what was wrong, and counts nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import xentile as xt

STUDENT, IDS, LOGPROBS = torch.randn(4, 10), torch.randint(0, 10, (4, 3)), torch.full((4, 3), -2.0)
TARGET = torch.zeros(4, dtype=torch.int64)

WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "student_logits must be a Tensor, got list", {"student_logits": [1.0]}),
    (NotImplementedError, "student_logits must be float32, .* got int64", {"student_logits": IDS}),
    (IndexError, r"student_logits must have shape \(..., V\) with V >= 1, got \(4, 0\)",
     {"student_logits": STUDENT[:, :0]}),
    (TypeError, "teacher_topk_ids must be int64 or int32, got float32", {"teacher_topk_ids": LOGPROBS}),
    (ValueError, r"teacher_topk_ids must have shape .* got \(3, 3\)", {"teacher_topk_ids": IDS[:3]}),
    (ValueError, r"K in \[1, 1024\], got \(4, 0\)", {"teacher_topk_ids": IDS[:, :0]}),
    (ValueError, r"teacher_topk_logprobs must have the shape of teacher_topk_ids, \(4, 3\), got \(4, 2\)",
     {"teacher_topk_logprobs": LOGPROBS[:, :2]}),
    (TypeError, "teacher_topk_logprobs must be a floating point tensor, got int64", {"teacher_topk_logprobs": IDS}),
    (ValueError, "teacher_topk_logprobs must not require a gradient",
     {"teacher_topk_logprobs": LOGPROBS.clone().requires_grad_()}),
    (ValueError, "hard is not a valid value for support", {"support": "hard"}),
    (ValueError, "kl is not a valid value for divergence", {"divergence": "kl"}),
    (ValueError, "beta must be None for divergence 'forward_kl', got 0.5", {"beta": 0.5}),
    (ValueError, "beta must be between 0 and 1, both excluded, got 1.0", {"divergence": "jsd", "beta": 1.0}),
    (ValueError, "temperature must be finite and greater than 0, got 0", {"temperature": 0}),
    (ValueError, "temperature must be finite and greater than 0, got -1.0 at flat position 2",
     {"temperature": torch.tensor([1.0, 1.0, -1.0, 1.0]), "support": "renormalized"}),
    (ValueError, r"temperature must have one entry a token, \(4,\)", {"temperature": torch.ones(3)}),
    (ValueError, "teacher_log_z must be given for support 'truncated' at a temperature other", {"temperature": 2.0}),
    (ValueError, "exact is not a valid value for temperature_fallback", {"temperature_fallback": "exact"}),
    (ValueError, "last is not a valid value for duplicate_ids", {"duplicate_ids": "last"}),
    (ValueError, r"teacher_log_z must have one entry a token, \(4,\), or be 0-d", {"teacher_log_z": torch.ones(4, 1)}),
    (ValueError, "kd_weight must be finite and at least 0, got -1", {"kd_weight": -1}),
    (ValueError, "ce_weight must be 0 without a target, got 0.5", {"ce_weight": 0.5}),
    (ValueError, r"target must have the shape of student_logits without V, \(4,\), got \(3,\)", {"target": TARGET[:3]}),
    (RuntimeError, "expected target dtype to be Long, Int or Byte, but got float32", {"target": TARGET.float()}),
    (IndexError, "Target 10 is out of bounds", {"target": TARGET + 10}),
    (ValueError, "sketch counts cross-entropies: it needs a target", {"sketch": xt.LossSketch()}),
    (TypeError, "kd_sketch must be a LossSketch, got int", {"kd_sketch": 3}),
    (ValueError, "group_ids choose a row of the sketch", {"group_ids": TARGET, "kd_sketch": None}),
    (IndexError, r"group_ids must be in \[0, 1\), got 1", {"group_ids": TARGET + 1, "kd_sketch": xt.LossSketch()}),
    (ValueError, "median is not a valid value for reduction", {"reduction": "median"}),
    (ValueError, "inplace=True needs contiguous student_logits",
     {"student_logits": torch.randn(10, 4).t(), "inplace": True}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "wrong"), WRONG)
def test_misuse_is_named(error: type[Exception], message: str, wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"student_logits": STUDENT, "teacher_topk_ids": IDS, "teacher_topk_logprobs": LOGPROBS}
    counted = xt.LossSketch()
    call = {**right, "support": "truncated", "kd_sketch": counted, **wrong}
    with pytest.raises(error, match=message):
        xt.topk_distillation_loss(**call)
    assert not counted.state.any()


def test_a_dense_teacher_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"teacher_logits must have the shape of student_logits, \(4, 10\), got \(4, 9\)"
    ):
        xt.distillation_loss(STUDENT, STUDENT[:, :9])
    with pytest.raises(ValueError, match="teacher_logits must not require a gradient"):
        xt.distillation_loss(STUDENT, STUDENT.clone().requires_grad_())


def test_percentiles_of_a_cross_entropy_that_was_not_asked_for() -> None:
    out = xt.topk_distillation_loss(STUDENT, IDS, LOGPROBS, support="truncated")
    with pytest.raises(ValueError, match="pass a target"):
        out.quantile(0.5)
    assert out.token_loss is None
    assert out.counted is None


@pytest.mark.parametrize(
    ("error", "message", "wrong"),
    [
        (ValueError, r"k must be in \[1, 10\], got 11", {"k": 11}),
        (ValueError, r"k must be in \[1, 10\], got 0", {"k": 0}),
        (TypeError, "k must be int, got float", {"k": 2.0}),
        (TypeError, "temperatures must be a sequence of at least one number", {"temperatures": ()}),
        (TypeError, "temperatures must be a sequence of at least one number", {"temperatures": 1.0}),
        (ValueError, "temperatures must be finite and greater than 0, got 0", {"temperatures": (1.0, 0)}),
        (NotImplementedError, "logits must be float32, .* got int64", {"logits": IDS}),
    ],
)
def test_misuse_of_teacher_topk_is_named(error: type[Exception], message: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        xt.teacher_topk(**{"logits": STUDENT, "k": 2, **wrong})
