"""Workloads as data, named after the models whose vocabulary they have. N tokens, V columns.

A case is one operation on one shape in one dtype. Tags choose cases: "ci" (a second each; the tests use them too),
"issue2" (the speed table), "headline" (the README), "gpu" (a GPU's worth of tokens), "percentiles" (also times the
sketch on against off).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch
from torch import Tensor

VOCABULARIES = {
    "resnet50": 1000,
    "llama2c-tok4096": 4096,
    "llama2-7b": 32000,
    "gpt2": 50257,  # odd: no row after the first is aligned
    "llama3-8b": 128256,
    "qwen3-8b": 151936,
    "gemma3-1b": 262144,
}
OPERATIONS = ("forward", "training")  # no gradient; forward and backward. Both with reduction="mean"
ALLOCATORS = ("default", "retained")  # retained: freed pages stay mapped (benchmarks/memory.py)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    model: str
    tokens: int
    dtype: str
    operation: str
    tags: tuple[str, ...] = ()
    allocator: str = "default"

    @property
    def vocab(self) -> int:
        return VOCABULARIES[self.model]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def logits_bytes(self) -> int:
        return self.tokens * self.vocab * self.torch_dtype.itemsize

    @property
    def name(self) -> str:
        suffix = "" if self.allocator == "default" else f"+{self.allocator}"
        return f"{self.model}/{self.tokens}/{self.dtype}/{self.operation}{suffix}"


def _cases(model: str, tokens: int, dtypes: str, tags: str, operations: tuple[str, ...] = OPERATIONS) -> list[Case]:
    return [Case(model, tokens, d, op, tuple(tags.split())) for d in dtypes.split() for op in operations]


CASES: tuple[Case, ...] = (
    *_cases("llama3-8b", 1024, "float32 bfloat16", "issue2 headline percentiles"),
    *(replace(c, allocator="retained") for c in _cases("llama3-8b", 1024, "float32 bfloat16", "issue2", ("training",))),
    *_cases("llama2-7b", 2048, "float32 bfloat16", "issue2 headline"),
    *_cases("resnet50", 32768, "float32 bfloat16", "issue2 headline"),
    *_cases("gpt2", 1024, "float32 bfloat16", "cpu"),
    *_cases("qwen3-8b", 512, "float32 bfloat16", "cpu"),
    *_cases("gemma3-1b", 256, "float32 bfloat16", "cpu"),
    *_cases("llama3-8b", 1024, "float16", "cpu"),
    # Small enough for every push: each model's row length once, and the loss's two dtypes.
    *_cases("resnet50", 256, "float32 bfloat16 float16", "ci"),
    *_cases("llama2c-tok4096", 256, "float32 bfloat16", "ci"),
    *_cases("gpt2", 64, "float32 bfloat16", "ci"),
    *_cases("gemma3-1b", 16, "float32 bfloat16", "ci"),
    # What issue 5 promises of an H100, the headlines first: gpu.sh ends the run when its time is up.
    *_cases("llama3-8b", 8192, "bfloat16 float32", "gpu headline percentiles"),
    *_cases("llama2-7b", 8192, "bfloat16", "gpu headline"),
    *_cases("gemma3-1b", 8192, "bfloat16", "gpu headline"),
    *_cases("gemma3-1b", 64, "bfloat16", "gpu"),  # few rows, long vocabulary: can a row fill the chip?
    *_cases("resnet50", 65536, "bfloat16", "gpu"),
    *_cases("llama2c-tok4096", 65536, "bfloat16 float16", "gpu"),
    *_cases("gpt2", 8192, "bfloat16", "gpu"),
    *_cases("qwen3-8b", 8192, "bfloat16", "gpu"),
)


def select(tag: str, pattern: str = "*") -> list[Case]:
    """The cases with `tag` ("all": every one) whose name matches the shell pattern or contains it, in listed order."""
    cases = [c for c in CASES if tag == "all" or tag in c.tags]
    if not cases:
        known = sorted({t for c in CASES for t in c.tags})
        raise ValueError(f"cases must be one of {', '.join(known)} or all, got {tag}")
    return [c for c in cases if fnmatch(c.name, pattern) or pattern in c.name]


def quick(case: Case) -> Case:
    """The same row length with a sixteenth of the tokens: a check that everything runs, not a number to keep."""
    return replace(case, tokens=max(16, case.tokens // 16))


def make_inputs(case: Case, seed: int, device: str, ignored: float = 0.0) -> tuple[Tensor, Tensor]:
    """Random logits (N, V) and int64 target (N,); `ignored` of the targets are -100.

    The target's logit is raised by 0 to 20 nats, row by row: token losses then run from above ln V to far below 1e-3,
    and the target is the row's maximum in some rows and not in others, as it is while a model trains.
    """
    generator = torch.Generator(device).manual_seed(seed)
    n, v = case.tokens, case.vocab
    logits = torch.randn(n, v, generator=generator, dtype=case.torch_dtype, device=device).mul_(2)
    target = torch.randint(v, (n,), generator=generator, device=device)
    raised = torch.rand(n, 1, generator=generator, device=device).mul_(20).to(case.torch_dtype)
    logits.scatter_add_(1, target[:, None], raised)
    if ignored:
        target[torch.rand(n, generator=generator, device=device) < ignored] = -100
    return logits, target
