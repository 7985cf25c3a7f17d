"""The machine code of exact quantiles: digits counted as the specification says."""

from __future__ import annotations

import pytest
import torch

from xentile._triton.quantile import radix_counts
from xentile.reference import quantile as spec

from .device import pretended_gpu

COUNT = 9001  # five tiles, of which the last is not full


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["", "masked", "weighted"])
def test_every_digit_is_counted_as_the_specification_says(architecture: int, dtype: torch.dtype, option: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**63), 2**63 - 1, (COUNT,), generator=generator).view(dtype)[:COUNT].contiguous()
    x[:3000] = 0.0  # they share every prefix
    mask = torch.rand(COUNT, generator=generator) < 0.7 if option else None
    weights = torch.randint(0, 2**31, (COUNT,), generator=generator) if option == "weighted" else None
    shift, prefixes = 8 * dtype.itemsize, torch.zeros(1, dtype=torch.int64)
    for bits in spec.DIGITS[dtype]:
        shift -= bits
        wanted = torch.full((len(prefixes), 1 << bits), 3)  # counts of before
        actual = wanted.clone()
        spec.radix_counts(x, mask, weights, prefixes, shift, bits, wanted)
        with pretended_gpu(architecture):
            radix_counts(x, mask, weights, prefixes, shift, bits, actual)
        assert torch.equal(actual, wanted), shift
        prefixes = spec._shift(spec.key_of(x[[0, 0, 3001, 4000]]), shift)
