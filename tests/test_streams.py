"""What window and decay share: steps, groups, checkpoints, and that a step does nothing that a CUDA graph forbids."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from steps import steps_of
from torch.utils.checkpoint import checkpoint

import xentile as xt
from xentile import _layout as layout
from xentile.streams import DecayedSketch, WindowedSketch

STREAMS = {"window": lambda **o: WindowedSketch(3, **o), "decay": lambda **o: DecayedSketch(2.5, **o)}


@pytest.mark.parametrize("kind", STREAMS)
def test_groups_equal_separate_streams(kind: str, device: torch.device) -> None:
    stream = STREAMS[kind](device=device, groups=3)
    alone = [STREAMS[kind](device=device) for _ in range(3)]
    for values in steps_of(9):
        values, ids = values.to(device), torch.arange(len(values), device=device) % 2  # group 2 stays empty
        stream.update(values, group_ids=ids)
        for group in range(3):
            alone[group].update(values[ids == group])
    assert torch.equal(stream.state, torch.cat([one.state for one in alone]))
    assert stream.quantile([0.1, 0.9]).shape == (3, 2)
    if isinstance(stream, DecayedSketch):
        assert stream.effective_count().tolist() == [float(one.effective_count()) for one in alone]


@pytest.mark.parametrize("kind", STREAMS)
def test_micro_batches_of_one_step_are_one_step(kind: str) -> None:
    whole, parts = STREAMS[kind](), STREAMS[kind]()
    for values in steps_of(7):
        whole.update(values)
        for part in values.split(11):
            parts.current.update(part)
        parts.step()
    assert torch.equal(whole.state, parts.state)


@pytest.mark.parametrize("kind", STREAMS)
def test_mask_leaves_values_out(kind: str) -> None:
    masked, without = STREAMS[kind](), STREAMS[kind]()
    values, mask = torch.rand(40), torch.rand(40) < 0.5
    masked.update(values, mask)
    without.update(values[mask])
    assert torch.equal(masked.state, without.state)


@pytest.mark.parametrize("kind", STREAMS)
def test_recomputation_does_not_count_a_step_twice(kind: str) -> None:
    stream, once = STREAMS[kind](), STREAMS[kind]()

    def block(x: torch.Tensor) -> torch.Tensor:
        stream.update(x * x)
        return (x * x).sum()

    x = torch.rand(20, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).backward()
    once.update(x.detach() ** 2)
    assert torch.equal(stream.state, once.state)


@pytest.mark.parametrize("kind", STREAMS)
def test_every_buffer_keeps_its_memory(kind: str) -> None:
    stream = STREAMS[kind]()
    before = {name: buffer.data_ptr() for name, buffer in stream._buffers().items()}
    for values in steps_of(5):
        stream.update(values)
    stream.load_state_dict(stream.state_dict())
    stream.reset()
    assert before == {name: buffer.data_ptr() for name, buffer in stream._buffers().items()}
    assert not any(bool(buffer.any()) for buffer in stream._buffers().values())


@pytest.mark.parametrize("kind", STREAMS)
def test_a_step_reads_no_value_on_the_host(kind: str) -> None:
    """Under FakeTensorMode any read of a value raises; on a GPU it would wait, or break a graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        stream = STREAMS[kind](groups=2)
        for _ in range(2):
            stream.step()
    assert stream.state.shape == (2, layout.DEFAULT.width)


@pytest.mark.parametrize("kind", STREAMS)
def test_a_loaded_stream_goes_on_as_the_saved_one(kind: str, tmp_path: object) -> None:
    stream, loaded = STREAMS[kind](groups=2), STREAMS[kind](groups=2)
    for values in steps_of(5):
        stream.update(values)
    stream.current.update(torch.tensor([7.0]))  # in the middle of a step
    torch.save(stream.state_dict(), f"{tmp_path}/stream.pt")
    loaded.load_state_dict(torch.load(f"{tmp_path}/stream.pt", weights_only=True))
    others = [loaded, copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))]
    for one in (stream, *others):
        for values in steps_of(4):
            one.current.update(values)
            one.step()
    for one in others:
        assert all(torch.equal(b, one._buffers()[name]) for name, b in stream._buffers().items())


def test_load_state_dict_refuses_another_halflife_and_another_stream() -> None:
    with pytest.raises(ValueError, match=r"state_dict must hold halflife=3.0, got 2.0"):
        DecayedSketch(3).load_state_dict(DecayedSketch(2).state_dict())
    with pytest.raises(ValueError, match=r"state_dict must hold weighted=False, got True"):
        DecayedSketch(3).load_state_dict(DecayedSketch(3, weighted=True).state_dict())
    with pytest.raises(ValueError, match=r"state_dict must have the keys \[.*'window'\], got \[.*'weighted'\]"):
        WindowedSketch(3).load_state_dict(DecayedSketch(2).state_dict())


@pytest.mark.parametrize("kind", STREAMS)
def test_a_coarser_sketch_in_the_running_step_is_refused(kind: str) -> None:
    stream = STREAMS[kind]()
    stream.current.merge(xt.LossSketch(precision=5))
    with pytest.raises(ValueError, match="current must keep its precision of 7: a sketch of precision 5 was merged"):
        stream.step()


def test_repr_and_summary_are_readable() -> None:
    stream = DecayedSketch(2, groups=1, precision=6)
    stream.update(torch.tensor([1.0, 2.0]))
    assert repr(stream) == "DecayedSketch(halflife=2.0, weighted=False, groups=1, precision=6, device='cpu')"
    assert repr(WindowedSketch(5)) == "WindowedSketch(window=5, weighted=False, groups=1, precision=7, device='cpu')"
    assert stream.summary().splitlines()[1].split()[0] == "2.0"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", STREAMS)
def test_a_captured_step_replays_as_eager(kind: str) -> None:
    captured, eager = STREAMS[kind](device="cuda"), STREAMS[kind](device="cuda")
    values = torch.rand(1000, device="cuda")
    captured.update(values)  # compiles outside of the capture
    captured.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.update(values)
    captured.reset()
    for step in range(10):
        values.copy_(torch.rand(1000) * step)
        graph.replay()
        eager.update(values)
    assert torch.equal(captured.state, eager.state)
