"""Explicit vectors of 16 lanes for Numba functions: the operations that the kernels of cpu_kernels.py are written in.

Why explicit: an auto-vectoriser decides anew for each loop, compiler version and trip count, and gives up on groups of
16. Here the same LLVM IR becomes AVX-512, AVX2, SSE or NEON code, and every float operation is one IEEE operation per
lane: no fast-math flag is set, so the compiler neither contracts, reassociates nor flushes. docs/numerics.md, section
9, lists the shortcuts and why they give the same bits.

A function below marked `_operation` is called from Numba code without its first argument, the IR builder. Addresses
are int64; nothing is checked.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from ..schemes import BITS

LANES = 16
BLOCK = 64  # codes packed at a time: whole vectors, and whole bytes at every width
KINDS = {"float32": 0, "float16": 1, "bfloat16": 2}  # how weights and scales are stored: the `kind` of the kernels
MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, to nearest even, and leaves it in the low bits

_I1, _I8, _I16, _I32, _I64, _F32 = *(ir.IntType(n) for n in (1, 8, 16, 32, 64)), ir.FloatType()
_F16_TO_F32 = 112 << 23  # difference of the exponent biases, in place


class Vector(types.Type):  # type: ignore[misc]
    """The Numba type of a vector of LANES elements."""

    def __init__(self, dtype: types.Type) -> None:
        self.dtype = dtype
        super().__init__(name=f"{dtype}x{LANES}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.dtype).get_value_type(), LANES))


F32X, U32X = Vector(types.float32), Vector(types.uint32)


def _operation(result: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a function that emits IR callable from Numba code. `result` is its type, or a function of the arguments'."""

    def decorate(emit: Callable[..., Any]) -> Any:
        def code(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
            value = emit(b, *args)
            return context.get_dummy_value() if value is None else value

        def resolve(context: Any, *args: types.Type) -> Any:
            return (result if isinstance(result, types.Type) else result(*args))(*args), code

        resolve.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
        resolve.__name__, resolve.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(resolve)

    return decorate


# ---------------------------------------------------------------------------------------------------------------------
# IR for scalars and vectors alike.


def _like(value: ir.Value, element: ir.Type) -> ir.Type:
    """The type of `value` with other elements."""
    return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element


def _const(typ: ir.Type, number: float) -> ir.Constant:
    return ir.Constant(typ, [number] * typ.count if isinstance(typ, ir.VectorType) else number)


def _with(b: ir.IRBuilder, op: str, value: ir.Value, number: float) -> ir.Value:
    """`value op number`, for example _with(b, "lshr", raw, 16)."""
    return getattr(b, op)(value, _const(value.type, number))


def _below(b: ir.IRBuilder, raw: ir.Value, bound: int) -> ir.Value:
    return b.icmp_unsigned("<", raw, _const(raw.type, bound))


def _float(b: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    return b.bitcast(raw, _like(raw, _F32))


def _int(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return b.bitcast(value, _like(value, _I32))


def _read(b: ir.IRBuilder, address: ir.Value, typ: ir.Type) -> ir.Value:
    return b.load(b.inttoptr(address, typ.as_pointer()), align=1)


def _write(b: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer()), align=1)


def _switch(b: ir.IRBuilder, selector: ir.Value, cases: Any, emit: Callable[[int], ir.Value | None]) -> Any:
    """Emit every case and join their values; the optimiser hoists the branch out of loops, or finds it constant."""
    done, otherwise = b.append_basic_block("done"), b.append_basic_block("otherwise")
    switch = b.switch(selector, otherwise)
    incoming = []
    for case in cases:
        block = b.append_basic_block(f"case{case}")
        switch.add_case(ir.Constant(selector.type, case), block)
        b.position_at_end(block)
        incoming.append((emit(case), b.block))
        b.branch(done)
    b.position_at_end(otherwise)
    b.unreachable()
    b.position_at_end(done)
    if incoming[0][0] is None:
        return None
    phi = b.phi(incoming[0][0].type)
    for value, block in incoming:
        phi.add_incoming(value, block)
    return phi


# ---------------------------------------------------------------------------------------------------------------------
# Number formats. float16 is converted by integers, which every instruction set has and no rounding mode touches.


def _element(kind: int) -> ir.Type:
    return _I32 if kind == KINDS["float32"] else _I16


def _widen(b: ir.IRBuilder, raw: ir.Value, kind: int) -> ir.Value:
    """Stored bits to float32, exactly."""
    raw = raw if raw.type == _like(raw, _I32) else b.zext(raw, _like(raw, _I32))
    if kind == KINDS["float16"]:
        return _widen_half(b, raw)
    return _float(b, raw if kind == KINDS["float32"] else _with(b, "shl", raw, 16))


def _narrow(b: ir.IRBuilder, value: ir.Value, kind: int) -> ir.Value:
    """float32 to stored bits in 32-bit lanes, to nearest even."""
    if kind == KINDS["float32"]:
        return _int(b, value)
    return _narrow_half(b, value) if kind == KINDS["float16"] else _narrow_bfloat(b, value)


def _widen_half(b: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    magnitude, sign = _with(b, "and_", raw, 0x7FFF), _with(b, "shl", _with(b, "and_", raw, 0x8000), 16)
    normal = _with(b, "add", _with(b, "shl", magnitude, 13), _F16_TO_F32)
    special = _with(b, "add", normal, _F16_TO_F32)
    # A subnormal m is m * 2**-24: put m below the leading one of 2**-14, and take that one away.
    subnormal = _with(b, "fsub", _float(b, _with(b, "add", normal, 1 << 23)), 2.0**-14)
    out = b.select(_below(b, magnitude, 0x7C00), normal, special)
    out = b.select(_below(b, magnitude, 0x400), _int(b, subnormal), out)
    return _float(b, b.or_(out, sign))


def _narrow_half(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    raw = _int(b, value)
    magnitude, sign = _with(b, "and_", raw, 0x7FFFFFFF), _with(b, "and_", _with(b, "lshr", raw, 16), 0x8000)
    top = _with(b, "lshr", magnitude, 13)
    to_even = b.add(_with(b, "add", magnitude, 0xFFF), _with(b, "and_", top, 1))
    normal = _with(b, "lshr", _with(b, "sub", to_even, _F16_TO_F32), 13)
    # Below 2**-14 the spacing is 2**-24, which is that of float32 from 0.5 to 1: adding 0.5 rounds there.
    subnormal = _with(b, "sub", _int(b, _with(b, "fadd", _float(b, magnitude), 0.5)), 0x3F000000)
    nan = _with(b, "or_", _with(b, "and_", top, 0x3FF), 0x7E00)
    out = b.select(_below(b, magnitude, 0x38800000), subnormal, normal)
    out = b.select(_below(b, magnitude, 0x47800000), out, _const(raw.type, 0x7C00))
    return b.or_(b.select(_below(b, magnitude, 0x7F800001), out, nan), sign)


def _narrow_bfloat(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    raw = _int(b, value)
    top = _with(b, "lshr", raw, 16)
    to_even = b.add(_with(b, "add", raw, 0x7FFF), _with(b, "and_", top, 1))
    nan = _with(b, "or_", _with(b, "and_", top, 0x8000), 0x7FC0)
    return b.select(b.fcmp_unordered("uno", value, value), nan, _with(b, "lshr", to_even, 16))


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic.


def _same(*args: types.Type) -> types.Type:
    return args[0]


@_operation(_same)
def add(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.fadd(x, y)


@_operation(_same)
def sub(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.fsub(x, y)


@_operation(_same)
def mul(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.fmul(x, y)


@_operation(_same)
def div(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.fdiv(x, y)


@_operation(_same)
def clamp(b: ir.IRBuilder, x: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """min(max(x, low), high); NaN becomes low."""
    x = b.select(b.fcmp_ordered(">", x, low), x, low)
    return b.select(b.fcmp_ordered("<", x, high), x, high)


@_operation(_same)
def smaller(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The smaller of two numbers; y where x is NaN or they are equal."""
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@_operation(_same)
def larger(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of two numbers; y where x is NaN or they are equal."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@_operation(_same)
def unsigned_max(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_unsigned(">", x, y), x, y)


@_operation(_same)
def signed_max(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed(">", x, y), x, y)


@_operation(types.uint32)
def largest_unsigned(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The largest lane."""
    return _reduce(b, "umax", x)


@_operation(types.uint32)
def largest_signed(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _reduce(b, "smax", x)


@_operation(types.float32)
def lowest(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The lowest lane of numbers; which zero where both are lowest is not defined."""
    return _float(b, _ordered(b, _reduce(b, "smin", _ordered(b, _int(b, x)))))


@_operation(types.float32)
def highest(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The highest lane of numbers; which zero where both are highest is not defined."""
    return _float(b, _ordered(b, _reduce(b, "smax", _ordered(b, _int(b, x)))))


def _ordered(b: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    """Bits of floats to integers in the same order, and back."""
    return b.xor(raw, _with(b, "lshr", _with(b, "ashr", raw, 31), 1))


def _reduce(b: ir.IRBuilder, name: str, x: ir.Value) -> ir.Value:
    typ = ir.FunctionType(_I32, [x.type])
    return b.call(cgutils.get_or_insert_function(b.module, typ, f"llvm.vector.reduce.{name}.v{LANES}i32"), [x])


@_operation(Vector)
def splat(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """A scalar in every lane."""
    typ = ir.VectorType(x.type, LANES)
    undefined = ir.Constant(typ, ir.Undefined)
    first = b.insert_element(undefined, x, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, undefined, _const(ir.VectorType(_I32, LANES), 0))


@_operation(lambda x: U32X if isinstance(x, Vector) else types.uint32)
def as_bits(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _int(b, x)


@_operation(types.float32)
def as_float(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _float(b, x)


@_operation(_same)
def without_sign(b: ir.IRBuilder, raw: ir.Value) -> ir.Value:
    """The bits of |x| from those of x."""
    return _with(b, "and_", raw, 0x7FFFFFFF)


# ---------------------------------------------------------------------------------------------------------------------
# Memory.


@_operation(F32X)
def load(b: ir.IRBuilder, address: ir.Value, kind: ir.Value) -> ir.Value:
    """16 weights as float32."""
    return _switch(
        b, kind, KINDS.values(), lambda k: _widen(b, _read(b, address, ir.VectorType(_element(k), LANES)), k)
    )


@_operation(types.void)
def store(b: ir.IRBuilder, address: ir.Value, values: ir.Value, kind: ir.Value) -> None:
    """Round 16 float32 to `kind` and write them."""
    _switch(b, kind, KINDS.values(), lambda k: _store(b, address, _narrow(b, values, k), k))


@_operation(types.float32)
def load_scale(b: ir.IRBuilder, address: ir.Value, kind: ir.Value) -> ir.Value:
    return _switch(b, kind, KINDS.values(), lambda k: _widen(b, _read(b, address, _element(k)), k))


@_operation(types.void)
def store_scale(b: ir.IRBuilder, address: ir.Value, raw: ir.Value, kind: ir.Value) -> None:
    """Write one scale, given as the bits that `narrow` makes."""
    _switch(b, kind, KINDS.values(), lambda k: _store(b, address, raw, k))


def _store(b: ir.IRBuilder, address: ir.Value, raw: ir.Value, kind: int) -> None:
    _write(b, raw if kind == KINDS["float32"] else b.trunc(raw, _like(raw, _I16)), address)


@_operation(types.uint32)
def narrow(b: ir.IRBuilder, value: ir.Value, kind: ir.Value) -> ir.Value:
    """The bits of a float32 rounded to `kind`."""
    return _switch(b, kind, KINDS.values(), lambda k: _narrow(b, value, k))


@_operation(types.uint32)
def load_element(b: ir.IRBuilder, address: ir.Value, kind: ir.Value) -> ir.Value:
    """The stored bits of one weight."""
    return _switch(
        b,
        kind,
        KINDS.values(),
        lambda k: _read(b, address, _I32) if _element(k) == _I32 else b.zext(_read(b, address, _I16), _I32),
    )


@_operation(types.uint8)
def load_byte(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return _read(b, address, _I8)


@_operation(types.void)
def store_low_byte(b: ir.IRBuilder, address: ir.Value, raw: ir.Value) -> None:
    _write(b, b.trunc(raw, _I8), address)


@_operation(F32X)
def load_codes(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """16 codes, a byte each, as float32."""
    codes = b.zext(_read(b, address, ir.VectorType(_I8, LANES)), ir.VectorType(_I32, LANES))
    return b.sitofp(codes, ir.VectorType(_F32, LANES))


@_operation(types.void)
def store_codes(b: ir.IRBuilder, address: ir.Value, rounded: ir.Value) -> None:
    """The low bytes of 16 float32, which are the codes once MAGIC has been added."""
    _write(b, b.trunc(_int(b, rounded), ir.VectorType(_I8, LANES)), address)


@_operation(types.void)
def clear(b: ir.IRBuilder, address: ir.Value) -> None:
    """Write BLOCK zero bytes."""
    _write(b, _const(ir.VectorType(_I8, BLOCK), 0), address)


def _move(n_bytes: int) -> Any:
    @_operation(types.void)
    def move(b: ir.IRBuilder, source: ir.Value, target: ir.Value) -> None:
        _write(b, _read(b, source, ir.IntType(8 * n_bytes)), target)

    return move


move1, move2, move4, move8 = (_move(n) for n in (1, 2, 4, 8))


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def scratch(context: Any, n_bytes: Any) -> Any:
    """The address of so many bytes (a literal) on the stack."""

    def code(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        with b.goto_entry_block():  # not Numba's alloca_once: LLVM takes apart its store of zeros, byte by byte
            return b.ptrtoint(b.alloca(ir.ArrayType(_I8, n_bytes.literal_value)), _I64)

    return types.int64(n_bytes), code


# ---------------------------------------------------------------------------------------------------------------------
# Packing: BLOCK codes, a byte each, are 8 words of 8. Pairs of neighbours are merged three times, so that a word holds
# 8 * bits bits at its low end; then those bytes are picked. Pictures of the result: schemes.py.


@_operation(types.void)
def pack_block(b: ir.IRBuilder, codes: ir.Value, packed: ir.Value, bits: ir.Value) -> None:
    """BLOCK codes to 8 * bits bytes."""
    words = _read(b, codes, ir.VectorType(_I64, 8))

    def pack(bits: int) -> None:
        picked = [8 * word + byte for word in range(8) for byte in range(bits)]
        merged = b.bitcast(_merge(b, words, bits), ir.VectorType(_I8, BLOCK))
        _write(b, _pick(b, merged, picked), packed)

    _switch(b, bits, BITS, pack)


@_operation(types.void)
def unpack_block(b: ir.IRBuilder, packed: ir.Value, codes: ir.Value, bits: ir.Value) -> None:
    """The inverse of `pack_block`; it reads no byte more."""

    def unpack(bits: int) -> None:
        zero = 8 * bits
        picked = [bits * word + byte if byte < bits else zero for word in range(8) for byte in range(8)]
        streams = _pick(b, _read(b, packed, ir.VectorType(_I8, 8 * bits)), picked)
        _write(b, _split(b, b.bitcast(streams, ir.VectorType(_I64, 8)), bits), codes)

    _switch(b, bits, BITS, unpack)


def _pick(b: ir.IRBuilder, value: ir.Value, order: list[int]) -> ir.Value:
    """Bytes of `value` by index; the index past its end is a zero byte."""
    return b.shuffle_vector(value, _const(value.type, 0), ir.Constant(ir.VectorType(_I32, len(order)), order))


def _every(lane: int, width: int, shift: int = 0) -> int:
    """A 64-bit mask: `width` bits, `shift` up, of every `lane` bits."""
    return sum(((1 << width) - 1) << (at + shift) for at in range(0, 64, lane))


def _merge(b: ir.IRBuilder, words: ir.Value, bits: int) -> ir.Value:
    for lane, width in ((8, bits), (16, 2 * bits), (32, 4 * bits)):
        low = _with(b, "and_", words, _every(2 * lane, width))
        high = _with(b, "and_", _with(b, "lshr", words, lane - width), _every(2 * lane, width, width))
        words = b.or_(low, high)
    return words


def _split(b: ir.IRBuilder, words: ir.Value, bits: int) -> ir.Value:
    for lane, width in ((32, 4 * bits), (16, 2 * bits), (8, bits)):
        low = _with(b, "and_", words, _every(2 * lane, width))
        high = _with(b, "and_", _with(b, "shl", words, lane - width), _every(2 * lane, width, lane))
        words = b.or_(low, high)
    return words


# ---------------------------------------------------------------------------------------------------------------------
# The floating-point mode. A library in the process may have set flush-to-zero for its thread, which would change bytes.


@_operation(types.int32)
def ieee_mode(b: ir.IRBuilder) -> ir.Value:
    """Round to nearest even with subnormals, on x86 (elsewhere the mode is left as it is); returns what was set."""
    saved = cgutils.alloca_once(b, _I32)
    if "x86_64" in b.module.triple:
        _mxcsr(b, "stmxcsr", saved)
        _mxcsr(b, "ldmxcsr", cgutils.alloca_once_value(b, ir.Constant(_I32, 0x1F80)))
    else:
        b.store(ir.Constant(_I32, 0), saved)
    return b.load(saved)


@_operation(types.void)
def restore_mode(b: ir.IRBuilder, saved: ir.Value) -> None:
    if "x86_64" in b.module.triple:
        _mxcsr(b, "ldmxcsr", cgutils.alloca_once_value(b, saved))


def _mxcsr(b: ir.IRBuilder, name: str, slot: ir.Value) -> None:
    pointer = b.bitcast(slot, _I8.as_pointer())
    function = ir.FunctionType(ir.VoidType(), [_I8.as_pointer()])
    b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.x86.sse.{name}"), [pointer])
