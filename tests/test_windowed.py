"""The sliding window: to the bit the sketch of its last steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import sketch_of, steps_of

import xentile as xt
from xentile.streams import Stream, WindowedSketch


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("precision", [5, 7])
def test_a_window_is_the_sketch_of_its_last_steps_to_the_bit(window: int, precision: int, device: torch.device) -> None:
    stream = WindowedSketch(window, device, precision=precision)
    past: list[torch.Tensor] = []
    for values in steps_of(11):
        past.append(values.to(device))
        stream.update(past[-1])
        assert torch.equal(stream.state, sketch_of(torch.cat(past[-window:]), precision=precision).state)


@given(st.lists(st.lists(st.floats(0, 400, width=32), max_size=5), max_size=12), st.integers(1, 6))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_window_of_any_steps_is_the_sketch_of_the_last(steps: list[list[float]], window: int) -> None:
    stream = WindowedSketch(window)
    for values in steps:
        stream.update(torch.tensor(values))
    last = torch.tensor([value for values in steps[-window:] for value in values])
    assert torch.equal(stream.state, sketch_of(last).state)


def test_a_window_forgets_an_extreme_that_falls_out() -> None:
    stream = WindowedSketch(2)
    for value in (100.0, 1.0, 2.0):
        stream.update(torch.tensor([value]))
    assert stream.max() == 2.0
    assert stream.quantile([0.0, 1.0]).tolist() == [1.0, 2.0]


def test_cross_entropy_feeds_the_running_step() -> None:
    stream, last = WindowedSketch(2), []
    for _ in range(4):
        logits, target = torch.randn(30, 11, requires_grad=True), torch.randint(0, 11, (30,))
        target[0] = -100
        out = xt.cross_entropy(logits, target, sketch=stream.current)
        out.loss.backward()
        stream.step()
        last.append(out.token_loss.detach()[1:])
    expected = sketch_of(torch.cat(last[-2:]))
    assert stream.ignored_count() == 2
    assert stream.count() == 58
    assert torch.equal(stream.quantile([0.1, 0.5, 1.0]), expected.quantile([0.1, 0.5, 1.0]))


@pytest.mark.parametrize("other", [WindowedSketch(4), WindowedSketch(3, groups=2), WindowedSketch(3, precision=6)])
def test_load_state_dict_refuses_another_kind_of_window(other: Stream) -> None:
    with pytest.raises(ValueError, match=r"must h(old|ave) (window=3|shape .*), got"):
        WindowedSketch(3).load_state_dict(other.state_dict())


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_no_step_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match=f"window must be at least 1, got {window}"):
        WindowedSketch(window)


def test_a_weighted_window_is_the_weighted_sketch_of_its_last_steps() -> None:
    stream, past = WindowedSketch(2, weighted=True), []
    for values in steps_of(7):
        past.append((values, torch.rand(len(values)) * 3))
        stream.update(values, weights=past[-1][1])
    last = xt.LossSketch(weighted=True)
    for values, weights in past[-2:]:
        last.update(values, weights=weights)
    assert torch.equal(stream.state, last.state)
    assert stream.count() == last.count()
    assert torch.equal(stream.quantile([0.1, 0.5, 0.9]), last.quantile([0.1, 0.5, 0.9]))


def test_an_interval_of_a_window_is_that_of_its_last_steps() -> None:
    stream, past = WindowedSketch(3), [torch.rand(200) for _ in range(5)]
    for values in past:
        stream.update(values)
    expected = sketch_of(torch.cat(past[-3:])).confidence_interval([0.1, 0.5])
    assert [end.tolist() for end in stream.confidence_interval([0.1, 0.5])] == [end.tolist() for end in expected]
