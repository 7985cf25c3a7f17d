"""The gradient of a loss over logits: who writes it when, and who may have it.

With mean and sum, the forward writes the gradient for dloss = 1 in its own launch. The first backward hands that buffer
out: as it is when dloss is 1, else filled anew from the logits, because scaling a gradient that is already rounded (to
float16, by a GradScaler's 65536) would lose its small elements. A second backward (retain_graph) computes it again,
with the same formula and hence the same bits. With `inplace` the logits' own memory is that buffer.

`ctx` is the context of the torch.autograd.Function; what is kept there: dlogits, inplace, overwritten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from xentile._ops import ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def reserve(ctx: Any, logits: Tensor, *, fused: bool, inplace: bool) -> Tensor | None:
    """Where the forward's launch shall write the gradient; None if that is left to the backward."""
    ctx.inplace = inplace
    ctx.overwritten = inplace and fused
    ctx.dlogits = _memory(logits, inplace) if fused else None
    reserved: Tensor | None = ctx.dlogits
    return reserved


def launched(ctx: Any, logits: Tensor) -> Tensor | None:
    """Say that the forward has run; what to save of the logits.

    In place they are gone then: saving them would only provoke autograd's version check.
    """
    if not ctx.overwritten:
        return logits
    torch.autograd.graph.increment_version(logits)
    return None


def hand_out(ctx: Any, dloss: Tensor, logits: Tensor | None, fill: Callable[[Tensor, bool], None]) -> Tensor:
    """The gradient. `fill(dlogits, filled)` launches the backward, which may find it there already, if dloss is 1."""
    dlogits, ctx.dlogits = ctx.dlogits, None
    filled = dlogits is not None
    if ctx.overwritten or logits is None:
        if dlogits is None:
            raise RuntimeError(
                "inplace=True: the first backward handed out the gradient, and the logits are overwritten"
            )
        ops.scale_.default(dlogits, dloss)
        return dlogits
    if dlogits is None:
        dlogits = _memory(logits, ctx.inplace)
    fill(dlogits, filled)
    if ctx.inplace:
        torch.autograd.graph.increment_version(logits)
        ctx.overwritten = True
    return dlogits


def refuse_inplace(ctx: Any) -> None:
    """For create_graph=True, which needs the logits again."""
    if ctx.inplace:
        raise RuntimeError("inplace=True: the logits are overwritten, so the gradient cannot be differentiated again")


def _memory(logits: Tensor, inplace: bool) -> Tensor:
    if inplace:
        return logits.detach()
    if logits.is_cpu and not torch.compiler.is_compiling():  # a compiled graph plans its memory itself
        fresh: Tensor = ops.empty_gradient.default(logits)
        return fresh
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
