"""docs/numerics.md once more, one weight at a time, in exact rational arithmetic: an independent witness.

No NumPy arithmetic is used: every operation is exact over fractions and then rounded by `round_to`, so that an error in
NumPy's casts, reductions or packing shows up as a difference between this file and reference.py.
"""

from __future__ import annotations

import math
from fractions import Fraction

from arrowquant_gpu.schemes import Scheme

# significand bits including the hidden one, smallest exponent of a subnormal's last bit, largest finite value
FORMATS = {
    "float32": (24, -149, Fraction(2**24 - 1) * 2**104),
    "float16": (11, -24, Fraction(65504)),
    "bfloat16": (8, -133, Fraction(255) * 2**120),
}


def rne(x: Fraction) -> int:
    """Nearest integer, ties to even."""
    return round(x)


def round_to(x: Fraction, dtype: str) -> Fraction | None:
    """`x` rounded to nearest even in a binary format; None where it overflows to infinity."""
    precision, last, largest = FORMATS[dtype]
    if x == 0:
        return Fraction(0)
    exponent = math.floor(math.log2(abs(x))) if abs(x) > 2**-900 else -1000
    while Fraction(2) ** exponent > abs(x):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(x):
        exponent += 1
    unit = Fraction(2) ** max(exponent - precision + 1, last)
    y = rne(x / unit) * unit
    return None if abs(y) > largest else y


def f32(x: Fraction) -> Fraction:
    y = round_to(x, "float32")
    if y is None:
        raise OverflowError(x)
    return y


def scale_and_zero(lo: Fraction, hi: Fraction, scheme: Scheme) -> tuple[Fraction | None, int]:
    """(scale as stored or None where it overflows its type, signed zero point) of one group."""
    levels, offset = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    last = Fraction(2) ** FORMATS[scheme.scale_dtype][1]
    epsilon = Fraction(2) ** (1 - FORMATS[scheme.scale_dtype][0])
    if scheme.symmetric:
        exact = f32(max(-lo, hi) / Fraction(levels, 2))
    else:
        span = round_to(hi - lo, "float32")
        exact = f32(f32((hi - lo) / 2) / Fraction(levels, 2)) if span is None else f32(span / levels)
    stored = round_to(exact, scheme.scale_dtype)
    if lo == 0 and hi == 0:
        stored = epsilon
    elif stored == 0:
        stored = last
    if scheme.symmetric or stored is None:
        return stored, 0
    return stored, clamp(rne(f32(-offset - f32(lo / stored))), scheme)


def clamp(q: int, scheme: Scheme) -> int:
    offset = 2 ** (scheme.bits - 1)
    return max(-offset, min(offset - 1, q))


def code(x: Fraction, scale: Fraction, zero: int, scheme: Scheme) -> int:
    """The stored code of one weight. A quotient beyond float32 clamps like any other large one."""
    q = round_to(x / scale, "float32")
    if q is None:
        return 2**scheme.bits - 1 if x > 0 else 0
    return clamp(rne(q if scheme.symmetric else f32(q + zero)), scheme) + 2 ** (scheme.bits - 1)


def decode(stored: int, scale: Fraction, zero: int, scheme: Scheme) -> float:
    """The weight that a code stands for; infinite where it is beyond float32."""
    exact = (stored - 2 ** (scheme.bits - 1) - zero) * scale
    y = round_to(exact, "float32")
    return math.copysign(math.inf, exact) if y is None else float(y)


def pack(codes: list[int], bits: int) -> bytes:
    """One row of codes as a little-endian bit stream."""
    stream = sum(c << (k * bits) for k, c in enumerate(codes))
    return stream.to_bytes(-(-len(codes) * bits // 8), "little")


def quantize_row(row: list[Fraction], scheme: Scheme) -> tuple[bytes, list[Fraction | None], list[int], list[float]]:
    """(packed bytes, scales, signed zero points, decoded weights) of one row, for granularity group or channel."""
    length = scheme.group_size or max(len(row), 1)
    codes, scales, zeros, decoded = [], [], [], []
    for start in range(0, len(row), length):
        group = row[start : start + length]
        lo, hi = min(0, *group, 0), max(0, *group, 0)
        scale, zero = scale_and_zero(Fraction(lo), Fraction(hi), scheme)
        scales.append(scale)
        zeros.append(zero)
        for x in group:
            c = 0 if scale is None else code(x, scale, zero, scheme)
            codes.append(c)
            decoded.append(0.0 if scale is None else decode(c, scale, zero, scheme))
    return pack(codes, scheme.bits), scales, zeros, decoded
