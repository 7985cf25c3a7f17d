"""What `topk_distillation_loss` and `distillation_loss` return."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from xentile.sketch import LossSketch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class DistillationOutput(NamedTuple):
    """The loss, and what the same pass learned about each token. Everything but `loss` is detached.

    Per-token fields have the shape of the logits without V and are float32 (float64 for float64 logits).
    """

    loss: Tensor
    """The training loss: () for 'mean' and 'sum', a value a token for 'none'."""
    kd_loss: Tensor
    """The divergence in nats, without weights and without the square of the temperature. 0 where the target is ignored,
    NaN where it is out of range."""
    token_loss: Tensor | None
    """Plain cross-entropy of the target at temperature 1, as in CrossEntropyOutput; None without a target."""
    teacher_mass: Tensor | None
    """P, what the teacher gives to the support at the call's temperature; NaN where that is not known (another
    temperature than 1, without teacher_log_z). None for a dense teacher."""
    student_mass: Tensor | None
    """Q, what the student gives to the support at the call's temperature; 0 where the target is ignored. None for a
    dense teacher."""
    counted: Tensor | None
    """Whether a token is not ignored, bool; None without a target: then every token counts."""

    def sketch(self) -> LossSketch:
        """A new sketch of this call's cross-entropies, on their device."""
        if self.token_loss is None:
            raise ValueError("sketch() and quantile() read cross-entropies: pass a target; kd_quantile needs none")
        sketch = LossSketch(self.token_loss.device)
        sketch.update(self.token_loss, self.counted)
        return sketch

    def kd_sketch(self) -> LossSketch:
        """A new sketch of this call's divergences, on their device."""
        sketch = LossSketch(self.kd_loss.device)
        sketch.update(self.kd_loss, self.counted)
        return sketch

    def quantile(self, q: float | Sequence[float] | Tensor, *, interpolation: str = "linear") -> Tensor:
        """Quantiles of this call's cross-entropies, float32, the shape of q; see LossSketch.quantile."""
        return self.sketch().quantile(q, interpolation=interpolation)

    def kd_quantile(self, q: float | Sequence[float] | Tensor, *, interpolation: str = "linear") -> Tensor:
        """Quantiles of this call's divergences, float32, the shape of q; see LossSketch.quantile."""
        return self.kd_sketch().quantile(q, interpolation=interpolation)

    def summary(self) -> str:
        """One readable block: percentiles of both losses, and the mean masses. Waits for the device."""
        from xentile.summary import distillation_summary

        return distillation_summary(self)
