"""What the interpreter of Triton 3.6 lacks: indices with NumPy 2.4, and a multiply-add that rounds once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from triton.runtime import interpreter

if TYPE_CHECKING:
    import pytest

MULTIPLY_ADD_ROUNDS_ONCE = hasattr(interpreter._interpreter, "fma_fp32")


def mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the interpreter of this Triton compute what that of a newer one does."""
    if MULTIPLY_ADD_ROUNDS_ONCE:
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def create_fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
        return builder.ternary_op(x, y, z, lambda x, y, z: np.multiply(x, y, dtype=np.float64) + z)

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
