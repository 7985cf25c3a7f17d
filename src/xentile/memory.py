"""The memory that xentile keeps between training steps."""

from __future__ import annotations

from xentile._ops import ops


def empty_cache() -> None:
    """Give memory that was kept for the next gradient back to the system, as torch.cuda.empty_cache does on a GPU.

    Where csrc/cpu serves on Linux, the memory of a gradient of 32 MiB or more stays mapped when the gradient is freed,
    at most two of them, and the next one is written there without page faults. You need not call this to avoid running
    out of memory: kept pages are marked with MADV_FREE, so the system takes them when it needs some. Tools that show
    resident memory count them until then. XENTILE_KEEP_MEMORY=0 in the environment keeps nothing.

    Example::

        >>> import torch
        >>> import xentile as xt
        >>> logits = torch.randn(512, 32000, requires_grad=True)
        >>> xt.cross_entropy(logits, torch.randint(0, 32000, (512,))).loss.backward()
        >>> logits.grad = None  # freed, kept
        >>> xt.empty_cache()  # gone
    """
    ops.empty_cache.default()
