"""Run the PTX of a GPU kernel on numpy arrays: no GPU, no driver.

    kernel = Kernel(ptx_text)                          # parse; whatever the instruction table does not list is rejected
    counts = kernel.launch((rows,), [x, y, 128])       # numpy arrays are passed as pointers

One numpy lane a thread. The instruction at the lowest program counter runs first; barriers and warp-wide instructions
wait for every live thread. Memory is checked for bounds, alignment and (shared memory) races between barriers.

| module | what it holds |
|---|---|
| `syntax` | operands and instructions as data; the errors |
| `scalars` | PTX types as numpy dtypes; exact float32 FMA, bfloat16, flush to zero |
| `table` | which opcode, modifier and type combinations exist here |
| `parser` | text -> `Program` |
| `memory` | global and shared memory with their checks and counts |
| `races` | races in global memory, looked for on request |
| `threads` | registers of the threads that run together, and the scheduler |
| `arithmetic`, `data`, `access`, `warp` | what the instructions do |
| `kernel` | `Kernel.launch` |

Not modelled: time, caches, weak memory order, tensor cores, TMA, generic addresses, two-dimensional blocks, calls,
partial warps. Approximate functions (`ex2.approx` ...) return the exact value plus a deterministic pseudo-random error
as large as the hardware's may be, so a tolerance that holds here does not live from a luckily exact exponential.
"""

from .kernel import Kernel, Offset, Scattered
from .memory import Counts
from .syntax import Deadlock, GlobalMemoryRace, MemoryFault, SharedMemoryRace, UnsupportedPTX

__all__ = [
    "Counts",
    "Deadlock",
    "GlobalMemoryRace",
    "Kernel",
    "MemoryFault",
    "Offset",
    "Scattered",
    "SharedMemoryRace",
    "UnsupportedPTX",
]
