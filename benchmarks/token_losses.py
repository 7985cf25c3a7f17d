"""Losses of real tokens, for `characterize`: `python -m benchmarks.token_losses` makes token_losses.npy.

They are those of the demo's model on held-out text, after some training. The file is stored, since the text is that of
the Python at hand and the training takes minutes; it holds float32 nats, one a token.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STORED = Path(__file__).with_name("token_losses.npy")
TOKENS = 40_000  # 160 kB
STEPS = 1000


@torch.no_grad()
def held_out_losses(model: torch.nn.Module, text: Tensor, context: int) -> Tensor:
    """The loss of each token of a text, given those before it in its window of `context` tokens."""
    from corpus import windows

    losses = []
    for piece in windows(text, context).split(16):
        logits = model(piece[:, :-1]).double()  # in float32 the loss of a token that is nearly certain rounds to 0
        losses.append(F.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).float()


def main() -> int:
    """Train the demo's model and store the losses."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.token_losses", description=main.__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=STORED)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    from arguments import SIZES
    from corpus import load
    from model import LanguageModel
    from train_lm import train

    size = SIZES["cpu"]
    torch.set_num_threads(1)  # the batches are small
    args = argparse.Namespace(**size, steps=options.steps, seconds=None, seed=0, lr=5e-3, device="cpu")
    torch.manual_seed(args.seed)
    corpus = load(4096, 20_000_000)
    model = LanguageModel(corpus.vocabulary, args.context, width=args.width, layers=args.layers, heads=args.heads)
    train(model, corpus.train, args)
    per_kind = [text[: TOKENS // len(corpus.held_out) + args.context] for text in corpus.held_out.values()]
    losses = torch.cat([held_out_losses(model, text, args.context) for text in per_kind])[:TOKENS]
    np.save(options.output, losses.numpy())
    print(f"{len(losses):,} losses, mean {losses.mean():.3f}, median {losses.median():.3f}, in {options.output.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
