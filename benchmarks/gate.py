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
MAX_ELEMENTS = 1 << 28  # larger cases are gated on their first rows
_CHUNK = 1 << 23  # elements compared in float64 at a time


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


def _compare(case: Case, logits: Tensor, target: Tensor, candidates: Sequence[_Candidate]) -> Errors:
    """Fills the candidates' errors from one float64 pass over the rows; returns the cost of one rounding of each."""
    n, v = logits.shape
    valid = target != -100
    count = valid.sum().double()
    column = target.clamp_min(0)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    largest = 0.0
    floor = torch.finfo(case.torch_dtype).smallest_normal
    height = max(1, _CHUNK // v)
    for first in range(0, n, height):
        part = slice(first, min(n, first + height))
        exact = torch.log_softmax(logits[part].double(), 1)
        at_target = (torch.arange(part.stop - part.start, device=logits.device), column[part])
        total -= exact[at_target][valid[part]].sum()
        if case.operation == "forward":
            continue
        exact = exact.exp_()
        exact[at_target] -= 1
        exact *= (valid[part].double() / count)[:, None]
        largest = max(largest, exact.abs().max().item())
        for c in candidates:
            assert c.gradient is not None
            error = (c.gradient[part].double() - exact).abs_()
            c.errors.gradient = _worse(c.errors.gradient, error)
            error /= exact.abs().clamp_min_(floor)
            error[at_target] = 0
            c.errors.off_target = _worse(c.errors.off_target, error)
    mean = (total / count).item()
    for c in candidates:
        c.errors.loss = abs(c.loss.item() - mean)
    half_ulp = torch.finfo(case.torch_dtype).eps / 2
    return Errors(torch.finfo(torch.float32).eps / 2 * abs(mean), half_ulp * largest, half_ulp)


def _worse(so_far: float, error: Tensor) -> float:
    largest = error.max().item()
    return largest if not largest <= so_far else so_far  # keeps a NaN


def check(case: Case, ready: Sequence[tuple[Provider, Loss]], inputs: tuple[Tensor, Tensor]) -> dict[str, Verdict]:
    """The verdict on each provider, by name. `inputs` should hold ignored targets; they are not written to."""
    rows = max(1, min(case.tokens, MAX_ELEMENTS // case.vocab))
    logits, target = inputs[0][:rows], inputs[1][:rows]
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
