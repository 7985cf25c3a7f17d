"""The benchmark suite's own promises: cases are data, nobody is dropped in silence, times are taken side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import memory, targets
from benchmarks.bytes import moved, roof_steps, roofs
from benchmarks.cases import ALLOCATORS, CASES, DTYPES, OPERATIONS, Case, select
from benchmarks.inputs import make_inputs
from benchmarks.measure import Plan, measure
from benchmarks.provenance import REPOSITORY, slug
from benchmarks.providers import build, named
from benchmarks.run import line, main
from benchmarks.step import training
from benchmarks.timing import interleave, ratio, spread

SMALL = Case("resnet50", 64, "float32", "training", ("headline",))
PLAN = Plan(seconds=0.01, min_rounds=3, max_rounds=3, pair_min_rounds=3)


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


@pytest.mark.parametrize("issue", targets.TARGETS)
def test_every_target_of_an_issue_has_its_case_in_the_run_of_that_issue(issue: str) -> None:
    assert {target.case for target in targets.TARGETS[issue]} <= {case.name for case in select(issue)}


def test_the_gpu_run_ends_with_the_cases_that_no_target_needs() -> None:
    needed = {target.case for target in targets.TARGETS["gpu"]}
    assert [case.operation for case in select("gpu")[-4:] if case.name not in needed] == [
        "teacher_topk",
        "distillation",
        "forward",
        "training",
    ]


def test_the_percentile_targets_of_a_gpu_are_measured_by_the_suite_of_percentiles() -> None:
    pytest.importorskip("xentile")
    from benchmarks.quantile import COMPARISONS

    goals = {(c.operation, c.values): c.goal for c in COMPARISONS if c.device == "cuda"}
    assert goals == {("sketch update", 2**24): 45e-6, ("exact, 5 quantiles", 2**24): 8}


@pytest.mark.parametrize(("operation", "verdict"), [("forward", ">= 92% MISSED"), ("training", ">= 88% met")])
def test_a_gpu_target_is_a_fraction_of_the_copy_measured_in_the_same_rounds(operation: str, verdict: str) -> None:
    case = f"llama3-8b/8192/bfloat16/{operation}"
    row = {"case": case, "provider": "xentile", "status": "measured", "seconds": {"median": 1.4e-3}}
    row |= {"bytes_per_second": 2.7e12, "roofs": {"copy": 3e12, "read": 3.5e12}}
    report = [" ".join(line.split()) for line in targets.report("gpu", [row]).splitlines()]
    assert f"bfloat16, {operation}, 8192 x 128256: of copy_ 90.00% {verdict}" in report


def test_the_targets_of_a_stored_run_are_printed_from_its_file(tmp_path, capsys) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    targets.main(str(rows), "gpu")
    assert capsys.readouterr().out.count("not measured") == len(targets.TARGETS["gpu"])


def test_the_gpu_script_stops_with_one_line_where_no_gpu_can_be_seen(tmp_path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu.sh needs a GPU that torch can see, there is none\n"


def test_several_tags_choose_the_cases_of_each() -> None:
    assert len(select("issue2,issue4")) == len(select("issue2")) + len(select("issue4"))


def test_an_unknown_tag_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"cases must be one of .*headline.* or all, got fast"):
        select("ci,fast")


def test_a_filter_keeps_the_cases_whose_name_contains_it() -> None:
    assert {case.model for case in select("all", "gpt2/")} == {"gpt2"}


def test_inputs_are_fresh_for_each_seed_and_equal_for_the_same() -> None:
    first, second, again = (make_inputs(SMALL, seed, "cpu")[0] for seed in (1, 2, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


TOPK = Case("llama2c-tok4096", 8, "float32", "topk_distillation", k=5, support="tail_bucket", temperature=2.0)


def test_a_sparse_teacher_has_different_ids_with_the_target_among_them_by_falling_probability() -> None:
    _, target, ids, logprobs, _, _ = make_inputs(TOPK, 0, "cpu")
    assert all(len(set(row)) == TOPK.k and t in row for row, t in zip(ids.tolist(), target.tolist(), strict=True))
    assert 0 <= ids.min() <= ids.max() < TOPK.vocab
    assert (logprobs.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_masses_of_a_sparse_teacher_sum_to_1_at_its_temperature(temperature: float) -> None:
    *_, logprobs, log_z, tail = make_inputs(replace(TOPK, temperature=temperature), 0, "cpu")
    masses = (logprobs / temperature - log_z[:, None]).exp().sum(1) + tail.exp()
    torch.testing.assert_close(masses, torch.ones(TOPK.tokens), rtol=0, atol=1e-6)


def test_inputs_hold_easy_and_hard_tokens() -> None:
    losses = F.cross_entropy(*make_inputs(SMALL, 0, "cpu"), reduction="none")
    assert losses.min() < 1e-2 < 3 < losses.max()


# Bytes


def test_training_moves_two_tensors_and_forward_one() -> None:
    forward = Case("resnet50", 64, "bfloat16", "forward")
    assert moved(forward) == 64 * 1000 * 2
    assert moved(SMALL) == 2 * 64 * 1000 * 4


def test_a_dense_teacher_is_read_as_well() -> None:
    assert moved(replace(SMALL, operation="distillation")) == 3 * 64 * 1000 * 4


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


# Providers


def test_missing_peers_are_listed_with_reasons() -> None:
    names = ["liger", "quack", "flash-attention", "apple-cce", "torch.linear_cross_entropy", "torch.eager-upcast"]
    asked = named(names)
    ready, missing = build(asked, SMALL, "cpu")
    assert (ready, sorted(provider.name for provider, _ in missing)) == ([], sorted(names))
    rows = measure(SMALL, asked, "cpu", PLAN)
    assert all(row["status"] == "missing" and row["reason"] in line(row) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "fast"], "cases must be one of"),
        (["--providers", "tourch"], "providers must be among"),
        (["--cases", "ci", "--filter", "gpt17"], "no case with tag ci matches gpt17"),
    ],
)
def test_a_wrong_argument_stops_the_run_with_a_message(arguments, message, capsys) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_every_operation_has_ours_and_plain_pytorch() -> None:
    for operation in OPERATIONS:
        assert {"xentile", "torch.eager"} <= {p.name for p in named([]) if operation in p.operations}


def test_a_case_has_only_the_providers_of_its_operation() -> None:
    ready, missing = build(named(["xentile.cross_entropy", "liger", "liger.jsd"]), TOPK, "cpu")
    assert ([p.name for p, _ in ready], [p.name for p, _ in missing]) == (["xentile.cross_entropy"], ["liger"])
    assert missing[0][1] == "it has no loss against a teacher's top K"


def test_the_suite_of_percentiles_lists_its_peers(capsys) -> None:
    pytest.importorskip("xentile")
    assert main(["--suite", "percentiles", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(peer in listed for peer in ("torch.quantile", "np.partition", "ddsketch"))


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


def test_a_device_name_makes_a_file_name() -> None:
    assert slug("AMD EPYC(tm) 7B13, 2 threads") == "amd-epyc-tm-7b13-2-threads"
