"""Codes of tables and of small floating-point types, 16 at a time: what cpu_floats.py needs beyond cpu_vectors.py."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from ..reference.floats import CODES, LARGEST, MIDPOINTS
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
_FIELDS = {"e2m1": (1, 1), "e4m3": (3, 7), "e5m2": (2, 15)}


def _magnitude(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _with(b, "and_", _int(b, x), 0x7FFFFFFF)


def _flag(b: ir.IRBuilder, condition: ir.Value, bits: int, like: ir.Value) -> ir.Value:
    """`bits` where the condition holds, else 0."""
    typ = _like(like, _I32)
    return b.select(condition, _const(typ, bits), _const(typ, 0))


def _nf4_code(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """A binary search among the midpoints."""
    thresholds, code = [_const(x.type, float(t)) for t in MIDPOINTS["nf4"]], _const(_like(x, _I32), 0)
    for bit in (8, 4, 2, 1):
        above = b.fcmp_ordered(">", x, thresholds[len(thresholds) // 2])
        code = b.or_(code, _flag(b, above, bit, x))
        n = len(thresholds) // 2
        thresholds = [b.select(above, thresholds[n + 1 + i], thresholds[i]) for i in range(n)]
    return code


def _fp4_code(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """By magnitude. On a midpoint a negative value takes the larger one, as if it were a bit above."""
    codes, positive = CODES["fp4"][8:].astype(int), MIDPOINTS["fp4"][8:]
    raw, zero = _magnitude(b, x), _const(x.type, 0.0)
    raw = b.add(raw, _with(b, "lshr", _int(b, x), 31))
    code = _const(raw.type, 0)
    for threshold, step in zip(positive, np.diff(codes % 8).tolist(), strict=True):
        above = b.icmp_unsigned(">", raw, _const(raw.type, int(threshold.view(np.uint32))))
        code = b.add(code, _flag(b, above, step, x))
    least = b.icmp_unsigned(">", raw, _const(raw.type, int(positive[0].view(np.uint32))))
    sign = b.select(least, b.fcmp_ordered("<", x, zero), b.fcmp_ordered(">", x, zero))
    return b.or_(code, _flag(b, sign, 8, x))


def _small_code(b: ir.IRBuilder, x: ir.Value, grid: str) -> ir.Value:
    """To nearest even, saturated, with the sign of x.

    Adding the power of two whose last bit is worth a unit of the value's exponent rounds to units: the sum less that
    power is a count of them, and each exponent above the least adds as many as one exponent has.
    """
    code, _, _ = _rounded(b, x, grid)
    bits = 4 if grid == "e2m1" else 8
    return b.or_(code, _with(b, "and_", _with(b, "lshr", _int(b, x), 32 - bits), 1 << (bits - 1)))


def _rounded(b: ir.IRBuilder, x: ir.Value, grid: str) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Code without sign; the power that was added, as bits; the sum less the power and the value, exact."""
    mantissa, bias = _FIELDS[grid]
    cut, most = 23 - mantissa, int(np.float32(LARGEST[grid]).view(np.uint32))
    magnitude = _magnitude(b, x)
    magnitude = b.select(_below(b, magnitude, most), magnitude, _const(magnitude.type, most))
    exponent, least = _with(b, "and_", magnitude, 0x7F800000), _const(magnitude.type, (128 - bias) << 23)
    power = _with(b, "add", b.select(b.icmp_unsigned(">", exponent, least), exponent, least), cut << 23)
    total = b.fadd(_float(b, magnitude), _float(b, power))
    units = _with(b, "sub", _with(b, "lshr", power, cut), (128 - bias + cut) << mantissa)
    code = b.add(b.sub(_int(b, total), power), units)
    return code, power, b.fsub(b.fsub(total, _float(b, power)), _float(b, magnitude))


def _down_code(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e2m1 where a tie, which shows as half a unit too much, goes down, and what becomes 0 has no sign."""
    code, power, raised = _rounded(b, x, "e2m1")
    is_tie = b.fcmp_ordered("==", raised, _float(b, _with(b, "sub", power, 24 << 23)))
    code = b.sub(code, _flag(b, is_tie, 1, x))
    return b.or_(code, _flag(b, b.fcmp_ordered("<", x, _const(x.type, -0.25)), 8, x))


def _code(b: ir.IRBuilder, x: ir.Value, coding: str) -> ir.Value:
    if coding in CODES:
        return _nf4_code(b, x) if coding == "nf4" else _fp4_code(b, x)
    if coding == "e2m1_down":
        return _down_code(b, x)
    if coding == "e2m1":  # there, -0.0 is no negative value
        x = b.fadd(x, _const(x.type, 0.0))
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


@_operation(types.void)
def expand_codes(b: ir.IRBuilder, codes: ir.Value, values: ir.Value, coding: ir.Value) -> None:
    """16 codes of 8 bits at an address to the values they stand for, float32 at another."""
    raw = b.zext(_read(b, codes, ir.VectorType(_I8, LANES)), ir.VectorType(_I32, LANES))
    names = {CODINGS[grid]: grid for grid in ("e4m3", "e5m2")}
    _switch(b, coding, names, lambda number: _write(b, _small_value(b, raw, names[number]), values))


def _small_value(b: ir.IRBuilder, raw: ir.Value, grid: str) -> ir.Value:
    mantissa, bias = _FIELDS[grid]
    code, sign = _with(b, "and_", raw, 0x7F), _with(b, "shl", _with(b, "and_", raw, 0x80), 24)
    normal = _with(b, "add", _with(b, "shl", code, 23 - mantissa), (127 - bias) << 23)
    # A subnormal is put below the leading one of the least normal value, and that one is taken away.
    subnormal = _with(b, "fsub", _float(b, _with(b, "add", normal, 1 << 23)), 2.0 ** (1 - bias))
    out = b.select(_below(b, code, 1 << mantissa), _int(b, subnormal), normal)
    if grid == "e5m2":
        out = b.select(_below(b, code, 0x7C), out, _const(raw.type, 0x7F800000))
    out = b.select(_below(b, code, 0x7D if grid == "e5m2" else 0x7F), out, _const(raw.type, 0x7FC00000))
    return _float(b, b.or_(out, sign))


@_operation(F32X)
def load_floats(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return _read(b, address, ir.VectorType(_F32, LANES))


@_operation(types.float32)
def float_of(b: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    """The float32 of the low 32 bits of a 64-bit integer."""
    return _float(b, b.trunc(raw, _I32))
