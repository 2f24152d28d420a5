"""Whole numbers times a scale, with or without a zero point: family int.

>>> import numpy as np
>>> from arrowquant_gpu.reference import quantize, dequantize
>>> from arrowquant_gpu.schemes import Scheme
>>> s = Scheme.parse("int4_g4")
>>> packed, scales, zeros, findings = quantize(np.array([[-1.0, 0.0, 0.5, 1.5]], np.float32), s)
>>> packed.tolist(), scales.tolist(), zeros
([[131, 250]], [[0.20000000298023224]], None)
>>> dequantize(packed, scales, zeros, s, 4).tolist()
[[-1.0, 0.0, 0.4000000059604645, 1.399999976158142]]
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..schemes import Scheme
from .weights import F32, Findings, find, to_float32

# The value that stands in for the scale of a group of zeros, per storage type: its machine epsilon.
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
# The value that stands in for a scale that underflows its storage type: the smallest positive one.
TINY = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def group_range(x: NDArray[np.float32], scheme: Scheme) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lowest and highest value of each group, zero included: two arrays of `scheme.scales_shape(x.shape)`.

    `x` is [rows, length]. Adding +0.0 makes a -0.0 bound +0.0, whatever order a minimum takes its operands in.
    """
    if x.size == 0:
        empty = np.zeros(scheme.scales_shape(x.shape), F32)
        return empty, empty
    if scheme.granularity == "tensor":
        x = x.reshape(1, -1)
    starts = np.arange(0, x.shape[1], scheme.group_length(x.shape[1]))
    lo = np.minimum(np.minimum.reduceat(x, starts, axis=1), F32(0)) + F32(0)
    hi = np.maximum(np.maximum.reduceat(x, starts, axis=1), F32(0)) + F32(0)
    return lo, hi


def scales_and_zeros(
    lo: NDArray[np.float32], hi: NDArray[np.float32], scheme: Scheme
) -> tuple[NDArray[Any], NDArray[np.uint8] | None, Findings]:
    """The `minmax` solver: the scale as stored, the zero point as stored (None if symmetric), and overflows.

    Formulas: compressed-tensors, `calculate_qparams`; docs/numerics.md, sections 4 and 5.
    """
    if scheme.symmetric:
        exact = np.maximum(-lo, hi) / F32(scheme.n_levels / 2)
    else:
        with np.errstate(over="ignore"):
            span = hi - lo
            halved = (hi * F32(0.5) - lo * F32(0.5)) / F32(scheme.n_levels / 2)
            exact = np.where(np.isinf(span), halved, span / F32(scheme.n_levels))
    with np.errstate(over="ignore", under="ignore"):
        stored = exact.astype(DTYPES[scheme.scale_dtype].numpy)
    is_zero = (lo == 0) & (hi == 0)
    stored = np.where(is_zero, F32(EPS[scheme.scale_dtype]), stored.astype(F32))
    stored = np.where(stored == 0, F32(TINY[scheme.scale_dtype]), stored)
    overflow = np.flatnonzero(np.isinf(stored))
    findings = Findings(n_overflow=overflow.size, first_overflow=int(overflow[0]) if overflow.size else -1)
    if scheme.symmetric:
        return stored.astype(DTYPES[scheme.scale_dtype].numpy), None, findings
    signed = np.clip(np.rint(F32(-scheme.offset) - lo / stored), -scheme.offset, scheme.offset - 1)
    zeros = (signed + scheme.offset).astype(np.uint8)
    return stored.astype(DTYPES[scheme.scale_dtype].numpy), zeros, findings


def spread(per_group: NDArray[Any], shape: tuple[int, int], scheme: Scheme) -> NDArray[Any]:
    """Repeat one value per group to one value per weight of a [rows, length] tensor."""
    length = shape[1]
    if per_group.size == 0 or scheme.granularity == "tensor":
        return np.broadcast_to(per_group.reshape(-1)[:1] if per_group.size else np.zeros(1, per_group.dtype), shape)
    return np.repeat(per_group, scheme.group_length(length), axis=1)[:, :length]


def encode(
    x: NDArray[np.float32], scales: NDArray[Any], zeros: NDArray[Any] | None, scheme: Scheme
) -> NDArray[np.uint8]:
    """Stored codes, one per byte, shape of `x` [rows, length]: clamp(rne(x / scale + zero)) in signed codes."""
    with np.errstate(all="ignore"):
        q = x / spread(scales.astype(F32), x.shape, scheme)
        if zeros is not None:
            q = q + (spread(zeros, x.shape, scheme).astype(F32) - F32(scheme.offset))
        q = np.clip(np.rint(q), -scheme.offset, scheme.offset - 1)
    codes: NDArray[np.uint8] = (q + scheme.offset).astype(np.uint8)
    return codes


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[rows, length] codes to [rows, ceil(length * bits / 8)] bytes, as drawn in schemes.py."""
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(stream.reshape(codes.shape[0], codes.shape[1] * bits), axis=-1, bitorder="little")


def unpack(packed: NDArray[np.uint8], bits: int, length: int) -> NDArray[np.uint8]:
    """The inverse of `pack` for rows of `length` codes."""
    stream = np.unpackbits(packed, axis=-1, count=length * bits, bitorder="little")
    return np.packbits(stream.reshape(packed.shape[0], length, bits), axis=-1, bitorder="little")[..., 0]


def encode_packed(
    x: NDArray[np.float32], scales: NDArray[Any], zeros: NDArray[Any] | None, scheme: Scheme
) -> NDArray[np.uint8]:
    """`encode`, packed."""
    return pack(encode(x, scales, zeros, scheme), scheme.bits)


solve = scales_and_zeros


def quantize(
    x: NDArray[Any], scheme: Scheme, zeros: None = None
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8] | None, Findings]:
    """Quantize a [rows, length] tensor of any numeric type: packed codes, scales, zero points, findings.

    Where the findings count anything, the other three are not defined.
    """
    x = to_float32(x)
    findings = find(x)
    if findings.n_nan or findings.n_inf:
        x = np.zeros_like(x)
    lo, hi = group_range(x, scheme)
    scales, zero_points, overflow = scales_and_zeros(lo, hi, scheme)
    findings = findings._replace(n_overflow=overflow.n_overflow, first_overflow=overflow.first_overflow)
    return encode_packed(x, scales, zero_points, scheme), scales, zero_points, findings


def dequantize(
    packed: NDArray[np.uint8],
    scales: NDArray[Any],
    zeros: NDArray[np.uint8] | None,
    scheme: Scheme,
    length: int,
    dtype: str = "float32",
) -> NDArray[Any]:
    """(code - zero) * scale in float32, then one rounding to `dtype`: an array [rows, length]."""
    codes = unpack(packed, scheme.bits, length).astype(F32)
    shape = codes.shape
    zero = F32(scheme.offset) if zeros is None else spread(zeros, shape, scheme).astype(F32)
    with np.errstate(over="ignore", under="ignore"):
        weights: NDArray[np.float32] = (codes - zero) * spread(scales.astype(F32), shape, scheme)
        return weights.astype(DTYPES[dtype].numpy)
