"""Confidence intervals of a quantile of the loss: how far it may be from that of the text the tokens were drawn from.

Tokens of one document are not independent, and an interval that takes them for independent is too short. So there are
three: of independent values, from a sketch (`confidence_interval`); of documents, from the losses
(`clustered_confidence_interval`); of documents, from a sketch that is mergeable (`grouped_confidence_interval`, which
is `sketch.confidence_interval(q, clustered=True)`).

Each is found as two ranks among the counted values, and the values there are its ends: nothing is assumed of the shape
of the distribution. All wait for the device.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from xentile import _check
from xentile import _layout as layout
from xentile.readout import Readout
from xentile.sketch import LossSketch

if TYPE_CHECKING:
    from collections.abc import Sequence

EXACT_UP_TO = 2000.0
"""Standard deviation, in ranks, up to which binomial probabilities are added up term by term."""


def confidence_interval(
    sketch: Readout, q: float | Sequence[float] | Tensor, *, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(lower, upper) that encloses the quantile q of the distribution the values were drawn from, independently.

    How many of n values are below the quantile is binomial (n, q), whatever the distribution, and that gives the ranks.
    The ends are widened to the edges of the bins that hold those ranks, so that the coverage is at least `level`. They
    are not moved closer than two bins, 2**-M relative each: with more than some million tokens that is more than the
    sampling error, and a sketch of higher precision gives a shorter interval.

    Args:
        sketch: of values without weights; each group is one sample.
        q: in [0, 1]; a number, a sequence or a tensor of any shape.
        level: the wanted coverage, in (0, 1).

    Returns:
        Two float32 tensors, shapes as `LossSketch.quantile`. -inf or inf where there are too few values for a limit on
        that side; NaN where there are none.
    """
    _check_level(level)
    wanted = _wanted(q, sketch.device)
    ranks = _independent_ranks(_counts(sketch), wanted, level)
    shape = wanted.shape if sketch.groups == 1 else (sketch.groups, *wanted.shape)
    lower, upper = _widened(sketch, *ranks)
    return lower.reshape(shape), upper.reshape(shape)


