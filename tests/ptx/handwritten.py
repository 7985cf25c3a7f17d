"""A frame for hand-written PTX: 64 threads, one input and one output element each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .interpreter import Counts, Kernel

if TYPE_CHECKING:
    from .interpreter.scalars import Array

THREADS = 64
LANE = np.arange(THREADS, dtype=np.uint32) % 32

# %r5: the thread's own word of the shared buffer; %r6: that of the thread at the other end
ADDRESS = "mov.u32 %r4, buf; mad.lo.s32 %r5, %r1, 4, %r4; sub.s32 %r6, 252, %r5;"

FRAME = """
.version 8.8
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 out, .param .u64 in) .reqntid 64
{
    .reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<10>; .reg .f32 %f<10>; .reg .b64 %rd<10>; .reg .f64 %d<4>;
    .shared .align 4 .b8 buf[256];
    ld.param.u64 %rd1, [out];
    ld.param.u64 %rd2, [in];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd3, %r1, SIZE, %rd1;
    mad.wide.u32 %rd4, %r1, SIZE, %rd2;
    ld.global.bBITS INPUT, [%rd4];
    BODY
    st.global.bBITS [%rd3], OUTPUT;
    ret;
}
"""


def _kernel(body: str, size: int, given: str, result: str) -> Kernel:
    text = FRAME.replace("SIZE", str(size)).replace("BITS", str(8 * size))
    return Kernel(text.replace("INPUT", given).replace("OUTPUT", result).replace("BODY", body))


def run(body: str, given: Array, **how: Any) -> Array:
    """Each thread has its index in %r1 and its element in %r2; returns %r3 of each thread, as uint32."""
    return launch(body, given, **how)[0]


def launch(body: str, given: Array, *, parse_only: bool = False, races: bool = False) -> tuple[Array, Counts]:
    """As `run`, with the counts."""
    kernel = _kernel(body, 4, "%r2", "%r3")
    out = np.zeros(THREADS, np.uint32)
    if parse_only:
        return out, Counts()
    return out, kernel.launch((1,), [out, np.ascontiguousarray(given).view(np.uint32)], races=races)


def run_wide(body: str, given: Array) -> Array:
    """The same with 64-bit elements: in %rd5, out %rd6."""
    out = np.zeros(THREADS, np.uint64)
    _kernel(body, 8, "%rd5", "%rd6").launch((1,), [out, given])
    return out
