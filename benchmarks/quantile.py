"""Exact quantiles on the CPU against what is used today: `python -m benchmarks.quantile [--rounds 5]`.

Prints, for five quantiles of per-token losses, how many times as long torch.quantile and a NumPy partition of the same
ranks take. Steps are interleaved, and results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import xentile as xt
from benchmarks.provenance import commit
from benchmarks.timing import Step, cpu_clock, interleave, ratio, spread
from xentile.reference import quantile as spec

Q = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)


class Row(NamedTuple):
    values: int
    against: str
    step: Step
    target: float


def losses(n: int) -> Tensor:
    """Between the losses of a pretraining and of a fine-tuning: log-normal, over six decades."""
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).mul_(2).exp_()


def rows() -> list[Row]:
    small, large = losses(1 << 22), losses(1 << 26).numpy()
    lower, upper, _ = spec.ranks(Q, torch.tensor(large.size), "linear")
    ranks = torch.cat([lower, upper]).unique().numpy()
    q = Q.float()
    return [
        Row(1 << 22, "torch.quantile", lambda _: torch.quantile(small, q), 10),
        Row(1 << 26, "np.partition", lambda _: np.partition(large, ranks), 3),
    ]


def ours(x: Tensor) -> Step:
    return lambda _: xt.quantile(x, Q)


def check() -> None:
    x = losses(1 << 20)
    expected = torch.from_numpy(np.quantile(x.double().numpy(), Q)).float()
    assert torch.equal(xt.quantile(x, Q), expected), "xt.quantile is wrong: nothing is timed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    check()
    print(f"commit {commit()}, {torch.get_num_threads()} threads, {rounds} rounds; median, and 20th to 80th percentile")
    for row in rows():
        steps = {"ours": ours(losses(row.values)), row.against: row.step}
        seconds = interleave(steps, rounds, cpu_clock)
        median, times = spread(seconds["ours"]).median, ratio(seconds[row.against], seconds["ours"])
        print(
            f"{row.values >> 20:3d}M float32, {len(Q)} quantiles: {median * 1e3:7.1f} ms, {row.against} takes "
            f"{times.median:.1f} times as long ({times.p20:.1f} ... {times.p80:.1f}; to reach: {row.target:g})"
        )


if __name__ == "__main__":
    main()
