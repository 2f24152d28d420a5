"""Warp instructions on the threads that meet in one: shfl.sync, vote.sync, redux.sync, bar.warp.sync.

The machine calls them when every lane of a mask has arrived. `select` are the threads that take part, in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import KernelFault
from .ptx_integers import integer_dtype
from .ptx_operands import reader, writer
from .ptx_parse import Instruction

if TYPE_CHECKING:
    from collections.abc import Callable

    from .ptx_machine import Machine

U32 = np.uint32
FULL = 0xFFFFFFFF


def lanes_of(members: np.ndarray) -> np.ndarray:
    """One 32-bit mask per warp from a flag per thread."""
    bits = members.reshape(-1, 32).astype(U32) << np.arange(32, dtype=U32)
    return bits.sum(axis=1, dtype=U32)


def mask_operand(instruction: Instruction) -> str:
    """The operand that names the lanes that meet; bar.warp.sync has only that one."""
    return instruction.operands[-1]


def decode(instruction: Instruction) -> Callable[[Machine, np.ndarray], None] | None:
    """What the instruction does to the threads that have met, or None where it is not modelled."""
    match instruction.opcode:
        case ("shfl", "sync", mode, "b32") if mode in ("bfly", "down", "up", "idx"):
            return _shuffle(mode, instruction)
        case ("vote", "sync", mode, "b32" | "pred") if mode in ("ballot", "any", "all"):
            return _vote(mode, instruction)
        case ("redux", "sync", name, ptx_type) if name in _REDUCE:
            return _reduce(name, ptx_type, instruction)
        case ("bar", "warp", "sync"):
            return _sync_warp
    return None


def _sync_warp(machine: Machine, select: np.ndarray) -> None:
    machine.epochs.warp[np.unique(machine.warp[select])] += 1


def _shuffle(mode: str, instruction: Instruction) -> Callable[[Machine, np.ndarray], None]:
    target, *rest = instruction.operands
    value_name, _, predicate = target.partition("|")
    value, lane_operand, clamp = (reader(o, t) for o, t in zip(rest, ("b32", "u32", "u32"), strict=False))
    write_value = writer(value_name)
    write_predicate = writer(predicate) if predicate else None

    def run(machine: Machine, select: np.ndarray) -> None:
        lane = machine.lane[select]
        b = lane_operand(machine, select).astype(np.int64) & 31
        c = clamp(machine, select).astype(np.int64)
        segment, limit = c >> 8 & 31, c & 31
        low = lane & segment
        high = low | (limit & ~segment)
        source = {"bfly": lane ^ b, "down": lane + b, "up": lane - b, "idx": low | (b & ~segment)}[mode]
        # For shfl.up the clamp is the lowest lane that may be read.
        inside = source >= high if mode == "up" else source <= high
        source = np.where(inside, source, lane)
        everyone = np.zeros(machine.n_threads, U32)
        everyone[select] = value(machine, select)
        here = np.zeros(machine.n_threads, bool)
        here[select] = True
        origin = select - lane + source
        mask = machine.mask[select]
        if not (here[origin] & (mask >> source.astype(U32) & U32(1) == 1)).all():
            raise KernelFault("a shuffle reads a lane that takes no part")
        write_value(machine, select, everyone[origin])
        if write_predicate:
            write_predicate(machine, select, inside)

    return run


def _vote(mode: str, instruction: Instruction) -> Callable[[Machine, np.ndarray], None]:
    target, predicate, _ = instruction.operands
    negated = predicate.startswith("!")
    read, write = reader(predicate.lstrip("!"), "pred"), writer(target)

    def run(machine: Machine, select: np.ndarray) -> None:
        votes = np.zeros(machine.n_threads, bool)
        votes[select] = read(machine, select) ^ negated
        mask = machine.mask[select] & machine.existing[machine.warp[select]]
        ballot = lanes_of(votes)[machine.warp[select]] & mask
        write(machine, select, {"ballot": ballot, "any": ballot != 0, "all": ballot == mask}[mode])

    return run


_REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def _reduce(name: str, ptx_type: str, instruction: Instruction) -> Callable[[Machine, np.ndarray], None] | None:
    if ptx_type not in ("u32", "s32", "b32"):
        return None
    target, source, _ = instruction.operands
    read, write, function = reader(source, ptx_type), writer(target), _REDUCE[name]

    def run(machine: Machine, select: np.ndarray) -> None:
        values = np.broadcast_to(read(machine, select), select.shape)
        # Lanes that meet share warp and mask, so that these two numbers name the meeting.
        meeting = machine.warp[select].astype(np.uint64) << np.uint64(32) | machine.mask[select]
        _, first, group = np.unique(meeting, return_index=True, return_inverse=True)
        result = values[first].copy()
        if name in ("add", "xor"):
            result[:] = 0
        function.at(result, group, values)
        write(machine, select, result[group].astype(integer_dtype(ptx_type)))

    return run
