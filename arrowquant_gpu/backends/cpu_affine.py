"""The CPU kernels of family affine; what they compute: docs/numerics_affine.md, how they are built: cpu_kernels.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import from_numpy
from ..schemes import Scheme
from .cpu_kernels import CODES, INF, INF_BITS, ONE, TILE, _copy, _kernel, _pack, _part, _unpack, _width
from .cpu_tasks import Task, address
from .cpu_vectors import (
    BLOCK,
    KINDS,
    LANES,
    MAGIC,
    add,
    as_bits,
    clamp,
    div,
    highest,
    ieee_mode,
    larger,
    largest_unsigned,
    load,
    load_codes,
    load_scale,
    lowest,
    move2,
    move4,
    mul,
    narrow,
    restore_mode,
    scratch,
    smaller,
    splat,
    store,
    store_codes,
    store_scale,
    sub,
    unsigned_max,
    without_sign,
)

LEAST = np.float32(1e-7)  # reference.affine.LEAST
WHOLE, ZERO = np.float32(MAGIC), np.float32(0)


@_part
def _solve(x: int, n: int, kind: int, levels: Any, spare: int) -> Any:
    """(status, scale, bias) of the group x[:n], not yet rounded: 0; 1 if they overflow; 2 if x is not finite."""
    width = _width(kind)
    if n < LANES:  # a short tail: its first weight again changes no range
        for i in range(LANES):
            if kind == 0:
                move4(x + (i if i < n else 0) * 4, spare + i * 4)
            else:
                move2(x + (i if i < n else 0) * 2, spare + i * 2)
        first = load(spare, kind)
    else:
        first = load(x, kind)
    low, high, top = first, first, without_sign(as_bits(first))
    for i in range(LANES, n - LANES + 1, LANES):
        weights = load(x + i * width, kind)
        low, high, top = smaller(low, weights), larger(high, weights), unsigned_max(top, without_sign(as_bits(weights)))
    if n > LANES and n % LANES:
        weights = load(x + (n - LANES) * width, kind)
        low, high, top = smaller(low, weights), larger(high, weights), unsigned_max(top, without_sign(as_bits(weights)))
    if largest_unsigned(top) >= INF:
        return 2, ONE, ZERO
    lo, hi = lowest(low), highest(high)
    step = (hi - lo) / levels
    if step < LEAST:
        step = LEAST
    status = 1 if as_bits(step) == INF else 0
    if abs(lo) > abs(hi):
        edge = lo
    else:
        edge, step = hi, -step
    # Nearest even as the vectors have it, and beyond 2**22 the quotient is not far from whole numbers.
    code = np.rint(edge / step)
    if code == ZERO:
        return status, step, ZERO
    return status, edge / code, edge


@_part
def _encode(x: int, n: int, kind: int, scale: Any, bias: Any, levels: Any, codes: int, spare: int) -> None:
    width = _width(kind)
    s, b, low, high, magic = splat(scale), splat(bias), splat(ZERO), splat(levels), splat(WHOLE)
    for i in range(0, n - LANES + 1, LANES):
        store_codes(codes + i, add(clamp(div(sub(load(x + i * width, kind), b), s), low, high), magic))
    if n % LANES:
        at = x + (n - LANES) * width
        if n < LANES:
            _copy(x, spare, n * width)
            at = spare
        store_codes(codes + max(n - LANES, 0), add(clamp(div(sub(load(at, kind), b), s), low, high), magic))


@_kernel
def quantize(
    x: int,
    packed: int,
    scales: int,
    biases: int,
    length: int,
    group: int,
    groups: int,
    bits: int,
    kind: int,
    scale_kind: int,
    begin: int,
    end: int,
) -> tuple[int, int, int]:
    """Write codes, scales and biases of the rows `begin` to `end`, `groups` groups each. See cpu_kernels.quantize."""
    mode = ieee_mode()
    codes, spare = scratch(CODES), scratch(BLOCK)
    width, scale_width, row_bytes = _width(kind), _width(scale_kind), (length * bits + 7) // 8
    levels = np.float32((1 << bits) - 1)
    finite, overflows, first_overflow = 1, 0, -1
    row = begin
    while row < end and finite:
        row_x, out, number = x + row * length * width, packed + row * row_bytes, row * groups
        for tile in range(0, length, TILE):
            tile_stop = min(tile + TILE, length)
            for k in range(tile, tile_stop, group):
                n = min(group, tile_stop - k)
                status, scale, bias = _solve(row_x + k * width, n, kind, levels, spare)
                raw_scale, raw_bias = narrow(scale, scale_kind), narrow(bias, scale_kind)
                infinity, magnitude = INF_BITS[scale_kind], 0x7FFFFFFF if scale_kind == 0 else 0x7FFF
                too_large = (raw_scale & magnitude) >= infinity or (raw_bias & magnitude) >= infinity
                if status == 2:
                    finite = 0
                elif status == 1 or too_large:
                    first_overflow = first_overflow if overflows else number
                    overflows += 1
                store_scale(scales + number * scale_width, raw_scale, scale_kind)
                store_scale(biases + number * scale_width, raw_bias, scale_kind)
                _encode(row_x + k * width, n, kind, scale, bias, levels, codes + k - tile, spare)
                number += 1
            _pack(codes, tile_stop - tile, bits, out, spare)
            out += TILE // 8 * bits
        row += 1
    restore_mode(mode)
    return finite, overflows, first_overflow


@_part
def _decode(codes: int, n: int, scale: Any, bias: Any, out: int, kind: int, spare: int) -> None:
    width = _width(kind)
    s, b = splat(scale), splat(bias)
    for i in range(0, n - LANES + 1, LANES):
        store(out + i * width, add(mul(load_codes(codes + i), s), b), kind)
    if n >= LANES:
        store(out + (n - LANES) * width, add(mul(load_codes(codes + n - LANES), s), b), kind)
    else:
        store(spare, add(mul(load_codes(codes), s), b), kind)
        _copy(spare, out, n * width)


@_kernel
def dequantize(
    packed: int,
    scales: int,
    biases: int,
    out: int,
    length: int,
    group: int,
    groups: int,
    bits: int,
    kind: int,
    scale_kind: int,
    begin: int,
    end: int,
) -> None:
    """Decode the rows `begin` to `end` into `out`, of element type `kind`."""
    mode = ieee_mode()
    codes, spare = scratch(CODES), scratch(BLOCK)
    width, scale_width, row_bytes = _width(kind), _width(scale_kind), (length * bits + 7) // 8
    for row in range(begin, end):
        row_out, source, number = out + row * length * width, packed + row * row_bytes, row * groups
        for tile in range(0, length, TILE):
            tile_stop = min(tile + TILE, length)
            _unpack(source, tile_stop - tile, bits, codes, spare)
            source += TILE // 8 * bits
            for k in range(tile, tile_stop, group):
                n = min(group, tile_stop - k)
                scale = load_scale(scales + number * scale_width, scale_kind)
                bias = load_scale(biases + number * scale_width, scale_kind)
                _decode(codes + k - tile, n, scale, bias, row_out + k * width, kind, spare)
                number += 1
    restore_mode(mode)


def coding(
    x: NDArray[Any],
    scheme: Scheme,
    packed: NDArray[Any],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
    *,
    known: bool,
) -> Task:
    """See `cpu_tasks.Family`. Scales are never known beforehand."""
    rows, length = x.shape
    kernel = quantize()
    arguments = (
        *(address(x), address(packed), address(scales), address(zeros), length, scheme.group_length(length)),
        *(scales.shape[1], scheme.bits, KINDS[from_numpy(x.dtype).name], KINDS[scheme.scale_dtype]),
    )
    return Task(rows, length, lambda begin, end: kernel(*arguments, begin, end))


def decoding(
    packed: NDArray[Any], scales: NDArray[Any], zeros: NDArray[Any] | None, scheme: Scheme, out: NDArray[Any]
) -> Task:
    """See `cpu_tasks.Family`."""
    rows, length = out.shape
    kernel = dequantize()
    arguments = (
        *(address(packed), address(scales), address(zeros), address(out), length, scheme.group_length(length)),
        *(scales.shape[1], scheme.bits, KINDS[from_numpy(out.dtype).name], KINDS[scheme.scale_dtype]),
    )
    return Task(rows, length, lambda begin, end: kernel(*arguments, begin, end))
