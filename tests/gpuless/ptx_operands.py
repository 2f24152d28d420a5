"""Operands: how an instruction reads and writes registers, immediates, special registers and addresses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import KernelFault
from .ptx_floats import FLOATS
from .ptx_parse import split_operands, width

if TYPE_CHECKING:
    from .ptx_machine import Machine

Reader = Callable[["Machine", "np.ndarray | slice"], np.ndarray]
Writer = Callable[["Machine", "np.ndarray | slice", np.ndarray], None]

_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")
_ADDRESS = re.compile(r"\[\s*([\w$%#]+)\s*(?:\+\s*(-?\d+)\s*)?\]")


def numpy_dtype(ptx_type: str) -> np.dtype:
    """The NumPy type of a PTX type; a packed pair is an unsigned word, a predicate a bool."""
    if ptx_type == "pred":
        return np.dtype(bool)
    if ptx_type in FLOATS:
        return FLOATS[ptx_type]
    return np.dtype(f"{'i' if ptx_type[0] == 's' else 'u'}{width(ptx_type) // 8}")


def reader(operand: str, ptx_type: str) -> Reader:
    """How to read `operand` as `ptx_type`: an array over the selected threads, or of one element for all of them."""
    if operand.startswith("{"):
        return _read_vector(operand, ptx_type)
    dtype = numpy_dtype(ptx_type)
    literal = _literal(operand)
    if literal is not None:
        value = np.array([literal & (2 ** (8 * dtype.itemsize) - 1)], np.uint64)
        constant = value.astype(f"u{dtype.itemsize}").view(dtype)
        return lambda machine, select: constant
    unsigned = np.dtype(f"u{dtype.itemsize}")

    def read(machine: Machine, select: np.ndarray | slice) -> np.ndarray:
        stored = machine.read(operand)[select]
        if "b" in (stored.dtype.kind, dtype.kind):
            if stored.dtype != dtype:
                raise KernelFault(f"{operand} is not a {ptx_type}")
            return stored
        narrowed = stored if stored.dtype == unsigned else stored.astype(unsigned)
        return narrowed.view(dtype)

    return read


def writer(operand: str) -> Writer:
    """How to write a register: bits as they are, integers extended by their own sign."""
    if operand == "_":
        return lambda machine, select, value: None
    if operand.startswith("{"):
        return _write_vector(operand)

    def write(machine: Machine, select: np.ndarray | slice, value: np.ndarray) -> None:
        target = machine.target(operand)
        if "b" in (target.dtype.kind, value.dtype.kind):
            if target.dtype != value.dtype:
                raise KernelFault(f"{operand} holds {target.dtype}, not {value.dtype}")
            target[select] = value
            return
        if value.dtype.kind not in "iu":
            value = np.ascontiguousarray(value).view(f"u{value.dtype.itemsize}")
        if value.dtype.itemsize != target.dtype.itemsize:
            value = value.astype(f"{value.dtype.kind}{target.dtype.itemsize}")
        target[select] = value.view(target.dtype)

    return write


def address(operand: str) -> Reader:
    """How to read a [register + offset] operand as int64."""
    match = _ADDRESS.fullmatch(operand)
    if match is None:
        raise KernelFault(f"address {operand} is not understood")
    name, offset = match[1], int(match[2] or 0)

    def read(machine: Machine, select: np.ndarray | slice) -> np.ndarray:
        base = machine.read(name)[select]
        return base.astype(np.int64) + offset

    return read


def _literal(operand: str) -> int | None:
    if _INTEGER.fullmatch(operand):
        return int(operand.rstrip("U"), 0)
    match = _FLOAT.fullmatch(operand)
    return int(match[1] or match[2], 16) if match else None


def _read_vector(operand: str, ptx_type: str) -> Reader:
    """mov from a vector: its elements joined, the first one lowest."""
    elements = split_operands(operand.strip("{}"))
    part = np.dtype(f"u{width(ptx_type) // 8 // len(elements)}")
    readers = [reader(e, f"b{8 * part.itemsize}") for e in elements]

    def read(machine: Machine, select: np.ndarray | slice) -> np.ndarray:
        columns = np.broadcast_arrays(*(r(machine, select) for r in readers))
        return np.stack(columns, axis=-1).view(numpy_dtype(ptx_type))[..., 0]

    return read


def _write_vector(operand: str) -> Writer:
    """mov to a vector: the value cut into equal elements, the lowest one first."""
    elements = split_operands(operand.strip("{}"))
    writers = [writer(e) for e in elements]

    def write(machine: Machine, select: np.ndarray | slice, value: np.ndarray) -> None:
        part = f"u{value.dtype.itemsize // len(elements)}"
        columns = np.ascontiguousarray(value).view(part).reshape(-1, len(elements))
        for i, write_element in enumerate(writers):
            write_element(machine, select, columns[:, i].copy())

    return write
