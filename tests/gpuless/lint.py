"""What emitted PTX may not contain: flushing, approximation, contraction, and a fused multiply-add that is not listed.

`LISTED_FMA` is the data table; docs/kernels.md proves each sequence in it.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence

from .errors import KernelFault
from .ptx_parse import Entry, Instruction, parse

# Entry -> the fused multiply-adds it may contain, as expressions over registers: mul(x, r) is the result of mul.rn.f32
# of the registers that x and r stand for, and a letter stands for one register wherever it is.
_QUOTIENT = (
    "fma(neg(mul(x, r)), s, x)",  # the residual of the quotient x * r, r = RN(1 / s)
    "fma(fma(neg(mul(x, r)), s, x), r, mul(x, r))",  # the quotient corrected by it
)
LISTED_FMA: dict[str, tuple[str, ...]] = {
    "quantize": _QUOTIENT,
    "quantize_affine": _QUOTIENT,
    "quantize_floats": _QUOTIENT,
}

# Without a rounding modifier the assembler is free to contract these.
ROUNDED = ("add", "sub", "mul", "div", "rcp", "sqrt", "fma", "mad")
FORBIDDEN = ("ftz", "approx", "full", "sat")


def lint(ptx: str, listed: Mapping[str, Sequence[str]] = LISTED_FMA) -> Counter[str]:
    """Check every entry of a PTX text; KernelFault with the line of the first violation.

    Returns how often each entry has a listed fused multiply-add, so that a test can see that it looked at some.
    """
    counts: Counter[str] = Counter()
    for entry in parse(ptx).values():
        definitions = _definitions(entry)
        patterns = [ast.parse(text, mode="eval").body for text in listed.get(entry.name, ())]
        for instruction in entry.instructions:
            _check_modifiers(entry, instruction)
            if instruction.opcode[0] == "fma":
                if not any(_Match(definitions).call(pattern, instruction) for pattern in patterns):
                    raise _fault(entry, instruction, "a fused multiply-add that is not listed")
                counts[entry.name] += 1
    return counts


def _check_modifiers(entry: Entry, instruction: Instruction) -> None:
    name, *modifiers = instruction.opcode
    for modifier in FORBIDDEN:
        if modifier in modifiers:
            raise _fault(entry, instruction, f".{modifier} is not exact")
    if name in ROUNDED and modifiers[-1:] == ["f32"]:
        if name == "mad":
            raise _fault(entry, instruction, "mad.f32 is a fused multiply-add in disguise")
        if "rn" not in modifiers:
            raise _fault(entry, instruction, f"{name} without .rn may be contracted or approximate")
    if modifiers[-1:] == ["f64"]:
        raise _fault(entry, instruction, "float64 arithmetic has no place in a kernel")


def _fault(entry: Entry, instruction: Instruction, why: str) -> KernelFault:
    return KernelFault(f"{entry.name}: PTX line {instruction.line}: {instruction.text}: {why}")


def _definitions(entry: Entry) -> dict[str, Instruction]:
    """Register -> the only instruction that writes it. Registers written in several places stand for themselves."""
    writers: dict[str, list[Instruction]] = {}
    for instruction in entry.instructions:
        if instruction.operands and instruction.opcode[0] != "st":
            writers.setdefault(instruction.operands[0], []).append(instruction)
    return {name: found[0] for name, found in writers.items() if len(found) == 1}


class _Match:
    """One attempt to read an instruction as an expression: each letter stands for one register."""

    def __init__(self, definitions: Mapping[str, Instruction]):
        self.definitions = definitions
        self.letters: dict[str, str] = {}

    def call(self, pattern: ast.expr, instruction: Instruction) -> bool:
        """Whether `instruction` is the call that `pattern` is, operands included."""
        if not isinstance(pattern, ast.Call) or not isinstance(pattern.func, ast.Name):
            raise ValueError(f"not an expression of calls and letters: {ast.unparse(pattern)}")
        sources = instruction.operands[1:]
        is_same = instruction.opcode[0] == pattern.func.id and instruction.opcode[-1] == "f32"
        if not is_same or instruction.guard or len(sources) != len(pattern.args):
            return False
        return all(self.operand(part, source) for part, source in zip(pattern.args, sources, strict=True))

    def operand(self, pattern: ast.expr, register: str) -> bool:
        if isinstance(pattern, ast.Name):
            return self.letters.setdefault(pattern.id, register) == register
        defined = self.definitions.get(register)
        return defined is not None and self.call(pattern, defined)
