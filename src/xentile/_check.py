"""Argument checks. Each message names the argument, what it must be and what it was, before anything is computed.

The exception types are those of torch.nn.functional.cross_entropy for the same misuse.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from xentile._layout import PRECISIONS, Layout
from xentile._ops import ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    return value


def one_of(value: Any, name: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{value} is not a valid value for {name}: expected one of {', '.join(map(repr, choices))}")


def number(value: Any, name: str) -> float:
    """A Python number as a float. Tensors are refused: reading one would wait for the device."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__}")
    return float(value)


def at_least_zero(value: Any, name: str) -> float:
    if not 0 <= number(value, name) < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return float(value)


def positive(value: Any, name: str) -> float:
    if not 0 < number(value, name) < math.inf:
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")
    return float(value)


def fraction(value: Any, name: str) -> float:
    if not 0 <= number(value, name) <= 1:
        raise RuntimeError(f"{name} must be between 0.0 and 1.0. Got: {value}")
    return float(value)


def integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in int64, got {value}")
    return value  # type: ignore[return-value]


def names(values: Any, name: str, choices: tuple[str, ...]) -> None:
    if isinstance(values, str) or not isinstance(values, (tuple, list, set, frozenset)):
        raise TypeError(f"{name} must be a tuple of names out of {choices}, got {values!r}")
    for value in values:
        one_of(value, name, choices)


def same_device(owner: Tensor, owner_name: str, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is not None and value.device != owner.device:
            raise RuntimeError(f"{name} must be on the device of {owner_name}, {owner.device}, got {value.device}")


def sequence(values: Any, name: str) -> list[Any]:
    if isinstance(values, (str, Tensor)) or not hasattr(values, "__iter__") or not len(values):
        raise TypeError(f"{name} must be a sequence of at least one number, got {values!r}")
    return list(values)


def logits_dtype(value: Any, name: str) -> None:
    if tensor(value, name).dtype not in FLOATS:
        raise NotImplementedError(
            f"{name} must be float32, bfloat16, float16 or float64, got {dtype_name(value.dtype)}"
        )


def logits(value: Any, name: str) -> None:
    """(..., V) of a floating point dtype."""
    logits_dtype(value, name)
    if value.dim() == 0 or value.shape[-1] == 0:
        raise IndexError(f"{name} must have shape (..., V) with V >= 1, got {tuple(value.shape)}")


def logits_and_target(logits: Any, target: Any) -> bool:
    """Types, dtypes and shapes. True if the target holds class probabilities, (N, V, d1, ...) as the logits."""
    tensor(logits, "logits"), tensor(target, "target")
    logits_dtype(logits, "logits")
    if logits.dim() == 0:
        raise IndexError("logits must have at least 1 dimension, (V), (N, V) or (N, V, d1, ...), got 0")
    if logits.shape[min(logits.dim() - 1, 1)] == 0:
        raise IndexError(f"logits must have at least one class, got shape {tuple(logits.shape)}")
    if target.shape == logits.shape and (target.is_floating_point() or target.dim() > 1):
        if not target.is_floating_point():
            raise RuntimeError(
                f"Expected floating point type for target with class probabilities, got {dtype_name(target.dtype)}"
            )
        return True
    _index_target(logits, target)
    return False


def _index_target(logits: Tensor, target: Tensor) -> None:
    """The order of the checks is that of F.cross_entropy: batch size, shape, dtype."""
    got = tuple(target.shape)
    if logits.dim() == 1:
        if target.dim() > 1:
            raise RuntimeError(f"target must have shape () or (1,) for logits of shape (V), got {got}")
        if target.numel() != 1:
            raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {target.numel()}")
    else:
        expected = (logits.shape[0], *logits.shape[2:])
        if not got or got[0] != expected[0]:
            batch = got[0] if got else 0
            raise ValueError(f"Expected input batch_size ({expected[0]}) to match target batch_size ({batch}).")
        if got != expected:
            raise RuntimeError(f"Expected target size {list(expected)}, got {list(got)}")
    if target.dtype not in (torch.int64, torch.int32, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long, Int or Byte, but got {dtype_name(target.dtype)}")


def class_weight(weight: Any, size: int) -> None:
    if weight is None:
        return
    if tensor(weight, "weight").dim() != 1 or weight.shape[0] != size:
        raise RuntimeError(
            f"weight tensor should be defined either for all {size} classes or no classes "
            f"but got weight tensor of shape: {list(weight.shape)}"
        )
    floating(weight, "weight")


def token_weight(weight: Any, shape: tuple[int, ...]) -> None:
    if weight is None:
        return
    if tuple(tensor(weight, "token_weight").shape) != shape:
        raise ValueError(f"token_weight must have one entry a token, {shape}, got shape {tuple(weight.shape)}")
    floating(weight, "token_weight")


def normalizer(value: Any, reduction: str, device: torch.device) -> None:
    if value is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"normalizer replaces what the mean divides by, so reduction must be 'mean', got {reduction!r}"
        )
    if not isinstance(value, Tensor):
        number(value, "normalizer")
    elif value.dim() != 0:
        raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    elif value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"normalizer must be a real number, got {dtype_name(value.dtype)}")
    elif value.device not in (device, torch.device("cpu")):
        raise RuntimeError(f"normalizer must be on the device of logits, {device}, or on the CPU, got {value.device}")


