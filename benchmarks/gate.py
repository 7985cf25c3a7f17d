"""The gate before any number: each provider's results against float64, under the library's error contract.

    error <= 2 * (error of plain PyTorch in the same dtype) + one rounding of the result

Three errors of a loss are judged: of the mean; of the gradient, as the largest difference; and of the gradient off the
support (for the cross-entropy the target's column), relative to each element and to the probabilities that make it up,
since there an element that was never written would hide in the largest difference. What is exact comes from autograd in
float64, chunk by chunk. The contract is ours. A peer is refused, and gets no time, only when it computes another
function: `PEER_SLACK` times the budget. `gate_teacher.py` is the gate of teacher_topk, which has no loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import expressions, gate_teacher
from benchmarks.cases import WITH_GRADIENT
from benchmarks.errors import Errors, Verdict, chunks, exact_rows, worse
from benchmarks.step import STEPS, Loss

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.cases import Case
    from benchmarks.inputs import Inputs
    from benchmarks.provider import Provider

PEER_SLACK = 16
COMPARED_ELEMENTS = 1 << 25  # of the gradient, in rows drawn at random; the loss is compared over all tokens

Result = tuple[Any, "Tensor | None"]
"""What a step returns; the gradient in the rows drawn."""


def check(case: Case, ready: Sequence[tuple[Provider, Loss]], inputs: Inputs) -> dict[str, Verdict]:
    """The verdict on each provider, by name. `inputs` should hold ignored targets; they are not written to.

    A yardstick is judged by the function that it computes.
    """
    verdicts: dict[str, Verdict] = {}
    for operation in dict.fromkeys(provider.yardstick or case.operation for provider, _ in ready):
        group = [(p, loss) for p, loss in ready if (p.yardstick or case.operation) == operation]
        verdicts |= _judge(replace(case, operation=operation), group, inputs)
    return verdicts


def _judge(case: Case, ready: Sequence[tuple[Provider, Loss]], inputs: Inputs) -> dict[str, Verdict]:
    order = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(case.tokens))
    drawn = order[: max(1, COMPARED_ELEMENTS // case.vocab)].sort().values.to(inputs[0].device)
    results = {"": _run(case, expressions.plain(case), inputs, drawn)}
    verdicts: dict[str, Verdict] = {}
    for provider, loss in ready:
        try:
            results[provider.name] = _run(case, loss, (inputs[0].clone(), *inputs[1:]), drawn)
        except Exception as error:  # whatever a peer raises is its result, listed as such
            first_line = (str(error).splitlines() or [""])[0]
            verdicts[provider.name] = Verdict(False, reason=f"{type(error).__name__}: {first_line}")
    if case.operation == "teacher_topk":
        errors, rounding = gate_teacher.compare(case, inputs, {name: value for name, (value, _) in results.items()})
    else:
        errors, rounding = _compare(case, inputs, drawn, results)
    budget = errors.pop("").budget(rounding)
    ours = {provider.name for provider, _ in ready if provider.ours}
    for name, found in errors.items():
        passed = found.within(budget if name in ours else budget.scaled(PEER_SLACK))
        verdicts[name] = Verdict(passed, found, budget, "" if passed else f"error {found} over budget {budget}")
    return verdicts


def _run(case: Case, loss: Loss, inputs: Inputs, drawn: Tensor) -> Result:
    value, gradient = STEPS[case.operation](loss, *inputs)
    return value, None if gradient is None else gradient[drawn]


def _compare(
    case: Case, inputs: Inputs, drawn: Tensor, results: Mapping[str, Result]
) -> tuple[dict[str, Errors], Errors]:
    """The errors of the results, by name, and what one rounding of each of them costs."""
    count = int(expressions.counted(case, inputs[1]).sum())
    mean, size = _exact_mean(case, inputs, count)
    errors = {name: Errors(loss=abs(loss.item() - mean)) for name, (loss, _) in results.items()}
    largest = 0.0
    if case.operation in WITH_GRADIENT:
        gradients = {name: gradient for name, (_, gradient) in results.items() if gradient is not None}
        largest = _compare_gradients(case, count, tuple(t[drawn] for t in inputs), gradients, errors)
    half_ulp = torch.finfo(case.torch_dtype).eps / 2
    return errors, Errors(torch.finfo(torch.float32).eps / 2 * size, half_ulp * largest, half_ulp)


@torch.no_grad()
def _exact_mean(case: Case, inputs: Inputs, count: int) -> tuple[float, float]:
    """The mean loss over all rows in float64, and the mean size of a token's: what float32 has to round."""
    losses = expressions.tokens(case)
    each = torch.cat([losses(*exact_rows(inputs, part)) for part in chunks(case.tokens, case.vocab)])
    return each.sum().item() / count, each.abs().sum().item() / count


def _compare_gradients(
    case: Case, count: int, drawn: Inputs, gradients: Mapping[str, Tensor], errors: Mapping[str, Errors]
) -> float:
    """Fills in the errors of the gradients, on the rows drawn; returns the largest gradient there is."""
    losses = expressions.tokens(case)
    floor = torch.finfo(case.torch_dtype).smallest_normal
    largest = 0.0
    for part in chunks(len(drawn[0]), case.vocab):
        logits, *others = exact_rows(drawn, part)
        logits.requires_grad_()
        (exact,) = torch.autograd.grad(losses(logits, *others).sum() / count, logits)
        size = expressions.off_support(case, logits.detach(), *others).div_(count)
        scale = 1 / torch.maximum(size, exact.abs()).clamp_min_(floor)
        largest = max(largest, exact.abs().max().item())
        for name, gradient in gradients.items():
            error = torch.sub(exact, gradient[part]).abs_()
            errors[name].gradient = worse(errors[name].gradient, error)
            errors[name].off_target = worse(errors[name].off_target, error.mul_(scale))
    return largest
