"""`quantile` over a process group equals np.quantile of all values together, on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import xentile as xt

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")

Q = [0.0, 0.1, 0.5, 0.8, 1.0]
SHARDS = {1: [1000], 2: [0, 777], 4: [5000, 0, 1, 333]}  # uneven, and with an empty rank
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def shards(world: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, generator=generator) * 2).to(dtype) for n in SHARDS[world]]


def expected(x: Tensor, **options: Any) -> Tensor:
    result = torch.from_numpy(np.quantile(x.double().numpy(), Q, **options))
    return result.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


@pytest.fixture
def on_ranks() -> Iterator[Callable[[int, Callable[[int], None]], None]]:
    """Runs a function of the rank on threads, each of which believes to be a process."""
    from torch.testing._internal.common_distributed import spawn_threads_and_init_comms
    from torch.testing._internal.distributed.multi_threaded_pg import _uninstall_threaded_pg

    def run(world: int, function: Callable[[int], None]) -> None:
        spawn_threads_and_init_comms(lambda _: function(dist.get_rank()), world_size=world)(None)

    yield run
    _uninstall_threaded_pg()


@pytest.mark.parametrize("world", SHARDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sharded_equals_whole(world: int, dtype: torch.dtype, on_ranks: Any) -> None:
    parts = shards(world, dtype)

    def rank(i: int) -> None:
        for interpolation in ("linear", "nearest", "median_unbiased"):
            actual = xt.quantile(parts[i], Q, interpolation=interpolation, process_group=dist.group.WORLD)
            assert torch.equal(actual, expected(torch.cat(parts), method=interpolation))

    on_ranks(world, rank)


def test_mask_and_weights_of_all_ranks_count(on_ranks: Any) -> None:
    parts = shards(4, torch.float32)
    masks = [torch.arange(len(p)) % 3 != 1 for p in parts]
    weights = [(torch.arange(len(p)) % 7 + i * 1000.0) for i, p in enumerate(parts)]  # the largest is on one rank
    whole, mask, weight = torch.cat(parts), torch.cat(masks), torch.cat(weights)

    def rank(i: int) -> None:
        actual = xt.quantile(parts[i], Q, mask=masks[i], process_group=dist.group.WORLD)
        assert torch.equal(actual, expected(whole[mask]))
        options = {"weights": weights[i], "interpolation": "inverted_cdf"}
        actual = xt.quantile(parts[i], Q, process_group=dist.group.WORLD, **options)
        assert torch.equal(actual, expected(whole, method="inverted_cdf", weights=weight.numpy()))

    on_ranks(4, rank)


def test_no_value_on_any_rank_gives_nan(on_ranks: Any) -> None:
    def rank(i: int) -> None:
        x = torch.rand(i)
        everything_masked = torch.zeros(i, dtype=torch.bool)
        assert xt.quantile(x, Q, mask=everything_masked, process_group=dist.group.WORLD).isnan().all()

    on_ranks(2, rank)


def test_a_nan_on_one_rank_is_seen_by_all(on_ranks: Any) -> None:
    def rank(i: int) -> None:
        x = torch.tensor([1.0, torch.nan]) if i == 1 else torch.tensor([2.0])
        assert xt.quantile(x, 0.5, process_group=dist.group.WORLD).isnan()
        assert xt.quantile(x, 0.5, nan_policy="omit", process_group=dist.group.WORLD) == 1.5
        with pytest.raises(ValueError, match="x has NaN values"):
            xt.quantile(x, 0.5, nan_policy="raise", process_group=dist.group.WORLD)

    on_ranks(2, rank)


def test_a_bad_weight_on_one_rank_raises_on_all(on_ranks: Any) -> None:
    def rank(i: int) -> None:
        weights = torch.tensor([1.0, -1.0 if i == 1 else 1.0])
        with pytest.raises(ValueError, match="weights must be finite"):
            xt.quantile(weights, 0.5, weights=weights, interpolation="inverted_cdf", process_group=dist.group.WORLD)

    on_ranks(2, rank)


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_exchanged_depends_on_neither_values_nor_ranks(
    world: int, on_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, **k: sizes.append(t.nbytes) or all_reduce(t, **k))
    parts = shards(world, torch.float32)
    on_ranks(world, lambda i: (xt.quantile(parts[i], 0.5, process_group=dist.group.WORLD), None)[1])
    assert sorted(sizes) == sorted([16 * 1024, 32 * 1024, 16 * 1024] * world)


def gathered_threshold(entropies: Tensor, mask: Tensor, share: float) -> Tensor:
    """What RL trainers do today: pad, gather everything everywhere, drop the padding, sort."""
    longest = torch.tensor(entropies.numel())
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padded = torch.full((int(longest),), torch.nan)
    padded[: int(mask.sum())] = entropies[mask]
    everything = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(everything, padded)
    return torch.nanquantile(torch.cat(everything), share)


def process(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        parts = shards(world, torch.float32)
        actual = xt.quantile(parts[rank], Q, process_group=dist.group.WORLD)
        assert torch.equal(actual, expected(torch.cat(parts)))
        entropies, mask = parts[rank].abs(), torch.arange(len(parts[rank])) % 5 != 0
        threshold = xt.quantile(entropies, 0.8, mask=mask, process_group=dist.group.WORLD)
        torch.testing.assert_close(threshold, gathered_threshold(entropies, mask, 0.8), rtol=1e-6, atol=0)
        subgroup = dist.new_group([world - 1])
        if rank == world - 1:
            assert torch.equal(xt.quantile(parts[rank], Q, process_group=subgroup), expected(parts[rank]))
        else:
            with pytest.raises(ValueError, match="process_group must contain this rank"):
                xt.quantile(parts[rank], Q, process_group=subgroup)
    finally:
        dist.destroy_process_group()


def test_separate_processes_replace_gather_and_quantile(tmp_path: pathlib.Path) -> None:
    torch.multiprocessing.spawn(process, args=(2, str(tmp_path / "store")), nprocs=2)
