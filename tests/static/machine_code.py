"""Instructions and loops of compiled machine code: NVIDIA's SASS and AMD's assembly.

A loop is what a backward branch spans. Only innermost loops are reported: what surrounds one (a tile that holds the
target, say) runs once a row.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

#   /*0a10*/  @!P0 LDG.E.EF.128 R4, desc[UR8][R2.64] ;   ->  address, opcode, operands
_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_SASS_WIDTHS = ((".256", 32), (".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1))  # none: 4
_AMD_LINE = re.compile(r"^\s+([a-z]\w+)\s*([^;]*)")
_AMD_WIDTHS = {
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "ubyte": 1,
    "sbyte": 1,
    "byte": 1,
}
_AMD_ACCESS = re.compile(rf"(?:global|buffer|flat)_(load|store)_({'|'.join(_AMD_WIDTHS)})(?![a-z])")
_AMD_SPECIAL = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")


@dataclass
class Instruction:
    position: int
    opcode: str
    target: int | None = None
    """Where a branch goes."""
    loads: int = 0
    stores: int = 0
    """Bytes of global memory a thread."""
    special: bool = False
    """Runs on the unit for exponentials, logarithms and reciprocals (MUFU)."""


@dataclass
class Loop:
    body: list[Instruction]

    @property
    def instructions(self) -> int:
        return len(self.body)

    @property
    def special(self) -> int:
        return sum(instruction.special for instruction in self.body)

    @property
    def loads(self) -> Counter[int]:
        """Bytes of a load -> how many."""
        return Counter(instruction.loads for instruction in self.body if instruction.loads)

    @property
    def stores(self) -> Counter[int]:
        return Counter(instruction.stores for instruction in self.body if instruction.stores)

    @property
    def bytes_loaded(self) -> int:
        return sum(width * count for width, count in self.loads.items())


@dataclass
class Code:
    """One compiled kernel. registers: a thread's; spills: instructions that move registers to local memory and back."""

    registers: int
    spills: int
    shared: int
    fences: int
    instructions: list[Instruction] = field(repr=False)

    @property
    def loops(self) -> list[Loop]:
        """Innermost loops, in order."""
        spans = [(i.target, i.position) for i in self.instructions if i.target is not None and i.target < i.position]
        innermost = [
            (first, last)
            for first, last in spans
            if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans)
        ]
        return [Loop([i for i in self.instructions if first <= i.position <= last]) for first, last in innermost]

    def reading_loops(self) -> list[Loop]:
        """Loops that load a row and store nothing."""
        return [loop for loop in self.loops if loop.loads and not loop.stores]

    def writing_loops(self) -> list[Loop]:
        """Loops that load a row and store its gradient."""
        return [loop for loop in self.loops if loop.loads and loop.stores]

    def filling_loops(self) -> list[Loop]:
        """Loops that only store."""
        return [loop for loop in self.loops if loop.stores and not loop.loads]


def read(compiled: Any) -> Code:
    """The machine code of what triton.compile returned."""
    if "cubin" in compiled.asm:
        return _read_cubin(compiled.asm["cubin"], compiled.metadata.shared)
    return _read_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)


@functools.cache  # launches share kernels, and disassembling is slow
def _read_cubin(cubin: bytes, shared: int) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [_TOOLS / "cuobjdump", "--dump-resource-usage", "-sass", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"\bREG:(\d+)", text)
    assert registers, text
    instructions = [
        _sass(int(line[1], 16), line[2], line[3]) for row in text.splitlines() if (line := _SASS_LINE.match(row))
    ]
    spills = sum(instruction.opcode.startswith(("LDL", "STL")) for instruction in instructions)
    fences = sum(instruction.opcode.startswith(("MEMBAR", "ERRBAR", "FENCE")) for instruction in instructions)
    return Code(int(registers[1]), spills, shared, fences, instructions)


def _sass(address: int, opcode: str, operands: str) -> Instruction:
    width = next((size for suffix, size in _SASS_WIDTHS if suffix in opcode), 4)
    target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
    return Instruction(
        address,
        opcode,
        target=int(target[1], 16) if target else None,
        loads=width if opcode.startswith(("LDG", "LDGSTS")) else 0,
        stores=width if opcode.startswith("STG") else 0,
        special=opcode.startswith("MUFU"),
    )


def _read_amdgcn(text: str, shared: int) -> Code:
    usage = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
    instructions: list[Instruction] = []
    branches: list[tuple[Instruction, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(instructions)
        elif code := _AMD_LINE.match(line):
            instruction = _amd(len(instructions), code[1])
            instructions.append(instruction)
            if code[1].startswith(("s_cbranch", "s_branch")):
                branches.append((instruction, code[2].strip()))
        if line.startswith("\ts_endpgm"):
            break
    for instruction, label_name in branches:
        instruction.target = labels.get(label_name)
    fences = sum(instruction.opcode.startswith("buffer_wbl2") for instruction in instructions)
    return Code(int(usage["vgpr_count"]), int(usage["vgpr_spill_count"]), shared, fences, instructions)


def _amd(position: int, opcode: str) -> Instruction:
    access = _AMD_ACCESS.match(opcode)
    width = _AMD_WIDTHS[access[2]] if access else 0
    return Instruction(
        position,
        opcode,
        loads=width if access and access[1] == "load" else 0,
        stores=width if access and access[1] == "store" else 0,
        special=opcode.startswith(_AMD_SPECIAL),
    )
