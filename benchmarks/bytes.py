"""How many bytes an operation must move, and how fast this device moves bytes.

    forward              N*V*b      every logit is read once
    training             2*N*V*b    and every gradient written once (the second read of a row comes from cache)
    topk_distillation    2*N*V*b    the same
    distillation         3*N*V*b    the logits of the teacher, in the same dtype, are read as well
    teacher_topk         N*V*b      every logit is read once

The O(N) terms (targets, losses, one histogram count a token) are below 0.1 % of that at V = 1000 and are left out, and
so are the O(N K) ones of a sparse teacher, below 0.2 % at K = 64 and V = 128256.
The same bytes are charged to every provider, whatever it really moves: a lower fraction of the roof is then time
lost, wherever it went.

The roofs are plain torch calls on tensors of the case's own size, timed in the same rounds as the providers: `read`
the faster of sum and amax, `write` fill_, `copy` copy_ into a buffer that is already mapped (2 bytes moved a byte
copied). `clone` is copy_ into fresh memory: what any operation that returns a new (N, V) tensor can reach at best
with the allocator in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.cases import Case
    from benchmarks.inputs import Inputs

TENSORS = {"forward": 1, "training": 2, "topk_distillation": 2, "distillation": 3, "teacher_topk": 1}
ROOF_OF = {operation: "read" if tensors == 1 else "copy" for operation, tensors in TENSORS.items()}
ROOF_TENSORS = {"read": 1, "write": 1, "copy": 2, "clone": 2}  # tensors of N*V*b bytes that pass through memory


def moved(case: Case) -> int:
    """The bytes the operation must move, at least."""
    return case.logits_bytes * TENSORS[case.operation]


def roof_steps(inputs: Sequence[Inputs], buffer: Tensor) -> dict[str, Callable[[int], object]]:
    """The roofs as steps for `timing.interleave`: a function of the index of the input set. `buffer` is overwritten."""

    def logits(i: int) -> Tensor:
        return inputs[i % len(inputs)][0]

    def words(i: int) -> Tensor:
        # 16-bit elements are read in pairs, as float32: summing them one by one would time arithmetic, not memory.
        flat = logits(i).view(-1)
        return flat[: len(flat) - len(flat) % 2].view(torch.float32)

    return {
        "read/sum": lambda i: words(i).sum(),
        "read/amax": lambda i: words(i).amax(),
        "write": lambda i: buffer.fill_(1.5),
        "copy": lambda i: buffer.copy_(logits(i)),
        "clone": lambda i: logits(i).clone(),
    }


def roofs(case: Case, medians: dict[str, float]) -> dict[str, float]:
    """Bytes per second of each roof, from the median seconds of the steps of `roof_steps`."""
    seconds = {"read": min(medians["read/sum"], medians["read/amax"])}
    seconds |= {name: medians[name] for name in ("write", "copy", "clone")}
    return {name: ROOF_TENSORS[name] * case.logits_bytes / s for name, s in seconds.items()}
