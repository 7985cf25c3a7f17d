"""Sketches over ranks: one packed all-reduce, whose size does not depend on how many tokens there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from xentile import _check
from xentile import _layout as layout
from xentile.sketch import LossSketch

if TYPE_CHECKING:
    from torch import Tensor

HEADER = 3  # precision, groups, unit


def all_reduce_(sketch: LossSketch, process_group: dist.ProcessGroup | None = None, *, check: bool = True) -> None:
    """Merge the sketches of all ranks of a process group, in place: afterwards each rank holds the merge of all.

    The result is the one of `merge` in any order, to the bit. A rank without tokens takes part with zeros. One SUM
    all-reduce of int64 (33 KB) does it for a sketch of one group and precision 7 or less; a larger one takes a second.
    Works with every backend that sums int64 where the sketch lives (gloo, nccl).

    A second call would count what the ranks have in common once a rank. To keep on counting, reduce a `clone()`, or
    reduce the sketch of one step and merge it into the total.

    Args:
        sketch: this rank's; all ranks need the same precision, groups and weighting.
        process_group: the ranks that hold different tokens (data, context); by default all.
        check: compare precision, groups and weighting. This reads 24 bytes a rank back from the device and waits for
            them. Without it nothing waits, and sketches that differ give nonsense or hang.

    Raises:
        ValueError: on every rank, none of which is changed then, if the sketches differ.
    """
    _check.instance(sketch, "sketch", LossSketch)
    ranks, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    if rank < 0:
        raise ValueError("process_group must contain this rank")
    packed = _packed(sketch, ranks, rank)
    # All ranks must agree on the size of what they reduce before they know each other's sketches, hence a first part
    # that is as long as the default needs, whatever this sketch is. The second can be as long as the sketches are.
    first = torch.zeros(HEADER * ranks + layout.DEFAULT.width + 2 * ranks, dtype=torch.int64, device=sketch.device)
    head, body = first[: HEADER * ranks], first[HEADER * ranks :]
    for place, value in enumerate((sketch.precision, sketch.groups, sketch.unit), HEADER * rank):
        head[place] = value
    cut = min(len(body), len(packed))
    body[:cut] = packed[:cut]
    dist.all_reduce(first, group=process_group)
    if check:
        _same_kind(head.view(ranks, HEADER).tolist())
    packed[:cut] = body[:cut]
    if cut < len(packed):
        dist.all_reduce(packed[cut:], group=process_group)
    _unpack(packed, sketch.state)


def _packed(sketch: LossSketch, ranks: int, rank: int) -> Tensor:
    """The columns, which add up, and (ranks, G, 2) extremes, each rank's in a slot of its own between zeros."""
    size, slot = sketch.state.numel(), 2 * sketch.groups
    packed = torch.zeros(size + ranks * slot, dtype=torch.int64, device=sketch.device)
    packed[:size] = sketch.state.flatten()  # its sums of extremes mean nothing, and are not read
    packed[size + rank * slot : size + (rank + 1) * slot] = sketch.state[:, layout.EXTREMES].flatten()
    return packed


def _unpack(packed: Tensor, state: Tensor) -> None:
    size = state.numel()
    slots = packed[size:].view(-1, state.shape[0], 2)
    state.copy_(packed[:size].view_as(state))
    state[:, layout.EXTREMES] = slots.amax(0)


def _same_kind(kinds: list[list[int]]) -> None:
    """ValueError if the headers differ, with all the ranks that hold each kind of sketch."""
    if all(kind == kinds[0] for kind in kinds):
        return
    holders: dict[tuple[int, ...], list[int]] = {}
    for rank, kind in enumerate(kinds):
        holders.setdefault(tuple(kind), []).append(rank)
    got = "; ".join(
        f"precision={precision}, groups={groups}, weighted={unit != 1} on rank{'s' * (len(ranks) > 1)} "
        + ", ".join(map(str, ranks))
        for (precision, groups, unit), ranks in holders.items()
    )
    raise ValueError(f"sketches must have the same precision, groups and weighting on all ranks, got {got}")
