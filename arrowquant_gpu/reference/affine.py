"""Whole numbers times a scale plus a bias: family affine. docs/numerics_affine.md.

Source of the formulas: ml-explore/mlx, `quantize` of its CPU backend. Scale and bias of a group are chosen so that zero
is a code; codes follow from them before they are rounded to how they are stored, as MLX has it.

    >>> import numpy as np
    >>> from arrowquant_gpu.reference import quantize, dequantize
    >>> from arrowquant_gpu.schemes import Scheme
    >>> s = Scheme.parse("affine4_g32")
    >>> packed, scales, biases, _ = quantize(np.linspace(-1, 1, 32, dtype=np.float32)[None], s)
    >>> packed[0, :2].tolist(), round(float(scales[0, 0]), 4), round(float(biases[0, 0]), 4)
    ([238, 221], -0.1429, 1.0)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..schemes import Scheme
from .integers import pack, spread, unpack
from .weights import F32, Findings, find, to_float32

# The smallest step between two codes.
LEAST = F32(1e-7)


def scales_and_biases(
    x: NDArray[np.float32], scheme: Scheme
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Scale and bias of each group of `x` [rows, length], not yet rounded; and whether they are finite as stored."""
    if x.size == 0:
        empty = np.zeros(scheme.scales_shape(x.shape), F32)
        return empty, empty, np.ones(empty.shape, np.bool_)
    starts = np.arange(0, x.shape[1], scheme.group_length(x.shape[1]))
    lo, hi = np.minimum.reduceat(x, starts, axis=1), np.maximum.reduceat(x, starts, axis=1)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        step = np.maximum((hi - lo) / F32(scheme.n_levels), LEAST)
        is_low = np.abs(lo) > np.abs(hi)
        step = np.where(is_low, step, -step)
        edge = np.where(is_low, lo, hi)
        code = np.rint(edge / step)
        is_zero = code == 0
        scales = np.where(is_zero, step, edge / np.where(is_zero, F32(1), code))
        biases = np.where(is_zero, F32(0), edge)
        stored = [a.astype(DTYPES[scheme.scale_dtype].numpy).astype(F32) for a in (step, scales, biases)]
    return scales, biases, np.isfinite(stored[0]) & np.isfinite(stored[1]) & np.isfinite(stored[2])


def quantize(
    x: NDArray[Any], scheme: Scheme, zeros: None = None
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any], Findings]:
    """See `reference.quantize`; zeros are the biases."""
    x = to_float32(x)
    findings = find(x)
    if findings.n_nan or findings.n_inf:
        x = np.zeros_like(x)
    scales, biases, is_finite = scales_and_biases(x, scheme)
    overflow = np.flatnonzero(~is_finite)
    if overflow.size:
        findings = findings._replace(n_overflow=overflow.size, first_overflow=int(overflow[0]))
    with np.errstate(all="ignore"):
        q = np.rint((x - spread(biases, x.shape, scheme)) / spread(scales, x.shape, scheme))
        # A scale of zero, of weights that are all alike and huge, gives NaN here, and code 0.
        codes = np.fmin(np.fmax(q, F32(0)), F32(scheme.n_levels)).astype(np.uint8)
        stored = [a.astype(DTYPES[scheme.scale_dtype].numpy) for a in (scales, biases)]
    return pack(codes, scheme.bits), stored[0], stored[1], findings


def dequantize(
    packed: NDArray[np.uint8],
    scales: NDArray[Any],
    zeros: NDArray[Any],
    scheme: Scheme,
    length: int,
    dtype: str = "float32",
) -> NDArray[Any]:
    """code * scale + bias in float32, two roundings, then one to `dtype`."""
    codes = unpack(packed, scheme.bits, length).astype(F32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        product = codes * spread(scales.astype(F32), codes.shape, scheme)
        weights: NDArray[Any] = (product + spread(zeros.astype(F32), codes.shape, scheme)).astype(DTYPES[dtype].numpy)
    return weights
