"""Times of several steps, interleaved: every round runs each step once, so that a slow minute slows them all.

The order is shuffled from round to round (nobody always runs after the same neighbour), a step takes the next input
set each round, and what is compared is the ratio within a round. No mean is taken anywhere: medians, with the 20th
and 80th percentile as the spread, and for a ratio also the interval that holds its true median with 95 % probability.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Step = Callable[[int], object]  # runs once on input set i; what it returns is freed outside of the timed region
Clock = Callable[[Step, int], float]  # seconds of one run


def cpu_clock(step: Step, i: int) -> float:
    start = time.perf_counter()
    result = step(i)
    seconds = time.perf_counter() - start
    del result
    return seconds


class CudaClock:
    """Device time between two events, on a cold L2, with the host far enough ahead that its launches are not what is
    timed.

    A step that synchronises with the host still pays for it, as it would in training.
    """

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(2 * l2, dtype=torch.int8, device="cuda")

    def __call__(self, step: Step, i: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flush.fill_(i % 100)
        # Cycles: about a millisecond, in which the host queues the whole step.
        torch.cuda._sleep(2_000_000)
        start.record()
        result = step(i)
        end.record()
        torch.cuda.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else cpu_clock


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    clock: Clock,
    prepare: Mapping[str, Step] | None = None,
    warmup: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each step in each round. `prepare[name](i)` runs untimed before its step: new logits, where a step
    destroys them.
    """
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(-warmup, rounds):
        for name in order.sample(list(steps), len(steps)):
            if prepare and name in prepare:
                prepare[name](i + warmup)
            elapsed = clock(steps[name], i + warmup)
            if i >= 0:
                seconds[name].append(elapsed)
    return seconds


@dataclass(frozen=True)
class Spread:
    """A median, where the middle 60 % lie, and the 95 % interval of the median (low, high; from order statistics)."""

    median: float
    p20: float
    p80: float
    low: float
    high: float
    rounds: int


def spread(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    n = len(ordered)

    def at(q: float) -> float:
        return ordered[min(n - 1, max(0, math.floor(q * (n - 1) + 0.5)))]

    rank = max(0, math.floor((n - 1.96 * math.sqrt(n)) / 2))  # normal approximation of the binomial(n, 1/2)
    return Spread(statistics.median(ordered), at(0.2), at(0.8), ordered[rank], ordered[n - 1 - rank], n)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the round-by-round ratio."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])
