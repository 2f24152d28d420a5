"""Integer and bit instructions as PTX defines them, on NumPy arrays that wrap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import KernelFault
from .ptx_parse import width

Array = np.ndarray
U32, U64 = np.uint32, np.uint64


def integer_dtype(ptx_type: str) -> np.dtype:
    """The NumPy type of an integer or bit type: .b is unsigned."""
    return np.dtype(f"{'i' if ptx_type[0] == 's' else 'u'}{width(ptx_type) // 8}")


def _quotient(a: Array, b: Array) -> Array:
    """Division toward zero. PTX leaves division by zero open, so it is a fault."""
    if (b == 0).any():
        raise KernelFault("integer division by zero")
    if a.dtype.kind == "u":
        return a // b
    n_bits = a.dtype.itemsize * 8
    unsigned = f"u{a.dtype.itemsize}"
    magnitude = np.abs(a).view(unsigned) // np.abs(b).view(unsigned)
    negative = (a >> (n_bits - 1)) ^ (b >> (n_bits - 1))  # -1 or 0
    return (magnitude.view(a.dtype) ^ negative) - negative


def _remainder(a: Array, b: Array) -> Array:
    return a - _quotient(a, b) * b


def _high_half(a: Array, b: Array) -> Array:
    """The upper half of the double-width product."""
    n_bits = a.dtype.itemsize * 8
    if n_bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return (a.astype(wide) * b.astype(wide) >> n_bits).astype(a.dtype)
    x, y = np.broadcast_arrays(a.view(U64), b.view(U64))
    mask = U64(0xFFFFFFFF)
    x0, x1, y0, y1 = x & mask, x >> U64(32), y & mask, y >> U64(32)
    middle = x1 * y0 + (x0 * y0 >> U64(32))
    carry = x0 * y1 + (middle & mask)
    high = x1 * y1 + (middle >> U64(32)) + (carry >> U64(32))
    if a.dtype.kind == "i":
        high = high - np.where(x >> U64(63), y, U64(0)) - np.where(y >> U64(63), x, U64(0))
    return high.view(a.dtype)


def shift(left: bool, a: Array, n: Array) -> Array:
    """shl and shr: a count of the width or more gives 0, or the sign for an arithmetic shift."""
    n_bits = a.dtype.itemsize * 8
    count = np.minimum(n, U32(n_bits - 1)).astype(a.dtype)
    beyond = (a >> (n_bits - 1)) if not left and a.dtype.kind == "i" else np.zeros_like(a)
    return np.where(n >= n_bits, beyond, a << count if left else a >> count)


def at_least_zero(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """The .relu modifier of min and max."""
    return lambda a, b: np.maximum(function(a, b), a.dtype.type(0))


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: (~a) + a.dtype.type(1),
    "abs": np.abs,
    "div": _quotient,
    "rem": _remainder,
}
LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "mov": lambda a: a,
}
COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def product(modifiers: frozenset[str]) -> Callable[[Array, Array], Array] | None:
    """The function of mul.lo, mul.hi or mul.wide."""
    if modifiers == {"wide"}:
        return lambda a, b: a.astype(_doubled(a.dtype)) * b.astype(_doubled(b.dtype))
    return {frozenset({"lo"}): lambda a, b: a * b, frozenset({"hi"}): _high_half}.get(modifiers)


def _doubled(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")


def permute(a: Array, b: Array, selectors: Array) -> Array:
    """prmt.b32: four bytes picked from eight; bit 3 of a selector replicates the sign of the byte."""
    source = a.astype(U64) | b.astype(U64) << U64(32)
    result = np.zeros(np.broadcast_shapes(source.shape, selectors.shape), U32)
    for i in range(4):
        selector = selectors >> U32(4 * i) & U32(15)
        byte = (source >> ((selector & U32(7)) * U32(8)).astype(U64)).astype(U32) & U32(0xFF)
        sign = (byte >> U32(7)) * U32(0xFF)
        result |= np.where(selector & U32(8), sign, byte) << U32(8 * i)
    return result


def extract_field(a: Array, start: Array, length: Array) -> Array:
    """bfe of an unsigned value: `length` bits from bit `start`, zero beyond the register."""
    return shift(False, a, start & U32(0xFF)) & _ones(length, a.dtype)


def insert_field(a: Array, b: Array, start: Array, length: Array) -> Array:
    """bfi: the low `length` bits of a into b at bit `start`."""
    start = start & U32(0xFF)
    mask = shift(True, _ones(length, a.dtype), start)
    return b & ~mask | shift(True, a, start) & mask


def _ones(length: Array, dtype: np.dtype) -> Array:
    """The lowest `length` bits of a register set."""
    return ~shift(True, ~np.zeros(length.shape, dtype), length & U32(0xFF))


def logic3(table: int, a: Array, b: Array, c: Array) -> Array:
    """lop3.b32: any function of three bits, given by its table of eight."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), U32)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def funnel_shift(left: bool, wrap: bool, low: Array, high: Array, n: Array) -> Array:
    """shf: a 64-bit value shifted, and its upper (left) or lower (right) half."""
    count = (n & U32(31) if wrap else np.minimum(n, U32(32))).astype(U64)
    value = high.astype(U64) << U64(32) | low.astype(U64)
    return (value << count >> U64(32)).astype(U32) if left else (value >> count).astype(U32)


def count_leading_zeros(a: Array) -> Array:
    """clz: the width for 0."""
    n_bits = a.dtype.itemsize * 8
    count, rest = np.full(a.shape, n_bits, U32), a.copy()
    while rest.any():
        count -= (rest != 0).astype(U32)
        rest >>= a.dtype.type(1)
    return count


def reverse_bits(a: Array) -> Array:
    """brev."""
    n_bits = a.dtype.itemsize * 8
    one = a.dtype.type(1)
    result = np.zeros_like(a)
    for i in range(n_bits):
        result |= (a >> a.dtype.type(i) & one) << a.dtype.type(n_bits - 1 - i)
    return result


def find_bit(shift_amount: bool, a: Array) -> Array:
    """bfind of an unsigned value: position of the highest 1, or how far it is from the top; -1 for 0."""
    n_bits = a.dtype.itemsize * 8
    zeros = count_leading_zeros(a)
    return np.where(a == 0, U32(0xFFFFFFFF), zeros if shift_amount else U32(n_bits - 1) - zeros)


def population(a: Array) -> Array:
    """popc."""
    return np.bitwise_count(a).astype(U32)


def halves(function: Callable[[Array, Array], Array], signed: bool) -> Callable[[Array, Array], Array]:
    """min or max of the two 16-bit halves of 32-bit words."""
    dtype = np.dtype(np.int16 if signed else np.uint16)

    def on_halves(a: Array, b: Array) -> Array:
        parts = [np.ascontiguousarray(w).view(dtype).reshape(*w.shape, 2) for w in (a, b)]
        result = np.ascontiguousarray(function(*parts))
        return result.view(U32).reshape(result.shape[:-1])

    return on_halves
