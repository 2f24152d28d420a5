"""The kernels that write ggml's blocks: Numba functions over addresses. What they compute: docs/numerics_ggml.md.

A block is read once: its weights stay in vectors while its scale is found and its codes are written. Only iq4_nl is
different: there the 16 lanes are the 16 scales that are tried.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..reference.ggml import LN2, NL_LEAST
from .cpu_ggml_decode import FLOATS, HALF_KIND, HALVES, half_e8m0, half_ue4m3
from .cpu_ggml_vectors import (
    e2m1_codes,
    fifth_bits,
    fitted,
    load_float,
    nl_codes,
    nl_inverses,
    nl_nearest,
    ordered,
    rounded_away,
    sign_of_first,
    signed_min,
    smallest_signed,
    store_bytes,
    store_half_nibbles,
    store_nibbles,
    store_word,
    truncated,
    unsigned_min,
)
from .cpu_kernels import FLT_MAX, INF, INF_BITS, _copy, _kernel, _part, _width
from .cpu_vectors import (
    BLOCK,
    KINDS,
    LANES,
    add,
    as_bits,
    as_float,
    clear,
    ieee_mode,
    largest_signed,
    largest_unsigned,
    load,
    load_element,
    mul,
    narrow,
    restore_mode,
    scratch,
    signed_max,
    splat,
    store,
    store_low_byte,
    store_scale,
    sub,
    unsigned_max,
    without_sign,
)

FLOAT_KIND = KINDS["float32"]
HALF_INF = INF_BITS[HALF_KIND]
ZERO, ONE, HALF = np.float32(0), np.float32(1), np.float32(0.5)
SIX, C127 = np.float32(6), np.float32(127)

# ---------------------------------------------------------------------------------------------------------------------
# Parts


@_part
def _inverse(scale: Any) -> Any:
    """1 / scale, and 0 for a scale of 0, and for one so small that the quotient overflows."""
    inverse = ONE / scale
    return inverse if abs(inverse) <= FLT_MAX else ZERO


@_part
def _store_half(at: int, value: Any) -> int:
    """Write 2 bytes; whether the value overflows."""
    raw = narrow(value, HALF_KIND)
    store_scale(at, raw, HALF_KIND)
    return 1 if (raw & 0x7FFF) >= HALF_INF else 0


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. `x` and `packed` are addresses, blocks from `begin` to `end` are done. Returns (finite, overflows, number of
# the first block that overflows or -1), and stops where a block is not finite.


@_kernel
def q8(x: int, packed: int, kind: int, begin: int, end: int) -> tuple[int, int, int]:
    mode = ieee_mode()
    width = _width(kind)
    finite, overflows, first_overflow = 1, 0, -1
    for i in range(begin, end):
        at, out = x + i * 32 * width, packed + i * 34
        a, c = load(at, kind), load(at + LANES * width, kind)
        top = largest_unsigned(unsigned_max(without_sign(as_bits(a)), without_sign(as_bits(c))))
        if top >= INF:
            finite = 0
            break
        scale = as_float(top) / C127
        if _store_half(out, scale):
            first_overflow = first_overflow if overflows else i
            overflows += 1
        inverse = splat(_inverse(scale))
        store_bytes(out + 2, rounded_away(mul(a, inverse)))
        store_bytes(out + 2 + LANES, rounded_away(mul(c, inverse)))
    restore_mode(mode)
    return finite, overflows, first_overflow


@_kernel
def signed(x: int, packed: int, bits: int, kind: int, begin: int, end: int) -> tuple[int, int, int]:
    """q4_0, q5_0."""
    mode = ieee_mode()
    width, high_bytes = _width(kind), 4 * (bits - 4)
    offset = np.float32(1 << (bits - 1))
    last = splat(np.uint32((1 << bits) - 1))
    finite, overflows, first_overflow = 1, 0, -1
    for i in range(begin, end):
        at, out = x + i * 32 * width, packed + i * (18 + high_bytes)
        a, c = load(at, kind), load(at + LANES * width, kind)
        top = largest_unsigned(unsigned_max(without_sign(as_bits(a)), without_sign(as_bits(c))))
        if top >= INF:
            finite = 0
            break
        largest = as_float(np.uint32(top | sign_of_first(as_bits(a), as_bits(c), top) if top else 0))
        scale = largest / -offset
        if _store_half(out, scale):
            first_overflow = first_overflow if overflows else i
            overflows += 1
        inverse = _inverse(scale)
        half = splat(offset + HALF if inverse != 0 or scale == 0 else ZERO)  # what is too small has code 0
        by = splat(inverse)
        low, high = truncated(add(mul(a, by), half)), truncated(add(mul(c, by), half))
        low, high = unsigned_min(low, last), unsigned_min(high, last)
        if high_bytes:
            store_word(out + 2, fifth_bits(low, high))
        store_nibbles(out + 2 + high_bytes, low, high)
    restore_mode(mode)
    return finite, overflows, first_overflow


@_kernel
def ranged(x: int, packed: int, bits: int, kind: int, begin: int, end: int) -> tuple[int, int, int]:
    """q4_1, q5_1."""
    mode = ieee_mode()
    width, high_bytes = _width(kind), 4 * (bits - 4)
    levels = np.float32((1 << bits) - 1)
    last = splat(np.uint32((1 << bits) - 1))
    finite, overflows, first_overflow = 1, 0, -1
    for i in range(begin, end):
        at, out = x + i * 32 * width, packed + i * (20 + high_bytes)
        a, c = load(at, kind), load(at + LANES * width, kind)
        first, second = ordered(as_bits(a)), ordered(as_bits(c))
        bottom, top = smallest_signed(signed_min(first, second)), largest_signed(signed_max(first, second))
        low_bits, high_bits = ordered(bottom), ordered(top)
        if (low_bits & 0x7FFFFFFF) >= INF or (high_bits & 0x7FFFFFFF) >= INF:
            finite = 0
            break
        if low_bits & 0x7FFFFFFF == 0:  # of zeros of both signs the first counts
            low_bits = sign_of_first(as_bits(a), as_bits(c), np.uint32(0))
        lowest = as_float(np.uint32(low_bits))
        scale = (as_float(high_bits) - lowest) / levels
        if _store_half(out, scale) | _store_half(out + 2, lowest):
            first_overflow = first_overflow if overflows else i
            overflows += 1
        zero, by, half = splat(lowest), splat(_inverse(scale)), splat(HALF)
        low = unsigned_min(truncated(add(mul(sub(a, zero), by), half)), last)
        high = unsigned_min(truncated(add(mul(sub(c, zero), by), half)), last)
        if high_bytes:
            store_word(out + 4, fifth_bits(low, high))
        store_nibbles(out + 4 + high_bytes, low, high)
    restore_mode(mode)
    return finite, overflows, first_overflow


@_part
def _e8m0(top: Any) -> Any:
    """The exponent byte for a largest magnitude, given as bits: see reference.ggml._exponent."""
    exponent, missing = (top >> 23) - 126, 0x800000 - (top & 0x7FFFFF)
    if missing <= 64 and exponent and exponent < 128:  # as near to the next power of two as log2 might not tell apart
        size, p = abs(exponent), -1
        while size:
            size >>= 1
            p += 1
        if exponent > 0 and exponent & (exponent - 1) == 0:
            p -= 1
        near = LN2 << p >> 16 if p >= 0 else 0
        exponent += missing <= near
    return max(exponent + 124, 0)


@_kernel
def mxfp4(x: int, packed: int, kind: int, begin: int, end: int) -> tuple[int, int, int]:
    mode = ieee_mode()
    width = _width(kind)
    finite = 1
    for i in range(begin, end):
        at, out = x + i * 32 * width, packed + i * 17
        a, c = load(at, kind), load(at + LANES * width, kind)
        top = largest_unsigned(unsigned_max(without_sign(as_bits(a)), without_sign(as_bits(c))))
        if top >= INF:
            finite = 0
            break
        e = _e8m0(np.int64(top))
        step = half_e8m0(e)
        store_low_byte(out, np.uint32(e))
        store_nibbles(out + 1, e2m1_codes(a, step), e2m1_codes(c, step))
    restore_mode(mode)
    return finite, 0, -1


@_part
def _ue4m3(value: Any) -> Any:
    if value < np.float32(0.015625):
        return min(int(value * np.float32(512) + HALF), 7)
    normal = ((np.int64(as_bits(value)) + 0x80000) >> 20) - 960
    return normal if normal < 0x78 else 0x7E


@_kernel
def nvfp4(x: int, packed: int, kind: int, begin: int, end: int) -> tuple[int, int, int]:
    mode = ieee_mode()
    width = _width(kind)
    finite = 1
    for i in range(begin, end):
        out = packed + i * 36
        for part in range(4):
            a = load(x + (i * 64 + part * 16) * width, kind)
            top = largest_unsigned(without_sign(as_bits(a)))
            if top >= INF:
                finite = 0
                break
            u = _ue4m3(as_float(top) / SIX)
            step = half_ue4m3(u)
            store_low_byte(out + part, np.uint32(u))
            store_half_nibbles(out + 4 + part * 8, e2m1_codes(a, step if u else as_float(np.uint32(INF))))
        if not finite:
            break
    restore_mode(mode)
    return finite, 0, -1


@_kernel
def nl(x: int, packed: int, kind: int, begin: int, end: int) -> tuple[int, int, int]:
    mode = ieee_mode()
    weights, sums = scratch(128), scratch(256)
    width = _width(kind)
    finite, overflows, first_overflow = 1, 0, -1
    for i in range(begin, end):
        at, out = x + i * 32 * width, packed + i * 18
        a, c = load(at, kind), load(at + LANES * width, kind)
        top = largest_unsigned(unsigned_max(without_sign(as_bits(a)), without_sign(as_bits(c))))
        if top >= INF:
            finite = 0
            break
        scale = ZERO
        if as_float(top) >= NL_LEAST:
            store(weights, a, FLOAT_KIND)
            store(weights + 64, c, FLOAT_KIND)
            largest = as_float(np.uint32(top | sign_of_first(as_bits(a), as_bits(c), top)))
            inverses = nl_inverses(largest)
            products, norms = splat(ZERO), splat(ZERO)
            for j in range(32):
                w = load_float(weights + 4 * j)
                value, values = splat(w), nl_nearest(mul(inverses, splat(w)))
                weighted = mul(splat(w * w), values)
                products = add(products, mul(weighted, value))
                norms = add(norms, mul(weighted, values))
            scales = fitted(products, norms)
            store(sums, scales, FLOAT_KIND)
            store(sums + 64, mul(scales, products), FLOAT_KIND)
            store(sums + 128, mul(products, products), FLOAT_KIND)
            store(sums + 192, norms, FLOAT_KIND)
            scale, best = load_float(sums), load_float(sums + 64)
            for t in range(1, 16):
                norm = load_float(sums + 192 + 4 * t)
                if norm > 0 and load_float(sums + 128 + 4 * t) > best * norm:
                    scale, best = load_float(sums + 4 * t), load_float(sums + 64 + 4 * t)
        if _store_half(out, scale):
            first_overflow = first_overflow if overflows else i
            overflows += 1
        by = splat(ONE / scale if scale != 0 else ZERO)
        store_nibbles(out + 2, nl_codes(mul(a, by)), nl_codes(mul(c, by)))
    restore_mode(mode)
    return finite, overflows, first_overflow


@_kernel
def cast(x: int, packed: int, n: int, target: int, kind: int, begin: int, end: int) -> tuple[int, int, int]:
    """f16, bf16: units of BLOCK weights, of `n` in all."""
    mode = ieee_mode()
    spare, weights = scratch(HALVES), scratch(FLOATS)
    width = _width(kind)
    finite, overflows, first_overflow = 1, 0, -1
    for i in range(begin, end):
        rest = min(n - i * BLOCK, BLOCK)
        at, out = x + i * BLOCK * width, packed + i * BLOCK * 2
        if rest < BLOCK:
            for k in range(4):
                clear(weights + k * BLOCK)
            for k in range(0, rest * width, BLOCK):
                _copy(at + k, weights + k, min(rest * width - k, BLOCK))
            at, out = weights, spare
        top, stored = splat(np.uint32(0)), splat(np.uint32(0))
        for k in range(0, BLOCK, LANES):
            values = load(at + k * width, kind)
            store(out + k * 2, values, target)
            top = unsigned_max(top, without_sign(as_bits(values)))
            stored = unsigned_max(stored, without_sign(as_bits(load(out + k * 2, target))))
        if largest_unsigned(top) >= INF:
            finite = 0
            break
        if largest_unsigned(stored) >= INF:
            for k in range(rest):
                if (load_element(out + k * 2, target) & 0x7FFF) >= INF_BITS[target]:
                    first_overflow = first_overflow if overflows else i * BLOCK + k
                    overflows += 1
        if rest < BLOCK:
            for k in range(0, rest * 2, BLOCK):
                _copy(spare + k, packed + i * BLOCK * 2 + k, min(rest * 2 - k, BLOCK))
    restore_mode(mode)
    return finite, overflows, first_overflow
