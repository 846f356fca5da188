"""PTX as text, taken apart: kernels with their parameters, shared memory, registers and basic blocks.

Syntax after NVIDIA's "Parallel Thread Execution ISA", https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field


class PtxError(Exception):
    """What the code does is wrong, or this tool does not know it; names the instruction."""


@dataclass(frozen=True)
class Register:
    """A register or, with ``%tid`` and the like, a special one."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal: its value as an integer, or the bits of a float of 4 or 8 bytes."""

    bits: int
    size: int = 0  # of a float's bits, in bytes; 0: an integer


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or a variable in shared memory."""

    name: str


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``."""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``a|b``: a second result, a predicate."""

    first: Operand
    second: Operand


Operand = Register | Immediate | Symbol | Address | Vector | Pair


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@predicate opcode operands``."""

    opcode: str  # the first part of its name
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str = ""  # the name of a register
    negated: bool = False
    text: str = ""

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass
class Variable:
    """A parameter or a variable in shared memory."""

    name: str
    offset: int
    size: int


@dataclass
class Entry:
    """A kernel.

    Attributes:
        parameters: In order, at their offsets in parameter space.
        shared: Variables at their offsets in shared memory; one that the launch gives a size comes last.
        registers: Bytes of each register; 1 for predicates.
        blocks: Basic blocks in their order in the text.
        targets: The number of the block of each label.
    """

    name: str
    threads: int
    parameters: dict[str, Variable] = field(default_factory=dict)
    shared: dict[str, Variable] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=list)
    targets: dict[str, int] = field(default_factory=dict)


ENDS = ("bra", "ret", "exit", "bar", "barrier")  # of basic blocks
_SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4}
_SIZES |= {"s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f16x2": 4, "bf16x2": 4, "b128": 16}
_VARIABLE = re.compile(
    r"\.(?P<space>param|shared)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?(?P<name>[\w$]+)(?:\[(?P<count>\d*)\])?"
)


def size_of(type_name: str) -> int:
    """Bytes of a value of a type."""
    return _SIZES[type_name]


def names(ptx: str) -> list[str]:
    """Of the kernels of a module."""
    return re.findall(r"\.entry\s+([\w$]+)", ptx)


