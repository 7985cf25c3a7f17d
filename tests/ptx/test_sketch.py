"""The sketch kernels' machine code: integers equal to the specification's, quantiles to the last digit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from xentile import _layout as layout
from xentile import reference
from xentile._triton import sketch as triton
from xentile._triton.cross_entropy import scale_
from xentile._triton.launch import Device

from .device import pretended_gpu

if TYPE_CHECKING:
    from torch import Tensor

SPECIAL_VALUES = [0.0, -0.0, 1e-40, -1.0, 2.0**-24, 1.0, 255.999, 256.0, 3e38, torch.inf, -torch.inf, torch.nan]
COUNTS = [1, 5000]  # less than a tile, and more than one


def losses(count: int) -> Tensor:
    """Losses of all sizes, some of them special."""
    generator = torch.Generator().manual_seed(0)
    values = torch.exp(torch.randn(count, generator=generator) * 4)
    special = torch.tensor(SPECIAL_VALUES)[: count // 2]
    values[: len(special)] = special
    return values


def updated(  # type: ignore[no-untyped-def]
    values: Tensor,
    *,
    bits: int = 7,
    groups: int = 1,
    masked: bool = False,
    unit: int = 1,
    weighted: bool = False,
    skipped: int = 0,
):
    """(what the kernel makes of a state, what the specification does), without the first `skipped` values."""
    generator = torch.Generator().manual_seed(1)
    values = values[skipped:]
    count = len(values)
    mask = torch.rand(count, generator=generator) < 0.7 if masked else None
    group_ids = torch.randint(-1, groups + 1, (count,), generator=generator) if groups > 1 else None
    weights = torch.rand(count, generator=generator) * 3 if weighted else None
    if weights is not None:
        weights[-4:] = torch.tensor([0.0, -2.0, torch.nan, 1e30])[-count:]
    start = torch.zeros(groups, layout.Layout(bits).width, dtype=torch.int64)
    start[:, layout.MAX_KEY] = 5  # a state that was updated before
    mine, theirs = start.clone(), start.clone()
    arguments = values, mask, weights, group_ids
    with pretended_gpu(90) as launches:
        triton.sketch_update(*arguments, mine, unit)
    assert not any(done.counts.float_atomics for done in launches)
    reference.sketch_update(*arguments, theirs, unit)
    return mine, theirs


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("groups", [1, 3])
def test_update_equals_the_specification(count: int, groups: int) -> None:
    mine, theirs = updated(losses(count), groups=groups)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("groups", [1, 3])
def test_masked_and_weighted_update(groups: int) -> None:
    mine, theirs = updated(losses(5000), groups=groups, masked=True, weighted=True, unit=2**20)
    assert torch.equal(mine, theirs)


BULK = 4096  # values a tile
REGULAR = [0.0, -0.0, 2.0**-149, 1e-9, 2.0**-24, 1.0, 255.99]
STRAY = [-1e-9, 256.0, 2.0**24 * 3, torch.inf, -torch.inf, torch.nan]


def bulk(count: int, values: list[float], **options: Any):  # type: ignore[no-untyped-def]
    """(what the kernel for many values makes of a state, what the specification does), by two programs."""
    x = torch.exp(torch.randn(count, generator=torch.Generator().manual_seed(0)) * 3).clamp(max=255)
    x[: len(values)] = torch.tensor(values)[:count]
    x = x[torch.randperm(count, generator=torch.Generator().manual_seed(1))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "BULK_FROM", 1)
        patch.setattr(triton.launch, "device_of", lambda _: Device(processors=1))
        return updated(x, **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [3, 2 * BULK, 3 * BULK + 77])
def test_many_values_are_counted_as_the_specification_says(count: int, masked: bool) -> None:
    mine, theirs = bulk(count, REGULAR, masked=masked, unit=5)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("masked", [False, True])
def test_what_has_no_bin_is_counted_by_the_second_loop_of_its_program(masked: bool) -> None:
    for stray in STRAY:
        mine, theirs = bulk(3 * BULK + 77, [stray], masked=masked)
        assert torch.equal(mine, theirs), stray


def test_many_values_may_all_be_special() -> None:
    for values in (STRAY * 900, [torch.nan] * 2 * BULK, [0.0] * 2 * BULK):
        mine, theirs = bulk(len(values), values)
        assert torch.equal(mine, theirs), values[:6]


@pytest.mark.parametrize("bits", [1, 8, 9])
def test_many_values_at_any_precision(bits: int) -> None:
    mine, theirs = bulk(BULK + 700, REGULAR + STRAY, bits=bits)
    assert torch.equal(mine, theirs)


def test_many_values_may_begin_anywhere() -> None:
    mine, theirs = bulk(2 * BULK, REGULAR, skipped=1)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bits", [1, 10])
def test_update_at_any_precision(bits: int) -> None:
    mine, theirs = updated(losses(700), bits=bits)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("interpolation", layout.INTERPOLATIONS)
@pytest.mark.parametrize("architecture", [80, 90])
def test_quantiles_equal_the_specification(architecture: int, interpolation: str) -> None:
    state = torch.zeros(4, layout.DEFAULT.width, dtype=torch.int64)
    for row, count in enumerate((1, 2, 999)):  # the last row stays empty
        reference.sketch_update(losses(count).nan_to_num(0.0, 300.0, 0.0), None, None, None, state[row : row + 1], 1)
    q = torch.tensor([0.0, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0], dtype=torch.float64)
    outputs = [torch.full((4, len(q)), -5.0) for _ in range(3)]
    with pretended_gpu(architecture):
        triton.sketch_quantile(state, q, *outputs, layout.INTERPOLATIONS.index(interpolation))
    for mine, theirs in zip(outputs, reference.sketch_quantile(state, q, interpolation), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1.2e-7, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 20001])
def test_scaling(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size).to(dtype)
    wanted = (x.float() * 0.3).to(dtype)
    with pretended_gpu(90) as launches:
        scale_(x, torch.tensor(0.3))
        assert torch.equal(x, wanted)
        scale_(x, torch.tensor(1.0))
    assert torch.equal(x, wanted)
    assert launches[-1].bytes_loaded("x_ptr") == launches[-1].bytes_stored("x_ptr") == 0
