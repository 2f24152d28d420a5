"""The CPU kernels: Numba functions over addresses. What they compute is docs/numerics.md, step by step.

A tensor is walked tile by tile. The codes of a tile, one byte each, are gathered in a scratch on the stack, group by
group; then the tile is packed, 64 codes at a time. So packing knows nothing of groups, and groups nothing of packing.
A group is read twice, once for its range and once for its codes; the second read comes from the cache.

Why addresses instead of arrays: an array argument would compile once more for each of read-only, unaligned and every
dtype, and each call would cost microseconds. Widths, element types and symmetry are arguments too: one kernel serves
all schemes, and the optimiser moves the branches out of the loops. The arrays belong to the caller (cpu.py).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numba import njit, types

from .cpu_vectors import (
    BLOCK,
    LANES,
    MAGIC,
    add,
    as_bits,
    as_float,
    clamp,
    clear,
    div,
    ieee_mode,
    largest_signed,
    largest_unsigned,
    load,
    load_byte,
    load_codes,
    load_element,
    load_scale,
    move1,
    move2,
    move4,
    move8,
    mul,
    narrow,
    pack_block,
    restore_mode,
    scratch,
    signed_max,
    splat,
    store,
    store_codes,
    store_low_byte,
    store_scale,
    sub,
    unpack_block,
    unsigned_max,
    without_sign,
)

F = TypeVar("F", bound=Callable[..., Any])

TILE = 2048  # codes of one tile: few enough for L1, enough to hide what a tile costs
CODES = TILE + BLOCK  # bytes of their scratch: whole vectors are written, so up to BLOCK - 1 bytes follow the last code

# By kind, as stored bits: the scale of a group of zeros (reference.EPS), and infinity.
EPS_BITS = (0x34000000, 0x1400, 0x3C00)
INF_BITS = (0x7F800000, 0x7C00, 0x7F80)
INF, SIGN, FLT_MAX = INF_BITS[0], 0x80000000, np.float32(3.4028235e38)
HALF, ONE = np.float32(0.5), np.float32(1)

_OPTIONS = {"nogil": True, "error_model": "numpy"}


def _part(function: F) -> F:
    """A function that is compiled into its callers."""
    return njit(forceinline=True, **_OPTIONS)(function)  # type: ignore[no-any-return]


def _kernel(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """A kernel of int64 arguments: calling the result gives it compiled, from Numba's disk cache where it is there."""
    signature, name = (types.int64,) * function.__code__.co_argcount, function.__qualname__

    @functools.cache
    def compiled() -> Callable[..., Any]:
        for cache in (True, False):
            try:
                if cache:  # Numba looks for edits in the kernel's file only: a new name makes it see all others
                    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("cpu_*.py")))
                    function.__qualname__ = f"{name}_{zlib.crc32(sources):08x}"
                kernel = njit(cache=cache, **_OPTIONS)(function)
                kernel.compile(signature)
                break
            except (OSError, RuntimeError):  # no directory for the cache can be written, its disk is full, or no source
                if not cache:
                    raise
        return kernel  # type: ignore[no-any-return]

    return compiled


# ---------------------------------------------------------------------------------------------------------------------
# Parts


@_part
def _width(kind: int) -> int:
    return 4 if kind == 0 else 2


@_part
def _copy(source: int, target: int, n_bytes: int) -> None:
    """Copy up to BLOCK bytes, in pieces that overlap rather than byte by byte."""
    last = n_bytes - 8
    if n_bytes >= 8:
        for i in range(0, last, 8):
            move8(source + i, target + i)
        move8(source + last, target + last)
    elif n_bytes >= 4:
        move4(source, target)
        move4(source + n_bytes - 4, target + n_bytes - 4)
    elif n_bytes >= 2:
        move2(source, target)
        move2(source + n_bytes - 2, target + n_bytes - 2)
    elif n_bytes == 1:
        move1(source, target)


@_part
def _last(x: int, n: int, width: int, spare: int) -> int:
    """Address of the last vector of x[:n]: its last 16 weights, or all of them and zeros, which change no range."""
    if n >= LANES:
        return x + (n - LANES) * width
    clear(spare)
    _copy(x, spare, n * width)
    return spare


@_part
def _largest_magnitude(x: int, n: int, kind: int, spare: int) -> Any:
    """Bits of the largest |weight| of x[:n]. Bits of non-negative floats order like the floats, with NaN on top."""
    width = _width(kind)
    top = splat(np.uint32(0))
    for i in range(0, n - LANES + 1, LANES):
        top = unsigned_max(top, without_sign(as_bits(load(x + i * width, kind))))
    if n % LANES:
        top = unsigned_max(top, without_sign(as_bits(load(_last(x, n, width, spare), kind))))
    return largest_unsigned(top)


