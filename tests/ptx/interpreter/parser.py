"""PTX text -> `Program`. Every instruction is checked against the table here, before anything runs."""

from __future__ import annotations

import re

from .scalars import DTYPES
from .syntax import (
    Address,
    Complement,
    Discard,
    FloatBits,
    Group,
    Guard,
    Instruction,
    Integer,
    Label,
    Operand,
    Parameter,
    Program,
    Register,
    Special,
    UnsupportedPTX,
)
from .table import PACKED, SPACES, TABLE, WITHOUT_EFFECT

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_DEBUG_LINE = re.compile(r"(?m)^\s*\.(loc|file)\b.*$")
_SPECIAL = re.compile(r"%(laneid|warpid|n?(tid|ctaid)\.[xyz])")
_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0(?:[fF]([0-9a-fA-F]{8})|[dD]([0-9a-fA-F]{16}))")
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_SHARED = re.compile(r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_DECLARATIONS = (".shared", ".pragma")

_Scope = dict[str, Register]


def parse(text: str, name: str | None = None) -> Program:
    """The kernel (`.entry`) called `name`, or the first one."""
    text = _DEBUG_LINE.sub("", _COMMENT.sub("", text))
    wanted = re.escape(name) if name else r"[\w$]+"
    head = re.search(rf"\.entry\s+({wanted})\s*\((.*?)\)([^{{]*)\{{", text, re.DOTALL)
    if not head:
        raise ValueError(f"no .entry {name or ''} in the PTX")
    program = Program(head[1], _parameters(head[2]), _block_size(head[3]))
    # What the launch sizes (extern) comes after all that has a size.
    for extern, alignment, kind, variable, count in sorted(_SHARED.findall(text), key=lambda found: bool(found[0])):
        program.shared_offsets[variable] = -(-program.shared_bytes // int(alignment)) * int(alignment)
        size = 0 if extern else int(count or 1) * DTYPES[kind].itemsize
        program.shared_bytes = program.shared_offsets[variable] + size
    _Body(program).read(_braced(text, head.end()))
    return program


def _parameters(text: str) -> list[tuple[str, str]]:
    """(name, type) of `.param .u64 .ptr .global .align 16 name`."""
    parameters = []
    for declaration in filter(str.strip, text.split(",")):
        kind = re.search(r"\.([usbf]\d+)\b", declaration)
        if "[" in declaration or not kind:
            raise UnsupportedPTX(f"parameter: {declaration.strip()}")
        parameters.append((declaration.split()[-1], kind[1]))
    return parameters


def _block_size(directives: str) -> int | None:
    """Threads of a block from .reqntid or .maxntid."""
    size = re.search(r"\.(?:reqntid|maxntid)\s+([\d,\s]+)", directives)
    if not size:
        return None
    first, *others = (int(part) for part in size[1].split(","))
    if any(extent != 1 for extent in others):
        raise UnsupportedPTX("a block with more than one dimension")
    return first


def _braced(text: str, start: int) -> str:
    """The text from `start`, just behind a "{", to the matching "}"."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    raise ValueError("unbalanced braces in the PTX")


class _Body:
    """Reads the statements of a kernel; registers of inner scopes are renamed so that names are unique."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scopes: list[_Scope] = [{}]
        self.labels: dict[str, int] = {}

    def read(self, body: str) -> None:
        """Statements end in ";". A "{" opens a scope at the start of a statement and a vector inside one."""
        body = re.sub(r"(?m)^\s*([$\w]+)\s*:(?!:)", r";.label \1;", body)
        statement = ""
        for token in re.split(r"([;{}])", body):
            if token == "{" and not statement.strip():
                self.scopes.append({})
            elif token == "}" and "{" not in statement:
                self.scopes.pop()
            elif token != ";":
                statement += token
            else:
                self._statement(statement.strip())
                statement = ""
        for instruction in self.program.code:
            for operand in instruction.operands:
                if isinstance(operand, Label):
                    operand.position = self.labels[operand.name]

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".label"):
            self.labels[text.split()[1]] = len(self.program.code)
        elif text and not text.startswith(_DECLARATIONS):
            self.program.code.append(self._instruction(text))

    def _declare(self, text: str) -> None:
        declaration = _REGISTERS.fullmatch(text)
        if not declaration or declaration[1] not in DTYPES:
            raise UnsupportedPTX(f"declaration: {text}")
        for variable in declaration[2].split(","):
            many = re.fullmatch(r"(.+)<(\d+)>", variable.strip())
            names = [f"{many[1]}{index}" for index in range(int(many[2]))] if many else [variable.strip()]
            for name in names:
                unique = name if len(self.scopes) == 1 else f"{name}@{len(self.program.registers)}"
                self.scopes[-1][name] = Register(unique)
                self.program.registers[unique] = declaration[1]

    def _register(self, name: str) -> Register | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def _instruction(self, text: str) -> Instruction:
        statement = _STATEMENT.fullmatch(text)
        if not statement:
            raise UnsupportedPTX(f"syntax of: {text}")
        negation, guard_name, opcode, rest = statement.groups()
        entry, modifiers, types = _classify(opcode, text)
        guard = None
        if guard_name:
            register = self._register(guard_name)
            if not register:
                raise UnsupportedPTX(f"guard of: {text}")
            guard = Guard(register, bool(negation))
        instruction = Instruction(text, entry, modifiers, types, [], guard)
        if instruction.opcode in WITHOUT_EFFECT:
            return instruction
        arguments = re.split(r",(?![^{]*\})", rest) if rest else []
        instruction.operands = [self._operand(argument.strip(), instruction) for argument in arguments]
        if entry in ("bar.sync", "barrier.sync") and instruction.operands != [Integer(0)]:
            raise UnsupportedPTX(f"a barrier other than barrier 0 of all threads: {text}")
        return instruction

    def _operand(self, argument: str, instruction: Instruction) -> Operand:
        if argument.startswith("{"):
            return Group(tuple(self._operand(part.strip(), instruction) for part in argument.strip("{}").split(",")))
        if argument.startswith("["):
            return self._address(argument, instruction)
        if argument.startswith("!") and (register := self._register(argument[1:])):
            return Complement(register)
        if "|" in argument and (instruction.opcode in ("shfl", "elect") or {*PACKED.split()} & {*instruction.types}):
            return Group(tuple(self._operand(part.strip(), instruction) for part in argument.split("|")))
        if register := self._register(argument):
            return register
        if argument == "_":
            return Discard()
        if instruction.opcode == "bra":
            return Label(argument)
        if argument in self.program.shared_offsets:
            return Integer(self.program.shared_offsets[argument])
        if _SPECIAL.fullmatch(argument):
            return Special(argument)
        if pattern := _FLOAT.fullmatch(argument):
            return FloatBits(int(pattern[1] or pattern[2], 16), 4 if pattern[1] else 8)
        if _INTEGER.fullmatch(argument):
            return Integer(int(argument.rstrip("U"), 0))
        raise UnsupportedPTX(f"operand {argument!r} in: {instruction.text}")

    def _address(self, argument: str, instruction: Instruction) -> Operand:
        address = _ADDRESS.fullmatch(argument)
        if not address:
            raise UnsupportedPTX(f"address {argument!r} in: {instruction.text}")
        base, offset = address[1], int(address[2] or "0", 0)
        if instruction.entry != "ld.param":
            return Address(self._operand(base, instruction), offset)
        if offset:
            raise UnsupportedPTX(f"part of a parameter: {instruction.text}")
        return Parameter(base)


def _classify(opcode: str, text: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """(entry of the table, remaining modifiers, types) of `ld.global.v4.b32` and the like."""
    name, *suffixes = opcode.split(".")
    types = tuple(suffix for suffix in suffixes if suffix in DTYPES)
    modifiers = tuple(suffix for suffix in suffixes if suffix not in DTYPES)
    entry = f"{name}.{modifiers[0]}" if modifiers and f"{name}.{modifiers[0]}" in TABLE else name
    if entry not in TABLE:
        raise UnsupportedPTX(f"opcode {opcode!r} in: {text}")
    modifiers = modifiers[entry != name :]
    known_modifiers, known_types = TABLE[entry]
    if unknown := set(modifiers) - known_modifiers:
        raise UnsupportedPTX(f"modifier {sorted(unknown)} in: {text}")
    if ".".join(types) not in known_types:
        raise UnsupportedPTX(f"type {'.'.join(types) or '(none)'!r} in: {text}")
    if entry in ("ld", "st", "atom", "red") and not SPACES & set(modifiers):
        raise UnsupportedPTX(f"generic address in: {text}")
    return entry, modifiers, types
