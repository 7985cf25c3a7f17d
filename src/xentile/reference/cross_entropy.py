"""Cross-entropy from logits, with every option, as formulas.

The target is kept out of the running sum, and the loss is assembled from terms that are never negative:

    m = max_j z_j      r = sum_{j != t} exp(z_j - m)
    CE = log1p(r)                                    if the target is the maximum
       = (m - z_t) + log(r + exp(z_t - m))           otherwise

`lse - z_t` instead would subtract two numbers of size 20 to get one of size 1e-5, and lose all its digits in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Terms(NamedTuple):
    """The outputs of the operator, in its order; all but `loss` are detached."""

    loss: Tensor  # () for mean and sum, (N,) for none
    denominator: Tensor  # () what the mean was divided by; 1 for none and sum
    token_loss: Tensor  # (N,) plain cross-entropy in nats; 0 where ignored, NaN where the target is out of range
    lse: Tensor  # (N,) logsumexp of the transformed logits z
    row_max: Tensor  # (N,) m = max z
    sum_exp: Tensor  # (N,) S = sum exp(z - m)
    predicted: Tensor  # (N,) int64; -1 where ignored, -2 where the target is out of range
    correct: Tensor  # (N,) bool
    entropy: Tensor  # (N,) of the model's distribution, in nats
    target_rank: Tensor  # (N,) int64, how many logits come before the target's; -1 where there is no target


def transform(x: Tensor, logit_scale: float = 1.0, softcap: float = 0.0) -> Tensor:
    """Z = s * x, or cap * tanh(s * x / cap) when `softcap` is not 0."""
    z = x * logit_scale if logit_scale != 1.0 else x
    return softcap * torch.tanh(z / softcap) if softcap else z


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    zero_if_empty: bool = False,
) -> Terms:
    """Cross-entropy of logits (N, V) and target (N,), differentiable in logits, weight, token_weight and normalizer.

    With smoothing eps, class weights w (W = sum_j w_j), token weight u and lambda = z_loss, a row's training loss is

        u * [(1 - eps) * w_t * CE + (eps / V) * (sum_j w_j (m - z_j) + W * log S) + lambda * lse^2],    S = sum_j
        exp(z_j - m)

    and the mean divides by `normalizer`, or by the sum of u * w_t over the tokens that count.
    """
    valid, live, t, x = rows_of(logits, target, ignore_index)
    z = transform(x, logit_scale, softcap)
    z_t = z.gather(1, t[:, None])[:, 0]
    at_target = torch.arange(z.shape[1], device=z.device) == t[:, None]

    m = z.detach().amax(1)
    is_max = z_t.detach() >= m
    shift = torch.where(is_max, z_t, m)  # in value always m; through z_t, so that log1p(r) has the target's gradient
    e = torch.exp(z - shift[:, None])
    r = e.masked_fill(at_target, 0.0).sum(1)
    log_s = torch.where(is_max, torch.log1p(r), torch.log(r + torch.exp(z_t - shift)))
    log_s = torch.where(m.isfinite(), log_s, torch.nan)  # +inf, NaN, or a row of -inf: NaN, as F.cross_entropy
    token_loss = (shift - z_t) + log_s
    lse = shift + log_s

    w_t = weight[t] if weight is not None else torch.ones_like(token_loss)
    row = (1 - label_smoothing) * w_t * token_loss
    if label_smoothing:
        below = shift[:, None] - z
        below, total = (below * weight, weight.sum()) if weight is not None else (below, z.shape[1])
        row = row + label_smoothing / z.shape[1] * (below.sum(1) + total * log_s)
    if z_loss:
        row = row + z_loss * lse**2
    counted = w_t
    if token_weight is not None:
        row, counted = row * token_weight, counted * token_weight
    bad = valid & ~live
    row = torch.where(live, row, 0.0).masked_fill(bad, torch.nan)
    loss, denominator = reduce_rows(row, torch.where(live, counted, 0.0), normalizer, reduction, zero_if_empty)

    with torch.no_grad():
        predicted = x.argmax(1)
        ahead = (x > x.gather(1, t[:, None])) | ((x == x.gather(1, t[:, None])) & _before(t, x.shape[1]))
        gap = torch.where(e > 0, e * (shift[:, None] - z), 0.0).sum(1)
        entropy = log_s + gap / torch.exp(log_s)
        return Terms(
            loss=loss,
            denominator=denominator.detach(),
            token_loss=torch.where(valid, token_loss.detach(), 0.0).masked_fill(bad, torch.nan),
            lse=torch.where(valid, lse.detach(), 0.0),
            row_max=torch.where(valid, m, 0.0),
            sum_exp=torch.where(valid, (r + torch.exp(z_t - shift)).detach(), 0.0),
            predicted=predicted.masked_fill(~valid, -1).masked_fill(bad, -2),
            correct=live & (predicted == t),
            entropy=torch.where(valid, entropy, 0.0),
            target_rank=ahead.sum(1).masked_fill(~live, -1),
        )


def cross_entropy_gradient(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    denominator: Tensor,
    token_loss: Tensor,
    row_max: Tensor,
    sum_exp: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> Tensor:
    """The gradient in closed form, (N, V) in the dtype of logits: two numbers a row, and one at the target.

    dx_j = (A p_j - C w_j) J_j,  p_j = exp(z_j - m) / S,  J_j = dz_j/dx_j,  and at the target, from 1 - p_t =
    -expm1(-CE), dx_t = g [-(1 - eps) w_t (1 - p_t) + (eps / V) (W p_t - w_t) + 2 lambda lse p_t] J_t.
    """
    _, live, t, x = rows_of(logits, target, ignore_index)
    size = x.shape[1]
    z = transform(x, logit_scale, softcap)
    jacobian = logit_scale * (1 - (z / softcap) ** 2) if softcap else torch.full_like(z, logit_scale)
    w = weight if weight is not None else torch.ones(size, dtype=x.dtype, device=x.device)
    w_t, total = w[t], w.sum()
    g = (dloss / denominator).expand(x.shape[0])
    if token_weight is not None:
        g = g * token_weight
    smooth = label_smoothing / size
    lse = row_max + sum_exp.log()
    a = g * ((1 - label_smoothing) * w_t + smooth * total + 2 * z_loss * lse)
    dx = ((a / sum_exp)[:, None] * torch.exp(z - row_max[:, None]) - (g * smooth)[:, None] * w) * jacobian
    p_t = torch.exp(-token_loss)
    at_target = (1 - label_smoothing) * w_t * torch.expm1(-token_loss)
    at_target = at_target + smooth * (total * p_t - w_t) + 2 * z_loss * lse * p_t
    dx = dx.scatter(1, t[:, None], (g * at_target)[:, None] * jacobian.gather(1, t[:, None]))
    return torch.where(live[:, None], dx, 0.0).to(logits.dtype)


def soft_cross_entropy(
    logits: Tensor,
    probabilities: Tensor,
    weight: Tensor | None = None,
    *,
    token_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    zero_if_empty: bool = False,
) -> Terms:
    """Cross-entropy of logits (N, V) against class probabilities (N, V), differentiable in both.

    A row's training loss is u * [-sum_j w_j q_j log p_j + lambda * lse^2] with q = (1 - eps) * probabilities + eps / V,
    where a term with q_j = 0 is 0 also when log p_j = -inf. The mean divides by `normalizer` or N, as F.cross_entropy
    does. Predictions are compared with the most probable class.
    """
    acc = accumulation_dtype(logits.dtype)
    x, q = logits.to(acc), probabilities.to(acc)
    z = transform(x, logit_scale, softcap)
    m = z.detach().amax(1, keepdim=True)
    log_s = torch.where(m.isfinite(), torch.exp(z - m).sum(1, keepdim=True).log(), torch.nan)
    cost = (m - z) + log_s  # -log p_j >= 0
    lse = (m + log_s)[:, 0]

    def expected(p: Tensor) -> Tensor:
        return torch.where(p == 0, 0.0, p * cost)

    terms = expected((1 - label_smoothing) * q + label_smoothing / x.shape[1])
    row = (terms * weight if weight is not None else terms).sum(1)
    if z_loss:
        row = row + z_loss * lse**2
    counted = torch.ones_like(lse)
    if token_weight is not None:
        row, counted = row * token_weight, token_weight
    loss, denominator = reduce_rows(row, counted, normalizer, reduction, zero_if_empty)

    with torch.no_grad():
        predicted, best = x.argmax(1), q.argmax(1)
        ahead = (x > x.gather(1, best[:, None])) | ((x == x.gather(1, best[:, None])) & _before(best, x.shape[1]))
        return Terms(
            loss=loss,
            denominator=denominator.detach(),
            token_loss=expected(q).sum(1).detach(),
            lse=lse.detach(),
            row_max=m[:, 0],
            sum_exp=torch.exp(log_s.detach())[:, 0],
            predicted=predicted,
            correct=predicted == best,
            entropy=expected(torch.exp(-cost)).sum(1).detach(),
            target_rank=ahead.sum(1),
        )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Valid (N,), live (N,), a target that can be gathered (N,), and x (N, V) with ignored rows replaced by zeros."""
    target = target.long()
    valid = target != ignore_index
    live = valid & (target >= 0) & (target < logits.shape[1])
    x = logits.to(accumulation_dtype(logits.dtype))
    return (
        valid,
        live,
        torch.where(live, target, 0),
        torch.where(valid[:, None], x, 0.0),
    )  # not x * valid: 0 * NaN = NaN


def _before(index: Tensor, size: int) -> Tensor:
    """(N, V) mask of the columns left of index (N,)."""
    return torch.arange(size, device=index.device) < index[:, None]


def reduce_rows(
    row: Tensor, counted: Tensor, normalizer: Tensor | None, reduction: str, zero_if_empty: bool
) -> tuple[Tensor, Tensor]:
    """(loss, denominator), summed in float64. An empty mean is 0 / 0 = NaN, or 0 / inf = 0 on request."""
    one = torch.ones((), dtype=row.dtype, device=row.device)
    if reduction == "none":
        return row, one
    total = row.double().sum()
    if reduction == "sum":
        return total.to(row.dtype), one
    denominator = counted.double().sum() if normalizer is None else normalizer.double()
    if zero_if_empty:
        denominator = torch.where(denominator == 0, torch.inf, denominator)
    return (total / denominator).to(row.dtype), denominator.to(row.dtype)
