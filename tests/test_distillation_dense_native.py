"""distillation against a dense teacher by the C++ kernels: digits against float64, every masking, bits of results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distillation_oracle import FORMULAS, dense_divergence
from oracle import assert_within_budget, loss_and_gradient, token_losses
from torch import Tensor

import xentile as xt
from xentile import _layout, _ops

pytestmark = pytest.mark.skipif(_ops.NATIVE_UNAVAILABLE is not None, reason=str(_ops.NATIVE_UNAVAILABLE))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
PAIRS += [(torch.float32, torch.float16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]
WITH_BETA = ("jsd", "skew_forward_kl", "skew_reverse_kl")
ROWS = 24
SIZES = (1, 7, 1024, 1500)  # no whole vector; a part of one; exactly a block; blocks and a part of one

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {"temperature": 2.0},
    "with cross-entropy": {"ce_weight": 0.5},
    "all": {"temperature": 0.7, "ce_weight": 1.5, "kd_weight": 0.5, "softcap": 20.0, "logit_scale": 0.7},
}


def problem(size: int, student: torch.dtype, teacher: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, some rows of which are sure, and targets."""
    generator = torch.Generator().manual_seed(size)
    x, y = (torch.randn(rows, size, generator=generator) * 3 for _ in range(2))
    target = torch.randint(0, size, (rows,), generator=generator)
    x[torch.arange(rows), target] += torch.linspace(0, 20, rows)
    y[torch.arange(rows), target] += torch.linspace(20, 0, rows)
    return x.to(student), y.to(teacher), target


def beta_of(name: str) -> float | None:
    return 0.3 if name in WITH_BETA else None


def formula(name: str, teacher: Tensor, target: Tensor, options: dict[str, Any]) -> Any:
    """The loss of each row as plain PyTorch writes it, as a function of the student's logits."""
    temperature = options.get("temperature", 1.0)
    cap, scale = options.get("softcap"), options.get("logit_scale", 1.0)

    def loss(x: Tensor) -> Tensor:
        z = scale * x if cap is None else cap * torch.tanh(scale * x / cap)
        kd = dense_divergence(z, teacher.to(z.dtype), name, beta_of(name) or 0.5, temperature) * temperature**2
        ce = F.cross_entropy(z, target, reduction="none")
        return options.get("kd_weight", 1.0) * kd + options.get("ce_weight", 0.0) * ce

    return loss


CASES = [(PAIRS[0], size, options) for size in SIZES for options in ("plain", "all")]
CASES += [(PAIRS[0], SIZES[-1], options) for options in ("tempered", "with cross-entropy")]
CASES += [(pair, 1100, options) for pair in PAIRS[1:] for options in ("plain", "all")]


@pytest.mark.parametrize(("dtypes", "size", "options"), CASES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradient_are_within_the_budget(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], size: int, options: str
) -> None:
    student, teacher, target = problem(size, *dtypes, rows=120)  # the largest error of few rows is a matter of luck
    chosen = OPTIONS[options]
    given = target if "ce_weight" in chosen else None

    def ours(x: Tensor) -> Tensor:
        return xt.distillation_loss(
            x, teacher, given, divergence=name, beta=beta_of(name), **chosen, reduction="none"
        ).loss

    plain = formula(name, teacher, target, chosen)
    actual = loss_and_gradient(ours, student, dtypes[0])
    exact = loss_and_gradient(plain, student.double(), torch.float64)
    eager = loss_and_gradient(lambda x: plain(x.float()), student, dtypes[0])
    for what, *values in zip(("loss", "gradient"), actual, exact, eager, strict=True):
        assert_within_budget(*values, what=f"{what} of {name}")


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "tv"])
def test_a_small_divergence_keeps_its_digits(name: str) -> None:
    """Of logits that differ by 0.001: the formula as it stands has lost them."""
    _, teacher, _ = problem(3001, torch.float32, torch.float32)
    student = teacher + 1e-3 * torch.randn(teacher.shape, generator=torch.Generator().manual_seed(0))
    beta = beta_of(name) or 0.5
    exact = dense_divergence(student.double(), teacher.double(), name, beta, 1.0)
    kd = xt.distillation_loss(student, teacher, divergence=name, beta=beta_of(name)).kd_loss
    eager = dense_divergence(student, teacher, name, beta, 1.0)
    assert float(((kd.double() - exact).abs() / exact).max()) < 1e-4
    assert float(((eager.double() - exact).abs() / exact).max()) > 0.1


