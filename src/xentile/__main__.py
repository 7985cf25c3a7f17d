"""`python -m xentile doctor`: what serves which operator on this machine, and why. `cache`: see xentile.cache.cli."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from xentile import _ops
from xentile._ops import ops
from xentile._schemas import SCHEMAS, WITHOUT_TENSORS
from xentile.cache import cli


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m xentile", description="xentile on the command line")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what serves which operator on this machine, and why")
    cli.add_parser(commands)
    args = parser.parse_args(argv)
    if args.command == "cache":
        return cli.run(args)
    print(doctor())
    return 0


def doctor() -> str:
    """Versions, devices, and a line for each operator."""
    lines = [
        f"xentile {_version('xentile')}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {_version('triton')}",
        f"CPU:  {_cpu()}",
        f"CUDA: {_cuda()}",
        "",
        f"{'operator':<28}{'CPU':<16}{'CUDA':<16}other devices",
    ]
    for name in SCHEMAS:
        if name in WITHOUT_TENSORS:
            continue
        cpu = "C++" if _has(name, "CPU") else "plain PyTorch"
        cuda = "plain PyTorch" if not _has(name, "CUDA") else "Triton"
        lines.append(f"{name:<28}{cpu:<16}{cuda:<16}plain PyTorch")
    lines.append("")
    lines.append("Plain PyTorch on every device: float64 logits on a GPU or in distillation, class probabilities,")
    lines.append("torch.func transforms, double backward, gradients of weight, token_weight or normalizer.")
    return "\n".join(lines)


def _cpu() -> str:
    if _ops.NATIVE_UNAVAILABLE is not None:
        return f"plain PyTorch, because {_ops.NATIVE_UNAVAILABLE}"
    isa = ops.isa.default()
    return f"C++ kernels for {isa} on {platform.machine()}, {torch.get_num_threads()} threads (torch.set_num_threads)"


def _cuda() -> str:
    kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    if torch.version.cuda is None and torch.version.hip is None:
        return "not available, because this torch is a CPU build"
    if not torch.cuda.is_available():
        return f"not available, because torch ({kind}) finds no GPU"
    if _version("triton") == "not installed":
        return f"{kind}: calls will fail, because triton is not installed"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"Triton kernels on {', '.join(names)} ({kind})"


def _has(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"xentile::{name}", key)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
