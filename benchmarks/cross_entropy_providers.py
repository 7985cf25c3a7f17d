"""The cross-entropy: xentile, PyTorch, and every peer that takes logits. One small function each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provider import Provider, Unavailable, gpu_package, package

if TYPE_CHECKING:
    from benchmarks.cases import Case
    from benchmarks.step import Loss


def _xentile(case: Case, device: str) -> Loss:
    xentile = package("xentile")
    return lambda logits, target: xentile.cross_entropy(logits, target).loss


def _xentile_sketch(case: Case, device: str) -> Loss:
    xentile = package("xentile")
    sketch = xentile.LossSketch(device=device)
    return lambda logits, target: xentile.cross_entropy(logits, target, sketch=sketch).loss


def _xentile_inplace(case: Case, device: str) -> Loss:
    xentile = package("xentile")
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
    loss: Loss = gpu_package("liger_kernel.transformers", device).LigerCrossEntropyLoss()
    return loss


def _quack(case: Case, device: str) -> Loss:
    loss: Loss = gpu_package("quack.cross_entropy", device).cross_entropy
    return loss


def _flash_attention(case: Case, device: str) -> Loss:
    per_token = gpu_package("flash_attn.ops.triton.cross_entropy", device).cross_entropy_loss

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
