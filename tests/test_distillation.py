"""Distillation losses against the expressions of docs/distillation.md in float64: values, gradients, limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distillation_oracle import FORMULAS, OFFERED, REFUSED, Teacher, dense_divergence, divergence, teacher
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_within_budget, loss_and_gradient
from torch import Tensor

import xentile as xt

SUPPORTS = ("truncated", "teacher_renormalized", "renormalized", "tail_bucket")
ROWS, SIZE, K = 12, 301, 7


def problem(rows: int = ROWS, size: int = SIZE, *, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, a teacher's log-probabilities in float64, targets."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, size, generator=generator) * scale
    log_p = torch.log_softmax(torch.randn(rows, size, generator=generator, dtype=torch.float64) * scale, 1)
    return student, log_p, torch.randint(0, size, (rows,), generator=generator)


def arguments(known: Teacher, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "teacher_topk_ids": known.ids,
        "teacher_topk_logprobs": known.logprobs.to(dtype),
        "teacher_log_z": known.log_z.to(dtype),
        "teacher_tail_logprob": known.tail.to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("support", "name"), OFFERED)
def test_a_cell_of_the_table_has_the_value_and_the_gradient_of_its_formula(
    support: str, name: str, temperature: float, dtype: torch.dtype
) -> None:
    student, log_p, _ = problem()
    student = student.to(dtype)
    known = teacher(log_p, K, temperature)
    beta = None if name in ("forward_kl", "reverse_kl", "tv") else 0.3
    options: dict[str, Any] = {"support": support, "divergence": name, "beta": beta, "temperature": temperature}

    def ours(x: Tensor) -> Tensor:
        exact = arguments(known, torch.float64 if dtype == torch.float64 else torch.float32)
        out = xt.topk_distillation_loss(x, **exact, **options, reduction="none", scale_by_temperature_squared=False)
        return out.loss

    def formula(x: Tensor) -> Tensor:
        return divergence(x, known, support, name, beta or 0.5, temperature)

    actual = loss_and_gradient(ours, student, dtype)
    exact = loss_and_gradient(lambda x: formula(x.double()), student.double(), torch.float64)
    eager = loss_and_gradient(lambda x: formula(x.float() if dtype.itemsize < 4 else x), student, dtype)
    for what, *values in zip(("loss", "gradient"), actual, exact, eager, strict=True):
        assert_within_budget(*values, what=f"{what} of {support} {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_dense_teacher_gives_the_value_and_the_gradient_of_the_formula(
    name: str, temperature: float, dtype: torch.dtype
) -> None:
    student, log_p, _ = problem()
    student, log_p = student.to(dtype), log_p.to(dtype).double()
    beta = None if name in ("forward_kl", "reverse_kl", "tv") else 0.3

    def ours(x: Tensor) -> Tensor:
        options: dict[str, Any] = {"divergence": name, "beta": beta, "temperature": temperature}
        return xt.distillation_loss(
            x, log_p.to(dtype), **options, reduction="none", scale_by_temperature_squared=False
        ).loss

    def formula(x: Tensor) -> Tensor:
        return dense_divergence(x, log_p, name, beta or 0.5, temperature)

    actual = loss_and_gradient(ours, student, dtype)
    exact = loss_and_gradient(lambda x: formula(x.double()), student.double(), torch.float64)
    eager = loss_and_gradient(lambda x: formula(x.float() if dtype.itemsize < 4 else x), student, dtype)
    for what, *values in zip(("loss", "gradient"), actual, exact, eager, strict=True):
        assert_within_budget(*values, what=f"{what} of {name}")


@pytest.mark.parametrize(("support", "name"), REFUSED)
def test_an_empty_cell_of_the_table_is_refused(support: str, name: str) -> None:
    student, log_p, _ = problem(2, 10)
    with pytest.raises(ValueError, match="support 'sampled' estimates the forward KL"):
        xt.topk_distillation_loss(student, **arguments(teacher(log_p, 3, 1.0)), support=support, divergence=name)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("support", SUPPORTS)
def test_the_whole_vocabulary_as_support_equals_the_dense_teacher(support: str, name: str) -> None:
    student, log_p, _ = problem(4, 40)
    known = teacher(log_p, 40, 2.0)
    options: dict[str, Any] = {"divergence": name, "temperature": 2.0}
    sparse = loss_and_gradient(
        lambda x: xt.topk_distillation_loss(x, **arguments(known), support=support, **options).loss,
        student,
        torch.float32,
    )
    dense = loss_and_gradient(lambda x: xt.distillation_loss(x, log_p.float(), **options).loss, student, torch.float32)
    torch.testing.assert_close(sparse, dense, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("support", ["truncated", "teacher_renormalized", "tail_bucket", "sampled"])
def test_a_sure_teacher_of_one_token_is_cross_entropy(support: str) -> None:
    student, _, target = problem()
    sure = torch.zeros(ROWS, 1)
    actual = loss_and_gradient(
        lambda x: xt.topk_distillation_loss(x, target[:, None], sure, support=support).loss, student, torch.float32
    )
    expected = loss_and_gradient(lambda x: xt.cross_entropy(x, target).loss, student, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def test_the_supports_are_related_as_the_docs_say() -> None:
    student, log_p, _ = problem()
    known = teacher(log_p, K, 1.0)
    loss = {
        s: xt.topk_distillation_loss(student.double(), **arguments(known, torch.float64), support=s) for s in SUPPORTS
    }
    dense = xt.distillation_loss(student.double(), log_p).kd_loss
    a, b, c, d = (loss[s].kd_loss for s in SUPPORTS)
    p, q = known.logprobs.exp().sum(1), loss["truncated"].student_mass
    assert q is not None
    binary = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(a, p * (b + p.log()))
    torch.testing.assert_close(b, c - q.log())
    torch.testing.assert_close(d, binary + p * c)
    outside = torch.ones_like(log_p, dtype=torch.bool).scatter(1, known.ids, False)
    tails = (torch.log_softmax(x.masked_fill(~outside, -torch.inf), 1) for x in (log_p, student.double()))
    lp, lq = (torch.where(outside, t, 0.0) for t in tails)
    torch.testing.assert_close(dense, d + (1 - p) * (lp.exp() * (lp - lq) * outside).sum(1))


@pytest.mark.parametrize("support", ["tail_bucket", "renormalized"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_divergence_of_closed_classes_is_never_negative_and_zero_for_equals(support: str, name: str) -> None:
    student, _, _ = problem(64, 200, seed=3)
    near = student + 1e-6 * torch.randn(student.shape)
    t = xt.teacher_topk(near, 20)
    known = {
        "teacher_topk_ids": t.ids,
        "teacher_topk_logprobs": t.logprobs,
        "teacher_tail_logprob": t.tail_logprob[:, 0],
    }
    kd = xt.topk_distillation_loss(student, **known, support=support, divergence=name).kd_loss
    assert bool((kd >= 0).all())
    assert float(kd.max()) < (1e-5 if name == "tv" else 1e-10)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "tv"])
def test_peaked_teachers_and_saturated_students_keep_their_digits(name: str) -> None:
    """Masses outside the support of 1e-3 to 1e-25, of which 1 - sum(p) in float32 has no digit."""
    scales = torch.linspace(3, 30, 40)[:, None]
    teacher_logits, student = torch.randn(40, 100) * 0.1, torch.randn(40, 100) * 0.1
    teacher_logits[:, :3] += scales
    student[:, 1:3] += 1.5 * scales
    t = xt.teacher_topk(teacher_logits, 3)
    known = {
        "teacher_topk_ids": t.ids,
        "teacher_topk_logprobs": t.logprobs,
        "teacher_tail_logprob": t.tail_logprob[:, 0],
    }
    kd = xt.topk_distillation_loss(student, **known, support="tail_bucket", divergence=name, ce_weight=0).kd_loss
    log_p, log_q = torch.log_softmax(teacher_logits.double(), 1), torch.log_softmax(student.double(), 1)

    def bucketed(x: Tensor) -> Tensor:
        inside = x.gather(1, t.ids.long())
        rest = torch.logsumexp(x.scatter(1, t.ids.long(), -torch.inf), 1, keepdim=True)
        return torch.cat([inside, rest], 1)

    lp, lq = bucketed(log_p), bucketed(log_q)
    if name == "forward_kl":
        exact = (lp.exp() * (lp - lq)).sum(1)
    elif name == "tv":
        exact = (lp.exp() - lq.exp()).abs().sum(1) / 2
    else:
        m = torch.logaddexp(lp, lq) - torch.log(torch.tensor(2.0, dtype=torch.float64))
        exact = 0.5 * (lp.exp() * (lp - m) + lq.exp() * (lq - m)).sum(1)
    torch.testing.assert_close(kd.double(), exact, rtol=1e-6, atol=0)


def test_cross_entropy_and_distillation_mix_with_their_own_temperatures() -> None:
    student, log_p, target = problem()
    target[3] = -100
    known = teacher(log_p, K, 3.0)

    def ours(x: Tensor) -> Tensor:
        mix: dict[str, Any] = {
            "kd_weight": 0.7,
            "ce_weight": 0.3,
            "temperature": 3.0,
            "softcap": 5.0,
            "logit_scale": 1.3,
        }
        return xt.topk_distillation_loss(x, target=target, **arguments(known), support="truncated", **mix).loss

    def formula(x: Tensor) -> Tensor:
        z = 5 * torch.tanh(x * 1.3 / 5)
        kd = divergence(z, known, "truncated", "forward_kl", 0.5, 3.0)
        row = 0.7 * 9 * kd + 0.3 * F.cross_entropy(z, target, reduction="none")
        return row[target != -100].mean()

    actual = loss_and_gradient(ours, student, torch.float32)
    exact = loss_and_gradient(lambda x: formula(x.double()), student.double(), torch.float64)
    eager = loss_and_gradient(formula, student, torch.float32)
    for what, *values in zip(("loss", "gradient"), actual, exact, eager, strict=True):
        assert_within_budget(*values, what=what)


def test_a_temperature_a_token_is_that_temperature_for_it() -> None:
    student, log_p, _ = problem(3)
    temperatures = torch.tensor([1.0, 2.0, 4.0])
    parts = [teacher(log_p[i : i + 1], K, float(t)) for i, t in enumerate(temperatures)]
    known = Teacher(*(torch.cat(field) for field in zip(*parts, strict=True)))
    options: dict[str, Any] = {"support": "tail_bucket", "reduction": "none"}
    together = xt.topk_distillation_loss(student, **arguments(known), temperature=temperatures, **options).loss
    for i, part in enumerate(parts):
        one = xt.topk_distillation_loss(
            student[i : i + 1], **arguments(part), temperature=float(temperatures[i]), **options
        )
        torch.testing.assert_close(together[i : i + 1], one.loss, rtol=1e-6, atol=0)


def test_uniform_tail_is_exact_for_a_uniform_tail() -> None:
    logits = torch.zeros(4, 50, dtype=torch.float64)
    logits[:, :5] = torch.randn(4, 5).double() + 4
    log_p = torch.log_softmax(logits, 1)
    known = teacher(log_p, 5, 2.0)
    student = torch.randn(4, 50)
    options: dict[str, Any] = {"support": "tail_bucket", "temperature": 2.0}
    exact = xt.topk_distillation_loss(student, **arguments(known), **options)
    guessed = xt.topk_distillation_loss(
        student, known.ids, known.logprobs.float(), **options, temperature_fallback="uniform_tail"
    )
    torch.testing.assert_close(guessed.kd_loss, exact.kd_loss, rtol=1e-5, atol=1e-6)
    renormalised = xt.topk_distillation_loss(
        student, known.ids, known.logprobs.float(), **options, temperature_fallback="renormalize"
    )
    torch.testing.assert_close(renormalised.teacher_mass, torch.ones(4))


@pytest.mark.parametrize("support", [*SUPPORTS, "sampled"])
@given(seed=st.integers(0, 2**31), pads=st.integers(0, 5))
def test_order_and_padding_do_not_matter(support: str, seed: int, pads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, log_p, _ = problem(3, 30, seed=seed)
    known = teacher(log_p, 6, 1.0)
    order = torch.randperm(6 + pads, generator=generator)
    junk = torch.randint(-5, 30, (3, pads), generator=generator)
    ids = torch.cat([known.ids, junk], 1)[:, order]
    logprobs = torch.cat([known.logprobs.float(), torch.full((3, pads), -torch.inf)], 1)[:, order]
    tail = {"teacher_tail_logprob": known.tail.float()}
    expected = xt.topk_distillation_loss(student, known.ids, known.logprobs.float(), **tail, support=support)
    actual = xt.topk_distillation_loss(student, ids, logprobs, **tail, support=support)
    torch.testing.assert_close(actual.kd_loss, expected.kd_loss, rtol=2e-6, atol=1e-7)
    negative = xt.topk_distillation_loss(
        student,
        torch.where(logprobs == -torch.inf, -1, ids),
        torch.nan_to_num(logprobs, neginf=-1.0),
        **tail,
        support=support,
    )
    assert torch.equal(actual.kd_loss, negative.kd_loss)


@pytest.mark.parametrize("support", [*SUPPORTS, "sampled"])
def test_duplicates_add_up_or_the_first_counts(support: str) -> None:
    student, _, _ = problem(1, 30)
    ids, mass = torch.tensor([[4, 9, 4, 2]]), torch.tensor([[0.3, 0.2, 0.1, 0.05]])
    once, added = torch.tensor([[4, 9, 2]]), torch.tensor([[0.4, 0.2, 0.05]])
    summed = xt.topk_distillation_loss(student, ids, mass.log(), support=support)
    expected = xt.topk_distillation_loss(student, once, added.log(), support=support)
    torch.testing.assert_close(summed.kd_loss, expected.kd_loss, rtol=2e-6, atol=1e-7)
    first = xt.topk_distillation_loss(student, ids, mass.log(), support=support, duplicate_ids="first")
    expected = xt.topk_distillation_loss(student, once, torch.tensor([[0.3, 0.2, 0.05]]).log(), support=support)
    torch.testing.assert_close(first.kd_loss, expected.kd_loss, rtol=2e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"teacher_topk_ids must be different .* got 4 twice at flat position 0"):
        xt.topk_distillation_loss(student, ids, mass.log(), support=support, duplicate_ids="refuse")


def test_ids_that_the_student_lacks_belong_to_the_tail() -> None:
    student, _, _ = problem(1, 30)
    ids, mass = torch.tensor([[4, 30, 9, 2**40]]), torch.tensor([[0.3, 0.2, 0.1, 0.15]])
    cut = torch.tensor([[4, 9]]), torch.tensor([[0.3, 0.1]]).log()
    for support in SUPPORTS:
        actual = xt.topk_distillation_loss(student, ids, mass.log(), support=support)
        expected = xt.topk_distillation_loss(student, *cut, support=support)
        torch.testing.assert_close(actual.kd_loss, expected.kd_loss, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(actual.teacher_mass, torch.tensor([0.4]))


@pytest.mark.parametrize("support", [*SUPPORTS, "sampled"])
def test_a_token_without_entries_costs_nothing(support: str) -> None:
    student, _, _ = problem(2, 30)
    ids, logprobs = torch.full((2, 3), -1), torch.zeros(2, 3)
    loss, gradient = loss_and_gradient(
        lambda x: xt.topk_distillation_loss(x, ids, logprobs, support=support).loss, student, torch.float32
    )
    assert float(loss) == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("support", [*SUPPORTS, "sampled"])
def test_a_student_without_a_chance_has_a_finite_gradient(support: str) -> None:
    """-inf logits, inside and outside the support, and a row that has nothing else but the target."""
    student = torch.randn(3, 20)
    student[0, 5:] = -torch.inf
    student[1, :4] = -torch.inf
    student[2, 1:] = -torch.inf
    ids, logprobs = torch.tensor([[0, 1, 2]] * 3), torch.full((3, 3), 0.25).log()
    loss, gradient = loss_and_gradient(
        lambda x: xt.topk_distillation_loss(x, ids, logprobs, support=support, reduction="none").loss,
        student,
        torch.float32,
    )
    defined = torch.tensor([True, support != "renormalized", True])  # q / Q is 0 / 0 where Q is 0
    assert not loss[defined].isnan().any()
    assert bool(gradient[defined].isfinite().all())
