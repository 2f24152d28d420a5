"""Codes of tables and of small floating-point types, 16 at a time: what cpu_floats.py needs beyond cpu_vectors.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from ..reference.floats import CODES, LARGEST, MIDPOINTS, TIES_DOWN, TIES_TO_EVEN
from .cpu_vectors import (
    _F32,
    _I8,
    _I32,
    F32X,
    LANES,
    U32X,
    Vector,
    _below,
    _const,
    _float,
    _int,
    _like,
    _operation,
    _read,
    _switch,
    _with,
    _write,
)

# Kinds of codes: those of a grid, e2m1 by each of its two rules.
CODINGS = {"nf4": 0, "fp4": 1, "e2m1": 2, "e2m1_down": 3, "e4m3": 4, "e5m2": 5}
# (mantissa bits, bias of the exponent) of the types that are rounded by their bits.
_FIELDS = {"e4m3": (3, 7), "e5m2": (2, 15)}


def _count(b: ir.IRBuilder, x: ir.Value, thresholds: Iterable[float], steps: Iterable[int], first: int) -> ir.Value:
    """`first`, plus the step of each threshold that x is above."""
    code = _const(_like(x, _I32), first)
    for threshold, step in zip(thresholds, steps, strict=True):
        above = b.fcmp_ordered(">", x, _const(x.type, float(threshold)))
        code = b.add(code, b.select(above, _const(code.type, step), _const(code.type, 0)))
    return code


def _magnitude(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _with(b, "and_", _int(b, x), 0x7FFFFFFF)


def _table_code(b: ir.IRBuilder, x: ir.Value, grid: str) -> ir.Value:
    codes = CODES[grid].astype(int)
    return _count(b, x, MIDPOINTS[grid], np.diff(codes).tolist(), int(codes[0]))


def _e2m1_code(b: ir.IRBuilder, x: ir.Value, thresholds: Any, least: float) -> ir.Value:
    """The sign is that of values below `least`."""
    code = _count(b, _float(b, _magnitude(b, x)), thresholds, [1] * 7, 0)
    below = b.fcmp_ordered("<", x, _const(x.type, least))
    return b.or_(code, b.select(below, _const(code.type, 8), _const(code.type, 0)))


def _small_code(b: ir.IRBuilder, x: ir.Value, grid: str) -> ir.Value:
    mantissa, bias = _FIELDS[grid]
    cut, most = 23 - mantissa, int(np.float32(LARGEST[grid]).view(np.uint32))
    magnitude = _magnitude(b, x)
    magnitude = b.select(_below(b, magnitude, most), magnitude, _const(magnitude.type, most))
    odd = _with(b, "and_", _with(b, "lshr", magnitude, cut), 1)
    rounded = _with(b, "lshr", b.add(_with(b, "add", magnitude, (1 << (cut - 1)) - 1), odd), cut)
    normal = _with(b, "sub", rounded, (127 - bias) << mantissa)
    # Adding the power of two whose last bit is worth a subnormal's rounds there.
    shift = np.float32(2.0 ** (24 - bias - mantissa))
    raised = _int(b, _with(b, "fadd", _float(b, magnitude), float(shift)))
    subnormal = _with(b, "sub", raised, int(shift.view(np.uint32)))
    code = b.select(_below(b, magnitude, (128 - bias) << 23), subnormal, normal)
    return b.or_(code, _with(b, "and_", _with(b, "lshr", _int(b, x), 24), 0x80))


def _code(b: ir.IRBuilder, x: ir.Value, coding: str) -> ir.Value:
    if coding in CODES:
        return _table_code(b, x, coding)
    if coding == "e2m1":
        return _e2m1_code(b, x, TIES_TO_EVEN, 0.0)
    if coding == "e2m1_down":
        return _e2m1_code(b, x, TIES_DOWN, -float(TIES_DOWN[0]))
    return _small_code(b, x, coding)


@_operation(lambda x, *_: U32X if isinstance(x, Vector) else types.uint32)
def code_of(b: ir.IRBuilder, x: ir.Value, coding: ir.Value) -> ir.Value:
    """The codes of finite float32 values that are in units of their scale."""
    names = {number: name for name, number in CODINGS.items()}
    return _switch(b, coding, names, lambda number: _code(b, x, names[number]))


@_operation(types.uint32)
def e4m3_code(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _small_code(b, x, "e4m3")


@_operation(types.void)
def store_low_bytes(b: ir.IRBuilder, address: ir.Value, raw: ir.Value) -> None:
    """The low bytes of 16 words."""
    _write(b, b.trunc(raw, ir.VectorType(_I8, LANES)), address)


@_operation(F32X)
def load_floats(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return _read(b, address, ir.VectorType(_F32, LANES))


@_operation(types.float32)
def float_of(b: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    """The float32 of the low 32 bits of a 64-bit integer."""
    return _float(b, b.trunc(raw, _I32))
