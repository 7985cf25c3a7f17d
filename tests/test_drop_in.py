"""`xentile.cross_entropy(...).loss` in the place of `F.cross_entropy(...)`: the same value, gradient and shape.

In float64 the two agree to rounding. In float32 and below both are judged against float64, ours with twice the error of
PyTorch.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, assert_within_budget, loss_and_gradient
from torch import Tensor, nn

import xentile as xt

if TYPE_CHECKING:
    from collections.abc import Callable

CLASSES = 13  # no multiple of a vector
SHAPES = ((), (6,), (3, 4), (2, 3, 2))  # of an index target: logits (C), (N, C), (N, C, d1), (N, C, d1, d2)
REDUCTIONS = ("none", "mean", "sum")
IGNORED = (-100, 0, 5, CLASSES, -1, 2**40, -(2**63))  # the default, inside and outside [0, C), the ends of int64
EXACT = {"rtol": 1e-11, "atol": 1e-13}  # two ways to round in float64


def with_classes(shape: tuple[int, ...], classes: int = CLASSES) -> tuple[int, ...]:
    """The shape of logits for that of an index target."""
    return (*shape[:1], classes, *shape[1:])


def data(shape: tuple[int, ...], ignore_index: int = -100, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """float32 logits, and targets of which about a third are ignored, never the first."""
    logits = 4 * torch.randn(with_classes(shape, classes))
    target = torch.randint(classes, shape)
    skip = torch.rand(shape) < 0.3
    if target.numel():
        skip.view(-1)[0] = False
        first = target.view(-1)[:1]
        first[first == ignore_index] = (ignore_index + 1) % classes
    return logits, target.masked_fill(skip, ignore_index)


def ours(x: Tensor, target: Tensor, **options: Any) -> Tensor:
    return xt.cross_entropy(x, target, **options).loss


def assert_agrees(actual: Tensor, exact: Tensor, eager: Tensor, what: str) -> None:
    """The oracle's budget, with PyTorch's error, which may vanish by luck over a few numbers, at least one rounding."""
    assert actual.shape == exact.shape
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, exact, **EXACT)
    elif exact.numel():
        rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
        assert_within_budget(actual, exact, exact + (eager - exact).abs().max().clamp(min=rounding), what=what)


def assert_drop_in(logits: Tensor, target: Tensor, dtype: torch.dtype, **options: Any) -> None:
    """The loss and its gradient, for logits and other floating point tensors rounded to dtype."""
    tensors = {"target": target} | {name: value for name, value in options.items() if isinstance(value, Tensor)}
    rounded = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}

    def call(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def with_dtype_of(x: Tensor) -> Tensor:  # F.cross_entropy wants one dtype
            cast = {name: t.to(x.dtype) if t.is_floating_point() else t for name, t in rounded.items()}
            return function(x, **(options | cast))

        return with_dtype_of

    logits = logits.to(dtype)
    exact = loss_and_gradient(call(F.cross_entropy), logits, torch.float64)
    eager = loss_and_gradient(call(F.cross_entropy), logits, dtype) if dtype != torch.float64 else exact
    actual = loss_and_gradient(call(ours), logits, dtype)
    for results in zip(actual, exact, eager, ("loss", "gradient"), strict=True):
        assert_agrees(*results)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination_of_arguments_equals_pytorch(
    dtype: torch.dtype, shape: tuple[int, ...], reduction: str
) -> None:
    weight = torch.rand(CLASSES) + 0.1
    for ignore_index, w, smoothing in itertools.product((-100, 5), (None, weight), (0.0, 0.1)):
        logits, target = data(shape, ignore_index)
        options = {"ignore_index": ignore_index, "weight": w, "label_smoothing": smoothing, "reduction": reduction}
        assert_drop_in(logits, target, dtype, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ignore_index", IGNORED)
def test_any_integer_can_be_the_ignored_index(ignore_index: int, smoothing: float) -> None:
    logits, target = data((12,), ignore_index)
    assert_drop_in(logits, target, torch.float64, ignore_index=ignore_index, label_smoothing=smoothing)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_probabilities_equal_pytorch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = torch.rand(CLASSES) + 0.1
    for reduction, (w, smoothing) in itertools.product(REDUCTIONS, ((None, 0.0), (weight, 0.0), (weight, 0.1))):
        logits, _ = data(shape)
        options = {"weight": w, "label_smoothing": smoothing, "reduction": reduction}
        assert_drop_in(logits, torch.rand(logits.shape), dtype, **options)


def test_class_probabilities_have_the_gradient_of_pytorch() -> None:
    logits = torch.randn(4, CLASSES, dtype=torch.float64)
    both = []
    for function in (ours, F.cross_entropy):
        probabilities = logits.flip(0).softmax(1).requires_grad_()
        function(logits, probabilities, label_smoothing=0.1).backward()
        both.append(probabilities.grad)
    torch.testing.assert_close(*both, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [65536.0, 1 / 3])
def test_a_scaled_loss_keeps_small_gradients(dtype: torch.dtype, scale: float) -> None:
    """A GradScaler multiplies the loss so that p / N does not underflow in float16: it has to come before rounding."""
    logits, target = torch.randn(4096, CLASSES).to(dtype), torch.randint(CLASSES, (4096,))
    _, exact = loss_and_gradient(lambda x: F.cross_entropy(x, target) * scale, logits, torch.float64)
    _, actual = loss_and_gradient(lambda x: ours(x, target) * scale, logits, dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=torch.finfo(dtype).eps, atol=smallest)


# Each makes a non-contiguous (N, C, ...) tensor from a contiguous base tensor, which receives the gradient.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "transposed": ((CLASSES, 6), lambda b: b.t()),
    "some columns": ((6, CLASSES + 8), lambda b: b[:, 3 : 3 + CLASSES]),
    "every other column": ((6, 2 * CLASSES), lambda b: b[:, ::2]),
    "every other row": ((12, CLASSES), lambda b: b[::2]),
    "rows of a middle dimension": ((6, 3, CLASSES), lambda b: b[:, 1]),
    "one row for all": ((1, CLASSES), lambda b: b.expand(6, CLASSES)),
    "offset by one element": ((6 * CLASSES + 1,), lambda b: b[1:].view(6, CLASSES)),
    "classes last": ((3, 4, CLASSES), lambda b: b.movedim(-1, 1)),
    "batch in the middle": ((4, 3, CLASSES), lambda b: b.permute(1, 2, 0)),
    "channels last": ((2, 3, 2, CLASSES), lambda b: b.permute(0, 3, 1, 2)),
    "expanded spatially": ((2, CLASSES, 1), lambda b: b.expand(2, CLASSES, 4)),
    "flipped": ((6, CLASSES), lambda b: b.flip(1)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_logits_of_any_layout_are_read_and_given_a_gradient(layout: str, dtype: torch.dtype) -> None:
    shape, view = LAYOUTS[layout]
    base = 4 * torch.randn(shape)
    _, target = data((lambda s: (s[0], *s[2:]))(view(base).shape))

    def of_base(function: Callable[..., Tensor]) -> Any:
        return lambda b: function(view(b), target, label_smoothing=0.1)

    exact, eager = (loss_and_gradient(of_base(F.cross_entropy), base.to(dtype), d) for d in (torch.float64, dtype))
    actual = loss_and_gradient(of_base(ours), base.to(dtype), dtype)
    for results in zip(actual, exact, eager, ("loss", "gradient"), strict=True):
        assert_agrees(*results)


def test_one_column_for_all_classes_is_a_uniform_distribution() -> None:
    """Stride 0 along the classes."""
    base = torch.randn(6, 1, requires_grad=True)
    loss = ours(base.expand(6, CLASSES), torch.arange(6))
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(CLASSES).log())
    torch.testing.assert_close(base.grad, torch.zeros(6, 1), rtol=0, atol=1e-7)


TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "int64": lambda t: t,
    "int32": lambda t: t.int(),
    "uint8": lambda t: t.byte(),
    "a column": lambda t: torch.stack([t, -7 * torch.ones_like(t)], 1)[:, 0],
    "every other": lambda t: torch.stack([t, -7 * torch.ones_like(t)], 1).view(-1)[::2],
    "int32, unaligned": lambda t: torch.cat([t[:1], t]).int()[1:],
    "one for all": lambda t: t[:1].expand(len(t)),
}


@pytest.mark.parametrize("ignore_index", [-100, 255, 2])
@pytest.mark.parametrize("kind", TARGETS)
def test_targets_of_any_integer_type_and_layout(kind: str, ignore_index: int) -> None:
    logits = torch.randn(8, CLASSES, dtype=torch.float64)
    target = TARGETS[kind](torch.tensor([3, 2, 12, 0, 2, 5, 11, 1]))
    for reduction in REDUCTIONS:
        options = {"ignore_index": ignore_index, "reduction": reduction}
        torch.testing.assert_close(
            ours(logits, target, **options), F.cross_entropy(logits, target.long(), **options), **EXACT
        )


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_row_without_a_batch_gives_the_shape_of_pytorch(shape: tuple[int, ...], reduction: str) -> None:
    logits, target = torch.randn(CLASSES), torch.full(shape, 3)
    loss, theirs = (f(logits, target, reduction=reduction) for f in (ours, F.cross_entropy))
    torch.testing.assert_close(loss, theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 3)], ids=str)
def test_an_empty_batch_gives_what_pytorch_gives(shape: tuple[int, ...], reduction: str) -> None:
    logits, target = data(shape)
    for options in ({}, {"weight": torch.ones(CLASSES)}, {"label_smoothing": 0.1}):
        actual, exact = (
            loss_and_gradient(lambda x, f=f: f(x, target, reduction=reduction, **options), logits, torch.float32)  # noqa: B023
            for f in (ours, F.cross_entropy)
        )
        torch.testing.assert_close(actual, exact, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_class_has_no_loss_and_no_gradient(reduction: str) -> None:
    logits, target = torch.randn(5, 1), torch.zeros(5, dtype=torch.int64)
    for smoothing in (0.0, 0.1):
        assert_drop_in(logits, target, torch.float64, reduction=reduction, label_smoothing=smoothing)
    assert not ours(logits, target, reduction=reduction).any()


@pytest.mark.parametrize("shape", [(6,), (3, 4)], ids=str)
def test_all_ignored_is_what_pytorch_gives_or_zero_on_request(shape: tuple[int, ...]) -> None:
    logits, target = torch.randn(with_classes(shape)), torch.full(shape, -100)
    for reduction in REDUCTIONS:
        for weight in (None, torch.rand(CLASSES)):
            options = {"reduction": reduction, "weight": weight}
            theirs = loss_and_gradient(lambda x, o=options: F.cross_entropy(x, target, **o), logits, torch.float32)
            actual = loss_and_gradient(lambda x, o=options: ours(x, target, **o), logits, torch.float32)
            torch.testing.assert_close(actual, theirs, equal_nan=True)
    loss, gradient = loss_and_gradient(lambda x: ours(x, target, all_ignored="zero"), logits, torch.float32)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("position", [2, 5], ids=["at the target", "elsewhere"])
def test_logits_that_are_not_finite_give_the_loss_of_pytorch(value: float, position: int) -> None:
    logits, target = torch.randn(3, CLASSES), torch.tensor([2, 2, -100])
    logits[0, position] = value
    actual, theirs = (f(logits, target, reduction="none") for f in (ours, F.cross_entropy))
    torch.testing.assert_close(actual, theirs, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"ignore_index": 4, "label_smoothing": 0.1}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_the_module_trains_a_model_as_that_of_pytorch(options: dict[str, Any], weighted: bool) -> None:
    """One line changes: the parameters after five steps are the same, and so is what a trainer reads of it."""
    weight = torch.rand(CLASSES, dtype=torch.float64) + 0.1 if weighted else None
    x, target = torch.randn(32, 8, dtype=torch.float64), torch.randint(CLASSES, (32,))
    start = nn.Linear(8, CLASSES).double()
    trained = []
    for criterion in (nn.CrossEntropyLoss(weight, **options), xt.CrossEntropyLoss(weight, **options)):
        model = nn.Linear(8, CLASSES).double()
        model.load_state_dict(start.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            criterion(model(x), target).backward()
            optimizer.step()
        settings = criterion.ignore_index, criterion.reduction, criterion.label_smoothing
        trained.append((model.weight, model.bias, settings, criterion.weight))
    (*theirs, settings_theirs, _), (*actual, settings_ours, _) = trained
    torch.testing.assert_close(actual, theirs, rtol=1e-9, atol=1e-12)
    assert settings_ours == settings_theirs


def test_the_module_keeps_its_counts_and_casts_its_weight_as_pytorch_does() -> None:
    criterion = xt.CrossEntropyLoss(torch.rand(CLASSES))
    criterion(torch.randn(6, CLASSES), torch.randint(CLASSES, (6,)))
    criterion.to(torch.bfloat16)
    assert criterion.weight is not None
    assert criterion.weight.dtype == torch.bfloat16
    assert criterion.sketch.count() == 6


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits in float64, a target, and options, of any valid combination."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    classes = draw(st.integers(1, 40))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    ignore_index = draw(st.sampled_from([-100, 0, classes - 1, classes, 2**62]))
    logits = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4])) * torch.randn(with_classes(shape, classes)).double()
    options: dict[str, Any] = {
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "weight": torch.rand(classes).double() if draw(st.booleans()) else None,
    }
    if draw(st.booleans()):
        return logits, torch.rand(logits.shape).double(), options
    target = torch.randint(classes, shape)
    target = target.masked_fill(torch.rand(shape) < draw(st.sampled_from([0.0, 0.5])), ignore_index)
    return logits, target, options | {"ignore_index": ignore_index}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(calls())
def test_any_valid_call_equals_pytorch(call: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    logits, target, options = call
    actual, exact = (
        loss_and_gradient(lambda x, f=f: f(x, target, **options), logits, torch.float64)
        for f in (ours, F.cross_entropy)
    )
    torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-10, equal_nan=True)
