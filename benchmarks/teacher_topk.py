"""teacher_topk on the CPU against what is used today: `python -m benchmarks.teacher_topk [--rounds 5]`.

Prints how many times as long torch.topk and torch.logsumexp take, which give neither the tail nor other temperatures,
and how long xt.cross_entropy takes on the same logits: one read and one exponential each, with nothing selected. Steps
are interleaved, and results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor

import xentile as xt
from benchmarks.provenance import commit
from benchmarks.timing import Step, cpu_clock, interleave, ratio, spread

ROWS, COLUMNS = 1024, 128256


class Case(NamedTuple):
    name: str
    k: int = 64
    dtype: torch.dtype = torch.float32
    temperatures: tuple[float, ...] = (1.0,)
    rising: bool = False  # every logit is larger than all before it: the worst case for a selection
    target: float | None = None

    def logits(self) -> Tensor:
        x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).mul_(3)
        if self.rising:
            x.copy_(x[0].sort().values)
        return x.to(self.dtype)


CASES = [
    Case("float32, K = 64", target=4),
    Case("float32, K = 1024", k=1024),
    Case("float32, K = 64, T = 1, 2, 4", temperatures=(1.0, 2.0, 4.0)),
    Case("bfloat16, K = 64", dtype=torch.bfloat16),
    Case("float32, K = 64, rising", rising=True),
]


def today(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    lse = torch.logsumexp(x, 1, keepdim=True)
    values, ids = torch.topk(x, k)
    return values - lse, ids


def check(x: Tensor, k: int) -> None:
    logprobs, _ = today(x[:4].double(), k)
    error = (xt.teacher_topk(x[:4], k).logprobs - logprobs).abs().max()
    assert error < 1e-5, "xt.teacher_topk is wrong: nothing is timed"


def steps(case: Case, x: Tensor) -> dict[str, Step]:
    target = torch.randint(0, COLUMNS, (ROWS,), generator=torch.Generator().manual_seed(1))
    return {
        "ours": lambda _: xt.teacher_topk(x, case.k, temperatures=case.temperatures),
        "today": lambda _: today(x, case.k),
        "cross_entropy": lambda _: xt.cross_entropy(x, target),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(
        f"commit {commit()}, {torch.get_num_threads()} threads, {rounds} rounds, {ROWS} x {COLUMNS}; median, and 20th "
        "to 80th percentile"
    )
    for case in CASES:
        x = case.logits()
        check(x, case.k)
        seconds = interleave(steps(case, x), rounds, cpu_clock)
        times = ratio(seconds["today"], seconds["ours"])
        goal = f"; to reach: {case.target:g}" if case.target else ""
        print(
            f"{case.name:30} {spread(seconds['ours']).median * 1e3:7.1f} ms, torch.topk + torch.logsumexp take "
            f"{times.median:.1f} times as long ({times.p20:.1f} ... {times.p80:.1f}{goal}), ours "
            f"{ratio(seconds['ours'], seconds['cross_entropy']).median:.2f} times as long as xt.cross_entropy"
        )


if __name__ == "__main__":
    main()
