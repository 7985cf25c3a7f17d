"""A sketch that was reduced over ranks is, on each of them and to the bit, the sketch of all their values."""

from __future__ import annotations

import datetime
import itertools
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributions import DISTRIBUTIONS

import xentile as xt
from xentile.distributed import all_reduce_
from xentile.streams import WindowedSketch

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

SHARDS = {
    1: [700],
    2: [0, 700],  # an empty rank
    4: [1, 0, 399, 300],
}


def on_ranks(ranks: int, body: Callable[[int], None]) -> None:
    """Run body(rank) on threads that are joined by a process group; the first exception of any is raised."""
    # Not at the top, because the two real processes import this module as well, and it takes long.
    from torch.testing._internal.common_distributed import spawn_threads_and_init_comms

    @spawn_threads_and_init_comms(world_size=ranks)
    def run(_: object) -> None:
        body(dist.get_rank())

    run(None)


def values_and_ids(groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = DISTRIBUTIONS["fine-tuned"](700)
    values[::50], values[1::50], values[2::50], values[3::50] = torch.inf, torch.nan, -3.0, 300.0
    return values, torch.arange(700) * 7 % groups


def shards_and_whole(ranks: int, **options: int) -> tuple[list[xt.LossSketch], xt.LossSketch]:
    """The sketch of each rank's part, and the sketch of everything."""
    groups = options.get("groups", 1)
    values, ids = values_and_ids(groups)
    weights = torch.rand(700, generator=torch.Generator().manual_seed(1)) if options.get("weighted") else None
    bounds = torch.tensor([0, *SHARDS[ranks]]).cumsum(0).tolist()
    shards = []
    for part in [slice(a, b) for a, b in itertools.pairwise(bounds)] + [slice(0, 700)]:
        sketch = xt.LossSketch(**options)
        own = None if weights is None else weights[part]
        sketch.update(values[part], weights=own, group_ids=ids[part])
        shards.append(sketch)
    return shards[:-1], shards[-1]


@pytest.mark.parametrize("ranks", SHARDS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("precision", [1, 7, 8])  # shorter than the first collective, as long, longer
@pytest.mark.parametrize("weighted", [False, True])
def test_reduced_shards_equal_the_whole(ranks: int, groups: int, precision: int, weighted: bool) -> None:
    shards, whole = shards_and_whole(ranks, groups=groups, precision=precision, weighted=weighted)
    merged = xt.LossSketch(groups=groups, precision=precision, weighted=weighted)
    merged.merge_many(shards)
    on_ranks(ranks, lambda rank: all_reduce_(shards[rank]))
    assert all(shard == merged == whole for shard in shards)


def test_ranks_without_any_token_stay_empty() -> None:
    sketches = [xt.LossSketch() for _ in range(2)]
    on_ranks(2, lambda rank: all_reduce_(sketches[rank]))
    assert all(sketch == xt.LossSketch() for sketch in sketches)
    assert sketches[0].min().isnan()


def test_the_state_keeps_its_memory() -> None:
    shards, _ = shards_and_whole(2)
    before = [shard.state.data_ptr() for shard in shards]
    on_ranks(2, lambda rank: all_reduce_(shards[rank]))
    assert [shard.state.data_ptr() for shard in shards] == before


def test_counts_beyond_two_to_the_53_add_up_exactly() -> None:
    sketches = [xt.LossSketch() for _ in range(4)]
    for sketch in sketches:
        sketch.state[0, 100] = 2**60 + 1
    on_ranks(4, lambda rank: all_reduce_(sketches[rank]))
    assert all(int(sketch.state[0, 100]) == 2**62 + 4 for sketch in sketches)


@pytest.mark.parametrize(
    ("options", "collectives"), [({}, 1), ({"precision": 3}, 1), ({"precision": 9}, 2), ({"groups": 5}, 2)]
)
@pytest.mark.parametrize("check", [True, False])
def test_the_default_takes_one_collective(
    options: dict[str, int], collectives: int, check: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = dist.all_reduce

    def counted(tensor: torch.Tensor, **options: object) -> object:
        calls.append(tensor.numel())
        return original(tensor, **options)

    shards, whole = shards_and_whole(2, **options)
    monkeypatch.setattr(dist, "all_reduce", counted)
    on_ranks(2, lambda rank: all_reduce_(shards[rank], check=check))
    assert len(calls) == 2 * collectives
    assert all(shard == whole for shard in shards)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"precision": 6}, "precision=6, groups=1, weighted=False on rank 2"),
        ({"precision": 10}, "precision=10, groups=1, weighted=False on rank 2"),
        ({"groups": 8}, "precision=7, groups=8, weighted=False on rank 2"),
        ({"weighted": True}, "precision=7, groups=1, weighted=True on rank 2"),
    ],
)
def test_a_rank_with_another_kind_of_sketch_is_an_error_on_every_rank(odd: dict[str, int], message: str) -> None:
    sketches = [xt.LossSketch(**(odd if rank == 2 else {})) for rank in range(4)]
    for sketch in sketches:
        sketch.update(torch.tensor([1.0]))
    before = [sketch.clone() for sketch in sketches]
    errors: list[str] = []

    def body(rank: int) -> None:
        with pytest.raises(ValueError, match="must have the same precision, groups and weighting") as caught:
            all_reduce_(sketches[rank])
        errors.append(str(caught.value))

    on_ranks(4, body)
    assert len(errors) == 4
    assert len(set(errors)) == 1
    assert message in errors[0]
    assert "precision=7, groups=1, weighted=False on ranks 0, 1, 3" in errors[0]
    assert sketches == before