@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("name", FORMULAS)
def test_equal_logits_have_no_divergence_at_all(name: str, temperature: float, with_target: bool) -> None:
    _, teacher, target = problem(3001, torch.float32, torch.float32)
    out = xt.distillation_loss(
        teacher.clone(), teacher, target if with_target else None, divergence=name, temperature=temperature
    )
    assert bool((out.kd_loss == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_columns_at_minus_infinity_in_both_are_as_if_they_were_not_there(name: str, dtype: torch.dtype) -> None:
    student, teacher, target = problem(1100, dtype, dtype)
    there = torch.cat([torch.arange(100), torch.arange(2500, 3500)])  # a whole block is empty, and the end of the row
    wide = [torch.full((ROWS, 4000), -torch.inf, dtype=dtype) for _ in range(2)]
    for x, values in zip(wide, (student, teacher), strict=True):
        x[:, there] = values
    options: dict[str, Any] = {"divergence": name, "ce_weight": 1.0, "temperature": 1.5, "reduction": "sum"}
    expected = loss_and_gradient(lambda x: xt.distillation_loss(x, teacher, target, **options).loss, student, dtype)
    loss, gradient = loss_and_gradient(
        lambda x: xt.distillation_loss(x, wide[1], there[target], **options).loss, wide[0], dtype
    )
    torch.testing.assert_close(loss, expected[0], rtol=1e-6, atol=0)
    near = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-5}
    torch.testing.assert_close(gradient[:, there], expected[1], **near)
    gradient[:, there] = 0
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("name", FORMULAS)
def test_a_mass_of_zero_counts_as_its_limit(name: str) -> None:
    student, teacher, _ = problem(1500, torch.float32, torch.float32)
    masked_teacher = teacher.index_fill(1, torch.arange(0, 1500, 3), -torch.inf)
    masked_student = student.index_fill(1, torch.arange(1, 1500, 3), -torch.inf)
    for x, y in ((student, masked_teacher), (masked_student, teacher), (masked_student, masked_teacher)):
        exact = xt.distillation_loss(x.double(), y.double(), divergence=name).kd_loss
        kd = xt.distillation_loss(x, y, divergence=name).kd_loss
        assert not kd.isnan().any()
        torch.testing.assert_close(kd.double(), exact, rtol=1e-5, atol=0)
    assert bool((kd == torch.inf).all()) == (name in ("forward_kl", "reverse_kl"))


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_broken_row_of_either_is_nan_and_others_are_clean(
    name: str, dtype: torch.dtype, options: dict[str, float]
) -> None:
    student, teacher, target = problem(1500, dtype, dtype, rows=8)
    clean = xt.distillation_loss(student, teacher, target, divergence=name, **options)
    payload = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # whose rounding overflows
    for row, (x, value) in enumerate(
        (
            (student, payload),
            (student, torch.inf),
            (student, None),
            (teacher, payload),
            (teacher, torch.inf),
            (teacher, None),
        )
    ):
        x[row, slice(None) if value is None else 1400] = -torch.inf if value is None else value
    leaf = student.clone().requires_grad_()
    out = xt.distillation_loss(leaf, teacher, target, divergence=name, ce_weight=1.0, reduction="none", **options)
    out.loss.sum().backward()
    assert leaf.grad is not None
    assert out.token_loss is not None
    assert out.kd_loss.isnan().tolist() == out.loss.isnan().tolist() == [True] * 6 + [False] * 2
    assert out.token_loss.isnan().tolist() == [True] * 3 + [False] * 5
    assert bool(leaf.grad[:6].isnan().all())
    assert bool(leaf.grad[6:].isfinite().all())
    assert torch.equal(out.kd_loss[6:], clean.kd_loss[6:])


def test_ignored_rows_are_not_read_and_both_sketches_count_them() -> None:
    student, teacher, target = problem(1000, torch.float32, torch.float32)
    target[:5] = -100
    student[:3], teacher[2:5] = torch.nan, torch.nan
    sketch, kd_sketch = xt.LossSketch(groups=2), xt.LossSketch(groups=2)
    out = xt.distillation_loss(
        student.requires_grad_(),
        teacher,
        target,
        ce_weight=1.0,
        sketch=sketch,
        kd_sketch=kd_sketch,
        group_ids=torch.arange(ROWS) % 2,
    )
    out.loss.backward()
    assert student.grad is not None
    assert bool((student.grad[:5] == 0).all())
    assert bool((student.grad[5:] != 0).any(1).all())
    assert out.token_loss is not None
    for counted, values in ((sketch, out.token_loss), (kd_sketch, out.kd_loss)):
        expected = xt.LossSketch(groups=2)
        expected.update(values[5:], group_ids=torch.arange(5, ROWS) % 2)
        expected.state[:, _layout.IGNORED] = torch.tensor([3, 2])
        assert torch.equal(counted.state, expected.state)


class Launch:
    """The operators themselves, on tensors as they are."""

    def __init__(self, name: str, *, reduction: str = "sum", beta: float = 0.3, **options: Any) -> None:
        scalars = {
            "temperature": 1.0,
            "squared": True,
            "kd_weight": 1.0,
            "ce_weight": 1.0,
            "softcap": 0.0,
            "scale": 1.0,
        }
        codes = (_layout.REDUCTIONS.index(reduction), _layout.DIVERGENCES.index(name))
        self.scalars = (-100, *codes, beta, *(scalars | options).values())

    def forward(self, logits: Tensor, teacher: Tensor, target: Tensor, dlogits: Tensor | None) -> list[Tensor]:
        rows = logits.shape[0]
        shapes = [(rows,) if self.scalars[1] == 0 else (), (), (rows,), (rows,), (rows, 6)]
        self.outputs = [torch.full(shape, torch.nan) for shape in shapes]
        inputs = (logits, teacher, target, None, None, None, None)
        _ops.ops.distillation.default(*inputs, *self.outputs, None, None, dlogits, *self.scalars, False)
        return self.outputs

    def backward(self, logits: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        loss, denominator, _, token_loss, rows = self.outputs
        dlogits = torch.full(logits.shape, torch.nan, dtype=logits.dtype)
        inputs = (torch.ones_like(loss), logits, teacher, target, None, None, denominator, token_loss, rows)
        _ops.ops.distillation_backward.default(*inputs, dlogits, *self.scalars, False)
        return dlogits


LAUNCHES: list[dict[str, Any]] = [{}, {"temperature": 1.5}, {"softcap": 9.0, "scale": 0.5}, {"kd_weight": 0.0}]


@pytest.mark.parametrize("options", LAUNCHES, ids=str)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_one_launch_gives_the_bits_of_two_also_in_place(
    name: str, dtypes: tuple[torch.dtype, torch.dtype], options: dict[str, Any]
) -> None:
    student, teacher, target = problem(3001, *dtypes, rows=5)
    launch = Launch(name, **options)
    fused = torch.full(student.shape, torch.nan, dtype=student.dtype)
    once = launch.forward(student, teacher, target, fused)
    alone = launch.forward(student, teacher, target, None)
    assert torch.equal(launch.backward(student, teacher, target), fused)
    overwritten = student.clone()
    in_place = launch.forward(overwritten, teacher, target, overwritten)
    assert torch.equal(overwritten, fused)
    for a, b in zip(once, in_place, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(once[2], alone[2], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", FORMULAS)
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    student, teacher, target = problem(3001, torch.float32, torch.bfloat16, rows=40)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            gradient = torch.empty_like(student)
            results.append([*Launch(name).forward(student, teacher, target, gradient), gradient])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pitch_and_alignment_do_not_matter(dtype: torch.dtype) -> None:
    student, teacher, target = problem(3001, dtype, dtype, rows=5)

    def shifted(x: Tensor, offset: int, pitch: int) -> Tensor:
        view = torch.full((x.shape[0] * pitch + offset,), torch.nan, dtype=dtype).as_strided(
            x.shape, (pitch, 1), offset
        )
        return view.copy_(x)

    gradients = [torch.empty_like(student) for _ in range(2)]
    contiguous = Launch("jsd").forward(student, teacher, target, gradients[0])
    strided = Launch("jsd").forward(shifted(student, 1, 3003), shifted(teacher, 3, 3010), target, gradients[1])
    assert all(torch.equal(a, b) for a, b in zip([*contiguous, gradients[0]], [*strided, gradients[1]], strict=True))


@pytest.mark.parametrize(("skew", "plain"), [("skew_forward_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_a_skew_without_a_mixture_is_the_plain_divergence(skew: str, plain: str) -> None:
    student, teacher, target = problem(1000, torch.float32, torch.float32)
    a = Launch(skew, beta=0.0).forward(student, teacher, target, None)
    b = Launch(plain).forward(student, teacher, target, None)
    assert torch.equal(a[2], b[2])


@pytest.mark.parametrize("beta", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", WITH_BETA)
def test_a_mixture_may_be_nearly_one_of_its_parts(name: str, beta: float) -> None:
    student, teacher, _ = problem(1000, torch.float32, torch.float32)
    exact = xt.distillation_loss(student.double(), teacher.double(), divergence=name, beta=beta).kd_loss
    kd = xt.distillation_loss(student, teacher, divergence=name, beta=beta).kd_loss
    torch.testing.assert_close(kd.double(), exact, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_small_cross_entropies_keep_their_digits(temperature: float) -> None:
    student, teacher, target = problem(3001, torch.float32, torch.float32, rows=200)
    student[torch.arange(200), target] += torch.linspace(0, 20, 200)
    exact = token_losses(student, target)
    out = xt.distillation_loss(student, teacher, target, temperature=temperature)
    assert out.token_loss is not None
    assert float(exact.min()) < 1e-9
    # Beyond 16 nats below the maximum, z - max alone is rounded by up to 2**-20, and so is the logarithm of its exp.
    error, allowed = (out.token_loss.double() - exact).abs() / exact, torch.where(exact >= 1e-7, 1e-6, 2e-6)
    assert bool((error < allowed).all())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_a_divergence_it_is_cross_entropy(temperature: float) -> None:
    student, teacher, target = problem(3001, torch.float32, torch.float32)
    options: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0, "temperature": temperature}
    ours = loss_and_gradient(lambda x: xt.distillation_loss(x, teacher, target, **options).loss, student, torch.float32)
    plain = loss_and_gradient(lambda x: xt.cross_entropy(x, target).loss, student, torch.float32)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", FORMULAS)
def test_huge_logits(name: str, temperature: float, scale: float) -> None:
    student, teacher, _ = problem(1000, torch.float32, torch.float32)
    student, teacher = student * scale, teacher * scale
    options: dict[str, Any] = {"divergence": name, "temperature": temperature, "scale_by_temperature_squared": False}
    kd = xt.distillation_loss(student, teacher, **options).kd_loss
    exact = xt.distillation_loss(student.double(), teacher.double(), **options).kd_loss
    torch.testing.assert_close(kd.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_teacher_in_double_precision_goes_through_plain_pytorch() -> None:
    student, teacher, _ = problem(100, torch.float32, torch.float32)
    wide = xt.distillation_loss(student, teacher.double()).kd_loss
    torch.testing.assert_close(wide, xt.distillation_loss(student, teacher).kd_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_lesser_instruction_sets_pass_the_same_tests(isa: str) -> None:
    if isa == _ops.ops.isa.default() or "XENTILE_ISA" in os.environ:
        pytest.skip("this process runs them on it")
    selection = ["-k", "not lesser and not threads"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, *selection],
        env=os.environ | {"XENTILE_ISA": isa},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
