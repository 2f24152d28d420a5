"""The CPU kernels of family kquant; what they compute: docs/numerics_kquants.md, how they are built: cpu_kernels.py.

Blocks are taken in batches of WIDE sub-blocks, and laid out twice: as they come, and transposed for the search. Codes
are a byte each, in the order of the weights, until they are joined to planes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import from_numpy
from ..grids import GRIDS
from ..schemes import Scheme
from .cpu_kernels import INF, _kernel, _part, _width
from .cpu_kquants_search import (
    ONE,
    ROW,
    SMALLEST,
    SQUARE,
    ZERO,
    scale_and_minimum,
    scale_by_descent,
    scale_by_tries,
    weigh_by_magnitude,
    weigh_raised,
)
from .cpu_kquants_vectors import (
    WIDE,
    join_32_1_2,
    join_32_1_4,
    join_32_2_0,
    join_32_2_4,
    join_32_4_0,
    join_64_4_0,
    split_32_1_2,
    split_32_1_4,
    split_32_2_0,
    split_32_2_4,
    split_32_4_0,
    split_64_4_0,
    transpose,
)
from .cpu_tasks import Task, address
from .cpu_vectors import (
    KINDS,
    LANES,
    MAGIC,
    add,
    as_bits,
    clamp,
    clear,
    div,
    ieee_mode,
    largest_unsigned,
    load,
    load_byte,
    load_codes,
    load_scale,
    move8,
    mul,
    narrow,
    restore_mode,
    scratch,
    splat,
    store,
    store_codes,
    store_low_byte,
    store_scale,
    sub,
    unsigned_max,
    without_sign,
)

WEIGHTS = 256  # of a block
HALF, FLOAT = KINDS["float16"], KINDS["float32"]
INF_HALF = 0x7C00
WHOLE = np.float32(MAGIC)
ANY = np.float32(1e-45)  # the smallest number that is not 0

# The squares of cpu_kquants_search.py: weights as they come, transposed, and three more; then one row of results each.
STAGE = 5 * SQUARE
SCALES, MINIMA = STAGE, STAGE + ROW
SCRATCH = STAGE + 2 * ROW + 64
# Of one block: codes of the weights, of the scales, of the minima.
CODES = WEIGHTS + 2 * 64
SCALE_CODES, MINIMUM_CODES = WEIGHTS, WEIGHTS + 64


# ---------------------------------------------------------------------------------------------------------------------
# Parts


@_part
def _stage(x: int, kind: int, count: int, batch: int, n: int, stage: int) -> Any:
    """`count` blocks as float32 at `stage`, zeros up to `batch`, and transposed behind; returns the highest bits."""
    width, top = _width(kind), splat(np.uint32(0))
    for i in range(0, count * WEIGHTS, LANES):
        weights = load(x + i * width, kind)
        top = unsigned_max(top, without_sign(as_bits(weights)))
        store(stage + 4 * i, weights, FLOAT)
    for i in range(count * WEIGHTS, batch * WEIGHTS, LANES):
        clear(stage + 4 * i)
    for lane in range(0, WIDE, LANES):
        for i in range(0, n, LANES):
            transpose(stage + 4 * (lane * n + i), 4 * n, stage + SQUARE + i * ROW + 4 * lane, ROW)
    return largest_unsigned(top)


@_part
def _above(values: int, parts: int, top: Any, codes: int) -> Any:
    """Values of sub-blocks as 0 .. top times a step: the multiples at `codes`; returns the step."""
    highest = ZERO
    for j in range(parts):
        value = load_scale(values + 4 * j, FLOAT)
        if value > highest:
            highest = value
    inverse = top / highest if highest > ZERO else ZERO
    store_codes(codes, add(clamp(mul(splat(inverse), load(values, FLOAT)), splat(ZERO), splat(top)), splat(WHOLE)))
    return highest / top


@_part
def _around(values: int, least: Any, low: Any, high: Any, shift: Any, codes: int) -> Any:
    """Values of 16 sub-blocks as low .. high times a step, which makes the largest one `low`.

    The multiples, plus `shift`, at `codes`; returns the step. All are 0 if the largest magnitude is below `least`.
    """
    largest = ZERO
    for j in range(16):
        value = load_scale(values + 4 * j, FLOAT)
        if abs(value) > abs(largest):
            largest = value
    if abs(largest) < least:
        store_codes(codes, splat(WHOLE))
        return ZERO
    inverse = low / largest
    rounded = add(clamp(mul(splat(inverse), load(values, FLOAT)), splat(low), splat(high)), splat(WHOLE + shift))
    store_codes(codes, rounded)
    return ONE / inverse


@_part
def _store_half(at: int, value: Any) -> int:
    """Write float16; returns 1 if it overflows."""
    raw = narrow(value, HALF)
    store_scale(at, raw, HALF)
    return 1 if raw & INF_HALF == INF_HALF else 0


@_part
def _encode(x: int, n: int, step: Any, minimum: Any, low: Any, high: Any, shift: Any, codes: int) -> None:
    """Codes of one sub-block, a byte each: clamp(rne((x + minimum) / step)) + shift; 0 where the step is 0."""
    s, m, least, most, magic = splat(step), splat(minimum), splat(low), splat(high), splat(WHOLE + shift)
    if step == ZERO:
        for i in range(0, n, LANES):
            store_codes(codes + i, splat(WHOLE))
    else:
        for i in range(0, n, LANES):
            store_codes(codes + i, add(clamp(div(add(load(x + 4 * i, FLOAT), m), s), least, most), magic))


@_part
def _with_minima(x: int, values: int, parts: int, d_at: int, scale_top: Any, top: Any, codes: int) -> int:
    """d and dmin, codes of scales and minima, and codes of one block. Returns 1 if d or dmin overflows."""
    n = WEIGHTS // parts
    over = _store_half(d_at, _above(values, parts, scale_top, codes + SCALE_CODES))
    over |= _store_half(d_at + 2, _above(values + ROW, parts, scale_top, codes + MINIMUM_CODES))
    d, dmin = load_scale(d_at, HALF), load_scale(d_at + 2, HALF)
    for j in range(parts):
        step = d * np.float32(load_byte(codes + SCALE_CODES + j))
        minimum = dmin * np.float32(load_byte(codes + MINIMUM_CODES + j))
        _encode(x + 4 * n * j, n, step, minimum, ZERO, top, ZERO, codes + n * j)
    return over


@_part
def _signed(x: int, values: int, d_at: int, least: Any, low: Any, high: Any, shift: Any, top: Any, codes: int) -> int:
    """The same without minima: scales low .. high, stored plus `shift`, codes -top .. top - 1, stored plus `top`."""
    over = _store_half(d_at, _around(values, least, low, high, shift, codes + SCALE_CODES))
    d = load_scale(d_at, HALF)
    for j in range(16):
        scale = np.float32(np.int8(load_byte(codes + SCALE_CODES + j))) - shift
        _encode(x + 64 * j, 16, d * scale, ZERO, -top, top - ONE, top, codes + 16 * j)
    return over


@_part
def _join_scales_and_minima(codes: int, out: int) -> None:
    for j in range(4):
        scale, high_scale = load_byte(codes + SCALE_CODES + j), load_byte(codes + SCALE_CODES + 4 + j)
        minimum, high_minimum = load_byte(codes + MINIMUM_CODES + j), load_byte(codes + MINIMUM_CODES + 4 + j)
        store_low_byte(out + j, np.uint32(scale | high_scale >> 4 << 6))
        store_low_byte(out + 4 + j, np.uint32(minimum | high_minimum >> 4 << 6))
        store_low_byte(out + 8 + j, np.uint32(high_scale & 15 | (high_minimum & 15) << 4))


@_part
def _split_scales_and_minima(packed: int, codes: int) -> None:
    for j in range(4):
        a, b, c = load_byte(packed + j), load_byte(packed + 4 + j), load_byte(packed + 8 + j)
        store_low_byte(codes + SCALE_CODES + j, np.uint32(a & 63))
        store_low_byte(codes + MINIMUM_CODES + j, np.uint32(b & 63))
        store_low_byte(codes + SCALE_CODES + 4 + j, np.uint32(c & 15 | a >> 6 << 4))
        store_low_byte(codes + MINIMUM_CODES + 4 + j, np.uint32(c >> 4 | b >> 6 << 4))


@_part
def _join_scales(codes: int, out: int) -> None:
    for j in range(8):
        low, high = load_byte(codes + SCALE_CODES + j), load_byte(codes + SCALE_CODES + 8 + j)
        store_low_byte(out + j, np.uint32(low & 15 | (high & 15) << 4))
    for j in range(4):
        joined = 0
        for k in range(4):
            joined |= int(load_byte(codes + SCALE_CODES + 4 * k + j)) >> 4 << 2 * k
        store_low_byte(out + 8 + j, np.uint32(joined))


@_part
def _split_scales(packed: int, codes: int) -> None:
    for j in range(16):
        low, high = load_byte(packed + j % 8) >> (j // 8 * 4), load_byte(packed + 8 + j % 4) >> (j // 4 * 2)
        store_low_byte(codes + SCALE_CODES + j, np.uint32(low & 15 | (high & 3) << 4))


@_part
def _search(grid: int, n: int, stage: int) -> None:
    x, weights, codes, more = stage + SQUARE, stage + 2 * SQUARE, stage + 3 * SQUARE, stage + 4 * SQUARE
    scales, minima = stage + SCALES, stage + MINIMA
    if grid == 3:
        scale_by_descent(x, n, 4, weights, more, codes, scales)
    elif grid == 6:
        scale_by_tries(x, n, 32, weights, more, scales)
    else:
        first, tries, absolute = np.float32(-0.5), 15, 0
        if grid == 2:
            weigh_by_magnitude(x, n, weights)
            absolute = 1
        else:
            weigh_raised(x, n, weights)
            if grid == 4:
                first, tries = -ONE, 20
        scale_and_minimum(x, n, (1 << grid) - 1, first, tries, absolute, weights, codes, scales, minima)


@_part
def _write_block(grid: int, x: int, values: int, codes: int, out: int) -> int:
    """One block of weights at `x` whose searched values are there. Returns 1 if d or dmin overflows."""
    if grid == 2:
        over = _with_minima(x, values, 16, out + 80, np.float32(15), np.float32(3), codes)
        for j in range(16):
            scale, minimum = load_byte(codes + SCALE_CODES + j), load_byte(codes + MINIMUM_CODES + j)
            store_low_byte(out + j, np.uint32(scale | minimum << 4))
        join_32_2_0(codes, out + 16)
        join_32_2_0(codes + 128, out + 48)
    elif grid == 3:
        over = _signed(x, values, out + 108, ANY, np.float32(-32), np.float32(31), np.float32(32), np.float32(4), codes)
        join_32_1_2(codes, out)
        join_32_2_0(codes, out + 32)
        join_32_2_0(codes + 128, out + 64)
        _join_scales(codes, out + 96)
    elif grid == 6:
        over = _signed(x, values, out + 208, SMALLEST, np.float32(-128), np.float32(127), ZERO, np.float32(32), codes)
        for half in range(2):
            join_64_4_0(codes + 128 * half, out + 64 * half)
            join_32_2_4(codes + 128 * half, out + 128 + 32 * half)
        move8(codes + SCALE_CODES, out + 192)
        move8(codes + SCALE_CODES + 8, out + 200)
    else:
        over = _with_minima(x, values, 8, out, np.float32(63), np.float32((1 << grid) - 1), codes)
        _join_scales_and_minima(codes, out + 4)
        out += 16
        if grid == 5:
            join_32_1_4(codes, out)
            out += 32
        for k in range(4):
            join_32_4_0(codes + 64 * k, out + 32 * k)
    return over


@_part
def _read_codes(grid: int, block: int, codes: int) -> int:
    """Codes of weights, scales and minima of one block; returns the address of d."""
    if grid == 2:
        for j in range(16):
            both = load_byte(block + j)
            store_low_byte(codes + SCALE_CODES + j, np.uint32(both & 15))
            store_low_byte(codes + MINIMUM_CODES + j, np.uint32(both >> 4))
        split_32_2_0(block + 16, codes)
        split_32_2_0(block + 48, codes + 128)
        return block + 80
    if grid == 3:
        split_32_2_0(block + 32, codes)
        split_32_2_0(block + 64, codes + 128)
        split_32_1_2(block, codes)
        _split_scales(block + 96, codes)
        return block + 108
    if grid == 6:
        for half in range(2):
            split_64_4_0(block + 64 * half, codes + 128 * half)
            split_32_2_4(block + 128 + 32 * half, codes + 128 * half)
        move8(block + 192, codes + SCALE_CODES)
        move8(block + 200, codes + SCALE_CODES + 8)
        return block + 208
    _split_scales_and_minima(block + 4, codes)
    planes = block + (48 if grid == 5 else 16)
    for k in range(4):
        split_32_4_0(planes + 32 * k, codes + 64 * k)
    if grid == 5:
        split_32_1_4(block + 16, codes)
    return block


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. A grid is known by its bits, units of work are blocks, numbered through all rows.


@_kernel
def quantize(x: int, packed: int, grid: int, block_bytes: int, kind: int, begin: int, end: int) -> tuple[int, int, int]:
    """Write blocks. Returns (finite, overflows, number of the first block that overflows or -1).

    It stops where a weight is not finite.
    """
    mode = ieee_mode()
    stage, codes = scratch(SCRATCH), scratch(CODES)
    finite, overflows, first_overflow = 1, 0, -1
    n = 32 if grid == 4 or grid == 5 else 16
    batch = WIDE * n // WEIGHTS
    for at in range(begin, end, batch):
        count = min(batch, end - at)
        if _stage(x + at * WEIGHTS * _width(kind), kind, count, batch, n, stage) >= INF:
            finite = 0
            break
        _search(grid, n, stage)
        for k in range(count):
            values = stage + SCALES + 4 * (WEIGHTS // n) * k
            if _write_block(grid, stage + 4 * WEIGHTS * k, values, codes, packed + (at + k) * block_bytes):
                first_overflow = first_overflow if overflows else at + k
                overflows += 1
    restore_mode(mode)
    return finite, overflows, first_overflow


@_kernel
def dequantize(packed: int, out: int, grid: int, block_bytes: int, kind: int, begin: int, end: int) -> None:
    """Decode into `out`, of element type `kind`."""
    mode = ieee_mode()
    codes = scratch(CODES)
    width = _width(kind)
    n = 32 if grid == 4 or grid == 5 else 16
    for at in range(begin, end):
        d_at = _read_codes(grid, packed + at * block_bytes, codes)
        d, to = load_scale(d_at, HALF), out + at * WEIGHTS * width
        if grid == 3 or grid == 6:
            shift, offset = np.float32(32 if grid == 3 else 0), splat(np.float32(4 if grid == 3 else 32))
            for j in range(16):
                step = d * (np.float32(np.int8(load_byte(codes + SCALE_CODES + j))) - shift)
                store(to + 16 * j * width, mul(splat(step), sub(load_codes(codes + 16 * j), offset)), kind)
        else:
            dmin = load_scale(d_at + 2, HALF)
            for j in range(WEIGHTS // n):
                step = splat(d * np.float32(load_byte(codes + SCALE_CODES + j)))
                minimum = splat(dmin * np.float32(load_byte(codes + MINIMUM_CODES + j)))
                for i in range(n * j, n * j + n, LANES):
                    store(to + i * width, sub(mul(step, load_codes(codes + i)), minimum), kind)
    restore_mode(mode)


# ---------------------------------------------------------------------------------------------------------------------
# Tasks, see cpu_tasks.Family.


def coding(
    x: NDArray[Any], scheme: Scheme, packed: NDArray[Any], scales: NDArray[Any], zeros: None, *, known: bool
) -> Task:
    kernel, block_bytes = quantize(), GRIDS[scheme.grid].block_bytes
    arguments = address(x), address(packed), scheme.bits, block_bytes, KINDS[from_numpy(x.dtype).name]
    return Task(x.size // WEIGHTS, WEIGHTS, lambda begin, end: kernel(*arguments, begin, end))


def decoding(packed: NDArray[Any], scales: NDArray[Any], zeros: None, scheme: Scheme, out: NDArray[Any]) -> Task:
    kernel, block_bytes = dequantize(), GRIDS[scheme.grid].block_bytes
    arguments = address(packed), address(out), scheme.bits, block_bytes, KINDS[out.dtype.name]
    return Task(out.size // WEIGHTS, WEIGHTS, lambda begin, end: kernel(*arguments, begin, end))