def test_a_stream_of_reduced_steps_is_the_same_on_every_rank() -> None:
    values = DISTRIBUTIONS["pretraining"](400).view(4, 2, 50)  # step, rank, token
    streams, whole = [WindowedSketch(2) for _ in range(2)], WindowedSketch(2)

    def body(rank: int) -> None:
        for step in range(4):
            streams[rank].current.update(values[step, rank])
            all_reduce_(streams[rank].current)
            streams[rank].step()

    on_ranks(2, body)
    for step in range(4):
        whole.update(values[step])
    assert all(torch.equal(stream.state, whole.state) for stream in streams)


def test_only_a_sketch_is_reduced() -> None:
    with pytest.raises(TypeError, match="sketch must be a LossSketch, got Tensor"):
        all_reduce_(torch.zeros(3))  # type: ignore[arg-type]


def batch_of(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of one rank: rank 0 has 40 tokens, some of them ignored, rank 1 has none that counts."""
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(40, 101, generator=generator) * 3
    target = torch.randint(0, 101, (40,), generator=generator)
    target[: 40 if rank else 7] = -100
    return logits, target


def process(rank: int, folder: str) -> None:
    """One of two real processes. What goes wrong here is raised in the test by torch.multiprocessing."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", datetime.timedelta(seconds=60), rank=rank, world_size=2)
    sketch, whole = xt.LossSketch(), xt.LossSketch()
    logits, target = batch_of(rank)
    xt.cross_entropy(logits.requires_grad_(), target, sketch=sketch).loss.nan_to_num().backward()
    sketch.all_reduce_()
    for other in range(2):
        xt.cross_entropy(*batch_of(other), sketch=whole)
    assert sketch == whole
    assert (sketch.count(), sketch.ignored_count()) == (33, 47)

    alone = dist.new_group([0])  # of which rank 1 is no member
    if rank == 0:
        all_reduce_(sketch, alone)
        assert sketch == whole
    else:
        with pytest.raises(ValueError, match="process_group must contain this rank"):
            all_reduce_(sketch, alone)

    with pytest.raises(ValueError, match=r"precision=7, .* on rank 0; precision=9, .* on rank 1"):
        all_reduce_(xt.LossSketch(precision=9) if rank else sketch)
    all_reduce_(large := xt.LossSketch(precision=9, groups=2))  # after an error the ranks still agree
    assert large.count().tolist() == [0, 0]
    dist.destroy_process_group()


def test_two_processes_with_gloo_from_logits_to_percentiles(tmp_path: pathlib.Path) -> None:
    mp.spawn(process, args=(str(tmp_path),), nprocs=2)
