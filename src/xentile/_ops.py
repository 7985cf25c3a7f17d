"""Every operator of xentile: schemas, fakes, and which kernel serves which device.

Operators only fill outputs that Python allocates (out-variants): the cheapest form of a dispatcher call, and
torch.compile plans the memory. N rows, V columns, G groups, Q quantiles; acc = float32, or float64 for float64 logits.
`logits` is (N, V) with stride 1 in the last dimension and any row stride; vectors are contiguous.

The dispatcher is the registry: CPU is served by csrc/cpu when the library was built, CUDA by _triton, everything else
(and a CPU without the library) by reference.py.
"""

from __future__ import annotations

import importlib
import pathlib
import warnings
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMAS = {
    # One launch: loss, statistics, the sketch, and the gradient when dlogits is given (not with reduction none).
    # loss: () for mean and sum, (N,) for none; denominator: () what the mean was divided by (1 otherwise).
    # row_max, sum_exp: m and S of each row. The gradient's p = exp(z - m) / S loses no digits; exp(z - lse) would.
    "cross_entropy": (
        "(Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor? normalizer, Tensor? group_ids, "
        "Tensor(a!) loss, Tensor(b!) denominator, Tensor(c!) token_loss, Tensor(d!) lse, Tensor(e!) row_max, "
        "Tensor(f!) sum_exp, Tensor(g!) predicted, Tensor(h!) correct, Tensor(i!)? entropy, Tensor(j!)? target_rank, "
        "Tensor(k!)? sketch, Tensor(l!)? dlogits, "
        "int ignore_index, int reduction, float label_smoothing, float z_loss, float softcap, float logit_scale, "
        "bool zero_if_empty) -> ()"
    ),
    # The gradient alone, from what the forward saved. dloss: () for mean and sum, (N,) for none. filled: dlogits holds
    # the gradient for dloss = 1, so there is nothing to do if dloss is 1, which only the device knows.
    "cross_entropy_backward": (
        "(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor? token_weight, Tensor denominator, "
        "Tensor token_loss, Tensor row_max, Tensor sum_exp, Tensor(a!) dlogits, int ignore_index, int reduction, "
        "float label_smoothing, float z_loss, float softcap, float logit_scale, bool filled) -> ()"
    ),
    # A teacher's top K, as it comes, in one canonical form: sorted_ids (N, K) int32 strictly ascending up to the
    # sentinel num_classes, tempered log-masses sorted_logprobs (N, K), and of what is outside tail (N,); mass (N,).
    "topk_support": (
        "(Tensor ids, Tensor logprobs, Tensor? log_z, Tensor? tail_logprob, Tensor? token_temperature, "
        "Tensor(a!) sorted_ids, Tensor(b!) sorted_logprobs, Tensor(c!) tail, Tensor(d!) mass, "
        "int num_classes, int support, int duplicates, int fallback, float temperature) -> ()"
    ),
    # As cross_entropy, against that form. rest (N, 3): what a row sums outside the support and the target, for the
    # backward: the maximum of z, and the sums of exp relative to it at the temperature and at temperature 1.
    "topk_distillation": (
        "(Tensor logits, Tensor ids, Tensor logprobs, Tensor tail, Tensor? target, Tensor? token_weight, "
        "Tensor? normalizer, Tensor? token_temperature, Tensor? group_ids, "
        "Tensor(a!) loss, Tensor(b!) denominator, Tensor(c!) kd_loss, Tensor(d!) token_loss, Tensor(e!) student_mass, "
        "Tensor(f!) rest, Tensor(g!)? sketch, Tensor(h!)? kd_sketch, Tensor(i!)? dlogits, "
        "int ignore_index, int reduction, int support, int divergence, float beta, float temperature, "
        "bool temperature_squared, float kd_weight, float ce_weight, float softcap, float logit_scale, "
        "bool zero_if_empty) -> ()"
    ),
    "topk_distillation_backward": (
        "(Tensor dloss, Tensor logits, Tensor ids, Tensor logprobs, Tensor tail, Tensor? target, "
        "Tensor? token_weight, Tensor? token_temperature, Tensor denominator, Tensor token_loss, Tensor rest, "
        "Tensor(a!) dlogits, int ignore_index, int reduction, int support, int divergence, float beta, "
        "float temperature, bool temperature_squared, float kd_weight, float ce_weight, float softcap, "
        "float logit_scale, bool filled) -> ()"
    ),
    # Against a teacher's logits (N, V). rows (N, 6), for the backward: the student's maximum of z, its sums of exp at
    # the temperature and at temperature 1, the teacher's maximum and sum, and E (reference/distillation.py).
    "distillation": (
        "(Tensor logits, Tensor teacher_logits, Tensor? target, Tensor? token_weight, Tensor? normalizer, "
        "Tensor? token_temperature, Tensor? group_ids, "
        "Tensor(a!) loss, Tensor(b!) denominator, Tensor(c!) kd_loss, Tensor(d!) token_loss, Tensor(e!) rows, "
        "Tensor(f!)? sketch, Tensor(g!)? kd_sketch, Tensor(h!)? dlogits, "
        "int ignore_index, int reduction, int divergence, float beta, float temperature, "
        "bool temperature_squared, float kd_weight, float ce_weight, float softcap, float logit_scale, "
        "bool zero_if_empty) -> ()"
    ),
    "distillation_backward": (
        "(Tensor dloss, Tensor logits, Tensor teacher_logits, Tensor? target, Tensor? token_weight, "
        "Tensor? token_temperature, Tensor denominator, Tensor token_loss, Tensor rows, Tensor(a!) dlogits, "
        "int ignore_index, int reduction, int divergence, float beta, float temperature, "
        "bool temperature_squared, float kd_weight, float ce_weight, float softcap, float logit_scale, "
        "bool filled) -> ()"
    ),
    # Contiguous memory for the gradient, of the shape and dtype of logits. csrc/cpu keeps it when it is freed, for the
    # next gradient, while the system may take it; empty_cache gives it back at once.
    "empty_gradient": "(Tensor logits) -> Tensor",
    "empty_cache": "() -> ()",
    # x *= scale, scale () float32 or float64, without touching memory when scale is exactly 1. For a gradient in place.
    "scale_": "(Tensor(a!) x, Tensor scale) -> ()",
    # Adds values (N,) float32, where mask (N,) bool holds, to the sketch; each counts `unit`, or its weight in that
    # unit.
    "sketch_update": (
        "(Tensor values, Tensor? mask, Tensor? weights, Tensor? group_ids, Tensor(a!) sketch, int unit) -> ()"
    ),
    # q (Q,) float64 in [0, 1] -> estimate and the bounds that enclose the exact answer, each (G, Q) float32.
    "sketch_quantile": (
        "(Tensor sketch, Tensor q, Tensor(a!) value, Tensor(b!) lower, Tensor(c!) upper, int interpolation) -> ()"
    ),
    # One digit of a radix selection. Of the values of x (N,) where mask (N,) bool holds, those whose key, without its
    # last shift + bits bits, is prefixes[t] add 1, or their weight (N,) int64, to counts[t] (T, 2**bits) int64, in the
    # column that the next `bits` bits say. T = 1 where that leaves no prefix. Keys: reference/quantile.py.
    "radix_counts": (
        "(Tensor x, Tensor? mask, Tensor? weights, Tensor prefixes, int shift, int bits, Tensor(a!) counts) -> ()"
    ),
    # The K largest of each row by (logit, then lowest id), and the rest's masses at temperatures (T,) float32: ids and
    # logprobs (N, K) int32 and float32, log_z and tail_logprob (N, T) float32. Meaning: reference/teacher.py.
    "teacher_topk": (
        "(Tensor logits, Tensor temperatures, Tensor(a!) ids, Tensor(b!) logprobs, Tensor(c!) log_z, "
        "Tensor(d!) tail_logprob, float softcap, float logit_scale) -> ()"
    ),
    # Index of the first target that is neither ignored nor in [0, V); -1 if there is none. Synchronises on a GPU.
    "first_bad_target": "(Tensor target, int num_classes, int ignore_index) -> int",
    "first_bad_group": "(Tensor group_ids, int num_groups) -> int",
    "isa": "() -> str",
}
WITHOUT_TENSORS = {"isa", "empty_cache"}
"""Operators that cannot be dispatched by device, and hence have one owner: csrc/cpu if it was built."""
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


def _load_native() -> str | None:
    """Register csrc/cpu for CPU tensors. None if that worked, else the reason why it is not used."""
    path = pathlib.Path(__file__).with_name("_C_cpu.so")
    if not path.exists():
        return "the package was installed without a C++ compiler or without torch headers: no _C_cpu.so"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        warnings.warn(f"xentile: {path.name} does not load, plain PyTorch is used on the CPU: {error}", stacklevel=2)
        return f"{path.name} does not load: {error}"
    return None


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


NATIVE_UNAVAILABLE = _load_native()
_register_reference()
_register_triton()
