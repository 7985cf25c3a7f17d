"""Who computes the loss: xentile, PyTorch, and every peer that takes logits. One small function each.

A provider builds a loss for a case or raises `Unavailable` with the reason, which is listed beside the results.
Packages are imported only when asked for: none is needed to benchmark the others.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.cases import Case
    from benchmarks.step import Loss


class Unavailable(Exception):
    """This provider can't run this case; the message says why."""


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[[Case, str], Loss]
    ours: bool = False
    overwrites_logits: bool = False  # the gradient is written over the logits: fresh ones are needed before every step


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error


def _gpu_package(name: str, device: str) -> Any:
    if device != "cuda":
        raise Unavailable(f"{name.partition('.')[0]} runs on CUDA devices only, this is {device}")
    return _package(name)


def _xentile(case: Case, device: str) -> Loss:
    xentile = _package("xentile")
    return lambda logits, target: xentile.cross_entropy(logits, target).loss


def _xentile_sketch(case: Case, device: str) -> Loss:
    xentile = _package("xentile")
    sketch = xentile.LossSketch(device=device)
    return lambda logits, target: xentile.cross_entropy(logits, target, sketch=sketch).loss


def _xentile_inplace(case: Case, device: str) -> Loss:
    xentile = _package("xentile")
    if case.operation == "forward":
        raise Unavailable("without a gradient it is the same call as xentile")
    return lambda logits, target: xentile.cross_entropy(logits, target, inplace=True).loss


def _eager(case: Case, device: str) -> Loss:
    return F.cross_entropy


def _eager_upcast(case: Case, device: str) -> Loss:
    if case.torch_dtype.itemsize >= 4:
        raise Unavailable(f"logits.float() of {case.dtype} logits is torch.eager")
    return lambda logits, target: F.cross_entropy(logits.float(), target)


def _compile(case: Case, device: str) -> Loss:
    # Shapes are compiled as constants, the best torch.compile can do; reset, so that no case inherits another's guards.
    def upcast_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), target)

    torch.compiler.reset()
    compiled: Loss = torch.compile(upcast_cross_entropy, dynamic=False)
    return compiled


def _liger(case: Case, device: str) -> Loss:
    loss: Loss = _gpu_package("liger_kernel.transformers", device).LigerCrossEntropyLoss()
    return loss


def _quack(case: Case, device: str) -> Loss:
    loss: Loss = _gpu_package("quack.cross_entropy", device).cross_entropy
    return loss


def _flash_attention(case: Case, device: str) -> Loss:
    per_token = _gpu_package("flash_attn.ops.triton.cross_entropy", device).cross_entropy_loss

    def mean(logits: Tensor, target: Tensor) -> Tensor:
        losses: Tensor = per_token(logits, target)[0]
        return losses.sum() / (target != -100).sum()

    return mean


def _takes_hidden_states(case: Case, device: str) -> Loss:
    raise Unavailable("it takes hidden states and the head's weight, not logits: another operation")


PROVIDERS: tuple[Provider, ...] = (
    Provider("xentile", _xentile, ours=True),
    Provider("xentile+sketch", _xentile_sketch, ours=True),
    Provider("xentile+inplace", _xentile_inplace, ours=True, overwrites_logits=True),
    Provider("torch.eager", _eager),
    Provider("torch.eager-upcast", _eager_upcast),
    Provider("torch.compile", _compile),
    Provider("liger", _liger, overwrites_logits=True),
    Provider("quack", _quack),
    Provider("flash-attention", _flash_attention),
    Provider("apple-cce", _takes_hidden_states),
    Provider("torch.linear_cross_entropy", _takes_hidden_states),
)


def named(names: Sequence[str]) -> list[Provider]:
    """The providers of these names, in listed order; all of them for no names."""
    known = [p.name for p in PROVIDERS]
    for name in names:
        if name not in known:
            raise ValueError(f"providers must be among {', '.join(known)}, got {name}")
    return [p for p in PROVIDERS if not names or p.name in names]


def build(
    providers: Sequence[Provider], case: Case, device: str
) -> tuple[list[tuple[Provider, Loss]], list[tuple[Provider, str]]]:
    """Splits providers into those that can run the case, with their loss, and the others, with the reason."""
    ready: list[tuple[Provider, Loss]] = []
    missing: list[tuple[Provider, str]] = []
    for provider in providers:
        try:
            ready.append((provider, provider.build(case, device)))
        except Unavailable as reason:
            missing.append((provider, str(reason)))
    return ready, missing
