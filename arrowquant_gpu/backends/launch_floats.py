"""The CUDA kernels of family float: their variants, grids and arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..dtypes import KERNEL_DTYPES, from_numpy
from ..reference.floats import E8M0_OF_ZEROS, E8M0_ROUNDING, EXPONENT, ties_down
from ..schemes import Scheme
from .launches import BLOCK, SCALE_TYPES, Launch
from .variants import C_TYPES, Variant, variant

_CHUNK = 8  # weights that a thread handles at a time, as in kernels/common.cuh
_PIECE = 4096  # weights of one scale, where it is known
_WARP_WEIGHTS = 8192  # up to this many a warp decides a group, beyond a whole block
_SQUARE = 128
# The rule of a scale as a number, as in kernels/floats.cuh.
_KINDS = {"FLOATS": 0, "POWERS": 1, "LOCAL": 2, "GLOBAL": 3}

# Macros CODING and SCALE that occur together, and the shapes of their units.
_VARIANTS = {
    ("NF4", "FLOATS"): ("HELD", "STREAMED"),
    ("FP4", "FLOATS"): ("HELD", "STREAMED"),
    ("E2M1", "POWERS"): ("HELD",),
    ("E2M1", "GLOBAL"): ("HELD",),
    ("E2M1_DOWN", "POWERS"): ("HELD",),
    ("E2M1_DOWN", "LOCAL"): ("HELD",),
    ("E4M3", "POWERS"): ("HELD",),
    ("E4M3", "FLOATS"): ("HELD", "STREAMED", "SQUARE", "GIVEN"),
    ("E5M2", "FLOATS"): ("HELD", "STREAMED", "SQUARE", "GIVEN"),
}


def quantize(x: Any, scheme: Scheme, packed: Any, scales: Any, zeros: Any | None, counters: Any) -> Launch:
    """See `launches.Family`: a team of threads for each group, run of groups or square."""
    rows, length = x.shape
    group, run = scheme.group_length(length), 1
    lanes = _power_of_two(-(-group // (_CHUNK * (2 if scheme.scale_dtype == "e4m3" else 4))))
    if scheme.granularity == "block":
        shape, n_units, lanes = "SQUARE", scales.size, BLOCK
    elif lanes <= 32 and group * scheme.bits % 8 == 0:
        shape, n_units = "HELD", scales.size
        if length % group == 0 and group % _CHUNK == 0:
            rows, length = 1, rows * length
    else:
        run = 2 if group * scheme.bits % 8 else 1  # the fewest groups whose codes end on a byte
        shape, n_units = "STREAMED", rows * -(-length // (run * group))
        weights = min(length, run * group)
        lanes = BLOCK if weights > _WARP_WEIGHTS else max(8, min(32, _power_of_two(-(-weights // 32))))
    args = (x, packed, scales, zeros, counters, np.int64(rows), np.int64(length))
    per_row = -(-length // (run * group))
    kernel = _quantize(scheme, shape, from_numpy(x.dtype).name)
    return Launch(kernel, n_units, BLOCK // lanes, args + _rest(scheme, per_row, group, run, scales.shape[1], lanes))


def encode(x: Any, scheme: Scheme, scales: Any, zeros: Any | None, packed: Any) -> Launch:
    """See `launches.Family`: a warp for each piece."""
    rows, length = x.shape
    if length % _CHUNK == 0:
        rows, length = 1, rows * length
    per_row = -(-length // _PIECE)
    kernel = _quantize(scheme, "GIVEN", from_numpy(x.dtype).name)
    args = (x, packed, scales, zeros, None, np.int64(rows), np.int64(length))
    return Launch(kernel, rows * per_row, BLOCK // 32, args + _rest(scheme, per_row, _PIECE, 1, 0, 32))


def dequantize(packed: Any, scales: Any, zeros: Any | None, scheme: Scheme, out: Any) -> Launch:
    """See `launches.Family`: a thread for each chunk."""
    rows, length = out.shape
    group, row_scales = scheme.group_length(length), 0 if scheme.granularity == "tensor" else scales.shape[1]
    if scheme.granularity == "group" and length % group == 0 and group % _CHUNK == 0:
        rows, length = 1, rows * length
    per_row = -(-length // _CHUNK)
    args = (
        *(packed, scales, zeros, out, np.int64(rows), np.int64(length), np.int64(per_row)),
        *(np.int32(SCALE_TYPES.get(scheme.scale_dtype, 0)), np.int32(_KINDS[_scale(scheme)]), np.int64(group)),
        np.int32(group.bit_length() - 1 if group & (group - 1) == 0 else -1),
        np.int32(_SQUARE if scheme.granularity == "block" else 1),
        np.int64(row_scales),
    )
    kernel = variant("dequantize_floats", CODING=scheme.grid.upper(), OUT_T=C_TYPES[from_numpy(out.dtype).name])
    return Launch(kernel, rows * per_row, BLOCK, args)


def every() -> Iterator[Variant]:
    """See `launches.Family`."""
    for ((coding, scale), shapes), dtype in itertools.product(_VARIANTS.items(), KERNEL_DTYPES):
        for shape in shapes:
            yield variant("quantize_floats", CODING=coding, SCALE=scale, IN_T=C_TYPES[dtype], SHAPE=shape)
    for coding, dtype in itertools.product(("NF4", "FP4", "E2M1", "E4M3", "E5M2"), KERNEL_DTYPES):
        yield variant("dequantize_floats", CODING=coding, OUT_T=C_TYPES[dtype])


def _quantize(scheme: Scheme, shape: str, dtype: str) -> Variant:
    coding = "E2M1_DOWN" if scheme.grid == "e2m1" and ties_down(scheme) else scheme.grid.upper()
    return variant("quantize_floats", CODING=coding, SCALE=_scale(scheme), IN_T=C_TYPES[dtype], SHAPE=shape)


def _scale(scheme: Scheme) -> str:
    """The macro SCALE."""
    if scheme.scale_dtype == "e4m3":
        return scheme.scale_rule.upper()
    return "POWERS" if scheme.scale_dtype == "e8m0" else "FLOATS"


def _rest(scheme: Scheme, per_row: int, group: int, run: int, row_scales: int, lanes: int) -> tuple[np.generic, ...]:
    """The arguments of kernels/quantize_floats.cu from `per_row` on."""
    rounding = least = of_zeros = 0
    if scheme.scale_dtype == "e8m0":
        rounding, least = E8M0_ROUNDING[scheme.scale_rule, scheme.grid], EXPONENT[scheme.grid]
        of_zeros = E8M0_OF_ZEROS[scheme.scale_rule]
    return (
        *(np.int64(per_row), np.int32(SCALE_TYPES.get(scheme.scale_dtype, 0))),
        *(np.int32(rounding), np.int32(least), np.int32(of_zeros)),
        *(np.int64(group), np.int32(run), np.int64(row_scales), np.int32(lanes)),
    )


def _power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
