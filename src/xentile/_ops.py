"""Every operator of xentile: fakes, and which kernel serves which device. Their schemas: _schemas.py.

The dispatcher is the registry: CPU is served by csrc/cpu when the library was built, CUDA by _triton, everything else
(and a CPU without the library) by reference.py.
"""

from __future__ import annotations

import importlib
import pathlib
import warnings
from typing import TYPE_CHECKING, Any

import torch

from xentile._schemas import SCHEMAS, SIGNATURE, WITHOUT_TENSORS

if TYPE_CHECKING:
    from collections.abc import Callable

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"xentile::{_name}", _schema)

ops: Any = torch.ops.xentile


@torch.library.register_fake("xentile::cross_entropy")
def _(logits, target, weight, token_weight, normalizer, group_ids, loss, *rest):  # type: ignore[no-untyped-def]
    torch._check(logits.dim() == 2 and target.dim() == 1)
    torch._check(target.shape[0] == logits.shape[0])


@torch.library.register_fake("xentile::cross_entropy_backward")
def _(dloss, logits, target, weight, token_weight, denominator, token_loss, row_max, sum_exp, dlogits, *rest):  # type: ignore[no-untyped-def]
    torch._check(dlogits.shape == logits.shape)


@torch.library.register_fake("xentile::empty_gradient")
def _(logits):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@torch.library.register_fake("xentile::scale_")
def _(x, scale):  # type: ignore[no-untyped-def]
    torch._check(scale.dim() == 0)


@torch.library.register_fake("xentile::sketch_update")
def _(values, mask, weights, group_ids, sketch, unit):  # type: ignore[no-untyped-def]
    torch._check(values.dim() == 1 and sketch.dim() == 2)


@torch.library.register_fake("xentile::sketch_quantile")
def _(sketch, q, value, lower, upper, interpolation):  # type: ignore[no-untyped-def]
    torch._check(value.shape == (sketch.shape[0], q.shape[0]))


@torch.library.register_fake("xentile::radix_counts")
def _(x, mask, weights, prefixes, shift, bits, counts):  # type: ignore[no-untyped-def]
    torch._check(x.dim() == 1 and counts.shape == (prefixes.shape[0], 1 << bits))


@torch.library.register_fake("xentile::host_quantile")
def _(x, mask, weights, q, value, counted, interpolation, omit_nan):  # type: ignore[no-untyped-def]
    torch._check(value.shape == q.shape and counted.shape == (2,))


@torch.library.register_fake("xentile::teacher_topk")
def _(logits, temperatures, ids, logprobs, log_z, tail_logprob, softcap, logit_scale):  # type: ignore[no-untyped-def]
    torch._check(logits.dim() == 2 and ids.shape == logprobs.shape and ids.shape[1] <= logits.shape[1])
    torch._check(log_z.shape == (logits.shape[0], temperatures.shape[0]))


@torch.library.register_fake("xentile::topk_support")
def _(ids, logprobs, log_z, tail_logprob, token_temperature, sorted_ids, *rest):  # type: ignore[no-untyped-def]
    torch._check(ids.dim() == 2 and ids.shape == logprobs.shape and ids.shape == sorted_ids.shape)


@torch.library.register_fake("xentile::topk_distillation")
def _(logits, ids, logprobs, *rest):  # type: ignore[no-untyped-def]
    torch._check(logits.dim() == 2 and ids.shape == logprobs.shape and ids.shape[0] == logits.shape[0])


@torch.library.register_fake("xentile::topk_distillation_backward")
def _(dloss, logits, ids, logprobs, *rest):  # type: ignore[no-untyped-def]
    torch._check(logits.dim() == 2 and ids.shape == logprobs.shape and ids.shape[0] == logits.shape[0])


@torch.library.register_fake("xentile::distillation")
def _(logits, teacher_logits, *rest):  # type: ignore[no-untyped-def]
    torch._check(logits.dim() == 2 and teacher_logits.shape == logits.shape)


@torch.library.register_fake("xentile::distillation_backward")
def _(dloss, logits, teacher_logits, *rest):  # type: ignore[no-untyped-def]
    torch._check(logits.dim() == 2 and teacher_logits.shape == logits.shape)


@torch.library.register_fake("xentile::first_bad_target")
def _(target, num_classes, ignore_index):  # type: ignore[no-untyped-def]
    return -1  # values are not known while tracing; kernels give NaN for a bad target


@torch.library.register_fake("xentile::first_bad_group")
def _(group_ids, num_groups):  # type: ignore[no-untyped-def]
    return -1


def _load_native(path: pathlib.Path) -> str | None:
    """Register csrc/cpu for CPU tensors. None if that worked, else the reason why it is not used."""
    if not path.exists():
        return f"the package was installed without a C++ compiler or without torch headers: no {path.name}"
    try:
        if SIGNATURE.encode() not in path.read_bytes():  # looked for in the file: loading it would register its kernels
            failure = f"{path.name} was built from other sources than this package, which must be installed again"
        else:
            torch.ops.load_library(str(path))
            return None
    except OSError as error:
        failure = f"{path.name} does not load: {error}"
    warnings.warn(f"xentile: plain PyTorch is used on the CPU, because {failure}", stacklevel=2)
    return failure


def _reference_kernel(name: str) -> Callable[..., Any]:
    from xentile.reference import distillation_kernels, kernels

    kernel: Callable[..., Any] = getattr(kernels if hasattr(kernels, name) else distillation_kernels, name)
    return kernel


def _register_reference() -> None:
    """Plain PyTorch for every device that has no kernels of its own, in particular a CPU without the native library."""
    native = WITHOUT_TENSORS if NATIVE_UNAVAILABLE is None else set()
    for name in SCHEMAS.keys() - native:
        torch.library.impl(f"xentile::{name}", "CompositeExplicitAutograd", _reference_kernel(name))


TRITON = {
    "cross_entropy": "cross_entropy",
    "cross_entropy_backward": "cross_entropy",
    "scale_": "cross_entropy",
    "sketch_update": "sketch",
    "sketch_quantile": "sketch",
    "radix_counts": "quantile",
    "topk_support": "topk_support",
    "topk_distillation": "topk_distillation",
    "topk_distillation_backward": "topk_distillation",
    "teacher_topk": "teacher_topk",
    "distillation": "dense_distillation",
    "distillation_backward": "dense_distillation",
}
"""Operators with Triton kernels, and their modules in xentile/_triton."""


def _triton_kernel(name: str) -> Callable[..., None]:
    """The launcher, imported with Triton at the first call. float64 goes to plain PyTorch: nobody trains in it."""

    def kernel(*args: Any) -> None:
        if name != "sketch_quantile" and any(
            isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in args[:2]
        ):
            implementation = _reference_kernel(name)
        else:
            implementation = getattr(importlib.import_module(f"xentile._triton.{TRITON[name]}"), name)
        implementation(*args)

    return kernel


def _register_triton() -> None:
    """CUDA and ROCm tensors."""
    for name in TRITON:
        torch.library.impl(f"xentile::{name}", "CUDA", _triton_kernel(name))


NATIVE_UNAVAILABLE = _load_native(pathlib.Path(__file__).with_name("_C_cpu.so"))
_register_reference()
_register_triton()
