"""PTX as data: operands, instructions, programs, and the ways in which a kernel can be wrong."""

from __future__ import annotations

from dataclasses import dataclass, field


class UnsupportedPTX(NotImplementedError):
    """The program uses PTX that the instruction table does not list: it is never guessed at."""


class MemoryFault(RuntimeError):
    """An access out of bounds or misaligned."""


class SharedMemoryRace(RuntimeError):
    """Two threads touched the same shared bytes, one of them writing, with no barrier between."""


class GlobalMemoryRace(RuntimeError):
    """Two threads touched the same bytes of an array, one of them storing, and nothing orders them."""


class Deadlock(RuntimeError):
    """Some live threads never reach a barrier that others wait at."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    """A read-only register of the hardware, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Integer:
    value: int


@dataclass(frozen=True)
class FloatBits:
    """An immediate 0f3F800000 or 0d3FF0000000000000: the bit pattern and its size in bytes."""

    bits: int
    size: int


@dataclass(frozen=True)
class Complement:
    """!%p of a predicate."""

    register: Register


@dataclass(frozen=True)
class Group:
    """{a, b, c, d}, or the two destinations a|b."""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset]; base is a register or an offset in shared memory."""

    base: Operand
    offset: int


@dataclass(frozen=True)
class Parameter:
    """[name] of a kernel parameter."""

    name: str


@dataclass
class Label:
    """Target of a branch; `position` is known when the whole body was read."""

    name: str
    position: int = -1


@dataclass(frozen=True)
class Discard:
    """The destination `_`."""


Operand = Register | Special | Integer | FloatBits | Complement | Group | Address | Parameter | Label | Discard


@dataclass
class Guard:
    """@%p or @!%p."""

    register: Register
    negated: bool


@dataclass
class Instruction:
    """One statement. `entry` is the key of the table it matched, for example "mul.lo"."""

    text: str
    entry: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]
    operands: list[Operand]
    guard: Guard | None

    @property
    def opcode(self) -> str:
        return self.entry.split(".")[0]

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


@dataclass
class Program:
    """One kernel: parameters in order, registers with their PTX type, instructions, and the layout of shared memory."""

    name: str
    parameters: list[tuple[str, str]]
    block: int | None
    registers: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    shared_offsets: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
