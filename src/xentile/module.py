"""`CrossEntropyLoss`: the module form, with a sketch of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from xentile import _check, _layout
from xentile.cross_entropy import cross_entropy
from xentile.sketch import LossSketch

if TYPE_CHECKING:
    from xentile.output import CrossEntropyOutput


class CrossEntropyLoss(nn.Module):
    """Drop-in for torch.nn.CrossEntropyLoss that counts every token's loss in a sketch it owns.

    The sketch's state is a buffer: it moves with the module, is saved in its state_dict, has a fixed address under
    torch.compile and CUDA graphs, and counts in train and eval mode alike. Read it through `sketch`; `sketch.reset()`
    starts a new period. Keep one module for training and one for evaluation, and keep it out of
    DistributedDataParallel, which would overwrite the buffer with that of rank 0.

    Args:
        weight: (V), a weight for each class.
        groups: rows of the sketch, chosen by `group_ids`.
        **options: the keyword arguments of `xentile.cross_entropy` that are not tensors, with its defaults:
            ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, all_ignored, inplace, check.

    Example:
        >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
        >>> loss = criterion(torch.zeros(2, 4), torch.tensor([1, 3]))
        >>> criterion.sketch.quantile(0.5)
        tensor(1.3863)
    """

    OPTIONS = (
        "ignore_index",
        "reduction",
        "label_smoothing",
        "z_loss",
        "softcap",
        "logit_scale",
        "all_ignored",
        "inplace",
        "check",
    )
    weight: Tensor | None
    sketch_state: Tensor

    def __init__(self, weight: Tensor | None = None, *, groups: int = 1, **options: Any) -> None:
        super().__init__()
        unknown = sorted(options.keys() - set(self.OPTIONS))
        if unknown:
            raise TypeError(f"CrossEntropyLoss has no option {unknown[0]!r}: expected one of {', '.join(self.OPTIONS)}")
        _check.one_of(options.get("reduction", "mean"), "reduction", _layout.REDUCTIONS)
        self.options = options
        self.register_buffer("weight", weight)
        self.register_buffer("sketch_state", LossSketch(groups=groups).state)

    @property
    def sketch(self) -> LossSketch:
        """The running sketch, sharing this module's buffer."""
        return LossSketch.from_state(self.sketch_state)

    def forward(self, logits: Tensor, target: Tensor, **tensors: Any) -> Tensor:
        """The loss. `tensors`: token_weight, normalizer, group_ids of `xentile.cross_entropy`."""
        return self.full(logits, target, **tensors).loss

    def full(self, logits: Tensor, target: Tensor, **tensors: Any) -> CrossEntropyOutput:
        """Everything `xentile.cross_entropy` returns; also takes `stats`."""
        return cross_entropy(logits, target, self.weight, sketch=self.sketch, **self.options, **tensors)

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
