"""One case, measured: gate, times beside the roofs in the same rounds, peak memory. Returns rows ready to be stored."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import memory
from benchmarks.bytes import ROOF_OF, ROOF_TENSORS, TENSORS, moved, roof_steps, roofs
from benchmarks.gate import check
from benchmarks.inputs import Inputs, make_inputs
from benchmarks.providers import build
from benchmarks.step import STEPS, Loss
from benchmarks.timing import Spread, Step, clock_for, interleave, ratio, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.cases import Case
    from benchmarks.errors import Verdict
    from benchmarks.provider import Provider

Row = dict[str, Any]
IGNORED_IN_GATE = 0.05  # the timed inputs have none: rows that nobody reads would flatter everybody


@dataclass(frozen=True)
class Plan:
    """How long to measure. The rounds fill `seconds`, within the limits."""

    seconds: float = 10.0
    min_rounds: int = 7
    max_rounds: int = 301
    pair_seconds: float = 20.0
    pair_min_rounds: int = 41

    def rounds(self, round_seconds: float) -> int:
        return min(self.max_rounds, max(self.min_rounds, int(self.seconds / round_seconds)))

    def pair_rounds(self, round_seconds: float) -> int:
        return max(self.pair_min_rounds, min(self.max_rounds, int(self.pair_seconds / round_seconds)))


QUICK = Plan(seconds=1.0, min_rounds=3, max_rounds=9, pair_seconds=1.0, pair_min_rounds=5)


def measure(case: Case, providers: Sequence[Provider], device: str, plan: Plan) -> list[Row]:
    """A row for every provider: measured, refused by the gate, or missing with the reason."""
    with memory.allocator(case.allocator):
        ready, missing = build(providers, case, device)
        verdicts = check(case, ready, make_inputs(case, 0, device, IGNORED_IN_GATE))
        passed = [(p, loss) for p, loss in ready if verdicts[p.name].passed]
        inputs = [make_inputs(case, 1 + i, device) for i in range(_input_sets(case, device))]
        rows = _timed(case, passed, verdicts, inputs, device, plan)
    refused = [
        _row(case, p, "refused", verdicts[p.name].reason, verdicts[p.name]) for p, _ in ready if p.name not in rows
    ]
    return [*rows.values(), *refused, *(_row(case, p, "missing", reason) for p, reason in missing)]


def _timed(
    case: Case,
    passed: Sequence[tuple[Provider, Loss]],
    verdicts: dict[str, Verdict],
    inputs: Sequence[Inputs],
    device: str,
    plan: Plan,
) -> dict[str, Row]:
    clock = clock_for(device)
    # What is in use before the roofs' buffer and the scratch logits exist does not matter: peak() takes the difference.
    peaks = {p.name: _peak(case, p, loss, inputs[0], device) for p, loss in passed}
    buffer = torch.empty_like(inputs[0][0])
    steps, prepare = _steps(case, passed, inputs, buffer, device)
    trial = interleave(steps, 1, clock, prepare)
    rounds = plan.rounds(sum(times[0] for times in trial.values()))
    seconds = interleave(steps, rounds, clock, prepare, warmup=0)
    measured_roofs = roofs(case, {name: spread(times).median for name, times in seconds.items()})
    rows = {}
    for provider, _ in passed:
        row = _row(case, provider, "measured", "", verdicts[provider.name])
        rows[provider.name] = row | {
            "seconds": asdict(spread(seconds[provider.name])),
            "bytes_per_second": moved(case) / spread(seconds[provider.name]).median,
            "roofs": measured_roofs,
            "of_roof": asdict(_of_roof(case, seconds, provider.name)),
            "speedup_over": {
                peer.name: asdict(ratio(seconds[peer.name], seconds[provider.name]))
                for peer, _ in passed
                if not peer.ours
            },
            "cost_over": {
                yardstick.name: asdict(ratio(seconds[provider.name], seconds[yardstick.name]))
                for yardstick, _ in passed
                if yardstick.yardstick and yardstick.overwrites_logits == provider.overwrites_logits
            },
            "peak_bytes": peaks[provider.name],
        }
    if "percentiles" in case.tags and {"xentile", "xentile+sketch"} <= rows.keys():
        pair = {name: steps[name] for name in ("xentile", "xentile+sketch")}
        rounds = plan.pair_rounds(sum(spread(seconds[name]).median for name in pair))
        times = interleave(pair, rounds, clock, warmup=1)
        rows["xentile+sketch"]["cost_over_xentile"] = asdict(ratio(times["xentile+sketch"], times["xentile"]))
    return rows


def _steps(
    case: Case, passed: Sequence[tuple[Provider, Loss]], inputs: Sequence[Inputs], buffer: Tensor, device: str
) -> tuple[dict[str, Step], dict[str, Step]]:
    """The steps to time, and what must run before those that destroy their logits."""
    run = STEPS[case.operation]
    scratch = torch.empty_like(buffer) if any(p.overwrites_logits for p, _ in passed) else buffer
    evict = torch.zeros(2 * last_level_cache(device), dtype=torch.uint8, device=device)

    def restore(i: int) -> None:
        scratch.copy_(inputs[i % len(inputs)][0])
        evict.add_(1)  # the copy must not leave the scratch logits in the cache

    def step_of(provider: Provider, loss: Loss) -> Step:
        if provider.overwrites_logits:
            return lambda i: run(loss, scratch, *inputs[i % len(inputs)][1:])
        return lambda i: run(loss, *inputs[i % len(inputs)])

    steps: dict[str, Step] = {p.name: step_of(p, loss) for p, loss in passed}
    return steps | roof_steps(inputs, buffer), {p.name: restore for p, _ in passed if p.overwrites_logits}


def _of_roof(case: Case, seconds: dict[str, list[float]], name: str) -> Spread:
    """The fraction of the roof, round by round: the bytes that the operation must move, at the roof's speed."""
    roof = ROOF_OF[case.operation]
    faster = min("read/sum", "read/amax", key=lambda read: spread(seconds[read]).median) if roof == "read" else roof
    scale = TENSORS[case.operation] / ROOF_TENSORS[roof]
    return ratio([scale * s for s in seconds[faster]], seconds[name])


def _peak(case: Case, provider: Provider, loss: Loss, inputs: Inputs, device: str) -> int | None:
    if case.allocator != "default":
        return None  # memory that is never given back can't be told from memory in use
    logits, *others = inputs
    if provider.overwrites_logits:
        logits = logits.clone()
    step: Callable[[], object] = lambda: STEPS[case.operation](loss, logits, *others)  # noqa: E731
    step()
    return memory.peak(step, device)


def _row(case: Case, provider: Provider, status: str, reason: str, verdict: Verdict | None = None) -> Row:
    row: Row = asdict(case) | {
        "case": case.name,
        "options": case.options,
        "vocab": case.vocab,
        "logits_bytes": case.logits_bytes,
    }
    row |= {"provider": provider.name, "ours": provider.ours, "status": status, "reason": reason}
    row["tags"] = list(case.tags)
    if verdict is not None:
        row |= {"errors": asdict(verdict.errors), "budget": asdict(verdict.budget)}
    return row


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s.removesuffix("K")) * 1024 for s in sizes if s.endswith("K")), default=32 << 20)


def _input_sets(case: Case, device: str) -> int:
    """How many input sets to rotate through: together they are four times the largest cache."""
    return min(64, max(2, -(-4 * last_level_cache(device) // case.logits_bytes)))


def release() -> None:
    """Between cases: gives back what the last one used, so that the next one starts as if alone."""
    gc.collect()
    memory.trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
