"""The cross-entropy kernels' machine code against float64, from the package's own launchers down."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from xentile import _layout as layout
from xentile._triton import cross_entropy as triton
from xentile._triton import launch

from .device import Launch, pretended_gpu
from .operators import (
    PLAIN,
    Inputs,
    Options,
    Outputs,
    assert_exact,
    assert_gradient,
    backward,
    exact,
    forward,
    steep_inputs,
)

MEAN, SUM, NONE = (layout.REDUCTIONS.index(name) for name in ("mean", "sum", "none"))
EVERYTHING = Options(
    ignore_index=3, reduction=MEAN, label_smoothing=0.1, z_loss=1e-3, softcap=20.0, logit_scale=0.7, zero_if_empty=True
)
MACHINES = [
    pytest.param(architecture, dtype, id=f"sm_{architecture}-{str(dtype).removeprefix('torch.')}")
    for architecture in (80, 90)
    for dtype in (torch.float32, torch.bfloat16)
]
TWO_MACHINES = [MACHINES[0], MACHINES[3]]
# V: one element; several rows a program: a thread each, of any alignment, with 16-byte loads; a row a program, kept in
# registers and streamed
SIZES = [1, 10, 51, 1000, 5003, 50257]


class Result(NamedTuple):
    outputs: Outputs
    launches: list[Launch]


def run(
    architecture: int,
    inputs: Inputs,
    options: Options = PLAIN,
    *,
    batch: int | None = 8192,
    last_block_first: bool = False,
    races: bool = False,
    **choices: Any,
) -> Result:
    """Launch as for a batch of so many rows (None: of those that there are, which splits long rows over programs)."""
    choose = launch.forward
    chosen = mock.patch.object(launch, "forward", lambda rows, *others: choose(batch or rows, *others))
    with chosen, pretended_gpu(architecture, last_block_first=last_block_first, races=races) as launches:
        outputs = forward(triton.cross_entropy, inputs, options, **choices)
    return Result(outputs, launches)


def random_inputs(rows: int, size: int, dtype: torch.dtype, *, seed: int = 0, scale: float = 3.0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, size, generator=generator) * scale).to(dtype)
    return Inputs(logits, torch.randint(0, size, (rows,), generator=generator))


def everything(inputs: Inputs, groups: int) -> Inputs:
    """With class weights, token weights, and groups of which one token's does not exist."""
    rows, size = inputs.logits.shape
    generator = torch.Generator().manual_seed(1)
    group_ids = torch.randint(0, groups, (rows,), generator=generator)
    group_ids[rows // 2] = groups
    return inputs._replace(
        weight=torch.rand(size, generator=generator) + 0.5,
        token_weight=torch.rand(rows, generator=generator) + 0.5,
        group_ids=group_ids,
    )


def awkward_inputs(size: int, dtype: torch.dtype) -> Inputs:
    """One row of each kind that breaks kernels."""
    kinds = 15
    inputs = random_inputs(kinds, size, dtype)
    logits, target = inputs.logits, inputs.target
    infinity = torch.inf
    logits[0], target[0] = torch.nan, -100  # ignored: never read
    target[1], target[2] = size, -5  # out of range
    logits[3, : size - 1] = -infinity  # whole tiles of -inf, the target finite
    target[3] = size - 1
    logits[4, 1:] = -infinity  # the target at -inf, if there is more than one column
    target[4] = size - 1
    logits[5] = -infinity
    logits[6, size // 2] = infinity
    logits[7, size // 2] = torch.nan
    logits[8, target[8]] = 40.0  # a loss near 1e-17 of the largest
    logits[9] *= 1e4 / logits[9].abs().max()
    logits[10] *= 1e-30
    logits[11] = 2.5  # all equal: the first is predicted
    target[12], target[13] = 0, size - 1
    logits[14, target[14]] = logits[14].max()  # tied with the maximum
    return inputs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("architecture", "dtype"), MACHINES)
def test_plain_loss_statistics_and_gradient(architecture: int, dtype: torch.dtype, size: int) -> None:
    inputs = random_inputs(5, size, dtype)
    inputs.target[2] = -100
    assert_exact(inputs, PLAIN, run(architecture, inputs).outputs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("architecture", "dtype"), MACHINES)
def test_every_option_at_once(architecture: int, dtype: torch.dtype, size: int) -> None:
    inputs = everything(random_inputs(6, size, dtype), groups=3)
    inputs.target[1] = min(3, size - 1)
    assert_exact(inputs, EVERYTHING, run(architecture, inputs, EVERYTHING, groups=3).outputs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_awkward_rows(dtype: torch.dtype, size: int) -> None:
    inputs = awkward_inputs(size, dtype)
    outputs = run(90, inputs).outputs
    wanted = exact(inputs)
    undefined = wanted.token_loss.isnan() & (wanted.predicted >= 0)  # their gradient is anybody's guess
    for gradient in (outputs.dlogits, wanted.dlogits):
        assert gradient is not None
        gradient[undefined] = 0.0
    assert_exact(inputs, PLAIN, outputs, wanted=wanted)


@pytest.mark.parametrize("size", SIZES[-3:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_too_large_for_distances(dtype: torch.dtype, size: int) -> None:
    inputs = steep_inputs(size, dtype)
    assert_exact(inputs, PLAIN, run(90, inputs).outputs)


@pytest.mark.parametrize("size", [1000, 5003, 50257])
def test_target_in_any_tile_and_in_both_edges(size: int) -> None:
    columns = [*range(3), *range(size // 7, size - 10, size // 7), size - 2, size - 1]
    inputs = random_inputs(len(columns), size, torch.bfloat16)
    inputs.target[:] = torch.tensor(columns)
    assert_exact(inputs, PLAIN, run(90, inputs).outputs)


@pytest.mark.parametrize("size", [1000, 5003, 50257])
def test_confident_tokens_keep_their_digits(size: int) -> None:
    """Losses from 1 down to 1e-7, with the target late and early in the row: within 1e-6 of float64."""
    inputs = random_inputs(16, size, torch.float32)
    rows = torch.arange(16)
    inputs.target[:8] = torch.randint(0, 100, (8,))
    rest = inputs.logits.double().logsumexp(1)
    inputs.logits[rows, inputs.target] = (rest + torch.linspace(0, 16, 16, dtype=torch.float64)).float()
    outputs = run(90, inputs, gradient=False).outputs
    wanted = exact(inputs, gradient=False).token_loss
    error = (outputs.token_loss.double() / wanted - 1).abs()
    assert wanted.min() < 2e-7
    assert error.max() <= 1e-6, f"relative errors {error.tolist()}"


@pytest.mark.parametrize("size", [100, 5003])
@pytest.mark.parametrize("shift", [1, 2, 3, 7])
def test_rows_that_start_anywhere(shift: int, size: int) -> None:
    """A view whose rows begin at every alignment, between columns of NaN that must not be read."""
    wide = torch.full((6, size + 2 * shift), torch.nan, dtype=torch.bfloat16)
    inputs = random_inputs(6, size, torch.bfloat16)
    wide[:, shift:-shift] = inputs.logits
    inputs = inputs._replace(logits=wide[:, shift:-shift])
    assert_exact(inputs, PLAIN, run(90, inputs).outputs)


@pytest.mark.parametrize("size", [1000, 5003])
def test_rows_more_than_two_to_the_31_elements_apart(size: int) -> None:
    """Offsets in 64 bits: the same machine code with the second row far away."""
    from .interpreter import Scattered

    inputs = random_inputs(2, size, torch.bfloat16)
    outputs, launches = run(90, inputs, gradient=False)
    stride = 2**31 + 8
    rows = [row.contiguous().view(torch.uint8).numpy() for row in inputs.logits]
    far = Scattered({0: rows[0], 2 * stride: rows[1]})
    losses = outputs.token_loss.clone()
    outputs.token_loss.fill_(torch.nan)
    launches[0].again(x_ptr=far, x_stride=stride)
    assert torch.equal(outputs.token_loss, losses)


def split_inputs(dtype: torch.dtype) -> Inputs:
    """Few rows of a long vocabulary."""
    return random_inputs(2, 150001, dtype)


@pytest.mark.parametrize(("architecture", "dtype"), TWO_MACHINES)
def test_few_rows_split_over_programs(architecture: int, dtype: torch.dtype) -> None:
    inputs = split_inputs(dtype)
    outputs, launches = run(architecture, inputs, batch=None, races=True)
    assert {done.name for done in launches} >= {"split_kernel", "combine_kernel"}
    assert_exact(inputs, PLAIN, outputs)


@pytest.mark.parametrize("options", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("size", [10, 51, 1000, 5003])
def test_backward_equals_the_fused_gradient(size: int, options: Options) -> None:
    inputs = random_inputs(4, size, torch.bfloat16)
    inputs = everything(inputs, 1) if options is EVERYTHING else inputs
    outputs, _ = run(90, inputs, options)
    with pretended_gpu(90):
        separate = backward(triton.cross_entropy_backward, torch.ones(()), inputs, outputs, options)
    assert outputs.dlogits is not None
    assert torch.equal(separate, outputs.dlogits)


@pytest.mark.parametrize("size", [100, 5003])
def test_backward_of_a_filled_gradient_touches_nothing_when_the_upstream_gradient_is_one(size: int) -> None:
    inputs = random_inputs(3, size, torch.bfloat16)
    outputs, _ = run(90, inputs)
    assert outputs.dlogits is not None
    filled = outputs.dlogits.clone()
    with pretended_gpu(90) as launches:
        backward(triton.cross_entropy_backward, torch.ones(()), inputs, outputs, filled=filled)
        assert torch.equal(filled, outputs.dlogits)
        assert bytes_of(launches, "x_ptr", "loaded") == bytes_of(launches, "dx_ptr", "stored") == 0
        backward(triton.cross_entropy_backward, torch.tensor(65536.0), inputs, outputs, filled=filled)
    assert torch.equal(filled, outputs.dlogits * 65536)


@pytest.mark.parametrize("size", [100, 5003])
@pytest.mark.parametrize(("architecture", "dtype"), TWO_MACHINES)
def test_backward_with_a_gradient_per_row(architecture: int, dtype: torch.dtype, size: int) -> None:
    options = Options(reduction=NONE)
    inputs = random_inputs(4, size, dtype)
    inputs.target[1] = -100
    dloss = torch.tensor([2.0, 5.0, 0.0, -1.5])
    outputs, _ = run(architecture, inputs, options, gradient=False)
    with pretended_gpu(architecture):
        gradient = backward(triton.cross_entropy_backward, dloss, inputs, outputs, options)
    wanted = exact(inputs, options)
    assert wanted.dlogits is not None
    wanted.dlogits *= dloss[:, None].double()
    assert_gradient(inputs, options, gradient, wanted)


@pytest.mark.parametrize("size", [10, 1000, 5003, 50257])
def test_gradient_over_the_logits_equals_the_gradient_beside_them(size: int) -> None:
    """And no thread stores where another may still read."""
    inputs = random_inputs(2, size, torch.bfloat16)
    beside = run(90, inputs).outputs
    over = run(90, inputs._replace(logits=inputs.logits.clone()), inplace=True, races=True).outputs
    assert over.dlogits is not None
    assert beside.dlogits is not None
    assert torch.equal(over.dlogits, beside.dlogits)


def test_normalizer_and_empty_batches() -> None:
    inputs = random_inputs(4, 7, torch.float32)
    with_normalizer = inputs._replace(normalizer=torch.tensor(9.0))
    assert_exact(with_normalizer, PLAIN, run(90, with_normalizer).outputs)
    inputs.target[:] = -100
    empty = run(90, inputs, Options(zero_if_empty=True)).outputs
    assert empty.loss == 0
    assert empty.dlogits is not None
    assert not empty.dlogits.any()
    assert run(90, inputs).outputs.loss.isnan()


@pytest.mark.parametrize(("architecture", "dtype"), [(100, torch.bfloat16), (120, torch.float32)])
def test_blackwell(architecture: int, dtype: torch.dtype) -> None:
    """Packed float32 arithmetic and mixed-precision instructions, new in these architectures."""
    inputs = random_inputs(3, 1000, dtype)
    assert_exact(inputs, PLAIN, run(architecture, inputs).outputs)


def test_results_are_the_same_bits_in_any_order_of_blocks() -> None:
    """Each program writes its own row; what is summed over rows is summed in one order, with no float atomics."""
    inputs = random_inputs(20, 1000, torch.bfloat16)
    first, launches = run(90, inputs)
    assert sum(done.counts.float_atomics for done in launches) == 0
    last, _ = run(90, inputs, last_block_first=True)
    for (name, mine), (_, other) in zip(first.items(), last.items(), strict=True):
        assert torch.equal(mine, other), name


def _case(draw: st.DrawFn) -> tuple[int, Inputs, Options, int]:
    architecture, dtype = draw(st.sampled_from([(80, torch.float32), (90, torch.bfloat16)]))
    # each range has one tile. In the first a program has several rows, in the second too, if they are aligned to four
    # logits; else it has one in registers. In the last, and with gaps between the rows in the third, it is streamed.
    ranges = [(33, 64), (513, 1024), (2049, 4096), (32769, 33800)]
    size = draw(st.one_of(*(st.integers(*limits) for limits in ranges)))
    rows = draw(st.integers(1, 6 if size <= 4096 else 2))
    inputs = random_inputs(
        rows, size, dtype, seed=draw(st.integers(0, 2**20)), scale=draw(st.sampled_from([0.01, 3, 40]))
    )
    logits, target = inputs.logits, inputs.target
    gap = draw(st.integers(0, 9))
    spread = torch.full((rows, size + gap), torch.nan, dtype=dtype)
    spread[:, gap:] = logits
    for row in range(rows):
        what = draw(
            st.sampled_from(["as it is"] * 4 + ["ignored", "below", "above", "mostly -inf", "target is maximum"])
        )
        if what in ("ignored", "below", "above"):
            target[row] = {"ignored": -100, "below": -7, "above": size}[what]
        elif what == "mostly -inf":
            kept = draw(st.integers(0, size - 1))
            spread[row, gap:][torch.arange(size) != kept] = -torch.inf
            target[row] = kept
        elif what == "target is maximum":
            spread[row, gap + target[row]] = spread[row, gap:].max() + draw(st.sampled_from([0, 0.5, 20]))
    options = PLAIN
    inputs = inputs._replace(logits=spread[:, gap:])
    if draw(st.booleans()):
        inputs, options = everything(inputs, 2), EVERYTHING
    return architecture, inputs, options, 1 if options is PLAIN else 2


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
@given(st.composite(_case)())
def test_any_shape_and_any_values(case: tuple[int, Inputs, Options, int]) -> None:
    architecture, inputs, options, groups = case
    assert_exact(inputs, options, run(architecture, inputs, options, groups=groups).outputs)


def bytes_of(launches: list[Launch], tensor_name: str, kind: str) -> int:
    return sum(done.named[kind][tensor_name] for done in launches)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_reads_each_logit_once(dtype: torch.dtype, aligned: bool) -> None:
    inputs = random_inputs(4, 50256 if aligned else 50257, dtype)
    _, launches = run(90, inputs, gradient=False)
    logits = inputs.logits
    # and, a row: its target, its edges, and once more the group of 16 bytes that holds the maximum
    assert logits.nbytes <= bytes_of(launches, "x_ptr", "loaded") <= 1.01 * logits.nbytes
    sectors = sum(done.counts.load_sectors[list(done.arguments).index("x_ptr")] for done in launches[:1])
    # a warp's 512 bytes touch one sector more when the row begins in the middle of one; its neighbour shares it
    assert 32 * sectors <= (1.02 if aligned else 1.08) * logits.nbytes


def test_fused_gradient_reads_twice_and_writes_once_when_streamed() -> None:
    inputs = random_inputs(4, 50257, torch.bfloat16)
    _, launches = run(90, inputs)
    nbytes = inputs.logits.nbytes
    assert bytes_of(launches, "dx_ptr", "stored") == nbytes + 4 * 2  # the target's element is written over
    assert 2 * nbytes <= bytes_of(launches, "x_ptr", "loaded") <= 1.05 * 2 * nbytes


@pytest.mark.parametrize("size", [1000, 5003])
def test_fused_gradient_reads_once_and_writes_once_when_the_row_fits_in_registers(size: int) -> None:
    inputs = random_inputs(8, size, torch.bfloat16)
    _, launches = run(90, inputs)
    nbytes = inputs.logits.nbytes
    assert bytes_of(launches, "dx_ptr", "stored") == nbytes + 8 * 2  # the target's element is written over
    assert nbytes <= bytes_of(launches, "x_ptr", "loaded") <= 1.2 * nbytes


@pytest.mark.parametrize("size", [1000, 5003])
def test_ignored_rows_are_not_read(size: int) -> None:
    inputs = random_inputs(3, size, torch.bfloat16)
    inputs.target[:] = -100
    _, launches = run(90, inputs)
    assert bytes_of(launches, "x_ptr", "loaded") == 0
    assert bytes_of(launches, "dx_ptr", "stored") == inputs.logits.nbytes


def work_of_rows(inputs: Inputs, rows: launch.Rows | None = None) -> Launch:
    """What the forward launches over the rows, with the gradient; by the launcher's choice or another one."""
    with pretended_gpu(90) as launches:
        forward(functools.partial(triton.cross_entropy, rows=rows), inputs, statistics=False)
    return next(done for done in launches if done.name in ("row_kernel", "short_row_kernel"))


@pytest.mark.parametrize(("size", "times"), [(2, 30), (32, 15), (100, 3.5), (256, 2.5), (1000, 1.1)])
def test_short_rows_together_take_fewer_instructions_than_each_alone(size: int, times: float) -> None:
    inputs = random_inputs(128, size, torch.bfloat16)
    together = work_of_rows(inputs).counts.instructions
    alone = work_of_rows(inputs, launch.Rows(max(256, 1 << (size - 1).bit_length()), 32, resident=True))
    assert alone.counts.instructions > times * together, f"{alone.counts.instructions / together:.1f} times"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_short_rows_are_read_sixteen_bytes_at_a_time(dtype: torch.dtype) -> None:
    inputs = random_inputs(64, 256, dtype)
    done = work_of_rows(inputs)
    requests = done.counts.load_requests[list(done.arguments).index("x_ptr")]
    again = 3 * 64 // (32 // 4)  # for each warp of eight rows: the target's logit, its group, that of the maximum
    assert requests == inputs.logits.nbytes // (32 * 16) + again


@pytest.mark.parametrize("size", [10, 50257])
def test_one_atomic_a_row_counts_the_loss(size: int) -> None:
    inputs = random_inputs(8, size, torch.bfloat16)
    _, launches = run(90, inputs)
    assert [done.named["atomics"].total() for done in launches if "row_kernel" in done.name] == [len(inputs.logits)]
