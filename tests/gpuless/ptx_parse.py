"""PTX text to instructions: parameters, registers, shared variables, constants, labels, and a line number for each."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field

import numpy as np

from .arguments import Parameter
from .errors import KernelFault

_COMMENT = re.compile(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", re.M)
_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)(?P<directives>[^{]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(?P<type>\w+)\s+(?P<pointer>\.ptr\s+)?(?:\.\w+\s+(?:\d+\s+)?)*"
    r"(?P<name>[\w$]+)(?:\[(?P<length>\d+)\])?$"
)
_VARIABLE = re.compile(
    r"\.(?P<space>shared|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?P<name>[\w$]+)(?:\[(?P<length>\d+)\])?(?:\s*=\s*(?P<values>.*))?$",
    re.S,
)
_LABEL = re.compile(r"([\w$]+):(?!:)")
_NAME = re.compile(r"[A-Za-z_%$][\w$%]*")


@dataclass(frozen=True)
class Instruction:
    """One instruction. `opcode` is split at its dots; `guard` is the predicate that must be true, or false."""

    line: int
    text: str
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None = None
    negated: bool = False


@dataclass
class Entry:
    """One kernel. `shared` has the offset of each shared variable, `constants` the bytes of each constant one."""

    name: str
    parameters: list[Parameter]
    max_threads: int | None
    registers: dict[str, str] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def width(ptx_type: str) -> int:
    """Bits of a type: f16x2 is 32."""
    match = re.fullmatch(r"[a-z]+(\d+)(?:x(\d+))?", ptx_type)
    if match is None:
        raise KernelFault(f"PTX type .{ptx_type} is not modelled")
    return int(match[1]) * int(match[2] or 1)


def parse(text: str) -> dict[str, Entry]:
    """Every entry of a PTX module. KernelFault for anything whose meaning is not modelled."""
    text = _COMMENT.sub("", text)
    newlines = [match.start() for match in re.finditer("\n", text)]
    module_variables, end = [], 0
    entries: dict[str, Entry] = {}
    for match in _ENTRY.finditer(text):
        module_variables += _statements(text[end : match.start()])
        end = _closing_brace(text, match.end())
        max_threads = re.search(r"\.maxntid\s+(\d+)", match["directives"])
        entry = Entry(match["name"], _parameters(match["parameters"]), int(max_threads[1]) if max_threads else None)
        for statement in module_variables:
            _declare_variable(entry, statement)
        _Body(entry, text, newlines).read(match.end(), end - 1)
        entries[entry.name] = entry
    return entries


def split_operands(text: str) -> tuple[str, ...]:
    """Operands at the commas that are outside braces and brackets."""
    operands, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            operands.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return (*operands, last) if last else tuple(operands)


def _closing_brace(text: str, start: int) -> int:
    """The position after the brace that closes the one before `start`."""
    depth, i = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        i += 1
    return i


def _statements(text: str) -> list[str]:
    return [" ".join(s.split()) for s in text.split(";") if re.search(r"\.(shared|global|const)\b", s)]


def _parameters(text: str) -> list[Parameter]:
    found = []
    for declaration in filter(None, (" ".join(part.split()) for part in text.split(","))):
        match = _PARAMETER.match(declaration)
        if match is None:
            raise KernelFault(f"PTX parameter not understood: {declaration}")
        kind = "pointer" if match["pointer"] else "float" if match["type"].startswith("f") else "any"
        found.append(Parameter(match["name"], kind, width(match["type"]) // 8 * int(match["length"] or 1)))
    return found


def _declare_variable(entry: Entry, declaration: str) -> None:
    match = _VARIABLE.search(declaration)
    if match is None or declaration.startswith(".extern"):
        raise KernelFault(f"{entry.name}: PTX variable not understood: {declaration}")
    n_bytes = width(match["type"]) // 8 * int(match["length"] or 1)
    if match["space"] == "shared":
        align = int(match["align"] or width(match["type"]) // 8)
        offset = -(-entry.shared_bytes // align) * align
        entry.shared[match["name"]] = offset
        entry.shared_bytes = offset + n_bytes
        return
    element = np.dtype(f"u{width(match['type']) // 8}")
    values = np.zeros(n_bytes // element.itemsize, element)
    if match["values"]:
        listed = [_number(v) for v in match["values"].strip("{} ").split(",")]
        values[: len(listed)] = np.array(listed, np.uint64).astype(element)
    entry.constants[match["name"]] = values.view(np.uint8)


def _number(text: str) -> int:
    text = text.strip()
    value = int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else int(text, 0)
    return value & (2**64 - 1)


class _Body:
    """Reads the statements of one entry. Names declared in an inner scope (inline assembly) get a name of their own."""

    def __init__(self, entry: Entry, text: str, newlines: list[int]):
        self.entry, self.text, self.newlines = entry, text, newlines
        self.scopes: list[dict[str, str]] = [{}]
        self.n_scopes = 0

    def read(self, position: int, end: int) -> None:
        text = self.text
        while position < end:
            if text[position].isspace() or text[position] == ";":
                position += 1
            elif text[position] == "{":
                self.scopes.append({})
                self.n_scopes += 1
                position += 1
            elif text[position] == "}":
                self.scopes.pop()
                position += 1
            elif label := _LABEL.match(text, position):
                self.entry.labels[label[1]] = len(self.entry.instructions)
                position = label.end()
            else:
                stop = text.index(";", position)
                self.statement(" ".join(text[position:stop].split()), self.line(position))
                position = stop + 1

    def line(self, position: int) -> int:
        return bisect.bisect_left(self.newlines, position) + 1

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".reg "):
            self.declare_registers(text)
        elif text.startswith(".shared"):
            _declare_variable(self.entry, text)
        elif text.startswith(".pragma"):
            pass
        elif text.startswith("."):
            raise KernelFault(f"{self.entry.name}: PTX line {line}: {text.split()[0]} is not modelled")
        else:
            self.entry.instructions.append(self.instruction(text, line))

    def declare_registers(self, text: str) -> None:
        _, ptx_type, names = text.split(None, 2)
        for name in names.split(","):
            name = name.strip()
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            if many:
                self.entry.registers |= {f"{many[1]}{i}": ptx_type[1:] for i in range(int(many[2]))}
            else:
                unique = f"{name}#{self.n_scopes}" if len(self.scopes) > 1 else name
                self.scopes[-1][name] = unique
                self.entry.registers[unique] = ptx_type[1:]

    def instruction(self, text: str, line: int) -> Instruction:
        guard, negated, rest = None, False, text
        if text.startswith("@"):
            predicate, rest = text[1:].split(None, 1)
            guard, negated = self.resolve(predicate.lstrip("!")), predicate.startswith("!")
        opcode, _, operands = rest.partition(" ")
        return Instruction(line, text, tuple(opcode.split(".")), split_operands(self.resolve(operands)), guard, negated)

    def resolve(self, text: str) -> str:
        """`text` with the names of the innermost scope that declares them."""

        def unique(match: re.Match[str]) -> str:
            return next((scope[match[0]] for scope in reversed(self.scopes) if match[0] in scope), match[0])

        return _NAME.sub(unique, text)
