"""The gate of teacher_topk: log-probabilities against float64, and behind each id the logit that belongs there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.errors import Errors, chunks, worse
from benchmarks.expressions import topk

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.cases import Case
    from benchmarks.inputs import Inputs

Results = tuple[Tensor, Tensor]
"""logprobs and ids, (N, K)"""


def compare(case: Case, inputs: Inputs, results: Mapping[str, Results]) -> tuple[dict[str, Errors], Errors]:
    """The errors of the results, by name, and what one rounding to float32 costs. Of equal logits any id will do."""
    errors = {name: Errors() for name in results}
    largest = 0.0
    for part in chunks(case.tokens, case.vocab):
        logits = inputs[0][part].double()
        exact, exact_ids = topk(case, logits)
        largest = max(largest, exact.abs().max().item())
        for name, (logprobs, ids) in results.items():
            difference = (logprobs[part] - exact).abs()
            wrong = logits.gather(1, ids[part].long()) != logits.gather(1, exact_ids)
            errors[name].loss = worse(errors[name].loss, difference.masked_fill(wrong, torch.inf))
    return errors, Errors(loss=torch.finfo(torch.float32).eps / 2 * largest)
