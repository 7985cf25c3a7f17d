"""x *= scale, for the gradient that the forward has written already."""

import triton
import triton.language as tl

from xentile._triton.span import cut, edges, groups_before, tile


@triton.jit(do_not_specialize=["n", "x_ptr"])
def scale_kernel(x_ptr, scale_ptr, n: tl.int64, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """Program i scales elements [i, i + 1) * TILES * BLOCK of the n. Nothing to do is decided here, not on the host."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        VEC: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
        first = tl.program_id(0).to(tl.int64) * (TILES * BLOCK)
        start = x_ptr + first
        size = tl.minimum(n - first, TILES * BLOCK).to(tl.int32)
        head, body = cut(start, size, VEC)
        pointers = tl.multiple_of(start + head, 16) + tile(BLOCK, VEC)
        for k in range(0, body, BLOCK):
            valid = groups_before(k, body, BLOCK, VEC)
            x = tl.load(pointers + k, mask=valid, other=0.0)
            tl.store(pointers + k, (x.to(tl.float32) * scale).to(x.dtype), mask=valid)
        columns, valid = edges(head, body, size, 1, VEC)
        x = tl.load(start + columns, mask=valid, other=0.0)
        tl.store(start + columns, (x.to(tl.float32) * scale).to(x.dtype), mask=valid)
