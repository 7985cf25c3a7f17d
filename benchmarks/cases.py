"""Workloads as data, named after the models whose vocabulary they have. N tokens, V columns.

A case is one operation on one shape in one dtype. Tags choose cases: "ci" (a second each; the tests use them too),
"issue2" (the speed table of the cross-entropy), "issue4" (that of distillation), "headline" (the README), "gpu" (a
GPU's worth of tokens), "percentiles" (also times the sketch on against off).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch

VOCABULARIES = {
    "resnet50": 1000,
    "llama2c-tok4096": 4096,
    "llama2-7b": 32000,
    "gpt2": 50257,  # odd: no row after the first is aligned
    "llama3-8b": 128256,
    "qwen3-8b": 151936,
    "gemma3-1b": 262144,
}
CROSS_ENTROPY = ("forward", "training")  # no gradient; forward and backward. Both with reduction="mean"
DISTILLATION = ("topk_distillation", "distillation", "teacher_topk")  # forward and backward; the last has no gradient
OPERATIONS = (*CROSS_ENTROPY, *DISTILLATION)
WITH_GRADIENT = ("training", "topk_distillation", "distillation")
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
    k: int = 0  # of a sparse teacher
    support: str = ""
    temperature: float = 1.0
    ce_weight: float = 0.0

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
        options = "".join(f"/{option}" for option in [self.options] if option)
        return f"{self.model}/{self.tokens}/{self.dtype}/{self.operation}{options}{suffix}"

    @property
    def options(self) -> str:
        """What distinguishes this case from others of its operation, for its name and for tables."""
        set_options = [
            self.support,
            f"K={self.k}" if self.k else "",
            f"T={self.temperature:g}" if self.temperature != 1 else "",
            f"ce={self.ce_weight:g}" if self.ce_weight else "",
        ]
        return ",".join(option for option in set_options if option)


def _cases(model: str, tokens: int, dtypes: str, tags: str, operations: tuple[str, ...] = CROSS_ENTROPY) -> list[Case]:
    return [Case(model, tokens, d, op, tuple(tags.split())) for d in dtypes.split() for op in operations]


def _topk(model: str, tokens: int, dtypes: str, tags: str, k: int = 64) -> list[Case]:
    """Both supports that know the teacher's true masses, and the tempered loss with the cross-entropy in one pass."""
    cases = _cases(model, tokens, dtypes, tags, ("topk_distillation",))
    return [
        replace(case, k=k, support=support, temperature=temperature, ce_weight=ce_weight)
        for case in cases
        for support, temperature, ce_weight in (
            ("truncated", 1.0, 0.0),
            ("tail_bucket", 1.0, 0.0),
            ("tail_bucket", 2.0, 0.5),
        )
    ]


def _dense(model: str, tokens: int, dtypes: str, tags: str) -> list[Case]:
    return _cases(model, tokens, dtypes, tags, ("distillation",))


def _teacher(model: str, tokens: int, dtypes: str, tags: str, k: int = 64) -> list[Case]:
    return [replace(case, k=k) for case in _cases(model, tokens, dtypes, tags, ("teacher_topk",))]


CASES: tuple[Case, ...] = (
    *_cases("llama3-8b", 1024, "float32 bfloat16", "issue2 headline percentiles"),
    *(replace(c, allocator="retained") for c in _cases("llama3-8b", 1024, "float32 bfloat16", "issue2", ("training",))),
    *_cases("llama2-7b", 2048, "float32 bfloat16", "issue2 headline"),
    *_cases("resnet50", 32768, "float32 bfloat16", "issue2 headline"),
    *_cases("gpt2", 1024, "float32 bfloat16", "cpu"),
    *_cases("qwen3-8b", 512, "float32 bfloat16", "cpu"),
    *_cases("gemma3-1b", 256, "float32 bfloat16", "cpu"),
    *_cases("llama3-8b", 1024, "float16", "cpu"),
    *_topk("llama3-8b", 1024, "float32 bfloat16", "issue4"),
    *(replace(c, allocator="retained") for c in _topk("llama3-8b", 1024, "float32", "issue4")),
    *_teacher("llama3-8b", 1024, "float32 bfloat16", "issue4"),
    *_dense("llama2-7b", 1024, "float32 bfloat16", "issue4"),
    *_dense("llama3-8b", 512, "float32 bfloat16", "issue4"),
    # Small enough for every push: each model's row length once, and the loss's two dtypes.
    *_cases("resnet50", 256, "float32 bfloat16 float16", "ci"),
    *_cases("llama2c-tok4096", 256, "float32 bfloat16", "ci"),
    *_cases("gpt2", 64, "float32 bfloat16", "ci"),
    *_cases("gemma3-1b", 16, "float32 bfloat16", "ci"),
    *_topk("gpt2", 32, "float32 bfloat16", "ci"),
    *_dense("gpt2", 16, "float32 bfloat16", "ci"),
    *_teacher("gpt2", 32, "float32 bfloat16", "ci"),
    # What issue 5 promises of an H100, the headlines first, and last what no target needs: gpu.sh ends the run when its
    # time is up.
    *_cases("llama3-8b", 8192, "bfloat16", "gpu headline percentiles"),
    *_cases("llama2-7b", 8192, "bfloat16", "gpu headline"),
    *_cases("gemma3-1b", 8192, "bfloat16", "gpu headline"),
    *_topk("llama3-8b", 8192, "bfloat16", "gpu"),
    *_cases("gemma3-1b", 64, "bfloat16", "gpu"),  # few rows, long vocabulary: can a row fill the chip?
    *_cases("resnet50", 65536, "bfloat16", "gpu"),
    *_cases("llama2c-tok4096", 65536, "bfloat16", "gpu"),
    *_cases("gpt2", 8192, "bfloat16", "gpu"),
    *_cases("qwen3-8b", 8192, "bfloat16", "gpu"),
    *_cases("llama3-8b", 8192, "float32", "gpu headline percentiles"),
    *_teacher("llama3-8b", 8192, "bfloat16", "gpu"),
    *_dense("llama3-8b", 8192, "bfloat16", "gpu"),
    *_cases("llama2c-tok4096", 65536, "float16", "gpu"),
)


def select(tags: str, pattern: str = "*") -> list[Case]:
    """The cases with one of the comma-separated tags ("all": every case) whose name matches the shell pattern or
    contains it, in listed order.
    """
    wanted, known = set(tags.split(",")), {tag for case in CASES for tag in case.tags}
    if unknown := wanted - known - {"all"}:
        raise ValueError(f"cases must be one of {', '.join(sorted(known))} or all, got {', '.join(sorted(unknown))}")
    cases = [c for c in CASES if "all" in wanted or wanted & set(c.tags)]
    return [c for c in cases if fnmatch(c.name, pattern) or pattern in c.name]


def quick(case: Case) -> Case:
    """The same row length with a sixteenth of the tokens: a check that everything runs, not a number to keep."""
    return replace(case, tokens=max(16, case.tokens // 16))
