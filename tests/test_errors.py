"""Misuse: the exception type of PyTorch, and a message that names the argument, what it must be and what it was.

PyTorch is asked for its type when the test runs, so a change there is seen here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import xentile as xt
from xentile._layout import DEFAULT

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.linspace(-2, 2, 20).reshape(4, 5)
T = torch.tensor([0, 1, 2, -100])
X3 = torch.linspace(-2, 2, 30).reshape(2, 5, 3)
META = torch.device("meta")
NAN, INF = float("nan"), float("inf")

# name: (logits, target, options, what our message says). F.cross_entropy refuses each of them.
AS_PYTORCH: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "logits list": ([[1.0]], T, {}, "logits must be a Tensor, got list"),
    "target list": (X, [0, 1], {}, "target must be a Tensor, got list"),
    "target None": (X, None, {}, "target must be a Tensor, got NoneType"),
    "logits int64": (X.long(), T, {}, "logits must be float32, bfloat16, float16 or float64, got int64"),
    "logits complex": (X.cfloat(), T, {}, "logits must be float32, .* got complex64"),
    "logits float8": (X.to(torch.float8_e4m3fn), T, {}, "logits must be float32, .* got float8_e4m3fn"),
    "logits 0-d": (torch.tensor(1.0), torch.tensor(0.5), {}, "logits must have at least 1 dimension, .* got 0"),
    "target int16": (X, T.short(), {}, "target dtype to be Long, Int or Byte, but got int16"),
    "target bool": (X, T.bool(), {}, "target dtype to be Long, Int or Byte, but got bool"),
    "target float": (X, T.float(), {}, "target dtype to be Long, Int or Byte, but got float32"),
    "probabilities of other V": (X, torch.rand(4, 6), {}, r"target.*(float32|\[4, 6\])"),
    "probabilities of other N": (X, torch.rand(3, 5), {}, r"batch_size \(4\) to match target batch_size \(3\)"),
    "integer probabilities": (X, torch.zeros(4, 5).long(), {}, "floating point type for target .* got int64"),
    "target shorter": (X, T[:3], {}, r"batch_size \(4\) to match target batch_size \(3\)"),
    "target 0-d": (X, T[0], {}, r"batch_size \(4\) to match target batch_size \(0\)"),
    "target column": (X, T[:, None], {}, r"target size \[4\], got \[4, 1\]"),
    "(V) target longer": (X[0], T, {}, r"target must have size 1, but got target size: 4"),
    "(V) target empty": (X[0], T[:0], {}, r"target must have size 1, but got target size: 0"),
    "(V) target 2-d": (X[0], T[:1, None], {}, r"target .*\(1, 1\)"),
    "(N, V, d) other d": (X3, torch.zeros(2, 4).long(), {}, r"target size \[2, 3\], got \[2, 4\]"),
    "(N, V, d) other N": (X3, torch.zeros(3, 3).long(), {}, r"batch_size \(2\) to match target batch_size \(3\)"),
    "(N, V, d) target 1-d": (X3, torch.zeros(2).long(), {}, r"target size \[2, 3\], got \[2\]"),
    "target too large": (X, T.where(T != 2, 5), {}, r"Target 5 is out of bounds.*\[0, 5\).* position 2"),
    "target negative": (X, T.where(T != 2, -1), {}, r"Target -1 is out of bounds.*ignore_index=-100.* position 2"),
    "no class": (X[:, :0], T * 0, {}, r"\[0, 0\)|at least 1 class|at least one class"),
    "weight list": (X, T, {"weight": [1.0] * 5}, "weight must be a Tensor, got list"),
    "weight size": (X, T, {"weight": torch.ones(4)}, r"weight .* all 5 classes .* shape: \[4\]"),
    "weight 2-d": (X, T, {"weight": torch.ones(5, 1)}, r"weight .* all 5 classes .* shape: \[5, 1\]"),
    "weight int": (X, T, {"weight": torch.ones(5).long()}, "weight must be a floating point tensor, got int64"),
    "weight elsewhere": (X, T, {"weight": torch.ones(5, device=META)}, "weight must be on .* cpu, got meta"),
    "target elsewhere": (X, T.to(META), {}, "target must be on the device of logits, cpu, got meta"),
    "reduction unknown": (X, T, {"reduction": "avg"}, "avg is not a valid value for reduction.*'none', 'mean', 'sum'"),
    "reduction None": (X, T, {"reduction": None}, "None is not a valid value for reduction"),
    "reduction list": (X, T, {"reduction": ["mean"]}, r"\['mean'\] is not a valid value for reduction"),
    "smoothing > 1": (X, T, {"label_smoothing": 1.5}, "label_smoothing must be between 0.0 and 1.0. Got: 1.5"),
    "smoothing str": (X, T, {"label_smoothing": "a"}, "label_smoothing must be a Python number, got str"),
    "smoothing None": (X, T, {"label_smoothing": None}, "label_smoothing must be .* got NoneType"),
    "ignore float": (X, T, {"ignore_index": 1.5}, "ignore_index must be int, got float"),
    "ignore None": (X, T, {"ignore_index": None}, "ignore_index must be int, got NoneType"),
    "ignore bool": (X, T, {"ignore_index": True}, "ignore_index must be int, got bool"),
    "ignore > int64": (X, T, {"ignore_index": 2**70}, f"ignore_index .*got {2**70}"),
    "ignore for probabilities": (X, X.softmax(1), {"ignore_index": 1}, "ignore_index is not supported for floating"),
    "weight for probabilities": (X, X.softmax(1), {"weight": torch.ones(4)}, r"weight .* all 5 .* shape: \[4\]"),
}

ELSEWHERE = torch.zeros(4, device=META)
# name: (options, type, what our message says). Arguments that F.cross_entropy has not, or takes silently.
OURS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "smoothing < 0": ({"label_smoothing": -0.1}, RuntimeError, "label_smoothing must be between .* Got: -0.1"),
    "smoothing NaN": ({"label_smoothing": NAN}, RuntimeError, "label_smoothing must be between .* Got: nan"),
    "z_loss < 0": ({"z_loss": -1.0}, ValueError, "z_loss must be finite and at least 0, got -1.0"),
    "z_loss NaN": ({"z_loss": NAN}, ValueError, "z_loss must be finite and at least 0, got nan"),
    "z_loss inf": ({"z_loss": INF}, ValueError, "z_loss must be finite and at least 0, got inf"),
    "z_loss tensor": ({"z_loss": torch.tensor(0.1)}, TypeError, "z_loss must be a Python number, got Tensor"),
    "softcap 0": ({"softcap": 0.0}, ValueError, "softcap must be finite and greater than 0, got 0.0"),
    "softcap NaN": ({"softcap": NAN}, ValueError, "softcap must be finite and greater than 0, got nan"),
    "softcap str": ({"softcap": "30"}, TypeError, "softcap must be a Python number, got str"),
    "scale 0": ({"logit_scale": 0}, ValueError, "logit_scale must be finite and greater than 0, got 0"),
    "scale < 0": ({"logit_scale": -2.0}, ValueError, "logit_scale must be finite and greater than 0, got -2.0"),
    "scale None": ({"logit_scale": None}, TypeError, "logit_scale must be a Python number, got NoneType"),
    "token_weight list": ({"token_weight": [1.0] * 4}, TypeError, "token_weight must be a Tensor, got list"),
    "token_weight shape": ({"token_weight": X}, ValueError, r"token_weight .* \(4,\), got shape \(4, 5\)"),
    "token_weight int": ({"token_weight": T}, RuntimeError, "token_weight must be a floating point .* got int64"),
    "token_weight elsewhere": ({"token_weight": ELSEWHERE}, RuntimeError, "token_weight must be on .* cpu, got meta"),
    "normalizer sum": ({"normalizer": 2, "reduction": "sum"}, ValueError, "normalizer .* must be 'mean', got 'sum'"),
    "normalizer 1-d": ({"normalizer": torch.ones(1)}, ValueError, r"normalizer must be .* 0-d .* got shape \(1,\)"),
    "normalizer str": ({"normalizer": "4"}, TypeError, "normalizer must be .* number.*, got str"),
    "normalizer complex": ({"normalizer": torch.tensor(1j)}, TypeError, "normalizer must be .* got complex64"),
    "normalizer elsewhere": ({"normalizer": ELSEWHERE[0]}, RuntimeError, "normalizer must be on .* cpu.*, got meta"),
    "group_ids list": ({"group_ids": [0] * 4}, TypeError, "group_ids must be a Tensor, got list"),
    "group_ids shape": ({"group_ids": T[:3]}, ValueError, r"group_ids must .* \(4,\), got shape \(3,\)"),
    "group_ids float": ({"group_ids": X[:, 0]}, TypeError, "group_ids must be int64 or int32, got float32"),
    "group_ids range": ({"group_ids": T * 0 + 2}, IndexError, r"group_ids must be in \[0, 2\), got 2 .* position 0"),
    "group_ids negative": ({"group_ids": T * 0 - 1}, IndexError, r"group_ids must be in \[0, 2\), got -1"),
    "group_ids elsewhere": ({"group_ids": ELSEWHERE.long()}, RuntimeError, "group_ids must be on .* cpu, got meta"),
    "group_ids alone": ({"group_ids": T * 0, "sketch": None}, ValueError, "group_ids .* pass sketch="),
    "sketch state": ({"sketch": torch.zeros(1)}, TypeError, "sketch must be a LossSketch.*, got Tensor"),
    "sketch elsewhere": ({"sketch": xt.LossSketch(META)}, RuntimeError, "sketch must be on .* cpu, got meta"),
    "stats unknown": ({"stats": ("lse",)}, ValueError, "lse is not a valid value for stats.*'entropy', 'target_rank'"),
    "stats str": ({"stats": "entropy"}, TypeError, "stats must be a tuple .*, got 'entropy'"),
    "stats None": ({"stats": None}, TypeError, "stats must be a tuple .*, got None"),
    "all_ignored": ({"all_ignored": "one"}, ValueError, "one is not a valid value for all_ignored.*'nan', 'zero'"),
    "unknown argument": ({"smoothing": 0.1}, TypeError, "smoothing"),
}


@pytest.fixture
def sketch() -> xt.LossSketch:
    """Two groups that hold something, so that a count lost or added is seen."""
    sketch = xt.LossSketch(groups=2)
    sketch.update(torch.tensor([0.5, 3.0]), group_ids=torch.tensor([0, 1]))
    return sketch


def refused(sketch: xt.LossSketch, kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    """call() raises exactly `kind` with the message, and the sketch counts what it counted."""
    before = sketch.clone()
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)) as raised:
        call()
    assert raised.type is kind
    assert sketch == before


@pytest.mark.parametrize("case", AS_PYTORCH.values(), ids=AS_PYTORCH)
def test_misuse_raises_the_type_of_pytorch_and_a_message_of_ours(case: Any, sketch: xt.LossSketch) -> None:
    logits, target, options, message = case
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.cross_entropy(logits, target, **options)
    untouched = logits.clone() if isinstance(logits, Tensor) else None
    refused(sketch, theirs.type, message, lambda: xt.cross_entropy(logits, target, sketch=sketch, **options))
    if untouched is not None and not untouched.dtype.is_complex:
        assert torch.equal(logits.float(), untouched.float())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", OURS.values(), ids=OURS)
def test_our_own_arguments_are_checked_before_anything_changes(case: Any, inplace: bool, sketch: xt.LossSketch) -> None:
    options, kind, message = case
    logits = X.clone().requires_grad_().clone()
    options = {"sketch": sketch, "inplace": inplace, **options}
    refused(sketch, kind, message, lambda: xt.cross_entropy(logits, T, **options))
    assert torch.equal(logits, X)
    assert logits._version == 0


LEAF = X.clone().requires_grad_()


@pytest.mark.parametrize(
    ("logits", "target", "kind", "message"),
    [
        (LEAF, T, RuntimeError, "inplace=True would overwrite logits, a leaf that requires grad"),
        (LEAF[:2], T[:2], RuntimeError, "inplace=True would overwrite .* a leaf that requires grad"),
        (X3.clone(), torch.zeros(2, 3).long(), ValueError, r"inplace=True .* got shape \(2, 5, 3\)"),
        (X.t().contiguous().t(), T, ValueError, r"inplace=True needs contiguous .* strides \(1, 4\)"),
        (X[:1].expand(4, 5), T, ValueError, r"inplace=True needs contiguous .* strides \(0, 1\)"),
        (X.clone(), X.softmax(1), ValueError, "inplace=True is not supported for .* class probabilities"),
    ],
    ids=["leaf", "view of a leaf", "3-d", "transposed", "expanded", "probabilities"],
)
def test_inplace_is_refused_where_it_would_lose_something(
    logits: Tensor, target: Tensor, kind: type[Exception], message: str, sketch: xt.LossSketch
) -> None:
    before = logits.detach().clone()
    refused(sketch, kind, message, lambda: xt.cross_entropy(logits, target, sketch=sketch, inplace=True))
    assert torch.equal(logits, before)


def state(groups: int = 2) -> Tensor:
    return torch.zeros(groups, DEFAULT.width, dtype=torch.int64)


def saved(state: Tensor, weighted: bool = False) -> dict[str, Any]:
    return {"state": state, "weighted": weighted}


ONES = torch.ones(3)
IDS = torch.tensor([0, 1, 2])
# what is called on a sketch of two groups: (call, type, what the message says)
SKETCH: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "groups 0": (lambda s: xt.LossSketch(groups=0), ValueError, "groups must be at least 1, got 0"),
    "groups float": (lambda s: s.__class__(groups=1.5), TypeError, "groups must be int, got float"),
    "state list": (lambda s: s.from_state([0]), TypeError, "state must be a Tensor, got list"),
    "state dtype": (lambda s: s.from_state(state().float()), TypeError, "state must be int64, got .*float32"),
    "state shape": (lambda s: s.from_state(state()[:, :7]), ValueError, r"state must have shape .* got \(2, 7\)"),
    "state 1-d": (lambda s: s.from_state(state()[0]), ValueError, r"state must have shape .* got \(\d+,\)"),
    "state strided": (
        lambda s: s.from_state(state().t().contiguous().t()),
        ValueError,
        r"state must be contiguous.*\(1, 2\)",
    ),
    "values list": (lambda s: s.update([1.0]), TypeError, "values must be a Tensor, got list"),
    "values int": (lambda s: s.update(IDS), TypeError, "values must be a floating point tensor, got int64"),
    "values elsewhere": (lambda s: s.update(ELSEWHERE), RuntimeError, "values must be on .* cpu, got meta"),
    "precision": (lambda s: xt.LossSketch(precision=11), ValueError, r"precision must be in 1 \.\.\. 10, got 11"),
    "weights unweighted": (lambda s: s.update(ONES, weights=ONES), ValueError, "weights need .* weighted=True"),
    "coarsen to finer": (lambda s: s.coarsened(8), ValueError, r"precision must be in 1 \.\.\. 7, got 8"),
    "merge weighted": (
        lambda s: s.merge(xt.LossSketch(groups=2, weighted=True)),
        ValueError,
        "other must have weighted=False, got True",
    ),
    "mask list": (lambda s: s.update(ONES, [True]), TypeError, "mask must be a Tensor, got list"),
    "mask dtype": (lambda s: s.update(ONES, IDS), TypeError, "mask must be bool, got .*int64"),
    "mask shape": (lambda s: s.update(ONES, ONES[:2] > 0), ValueError, r"mask must .* \(3,\), got \(2,\)"),
    "ids shape": (lambda s: s.update(ONES, group_ids=IDS[:2]), ValueError, r"group_ids .* \(3,\), got shape \(2,\)"),
    "ids range": (lambda s: s.update(ONES, group_ids=IDS), IndexError, r"group_ids must be in \[0, 2\), got 2"),
    "merge int": (lambda s: s.merge(3), TypeError, "other must be a LossSketch.*, got int"),
    "merge None": (lambda s: s.merge(None), TypeError, "other must be a LossSketch.*, got NoneType"),
    "merge groups": (lambda s: s.merge(xt.LossSketch()), ValueError, "other must have 2 groups, got 1"),
    "q > 1": (lambda s: s.quantile(1.5), ValueError, r"q must be in \[0, 1\], got 1.5"),
    "q < 0": (lambda s: s.quantile([0.5, -0.1]), ValueError, r"q must be in \[0, 1\], got .*-0.1"),
    "q NaN": (lambda s: s.quantile(NAN), ValueError, r"q must be in \[0, 1\], got nan"),
    "q str": (lambda s: s.quantile("p50"), TypeError, "q must be .*, got str"),
    "q None": (lambda s: s.quantile(None), TypeError, "q must be .*, got NoneType"),
    "q int tensor": (lambda s: s.quantile(IDS), TypeError, "q must be a floating point tensor, got int64"),
    "q of bounds": (lambda s: s.quantile_bounds(2.0), ValueError, r"q must be in \[0, 1\], got 2.0"),
    "interpolation": (lambda s: s.quantile(0.5, interpolation="cubic"), ValueError, "cubic .* interpolation.*'linear'"),
    "load None": (lambda s: s.load_state_dict(None), TypeError, "state_dict must be .*, got NoneType"),
    "load keys": (lambda s: s.load_state_dict({"x": 1}), ValueError, r"state_dict must .* 'weighted', got \['x'\]"),
    "load groups": (lambda s: s.load_state_dict(saved(state(1))), ValueError, "must hold groups=2, got 1"),
    "load weighted": (lambda s: s.load_state_dict(saved(state(), True)), ValueError, "weighted=False, got True"),
    "load dtype": (
        lambda s: s.load_state_dict(saved(state().int())),
        TypeError,
        "state must be int64, got .*int32",
    ),
    "hash": (hash, TypeError, "unhashable type: 'LossSketch'"),
}


@pytest.mark.parametrize("case", SKETCH.values(), ids=SKETCH)
def test_a_sketch_refuses_misuse_and_keeps_its_counts(case: Any, sketch: xt.LossSketch) -> None:
    call, kind, message = case
    refused(sketch, kind, message, lambda: call(sketch))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"smoothing": 0.1}, TypeError, "CrossEntropyLoss.* unexpected keyword argument 'smoothing'"),
        ({"stats": ("entropy",)}, TypeError, "CrossEntropyLoss.* unexpected keyword argument 'stats'"),
        ({"reduction": "avg"}, ValueError, "avg is not a valid value for reduction"),
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"weight": [1.0]}, TypeError, "weight"),
        ({"weight": torch.ones(2, 2)}, RuntimeError, r"weight .* shape: \[2, 2\]"),
        ({"label_smoothing": 3}, RuntimeError, "label_smoothing must be between 0.0 and 1.0. Got: 3"),
        ({"softcap": -1}, ValueError, "softcap must be finite and greater than 0, got -1"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be int, got float"),
        ({"all_ignored": "x"}, ValueError, "x is not a valid value for all_ignored"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_module_refuses_its_options_at_the_latest_when_called(options: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        xt.CrossEntropyLoss(**options)(X, T)


def test_a_module_that_raises_has_counted_nothing() -> None:
    criterion = xt.CrossEntropyLoss()
    with pytest.raises(IndexError, match="out of bounds"):
        criterion(X, T + 10)
    assert criterion.sketch == xt.LossSketch()


def test_a_quantile_of_an_output_checks_q() -> None:
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\], got 2.0"):
        xt.cross_entropy(X, T).quantile(2.0)
