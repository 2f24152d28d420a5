"""The kernels that decode ggml's blocks: Numba functions over addresses. What they compute: docs/numerics_ggml.md."""

from __future__ import annotations

from typing import Any

import numpy as np

from .cpu_ggml_vectors import (
    as_numbers,
    e2m1_values,
    joined,
    load_fifth_bits,
    load_half_nibbles,
    load_nibbles,
    load_signed,
    nl_values,
)
from .cpu_kernels import _copy, _kernel, _part, _width
from .cpu_vectors import (
    BLOCK,
    KINDS,
    LANES,
    add,
    as_float,
    ieee_mode,
    load,
    load_byte,
    load_scale,
    mul,
    restore_mode,
    scratch,
    splat,
    store,
    sub,
)

HALF_KIND = KINDS["float16"]
HALVES, FLOATS = 2 * BLOCK, 4 * BLOCK  # bytes of BLOCK weights

# ---------------------------------------------------------------------------------------------------------------------
# Scales


@_part
def half_e8m0(e: Any) -> Any:
    """2**(e - 128), half of what the byte stands for."""
    return as_float(np.uint32((e - 1) << 23 if e > 1 else 0x200000 << e))


@_part
def half_ue4m3(u: Any) -> Any:
    """Half of what the byte stands for."""
    exponent, mantissa = u >> 3 & 15, u & 7
    if u == 0x7F:
        return np.float32(0)
    if exponent == 0:
        return np.float32(mantissa) * np.float32(0.0009765625)
    return as_float(np.uint32((exponent + 119) << 23 | mantissa << 20))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. `packed` and `out` are addresses, `kind` is the element type of `out`; blocks `begin` to `end` are done.


@_kernel
def q8(packed: int, out: int, kind: int, begin: int, end: int) -> None:
    mode = ieee_mode()
    width = _width(kind)
    for i in range(begin, end):
        source, to = packed + i * 34, out + i * 32 * width
        scale = splat(load_scale(source, HALF_KIND))
        store(to, mul(load_signed(source + 2), scale), kind)
        store(to + LANES * width, mul(load_signed(source + 2 + LANES), scale), kind)
    restore_mode(mode)


@_kernel
def signed(packed: int, out: int, bits: int, kind: int, begin: int, end: int) -> None:
    mode = ieee_mode()
    width, high_bytes = _width(kind), 4 * (bits - 4)
    zero = splat(np.float32(1 << (bits - 1)))
    for i in range(begin, end):
        source, to = packed + i * (18 + high_bytes), out + i * 32 * width
        scale = splat(load_scale(source, HALF_KIND))
        for part in range(2):
            codes = load_nibbles(source + 2 + high_bytes, 4 * part)
            if high_bytes:
                codes = joined(codes, load_fifth_bits(source + 2 + 2 * part))
            store(to + part * LANES * width, mul(sub(as_numbers(codes), zero), scale), kind)
    restore_mode(mode)


@_kernel
def ranged(packed: int, out: int, bits: int, kind: int, begin: int, end: int) -> None:
    mode = ieee_mode()
    width, high_bytes = _width(kind), 4 * (bits - 4)
    for i in range(begin, end):
        source, to = packed + i * (20 + high_bytes), out + i * 32 * width
        scale, lowest = splat(load_scale(source, HALF_KIND)), splat(load_scale(source + 2, HALF_KIND))
        for part in range(2):
            codes = load_nibbles(source + 4 + high_bytes, 4 * part)
            if high_bytes:
                codes = joined(codes, load_fifth_bits(source + 4 + 2 * part))
            store(to + part * LANES * width, add(mul(as_numbers(codes), scale), lowest), kind)
    restore_mode(mode)


@_kernel
def mxfp4(packed: int, out: int, kind: int, begin: int, end: int) -> None:
    mode = ieee_mode()
    width = _width(kind)
    for i in range(begin, end):
        source, to = packed + i * 17, out + i * 32 * width
        scale = splat(half_e8m0(np.int64(load_byte(source))))
        for part in range(2):
            store(to + part * LANES * width, mul(e2m1_values(load_nibbles(source + 1, 4 * part)), scale), kind)
    restore_mode(mode)


@_kernel
def nvfp4(packed: int, out: int, kind: int, begin: int, end: int) -> None:
    mode = ieee_mode()
    width = _width(kind)
    for i in range(begin, end):
        source, to = packed + i * 36, out + i * 64 * width
        for part in range(4):
            scale = splat(half_ue4m3(np.int64(load_byte(source + part))))
            store(to + part * LANES * width, mul(e2m1_values(load_half_nibbles(source + 4 + 8 * part)), scale), kind)
    restore_mode(mode)


@_kernel
def nl(packed: int, out: int, kind: int, begin: int, end: int) -> None:
    mode = ieee_mode()
    width = _width(kind)
    for i in range(begin, end):
        source, to = packed + i * 18, out + i * 32 * width
        scale = splat(load_scale(source, HALF_KIND))
        for part in range(2):
            store(to + part * LANES * width, mul(nl_values(load_nibbles(source + 2, 4 * part)), scale), kind)
    restore_mode(mode)


@_kernel
def cast(packed: int, out: int, n: int, source_kind: int, kind: int, begin: int, end: int) -> None:
    mode = ieee_mode()
    spare, values = scratch(HALVES), scratch(FLOATS)
    width = _width(kind)
    for i in range(begin, end):
        rest = min(n - i * BLOCK, BLOCK)
        source, to = packed + i * BLOCK * 2, out + i * BLOCK * width
        if rest < BLOCK:
            for k in range(0, rest * 2, BLOCK):
                _copy(source + k, spare + k, min(rest * 2 - k, BLOCK))
            source, to = spare, values
        for k in range(0, BLOCK, LANES):
            store(to + k * width, load(source + k * 2, source_kind), kind)
        if rest < BLOCK:
            for k in range(0, rest * width, BLOCK):
                _copy(values + k, out + i * BLOCK * width + k, min(rest * width - k, BLOCK))
    restore_mode(mode)
