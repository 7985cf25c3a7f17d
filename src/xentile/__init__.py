"""Cross-entropy for language models that also returns the percentiles of the per-token loss."""

from xentile.cache import TopKCache
from xentile.confidence import clustered_confidence_interval
from xentile.cross_entropy import cross_entropy
from xentile.distillation import distillation_loss
from xentile.distillation_output import DistillationOutput
from xentile.memory import empty_cache
from xentile.module import CrossEntropyLoss
from xentile.output import CrossEntropyOutput
from xentile.quantile import quantile
from xentile.reference import TeacherTopK
from xentile.sketch import LossSketch
from xentile.streams import DecayedSketch, WindowedSketch
from xentile.teacher import teacher_topk
from xentile.topk_distillation import topk_distillation_loss

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "CrossEntropyOutput",
    "DecayedSketch",
    "DistillationOutput",
    "LossSketch",
    "TeacherTopK",
    "TopKCache",
    "WindowedSketch",
    "clustered_confidence_interval",
    "cross_entropy",
    "distillation_loss",
    "empty_cache",
    "quantile",
    "teacher_topk",
    "topk_distillation_loss",
]
