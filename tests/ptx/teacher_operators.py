"""`teacher_topk` as a function that allocates poisoned outputs for an implementation to fill, what these must hold, and
rows of every kind that a selection could trip over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from xentile import reference
from xentile.reference import TeacherTopK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "rising": lambda x: x.sort().values,
    "falling": lambda x: x.sort(descending=True).values,
    "equal": torch.ones_like,
    "few values": lambda x: x.div(4).round(),
    "zeros of both signs": lambda x: torch.where(x > 0, 0.0, -0.0),
    "a plateau at the end": lambda x: torch.where(torch.arange(len(x)) >= len(x) // 2, 1.0, 0.0),
    "large ones together": lambda x: x + 20 * (torch.arange(len(x)) < 30),
    "far from zero": lambda x: x - 1000,
    "sure of one": lambda x: x + 60 * (torch.arange(len(x)) == len(x) // 3),
    "sure of the first and the last": lambda x: x + 500 * (torch.arange(len(x)) % max(1, len(x) - 1) == 0),
    "few possible": lambda x: torch.where(torch.arange(len(x)) % 37 == 5 % len(x), x, -torch.inf),
    "few possible, together": lambda x: torch.where(torch.arange(len(x)) >= len(x) - 9, x, -torch.inf),
    "impossible": lambda x: torch.full_like(x, -torch.inf),
    "infinite": lambda x: torch.where(torch.arange(len(x)) == len(x) - 1, torch.inf, x),
    "not a number": lambda x: torch.where(torch.arange(len(x)) == len(x) // 2, torch.nan, x),
}


def awkward_logits(size: int, dtype: torch.dtype = torch.float32, orders: Sequence[str] = tuple(ORDERS)) -> Tensor:
    """One row of each order."""
    generator = torch.Generator().manual_seed(size)
    rows = [ORDERS[order](torch.randn(size, generator=generator) * 3) for order in orders]
    return torch.stack(rows).to(dtype)


def forward(
    implementation: Callable[..., None],
    logits: Tensor,
    k: int,
    temperatures: Sequence[float] = (1.0,),
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> TeacherTopK:
    rows, count = logits.shape[0], len(temperatures)
    ids, logprobs = torch.full((rows, k), -77, dtype=torch.int32), torch.full((rows, k), 77.0)
    log_z, tail = torch.full((rows, count), 77.0), torch.full((rows, count), 77.0)
    implementation(logits, torch.tensor(temperatures), ids, logprobs, log_z, tail, softcap, logit_scale)
    return TeacherTopK(ids, logprobs, log_z, tail)


def exact(
    logits: Tensor, k: int, temperatures: Sequence[float] = (1.0,), softcap: float = 0.0, logit_scale: float = 1.0
) -> TeacherTopK:
    """What `forward` must give, from float64."""
    tempered = torch.tensor(temperatures).double()
    return reference.teacher_topk(logits.double(), k, tempered, softcap, logit_scale)


def assert_exact(actual: TeacherTopK, wanted: TeacherTopK, tolerance: float = 1e-6) -> None:
    """Ids equal; logarithms within the tolerance, absolute and relative."""
    wrong = (actual.ids != wanted.ids).nonzero().tolist()[:5]
    assert not wrong, f"ids at {wrong}: {[(int(actual.ids[i, j]), int(wanted.ids[i, j])) for i, j in wrong]}"
    for name in ("logprobs", "log_z", "tail_logprob"):
        torch.testing.assert_close(
            getattr(actual, name),
            getattr(wanted, name),
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )
