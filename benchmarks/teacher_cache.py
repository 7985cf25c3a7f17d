"""The teacher cache: bytes a token, tokens a second, and the error of storage in loss and gradient.

    python -m benchmarks.teacher_cache                      # a teacher made up
    python -m benchmarks.teacher_cache --logits FILE.npy    # (N, V) of a real one

Rates are by processor time, of one thread, and so is the loss that they are compared with.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import xentile as xt
from xentile.cache import CachedTopK, CacheHeader, TopKCacheWriter

if TYPE_CHECKING:
    from collections.abc import Callable

SUPPORTS = ("truncated", "teacher_renormalized", "renormalized", "tail_bucket")
SAMPLE = 128  # tokens of a sample
BATCH = 16  # samples read at once
ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logits", type=Path, help="a .npy of a teacher's logits (N, V)")
    parser.add_argument("--k", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logits = torch.from_numpy(np.load(args.logits, mmap_mode="c")) if args.logits else made_up(512, 49152)
    rows = len(logits) // SAMPLE * SAMPLE
    teacher = xt.teacher_topk(logits[:rows].float(), args.k)
    samples = [xt.TeacherTopK(*(field[i : i + SAMPLE] for field in teacher)) for i in range(0, rows, SAMPLE)]
    with tempfile.TemporaryDirectory() as folder:
        header = CacheHeader("benchmark", logits.shape[1], args.k)
        writer = TopKCacheWriter(folder, header)
        writing = seconds(lambda: write(writer, samples), rounds=1)
        tokens = len(writer_ids(samples)) * SAMPLE
        cache = xt.TopKCache(folder)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        reading = seconds(lambda: cache.batch(cache.sample_ids[:BATCH]))
        stored = cache.batch(cache.sample_ids[: len(samples)])
    loss = seconds(lambda: train_step(logits[:SAMPLE].float())) * BATCH
    print(f"{rows} tokens of the teacher, V = {logits.shape[1]}, K = {args.k}")
    print(f"{size / tokens:.1f} bytes a token; written {tokens / writing:,.0f} tokens a second")
    print(f"a batch of {BATCH * SAMPLE} tokens: read in {1e3 * reading:.1f} ms, cross_entropy {1e3 * loss:.1f} ms")
    report_errors(logits[:rows].float(), teacher, stored)


def made_up(rows: int, vocab_size: int) -> Tensor:
    """Rows of every sharpness."""
    return torch.randn(rows, vocab_size) * torch.logspace(-0.5, 1, rows)[torch.randperm(rows), None]


def writer_ids(samples: list[xt.TeacherTopK]) -> range:
    """The teacher's samples over and over, so that a batch is of different ones and the index has its share."""
    return range(max(len(samples), 128))


def write(writer: TopKCacheWriter, samples: list[xt.TeacherTopK]) -> None:
    for sample_id in writer_ids(samples):
        writer.add(sample_id, samples[sample_id % len(samples)])
    writer.close()


def train_step(logits: Tensor) -> None:
    logits.requires_grad_()
    xt.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64)).loss.backward()


def seconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Processor time of a call, the median of so many."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def report_errors(logits: Tensor, teacher: xt.TeacherTopK, stored: CachedTopK) -> None:
    """Against the uncompressed teacher, for a student that is a blurred and disturbed copy of it."""
    student = (0.7 * logits + 1.5 * torch.randn_like(logits)).double()
    for support in SUPPORTS:
        exact, gradient = loss_and_gradient(student, teacher.ids, teacher.logprobs, teacher.tail_logprob[:, 0], support)
        back = stored.ids.flatten(0, 1), stored.logprobs.flatten(0, 1), stored.tail_logprob.flatten()
        loss, stored_gradient = loss_and_gradient(student, *back, support)
        error = (loss - exact).abs()
        relative = (stored_gradient - gradient).norm(dim=1) / gradient.norm(dim=1)
        print(
            f"{support:<21} token loss off by {error.median():.1e} (median) {error.max():.1e} (max) nats, "
            f"mean loss by {abs(loss.mean() / exact.mean() - 1):.1e}, "
            f"gradient by {relative.median():.1e} (median) {relative.max():.1e} (max) of its norm"
        )


def loss_and_gradient(
    student: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor, support: str
) -> tuple[Tensor, Tensor]:
    """Of each token, in float64."""
    x = student.requires_grad_()
    known = tail if support == "tail_bucket" else None
    out = xt.topk_distillation_loss(x, ids, logprobs, support=support, teacher_tail_logprob=known, reduction="none")
    return out.loss.detach(), torch.autograd.grad(out.loss.sum(), x)[0]


if __name__ == "__main__":
    main()
