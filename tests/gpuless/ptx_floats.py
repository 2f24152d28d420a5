"""Float arithmetic and conversions as PTX defines them, on NumPy arrays: canonical NaN, signed zeros, one rounding."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from .ptx_parse import width

Array = np.ndarray
F32 = np.float32
FLOATS = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
CANONICAL = {4: 0x7FFFFFFF, 2: 0x7FFF}  # by itemsize: the NaN that every arithmetic instruction returns
SMALLEST_NORMAL = F32(2.0**-126)


def bits_of(x: Array) -> Array:
    """The unsigned integers with the bits of `x`."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def canonical(x: Array) -> Array:
    """`x` with every NaN replaced by the canonical one."""
    nan = np.isnan(x)
    if nan.any():
        x = x.copy(order="C")
        bits_of(x)[nan] = CANONICAL[x.dtype.itemsize]
    return x


def flush(x: Array) -> Array:
    """The .ftz modifier: subnormals become zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(F32(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c with one rounding.

    The product of two float32 is exact in float64. The sum is rounded to odd there, which keeps what a second rounding
    to nearest float32 needs to know: float64 has more than twice the digits.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = np.asarray(product + addend)
    part = total - product
    error = (product - (total - part)) + (addend - part)  # exact: Knuth's two-sum
    inexact_even = (error != 0) & np.isfinite(total) & (bits_of(total) & np.uint64(1) == 0)
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact_even, np.nextafter(total, toward), total).astype(F32)


def minimum(a: Array, b: Array) -> Array:
    """min: a NaN operand is ignored, and -0 is less than +0."""
    a, b = np.broadcast_arrays(a, b)
    smaller = np.where(a < b, a, b)
    same = (bits_of(a) | bits_of(b)).view(a.dtype)
    return _ignoring_nan(np.where(a == b, same, smaller), a, b)


def maximum(a: Array, b: Array) -> Array:
    """max: a NaN operand is ignored, and +0 is greater than -0."""
    a, b = np.broadcast_arrays(a, b)
    larger = np.where(a > b, a, b)
    same = (bits_of(a) & bits_of(b)).view(a.dtype)
    return _ignoring_nan(np.where(a == b, same, larger), a, b)


def _ignoring_nan(result: Array, a: Array, b: Array) -> Array:
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, result))


def _or_nan(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """The .NaN modifier: NaN if either operand is."""

    def with_nan(a: Array, b: Array) -> Array:
        return np.where(np.isnan(a) | np.isnan(b), np.array(np.nan, a.dtype), function(a, b))

    return with_nan


def _absolute(a: Array) -> Array:
    return (bits_of(a) & np.array(-1, f"i{a.dtype.itemsize}").view(f"u{a.dtype.itemsize}") >> 1).view(a.dtype)


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "rcp": lambda a: F32(1) / a,
    "sqrt": np.sqrt,
    "fma": fma,
    "min": minimum,
    "max": maximum,
    "abs": _absolute,
    "neg": lambda a: -a,
}
# The instructions that exist for 16-bit floats and are exact there.
EXACT = ("min", "max", "abs", "neg")


def operation(name: str, ptx_type: str, modifiers: frozenset[str]) -> Callable[..., Array] | None:
    """The function of a float instruction on arrays of its type, or None where it is not modelled."""
    scalar = ptx_type.removesuffix("x2")
    if scalar not in FLOATS or name not in ARITHMETIC or (scalar != "f32" and name not in EXACT):
        return None
    if modifiers - {"rn", "ftz", "NaN"} or ("NaN" in modifiers and name not in ("min", "max")):
        return None
    if name in ("div", "rcp", "sqrt", "fma") and "rn" not in modifiers:
        return None
    function = ARITHMETIC[name]
    if "NaN" in modifiers:
        function = _or_nan(function)
    if name not in ("abs", "neg"):
        function = _canonical(function)
    if "ftz" in modifiers:
        function = _flushing(function)
    return _halves(function, FLOATS[scalar]) if ptx_type.endswith("x2") else function


def _canonical(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands: canonical(function(*operands))


def _flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *operands: flush(function(*map(flush, operands)))


def _halves(function: Callable[..., Array], dtype: np.dtype) -> Callable[..., Array]:
    """A function of 16-bit floats on both halves of 32-bit words."""

    def on_halves(*words: Array) -> Array:
        parts = [np.ascontiguousarray(w).view(dtype).reshape(*w.shape, 2) for w in words]
        result = np.ascontiguousarray(function(*parts))
        return result.view(np.uint32).reshape(result.shape[:-1])

    return on_halves


ROUND_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: Array, dtype: np.dtype, rounding: str) -> Array:
    """cvt from float to integer: NaN gives 0, and what is out of range saturates."""
    value = ROUND_TO_INTEGER[rounding](x).astype(np.float64)
    info = np.iinfo(dtype)
    too_large, too_small = value >= float(info.max), value <= float(info.min)
    inside = np.where(np.isnan(value) | too_large | too_small, 0, value).astype(dtype)
    return np.where(too_large, dtype.type(info.max), np.where(too_small, dtype.type(info.min), inside))


def conversion(to: str, source: str, modifiers: frozenset[str]) -> Callable[..., Array] | None:
    """The function of a cvt instruction, or None where it is not modelled."""
    saturate, ftz = "sat" in modifiers, "ftz" in modifiers
    rounding = modifiers - {"sat", "ftz"}
    integers = "usb"
    if to in ("f16x2", "bf16x2") and source == "f32" and rounding == {"rn"} and not saturate:
        half = FLOATS[to.removesuffix("x2")]
        return lambda high, low: _join(canonical(high.astype(half)), canonical(low.astype(half)))
    if to in FLOATS and source in FLOATS:
        return _float_to_float(to, source, rounding, saturate, ftz)
    if to in FLOATS and source[0] in integers:
        exact = to == "f32" and not saturate and rounding == {"rn"}
        return (lambda a: a.astype(F32)) if exact else None
    if source in FLOATS and to[0] in integers and len(rounding) == 1 and rounding <= ROUND_TO_INTEGER.keys():
        dtype = np.dtype(f"{'i' if to[0] == 's' else 'u'}{width(to) // 8}")
        (mode,) = rounding
        return lambda a: to_integer(flush(a) if ftz else a, dtype, mode)
    if source[0] in integers and to[0] in integers and not rounding and not saturate:
        dtype = np.dtype(f"{'i' if to[0] == 's' else 'u'}{width(to) // 8}")
        return lambda a: a.astype(dtype)
    return None


def _float_to_float(
    to: str, source: str, rounding: frozenset[str], saturate: bool, ftz: bool
) -> Callable[..., Array] | None:
    widening = to == "f32" and source != "f32"
    integral = next((ROUND_TO_INTEGER[r] for r in rounding if r in ROUND_TO_INTEGER), None)
    if to == source == "f32" and (len(rounding) <= 1 and (integral or not rounding)):

        def same(a: Array) -> Array:
            a = flush(a) if ftz else a
            a = integral(a) if integral else a
            a = np.clip(np.where(np.isnan(a), F32(0), a), F32(0), F32(1)) if saturate else a
            return canonical(a)

        return same
    one_rounding = not rounding if widening else source == "f32" and rounding == {"rn"}
    if saturate or not one_rounding:
        return None
    return lambda a: canonical((flush(a) if ftz and source == "f32" else a).astype(FLOATS[to]))


def _join(high: Array, low: Array) -> Array:
    return bits_of(high).astype(np.uint32) << np.uint32(16) | bits_of(low)
