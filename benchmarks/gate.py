"""The gate before any number: each provider's loss and gradient against float64, under the library's error contract.

    error <= 2 * (error of F.cross_entropy in the same dtype) + one rounding of the result

Three errors are judged: of the mean loss; of the gradient, as the largest difference; and of the gradient off the
target column, relative to each element, since there an element that was never written would hide in the largest
difference. The contract is ours. A peer is refused, and gets no time, only when it computes another function:
`PEER_SLACK` times the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.providers import Provider
from benchmarks.step import STEPS, Loss

PEER_SLACK = 16
COMPARED_ELEMENTS = 1 << 25  # of the gradient; the loss is compared over all tokens
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


def _run(case: Case, loss: Loss, logits: Tensor, target: Tensor) -> _Candidate:
    return _Candidate(*STEPS[case.operation](loss, logits, target))


def _chunks(rows: Tensor, vocab: int) -> tuple[Tensor, ...]:
    chunks: tuple[Tensor, ...] = rows.split(max(1, _CHUNK // vocab))  # type: ignore[no-untyped-call]
    return chunks


def _exact_mean(logits: Tensor, target: Tensor) -> float:
    """The mean loss in float64, over all rows."""
    total = 0.0
    valid = (target != -100).nonzero()[:, 0]
    for rows in _chunks(valid, logits.shape[1]):
        exact = logits[rows].double()
        total += (exact.logsumexp(1) - exact.gather(1, target[rows, None])[:, 0]).sum().item()
    return total / len(valid)


def _compare_gradients(logits: Tensor, target: Tensor, candidates: Sequence[_Candidate]) -> float:
    """Fills the candidates' gradient errors, on rows drawn at random; returns the largest gradient there is."""
    n, v = logits.shape
    count = (target != -100).sum().double()
    floor = torch.finfo(logits.dtype).smallest_normal
    drawn = (
        torch.randperm(n, generator=torch.Generator().manual_seed(n))[: max(1, COMPARED_ELEMENTS // v)].sort().values
    )
    largest = 0.0
    for rows in _chunks(drawn.to(logits.device), v):
        exact = torch.softmax(logits[rows].double(), 1)
        at_target = (torch.arange(len(rows), device=logits.device), target[rows].clamp_min(0))
        exact[at_target] -= 1
        exact *= ((target[rows] != -100) / count)[:, None]
        scale = 1 / exact.abs().clamp_min_(floor)
        largest = max(largest, exact.abs().max().item())
        for c in candidates:
            assert c.gradient is not None
            error = torch.sub(exact, c.gradient[rows]).abs_()
            c.errors.gradient = _worse(c.errors.gradient, error)
            error *= scale
            error[at_target] = 0
            c.errors.off_target = _worse(c.errors.off_target, error)
    return largest


def _compare(case: Case, logits: Tensor, target: Tensor, candidates: Sequence[_Candidate]) -> Errors:
    """Fills the candidates' errors; returns what one rounding of each result costs."""
    mean = _exact_mean(logits, target)
    for c in candidates:
        c.errors.loss = abs(c.loss.item() - mean)
    largest = _compare_gradients(logits, target, candidates) if case.operation == "training" else 0.0
    half_ulp = torch.finfo(case.torch_dtype).eps / 2
    return Errors(torch.finfo(torch.float32).eps / 2 * abs(mean), half_ulp * largest, half_ulp)


def _worse(so_far: float, error: Tensor) -> float:
    largest = error.max().item()
    return largest if not largest <= so_far else so_far  # keeps a NaN


def check(case: Case, ready: Sequence[tuple[Provider, Loss]], inputs: tuple[Tensor, Tensor]) -> dict[str, Verdict]:
    """The verdict on each provider, by name. `inputs` should hold ignored targets; they are not written to."""
    logits, target = inputs
    candidates = {"": _run(case, torch.nn.functional.cross_entropy, logits, target)}
    verdicts: dict[str, Verdict] = {}
    for provider, loss in ready:
        try:
            candidates[provider.name] = _run(case, loss, logits.clone(), target)
        except Exception as error:  # whatever a peer raises is its result, listed as such
            first_line = (str(error).splitlines() or [""])[0]
            verdicts[provider.name] = Verdict(False, reason=f"{type(error).__name__}: {first_line}")
    rounding = _compare(case, logits, target, list(candidates.values()))
    eager = candidates.pop("").errors
    budget = Errors(**{name: 2 * getattr(eager, name) + getattr(rounding, name) for name in vars(eager)})
    slack = Errors(**{name: PEER_SLACK * value for name, value in vars(budget).items()})
    ours = {provider.name for provider, _ in ready if provider.ours}
    for name, c in candidates.items():
        passed = c.errors.within(budget if name in ours else slack)
        verdicts[name] = Verdict(passed, c.errors, budget, "" if passed else f"error {c.errors} over budget {budget}")
    return verdicts
