"""Distillation from a dense teacher on the CPU against plain PyTorch: `python -m benchmarks.dense_distillation`.

Prints, for forward and backward of each divergence, how long ours takes, the share of it that a copy of as many bytes
would take, and how many times as long F.kl_div of two log_softmax takes, as it stands and under torch.compile (forward
KL only: it knows no other). Steps are interleaved, and results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import xentile as xt
from benchmarks.provenance import commit
from benchmarks.timing import Step, cpu_clock, interleave, ratio, spread
from xentile import _layout

TEMPERATURE = 2.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plain(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = (F.log_softmax(x / TEMPERATURE, -1, dtype=torch.float32) for x in (student, teacher))
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * TEMPERATURE**2


def ours(student: Tensor, teacher: Tensor, divergence: str = "forward_kl") -> Tensor:
    return xt.distillation_loss(student, teacher, divergence=divergence, temperature=TEMPERATURE).loss


def training(loss: Any, student: Tensor, teacher: Tensor) -> Step:
    """Forward and backward; the gradient is returned, to be freed outside of the timed region."""

    def step(_: int) -> Tensor:
        return torch.autograd.grad(loss(student, teacher), student)[0]

    return step


def inputs(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, size, generator=generator).mul_(3).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def check(size: int, dtype: torch.dtype) -> None:
    student, teacher = inputs(8, size, dtype)
    exact = plain(student.detach().double(), teacher.double())
    torch.testing.assert_close(ours(student, teacher), exact.float(), rtol=1e-4, atol=0)
    expected, actual = (training(f, student, teacher)(0) for f in (plain, ours))
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-6)  # nothing is timed that is wrong


def bound(student: Tensor, teacher: Tensor) -> Step:
    """Both matrices are read and a fresh one is written, which is what a sum of them does."""
    x = student.detach()
    return lambda _: torch.add(x, teacher)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--size", type=int, default=128256, help="columns")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--divergences", nargs="+", default=list(_layout.DIVERGENCES), choices=_layout.DIVERGENCES)
    arguments = parser.parse_args()
    print(f"commit {commit()}, {torch.get_num_threads()} threads, {arguments.rounds} rounds; medians of ratios")
    for name in arguments.dtypes:
        check(arguments.size, DTYPES[name])
        student, teacher = inputs(arguments.rows, arguments.size, DTYPES[name])
        steps = {d: training(functools.partial(ours, divergence=d), student, teacher) for d in arguments.divergences}
        steps["sum of two matrices"] = bound(student, teacher)
        steps["F.kl_div"] = training(plain, student, teacher)
        steps["F.kl_div, compiled"] = training(torch.compile(plain), student, teacher)
        seconds = interleave(steps, arguments.rounds, cpu_clock)
        print(f"{arguments.rows} x {arguments.size} {name}, temperature {TEMPERATURE:g}, forward + backward")
        for divergence in arguments.divergences:
            mine = seconds[divergence]
            times = {other: ratio(seconds[other], mine).median for other in seconds if other not in _layout.DIVERGENCES}
            others = ", ".join(f"{other} {value:.2f}" for other, value in times.items())
            print(f"  {divergence:15} {spread(mine).median * 1e3:7.1f} ms; times as long: {others}")


if __name__ == "__main__":
    main()
