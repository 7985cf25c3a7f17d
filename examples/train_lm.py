"""Train a small language model with `xentile.cross_entropy` and watch the percentiles of its loss.

    python examples/train_lm.py                       # about a minute; uses the GPU when there is one
    python examples/train_lm.py --seconds 300 --figure fan_chart.png

The text is Python's own documentation and standard library, so nothing is downloaded. While it trains, a progress bar
shows the mean, the median and the 90th percentile of the loss since the last look. Then it prints the percentiles over
training and on held-out text, the largest difference from `torch.nn.functional.cross_entropy` on one batch, the time of
the loss call against it, and the path of a fan chart of the percentiles.

The seed fixes the model, the split and the order of the text; with --steps instead of --seconds two runs on one machine
do the same arithmetic.
"""

import math
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import comparison
import fan_chart
import torch
from arguments import parse_arguments
from corpus import Corpus, load, windows
from model import LanguageModel
from torch import Tensor
from tqdm import tqdm

import xentile as xt

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)
QUANTILES = [p / 100 for p in PERCENTILES]
LOOKS = 40  # how often in a run the running percentiles are read and started afresh
EARLY_STEPS = 10  # at first, when the loss falls fastest, after every step
HELD_OUT_TOKENS = 30_000  # of each kind of text
COMPARED_TOKENS = 1024  # in the batch that both losses get


class Row(NamedTuple):
    """The loss of the tokens of one stretch of training, or of a held-out text, in nats."""

    label: str
    tokens: int  # trained on so far, or held out
    mean: float
    percentiles: list[float]


def read(sketch: xt.LossSketch, label: str, tokens: int) -> Row:
    return Row(label, tokens, float(sketch.mean()), sketch.quantile(QUANTILES).tolist())


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first twentieth of the run, then half a cosine down to a tenth of the peak."""
    return peak * min(progress / 0.05 + 0.02, 0.55 + 0.45 * math.cos(math.pi * progress))


def loss_of(model: LanguageModel, batch: Tensor, sketch: xt.LossSketch) -> Tensor:
    """The mean loss of a (batch, context + 1) piece of text, its tokens added to `sketch`."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.is_cuda):
        logits = model(batch[:, :-1])
    return xt.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), sketch=sketch).loss