def clustered_confidence_interval(
    losses: Tensor, document_ids: Tensor, q: float | Sequence[float] | Tensor, *, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(lower, upper) for the quantile q of the losses of tokens that come in independently drawn documents.

    How the share of losses up to the quantile varies between documents (Woodruff, 1952) tells how many independent
    tokens would be as good; the rest is as in `confidence_interval`, with Student's t for few documents. Never shorter
    than the interval of independent tokens. It wants a few dozen documents, none of which has most of the tokens.

    Args:
        losses: of any shape and float dtype, nats; NaN are left out.
        document_ids: of the same shape, integers: which document a token is of. Any values.
        q: in [0, 1]; a number, a sequence or a tensor of any shape.
        level: the wanted coverage, in (0, 1).

    Returns:
        Two tensors of the shape of q and the dtype of losses, each entry one of the losses; -inf or inf where there are
        too few documents for a limit on that side; NaN without losses.
    """
    _check_level(level)
    _check.floating(_check.tensor(losses, "losses"), "losses", TypeError)
    _check_ids(document_ids, losses)
    wanted = _wanted(q, losses.device)
    kept = ~losses.isnan()
    values, documents = losses.detach()[kept], document_ids[kept]
    ordered, n = values.sort().values, values.numel()
    if n == 0:
        return tuple(torch.full_like(wanted, torch.nan, dtype=losses.dtype) for _ in range(2))  # type: ignore[return-value]
    _, documents, sizes = documents.unique(return_inverse=True, return_counts=True)
    estimates = ordered[(torch.ceil(wanted.reshape(-1) * n).long() - 1).clamp(0, n - 1)]
    below = [torch.bincount(documents[values <= x], minlength=len(sizes)) for x in estimates]
    ranks = _clustered_ranks(torch.stack(below, 1) if below else sizes.new_zeros(len(sizes), 0), sizes, wanted, level)
    lower, upper = (ordered[(rank - 1).clamp(0, n - 1)] for rank in ranks)
    lower, upper = lower.masked_fill(ranks[0] < 1, -torch.inf), upper.masked_fill(ranks[1] > n, torch.inf)
    return lower.reshape(wanted.shape), upper.reshape(wanted.shape)


def grouped_confidence_interval(
    sketch: Readout, q: float | Sequence[float] | Tensor, *, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(lower, upper) for the quantile q of all groups together, which are independent samples of documents.

    The mergeable form of `clustered_confidence_interval`: count with `group_ids = document % groups`, and sketches of
    any number of shards or ranks merge as ever. All tokens of a document have to be in one group; then the groups vary
    as the documents do. A few dozen groups do. The ends are widened to the edges of bins.

    Args:
        sketch: with two groups or more, of values without weights.
        q: in [0, 1]; a number, a sequence or a tensor of any shape.
        level: the wanted coverage, in (0, 1).

    Returns:
        Two float32 tensors of the shape of q; -inf or inf where there are too few values or groups for a limit on that
        side; NaN where there are no values.
    """
    _check_level(level)
    _check.instance(sketch, "sketch", Readout)
    sizes = _counts(sketch)
    wanted = _wanted(q, sketch.device)
    pooled = LossSketch.from_state(sketch.state.sum(0, keepdim=True))
    keys = slice(layout.MAX_KEY, layout.SPECIAL)
    pooled.state[:, keys] = sketch.state[:, keys].amax(0)
    bins, n = pooled._buckets()[0][0], int(sizes.sum())
    at = torch.searchsorted(bins.cumsum(0), (torch.ceil(wanted.reshape(-1) * n)).clamp(min=1))
    below = sketch._buckets()[0].cumsum(1)[:, at.clamp(max=len(bins) - 1)]
    live = sizes > 0
    ranks = _clustered_ranks(below[live], sizes[live], wanted, level)
    lower, upper = _widened(pooled, *(rank[None] for rank in ranks))
    return lower.reshape(wanted.shape), upper.reshape(wanted.shape)


# -------------------------------------------------------------------------------------------------------------------
# ranks: the interval goes from the low-th to the high-th smallest value; 0 and n + 1 are no limit


def _independent_ranks(counts: Tensor, q: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """(G, Q) int64 for samples of sizes `counts` (G,)."""
    wanted = q.reshape(-1).tolist()
    found = [[binomial_range(n, p, level) for p in wanted] for n in counts.tolist()]
    low, high = torch.tensor(found, dtype=torch.int64, device=q.device).reshape(len(counts), -1, 2).unbind(2)
    return low, high + 1


def _clustered_ranks(below: Tensor, sizes: Tensor, q: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """(Q,) int64; below (D, Q) is how many of the `sizes` (D,) values of each cluster are up to the estimate.

    The share up to the estimate varies as that of fewer independent values would, and binomial ranks of so many are
    stretched to ranks of all (Korn and Graubard, 1998). With a normal distribution instead, intervals of the 1st and
    the 99th percentile miss twice as often as they should when the tokens of a document are alike.
    """
    n, clusters = int(sizes.sum()), len(sizes)
    share = below.double().sum(0) / n
    surplus = below - share * sizes[:, None]
    variance = clusters / max(clusters - 1, 1) * surplus.square().sum(0) / n**2
    inflation = (student_quantile(level, max(clusters - 1, 1)) / student_quantile(level, math.inf)) ** 2
    effective = (share * (1 - share) / (variance * inflation)).nan_to_num(math.inf).clamp(1, n).long()
    ranks = []
    for size, p in zip(effective.tolist(), q.reshape(-1).tolist(), strict=True):
        low, high = (0, size) if clusters < 2 else binomial_range(size, p, level)
        first = (low - 1) * n // size + 1 if low > 0 else 0
        last = -(-(high + 1) * n // size) if high < size else n + 1
        ranks.append((first, last))
    first_ranks, last_ranks = torch.tensor(ranks, dtype=torch.int64, device=q.device).reshape(-1, 2).unbind(1)
    return first_ranks, last_ranks


def binomial_range(n: int, p: float, level: float) -> tuple[int, int]:
    """The shortest (low, high) with P(B < low) and P(B > high) at most (1 - level) / 2 for B binomial (n, p).

    Sums of the probabilities in float64; where they are spread over thousands of values, the expansion of Cornish and
    Fisher, whose next term is less than a tenth of a rank there, one rank wider.
    """
    tail = (1 - level) / 2
    mean, deviation = n * p, math.sqrt(n * p * (1 - p))
    if deviation == 0:
        return round(mean), round(mean)
    if deviation > EXACT_UP_TO:
        z = NormalDist().inv_cdf(tail)
        centre, reach = mean + (1 - 2 * p) * (z * z - 1) / 6, -z * deviation
        return math.ceil(centre - reach - 0.5) - 1, math.ceil(centre + reach - 0.5) + 1
    span = 12 * deviation + 60  # what is further out is less than 1e-30
    first, last = max(0, math.floor(mean - span)), min(n, math.ceil(mean + span))
    k = np.arange(first + 1, last + 1, dtype=np.float64)
    log_mass = np.concatenate([[0.0], np.log((n - k + 1) / k * (p / (1 - p))).cumsum()])
    mass = np.exp(log_mass - log_mass.max())
    wanted = tail * mass.sum() * (1 - 1e-9)  # rounding may lengthen the interval, not shorten it
    low, high = (int(np.searchsorted(side.cumsum(), wanted)) for side in (mass, mass[::-1]))
    return first + low, last - high


def student_quantile(level: float, freedom: float) -> float:
    """The t with P(-t < T < t) = level, for Student's T with so many degrees of freedom.

    Four terms of the expansion in 1 / freedom (Abramowitz and Stegun, 26.7.5); a little short for one or two.
    """
    z = -NormalDist().inv_cdf((1 - level) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / freedom**power for power, term in enumerate(terms))


# -------------------------------------------------------------------------------------------------------------------


def _widened(sketch: Readout, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The lower edge of the bin of rank `low` and the upper one of that of rank `high` (G, Q), float32."""
    counts, left, right = sketch._buckets()
    upto = counts.cumsum(1)
    n = upto[:, -1:].long()
    least, most = sketch.min().reshape(-1, 1).double(), sketch.max().reshape(-1, 1).double()

    def edge(edges: Tensor, rank: Tensor) -> Tensor:
        index = torch.searchsorted(upto, rank.clamp(min=1).double().contiguous()).clamp(max=counts.shape[1] - 1)
        return torch.clamp(edges.gather(1, index), least, most)

    lower = edge(left, low).masked_fill(low < 1, -torch.inf)
    upper = edge(right, high).masked_fill(high > n, torch.inf)
    return tuple(t.masked_fill(n == 0, torch.nan).float() for t in (lower, upper))  # type: ignore[return-value]


def _counts(sketch: Readout) -> Tensor:
    """How many values each group counts, (G,) int64."""
    if sketch.unit != 1:
        raise ValueError("sketch must count values: how far weights can be trusted is not known, got weighted=True")
    return sketch.count().reshape(-1)


def _wanted(q: float | Sequence[float] | Tensor, device: torch.device) -> Tensor:
    wanted = _check.quantiles(q, device)
    if not bool(((wanted >= 0) & (wanted <= 1)).all()):
        raise ValueError(f"q must be in [0, 1], got {wanted.tolist()}")
    return wanted


def _check_level(level: Any) -> None:
    if not 0 < _check.number(level, "level") < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")


def _check_ids(ids: Any, losses: Tensor) -> None:
    if tuple(_check.tensor(ids, "document_ids").shape) != tuple(losses.shape):
        raise ValueError(f"document_ids must have the shape of losses, {tuple(losses.shape)}, got {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"document_ids must be integers, got {_check.dtype_name(ids.dtype)}")
    _check.same_device(losses, "losses", document_ids=ids)
