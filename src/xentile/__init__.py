"""Cross-entropy for language models that also returns the percentiles of the per-token loss."""

from xentile.cross_entropy import cross_entropy
from xentile.module import CrossEntropyLoss
from xentile.output import CrossEntropyOutput
from xentile.quantile import quantile
from xentile.sketch import LossSketch

__version__ = "0.1.0"

__all__ = ["CrossEntropyLoss", "CrossEntropyOutput", "LossSketch", "cross_entropy", "quantile"]
