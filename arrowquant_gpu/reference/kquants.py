"""ggml's blocks of 256 weights, whose scales are quantized too: family kquant. docs/numerics_kquants.md.

>>> import numpy as np
>>> from arrowquant_gpu.reference import quantize, dequantize
>>> from arrowquant_gpu.schemes import Scheme
>>> s = Scheme.parse("q4_k")
>>> x = np.linspace(-1, 1, 256, dtype=np.float32)[None]
>>> packed, scales, zeros, findings = quantize(x, s)
>>> packed.shape, scales.shape, zeros
((1, 144), (1, 0), None)
>>> bool(np.abs(dequantize(packed, scales, zeros, s, 256) - x).max() < 0.05)
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..grids import GRIDS
from ..schemes import Scheme
from .kquants_layout import (
    join_planes,
    join_scales,
    join_scales_and_minima,
    split_planes,
    split_scales,
    split_scales_and_minima,
)
from .kquants_search import (
    SMALLEST,
    Fit,
    Floats,
    divide,
    first_largest,
    magnitude_weights,
    nearest,
    raised_weights,
    scale_and_minimum,
    scale_by_descent,
    scale_by_tries,
)
from .weights import F32, Findings, find, to_float32

Bytes = NDArray[np.uint8]

FITS: Mapping[str, Fit] = {
    "q2_k": Fit(top=3, first=-0.5, tries=15, absolute=True),
    "q4_k": Fit(top=15, first=-1.0, tries=20, absolute=False),
    "q5_k": Fit(top=31, first=-0.5, tries=15, absolute=False),
}
# The largest quantized scale and minimum of those.
SCALE_TOPS = {"q2_k": 15, "q4_k": 63, "q5_k": 63}


def _stored(d: Floats) -> tuple[Bytes, Floats, NDArray[np.bool_]]:
    """A float32 of each block as float16: its two bytes, its value, and whether it overflows."""
    half = d.astype(np.float16)
    value: Floats = half.astype(F32)
    return np.ascontiguousarray(half)[:, None].view(np.uint8), value, ~np.isfinite(value)


def _loaded(halves: Bytes) -> Floats:
    """The inverse: two bytes of each block to [blocks, 1]."""
    value: Floats = np.ascontiguousarray(halves).view("<f2").astype(F32)
    return value


def _above(values: Floats, top: int) -> tuple[Bytes, Floats]:
    """Values of the sub-blocks as 0 .. top times a step: the multiples, and the step of each block, float32."""
    highest = np.zeros(len(values), F32)
    for j in range(values.shape[1]):
        highest = np.where(values[:, j] > highest, values[:, j], highest)
    inverse = divide(F32(top), highest, highest > 0)
    return nearest(inverse[:, None] * values, 0, top).astype(np.uint8), highest / F32(top)


def _code(x: Floats, step: Floats, minimum: Floats, top: int) -> Bytes:
    """Codes of [blocks, sub-blocks, n] weights with decoded scales and minima; 0 where the scale is 0."""
    step, minimum = step[..., None], minimum[..., None]
    codes: Bytes = nearest(divide(x + minimum, step, step != 0), 0, top).astype(np.uint8)
    return np.where(step != 0, codes, 0).astype(np.uint8).reshape(len(x), 256)


def _signed_code(x: Floats, step: Floats, top: int) -> Bytes:
    """The same for codes -top .. top - 1 without minima, stored as code + top."""
    step = step[..., None]
    codes = nearest(divide(x, step, step != 0), -top, top - 1) + F32(top)
    return np.where(step != 0, codes, 0).astype(np.uint8).reshape(len(x), 256)


def _with_minima(x: Floats, grid: str) -> tuple[Bytes, Bytes, Bytes, Bytes, Bytes, NDArray[np.bool_]]:
    """Q2_K, Q4_K, Q5_K: bytes of d and dmin, scales, minima, codes, and which blocks overflow."""
    fit, weights = FITS[grid], magnitude_weights if grid == "q2_k" else raised_weights
    by_number = np.ascontiguousarray(x.reshape(-1, x.shape[2]).T)
    scales, minima = scale_and_minimum(by_number, weights(by_number), fit)
    scale_codes, d = _above(scales.reshape(x.shape[:2]), SCALE_TOPS[grid])
    minimum_codes, dmin = _above(minima.reshape(x.shape[:2]), SCALE_TOPS[grid])
    d_bytes, d, over = _stored(d)
    dmin_bytes, dmin, min_over = _stored(dmin)
    codes = _code(x, d[:, None] * scale_codes.astype(F32), dmin[:, None] * minimum_codes.astype(F32), fit.top)
    return d_bytes, dmin_bytes, scale_codes, minimum_codes, codes, over | min_over


def _q2_k(x: Floats) -> tuple[Bytes, NDArray[np.bool_]]:
    d, dmin, scales, minima, codes, over = _with_minima(x.reshape(-1, 16, 16), "q2_k")
    return np.hstack([scales | minima << 4, join_planes(codes, 32, 2), d, dmin]), over


def _q3_k(x: Floats) -> tuple[Bytes, NDArray[np.bool_]]:
    scales = scale_by_descent(np.ascontiguousarray(x.reshape(-1, 16).T), 4).reshape(-1, 16)
    largest = first_largest(scales.T)
    inverse = divide(F32(-32), largest, largest != 0)
    is_scaled = (largest != 0)[:, None]
    scale_codes = np.where(is_scaled, nearest(inverse[:, None] * scales, -32, 31) + F32(32), F32(0)).astype(np.uint8)
    d_bytes, d, over = _stored(divide(F32(1), inverse, largest != 0))
    codes = _signed_code(x.reshape(-1, 16, 16), d[:, None] * (scale_codes.astype(F32) - F32(32)), 4)
    return np.hstack(
        [join_planes(codes >> 2, 32, 1), join_planes(codes, 32, 2), join_scales(scale_codes), d_bytes]
    ), over


def _q4_k(x: Floats) -> tuple[Bytes, NDArray[np.bool_]]:
    d, dmin, scales, minima, codes, over = _with_minima(x.reshape(-1, 8, 32), "q4_k")
    return np.hstack([d, dmin, join_scales_and_minima(scales, minima), join_planes(codes, 32, 4)]), over


def _q5_k(x: Floats) -> tuple[Bytes, NDArray[np.bool_]]:
    d, dmin, scales, minima, codes, over = _with_minima(x.reshape(-1, 8, 32), "q5_k")
    packed = [join_scales_and_minima(scales, minima), join_planes(codes >> 4, 32, 1), join_planes(codes, 32, 4)]
    return np.hstack([d, dmin, *packed]), over


def _q6_k(x: Floats) -> tuple[Bytes, NDArray[np.bool_]]:
    scales = scale_by_tries(np.ascontiguousarray(x.reshape(-1, 16).T), 32).reshape(-1, 16)
    largest = first_largest(scales.T)
    is_scaled = np.abs(largest) >= SMALLEST
    inverse = divide(F32(-128), largest, is_scaled)
    scale_codes = nearest(inverse[:, None] * scales, -128, 127)
    d_bytes, d, over = _stored(divide(F32(1), inverse, is_scaled))
    codes = _signed_code(x.reshape(-1, 16, 16), d[:, None] * scale_codes, 32)
    scale_bytes = scale_codes.astype(np.int8).view(np.uint8)
    return np.hstack([join_planes(codes, 64, 4), join_planes(codes >> 4, 32, 2), scale_bytes, d_bytes]), over


_BLOCKS: Mapping[str, Callable[[Floats], tuple[Bytes, NDArray[np.bool_]]]] = {
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


def quantize(x: NDArray[Any], scheme: Scheme, zeros: None = None) -> tuple[Bytes, NDArray[Any], None, Findings]:
    """Quantize a [rows, length] tensor of any numeric type, `length` a multiple of 256: packed blocks, and findings.

    `scales` is [rows, 0]: the blocks hold them. `first_overflow` is the row-major number of a block whose d or dmin is
    beyond float16. Where the findings count anything, the blocks are not defined.
    """
    x = to_float32(x)
    findings = find(x)
    if findings.n_nan or findings.n_inf:
        x = np.zeros_like(x)
    with np.errstate(all="ignore"):
        packed, over = _BLOCKS[scheme.grid](x.reshape(-1, 256))
    overflow = np.flatnonzero(over)
    findings = findings._replace(n_overflow=overflow.size, first_overflow=int(overflow[0]) if overflow.size else -1)
    return packed.reshape(scheme.packed_shape(x.shape)), np.zeros((len(x), 0), np.float16), None, findings


def encode_packed(x: NDArray[np.float32], scales: NDArray[Any], zeros: None, scheme: Scheme) -> NoReturn:
    raise NotImplementedError(f"{scheme} has no granularity tensor")


def solve(low: NDArray[np.float32], high: NDArray[np.float32], scheme: Scheme) -> NoReturn:
    raise NotImplementedError(f"{scheme} has no granularity tensor")


def dequantize(
    packed: Bytes, scales: NDArray[Any], zeros: None, scheme: Scheme, length: int, dtype: str = "float32"
) -> NDArray[Any]:
    """Decode in float32 as gguf-py does, then one rounding to `dtype`: an array [rows, length]."""
    blocks = packed.reshape(-1, GRIDS[scheme.grid].block_bytes)
    with np.errstate(all="ignore"):
        weights = _DECODERS[scheme.grid](blocks)
        return weights.reshape(len(packed), length).astype(DTYPES[dtype].numpy)


def _times(step: Floats, codes: NDArray[Any], offset: int) -> Floats:
    """step * (code - offset), a step for each sub-block."""
    values: Floats = step[..., None] * (codes.reshape(*step.shape, -1).astype(F32) - F32(offset))
    return values


def _decode_q2_k(blocks: Bytes) -> Floats:
    packed, planes, d, dmin = np.split(blocks, [16, 80, 82], axis=1)
    step, minimum = _loaded(d) * (packed & 15).astype(F32), _loaded(dmin) * (packed >> 4).astype(F32)
    weights: Floats = _times(step, split_planes(planes, 32, 2), 0) - minimum[..., None]
    return weights


def _decode_q3_k(blocks: Bytes) -> Floats:
    high, low, packed, d = np.split(blocks, [32, 96, 108], axis=1)
    step = _loaded(d) * (split_scales(packed).astype(F32) - F32(32))
    return _times(step, split_planes(low, 32, 2) | split_planes(high, 32, 1) << 2, 4)


def _decode_q4_k(blocks: Bytes) -> Floats:
    d, dmin, packed, nibbles = np.split(blocks, [2, 4, 16], axis=1)
    return _decode_with_minima(d, dmin, packed, split_planes(nibbles, 32, 4))


def _decode_q5_k(blocks: Bytes) -> Floats:
    d, dmin, packed, high, nibbles = np.split(blocks, [2, 4, 16, 48], axis=1)
    return _decode_with_minima(d, dmin, packed, split_planes(nibbles, 32, 4) | split_planes(high, 32, 1) << 4)


def _decode_with_minima(d: Bytes, dmin: Bytes, packed: Bytes, codes: NDArray[Any]) -> Floats:
    scales, minima = split_scales_and_minima(packed)
    step, minimum = _loaded(d) * scales.astype(F32), _loaded(dmin) * minima.astype(F32)
    weights: Floats = _times(step, codes, 0) - minimum[..., None]
    return weights


def _decode_q6_k(blocks: Bytes) -> Floats:
    low, high, scales, d = np.split(blocks, [128, 192, 208], axis=1)
    step = _loaded(d) * np.ascontiguousarray(scales).view(np.int8).astype(F32)
    return _times(step, split_planes(low, 64, 4) | split_planes(high, 32, 2) << 4, 32)


_DECODERS: Mapping[str, Callable[[Bytes], Floats]] = {
    "q2_k": _decode_q2_k,
    "q3_k": _decode_q3_k,
    "q4_k": _decode_q4_k,
    "q5_k": _decode_q5_k,
    "q6_k": _decode_q6_k,
}
