"""A sketch in the formats of others: NumPy, TensorBoard, W&B and trackio, OpenTelemetry, DDSketch.

Each function waits for the device once, to read one group's histogram. Counts stay exact in all of them; the docstrings
say what is lost, and how far a quantile that is read from the result may be from the exact one. M is the sketch's
precision (7). None of the formats has room for NaN, ignored tokens and infinite losses: log `nan_count`,
`ignored_count` and `inf_count` next to them.
"""

from xentile.export.ddsketch import from_ddsketch, to_ddsketch
from xentile.export.histogram import numpy_histogram, tensorboard_histogram, wandb_histogram
from xentile.export.opentelemetry import Buckets, ExponentialHistogram, exponential_histogram, opentelemetry_data_point

__all__ = [
    "Buckets",
    "ExponentialHistogram",
    "exponential_histogram",
    "from_ddsketch",
    "numpy_histogram",
    "opentelemetry_data_point",
    "tensorboard_histogram",
    "to_ddsketch",
    "wandb_histogram",
]
