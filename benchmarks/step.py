"""One step of a training loop as the loss sees it: logits come out of a model, and their gradient goes back into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OPERATIONS, WITH_GRADIENT

Loss = Callable[..., Any]
"""Of the inputs of a case (inputs.py): the mean loss (); for teacher_topk logprobs and ids, both (N, K)."""


class _Model(torch.autograd.Function):
    """Stands in for the model below the loss: hands out logits that are no leaf, and receives their gradient.

    As in training, the gradient is consumed and not accumulated, and the logits may be overwritten (a leaf may not).
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor, received: list[Tensor]) -> Tensor:
        ctx.received = received
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[None, None, None]:
        ctx.received.append(dlogits)
        return None, None, None


def training(loss: Loss, logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss, and the gradient that arrives at the model."""
    received: list[Tensor] = []
    parameter = torch.ones((), requires_grad=True, device=logits.device)
    value = loss(_Model.apply(parameter, logits, received), *others)
    value.backward()
    return value.detach(), received[0]


@torch.no_grad()
def forward(loss: Loss, *inputs: Tensor) -> tuple[Any, None]:
    """The result, as an evaluation loop or a teacher computes it."""
    return loss(*inputs), None


STEPS: dict[str, Callable[..., tuple[Any, Tensor | None]]] = {
    operation: training if operation in WITH_GRADIENT else forward for operation in OPERATIONS
}
