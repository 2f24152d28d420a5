"""One instruction to one Python function. What is not modelled raises, and never guesses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from . import ptx_floats, ptx_integers, ptx_warp
from .errors import KernelFault
from .ptx_operands import Reader, address, numpy_dtype, reader, writer
from .ptx_parse import Entry, Instruction, split_operands, width

if TYPE_CHECKING:
    from .ptx_machine import Machine

Action = Callable[["Machine", "np.ndarray | slice"], None]
# Qualifiers of loads and stores that change where a value is cached, not what it is.
CACHE_HINTS = {
    *("nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak", "relaxed", "gpu", "sys", "cta", "volatile"),
    *("L1::no_allocate", "L1::evict_first", "L1::evict_last", "L1::evict_normal", "L1::evict_unchanged"),
    *("L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last", "L2::evict_normal"),
}
BIT_COUNTS = {
    "popc": ptx_integers.population,
    "clz": ptx_integers.count_leading_zeros,
    "brev": ptx_integers.reverse_bits,
}
ATOMICS = ("add", "min", "max", "or", "and", "exch")
TYPES = ("pred", "b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16", "b32", "u32", "s32", "f32", "b64", "u64", "s64")
PAIRS = ("f16x2", "bf16x2", "u16x2", "s16x2")


@dataclass(frozen=True)
class Step:
    """A decoded instruction. `kind` tells the machine what it does to the flow of threads:

    plain (act and go on), branch (to `target`), exit, barrier (wait for the block), meeting (wait for the mask).
    """

    instruction: Instruction
    kind: str
    act: Action | None = None
    target: int = 0
    guard: Reader | None = None
    mask: Reader | None = None


def decode(entry: Entry, instruction: Instruction) -> Step:
    """The step of one instruction. KernelFault, naming line and text, where it is not modelled."""
    guard = reader(instruction.guard, "pred") if instruction.guard else None
    if guard and instruction.negated:
        positive = guard
        guard = lambda machine, select: ~positive(machine, select)  # noqa: E731
    step = functools.partial(Step, instruction, guard=guard)
    match instruction.opcode:
        case ("bra",) | ("bra", "uni"):
            return step("branch", target=entry.labels[instruction.operands[0]])
        case ("ret",) | ("ret", "uni") | ("exit",):
            return step("exit")
        case ("bar", "sync") | ("barrier", "sync") | ("barrier", "sync", "aligned") | ("bar", "cta", "sync"):
            return step("barrier")
        case ("shfl" | "vote" | "redux", *_) | ("bar", "warp", "sync"):
            act = ptx_warp.decode(instruction)
            if act is not None:
                return step("meeting", act, mask=reader(ptx_warp.mask_operand(instruction), "u32"))
        case _:
            act = _plain(instruction)
            if act is not None:
                return step("plain", act)
    raise KernelFault(f"PTX line {instruction.line}: instruction not modelled: {instruction.text}")


def _plain(instruction: Instruction) -> Action | None:
    name, *qualifiers = instruction.opcode
    operands = instruction.operands
    if name in ("membar", "fence"):
        return lambda machine, select: None
    if name in ("ld", "st"):
        return _memory(name, qualifiers, operands)
    if name in ("atom", "red"):
        return _atomic(name, qualifiers, operands)
    if not qualifiers or qualifiers[-1] not in TYPES + PAIRS:
        return None
    *rest, ptx_type = qualifiers
    modifiers = frozenset(rest)
    if name in ("setp", "set"):
        return _compare(name, rest, ptx_type, operands)
    if name == "cvt":
        return _convert(rest, ptx_type, operands)
    if name == "selp":
        return _select(ptx_type, operands)
    if name == "mad":
        return _multiply_add(modifiers, ptx_type, operands)
    if name == "mov" or (name == "cvta" and modifiers <= {"to", "global"}):
        return _apply(lambda a: a, operands, [ptx_type])
    if name in ("shl", "shr") and not modifiers:
        return _apply(functools.partial(ptx_integers.shift, name == "shl"), operands, [ptx_type, "u32"])
    if (bits := _bits(name, modifiers, ptx_type, operands)) is not None:
        return bits
    function = _arithmetic(name, modifiers, ptx_type)
    return None if function is None else _apply(function, operands, [ptx_type] * (len(operands) - 1))


def _arithmetic(name: str, modifiers: frozenset[str], ptx_type: str) -> Callable[..., np.ndarray] | None:
    if ptx_type == "pred":
        return ptx_integers.LOGIC.get(name)
    if ptx_type in ptx_floats.FLOATS or ptx_type in ("f16x2", "bf16x2"):
        return ptx_floats.operation(name, ptx_type, modifiers)
    if ptx_type in ("u16x2", "s16x2"):
        minmax = {"min": np.minimum, "max": np.maximum}.get(name)
        return ptx_integers.halves(minmax, ptx_type[0] == "s") if minmax and not modifiers else None
    if name == "mul":
        return ptx_integers.product(modifiers)
    if modifiers == {"relu"} and name in ("min", "max") and ptx_type == "s32":
        return ptx_integers.at_least_zero(ptx_integers.ARITHMETIC[name])
    return None if modifiers else ptx_integers.ARITHMETIC.get(name)


def _bits(name: str, modifiers: frozenset[str], ptx_type: str, operands: tuple[str, ...]) -> Action | None:
    """The instructions on bits, whose operands have types of their own."""
    if name == "prmt" and ptx_type == "b32" and not modifiers and len(operands) == 4:
        return _apply(ptx_integers.permute, operands, ["u32"] * 3)
    if name == "bfe" and ptx_type in ("u32", "u64"):
        return _apply(ptx_integers.extract_field, operands, [ptx_type, "u32", "u32"])
    if name == "bfi" and ptx_type in ("b32", "b64"):
        return _apply(ptx_integers.insert_field, operands, [ptx_type, ptx_type, "u32", "u32"])
    if name == "lop3" and ptx_type == "b32" and not modifiers:
        table = int(operands[4], 0)
        return _apply(functools.partial(ptx_integers.logic3, table), operands[:4], ["u32"] * 3)
    if name == "shf" and ptx_type == "b32" and len(modifiers) == 2 and modifiers & {"l", "r"}:
        if not modifiers & {"wrap", "clamp"}:
            return None
        shift = functools.partial(ptx_integers.funnel_shift, "l" in modifiers, "wrap" in modifiers)
        return _apply(shift, operands, ["u32"] * 3)
    if name in BIT_COUNTS and not modifiers:
        return _apply(BIT_COUNTS[name], operands, [ptx_type])
    if name == "bfind" and ptx_type[0] == "u" and modifiers <= {"shiftamt"}:
        return _apply(functools.partial(ptx_integers.find_bit, bool(modifiers)), operands, [ptx_type])
    return None


def _apply(function: Callable[..., np.ndarray], operands: tuple[str, ...], types: list[str]) -> Action | None:
    """Read every source as its type, and write what the function makes of them."""
    target, *sources = operands
    if len(sources) != len(types):
        return None
    write, readers = writer(target), [reader(o, t) for o, t in zip(sources, types, strict=True)]

    def act(machine: Machine, select: np.ndarray | slice) -> None:
        write(machine, select, np.asarray(function(*(read(machine, select) for read in readers))))

    return act


def _multiply_add(modifiers: frozenset[str], ptx_type: str, operands: tuple[str, ...]) -> Action | None:
    product = ptx_integers.product(modifiers)
    if ptx_type in ptx_floats.FLOATS or product is None:
        return None
    addend = f"{ptx_type[0]}{2 * width(ptx_type)}" if "wide" in modifiers else ptx_type
    return _apply(lambda a, b, c: product(a, b) + c, operands, [ptx_type, ptx_type, addend])


def _select(ptx_type: str, operands: tuple[str, ...]) -> Action | None:
    return _apply(lambda a, b, p: np.where(p, a, b), operands, [ptx_type, ptx_type, "pred"])


def _convert(qualifiers: list[str], source: str, operands: tuple[str, ...]) -> Action | None:
    if not qualifiers or qualifiers[-1] not in TYPES + PAIRS:
        return None
    *modifiers, to = qualifiers
    function = ptx_floats.conversion(to, source, frozenset(modifiers))
    return None if function is None else _apply(function, operands, [source] * (len(operands) - 1))


def _compare(name: str, qualifiers: list[str], source: str, operands: tuple[str, ...]) -> Action | None:
    """setp writes a predicate, set writes 1.0 or all ones; both may combine with another predicate."""
    result_type = "pred"
    if name == "set":
        *qualifiers, result_type = qualifiers
    relation, *rest = qualifiers
    ftz = "ftz" in rest
    combine = [ptx_integers.LOGIC[q] for q in rest if q in ("and", "or", "xor")]
    test = _relation(relation, source)
    if test is None or set(rest) - {"ftz", "and", "or", "xor"} or "|" in operands[0]:
        return None

    def function(a: np.ndarray, b: np.ndarray, *predicate: np.ndarray) -> np.ndarray:
        holds = test(ptx_floats.flush(a), ptx_floats.flush(b)) if ftz else test(a, b)
        for both in combine:
            holds = both(holds, predicate[0])
        if result_type == "pred":
            return holds
        if result_type == "f32":
            return holds.astype(np.float32)
        return np.where(holds, -1, 0).astype(np.int32)

    negated = len(operands) == 4 and operands[3].startswith("!")
    if negated or result_type not in ("pred", "f32", "u32", "s32"):
        return None
    return _apply(function, operands, [source, source, *(["pred"] * len(combine))])


def _relation(relation: str, source: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
    if source not in ptx_floats.FLOATS:
        return ptx_integers.COMPARE.get(relation)

    def unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.isnan(a) | np.isnan(b)

    if relation == "nan":
        return unordered
    if relation == "num":
        return lambda a, b: ~unordered(a, b)
    ordered = ptx_integers.COMPARE.get(relation.removesuffix("u"))
    if ordered is None or relation in ("lo", "ls", "hi", "hs"):
        return None
    if relation.endswith("u"):
        return lambda a, b: ordered(a, b) | unordered(a, b)
    return lambda a, b: ordered(a, b) & ~unordered(a, b)


def _memory(name: str, qualifiers: list[str], operands: tuple[str, ...]) -> Action | None:
    *rest, ptx_type = qualifiers
    spaces = [q for q in rest if q in ("global", "shared", "const", "param")]
    vectors = [q for q in rest if q in ("v2", "v4", "v8")]
    if len(spaces) != 1 or set(rest) - CACHE_HINTS - {*spaces, *vectors} or ptx_type not in TYPES:
        return None
    space, count = spaces[0], int(vectors[0][1:]) if vectors else 1
    place, values = (operands[1], operands[0]) if name == "ld" else operands
    elements = split_operands(values.strip("{}")) if vectors else (values,)
    dtype = numpy_dtype(ptx_type)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    if space == "param":
        return _load_parameter(place.strip("[]"), dtype, elements[0]) if name == "ld" and count == 1 else None
    where = address(place)
    if name == "ld":
        writers = [writer(e) for e in elements]

        def load(machine: Machine, select: np.ndarray | slice) -> None:
            loaded = machine.load(space, where(machine, select), dtype.itemsize, count, select).view(dtype)
            for i, write in enumerate(writers):
                write(machine, select, loaded[:, i].copy())

        return load
    readers = [reader(e, f"b{8 * dtype.itemsize}") for e in elements]

    def store(machine: Machine, select: np.ndarray | slice) -> None:
        offsets = where(machine, select)
        columns = [np.broadcast_to(read(machine, select), offsets.shape) for read in readers]
        machine.store(space, offsets, np.stack(columns, axis=1).astype(unsigned, copy=False), select)

    return store if space != "const" else None


def _load_parameter(name: str, dtype: np.dtype, target: str) -> Action:
    write = writer(target)

    def load(machine: Machine, select: np.ndarray | slice) -> None:
        write(machine, select, np.frombuffer(machine.parameters[name], dtype)[:1])

    return load


def _atomic(name: str, qualifiers: list[str], operands: tuple[str, ...]) -> Action | None:
    *rest, ptx_type = qualifiers
    operations = [q for q in rest if q in ATOMICS]
    if len(operations) != 1 or "global" not in rest or ptx_type not in ("u32", "s32", "b32", "u64", "s64", "b64"):
        return None
    if set(rest) - {*operations, "global", "relaxed", "acq_rel", "gpu", "sys", "cta"}:
        return None
    target, *sources = operands if name == "atom" else ("_", *operands)
    where, read, write = address(sources[0]), reader(sources[1], ptx_type), writer(target)

    def act(machine: Machine, select: np.ndarray | slice) -> None:
        places = where(machine, select)
        write(machine, select, machine.memory.atomic(operations[0], ptx_type, places, read(machine, select)))

    return act
