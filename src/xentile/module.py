"""`CrossEntropyLoss`: the module form, with a sketch of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from xentile.cross_entropy import checked_options, cross_entropy
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
        ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, all_ignored, inplace, check: as in
            `xentile.cross_entropy`; attributes of the same names may be changed later.

    Example:
        >>> criterion = CrossEntropyLoss(label_smoothing=0.1)
        >>> loss = criterion(torch.zeros(2, 4), torch.tensor([1, 3]))
        >>> criterion.sketch.quantile(0.5)
        tensor(1.3863)
    """

    weight: Tensor | None
    sketch_state: Tensor

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        all_ignored: str = "nan",
        groups: int = 1,
        inplace: bool = False,
        check: bool = False,
    ) -> None:
        super().__init__()
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.z_loss, self.softcap, self.logit_scale = z_loss, softcap, logit_scale
        self.all_ignored, self.inplace, self.check = all_ignored, inplace, check
        checked_options(**self._options())  # wrong options fail here, not at the first batch
        self.register_buffer("weight", weight)
        self.register_buffer("sketch_state", LossSketch(groups=groups).state)

    def _options(self) -> dict[str, Any]:
        names = ("ignore_index", "reduction", "label_smoothing", "z_loss", "softcap", "logit_scale", "all_ignored")
        return {name: getattr(self, name) for name in names}

    @property
    def sketch(self) -> LossSketch:
        """The running sketch, sharing this module's buffer."""
        return LossSketch.from_state(self.sketch_state)

    def forward(self, logits: Tensor, target: Tensor, **tensors: Any) -> Tensor:
        """The loss. `tensors`: token_weight, normalizer, group_ids of `xentile.cross_entropy`."""
        return self.full(logits, target, **tensors).loss

    def full(self, logits: Tensor, target: Tensor, **tensors: Any) -> CrossEntropyOutput:
        """Everything `xentile.cross_entropy` returns; also takes `stats`."""
        options = self._options() | {"inplace": self.inplace, "check": self.check}
        return cross_entropy(logits, target, self.weight, sketch=self.sketch, **options, **tensors)

    def extra_repr(self) -> str:
        """The options, and the number of groups."""
        options = self._options() | {"groups": self.sketch_state.shape[0]}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())
