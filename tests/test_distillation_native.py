"""The C++ kernels of top-K distillation against the reference in float64, on rows of several blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from xentile import _layout as layout
from xentile import _ops
from xentile.reference import distillation_kernels as reference

pytestmark = pytest.mark.skipif(_ops.NATIVE_UNAVAILABLE is not None, reason=str(_ops.NATIVE_UNAVAILABLE))
native = torch.ops.xentile

ROWS, SIZE, K = 6, 5003, 40  # two to five blocks and an odd end, whatever the instruction set
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CELLS = [
    (support, divergence)
    for support in range(len(layout.SUPPORTS))
    for divergence in range(len(layout.DIVERGENCES))
    if layout.SUPPORTS[support] != "sampled" or divergence == 0
]
TRUNCATED, RENORMALIZED, TAIL_BUCKET = (layout.SUPPORTS.index(s) for s in ("truncated", "renormalized", "tail_bucket"))
FORWARD_KL, REVERSE_KL = 0, 1


class Support(NamedTuple):
    ids: Tensor
    logprobs: Tensor
    tail: Tensor
    mass: Tensor


class Result(NamedTuple):
    loss: Tensor
    denominator: Tensor
    kd_loss: Tensor
    token_loss: Tensor
    student_mass: Tensor
    rest: Tensor
    sketch: Tensor
    kd_sketch: Tensor
    fused: Tensor  # the gradient of the forward's launch
    backward: Tensor  # that of the backward's


def supported(
    ops: Any,
    ids: Tensor,
    logprobs: Tensor,
    *,
    log_z: Tensor | None = None,
    tail: Tensor | None = None,
    temperatures: Tensor | None = None,
    size: int = SIZE,
    support: int = TRUNCATED,
    duplicates: str = "sum",
    fallback: str = "none",
    temperature: float = 1.0,
) -> Support:
    rows, k = ids.shape
    out = Support(torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k), torch.empty(rows), torch.empty(rows))
    codes = (support, layout.DUPLICATES.index(duplicates), layout.FALLBACKS.index(fallback))
    ops.topk_support(ids, logprobs, log_z, tail, temperatures, *out, size, *codes, temperature)
    return out


def distilled(
    ops: Any,
    logits: Tensor,
    teacher: Support,
    target: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    temperatures: Tensor | None = None,
    support: int = TRUNCATED,
    divergence: int = FORWARD_KL,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    inplace: bool = False,
) -> Result:
    rows = logits.shape[0]
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def vector(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=acc)

    def state() -> Tensor:
        return torch.zeros(1, layout.DEFAULT.width, dtype=torch.int64)

    given = tuple(t.to(acc) if t.is_floating_point() else t for t in teacher[:3])
    outputs = (vector(), vector(), vector(rows), vector(rows), vector(rows), vector(rows, 3))
    gradients = [torch.empty_like(logits, memory_format=torch.contiguous_format) for _ in range(2)]
    original = logits.clone()
    if inplace:
        gradients[0] = logits
    sketches = (state(), state())
    scalars = (temperature, True, kd_weight, ce_weight, softcap, logit_scale)
    codes = (-100, layout.REDUCTIONS.index("mean"), support, divergence, 0.3, *scalars)
    kept = (sketches[0] if target is not None else None, sketches[1], gradients[0])
    vectors = (target, token_weight, None, temperatures, None)
    ops.topk_distillation(logits, *given, *vectors, *outputs, *kept, *codes, False)
    saved = (outputs[1], outputs[3], outputs[5], gradients[1])
    one = torch.ones((), dtype=acc)
    ops.topk_distillation_backward(
        one, original if inplace else logits, *given, target, token_weight, temperatures, *saved, *codes, False
    )
    return Result(*outputs, *sketches, *gradients)


def problem(
    dtype: torch.dtype = torch.float32, *, rows: int = ROWS, size: int = SIZE, k: int = K, scale: float = 3.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student logits; ids, logprobs of a teacher; targets, the first in the support, the third ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, size, generator=generator) * scale).to(dtype)
    logprobs, ids = torch.log_softmax(torch.randn(rows, size, generator=generator) * scale, 1).topk(k)
    target = torch.randint(0, size, (rows,), generator=generator)
    target[0] = ids[0, 0]
    target[2:3] = -100
    return logits, ids, logprobs, target


def assert_matches(actual: Result, exact: Result, *, rtol: float = 2e-6) -> None:
    """Losses within rtol; the gradient within one rounding and a few of float32 at the largest of its row."""
    for name in ("loss", "denominator", "kd_loss", "token_loss", "student_mass"):
        torch.testing.assert_close(
            getattr(actual, name).double(), getattr(exact, name), rtol=rtol, atol=1e-7, equal_nan=True
        )
    unit = torch.finfo(actual.fused.dtype).eps / 2
    largest = exact.fused.abs().amax(1, keepdim=True)
    error = (actual.fused.double() - exact.fused).abs() - unit * exact.fused.abs()
    assert (error <= 1e-6 * largest + torch.finfo(actual.fused.dtype).smallest_normal).all()
    for name in ("sketch", "kd_sketch"):  # tokens by kind; the bins follow the losses
        assert torch.equal(getattr(actual, name)[:, :7], getattr(exact, name)[:, :7])


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("support", "divergence", "dtype"),
    [(*cell, torch.float32) for cell in CELLS]
    + [(s, d, t) for s, d in ((TRUNCATED, FORWARD_KL), (TAIL_BUCKET, REVERSE_KL)) for t in DTYPES[1:]],
)
def test_a_cell_equals_the_reference_and_one_launch_equals_two(
    support: int, divergence: int, dtype: torch.dtype, temperature: float
) -> None:
    logits, ids, logprobs, target = problem(dtype)
    log_z = torch.full((ROWS,), 3.0 * (temperature - 1))
    teacher = supported(native, ids, logprobs, log_z=log_z, support=support, temperature=temperature)
    options: dict[str, Any] = {"support": support, "divergence": divergence, "temperature": temperature}
    for given, ce_weight in ((None, 0.0), (target, 0.7)):
        actual = distilled(native, logits, teacher, given, ce_weight=ce_weight, **options)
        assert_matches(actual, distilled(reference, logits.double(), teacher, given, ce_weight=ce_weight, **options))
        assert_same_bits(actual.fused, actual.backward)


@pytest.mark.parametrize("options", [{"softcap": 20.0, "logit_scale": 1.3}, {"logit_scale": 0.5}], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_transformed_logits_equal_the_reference(options: dict[str, float], temperature: float) -> None:
    logits, ids, logprobs, target = problem()
    logits[1, 17] = -torch.inf
    options = options | {"temperature": temperature, "ce_weight": 0.7}
    teacher = supported(native, ids, logprobs)
    actual = distilled(native, logits, teacher, target, **options)
    assert_matches(actual, distilled(reference, logits.double(), teacher, target, **options), rtol=1e-5)
    assert_same_bits(actual.fused, actual.backward)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("support", [TRUNCATED, RENORMALIZED])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_weight_of_zero_leaves_its_term_out(temperature: float, support: int, weights: tuple[float, float]) -> None:
    logits, ids, logprobs, target = problem()
    options: dict[str, Any] = {"support": support, "temperature": temperature}
    options |= dict(zip(("kd_weight", "ce_weight"), weights, strict=True))
    teacher = supported(native, ids, logprobs, support=support)
    actual = distilled(native, logits, teacher, target, **options)
    assert_matches(actual, distilled(reference, logits.double(), teacher, target, **options))
    assert_same_bits(actual.fused, actual.backward)


@pytest.mark.parametrize("size", [1, 7, 1000, 1024])
@pytest.mark.parametrize("support", [TRUNCATED, TAIL_BUCKET])
def test_the_whole_vocabulary_may_be_the_support(support: int, size: int) -> None:
    logits, ids, logprobs, _ = problem(size=size, k=size)
    teacher = supported(native, ids, logprobs, support=support, size=size)
    actual = distilled(native, logits, teacher, support=support)
    assert_matches(actual, distilled(reference, logits.double(), teacher, support=support))
    assert torch.equal(actual.rest[:, 0], torch.full((ROWS,), -torch.inf))


def test_blocks_without_any_other_column_count_nothing() -> None:
    logits, _, _, target = problem(k=1024)
    ids = torch.arange(1024).flip(0).expand(ROWS, -1).contiguous()
    logits[:, :1024] += 60  # what is excluded may be far above the rest
    teacher = supported(native, ids, torch.log_softmax(torch.linspace(-3, 3, 1024).expand(ROWS, -1), 1).contiguous())
    actual = distilled(native, logits, teacher, target, ce_weight=0.7)
    assert_matches(actual, distilled(reference, logits.double(), teacher, target, ce_weight=0.7))


@pytest.mark.parametrize("gap", [30.0, 60.0])
@pytest.mark.parametrize("divergence", range(len(layout.DIVERGENCES)))
def test_a_saturated_student_keeps_the_digits_of_its_tail(divergence: int, gap: float) -> None:
    logits, ids, logprobs, target = problem()
    logits.scatter_add_(1, ids, torch.full((ROWS, K), gap))
    tail = torch.full((ROWS,), -gap)
    teacher = supported(native, ids, logprobs, tail=tail, support=TAIL_BUCKET, log_z=torch.logsumexp(logprobs, 1))
    options: dict[str, Any] = {"support": TAIL_BUCKET, "divergence": divergence, "ce_weight": 0.1}
    actual = distilled(native, logits, teacher, target, **options)
    exact = distilled(reference, logits.double(), teacher, target, **options)
    torch.testing.assert_close(actual.kd_loss.double(), exact.kd_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(actual.token_loss.double(), exact.token_loss, rtol=1e-6, atol=0)
    tail_gradient = exact.fused[1].clone()
    tail_gradient[ids[1]] = 0
    at = tail_gradient.abs().argmax()  # a column of the tail: there the gradient is smallest
    torch.testing.assert_close(actual.fused[1, at].double(), exact.fused[1, at], rtol=2e-6, atol=0)


def test_a_temperature_and_a_weight_a_token_equal_the_reference() -> None:
    logits, ids, logprobs, target = problem()
    temperatures, weight = torch.tensor([1.0, 2.0, 0.5, 1.0, 4.0, 1.5]), torch.rand(ROWS)
    teacher = supported(native, ids, logprobs, log_z=torch.rand(ROWS), temperatures=temperatures)
    options: dict[str, Any] = {"temperatures": temperatures, "token_weight": weight, "ce_weight": 0.7}
    actual = distilled(native, logits, teacher, target, **options)
    options["token_weight"] = weight.double()
    assert_matches(actual, distilled(reference, logits.double(), teacher, target, **options))
    assert_same_bits(actual.fused, actual.backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_gradient_may_overwrite_the_logits(temperature: float, dtype: torch.dtype) -> None:
    logits, ids, logprobs, target = problem(dtype)
    teacher = supported(native, ids, logprobs)
    options: dict[str, Any] = {"temperature": temperature, "ce_weight": 0.7}
    fresh = distilled(native, logits, teacher, target, **options)
    over = distilled(native, logits, teacher, target, inplace=True, **options)
    assert_same_bits(fresh.fused, over.fused)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_apart_and_off_alignment_have_the_same_bits(dtype: torch.dtype) -> None:
    logits, ids, logprobs, target = problem(dtype)
    teacher = supported(native, ids, logprobs)
    apart = torch.full((ROWS, SIZE + 9), torch.nan, dtype=dtype)[:, 3 : SIZE + 3]
    apart.copy_(logits)
    a, b = (distilled(native, x, teacher, target, ce_weight=0.7) for x in (logits, apart))
    for x, y in zip(a, b, strict=True):
        assert_same_bits(x, y)


def test_a_row_has_the_same_bits_wherever_it_stands_and_for_any_number_of_threads() -> None:
    logits, ids, logprobs, target = problem(rows=16)
    teacher = supported(native, ids, logprobs, support=TAIL_BUCKET)
    whole = distilled(native, logits, teacher, target, support=TAIL_BUCKET, ce_weight=0.7)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for x, y in zip(
            whole, distilled(native, logits, teacher, target, support=TAIL_BUCKET, ce_weight=0.7), strict=True
        ):
            assert_same_bits(x, y)
    finally:
        torch.set_num_threads(threads)
    last = Support(*(t[9:] for t in supported(native, ids, logprobs, support=TAIL_BUCKET)))
    part = distilled(native, logits[9:], last, target[9:], support=TAIL_BUCKET, ce_weight=0.7)
    for name in ("kd_loss", "token_loss", "student_mass", "rest"):
        assert_same_bits(getattr(part, name), getattr(whole, name)[9:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 20.0])
@pytest.mark.parametrize("place", ["rest", "support", "target"])
def test_a_row_without_finite_logits_has_losses_of_nan(place: str, softcap: float, value: float) -> None:
    logits, ids, logprobs, target = problem()
    target[1] = 4000 if 4000 not in ids[1] else 4001
    column = {"rest": 4002 if 4002 not in ids[1] else 4003, "support": int(ids[1, 3]), "target": int(target[1])}
    logits[1, column[place]] = value
    logits[3] = -torch.inf
    out = distilled(native, logits, supported(native, ids, logprobs), target, softcap=softcap, ce_weight=0.7)
    broken = torch.tensor([False, True, False, True, False, False])
    assert torch.equal(out.kd_loss.isnan(), broken)
    assert torch.equal(out.token_loss.isnan(), broken)
    assert out.loss.isnan()
    assert not out.fused[~broken].isnan().any()


def test_minus_infinity_among_the_logits_is_a_mass_of_zero() -> None:
    logits, ids, logprobs, target = problem()
    named = torch.zeros(ROWS, SIZE, dtype=torch.bool).scatter(1, ids, True)
    nothing = ~named & (torch.arange(SIZE) >= 2048) & (torch.arange(SIZE) < 4500)  # whole blocks
    nothing[1] = ~named[1]
    target[1], target[3] = ids[1, 1], 4499  # which the student thinks impossible
    logits = logits.masked_fill(nothing, -torch.inf)
    teacher = supported(native, ids, logprobs, support=TAIL_BUCKET)
    actual = distilled(native, logits, teacher, target, support=TAIL_BUCKET, ce_weight=0.7)
    assert_matches(actual, distilled(reference, logits.double(), teacher, target, support=TAIL_BUCKET, ce_weight=0.7))
    assert actual.token_loss[3] == torch.inf
    assert (actual.fused[0, nothing[0]] == 0).all()


def test_ids_out_of_order_end_the_support_and_lead_nowhere() -> None:
    logits, ids, logprobs, _ = problem()
    teacher = supported(native, ids, logprobs)
    expected = teacher._replace(ids=teacher.ids.clone())
    expected.ids[:, 5:] = SIZE
    for bad in (-7, 0, 2**31 - 1):
        wrong = teacher._replace(ids=teacher.ids.clone())
        wrong.ids[:, 5] = bad
        torch.testing.assert_close(
            distilled(native, logits, wrong).kd_loss, distilled(native, logits, expected).kd_loss, rtol=0, atol=0
        )


def test_a_target_out_of_range_is_a_nan_without_a_gradient() -> None:
    logits, ids, logprobs, target = problem()
    target[4] = SIZE
    teacher = supported(native, ids, logprobs)
    actual = distilled(native, logits, teacher, target, ce_weight=0.7)
    assert_matches(actual, distilled(reference, logits.double(), teacher, target, ce_weight=0.7))
    assert (actual.fused[4] == 0).all()
    assert (actual.backward[4] == 0).all()


@pytest.mark.parametrize(
    ("duplicates", "integers", "dtype"),
    [
        ("sum", torch.int32, torch.float32),
        ("first", torch.int64, torch.bfloat16),
        ("refuse", torch.int64, torch.float16),
    ],
)
@pytest.mark.parametrize("support", range(len(layout.SUPPORTS)))
def test_supports_equal_those_of_the_reference(
    support: int, duplicates: str, integers: torch.dtype, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, k, size = 40, 33, 60
    ids = torch.randint(-3, 70, (rows, k), generator=generator, dtype=integers)  # absent, double, beyond the vocabulary
    ids[::4] = torch.stack([torch.randperm(70, generator=generator)[:k] for _ in range(10)]).to(integers)
    logprobs = torch.log_softmax(torch.randn(rows, k, generator=generator) * 2, 1) - 0.3
    logprobs = logprobs.masked_fill(torch.rand(rows, k, generator=generator) < 0.1, -torch.inf).to(dtype)
    logprobs[7] = -torch.inf
    log_z, tail = torch.rand(rows, generator=generator), -torch.rand(rows, generator=generator) - 1
    temperatures = torch.where(torch.arange(rows) % 3 > 0, 1.0, 2.0)
    known: tuple[dict[str, Any], ...] = (
        {},
        {"tail": tail},
        {"log_z": log_z, "temperature": 2.5},
        {"log_z": log_z, "tail": tail, "temperatures": temperatures},
        {"fallback": "renormalize", "temperatures": temperatures},
        {"fallback": "uniform_tail", "temperature": 0.5},
        {"fallback": "uniform_tail", "temperatures": temperatures, "tail": tail},
    )
    for options in known:
        options = options | {"support": support, "duplicates": duplicates, "size": size}
        actual, exact = supported(native, ids, logprobs, **options), supported(reference, ids, logprobs, **options)
        for x, y in zip(actual, exact, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True)
