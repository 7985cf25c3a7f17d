"""The gate before any number: each provider's loss and gradient against float64, under the library's error contract.

    error <= 2 * (error of F.cross_entropy in the same dtype) + one rounding of the result

Three errors are judged: of the mean loss; of the gradient, as the largest difference; and of the gradient off the
target column, relative to each element, since there an element that was never written would hide in the largest
difference. The contract is ours. A peer is refused, and gets no time, only when it computes another function:
`PEER_SLACK` times the budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.step import STEPS, Loss

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.cases import Case
    from benchmarks.providers import Provider

PEER_SLACK = 16
COMPARED_ELEMENTS = 1 << 25  # of the gradient, in rows drawn at random; the loss is compared over all tokens
_CHUNK = 1 << 20  # elements compared in float64 at a time: 8 MiB, which malloc reuses and does not map anew


@dataclass
class Errors:
    """Errors against float64, or the budgets they must keep."""

    loss: float = 0.0
    gradient: float = 0.0
    off_target: float = 0.0

    def within(self, budget: Errors) -> bool:
        # Not `self > budget`: a NaN must fail.
        return all(getattr(self, name) <= getattr(budget, name) for name in vars(self))


@dataclass
class Verdict:
    passed: bool
    errors: Errors = field(default_factory=Errors)
    budget: Errors = field(default_factory=Errors)
    reason: str = ""


@dataclass
class _Candidate:
    loss: Tensor
    gradient: Tensor | None
    errors: Errors = field(default_factory=Errors)


def _run(case: Case, loss: Loss, logits: Tensor, target: Tensor, drawn: Tensor) -> _Candidate:
    value, gradient = STEPS[case.operation](loss, logits, target)
    return _Candidate(value, None if gradient is None else gradient[drawn])


def _chunks(rows: int, vocab: int) -> Iterator[slice]:
    height = max(1, _CHUNK // vocab)
    return (slice(first, min(rows, first + height)) for first in range(0, rows, height))


def _exact_mean(logits: Tensor, target: Tensor) -> float:
    """The mean loss in float64, over all rows."""
    total = 0.0
    valid = (target != -100).nonzero()[:, 0]
    for part in _chunks(len(valid), logits.shape[1]):
        exact = logits[valid[part]].double()
        total += (exact.logsumexp(1) - exact.gather(1, target[valid[part], None])[:, 0]).sum().item()
    return total / len(valid)


def _compare_gradients(logits: Tensor, target: Tensor, drawn: Tensor, candidates: Sequence[_Candidate]) -> float:
    """Fills the candidates' gradient errors, on the rows drawn; returns the largest gradient there is."""
    count = (target != -100).sum().double()
    floor = torch.finfo(logits.dtype).smallest_normal
    largest = 0.0
    for part in _chunks(len(drawn), logits.shape[1]):
        rows = drawn[part]
        exact = torch.softmax(logits[rows].double(), 1)
        at_target = (torch.arange(len(rows), device=logits.device), target[rows].clamp_min(0))
        exact[at_target] -= 1
        exact *= ((target[rows] != -100) / count)[:, None]
        scale = 1 / exact.abs().clamp_min_(floor)
        largest = max(largest, exact.abs().max().item())
        for c in candidates:
            assert c.gradient is not None
            error = torch.sub(exact, c.gradient[part]).abs_()
            c.errors.gradient = _worse(c.errors.gradient, error)
            error *= scale
            error[at_target] = 0
            c.errors.off_target = _worse(c.errors.off_target, error)
    return largest


def _compare(case: Case, logits: Tensor, target: Tensor, drawn: Tensor, candidates: Sequence[_Candidate]) -> Errors:
    """Fills the candidates' errors; returns what one rounding of each result costs."""
    mean = _exact_mean(logits, target)
    for c in candidates:
        c.errors.loss = abs(c.loss.item() - mean)
    largest = 0.0
    if case.operation == "training":
        largest = _compare_gradients(logits, target, drawn, candidates)
    half_ulp = torch.finfo(case.torch_dtype).eps / 2
    return Errors(torch.finfo(torch.float32).eps / 2 * abs(mean), half_ulp * largest, half_ulp)


def _worse(so_far: float, error: Tensor) -> float:
    largest = error.max().item()
    return largest if not largest <= so_far else so_far  # keeps a NaN


def check(case: Case, ready: Sequence[tuple[Provider, Loss]], inputs: tuple[Tensor, Tensor]) -> dict[str, Verdict]:
    """The verdict on each provider, by name. `inputs` should hold ignored targets; they are not written to."""
    logits, target = inputs
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(case.tokens))
    drawn = order[: max(1, COMPARED_ELEMENTS // case.vocab)].sort().values.to(logits.device)
    candidates = {"": _run(case, torch.nn.functional.cross_entropy, logits, target, drawn)}
    verdicts: dict[str, Verdict] = {}
    for provider, loss in ready:
        try:
            candidates[provider.name] = _run(case, loss, logits.clone(), target, drawn)
        except Exception as error:  # whatever a peer raises is its result, listed as such
            first_line = (str(error).splitlines() or [""])[0]
            verdicts[provider.name] = Verdict(False, reason=f"{type(error).__name__}: {first_line}")
    rounding = _compare(case, logits, target, drawn, list(candidates.values()))
    eager = candidates.pop("").errors
    budget = Errors(**{name: 2 * getattr(eager, name) + getattr(rounding, name) for name in vars(eager)})
    slack = Errors(**{name: PEER_SLACK * value for name, value in vars(budget).items()})
    ours = {provider.name for provider, _ in ready if provider.ours}
    for name, c in candidates.items():
        passed = c.errors.within(budget if name in ours else slack)
        verdicts[name] = Verdict(passed, c.errors, budget, "" if passed else f"error {c.errors} over budget {budget}")
    return verdicts