def shuffled(text: Tensor, args: Namespace) -> Iterator[Tensor]:
    """(batch, context + 1) pieces of the text, each once an epoch, in an order that the seed fixes, without end."""
    pieces = windows(text, args.context)
    generator = torch.Generator().manual_seed(args.seed)
    while True:
        order = torch.randperm(len(pieces), generator=generator)
        for indices in order[: len(order) // args.batch * args.batch].split(args.batch):
            yield pieces[indices].to(args.device)


def train(model: LanguageModel, text: Tensor, args: Namespace) -> list[Row]:
    """Train until the time or the steps are over; one row for each look at the running percentiles."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    sketch = xt.LossSketch(args.device)
    rows: list[Row] = []
    progress, looks = 0.0, 0
    layout = "{percentage:3.0f}%|{bar:24}| {n:.0f}/{total:.0f} {unit}{postfix}"
    start = time.perf_counter()
    with tqdm(total=args.steps or args.seconds, unit="step" if args.steps else "s", bar_format=layout) as bar:
        for step, batch in enumerate(shuffled(text, args), start=1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, args.lr)
            loss_of(model, batch, sketch).backward()
            optimizer.step()
            optimizer.zero_grad()

            done = step if args.steps else min(time.perf_counter() - start, args.seconds)
            progress = done / bar.total
            bar.update(done - bar.n)
            if step <= EARLY_STEPS or int(progress * LOOKS) > looks:
                looks = int(progress * LOOKS)
                rows.append(read(sketch, str(step), step * args.batch * args.context))
                sketch.reset()
                shown = dict(zip(PERCENTILES, rows[-1].percentiles, strict=True))
                bar.set_postfix_str(f"step {step}, mean {rows[-1].mean:.2f}, p50 {shown[50]:.2f}, p90 {shown[90]:.2f}")
            if progress >= 1:
                break
    return rows


@torch.no_grad()
def held_out(model: LanguageModel, corpus: Corpus, args: Namespace) -> list[Row]:
    """One row for each kind of text that the model has not seen."""
    rows = []
    for kind, text in corpus.held_out.items():
        pieces = windows(text[:HELD_OUT_TOKENS], args.context)
        if len(pieces) == 0:
            continue
        sketch = xt.LossSketch(args.device)
        for batch in pieces.split(args.batch):
            loss_of(model, batch.to(args.device), sketch)
        rows.append(read(sketch, kind, len(pieces) * args.context))
    return rows


def table(training: list[Row], unseen: list[Row], lines: int = 12) -> str:
    """The percentiles over training, at about `lines` looks evenly apart, and those of the held-out text."""
    count = min(lines, len(training))
    chosen = sorted({round(i * (len(training) - 1) / max(count - 1, 1)) for i in range(count)})
    head = f"{'step':<20}{'tokens':>10}{'mean':>8}" + "".join(f"{f'p{p}':>8}" for p in PERCENTILES)
    body = [head, "-" * len(head)]
    for row in [*(training[i] for i in chosen), None, *unseen]:
        if row is None:
            body.append("held out")
            continue
        losses = "".join(f"{loss:>8.3f}" for loss in (row.mean, *row.percentiles))
        body.append(f"{row.label:<20}{row.tokens:>10,}{losses}")
    return "\n".join(body)


def draw_chart(path: Path, rows: list[Row], subtitle: str) -> None:
    columns = zip(*(row.percentiles for row in rows), strict=True)
    series = {f"p{p}": list(column) for p, column in zip(PERCENTILES, columns, strict=True)}
    series["mean"] = [row.mean for row in rows]
    mean, low, high = (series[name][-1] for name in ("mean", "p10", "p90"))
    title = f"Behind a mean of {mean:.1f} nats: a tenth of the tokens below {low:.1f}, a tenth above {high:.1f}"
    fan_chart.draw(path, [row.tokens for row in rows], series, title, subtitle)


@torch.no_grad()
def held_out_logits(model: LanguageModel, corpus: Corpus, args: Namespace) -> tuple[Tensor, Tensor]:
    """Logits (N, vocabulary) and targets (N) of text that the model has not seen."""
    pieces = windows(torch.cat([*corpus.held_out.values()]), args.context)[: COMPARED_TOKENS // args.context or 1]
    with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
        logits = model(pieces[:, :-1].to(args.device))
    return logits.flatten(0, 1), pieces[:, 1:].flatten().to(args.device)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    corpus = load(args.vocabulary, args.characters)
    short = min(len(corpus.train) - args.batch * args.context, sum(map(len, corpus.held_out.values())) - args.context)
    if short < 1:
        raise SystemExit("too little text for one batch of training and one held-out context: raise --characters")
    model = LanguageModel(corpus.vocabulary, args.context, width=args.width, layers=args.layers, heads=args.heads)
    model.to(args.device)
    size = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameter"
    print(
        f"text: {corpus.characters / 1e6:.1f} M characters, {len(corpus.train):,} tokens to train on, "
        f"vocabulary of {corpus.vocabulary:,}\n"
        f"model: {size} transformer on {args.device}, batches of {args.batch} x {args.context} tokens",
        flush=True,
    )

    training = train(model, corpus.train, args)
    print("\nLoss of a token in nats, over each stretch of training and on held-out text\n")
    print(table(training, held_out(model, corpus, args)))

    logits, target = held_out_logits(model, corpus, args)
    shape = f"{logits.shape[0]:,} x {logits.shape[1]:,} logits, {str(logits.dtype).removeprefix('torch.')}"
    print(f"\nAgainst F.cross_entropy on one held-out batch, {shape}\n")
    print(comparison.agreement(logits, target))
    print("\nTime of the loss on the same logits, forward and backward\n")
    print(comparison.speed(logits, target))

    draw_chart(args.figure, training, f"Percentiles of the loss of a token, as a {size} model learns Python's own text")
    print(f"\nPercentile fan chart: {args.figure}")


if __name__ == "__main__":
    main()
