"""Reading one step late: one packed copy, equal to the read-outs at the time of the call, that nobody waits for."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from steps import steps_of

import xentile as xt
from xentile.reading import PendingReading, Reading

KINDS = {
    "sketch": lambda **o: xt.LossSketch(**o),
    "window": lambda **o: xt.WindowedSketch(2, **o),
    "decay": lambda **o: xt.DecayedSketch(1.5, **o),
}
Q = [0.0, 0.1, 0.5, 0.99, 1.0]


def filled(kind: str, **options: object) -> xt.LossSketch | xt.WindowedSketch | xt.DecayedSketch:
    sketch = KINDS[kind](**options)
    for values in steps_of(5):
        ids = torch.arange(len(values)) % 2 if sketch.groups > 1 else None
        weights = torch.rand(len(values)) if sketch.weighted else None
        to = [None if t is None else t.to(sketch.device) for t in (values, weights, ids)]
        sketch.update(to[0], weights=to[1], group_ids=to[2])
    return sketch


def expected(sketch: object, q: object, interpolation: str = "linear") -> Reading:
    others = {field.name for field in fields(Reading)} - {"quantile"}
    quantile = sketch.quantile(q, interpolation=interpolation).cpu()
    return Reading(quantile, **{name: getattr(sketch, name)().cpu() for name in others})


def assert_same(got: Reading, want: Reading) -> None:
    for field in fields(Reading):
        a, b = getattr(got, field.name), getattr(want, field.name)
        assert a.device.type == "cpu"
        assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
        assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0)), field.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_reading_has_the_bits_of_the_read_outs(kind: str, groups: int, weighted: bool, device: torch.device) -> None:
    sketch = filled(kind, device=device, groups=groups, weighted=weighted)
    for q in (Q, 0.5, torch.tensor([[0.25], [0.75]]), []):
        assert_same(sketch.read_async(q).result(), expected(sketch, q))


@pytest.mark.parametrize("interpolation", ["lower", "midpoint"])
def test_a_reading_takes_the_interpolation(interpolation: str) -> None:
    sketch = filled("sketch")
    got = sketch.read_async(Q, interpolation=interpolation).result()
    assert_same(got, expected(sketch, Q, interpolation))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reading_shows_the_moment_of_the_call(kind: str, device: torch.device) -> None:
    sketch = filled(kind, device=device)
    before, pending = expected(sketch, Q), sketch.read_async(Q)
    sketch.update(torch.rand(50, device=device) * 100)
    assert_same(pending.result(), before)
    sketch.reset()
    assert_same(pending.result(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_reading_is_nan(kind: str) -> None:
    reading = KINDS[kind]().read_async(0.5).result()
    assert reading.count == 0
    assert all(value.isnan() for value in (reading.quantile, reading.mean, reading.std, reading.min, reading.max))


def test_counts_beyond_the_digits_of_a_float_are_read_exactly() -> None:
    sketch = xt.LossSketch()
    sketch.update(torch.tensor([1.0]))
    sketch.state[0, torch.argmax(sketch.state[0, 16:]) + 16] = 2**60 + 1
    assert sketch.read_async(0.5).result().count.item() == 2**60 + 1


@pytest.mark.parametrize("kind", KINDS)
def test_starting_to_read_reads_no_value_on_the_host(kind: str) -> None:
    """Under FakeTensorMode any read of a value raises; on a GPU it would wait."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        pending = KINDS[kind](groups=2).read_async(torch.rand(3))
    assert pending.ready()


class FakeEvent:
    """A device that has not come to the copy until somebody waits for it."""

    def __init__(self) -> None:
        self.reached = False

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.reached = True


def test_only_the_result_waits_for_the_event() -> None:
    event, sketch = FakeEvent(), filled("sketch")
    pending = PendingReading(sketch, torch.zeros(1, 2, dtype=torch.int64), (2,), event)
    assert not pending.ready()
    assert not event.reached
    pending.result()
    assert event.reached
    assert pending.ready()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\], got 1.5"):
        xt.LossSketch().read_async(1.5)
    with pytest.raises(ValueError, match="cubic is not a valid value for interpolation"):
        xt.LossSketch().read_async(0.5, interpolation="cubic")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_is_not_waited_for(kind: str) -> None:
    sketch, q = filled(kind, device="cuda"), torch.tensor(Q, dtype=torch.float64, device="cuda")
    wanted = expected(sketch, q)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)
        pending = sketch.read_async(q)
        assert not pending.ready()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(pending.result(), wanted)
    assert pending.ready()
