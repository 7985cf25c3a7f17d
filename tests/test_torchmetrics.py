"""`CrossEntropyQuantiles` keeps the conventions of TorchMetrics, and one all-reduce makes all ranks agree."""

from __future__ import annotations

import copy
import datetime
import importlib
import os
import pathlib
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.common_distributed import spawn_threads_and_init_comms

import xentile as xt

torchmetrics = pytest.importorskip("torchmetrics")

from xentile.integrations.torchmetrics import QUANTILES, CrossEntropyQuantiles  # noqa: E402

NAMES = ["mean_loss", "p1_loss", "p10_loss", "p25_loss", "p50_loss", "p75_loss", "p90_loss", "p99_loss"]


def batch(n: int = 200, v: int = 50, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, v, generator=g) * 3, torch.randint(0, v, (n,), generator=g)


def metric_of(*batches: tuple[torch.Tensor, torch.Tensor], **options: Any) -> CrossEntropyQuantiles:
    metric = CrossEntropyQuantiles(**options)
    for preds, target in batches:
        metric.update(preds, target)
    return metric


# --------------------------------------------------------------------------------------------------------------------
# values


def test_values_are_the_mean_and_the_percentiles_of_the_losses() -> None:
    preds, target = batch()
    losses = torch.nn.functional.cross_entropy(preds.double(), target, reduction="none").numpy()
    values = metric_of((preds, target)).compute()
    assert list(values) == NAMES
    assert all(value.shape == () and value.dtype == torch.float32 for value in values.values())
    assert values["mean_loss"].item() == pytest.approx(losses.mean(), rel=1e-6)
    for q, name in zip(QUANTILES, NAMES[1:], strict=True):
        assert values[name].item() == pytest.approx(np.quantile(losses, q), rel=2.0**-7)


def test_names_say_the_percentile() -> None:
    metric = metric_of(batch(), quantiles=(0.0, 0.07, 0.999, 1.0))
    assert list(metric.compute()) == ["mean_loss", "p0_loss", "p7_loss", "p99.9_loss", "p100_loss"]


def test_batches_equal_the_whole() -> None:
    preds, target = batch()
    parts = zip(preds.split([1, 150, 0, 49]), target.split([1, 150, 0, 49]), strict=True)
    assert torch.equal(metric_of(*parts).state, metric_of((preds, target)).state)


def test_ignored_targets_are_left_out() -> None:
    preds, target = batch()
    kept = target != 7
    assert metric_of((preds, target), ignore_index=7).compute() == metric_of((preds[kept], target[kept])).compute()


def test_logits_may_have_more_dimensions() -> None:
    preds, target = batch(240)
    folded = preds.reshape(10, 24, 50).movedim(-1, 1), target.reshape(10, 24)
    assert torch.equal(metric_of(folded).state, metric_of((preds, target)).state)


def test_update_from_loss_counts_the_same() -> None:
    preds, target = batch()
    metric = CrossEntropyQuantiles()
    metric.update_from_loss(xt.cross_entropy(preds, target).token_loss)
    assert torch.equal(metric.state, metric_of((preds, target)).state)


def test_update_from_loss_takes_a_mask_and_forgets_the_cached_value() -> None:
    metric = metric_of(batch())
    before = metric.compute()
    metric.update_from_loss(torch.tensor([[100.0, 200.0]]), torch.tensor([[True, False]]))
    assert metric.update_count == 2
    assert metric.sketch.max() == 100
    assert metric.compute()["mean_loss"] > before["mean_loss"]


def test_no_token_gives_nan() -> None:
    preds, _ = batch(3)
    values = metric_of((preds, torch.full((3,), -100))).compute()
    assert all(value.isnan() for value in values.values())


