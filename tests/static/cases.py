"""The launches whose machine code is held to a budget: what training and evaluation of real models launch, every kernel
with every dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = BFLOAT16, FLOAT32, FLOAT16


class Case(NamedTuple):
    """rows x size logits, or values of a sketch; k columns of a teacher's top K; option: one of the operator's."""

    operator: str
    """A name in launches.py."""
    rows: int
    size: int
    dtype: torch.dtype
    k: int = 0
    temperature: float = 1.0
    option: str = ""

    @property
    def name(self) -> str:
        top = f" K = {self.k}" if self.k else ""
        heat = f" T = {self.temperature:g}" if self.k or self.temperature != 1 else ""
        option = f" {self.option}" if self.option else ""
        return f"{self.operator} {self.rows} x {self.size} {str(self.dtype).removeprefix('torch.')}{top}{heat}{option}"

    @property
    def streams(self) -> bool:
        """Rows too long for registers, or more values than programs, so there is a hot loop to look at."""
        return self.size > 16384 or (self.operator == "sketch" and self.rows >= 2**18)

    @property
    def reduces(self) -> bool:
        """There are passes that only read."""
        return not self.operator.endswith(("backward", "scale"))

    @property
    def writes(self) -> bool:
        """There is a pass that writes a gradient."""
        return self.operator.endswith(("training", "backward", "scale"))


_LONG, _ODD, _SPLIT = (8192, 128256), (8192, 50257), (64, 262144)
_SHORT = [(65536, 10), (65536, 256), (65536, 1000), (16384, 5003)]  # a program has 128, 8 and 2 of them, or one
_CROSS_ENTROPY = [
    *(Case(operator, *_LONG, dtype) for operator in ("forward", "training", "backward") for dtype in DTYPES),
    *(Case(operator, *_ODD, BFLOAT16) for operator in ("forward", "backward")),
    *(Case(operator, *shape, BFLOAT16) for shape in _SHORT for operator in ("forward", "training")),
    *(Case("training", *shape, dtype) for shape in (_SHORT[1], _SHORT[3]) for dtype in (FLOAT32, FLOAT16)),
    *(Case("backward", *_SHORT[1], dtype) for dtype in DTYPES),
    *(Case(operator, *_SPLIT, BFLOAT16) for operator in ("forward", "training")),
    *(Case("forward", *_SPLIT, dtype) for dtype in (FLOAT32, FLOAT16)),
    *(Case("training", *shape, BFLOAT16, option="every option") for shape in (_LONG, _SHORT[1])),
    *(Case("scale", *_LONG, dtype) for dtype in DTYPES),
]
_SKETCHES = [
    *(Case("sketch", rows, 1, FLOAT32) for rows in (8192, 2**20)),
    Case("sketch", 8192, 1, FLOAT32, option="grouped and weighted"),
    *(Case("quantile", 2**20, 1, dtype) for dtype in DTYPES),
    Case("quantile", 2**20, 1, FLOAT32, option="weighted"),
]
_DISTILLATION = [
    Case("topk_support", 8192, 1, FLOAT32, 64),
    *(Case("topk_forward", *_LONG, dtype, 64) for dtype in DTYPES),
    Case("topk_forward", *_LONG, BFLOAT16, 1024),
    *(Case("topk_training", *_LONG, dtype, 64) for dtype in DTYPES),
    *(Case("topk_training", *shape, BFLOAT16, 64, 2.0) for shape in (_LONG, _ODD)),
    Case("topk_training", 65536, 1000, BFLOAT16, 64),
    *(Case("topk_backward", *_LONG, dtype, 64, 2.0) for dtype in DTYPES),
    *(Case("dense_training", *_LONG, dtype, option="forward_kl") for dtype in DTYPES),
    Case("dense_forward", *_LONG, BFLOAT16, option="forward_kl"),
    *(Case("dense_training", *_LONG, BFLOAT16, 0, 2.5, divergence) for divergence in ("reverse_kl", "jsd")),
    *(Case("dense_backward", *_LONG, dtype, option="forward_kl") for dtype in DTYPES),
    *(Case("teacher", *_LONG, dtype, 64) for dtype in DTYPES),
    Case("teacher", *_LONG, BFLOAT16, 1024),
]
CASES = [*_CROSS_ENTROPY, *_SKETCHES, *_DISTILLATION]
