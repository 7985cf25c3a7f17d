"""`pytest benchmarks/`: the "ci" cases through pytest-benchmark. Gated like every number; nothing is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.bytes import moved
from benchmarks.cases import Case, select
from benchmarks.gate import check
from benchmarks.inputs import make_inputs
from benchmarks.measure import IGNORED_IN_GATE
from benchmarks.providers import build, named
from benchmarks.step import STEPS

if TYPE_CHECKING:
    from benchmarks.provider import Provider

pytest.importorskip("pytest_benchmark")

NAMES = ["xentile", "xentile+sketch", "torch.eager"]
RUNS = [(c, p) for c in select("ci") for p in named(NAMES) if c.operation in p.operations]


@pytest.mark.parametrize(("case", "provider"), RUNS, ids=[f"{case.name}-{provider.name}" for case, provider in RUNS])
def test_loss(benchmark, case: Case, provider: Provider) -> None:  # type: ignore[no-untyped-def]
    ready, missing = build([provider], case, "cpu")
    if missing:
        pytest.skip(missing[0][1])
    verdict = check(case, ready, make_inputs(case, 0, "cpu", IGNORED_IN_GATE))[provider.name]
    assert verdict.passed, verdict.reason
    inputs = [make_inputs(case, seed, "cpu") for seed in range(1, 9)]
    turn = iter(range(1_000_000))

    def rotate() -> tuple[tuple[object, ...], dict[str, object]]:
        return (ready[0][1], *inputs[next(turn) % len(inputs)]), {}

    benchmark.pedantic(STEPS[case.operation], setup=rotate, rounds=30, warmup_rounds=3)
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = moved(case) / benchmark.stats.stats.median / 1e9