def test_logits_that_require_grad_get_no_graph_and_no_gradient() -> None:
    preds, target = batch()
    values = CrossEntropyQuantiles()(preds.requires_grad_(), target)
    assert not any(value.requires_grad for value in values.values())
    assert preds.grad is None


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\], got 50"):
        CrossEntropyQuantiles(quantiles=(50,))
    with pytest.raises(TypeError, match="ignore_index must be int, got NoneType"):
        CrossEntropyQuantiles(ignore_index=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unexpected keyword arguments: `quantile`"):
        CrossEntropyQuantiles(quantile=0.5)


# --------------------------------------------------------------------------------------------------------------------
# conventions of TorchMetrics


def test_class_attributes_are_those_of_a_metric_that_adds_up() -> None:
    assert CrossEntropyQuantiles.higher_is_better is False
    assert CrossEntropyQuantiles.full_state_update is False
    assert CrossEntropyQuantiles.is_differentiable is False


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_reset_forgets_everything() -> None:
    metric = metric_of(batch())
    metric.reset()
    assert torch.equal(metric.state, CrossEntropyQuantiles().state)
    assert metric.compute()["p50_loss"].isnan()


def test_forward_returns_the_batch_and_accumulates() -> None:
    first, second = batch(seed=1), batch(seed=2)
    metric = CrossEntropyQuantiles()
    assert metric(*first) == metric_of(first).compute()
    assert metric(*second) == metric_of(second).compute()
    assert torch.equal(metric.state, metric_of(first, second).state)


def test_merge_state_equals_the_whole() -> None:
    first, second = batch(seed=1), batch(seed=2)
    metric = metric_of(first)
    metric.merge_state(metric_of(second))
    assert torch.equal(metric.state, metric_of(first, second).state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_goes_on_by_itself(copied: Any) -> None:
    metric = metric_of(batch(seed=1))
    other = copied(metric)
    other.update(*batch(seed=2))
    assert torch.equal(metric.state, metric_of(batch(seed=1)).state)
    assert torch.equal(other.state, metric_of(batch(seed=1), batch(seed=2)).state)


def test_counts_survive_a_checkpoint() -> None:
    metric, loaded = metric_of(batch()), CrossEntropyQuantiles()
    loaded.load_state_dict(metric.state_dict())
    assert torch.equal(loaded.state, metric.state)


def test_changes_of_dtype_leave_the_counts_integers() -> None:
    metric = metric_of(batch())
    for changed in (metric.half(), metric.float(), metric.bfloat16(), metric.set_dtype(torch.float16)):
        assert changed.state.dtype == torch.int64


def test_a_collection_computes_the_state_once_for_all_quantiles() -> None:
    metrics = {"quartiles": CrossEntropyQuantiles((0.25, 0.75)), "tail": CrossEntropyQuantiles((0.999,))}
    collection = torchmetrics.MetricCollection(metrics, prefix="val/")
    for seed in (1, 2):
        collection.update(*batch(seed=seed))
    values = collection.compute()
    expected = metric_of(batch(seed=1), batch(seed=2), quantiles=(0.25, 0.75)).compute()
    assert {name: values[f"val/quartiles_{name}"] for name in expected} == expected
    assert "val/tail_p99.9_loss" in values
    assert len(collection.compute_groups) == 1


def test_a_tracker_takes_lower_for_better() -> None:
    tracker = torchmetrics.MetricTracker(torchmetrics.MetricCollection([CrossEntropyQuantiles()]), maximize=False)
    preds, target = batch()
    for scale in (2.0, 1.0, 3.0):
        tracker.increment()
        tracker.update(preds * scale, target)
    best, step = tracker.best_metric(return_step=True)
    assert set(best) == set(NAMES)
    assert step["mean_loss"] == step["p90_loss"] == 1


def test_plot_gives_a_figure_of_one_value_or_of_many() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    metric = CrossEntropyQuantiles()
    values = [metric(*batch(seed=seed)) for seed in range(3)]
    for shown in (None, values[0], values):
        figure, axes = metric.plot(shown)
        assert isinstance(figure, pyplot.Figure)
        assert [text.get_text() for text in axes.get_legend().get_texts()] == NAMES
        assert metric.plot(shown, ax=axes)[1] is axes
    pyplot.close("all")


def test_a_missing_torchmetrics_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.delitem(sys.modules, "xentile.integrations.torchmetrics")
    with pytest.raises(ImportError, match=r"xentile\[torchmetrics\]"):
        importlib.import_module("xentile.integrations.torchmetrics")


# --------------------------------------------------------------------------------------------------------------------
# ranks


SHARDS = ((300, 20), (0, 20))  # tokens of rank 0 and 1, in two evaluations: uneven, and an empty rank


def evaluate(rank: int) -> list[tuple[dict[str, torch.Tensor], bool]]:
    """What each rank computes, and whether its state is its own again."""
    results = []
    for sizes in SHARDS:
        metric = metric_of(batch(sizes[rank], seed=rank))
        own = metric.state.clone()
        results.append((metric.compute(), torch.equal(metric.state, own)))
    return results


def expected() -> list[tuple[dict[str, torch.Tensor], bool]]:
    return [(metric_of(*(batch(n, seed=rank) for rank, n in enumerate(sizes))).compute(), True) for sizes in SHARDS]


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("the metric must not call another collective")


def test_one_all_reduce_gives_each_rank_the_values_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, results, all_reduce = [], {}, dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda x, **kw: calls.append(dist.get_rank()) or all_reduce(x, **kw))
    for name in ("all_gather", "all_gather_into_tensor", "barrier", "broadcast", "gather"):
        monkeypatch.setattr(dist, name, refuse)

    @spawn_threads_and_init_comms(world_size=2)
    def run(_: object) -> None:
        results[dist.get_rank()] = evaluate(dist.get_rank())

    run(None)
    assert results[0] == results[1] == expected()
    assert sorted(calls) == [0, 0, 1, 1], "one for each evaluation of each rank"


def test_without_sync_on_compute_a_rank_reads_its_own() -> None:
    results = {}

    @spawn_threads_and_init_comms(world_size=2)
    def run(_: object) -> None:
        rank = dist.get_rank()
        results[rank] = metric_of(batch(seed=rank), sync_on_compute=False).compute()

    run(None)
    assert [results[rank] for rank in range(2)] == [metric_of(batch(seed=rank)).compute() for rank in range(2)]


OTHER_RANK = """
import sys, torch
import torch.distributed as dist
from xentile.integrations.torchmetrics import CrossEntropyQuantiles
folder, sizes = sys.argv[1], [int(n) for n in sys.argv[2:]]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=1, world_size=2)
values = []
for n in sizes:
    g = torch.Generator().manual_seed(1)  # as batch(n, seed=1)
    metric = CrossEntropyQuantiles()
    metric.update(torch.randn(n, 50, generator=g) * 3, torch.randint(0, 50, (n,), generator=g))
    values.append(metric.compute())
torch.save(values, folder + "/values")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_agree(tmp_path: pathlib.Path) -> None:
    """This process is rank 0 of two, joined by gloo."""
    source = pathlib.Path(xt.__file__).parent.parent
    sizes = [str(shard[1]) for shard in SHARDS]
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_RANK, str(tmp_path), *sizes], env={**os.environ, "PYTHONPATH": str(source)}
    )
    options = {"rank": 0, "world_size": 2, "timeout": datetime.timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", **options)
    try:
        results = evaluate(0)
    finally:
        dist.destroy_process_group()
        assert other.wait(60) == 0
    assert results == expected()
    assert torch.load(tmp_path / "values") == [values for values, _ in results]


def test_a_gather_of_ones_own_is_merged_alike() -> None:
    """As an integration does that brings its own dist_sync_fn: extremes must not be added up."""
    others = metric_of(batch(seed=2)).state
    metric = metric_of(
        batch(seed=1),
        dist_sync_fn=lambda state, group: [state, others],
        distributed_available_fn=lambda: True,
    )
    assert metric.compute() == metric_of(batch(seed=1), batch(seed=2)).compute()
    assert torch.equal(metric.state, metric_of(batch(seed=1)).state)