@_part
def _extremes(x: int, n: int, kind: int, spare: int) -> Any:
    """Bits of min(0, lowest), -0.0 if that is 0, and of max(0, highest) of x[:n].

    As integers, the lowest negative float is the largest unsigned one, and the highest float the largest signed one.
    """
    width = _width(kind)
    low, high = splat(np.uint32(SIGN)), splat(np.uint32(0))
    for i in range(0, n - LANES + 1, LANES):
        raw = as_bits(load(x + i * width, kind))
        low, high = unsigned_max(low, raw), signed_max(high, raw)
    if n % LANES:
        raw = as_bits(load(_last(x, n, width, spare), kind))
        low, high = unsigned_max(low, raw), signed_max(high, raw)
    return largest_unsigned(low), largest_signed(high)


@_part
def _solve(
    x: int, n: int, kind: int, scale: int, zero: int, bits: int, symmetric: int, scale_kind: int, spare: int
) -> int:
    """Write scale and zero point of the group x[:n]. Returns 0; 1 if the scale overflows; 2 if x is not finite."""
    levels, offset = np.float32((1 << bits) - 1), np.float32(1 << (bits - 1))
    if symmetric:
        low, top = np.float32(0), _largest_magnitude(x, n, kind, spare)
        if top >= INF:
            return 2
        exact = as_float(top) / (levels * HALF)
    else:
        low_bits, top = _extremes(x, n, kind, spare)
        if top >= INF or low_bits >= SIGN + INF:
            return 2
        low, high = as_float(low_bits), as_float(top)  # a low of -0.0 gives the same scale and zero point as 0.0
        span = high - low
        exact = span / levels
        if span > FLT_MAX:
            exact = (high * HALF - low * HALF) / (levels * HALF)
    raw = narrow(exact, scale_kind)
    if top == 0 and low == 0:
        raw = np.uint32(EPS_BITS[scale_kind])
    elif raw == 0:
        raw = np.uint32(1)
    store_scale(scale, raw, scale_kind)
    if not symmetric:
        signed = clamp(-offset - low / load_scale(scale, scale_kind), -offset, offset - ONE)
        store_low_byte(zero, as_bits(signed + (np.float32(MAGIC) + offset)))
    return 1 if raw == INF_BITS[scale_kind] else 0


@_part
def _encode(x: int, n: int, kind: int, scale: Any, zero: Any, offset: Any, codes: int, spare: int) -> None:
    """Codes of x[:n] with the signed zero point `zero`: a byte each, then up to 15 bytes that mean nothing.

    Symmetric schemes add a zero of 0.0, which can change no code.
    """
    width = _width(kind)
    s, z, low, high = splat(scale), splat(zero), splat(-offset), splat(offset - ONE)
    magic = splat(np.float32(MAGIC) + offset)
    for i in range(0, n - LANES + 1, LANES):
        store_codes(codes + i, add(clamp(add(div(load(x + i * width, kind), s), z), low, high), magic))
    if n % LANES:
        weights = load(_last(x, n, width, spare), kind)
        store_codes(codes + max(n - LANES, 0), add(clamp(add(div(weights, s), z), low, high), magic))


