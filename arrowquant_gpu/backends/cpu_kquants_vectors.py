"""Vectors for the K-quants: WIDE lanes, each one sub-block, and the planes of fields that codes lie in.

A search is serial within its sub-block, so sub-blocks lie side by side: `transpose` brings the weights of the same
number together. WIDE is more than a register holds, which gives the processor independent work while a sum waits for
its last addition. How operations are made, and what they promise: cpu_vectors.py.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from .cpu_vectors import LANES, _const, _operation, _read, _same, _with, _write

WIDE = 32

_I1, _I8, _I32, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.FloatType()


class Wide(types.Type):  # type: ignore[misc]
    """The Numba type of a vector of WIDE float32, or of WIDE truth values."""

    def __init__(self, dtype: types.Type, element: ir.Type) -> None:
        self.element = element
        super().__init__(name=f"{dtype}x{WIDE}")


@register_model(Wide)
class _WideModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Wide) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(fe_type.element, WIDE))


F32W, MASKW = Wide(types.float32, _F32), Wide(types.boolean, _I1)


@_operation(F32W)
def load_wide(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return _read(b, address, ir.VectorType(_F32, WIDE))


@_operation(types.void)
def store_wide(b: ir.IRBuilder, address: ir.Value, values: ir.Value) -> None:
    _write(b, values, address)


@_operation(F32W)
def every(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """A scalar in every lane."""
    typ = ir.VectorType(_F32, WIDE)
    undefined = ir.Constant(typ, ir.Undefined)
    first = b.insert_element(undefined, x, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, undefined, _const(ir.VectorType(_I32, WIDE), 0))


@_operation(MASKW)
def below(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """x < y, false for NaN."""
    return b.fcmp_ordered("<", x, y)


@_operation(MASKW)
def same(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """x == y, false for NaN."""
    return b.fcmp_ordered("==", x, y)


@_operation(MASKW)
def differ(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """x != y, for numbers."""
    return b.fcmp_ordered("!=", x, y)


@_operation(_same)
def both(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.and_(x, y)


@_operation(_same)
def either(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.or_(x, y)


@_operation(lambda mask, x, y: x)
def choose(b: ir.IRBuilder, mask: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """x where the mask is true, else y."""
    return b.select(mask, x, y)


@_operation(types.boolean)
def somewhere(b: ir.IRBuilder, mask: ir.Value) -> ir.Value:
    """Whether it is true in any lane."""
    raw = b.bitcast(mask, ir.IntType(WIDE))
    return b.icmp_unsigned("!=", raw, ir.Constant(raw.type, 0))


@_operation(_same)
def magnitude(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    raw = b.bitcast(x, ir.VectorType(_I32, x.type.count))
    return b.bitcast(_with(b, "and_", raw, 0x7FFFFFFF), x.type)


@_operation(_same)
def negated(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    raw = b.bitcast(x, ir.VectorType(_I32, x.type.count))
    return b.bitcast(_with(b, "xor", raw, 0x80000000), x.type)


def _unary(b: ir.IRBuilder, name: str, x: ir.Value) -> ir.Value:
    suffix = f"v{x.type.count}f32" if isinstance(x.type, ir.VectorType) else "f32"
    function = ir.FunctionType(x.type, [x.type])
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.{name}.{suffix}"), [x])


@_operation(_same)
def whole(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The nearest whole number, ties to even."""
    return _unary(b, "rint", x)


@_operation(_same)
def root(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _unary(b, "sqrt", x)


@_operation(types.void)
def transpose(
    b: ir.IRBuilder, source: ir.Value, row_bytes: ir.Value, target: ir.Value, target_row_bytes: ir.Value
) -> None:
    """A square of LANES x LANES float32: lane i of row j becomes lane j of row i."""
    typ = ir.VectorType(_F32, LANES)
    rows = [_read(b, b.add(source, b.mul(row_bytes, ir.Constant(row_bytes.type, i))), typ) for i in range(LANES)]
    for step in (1, 2, 4, 8):  # squares of twice as many lanes each time: two corners change places
        low = [j if j & step == 0 else LANES + j - step for j in range(LANES)]
        high = [j + step if j & step == 0 else LANES + j for j in range(LANES)]
        for i in range(LANES):
            if i & step == 0:
                x, y = rows[i], rows[i + step]
                for at, order in ((i, low), (i + step, high)):
                    rows[at] = b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, LANES), order))
    for i, row in enumerate(rows):
        _write(b, row, b.add(target, b.mul(target_row_bytes, ir.Constant(target_row_bytes.type, i))))


# ---------------------------------------------------------------------------------------------------------------------
# Planes: a run of bytes has fields of `bits`; the lowest are of the first `run` codes, the next of the next `run`.


def _join(run: int, bits: int, shift: int) -> Any:
    @_operation(types.void)
    def join(b: ir.IRBuilder, codes: ir.Value, out: ir.Value) -> None:
        """8 / bits runs of codes, a byte each, to one run of bytes: the `bits` above `shift` of each code."""
        typ = ir.VectorType(_I8, run)
        joined = _const(typ, 0)
        for field in range(8 // bits):
            code = _read(b, b.add(codes, ir.Constant(codes.type, field * run)), typ)
            code = _with(b, "and_", _with(b, "lshr", code, shift), (1 << bits) - 1)
            joined = b.or_(joined, _with(b, "shl", code, field * bits))
        _write(b, joined, out)

    return join


def _split(run: int, bits: int, shift: int) -> Any:
    @_operation(types.void)
    def split(b: ir.IRBuilder, planes: ir.Value, codes: ir.Value) -> None:
        """The inverse of `join`; with a shift, the fields are added to codes that are there."""
        typ = ir.VectorType(_I8, run)
        joined = _read(b, planes, typ)
        for field in range(8 // bits):
            at = b.add(codes, ir.Constant(codes.type, field * run))
            code = _with(b, "and_", _with(b, "lshr", joined, field * bits), (1 << bits) - 1)
            if shift:
                code = b.or_(_with(b, "shl", code, shift), _read(b, at, typ))
            _write(b, code, at)

    return split


# By run, bits and shift.
join_32_1_2, join_32_1_4, join_32_2_0, join_32_2_4 = (_join(32, *a) for a in ((1, 2), (1, 4), (2, 0), (2, 4)))
split_32_1_2, split_32_1_4, split_32_2_0, split_32_2_4 = (_split(32, *a) for a in ((1, 2), (1, 4), (2, 0), (2, 4)))
join_32_4_0, join_64_4_0 = _join(32, 4, 0), _join(64, 4, 0)
split_32_4_0, split_64_4_0 = _split(32, 4, 0), _split(64, 4, 0)
