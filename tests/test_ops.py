"""The operators as PyTorch citizens: opcheck, compile without breaks or recompiles, fakes, torch.func."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from oracle import DTYPES, loss_and_gradient, sample
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException

import xentile as xt
from xentile._layout import DEFAULT
from xentile._ops import ops
from xentile._schemas import SCHEMAS, WITHOUT_TENSORS

# torch 2.13 warns about its own code while it compiles and exports
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def operator_arguments(dtype: torch.dtype, *, full: bool, reduction: int = 1) -> dict[str, tuple[Any, ...]]:
    """Arguments for every operator that has outputs, with all options or none."""
    rows, size = 6, 37
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    logits, target = sample(rows, size, dtype, ignored=0.2)
    vector = lambda dt=acc: torch.zeros(rows, dtype=dt)  # noqa: E731
    scalar = lambda: torch.ones((), dtype=acc)  # noqa: E731
    sketch = torch.zeros(2, DEFAULT.width, dtype=torch.int64)
    optional = (torch.rand(size, dtype=acc), torch.rand(rows, dtype=acc)) if full else (None, None)
    ids = torch.randint(0, 2, (rows,))
    scalars = (-100, reduction, *((0.1, 0.01, 5.0, 0.5) if full else (0.0, 0.0, 0.0, 1.0)))
    loss = vector() if reduction == 0 else scalar()
    dlogits = torch.zeros_like(logits) if reduction else None
    outputs = (loss, scalar(), vector(), vector(), vector(), vector(), vector(torch.int64), vector(torch.bool))
    extra = (vector(), vector(torch.int64), sketch.clone()) if full else (None, None, None)
    inputs = (*optional, torch.tensor(3.0, dtype=acc) if full and reduction == 1 else None, ids if full else None)
    values = torch.rand(rows)
    digit = (torch.zeros(1, dtype=torch.int64), 8 * dtype.itemsize - 11, 11, torch.zeros(1, 2048, dtype=torch.int64))
    return {
        "cross_entropy": (logits, target, *inputs, *outputs, *extra, dlogits, *scalars, False),
        "cross_entropy_backward": (
            *(torch.ones_like(loss), logits, target, *optional, scalar(), vector(), vector(), vector() + 1),
            *(torch.zeros_like(logits), *scalars, full and reduction == 1),
        ),
        "scale_": (logits.clone(), scalar() * 2),
        "sketch_update": (
            *((values, values > 0.5, values, ids) if full else (values, None, None, None)),
            *(sketch.clone(), 2**20 if full else 1),
        ),
        "radix_counts": (logits[:, 0].contiguous(), *((values > 0.5, ids) if full else (None, None)), *digit),
        "host_quantile": (
            *((logits, logits > 0, torch.rand(rows, size).double()) if full else (logits, None, None)),
            *(torch.rand(2, 3).double(), torch.zeros(2, 3, dtype=acc), torch.zeros(2, dtype=torch.int64), 5, full),
        ),
        **distillation_arguments(dtype, full=full, reduction=reduction),
        "sketch_quantile": (sketch.clone(), torch.rand(3).double(), *(torch.zeros(2, 3) for _ in range(3)), 0),
    }


def distillation_arguments(dtype: torch.dtype, *, full: bool, reduction: int) -> dict[str, tuple[Any, ...]]:
    """The same for the operators of distillation; float64 goes to the reference before it gets there."""
    rows, size, k = 6, 37, 5
    dtype = torch.float32 if dtype == torch.float64 else dtype
    logits, target = sample(rows, size, dtype, ignored=0.2)
    ids = torch.stack([torch.randperm(size)[:k].sort().values for _ in range(rows)]).int()
    logprobs = torch.log_softmax(torch.randn(rows, k + 1), 1)
    vector = lambda *shape: torch.zeros(rows, *shape)  # noqa: E731
    temperature = torch.rand(rows) + 0.5 if full else None
    optional = (target, torch.rand(rows)) if full else (None, None)
    forward = (*optional, torch.tensor(3.0) if full and reduction == 1 else None, temperature)
    forward = (*forward, torch.randint(0, 2, (rows,)) if full else None)
    loss = vector() if reduction == 0 else torch.ones(())
    sketches = [torch.zeros(2, DEFAULT.width, dtype=torch.int64) if full else None for _ in range(2)]
    losses = (loss, torch.ones(()), vector(), vector())
    scalars = (1, 0.5, 2.0, True, 0.7, 0.3 if full else 0.0, *((5.0, 0.5) if full else (0.0, 1.0)))
    written = (*sketches, torch.zeros_like(logits) if reduction else None, -100, reduction)
    teacher = (ids, logprobs[:, :k].contiguous(), logprobs[:, k].contiguous())
    saved = (*optional, temperature, torch.ones(()), vector())
    known = (torch.randn(rows), torch.randn(rows), temperature) if full else (None, None, None)
    dloss, dlogits, filled = torch.ones_like(loss), torch.zeros_like(logits), full and reduction == 1
    return {
        "teacher_topk": (
            *(
                logits,
                torch.tensor([1.0, 2.0]),
                torch.zeros(rows, k, dtype=torch.int32),
                vector(k),
                vector(2),
                vector(2),
            ),
            *((5.0, 0.5) if full else (0.0, 1.0)),
        ),
        "topk_support": (
            *(ids.long() if full else ids, logprobs[:, :k].to(dtype).contiguous(), *known),
            *(torch.zeros_like(ids), vector(k), vector(), vector(), size, 3, 0, 2 if full else 0, 2.0 if full else 1.0),
        ),
        "topk_distillation": (logits, *teacher, *forward, *losses, vector(), vector(3), *written, 3, *scalars, False),
        "topk_distillation_backward": (
            *(dloss, logits, *teacher, *saved, vector(3) + 1, dlogits, -100, reduction, 3, *scalars, filled),
        ),
        "distillation": (logits, logits.flip(0), *forward, *losses, vector(6), *written, *scalars, False),
        "distillation_backward": (
            *(dloss, logits, logits.flip(0), *saved, vector(6) + 1, dlogits, -100, reduction, *scalars, filled),
        ),
    }


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", sorted(SCHEMAS.keys() - WITHOUT_TENSORS - {"first_bad_target", "first_bad_group", "empty_gradient"})
)
def test_opcheck(name: str, dtype: torch.dtype, full: bool) -> None:
    for reduction in (0, 1) if name.startswith(("cross", "topk_d", "dist")) else (1,):
        arguments = operator_arguments(dtype, full=full, reduction=reduction)[name]
        torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.parametrize("rows", [0, 3, 270_000])
def test_opcheck_of_empty_gradient(rows: int) -> None:
    logits = torch.zeros(rows, 40)[:, :32]
    # Its values are whatever was there, so those tests that compare values of two calls do not apply.
    torch.library.opcheck(ops.empty_gradient.default, (logits,), test_utils=("test_schema", "test_faketensor"))


def test_first_bad_target_and_group() -> None:
    target = torch.tensor([3, -100, 5, 0, -1])
    assert ops.first_bad_target(target, 6, -100) == 4
    assert ops.first_bad_target(target, 5, -100) == 2
    assert ops.first_bad_target(target.int(), 6, -1) == 1
    assert ops.first_bad_target(target[:0], 6, -1) == -1
    assert ops.first_bad_group(torch.tensor([0, 1, 2]), 2) == 2
    assert ops.first_bad_group(torch.tensor([0, 1]), 2) == -1


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}])
def test_compiled_equals_eager_without_graph_breaks(reduction: str, options: dict[str, Any]) -> None:
    logits, target = sample(8, 100, ignored=0.2)

    def call(x: Tensor, sketch: xt.LossSketch) -> Tensor:
        return xt.cross_entropy(x, target, sketch=sketch, reduction=reduction, **options).loss

    eager, compiled = xt.LossSketch(), xt.LossSketch()
    expected = loss_and_gradient(lambda x: call(x, eager), logits, torch.float32)
    function = torch.compile(call, fullgraph=True)
    actual = loss_and_gradient(lambda x: function(x, compiled), logits, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert eager == compiled


def test_the_output_of_a_compiled_call_can_be_read() -> None:
    logits, target = sample(8, 100)

    @torch.compile(fullgraph=True)
    def call(x: Tensor) -> tuple[xt.CrossEntropyOutput, Tensor]:
        out = xt.cross_entropy(x, target, stats=("entropy", "target_rank"))
        return out, out.quantile([0.1, 0.5])

    out, quantiles = call(logits)
    expected = xt.cross_entropy(logits, target, stats=("entropy", "target_rank"))
    assert isinstance(out, xt.CrossEntropyOutput)
    torch.testing.assert_close(tuple(out), tuple(expected), rtol=0, atol=0)
    torch.testing.assert_close(quantiles, expected.quantile([0.1, 0.5]), rtol=0, atol=0)


def test_no_recompile_from_step_to_step() -> None:
    """The number of valid tokens, the normalizer and the batch change; the compiled code does not."""
    counter = CompileCounterWithBackend("aot_eager")
    criterion = xt.CrossEntropyLoss(z_loss=1e-4)

    def step(x: Tensor, target: Tensor, normalizer: Tensor) -> Tensor:
        return criterion(x, target, normalizer=normalizer)

    function = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(5):
        logits, target = sample(16, 50, ignored=seed / 6, seed=seed)
        x = logits.requires_grad_()
        function(x, target, torch.tensor(float(seed + 1))).backward()
    assert counter.frame_count == 1
    assert int(criterion.sketch.count() + criterion.sketch.ignored_count()) == 5 * 16


def test_one_graph_serves_any_batch_size() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(lambda x, t: xt.cross_entropy(x, t).loss, fullgraph=True, dynamic=True, backend=counter)
    function(*sample(8, 30))
    compiled = counter.frame_count
    for rows in (12, 20, 31):
        logits, target = sample(rows, 30)
        torch.testing.assert_close(function(logits, target), xt.cross_entropy(logits, target).loss)
    assert counter.frame_count == compiled


def test_export_lists_the_sketch_as_mutated() -> None:
    criterion = xt.CrossEntropyLoss()
    logits, target = sample(4, 10)
    program = torch.export.export(criterion, (logits, target)).run_decompositions()
    assert list(program.graph_signature.buffers_to_mutate.values()) == ["sketch_state"]


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    logits, target = sample(4, 10, torch.bfloat16)
    real = xt.cross_entropy(logits, target, stats=("entropy", "target_rank"))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = xt.cross_entropy(mode.from_tensor(logits), mode.from_tensor(target), stats=("entropy", "target_rank"))
    for name, a, b in zip(real._fields, real, fake, strict=True):
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name


def test_a_forward_on_a_gpu_reads_no_value_back() -> None:
    """Fake CUDA tensors have no values: whatever waits for the device raises. (Backward needs a driver: next test.)"""
    with torch._subclasses.FakeTensorMode():
        logits, target = torch.randn(8, 10, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
        sketch = xt.LossSketch("cuda", groups=2)
        options = {"normalizer": 12, "token_weight": torch.rand(8, device="cuda"), "group_ids": target}
        out = xt.cross_entropy(logits, target, sketch=sketch, stats=("entropy", "target_rank"), **options)
        for read in (out.quantile([0.1, 0.5]), out.out_of_range, sketch.quantile(0.5)):
            assert read.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            out.out_of_range.item()


def test_a_training_step_reads_no_value_back() -> None:
    with torch._subclasses.FakeTensorMode():
        logits, target = torch.randn(8, 10, requires_grad=True), torch.zeros(8, dtype=torch.int64)
        for reduction in ("mean", "none"):
            xt.cross_entropy(logits, target, sketch=xt.LossSketch(), reduction=reduction).loss.sum().backward()
        assert logits.grad is not None


def test_vmap_equals_a_loop() -> None:
    logits, target = torch.randn(3, 5, 20), torch.randint(0, 20, (3, 5))
    mapped = torch.vmap(lambda x, t: xt.cross_entropy(x, t).loss)(logits, target)
    looped = torch.stack([xt.cross_entropy(x, t).loss for x, t in zip(logits, target, strict=True)])
    torch.testing.assert_close(mapped, looped)


def test_per_sample_gradients_by_vmap_of_grad() -> None:
    logits, target = torch.randn(5, 20), torch.randint(0, 20, (5,))
    per_sample = torch.func.vmap(torch.func.grad(lambda x, t: xt.cross_entropy(x, t).loss))(logits, target)
    _, expected = loss_and_gradient(lambda x: F.cross_entropy(x, target, reduction="sum"), logits, torch.float32)
    torch.testing.assert_close(per_sample, expected)


def test_a_sketch_inside_a_transform_is_refused() -> None:
    logits, target = torch.randn(5, 20), torch.randint(0, 20, (5,))
    with pytest.raises(ValueError, match=r"sketch= can't be updated inside a torch\.func transform"):
        torch.func.grad(lambda x: xt.cross_entropy(x, target, sketch=xt.LossSketch()).loss)(logits)


def test_sketch_update_compiles() -> None:
    sketch, values = xt.LossSketch(), torch.rand(100)
    torch.compile(sketch.update, fullgraph=True)(values, values > 0.5)
    other = xt.LossSketch()
    other.update(values, values > 0.5)
    assert sketch == other
