"""The benchmark suite's own promises: no number without a gate, nobody dropped in silence, no table out of date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import memory, plot, results, table, targets, worker
from benchmarks.bytes import moved, roof_steps, roofs
from benchmarks.cases import ALLOCATORS, CASES, DTYPES, OPERATIONS, Case, make_inputs, quick, select
from benchmarks.gate import check
from benchmarks.measure import Plan, Row, measure
from benchmarks.provenance import slug
from benchmarks.providers import Provider, build, named
from benchmarks.run import header, line, main
from benchmarks.step import Loss, training
from benchmarks.timing import interleave, ratio, spread

SMALL = Case("resnet50", 64, "float32", "training", ("headline",))
PLAN = Plan(seconds=0.01, min_rounds=3, max_rounds=3, pair_min_rounds=3)


def stored_row(provider: str, *, tokens: int = 1024, median: float = 0.1, device: str = "Some CPU, 2 threads") -> Row:
    """A row as run.py stores it, with round numbers."""
    middle = {"median": median, "p20": median, "p80": median, "low": median, "high": median, "rounds": 9}
    return {
        "case": f"llama3-8b/{tokens}/float32/training",
        "model": "llama3-8b",
        "tokens": tokens,
        "vocab": 128256,
        "dtype": "float32",
        "operation": "training",
        "allocator": "default",
        "tags": ["headline", "issue2"],
        "provider": provider,
        "ours": provider.startswith("xentile"),
        "status": "measured",
        "reason": "",
        "seconds": middle,
        "bytes_per_second": 1e10,
        "roofs": {"copy": 2e10},
        "of_roof": middle | {"median": 0.7},
        "speedup_over": {"torch.eager": middle | {"median": 9.5}, "torch.compile": middle | {"median": 4.25}},
        "logits_bytes": 1000,
        "peak_bytes": 1010,
        "errors": {"loss": 1e-8, "gradient": 2e-9, "off_target": 1e-7},
        "device": device,
        "kind": "cpu",
        "isa": "avx2",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc",
        "versions": {"torch": "2.13.0"},
    }


def store(folder: Path, *rows: Row) -> Path:
    results.append(folder / "some-cpu-2-threads.jsonl", rows)
    return folder


# Cases


def test_cases_have_different_names() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_names_a_known_model_dtype_operation_and_allocator(case: Case) -> None:
    assert case.vocab > 0
    assert case.dtype in DTYPES
    assert case.operation in OPERATIONS
    assert case.allocator in ALLOCATORS
    assert case.tags


def test_ci_cases_are_small() -> None:
    assert max(case.logits_bytes for case in select("ci")) <= 32 << 20


def test_every_target_of_issue_2_has_its_case_in_the_issue2_run() -> None:
    assert {target.case for target in targets.TARGETS} <= {case.name for case in select("issue2")}


def test_an_unknown_tag_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"cases must be one of .*headline.* or all, got fast"):
        select("fast")


def test_a_filter_keeps_the_cases_whose_name_contains_it() -> None:
    assert {case.model for case in select("all", "gpt2/")} == {"gpt2"}


def test_inputs_are_fresh_for_each_seed_and_equal_for_the_same() -> None:
    first, second, again = (make_inputs(SMALL, seed, "cpu")[0] for seed in (1, 2, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_inputs_hold_easy_and_hard_tokens() -> None:
    losses = F.cross_entropy(*make_inputs(SMALL, 0, "cpu"), reduction="none")
    assert losses.min() < 1e-2 < 3 < losses.max()


# Bytes


def test_training_moves_two_tensors_and_forward_one() -> None:
    forward = Case("resnet50", 64, "bfloat16", "forward")
    assert moved(forward) == 64 * 1000 * 2
    assert moved(SMALL) == 2 * 64 * 1000 * 4


def test_roofs_count_the_bytes_read_and_written() -> None:
    seconds = {"read/sum": 2.0, "read/amax": 1.0, "write": 1.0, "copy": 1.0, "clone": 4.0}
    n = SMALL.logits_bytes
    assert roofs(SMALL, seconds) == {"read": n, "write": n, "copy": 2 * n, "clone": n / 2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_read_roof_sees_every_byte(dtype: str) -> None:
    logits = torch.zeros(3, 7, dtype=DTYPES[dtype])[:2]
    logits[1, 6] = 2.0
    steps = roof_steps([(logits, torch.zeros(2))], logits.clone())
    assert steps["read/sum"](0) == steps["read/amax"](0) != 0


def test_the_roof_steps_do_what_they_are_named() -> None:
    inputs = [make_inputs(SMALL, 0, "cpu")]
    buffer = torch.empty_like(inputs[0][0])
    steps = roof_steps(inputs, buffer)
    steps["copy"](5)
    assert torch.equal(buffer, inputs[0][0])
    steps["write"](0)
    assert buffer.unique().tolist() == [1.5]


# The gate


def planted(loss: Loss, *, ours: bool = True) -> Provider:
    return Provider("planted", lambda case, device: loss, ours=ours)


def verdict(loss: Loss, dtype: str = "float32", operation: str = "training", *, ours: bool = True) -> bool:
    case = Case("resnet50", 64, dtype, operation)
    provider = planted(loss, ours=ours)
    return check(case, [(provider, loss)], make_inputs(case, 0, "cpu", ignored=0.1))["planted"].passed


class _Spoiled(torch.autograd.Function):
    """The right loss, with a gradient that `spoil` has changed."""

    @staticmethod
    def forward(ctx, logits, target, spoil):
        ctx.save_for_backward(logits, target)
        ctx.spoil = spoil
        return F.cross_entropy(logits, target)

    @staticmethod
    def backward(ctx, dloss):
        logits, target = ctx.saved_tensors
        gradient = torch.softmax(logits, 1)
        gradient[torch.arange(len(target)), target.clamp_min(0)] -= 1
        gradient *= ((target != -100) / (target != -100).sum())[:, None]
        ctx.spoil(gradient)
        return gradient * dloss, None, None


def spoiled(spoil) -> Loss:
    return lambda logits, target: _Spoiled.apply(logits, target, spoil)


def test_the_gate_passes_eager_itself() -> None:
    assert all(verdict(F.cross_entropy, dtype, op) for dtype in DTYPES for op in OPERATIONS)


def test_the_gate_passes_a_gradient_that_was_not_spoiled() -> None:
    assert verdict(spoiled(lambda gradient: None))


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "peer"])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, t: F.cross_entropy(x, t) * 1.001,
        lambda x, t: F.cross_entropy(x, t, reduction="sum") / len(t),
        lambda x, t: F.cross_entropy(x, t) * float("nan"),
        spoiled(lambda gradient: gradient[:, -1].zero_()),
        spoiled(lambda gradient: gradient[5].neg_()),
        spoiled(lambda gradient: gradient[7, 13].fill_(float("nan"))),
    ],
    ids=["scaled", "ignored tokens counted", "nan", "column not written", "row of wrong sign", "nan element"],
)
def test_the_gate_refuses_another_function(loss: Loss, ours: bool) -> None:
    assert not verdict(loss, ours=ours)


def test_the_gate_holds_us_to_the_contract_and_a_peer_to_the_same_function() -> None:
    def slightly_off(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.double(), target) * (1 + 4e-7)

    assert not verdict(slightly_off, operation="forward", ours=True)
    assert verdict(slightly_off, operation="forward", ours=False)


def test_a_provider_that_raises_is_refused_with_its_message() -> None:
    def broken(logits: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no kernel\nsecond line")

    (row,) = measure(SMALL, [planted(broken)], "cpu", PLAN)
    assert (row["status"], row["reason"]) == ("refused", "RuntimeError: no kernel")


def test_a_refused_provider_gets_no_time() -> None:
    (row,) = measure(SMALL, [planted(lambda x, t: F.cross_entropy(x, t) * 2)], "cpu", PLAN)
    assert row["status"] == "refused"
    assert "seconds" not in row


# Providers


def test_missing_peers_are_listed_with_reasons() -> None:
    asked = named(
        ["liger", "quack", "flash-attention", "apple-cce", "torch.linear_cross_entropy", "torch.eager-upcast"]
    )
    ready, missing = build(asked, SMALL, "cpu")
    assert (ready, len(missing)) == ([], len(asked))
    rows = measure(SMALL, asked, "cpu", PLAN)
    assert all(row["status"] == "missing" and row["reason"] in line(row) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "fast"], "cases must be one of"),
        (["--providers", "tourch"], "providers must be among"),
        (["--filter", "gpt17"], "no case with tag issue2 matches gpt17"),
    ],
)
def test_a_wrong_argument_stops_the_run_with_a_message(arguments, message, capsys) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_provider_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"providers must be among .*torch\.eager.*, got tourch"):
        named(["tourch"])


def test_the_gradient_arrives_at_the_model() -> None:
    logits, target = make_inputs(SMALL, 0, "cpu")
    leaf = logits.clone().requires_grad_()
    F.cross_entropy(leaf, target).backward()
    loss, gradient = training(F.cross_entropy, logits, target)
    assert torch.equal(gradient, leaf.grad)
    assert not loss.requires_grad


# Timing


def test_timing_interleaves_and_shuffles() -> None:
    seen: list[str] = []
    steps = {name: lambda i, name=name: seen.append(name) for name in "abc"}
    interleave(steps, 20, lambda step, i: step(i) or 1.0)
    rounds = ["".join(seen[k : k + 3]) for k in range(0, len(seen), 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 3


def test_a_step_takes_the_next_input_each_round_and_is_prepared_untimed() -> None:
    events: list[tuple[str, int]] = []

    def clock(step, i: int) -> float:
        step(i)
        return 1.0

    seconds = interleave(
        {"a": lambda i: events.append(("run", i))}, 2, clock, {"a": lambda i: events.append(("prepare", i))}, warmup=1
    )
    assert events == [(what, i) for i in range(3) for what in ("prepare", "run")]
    assert seconds == {"a": [1.0, 1.0]}


def test_spread_holds_the_median_inside_its_interval() -> None:
    s = spread([float(k) for k in range(101)])
    assert (s.median, s.p20, s.p80, s.rounds) == (50.0, 20.0, 80.0, 101)
    assert 35 <= s.low < 50 < s.high <= 65


def test_a_ratio_is_taken_within_rounds() -> None:
    slow_minute = [1.0, 10.0, 1.0, 10.0, 1.0]
    assert ratio([2 * t for t in slow_minute], slow_minute).median == 2.0


# Two commits


def test_a_worker_answers_a_case_and_times_its_steps(monkeypatch, capsys) -> None:
    xentile = pytest.importorskip("xentile")
    requests = [{"case": ["resnet50", 16, "float32", "training"]}, {"run": 0}, {"run": 1}]
    monkeypatch.setattr("sys.stdin", [json.dumps(request) for request in requests])
    worker.main(str(Path(xentile.__file__).parent), str(torch.get_num_threads()))
    made, first, second = map(float, capsys.readouterr().out.split())
    assert made == 0.0 < min(first, second)


def test_a_worker_refuses_the_xentile_of_the_other_side(tmp_path: Path) -> None:
    pytest.importorskip("xentile")
    with pytest.raises(RuntimeError, match="xentile must come from the side's own folder"):
        worker.main(str(tmp_path), "1")


# Memory


def test_peak_memory_counts_what_lives_at_the_same_time() -> None:
    size = 64 << 20

    def step() -> Tensor:
        first = torch.ones(size, dtype=torch.uint8)
        second = first + 1
        del first
        return second.add_(1)

    peak = memory.peak(step, "cpu")
    if peak is None:
        pytest.skip("this system does not show a process's peak memory")
    assert peak == pytest.approx(2 * size, rel=0.1)


# Rows, table, figure


@pytest.fixture(scope="module")
def measured() -> list[Row]:
    providers = named(["xentile", "torch.eager"])
    return measure(quick(SMALL), providers, "cpu", PLAN)


def test_a_measured_row_can_be_stored_and_printed(measured: list[Row]) -> None:
    eager = next(row for row in measured if row["provider"] == "torch.eager")
    assert json.loads(json.dumps(eager)) == eager
    assert eager["speedup_over"]["torch.eager"]["median"] == 1.0
    assert eager["of_roof"]["median"] > 0
    assert "GB/s" in line(eager)
    assert SMALL.model in header(measured)


def test_results_keep_the_newest_row_of_each_provider(tmp_path: Path) -> None:
    store(tmp_path, stored_row("xentile", median=0.3), stored_row("torch.eager"), stored_row("xentile", median=0.2))
    assert [(row["provider"], row["seconds"]["median"]) for row in results.load(tmp_path)] == [
        ("xentile", 0.2),
        ("torch.eager", 0.1),
    ]


def test_the_table_shows_what_is_stored(tmp_path: Path) -> None:
    shown = table.render_table(
        store(tmp_path, stored_row("xentile", median=0.2), stored_row("torch.eager", median=1.9))
    )
    assert (
        "| 1024 x 128256 float32 | forward + backward | 200 ms | 1900 ms | **9.5x** | **4.2x** | 70 % | 1.01 |" in shown
    )
    assert "**Some CPU, 2 threads**, avx2 kernels, torch 2.13.0, 2026-01-02, commit abc." in shown


def test_the_table_lists_who_was_not_compared(tmp_path: Path) -> None:
    absent = stored_row("liger") | {"status": "missing", "reason": "liger_kernel is not installed"}
    shown = table.render_table(store(tmp_path, stored_row("xentile"), absent))
    assert "Not compared: liger (liger_kernel is not installed)." in shown


def test_the_table_says_so_when_there_are_no_results(tmp_path: Path) -> None:
    assert table.render_table(tmp_path) == f"{table.NO_RESULTS}\n\n{table.NO_GPU}\n"


def test_the_table_reports_what_percentiles_cost(tmp_path: Path) -> None:
    cost = {"cost_over_xentile": {"median": 1.002, "low": 0.999, "high": 1.004}}
    shown = table.render_table(store(tmp_path, stored_row("xentile+sketch") | cost))
    assert "float32 training +0.20 % [-0.10 %, +0.40 %]." in shown


def test_a_stale_readme_is_brought_up_to_date(tmp_path: Path) -> None:
    store(tmp_path, stored_row("xentile"))
    stale = f"before\n{table.START}\nold\n{table.END}\nafter\n"
    fresh = table.current(stale, tmp_path)
    assert fresh == f"before\n{table.START}\n{table.render_table(tmp_path)}{table.END}\nafter\n"
    assert table.current(fresh, tmp_path) == fresh


def test_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold"):
        table.current("no markers")


def test_readme_table_is_current() -> None:
    if not table.README.exists() or table.START not in (text := table.README.read_text(encoding="utf-8")):
        pytest.skip("README.md has no benchmark section")
    assert table.current(text) == text, "run python -m benchmarks.table --write"


def test_the_figure_is_current() -> None:
    pytest.importorskip("PIL")
    assert plot.is_current(), "run python -m benchmarks.plot"


def test_the_figure_knows_when_it_is_stale(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot.is_current(tmp_path)
    store(tmp_path, stored_row("xentile"), stored_row("torch.eager"))
    assert not plot.is_current(tmp_path)
    assert plot.draw(tmp_path) == tmp_path / plot.FIGURE
    assert plot.is_current(tmp_path)
    changed = stored_row("xentile")
    store(tmp_path, changed | {"of_roof": changed["of_roof"] | {"median": 0.5}})
    assert not plot.is_current(tmp_path)


def test_the_targets_are_held_against_the_rows() -> None:
    lines = targets.report([stored_row("xentile")]).splitlines()
    assert len(lines) == len(targets.TARGETS)
    assert lines[0].split()[-4:] == ["9.50x", ">=", "9x", "met"]
    assert lines[1].split()[-4:] == ["4.25x", ">=", "4.5x", "MISSED"]
    assert lines[3].split()[-5:] == ["not", "measured", ">=", "65%", "-"]


def test_a_device_name_makes_a_file_name() -> None:
    assert slug("AMD EPYC(tm) 7B13, 2 threads") == "amd-epyc-tm-7b13-2-threads"