@_part
def _pack(codes: int, n: int, bits: int, packed: int, spare: int) -> None:
    for i in range(n // BLOCK):
        pack_block(codes + i * BLOCK, packed + i * 8 * bits, bits)
    rest = n % BLOCK
    if rest:
        clear(codes + n)
        pack_block(codes + n - rest, spare, bits)
        _copy(spare, packed + (n - rest) // 8 * bits, (rest * bits + 7) // 8)


@_part
def _unpack(packed: int, n: int, bits: int, codes: int, spare: int) -> None:
    for i in range(n // BLOCK):
        unpack_block(packed + i * 8 * bits, codes + i * BLOCK, bits)
    rest = n % BLOCK
    if rest:
        _copy(packed + (n - rest) // 8 * bits, spare, (rest * bits + 7) // 8)
        unpack_block(spare, codes + n - rest, bits)


@_part
def _decode(codes: int, n: int, scale: Any, zero: Any, out: int, kind: int, spare: int) -> None:
    width = _width(kind)
    s, z = splat(scale), splat(zero)
    for i in range(0, n - LANES + 1, LANES):
        store(out + i * width, mul(sub(load_codes(codes + i), z), s), kind)
    if n >= LANES:
        store(out + (n - LANES) * width, mul(sub(load_codes(codes + n - LANES), z), s), kind)
    else:
        store(spare, mul(sub(load_codes(codes), z), s), kind)
        _copy(spare, out, n * width)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. `x`, `packed`, `scales`, `zeros` and `out` are addresses of row-major arrays, shaped as Backend says.
# `row_scales` is the number of scales of a row, 0 where all rows share one. A row is ceil(length / unit) units of work,
# numbered in row-major order; a call does the units from `begin` to `end`. `unit` is a multiple of 8 weights, so that
# no two units share a byte.


@_kernel
def quantize(
    x: int,
    packed: int,
    scales: int,
    zeros: int,
    length: int,
    group: int,
    row_scales: int,
    bits: int,
    symmetric: int,
    kind: int,
    scale_kind: int,
    known: int,
    unit: int,
    begin: int,
    end: int,
) -> tuple[int, int, int]:
    """Write codes, and scales and zero points unless they are `known`: then they are read.

    Unless `known`, `unit` is a multiple of `group`, or at least a row. Returns (finite, overflows, number of the first
    overflowing scale or -1), and stops where a group is not finite.
    """
    mode = ieee_mode()
    codes, spare = scratch(CODES), scratch(BLOCK)
    width, scale_width = _width(kind), _width(scale_kind)
    row_units, row_bytes = (length + unit - 1) // unit, (length * bits + 7) // 8
    offset, scale, zero = np.float32(1 << (bits - 1)), ONE, np.float32(0)
    finite, overflows, first_overflow = 1, 0, -1
    at = begin
    while at < end and finite:
        row = at // row_units
        start = (at - row * row_units) * unit
        stop = min(length, start + (end - at) * unit)
        at += (stop - start + unit - 1) // unit
        row_x, out = x + row * length * width, packed + row * row_bytes + start // 8 * bits
        number = start // group
        group_stop, number = number * group, row * row_scales + number - 1
        for tile in range(start, stop, TILE):
            tile_stop, k = min(tile + TILE, stop), tile
            while k < tile_stop:
                if k >= group_stop:
                    number += 1
                    group_stop = min(length, group_stop + group)
                    scale_at, zero_at = scales + number * scale_width, zeros + number
                    if not known:
                        n = group_stop - k
                        status = _solve(
                            row_x + k * width, n, kind, scale_at, zero_at, bits, symmetric, scale_kind, spare
                        )
                        if status == 2:
                            finite, at = 0, end
                        elif status == 1:
                            first_overflow = first_overflow if overflows else number
                            overflows += 1
                    scale = load_scale(scale_at, scale_kind)
                    if not symmetric:
                        zero = np.float32(load_byte(zero_at)) - offset
                n = min(group_stop, tile_stop) - k
                _encode(row_x + k * width, n, kind, scale, zero, offset, codes + k - tile, spare)
                k += n
            _pack(codes, tile_stop - tile, bits, out, spare)
            out += TILE // 8 * bits
    restore_mode(mode)
    return finite, overflows, first_overflow


@_kernel
def dequantize(
    packed: int,
    scales: int,
    zeros: int,
    out: int,
    length: int,
    group: int,
    row_scales: int,
    bits: int,
    symmetric: int,
    kind: int,
    scale_kind: int,
    unit: int,
    begin: int,
    end: int,
) -> None:
    """Decode into `out`, of element type `kind`."""
    mode = ieee_mode()
    codes, spare = scratch(CODES), scratch(BLOCK)
    width, scale_width = _width(kind), _width(scale_kind)
    row_units, row_bytes = (length + unit - 1) // unit, (length * bits + 7) // 8
    scale, zero = ONE, np.float32(1 << (bits - 1))
    at = begin
    while at < end:
        row = at // row_units
        start = (at - row * row_units) * unit
        stop = min(length, start + (end - at) * unit)
        at += (stop - start + unit - 1) // unit
        row_out, source = out + row * length * width, packed + row * row_bytes + start // 8 * bits
        number = start // group
        group_stop, number = number * group, row * row_scales + number - 1
        for tile in range(start, stop, TILE):
            tile_stop, k = min(tile + TILE, stop), tile
            _unpack(source, tile_stop - tile, bits, codes, spare)
            source += TILE // 8 * bits
            while k < tile_stop:
                if k >= group_stop:
                    number += 1
                    group_stop = min(length, group_stop + group)
                    scale = load_scale(scales + number * scale_width, scale_kind)
                    if not symmetric:
                        zero = np.float32(load_byte(zeros + number))
                n = min(group_stop, tile_stop) - k
                _decode(codes + k - tile, n, scale, zero, row_out + k * width, kind, spare)
                k += n
    restore_mode(mode)


@_kernel
def value_range(x: int, kind: int, begin: int, end: int) -> tuple[int, int]:
    """Bits of min(0, lowest), -0.0 if that is 0, and of max(0, highest) of the weights `begin` to `end`."""
    spare = scratch(BLOCK)
    low, high = _extremes(x + begin * _width(kind), end - begin, kind, spare)
    return low, high


@_kernel
def find(x: int, kind: int, begin: int, end: int) -> tuple[int, int, int]:
    """(NaN, infinities, index of the first or -1) among the weights `begin` to `end`."""
    width, infinity = _width(kind), INF_BITS[kind]
    without_sign_bit = (1 << (8 * width - 1)) - 1
    n_nan, n_inf, first = 0, 0, -1
    for i in range(begin, end):
        magnitude = load_element(x + i * width, kind) & without_sign_bit
        if magnitude >= infinity:
            n_nan += magnitude > infinity
            n_inf += magnitude == infinity
            first = first if first >= 0 else i
    return n_nan, n_inf, first
