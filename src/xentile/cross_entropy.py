"""`cross_entropy`: checks, flattening, autograd. The numbers come from the operators in _ops.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xentile import _check, _layout
from xentile._autograd import Inputs, Options, run
from xentile.output import CrossEntropyOutput
from xentile.sketch import LossSketch

STATS = ("entropy", "target_rank")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    normalizer: Tensor | float | None = None,
    all_ignored: str = "nan",
    group_ids: Tensor | None = None,
    sketch: LossSketch | None = None,
    stats: tuple[str, ...] = (),
    inplace: bool = False,
    check: bool = False,
) -> CrossEntropyOutput:
    r"""Cross-entropy of logits and target, with the percentiles of the per-token loss.

    `out.loss` equals `F.cross_entropy(logits.float(), target, ...)` and has its gradient; `out.quantile(...)` reads
    percentiles. With s = logit_scale, eps = label_smoothing, class weights w and token weights u, for a token with
    target t:

    .. math::
        z_j = s x_j \quad\text{or}\quad c \tanh(s x_j / c),\qquad \mathrm{CE} = \log\textstyle\sum_j e^{z_j} - z_t \\
        \ell = u\,[(1-\epsilon)\,w_t\,\mathrm{CE}
            + (\epsilon/V) \textstyle\sum_j w_j(\mathrm{lse} - z_j) + \lambda\,\mathrm{lse}^2]

    The percentiles are those of CE over the tokens that are not ignored, whatever else the loss contains.

    Args:
        logits: (V), (N, V) or (N, V, d1, ...), float32, bfloat16, float16 or float64. Arithmetic is float32 (float64
            for float64). Read in place when the vocabulary dimension has stride 1, else copied once.
        target: class indices, the shape of logits without V, int64, int32 or uint8; or class probabilities, the shape
            of logits (served by plain PyTorch on every device).
        weight: (V), a weight for each class.
        ignore_index: targets with this value are left out of everything. Any integer.
        reduction: 'none', 'mean' or 'sum'.
        label_smoothing: eps in [0, 1].
        z_loss: lambda >= 0, keeps logsumexp near 0 (PaLM, arXiv 2204.02311, section 5). Not multiplied by the class
            weight.
        softcap: c > 0 bounds the logits to (-c, c) (Gemma 2, arXiv 2408.00118, section 2). None leaves them as they
            are.
        logit_scale: s > 0, an inverse temperature.
        token_weight: the shape of an index target, a weight for each token.
        normalizer: what 'mean' divides by, instead of the sum of the weights of the tokens that count: a number or a
            0-d tensor (the `num_items_in_batch` of a trainer that accumulates gradients).
        all_ignored: a mean over no token is 'nan', as in PyTorch, or 'zero' with zero gradients.
        group_ids: the shape of an index target, the row of the sketch that counts a token (its domain, its position
            bucket).
        sketch: a LossSketch to count this batch in, in the same launch. Recomputation under activation checkpointing is
            not counted.
        stats: any of 'entropy' and 'target_rank', computed in the same pass.
        inplace: write the gradient over the logits, which saves one (N, V) tensor. Their values are lost. Under
            torch.compile the compiler decides.
        check: raise on a target out of range on any device, which waits for it. A CPU always checks; a GPU without
            `check` gives NaN for that token's loss and a zero gradient, and counts it (`out.out_of_range`,
            `LossSketch.out_of_range_count`).

    Returns:
        CrossEntropyOutput, see there. Only `loss` carries a gradient.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as F.cross_entropy for the same misuse. Nothing is counted.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]], requires_grad=True)
        >>> out = cross_entropy(logits, torch.tensor([0, 0, -100]))
        >>> out.loss.backward()
        >>> out.token_loss
        tensor([0.1269, 1.3133, 0.0000])
        >>> out.quantile([0.0, 1.0])
        tensor([0.1269, 1.3133])
    """
    soft = _check.logits_and_target(logits, target)
    options = checked_options(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, all_ignored)
    vocab_dim = min(logits.dim() - 1, 1)
    size = logits.shape[vocab_dim]
    token_shape = (*logits.shape[:vocab_dim], *logits.shape[vocab_dim + 1 :])
    _check.names(stats, "stats", STATS)
    _check.class_weight(weight, size)
    _check.token_weight(token_weight, token_shape)
    _check.normalizer(normalizer, reduction, logits.device)
    if sketch is not None:
        _check.instance(sketch, "sketch", LossSketch)
        _check.unweighted(sketch)
    _check.group_ids(group_ids, token_shape, sketch)
    state = sketch.state if sketch is not None else None
    tensors = {"target": target, "weight": weight, "token_weight": token_weight, "group_ids": group_ids}
    _check.same_device(logits, "logits", **tensors, sketch=state)
    _check.soft_target(soft, ignore_index, inplace)
    _check.inplace(inplace, logits)

    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    inputs = Inputs(
        logits=_rows(logits, vocab_dim, size),
        target=_rows(target, vocab_dim, size) if soft else indices(target),
        weight=None if weight is None else weight.to(acc).contiguous(),
        token_weight=None if token_weight is None else token_weight.reshape(-1).to(acc).contiguous(),
        normalizer=scalar(normalizer, acc, logits.device),
        group_ids=None if group_ids is None else group_ids.reshape(-1).long().contiguous(),
        state=state,
    )
    if not soft:
        _check.target_range(inputs.target, size, ignore_index, wait=check)
    if sketch is not None:
        _check.group_range(inputs.group_ids, sketch.groups, wait=check)
    wanted = {"entropy": "entropy" in stats, "target_rank": "target_rank" in stats}
    loss, *per_token = run(inputs, options, soft=soft, inplace=inplace, **wanted)
    if reduction == "none":
        loss = loss.reshape(token_shape)
    shaped: Any = (None if t is None else t.reshape(token_shape) for t in per_token)
    return CrossEntropyOutput(loss, *shaped)


def checked_options(
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    all_ignored: str = "nan",
) -> Options:
    """The scalar arguments as the operators take them, or an error that names the one that is wrong."""
    _check.one_of(reduction, "reduction", _layout.REDUCTIONS)
    _check.one_of(all_ignored, "all_ignored", ("nan", "zero"))
    return Options(
        ignore_index=_check.integer(ignore_index, "ignore_index"),
        reduction=_layout.REDUCTIONS.index(reduction),
        label_smoothing=_check.fraction(label_smoothing, "label_smoothing"),
        z_loss=_check.at_least_zero(z_loss, "z_loss"),
        softcap=0.0 if softcap is None else _check.positive(softcap, "softcap"),
        logit_scale=_check.positive(logit_scale, "logit_scale"),
        zero_if_empty=all_ignored == "zero",
    )


def _rows(x: Tensor, vocab_dim: int, size: int) -> Tensor:
    """(V), (N, V) or (N, V, d1, ...) as (tokens, V) with stride 1 in the last dimension: a view where one exists."""
    if x.dim() != 2:
        x = x.movedim(vocab_dim, -1).reshape(-1, size) if x.numel() else x.reshape(x.numel() // max(size, 1), size)
    return x if x.stride(1) == 1 or size <= 1 else x.contiguous()


def indices(target: Tensor) -> Tensor:
    """Flat, contiguous, and int32 or int64."""
    flat = target.reshape(-1).contiguous()
    return flat if flat.dtype == torch.int32 else flat.long()


def scalar(value: Tensor | float | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A 0-d tensor on the device, without waiting for it: a number is filled in there, not copied from the host."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype, non_blocking=True)
    return torch.full((), value, dtype=dtype, device=device)
