"""`pytest benchmarks/`: the "ci" cases through pytest-benchmark. Gated like every number; nothing is stored."""

from __future__ import annotations

import pytest

from benchmarks.bytes import moved
from benchmarks.cases import Case, make_inputs, select
from benchmarks.gate import check
from benchmarks.measure import IGNORED_IN_GATE
from benchmarks.providers import Provider, build, named
from benchmarks.step import STEPS

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("provider", named(["xentile", "xentile+sketch", "torch.eager"]), ids=lambda p: p.name)
@pytest.mark.parametrize("case", select("ci"), ids=lambda case: case.name)
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