def group_ids(ids: Any, shape: tuple[int, ...], sketch: Any) -> None:
    if ids is None:
        return
    if sketch is None:
        raise ValueError("group_ids choose a row of the sketch: pass sketch=LossSketch(groups=...) with them")
    if tuple(tensor(ids, "group_ids").shape) != shape:
        raise ValueError(f"group_ids must have one entry a token, {shape}, got shape {tuple(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"group_ids must be int64 or int32, got {dtype_name(ids.dtype)}")


def mask(value: Any, shape: tuple[int, ...]) -> None:
    if value is None:
        return
    if tensor(value, "mask").dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {dtype_name(value.dtype)}")
    if tuple(value.shape) != shape:
        raise ValueError(f"mask must have the shape of values, {shape}, got {tuple(value.shape)}")


def like_values(value: Any, name: str, shape: tuple[int, ...]) -> None:
    if tuple(tensor(value, name).shape) != shape:
        raise ValueError(f"{name} must have the shape of values, {shape}, got {tuple(value.shape)}")
    floating(value, name, TypeError)


def sketch_state(state: Any) -> None:
    if tensor(state, "state").dtype != torch.int64:
        raise TypeError(f"state must be int64, got {dtype_name(state.dtype)}")
    widths = [Layout(bits).width for bits in PRECISIONS]
    if state.dim() != 2 or state.shape[0] < 1 or state.shape[1] not in widths:
        raise ValueError(f"state must have shape (G, width) with width in {widths}, got {tuple(state.shape)}")
    if not state.is_contiguous():
        raise ValueError(f"state must be contiguous, got strides {state.stride()}")


def unweighted(sketch: Any) -> None:
    if sketch is not None and sketch.weighted:
        raise ValueError("sketch must count tokens, not weights: update a weighted one from out.token_loss")


def group_range(ids: Tensor | None, groups: int, *, wait: bool = False) -> None:
    """IndexError for a group that does not exist, on a CPU or where the caller accepts to wait for the device."""
    if ids is None or values_hidden() or not (wait or ids.device.type == "cpu"):
        return
    first = ops.first_bad_group.default(ids, groups)
    if first >= 0:
        raise IndexError(f"group_ids must be in [0, {groups}), got {int(ids[first])} at flat position {first}")


def target_range(target: Tensor, size: int, ignore_index: int, *, wait: bool = False) -> None:
    """IndexError for a target out of range: free on a CPU, and only on request where it would wait for the device."""
    if values_hidden() or not (wait or target.device.type == "cpu"):
        return
    first = ops.first_bad_target.default(target, size, ignore_index)
    if first >= 0:
        raise IndexError(
            f"Target {int(target[first])} is out of bounds: target must be in [0, {size}) "
            f"or ignore_index={ignore_index}, at flat position {first}"
        )


def all_positive(value: Tensor, name: str, *, wait: bool = False) -> None:
    """ValueError for an entry that is not, where values can be read."""
    if values_hidden() or not (wait or value.device.type == "cpu"):
        return
    wrong = (~((value > 0) & value.isfinite())).nonzero()
    if len(wrong):
        first = int(wrong[0, 0])
        raise ValueError(
            f"{name} must be finite and greater than 0, got {float(value[first])} at flat position {first}"
        )


def instance(value: Any, name: str, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


def soft_target(soft: bool, ignore_index: int, inplace: bool) -> None:
    if soft and ignore_index >= 0:
        raise RuntimeError("ignore_index is not supported for floating point target")
    if soft and inplace:
        raise ValueError("inplace=True is not supported for a target of class probabilities")


def inplace(wanted: bool, logits: Tensor, *, name: str = "logits", vocab_last: bool = False) -> None:
    if not wanted:
        return
    if (logits.dim() > 2 and not vocab_last) or not logits.is_contiguous():
        shape = "(..., V)" if vocab_last else "(V) or (N, V)"
        raise ValueError(
            f"inplace=True needs contiguous {name} of shape {shape}, "
            f"got shape {tuple(logits.shape)} with strides {logits.stride()}"
        )
    owner = logits if logits._base is None else logits._base
    if owner.is_leaf and owner.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"inplace=True would overwrite {name}, a leaf that requires grad: its value is needed by its owner"
        )


def quantiles(q: Any, device: torch.device) -> Tensor:
    """Turn q into a float64 tensor on the device without waiting for it. A tensor is not read, only numbers are."""
    if not isinstance(q, Tensor):
        for value in _as_numbers(q, "q"):
            if not 0 <= value <= 1:
                raise ValueError(f"q must be in [0, 1], got {value}")
    return numbers(q, "q", device)


def numbers(x: Any, name: str, device: torch.device) -> Tensor:
    """A number, a sequence of numbers or a floating point tensor as a float64 tensor on the device."""
    if isinstance(x, Tensor):
        floating(x, name, TypeError)
        return x.to(device=device, dtype=torch.float64)
    values, single = _as_numbers(x, name), isinstance(x, (int, float))
    if device.type == "cpu":
        return torch.tensor(values[0] if single else values, dtype=torch.float64)
    # filled on the device: a copy from the host would wait for it, and could not be captured in a CUDA graph
    parts = [torch.full((1,), value, dtype=torch.float64, device=device) for value in values]
    result = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64, device=device)
    return result.reshape(()) if single else result


def _as_numbers(x: Any, name: str) -> list[float]:
    if isinstance(x, (int, float)):
        return [number(x, name)]
    if isinstance(x, str) or not hasattr(x, "__iter__"):
        raise TypeError(f"{name} must be a number, a sequence of numbers or a tensor, got {type(x).__name__}")
    return [number(value, name) for value in x]


def values_hidden() -> bool:
    """No value can be read while compiling or under torch.func: the kernels' NaN for a bad target has to do."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def floating(value: Tensor, name: str, error: type[Exception] = RuntimeError) -> None:
    if not value.is_floating_point():
        raise error(f"{name} must be a floating point tensor, got {dtype_name(value.dtype)}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
