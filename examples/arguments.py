"""The command line of train_lm.py."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch

SIZES = {  # what a minute trains well: on two CPU cores, and on a GPU
    "cpu": {"width": 128, "layers": 2, "heads": 4, "context": 128, "batch": 4},
    "cuda": {"width": 512, "layers": 8, "heads": 8, "context": 256, "batch": 64},
}


def whole_number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and above 0, got {text}")
    return value


def vocabulary_size(text: str) -> int:
    value = int(text)
    if not 512 <= value <= 65536:  # 256 bytes, an end mark and some merges
        raise argparse.ArgumentTypeError(f"must be in [512, 65536], got {text}")
    return value


def png_path(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text}")
    return path


def parse_arguments() -> argparse.Namespace:
    """The arguments, with the sizes of the model filled in for the device."""
    parser = argparse.ArgumentParser(description="Train a small language model, watch the percentiles of its loss.")

    def add(flag: str, convert: Callable[[str], object], default: object, meaning: str) -> None:
        parser.add_argument(flag, type=convert, default=default, help=f"{meaning} (default: {default})")

    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=positive_number, default=60.0, help="time to train for (default: 60)")
    length.add_argument("--steps", type=whole_number, help="train for so many steps instead")
    add("--figure", png_path, Path("build/fan_chart.png"), "where the chart goes")
    add("--seed", int, 0, "of the model and of the order of the text")
    add("--lr", positive_number, 5e-3, "peak learning rate")
    add("--vocabulary", vocabulary_size, 4096, "entries of the byte-pair encoding")
    add("--characters", whole_number, 20_000_000, "text to read at most")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where PyTorch sees one")
    for name, size in SIZES["cpu"].items():
        parser.add_argument(f"--{name}", type=whole_number, help=f"default: {size}, on a GPU {SIZES['cuda'][name]}")

    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        parser.error("argument --device: cuda, but PyTorch sees no GPU")
    args.device = args.device or ("cuda" if has_gpu else "cpu")
    for name, size in SIZES[args.device].items():
        setattr(args, name, getattr(args, name) or size)
    if args.width % args.heads:
        parser.error(f"argument --width: must be a multiple of --heads, got {args.width} and {args.heads}")
    return args
