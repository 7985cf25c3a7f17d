"""The specification: every operation of xentile in plain PyTorch.

It runs on any device and float dtype, is differentiable twice, and is what the tests hold the kernels to, what serves a
device without kernels, and what a reader should read first. N rows (tokens), V columns (vocabulary), G groups, Q
quantiles.
"""

from xentile.reference.cross_entropy import (
    Terms,
    cross_entropy,
    cross_entropy_gradient,
    soft_cross_entropy,
    transform,
)
from xentile.reference.quantile import host_quantile, radix_counts
from xentile.reference.sketch import bin_edges, column_of, sketch_quantile, sketch_update
from xentile.reference.teacher import TeacherTopK, teacher_topk

__all__ = [
    "TeacherTopK",
    "Terms",
    "bin_edges",
    "column_of",
    "cross_entropy",
    "cross_entropy_gradient",
    "host_quantile",
    "radix_counts",
    "sketch_quantile",
    "sketch_update",
    "soft_cross_entropy",
    "teacher_topk",
    "transform",
]
