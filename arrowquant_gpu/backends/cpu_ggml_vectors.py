"""What the kernels of ggml's blocks need beside cpu_vectors.py: signs, codes as integers, tables of 16 values.

Two vectors hold the 32 weights of a block. The operations are used as those of cpu_vectors.py are.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ..reference.ggml import E2M1_BORDERS, NL, NL_BORDERS, NL_TRIES
from .cpu_vectors import (
    _F32,
    _I8,
    _I16,
    _I32,
    F32X,
    LANES,
    U32X,
    _const,
    _float,
    _int,
    _operation,
    _read,
    _reduce,
    _same,
    _with,
    _write,
)

_F32X, _I32X, _I8X = (ir.VectorType(element, LANES) for element in (_F32, _I32, _I8))


def _lanes(b: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Two vectors of bits as one word, lane 0 of `low` in its lowest bit."""
    first, second = (b.zext(b.bitcast(v, _I16), _I32) for v in (low, high))
    return b.or_(first, _with(b, "shl", second, 16))


def _magnitude(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _float(b, _with(b, "and_", _int(b, x), 0x7FFFFFFF))


def _all(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    typ = ir.VectorType(value.type, LANES)
    first = b.insert_element(ir.Constant(typ, ir.Undefined), value, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, ir.Constant(typ, ir.Undefined), _const(_I32X, 0))


# ---------------------------------------------------------------------------------------------------------------------
# Largest, lowest, highest.


@_operation(types.uint32)
def sign_of_first(b: ir.IRBuilder, low: ir.Value, high: ir.Value, magnitude: ir.Value) -> ir.Value:
    """The sign bit of the first of 32 weights, given as bits, that has this magnitude."""
    same = [b.icmp_unsigned("==", _with(b, "and_", v, 0x7FFFFFFF), _all(b, magnitude)) for v in (low, high)]
    negative = [_with_signed(b, "<", v, 0) for v in (low, high)]
    among = _lanes(b, *same)
    first = b.and_(among, b.neg(among))
    is_negative = b.icmp_unsigned("!=", b.and_(first, _lanes(b, *negative)), ir.Constant(_I32, 0))
    return b.select(is_negative, ir.Constant(_I32, 0x80000000), ir.Constant(_I32, 0))


def _with_signed(b: ir.IRBuilder, op: str, value: ir.Value, number: int) -> ir.Value:
    return b.icmp_signed(op, value, _const(value.type, number))


@_operation(_same)
def ordered(b: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    """Bits of floats to integers that order like the floats, -0.0 below 0.0; it is its own inverse."""
    return b.xor(raw, _with(b, "lshr", _with(b, "ashr", raw, 31), 1))


@_operation(_same)
def signed_min(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed("<", x, y), x, y)


@_operation(types.uint32)
def smallest_signed(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The smallest lane."""
    return _reduce(b, "smin", x)


@_operation(_same)
def unsigned_min(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_unsigned("<", x, y), x, y)


# ---------------------------------------------------------------------------------------------------------------------
# Codes, in 32-bit lanes.


@_operation(U32X)
def truncated(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Floats of magnitude below 2**31 as integers, toward 0."""
    return b.fptosi(x, _I32X)


@_operation(U32X)
def rounded_away(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Floats to the nearest integers, halves away from 0.

    The largest float below a half is added: with a half itself, its predecessor would become 1.
    """
    sign = _with(b, "and_", _int(b, x), 0x80000000)
    return b.fptosi(b.fadd(x, _float(b, _with(b, "or_", sign, 0x3EFFFFFF))), _I32X)


@_operation(types.void)
def store_bytes(b: ir.IRBuilder, address: ir.Value, codes: ir.Value) -> None:
    _write(b, b.trunc(codes, _I8X), address)


@_operation(types.void)
def store_nibbles(b: ir.IRBuilder, address: ir.Value, low: ir.Value, high: ir.Value) -> None:
    """16 bytes: lane j of `low` in the low half of byte j, the lowest 4 bits of lane j of `high` above it."""
    both = b.or_(_with(b, "and_", low, 15), _with(b, "shl", high, 4))
    _write(b, b.trunc(both, _I8X), address)


@_operation(types.void)
def store_half_nibbles(b: ir.IRBuilder, address: ir.Value, codes: ir.Value) -> None:
    """8 bytes: lane j in the low half of byte j, lane j + 8 above it."""
    index = ir.VectorType(_I32, 8)
    low, high = (b.shuffle_vector(codes, codes, ir.Constant(index, [*range(k, k + 8)])) for k in (0, 8))
    _write(b, b.trunc(b.or_(low, _with(b, "shl", high, 4)), ir.VectorType(_I8, 8)), address)


@_operation(types.uint32)
def fifth_bits(b: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """A word of bit 4 of 32 codes below 32."""
    return _lanes(b, *(b.icmp_unsigned(">", v, _const(v.type, 15)) for v in (low, high)))


@_operation(types.void)
def store_word(b: ir.IRBuilder, address: ir.Value, word: ir.Value) -> None:
    _write(b, word, address)


@_operation(U32X)
def load_nibbles(b: ir.IRBuilder, address: ir.Value, shift: ir.Value) -> ir.Value:
    """The low (shift 0) or high (shift 4) halves of 16 bytes."""
    raw = b.zext(_read(b, address, _I8X), _I32X)
    return _with(b, "and_", b.lshr(raw, _all(b, b.trunc(shift, _I32))), 15)


@_operation(U32X)
def load_half_nibbles(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The low halves of 8 bytes, then their high halves."""
    raw = _read(b, address, ir.VectorType(_I8, 8))
    twice = b.shuffle_vector(raw, raw, ir.Constant(_I32X, [*range(8), *range(8)]))
    shifts = ir.Constant(_I32X, [0] * 8 + [4] * 8)
    return _with(b, "and_", b.lshr(b.zext(twice, _I32X), shifts), 15)


@_operation(U32X)
def load_fifth_bits(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """16 for each bit of 2 bytes that is set."""
    bits = b.bitcast(_read(b, address, _I16), ir.VectorType(ir.IntType(1), LANES))
    return _with(b, "shl", b.zext(bits, _I32X), 4)


@_operation(F32X)
def load_signed(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """16 signed bytes as float32."""
    return b.sitofp(b.sext(_read(b, address, _I8X), _I32X), _F32X)


@_operation(_same)
def joined(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.or_(x, y)


@_operation(F32X)
def as_numbers(b: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    """Codes as float32."""
    return b.sitofp(codes, _F32X)


# ---------------------------------------------------------------------------------------------------------------------
# Tables: e2m1, doubled, and the values of iq4_nl.


def _count(b: ir.IRBuilder, x: ir.Value, op: str, borders: list[ir.Value]) -> ir.Value:
    """How many of the borders are below."""
    n = _const(_I32X, 0)
    for border in borders:
        n = b.add(n, b.zext(b.fcmp_ordered(op, x, border), _I32X))
    return n


@_operation(U32X)
def e2m1_codes(b: ir.IRBuilder, x: ir.Value, step: ir.Value) -> ir.Value:
    """Codes of the values nearest to x / step, halfway the one nearer to 0; all 0 where `step` is infinite."""
    borders = [_all(b, b.fmul(step, ir.Constant(_F32, float(border)))) for border in E2M1_BORDERS]
    codes = _count(b, _magnitude(b, x), ">", borders)
    is_negative = b.and_(_with_signed(b, "<", _int(b, x), 0), _with_signed(b, ">", codes, 0))
    return b.or_(codes, b.select(is_negative, _const(_I32X, 8), _const(_I32X, 0)))


@_operation(F32X)
def e2m1_values(b: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    """The code itself up to 4, then 6, 8, 12; with bit 3 negative, of 0 too."""
    n = _with(b, "and_", codes, 7)
    value = n
    for above, more in ((4, 1), (5, 1), (6, 3)):
        extra = b.select(_with_signed(b, ">", n, above), _const(_I32X, more), _const(_I32X, 0))
        value = b.add(value, extra)
    is_negative = _with_signed(b, ">", codes, 8)
    return b.sitofp(b.select(is_negative, b.neg(value), value), _F32X)


@_operation(U32X)
def nl_codes(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Codes of the nearest values; halfway the higher one."""
    return _count(b, x, ">=", [_const(_F32X, float(border)) for border in NL_BORDERS])


@_operation(F32X)
def nl_nearest(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The nearest values themselves."""
    value = _const(_F32X, float(NL[0]))
    for border, above in zip(NL_BORDERS, NL[1:], strict=True):
        value = b.select(b.fcmp_ordered(">=", x, _const(_F32X, float(border))), _const(_F32X, float(above)), value)
    return value


@_operation(F32X)
def nl_values(b: ir.IRBuilder, codes: ir.Value) -> ir.Value:
    value = _const(_F32X, float(NL[0]))
    for code, other in enumerate(NL[1:], 1):
        value = b.select(_with_signed(b, "==", codes, code), _const(_F32X, float(other)), value)
    return value


@_operation(F32X)
def nl_inverses(b: ir.IRBuilder, largest: ir.Value) -> ir.Value:
    """The 16 inverse scales that are tried: 1 / (largest / 127), then (t - 127) / largest for t from -7 to 7."""
    tries = [1.0, *(float(NL[0]) + t for t in range(-NL_TRIES, NL_TRIES + 1))]
    first = b.fdiv(largest, ir.Constant(_F32, 127.0))
    below = b.insert_element(_all(b, largest), first, ir.Constant(_I32, 0))
    return b.fdiv(ir.Constant(_F32X, tries), below)


@_operation(F32X)
def fitted(b: ir.IRBuilder, products: ir.Value, norm: ir.Value) -> ir.Value:
    """products / norm, and 0 where norm is 0."""
    return b.select(b.fcmp_ordered(">", norm, _const(_F32X, 0.0)), b.fdiv(products, norm), _const(_F32X, 0.0))


@_operation(types.void)
def store_floats(b: ir.IRBuilder, address: ir.Value, values: ir.Value) -> None:
    _write(b, values, address)


@_operation(types.float32)
def load_float(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return _read(b, address, _F32)
