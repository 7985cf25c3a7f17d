"""What `cross_entropy` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xentile.sketch import LossSketch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class CrossEntropyOutput(NamedTuple):
    """The loss, and what the same pass learned about each token. Everything but `loss` is detached.

    Per-token fields have the shape of an index target. They are float32 (float64 for float64 logits), int64 or bool.
    """

    loss: Tensor
    """The training loss: () for 'mean' and 'sum', the shape of target for 'none'."""
    token_loss: Tensor
    """Plain cross-entropy in nats, >= 0. 0 where the target is ignored, NaN where it is out of range."""
    lse: Tensor
    """logsumexp of the (scaled, capped) logits; 0 where the target is ignored."""
    predicted: Tensor
    """The most probable token, the lowest index of ties; -1 where the target is ignored, -2 where it is out of
    range."""
    correct: Tensor
    """Whether the prediction is the target."""
    entropy: Tensor | None
    """Entropy of the predicted distribution in nats, if asked for; 0 where the target is ignored."""
    target_rank: Tensor | None
    """How many tokens are predicted before the target, if asked for: 0 where correct; -1 without a target."""

    @property
    def out_of_range(self) -> Tensor:
        """How many targets were out of range, () int64."""
        return (self.predicted == -2).sum()

    def sketch(self) -> LossSketch:
        """A new sketch of this call's token losses, on their device."""
        sketch = LossSketch(self.token_loss.device)
        sketch.update(self.token_loss, self.predicted >= 0)
        return sketch

    def quantile(self, q: float | Sequence[float] | Tensor, *, interpolation: str = "linear") -> Tensor:
        """Quantiles of this call's token losses, float32, the shape of q; see LossSketch.quantile."""
        return self.sketch().quantile(q, interpolation=interpolation)

    def summary(self) -> str:
        """One readable block: tokens, mean, percentiles, maximum, accuracy. Waits for the device."""
        from xentile.summary import output_summary

        return output_summary(self)
