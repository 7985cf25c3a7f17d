"""`CrossEntropyQuantiles`: mean and percentiles of the per-token loss as a metric of TorchMetrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xentile import _check
from xentile._layout import EXTREMES
from xentile.cross_entropy import cross_entropy
from xentile.distributed import all_reduce_
from xentile.sketch import LossSketch

try:
    from torchmetrics import Metric
    from torchmetrics.utilities.distributed import gather_all_tensors
except ImportError as error:
    raise ImportError("CrossEntropyQuantiles needs TorchMetrics: pip install 'xentile[torchmetrics]'") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)


class CrossEntropyQuantiles(Metric):
    r"""Mean and percentiles of the per-token cross-entropy of a language model, over batches and ranks.

    The state is a :class:`xentile.LossSketch`: 32 KiB on the metric's device, whatever the number of tokens. Counts and
    the sum are exact, and every percentile is within 2**-7 relative, or 2**-24 nats, of the exact one. Synchronisation
    is one all-reduce, and bitwise the same in any order of batches and ranks; a rank without tokens takes part.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``preds`` (:class:`~torch.Tensor`): Logits of shape ``(N, V)`` or ``(N, V, d1, ...)``, float32, bfloat16, float16
      or float64. Logits ``(batch, length, V)`` are passed as ``preds.flatten(0, 1)``, with ``target.flatten()``.
    - ``target`` (:class:`~torch.Tensor`): Class indices of shape ``(N,)`` or ``(N, d1, ...)``

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``losses`` (``dict``): 0-d float32 tensors in nats: ``mean_loss``, and ``p10_loss`` and so on for each quantile.
      All names end in ``loss``, which trainers take for lower is better. NaN where no token was counted.

    ``forward`` reads the percentiles of every batch; ``update`` only counts, which is what a training loop wants.
    Losses that are NaN are left out, and counted: ``metric.sketch.nan_count()``. A :class:`~torchmetrics.MetricTracker`
    finds the best step of a metric that returns a dict only in a collection:
    ``MetricTracker(MetricCollection([metric]), maximize=False)``.

    Args:
        quantiles: Which quantiles, in [0, 1], become percentiles of the output.
        ignore_index: Targets with this value are left out.
        kwargs: Additional keyword arguments, see :ref:`Metric kwargs` for more info. A ``dist_sync_fn`` of your own
            replaces the all-reduce.

    Example:
        >>> from torch import tensor
        >>> from xentile.integrations.torchmetrics import CrossEntropyQuantiles
        >>> preds = tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
        >>> metric = CrossEntropyQuantiles(quantiles=(0.0, 1.0))
        >>> metric(preds, tensor([0, 0, -100]))
        {'mean_loss': tensor(0.7201), 'p0_loss': tensor(0.1269), 'p100_loss': tensor(1.3133)}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    state: Tensor

    def __init__(self, quantiles: Sequence[float] = QUANTILES, ignore_index: int = -100, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check.quantiles(quantiles, torch.device("cpu"))
        self.quantiles = tuple(float(q) for q in quantiles)
        self.ignore_index = _check.integer(ignore_index, "ignore_index")
        self.add_state("state", LossSketch().state, dist_reduce_fx=_merged, persistent=True)

    @property
    def sketch(self) -> LossSketch:
        """The sketch over the metric's state, shared: for other read-outs, and to count in elsewhere.

        Take it anew after each `reset`, `forward` and `compute`: TorchMetrics replaces the state in them.
        """
        return LossSketch.from_state(self.state)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count the losses of logits and class indices."""
        cross_entropy(preds.detach(), target, ignore_index=self.ignore_index, reduction="sum", sketch=self.sketch)

    def update_from_loss(self, ce: Tensor, mask: Tensor | None = None) -> None:
        """Count per-token losses (nats) of any shape and float dtype, where `mask` (bool, same shape) holds."""
        self.sketch.update(ce, mask)
        self._computed = None  # what TorchMetrics does around `update`
        self._update_count += 1

    def compute(self) -> dict[str, Tensor]:
        """Mean and percentiles of all losses so far, on all ranks."""
        sketch = self.sketch
        names = [f"p{100 * q:.10g}_loss" for q in self.quantiles]
        percentiles = sketch.quantile(self.quantiles).unbind()
        return {"mean_loss": sketch.mean().float(), **dict(zip(names, percentiles, strict=True))}

    def set_dtype(self, dst_type: str | torch.dtype) -> CrossEntropyQuantiles:
        """Leaves the counts the integers they are."""
        return self

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """One all-reduce, where TorchMetrics has a barrier, a gather of shapes and a gather of each state."""
        if dist_sync_fn is not gather_all_tensors:
            super()._sync_dist(dist_sync_fn, process_group)
        else:
            all_reduce_(self.sketch, process_group or self.process_group, check=False)  # one class, one kind of sketch

    def plot(
        self, val: dict[str, Tensor] | Sequence[dict[str, Tensor]] | None = None, ax: _AX_TYPE | None = None
    ) -> _PLOT_OUT_TYPE:
        """Plot the mean and the percentiles.

        Args:
            val: Either a single result from calling `metric.forward` or `metric.compute` or a list of these results:
                lines over steps. If no value is provided, will automatically call `metric.compute` and plot that
                result.
            ax: An matplotlib axis object. If provided will add plot to that axis

        Returns:
            Figure and Axes object

        Raises:
            ModuleNotFoundError:
                If `matplotlib` is not installed

        .. plot::
            :scale: 75

            >>> # Example plotting a single value
            >>> import torch
            >>> from xentile.integrations.torchmetrics import CrossEntropyQuantiles
            >>> metric = CrossEntropyQuantiles()
            >>> metric.update(torch.randn(100, 5), torch.randint(5, (100,)))
            >>> fig_, ax_ = metric.plot()

        .. plot::
            :scale: 75

            >>> # Example plotting multiple values
            >>> import torch
            >>> from xentile.integrations.torchmetrics import CrossEntropyQuantiles
            >>> metric = CrossEntropyQuantiles()
            >>> values = []
            >>> for _ in range(10):
            ...     values.append(metric(torch.randn(100, 5), torch.randint(5, (100,))))
            >>> fig_, ax_ = metric.plot(values)
        """
        return self._plot(val, ax)


def _merged(states: Tensor) -> Tensor:
    """The states (k, 1, width) of k batches or ranks as one (1, width)."""
    merged = states.sum(0)
    merged[:, EXTREMES] = states[:, :, EXTREMES].amax(0)
    return merged
