"""The CPU kernels of family float; what they compute: docs/numerics_floats.md, how they are built: cpu_kernels.py.

Codes of 4 bits are decoded two at a time through a table of what each byte stands for; those of 8 bits by their bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import from_numpy
from ..reference.floats import (
    E8M0_OF_ZEROS,
    E8M0_ROUNDING,
    EPS_E4M3,
    EXPONENT,
    LARGEST,
    LEAST_ABSMAX,
    VALUES,
    ties_down,
)
from ..schemes import Scheme
from .cpu_float_vectors import CODINGS, code_of, e4m3_code, expand_codes, float_of, load_floats, store_low_bytes
from .cpu_kernels import (
    CODES,
    EPS_BITS,
    INF,
    INF_BITS,
    ONE,
    TILE,
    _copy,
    _kernel,
    _largest_magnitude,
    _last,
    _pack,
    _part,
    _width,
)
from .cpu_tasks import Task, address
from .cpu_vectors import (
    BLOCK,
    KINDS,
    LANES,
    as_float,
    div,
    ieee_mode,
    load,
    load_byte,
    load_scale,
    move8,
    mul,
    narrow,
    restore_mode,
    scratch,
    splat,
    store,
    store_low_byte,
    store_scale,
)

SQUARE = 128  # rows and columns of a block
# How scales are stored: the kinds of weights, then powers of two, and e4m3 without and with a global scale.
E8M0, LOCAL, GLOBAL = 3, 4, 5
_NF4, _FP4, _E2M1, _E4M3 = (CODINGS[name] for name in ("nf4", "fp4", "e2m1", "e4m3"))
_VALUES = 4 * (TILE + BLOCK)  # bytes of the decoded values of a tile
_LEAST_ABSMAX = LEAST_ABSMAX
_LEAST_BITS = int(LEAST_ABSMAX.view(np.uint32))
_EPS_E4M3 = EPS_E4M3
_OF_E2M1, _OF_E4M3, _OF_E5M2 = (np.float32(LARGEST[grid]) for grid in ("e2m1", "e4m3", "e5m2"))

# By grid of 4 bits: the values of each byte, the low half first, float32 [256, 2].
_PAIRS: Mapping[str, NDArray[np.float32]] = {
    grid: values[np.arange(256)[:, None] >> np.array([0, 4]) & 15].copy()
    for grid, values in VALUES.items()
    if values.size == 16
}
_E4M3_VALUES = VALUES["e4m3"]


# ---------------------------------------------------------------------------------------------------------------------
# Parts


@_part
def _scale_width(scale_kind: int) -> int:
    if scale_kind == 0:
        return 4
    return 2 if scale_kind < E8M0 else 1


@_part
def _largest(coding: int) -> Any:
    if coding < _E4M3:
        return _OF_E2M1
    return _OF_E4M3 if coding == _E4M3 else _OF_E5M2


@_part
def _store_scale(
    top: Any, scale: int, coding: int, scale_kind: int, rounding: int, of_zeros: int, divisor: Any, short: int
) -> int:
    """Write the scale of a group whose largest magnitude has the bits `top`. Returns 1 if it overflows, else 0."""
    if coding <= _FP4:
        store_scale(scale, np.uint32(_LEAST_BITS) if short and top < _LEAST_BITS else top, 0)
        return 0
    if scale_kind == E8M0:
        exponent: Any = ((np.int64(top) + (rounding & 0xFFFFFFFF)) >> 23) - (rounding >> 32)
        exponent = min(max(exponent, 0), 254) if top else np.int64(of_zeros)
        store_low_byte(scale, np.uint32(exponent))
        return 0
    exact = as_float(top) / _largest(coding)
    if scale_kind == LOCAL:
        store_low_byte(scale, e4m3_code(exact))
        return 0
    if scale_kind == GLOBAL:
        code = e4m3_code(divisor * exact)
        store_low_byte(scale, np.uint32(_EPS_E4M3) if code == 0 else code)
        return 0
    raw = narrow(exact, scale_kind)
    if top == 0:
        raw = np.uint32(EPS_BITS[scale_kind])
    elif raw == 0:
        raw = np.uint32(1)
    store_scale(scale, raw, scale_kind)
    return 1 if raw == INF_BITS[scale_kind] else 0


@_part
def _factor(scale: int, scale_kind: int, divisor: Any, e4m3: int) -> Any:
    """What the scale in memory multiplies values by. `e4m3` is the address of the values of that type."""
    if scale_kind < E8M0:
        return load_scale(scale, scale_kind)
    byte = np.int64(load_byte(scale))
    if scale_kind == E8M0:
        return float_of(byte << 23 if byte else 1 << 22)
    value = load_scale(e4m3 + 4 * byte, 0)
    return value / divisor if scale_kind == GLOBAL else value


@_part
def _encode(x: int, n: int, kind: int, factor: Any, multiply: int, coding: int, codes: int, spare: int) -> None:
    """Codes of x[:n], times or divided by `factor`: a byte each, then up to 15 bytes that mean nothing."""
    width, f = _width(kind), splat(factor)
    if multiply:
        for i in range(0, n - LANES + 1, LANES):
            store_low_bytes(codes + i, code_of(mul(load(x + i * width, kind), f), coding))
        if n % LANES:
            weights = mul(load(_last(x, n, width, spare), kind), f)
            store_low_bytes(codes + max(n - LANES, 0), code_of(weights, coding))
    else:
        for i in range(0, n - LANES + 1, LANES):
            store_low_bytes(codes + i, code_of(div(load(x + i * width, kind), f), coding))
        if n % LANES:
            weights = div(load(_last(x, n, width, spare), kind), f)
            store_low_bytes(codes + max(n - LANES, 0), code_of(weights, coding))


@_part
def _expand(packed: int, n: int, coding: int, table: int, values: int, spare: int) -> None:
    """Values of n codes, float32, and up to 15 more that mean nothing."""
    if coding < _E4M3:
        for i in range((n + 1) // 2):
            move8(table + 8 * np.int64(load_byte(packed + i)), values + 8 * i)
    else:
        for i in range(0, n - LANES + 1, LANES):
            expand_codes(packed + i, values + 4 * i, coding)
        rest = n % LANES
        if rest:
            _copy(packed + n - rest, spare, rest)
            expand_codes(spare, values + 4 * (n - rest), coding)


@_part
def _decode(values: int, n: int, factor: Any, out: int, kind: int, spare: int) -> None:
    width, f = _width(kind), splat(factor)
    for i in range(0, n - LANES + 1, LANES):
        store(out + i * width, mul(load_floats(values + 4 * i), f), kind)
    if n >= LANES:
        store(out + (n - LANES) * width, mul(load_floats(values + 4 * (n - LANES)), f), kind)
    else:
        store(spare, mul(load_floats(values), f), kind)
        _copy(spare, out, n * width)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels, with the arguments of those in cpu_kernels.py, and: `coding`, one of CODINGS; `rounding` and `of_zeros` of
# e8m0 scales; `band`, rows that share their scales; addresses of tables.


@_kernel
def quantize(
    x: int,
    packed: int,
    scales: int,
    zeros: int,
    length: int,
    group: int,
    row_scales: int,
    band: int,
    coding: int,
    kind: int,
    scale_kind: int,
    rounding: int,
    of_zeros: int,
    e4m3: int,
    known: int,
    unit: int,
    begin: int,
    end: int,
) -> tuple[int, int, int]:
    """Write codes, and scales unless they are `known`: then they are read. `band` is then 1.

    Unless `known`, `unit` is a multiple of `group`, or at least a row. Returns (finite, overflows, number of the first
    overflowing scale or -1), and stops where a group is not finite.
    """
    mode = ieee_mode()
    codes, spare = scratch(CODES), scratch(BLOCK)
    width, scale_width, bits = _width(kind), _scale_width(scale_kind), 8 if coding >= _E4M3 else 4
    row_units, row_bytes = (length + unit - 1) // unit, (length * bits + 7) // 8
    divisor = load_scale(zeros, 0) if scale_kind == GLOBAL else ONE
    finite, overflows, first_overflow = 1, 0, -1
    factor, multiply = ONE, 0
    at = begin
    while at < end and finite:
        row = at // row_units
        start = (at - row * row_units) * unit
        stop = min(length, start + (end - at) * unit)
        at += (stop - start + unit - 1) // unit
        row_x, out = x + row * length * width, packed + row * row_bytes + start // 8 * bits
        number = start // group
        group_stop, number = number * group, row // band * row_scales + number - 1
        for tile in range(start, stop, TILE):
            tile_stop, k = min(tile + TILE, stop), tile
            while k < tile_stop:
                if k >= group_stop:
                    number += 1
                    short = group_stop + group > length
                    group_stop = min(length, group_stop + group)
                    scale_at = scales + number * scale_width
                    if not known:
                        top = _largest_magnitude(row_x + k * width, group_stop - k, kind, spare)
                        if top >= INF:
                            finite, at = 0, end
                        elif _store_scale(top, scale_at, coding, scale_kind, rounding, of_zeros, divisor, short):
                            first_overflow = first_overflow if overflows else number
                            overflows += 1
                    factor, multiply = _factor(scale_at, scale_kind, divisor, e4m3), 0
                    if coding <= _FP4:
                        factor = max(factor, _LEAST_ABSMAX)
                        if not short:
                            factor, multiply = ONE / factor, 1
                    elif scale_kind == E8M0:
                        byte = 254 - np.int64(load_byte(scale_at))
                        factor, multiply = float_of(byte << 23 if byte > 0 else 1 << 22), 1
                    elif factor == 0:
                        multiply = 1
                n = min(group_stop, tile_stop) - k
                _encode(row_x + k * width, n, kind, factor, multiply, coding, codes + k - tile, spare)
                k += n
            _pack(codes, tile_stop - tile, bits, out, spare)
            out += TILE // 8 * bits
    restore_mode(mode)
    return finite, overflows, first_overflow


@_kernel
def decide_squares(
    x: int, scales: int, rows: int, length: int, coding: int, kind: int, scale_kind: int, begin: int, end: int
) -> tuple[int, int, int]:
    """Write the scales of the blocks of these bands of rows. Returns what `quantize` does."""
    mode = ieee_mode()
    spare = scratch(BLOCK)
    width, scale_width, across = _width(kind), _scale_width(scale_kind), (length + SQUARE - 1) // SQUARE
    finite, overflows, first_overflow = 1, 0, -1
    for number in range(begin * across, end * across):
        first, k = number // across * SQUARE, number % across * SQUARE
        n, top = min(SQUARE, length - k), np.uint32(0)
        for row in range(first, min(rows, first + SQUARE)):
            top = max(top, _largest_magnitude(x + (row * length + k) * width, n, kind, spare))
        if top >= INF:
            finite = 0
            break
        if _store_scale(top, scales + number * scale_width, coding, scale_kind, 0, 0, ONE, 0):
            first_overflow = first_overflow if overflows else number
            overflows += 1
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
    band: int,
    coding: int,
    kind: int,
    scale_kind: int,
    table: int,
    e4m3: int,
    unit: int,
    begin: int,
    end: int,
) -> None:
    """Decode into `out`, of element type `kind`."""
    mode = ieee_mode()
    values, spare = scratch(_VALUES), scratch(BLOCK)
    width, scale_width, bits = _width(kind), _scale_width(scale_kind), 8 if coding >= _E4M3 else 4
    row_units, row_bytes = (length + unit - 1) // unit, (length * bits + 7) // 8
    divisor = load_scale(zeros, 0) if scale_kind == GLOBAL else ONE
    factor = ONE
    at = begin
    while at < end:
        row = at // row_units
        start = (at - row * row_units) * unit
        stop = min(length, start + (end - at) * unit)
        at += (stop - start + unit - 1) // unit
        row_out, source = out + row * length * width, packed + row * row_bytes + start // 8 * bits
        number = start // group
        group_stop, number = number * group, row // band * row_scales + number - 1
        for tile in range(start, stop, TILE):
            tile_stop, k = min(tile + TILE, stop), tile
            _expand(source, tile_stop - tile, coding, table, values, spare)
            source += TILE // 8 * bits
            while k < tile_stop:
                if k >= group_stop:
                    number += 1
                    group_stop = min(length, group_stop + group)
                    factor = _factor(scales + number * scale_width, scale_kind, divisor, e4m3)
                n = min(group_stop, tile_stop) - k
                _decode(values + 4 * (k - tile), n, factor, row_out + k * width, kind, spare)
                k += n
    restore_mode(mode)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


def coding(
    x: NDArray[Any],
    scheme: Scheme,
    packed: NDArray[Any],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
    *,
    known: bool,
) -> Task:
    """Quantize; with `known` scales, write codes alone."""
    rows, length = x.shape
    kind, kernel = KINDS[from_numpy(x.dtype).name], quantize()
    unit = math.lcm(scheme.group_length(length), 8) if not known and scheme.granularity != "block" else TILE
    unit = min(unit, -(-length // 8) * 8)
    arguments = (
        *(address(x), address(packed), address(scales), address(zeros)),
        *(length, scheme.group_length(length), *_rows(scheme, scales)),
        *(_coding(scheme), kind, _scale_kind(scheme), *_exponents(scheme), address(_E4M3_VALUES)),
    )
    row_units = -(-length // unit)
    if known or scheme.granularity != "block":
        return Task(rows * row_units, unit, lambda begin, end: kernel(*arguments, int(known), unit, begin, end))

    decide = decide_squares()
    decided = address(x), address(scales), rows, length, _coding(scheme), kind, _scale_kind(scheme)

    def bands(begin: int, end: int) -> tuple[bool, int, int]:
        """A band at a time, so that it is still in the cache when it is encoded."""
        finite, overflows, first_overflow = 1, 0, -1
        for band in range(begin, end):
            finite, n, first = decide(*decided, band, band + 1)
            first_overflow, overflows = first_overflow if overflows else first, overflows + n
            if not finite:
                break
            ends = (min(rows, row * SQUARE) * row_units for row in (band, band + 1))
            kernel(*arguments, 1, unit, *ends)
        return bool(finite), overflows, first_overflow

    return Task(-(-rows // SQUARE), SQUARE * length, bands)


def decoding(
    packed: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any] | None, scheme: Scheme, out: NDArray[Any]
) -> Task:
    """Decode."""
    rows, length = out.shape
    kernel, unit = dequantize(), min(TILE, -(-length // 8) * 8)
    arguments = (
        *(address(packed), address(scales), address(zeros), address(out)),
        *(length, scheme.group_length(length), *_rows(scheme, scales), _coding(scheme)),
        *(
            KINDS[from_numpy(out.dtype).name],
            _scale_kind(scheme),
            address(_PAIRS.get(scheme.grid)),
            address(_E4M3_VALUES),
        ),
    )
    return Task(rows * -(-length // unit), unit, lambda begin, end: kernel(*arguments, unit, begin, end))


def _rows(scheme: Scheme, scales: NDArray[Any]) -> tuple[int, int]:
    """`row_scales` and `band`."""
    if scheme.granularity == "tensor":
        return 0, 1
    return scales.shape[1], SQUARE if scheme.granularity == "block" else 1


def _coding(scheme: Scheme) -> int:
    return CODINGS["e2m1_down" if scheme.grid == "e2m1" and ties_down(scheme) else scheme.grid]


def _scale_kind(scheme: Scheme) -> int:
    if scheme.scale_dtype == "e4m3":
        return GLOBAL if scheme.scale_rule == "global" else LOCAL
    return E8M0 if scheme.scale_dtype == "e8m0" else KINDS[scheme.scale_dtype]


def _exponents(scheme: Scheme) -> tuple[int, int]:
    """`rounding`, with the exponent of the grid above its 32 bits, and `of_zeros`."""
    if scheme.scale_dtype != "e8m0":
        return 0, 0
    rounding = E8M0_ROUNDING[scheme.scale_rule, scheme.grid]
    return EXPONENT[scheme.grid] << 32 | rounding, E8M0_OF_ZEROS[scheme.scale_rule]