def parse(ptx: str, name: str) -> Entry:
    """A kernel of a module."""
    outside = re.split(r"^\.visible|^\.weak|^\.entry", ptx, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.search(rf"\.entry\s+{re.escape(name)}\b", ptx)
    if found is None:
        raise PtxError(f"there is no kernel {name}")
    brace = ptx.index("{", found.end())
    parts = ptx[found.end() : brace], ptx[brace + 1 : _closing(ptx, brace) - 1], outside
    return _entry(name, *(re.sub(r"/\*.*?\*/|//[^\n]*", "", part, flags=re.DOTALL) for part in parts))


def _closing(text: str, begin: int) -> int:
    """After the brace that closes the one at `begin`."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, begin):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.end()
    raise PtxError("a brace is not closed")


def _entry(name: str, head: str, body: str, outside: str) -> Entry:
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head)
    entry = Entry(name, int(threads[1]) if threads else 0)
    _place(entry.parameters, _VARIABLE.finditer(head), "param")
    declared = [match for text in (body, outside) for match in _VARIABLE.finditer(text)]
    used = [match for match in declared if re.search(re.escape(match["name"]) + r"(?![\w$])", body)]
    _place(entry.shared, iter(sorted(used, key=lambda match: match["count"] == "")), "shared")
    for match in re.finditer(r"\.reg\s+\.(\w+)\s+([^;]+);", body):
        for declaration in match[2].split(","):
            numbered = re.fullmatch(r"(.*)<(\d+)>", declaration.strip())
            names = [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [declaration.strip()]
            entry.registers |= dict.fromkeys(names, _SIZES[match[1]])
    _cut(entry, _statements(body))
    return entry


def _place(into: dict[str, Variable], declarations: Iterator[re.Match[str]], space: str) -> None:
    at = 0
    for match in declarations:
        if match["space"] != space:
            continue
        size = _SIZES[match["type"]]
        align = int(match["align"] or size)
        at = -(-at // align) * align
        count = 1 if match["count"] is None else int(match["count"] or 0)
        into[match["name"]] = Variable(match["name"], at, size * count)
        at += size * count


def _statements(body: str) -> Iterator[str]:
    """Labels, with their colon, and instructions. Scopes within the body are opened up: names are unique."""
    depth = 0  # of braces around operands
    word = ""
    for part in re.split(r"([;{}]|(?<=[\w$]):(?!:)\s)", body):
        if part == "{" and (word.strip() or depth):
            depth += 1
            word += part
        elif part == "}" and depth:
            depth -= 1
            word += part
        elif part in ("{", "}"):
            word = ""
        elif part == ";":
            yield word.strip()
            word = ""
        elif part.startswith(":") and re.fullmatch(r"[\w$]+", word.split()[-1]) and not depth:
            yield word.split()[-1] + ":"
            word = ""
        else:
            word += re.sub(r"^\s*\.(?:loc|pragma)\b[^\n]*$", "", part, flags=re.MULTILINE)


def _cut(entry: Entry, statements: Iterator[str]) -> None:
    """Into basic blocks."""
    block: list[Instruction] = []
    entry.blocks.append(block)

    def new() -> None:
        nonlocal block
        if block:
            block = []
            entry.blocks.append(block)

    for statement in statements:
        if statement.endswith(":"):
            new()
            entry.targets[statement[:-1]] = len(entry.blocks) - 1
        elif statement and not statement.startswith("."):
            instruction = parse_instruction(statement)
            block.append(instruction)
            if instruction.opcode in ENDS:
                new()
    if not block:
        block.append(Instruction("ret", (), (), text="ret"))


_INSTRUCTION = re.compile(r"(?:@(?P<not>!?)(?P<predicate>[%\w$]+)\s+)?(?P<name>[a-z][\w.:]*)\s*(?P<rest>.*)", re.DOTALL)


def parse_instruction(text: str) -> Instruction:
    """One instruction without its semicolon."""
    match = _INSTRUCTION.fullmatch(text.strip())
    if match is None:
        raise PtxError(f"not an instruction: {text}")
    opcode, *modifiers = match["name"].replace("::", "_").split(".")
    operands = tuple(_operand(part) for part in _split(match["rest"]))
    line = re.sub(r"\s+", " ", text.strip())
    return Instruction(opcode, tuple(modifiers), operands, match["predicate"] or "", match["not"] == "!", line)


def _split(text: str, separator: str = ",") -> list[str]:
    """At the separators that no bracket holds."""
    if not re.search(r"[\[{(]", text):
        return [part.strip() for part in text.split(separator)] if text.strip() else []
    parts, depth, word = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == separator and depth == 0:
            parts.append(word.strip())
            word = ""
        else:
            word += character
    return [*parts, word.strip()] if word.strip() else parts


@functools.lru_cache(maxsize=2**14)
def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(part) for part in _split(text[1:-1])))
    if text.startswith("["):
        base, sign, offset = re.fullmatch(r"\[\s*([^\s+-]+)\s*([+-]?)\s*([^\]]*?)\s*\]", text).groups()  # type: ignore[union-attr]
        number = int(offset, 0) if offset else 0
        operand = _operand(base)
        assert isinstance(operand, (Register, Symbol, Immediate))
        return Address(operand, -number if sign == "-" else number)
    if "|" in text:
        first, second = text.split("|")
        return Pair(_operand(first), _operand(second))
    if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        return Immediate(int(match[2], 16), 4 if match[1] in "fF" else 8)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        text = text.rstrip("U")
        octal = re.fullmatch(r"-?0\d+", text)
        return Immediate(int(text, 8 if octal else 0))
    if re.fullmatch(r"-?\d+\.\d+([eE][-+]?\d+)?", text):
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 8)
    return Register(text) if text.startswith("%") or text == "_" else Symbol(text)
