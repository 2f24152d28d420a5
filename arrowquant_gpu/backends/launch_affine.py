"""The CUDA kernels of family affine: their variants, grids and arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..dtypes import KERNEL_DTYPES, from_numpy
from ..schemes import BITS, Scheme
from .launches import BLOCK, SCALE_TYPES, Launch
from .variants import C_TYPES, Variant, variant

_HELD = 32  # weights of a thread, as in kernels/quantize_affine.cu


def quantize(x: Any, scheme: Scheme, packed: Any, scales: Any, zeros: Any | None, counters: Any) -> Launch:
    """See `launches.Family`: a team of threads for each group."""
    group = scheme.group_length(x.shape[1])
    kernel = variant("quantize_affine", BITS=scheme.bits, IN_T=C_TYPES[from_numpy(x.dtype).name])
    args = (x, packed, scales, zeros, counters, *_shape(x.shape, scheme, scales))
    return Launch(kernel, scales.size, BLOCK // (group // _HELD), args)


def dequantize(packed: Any, scales: Any, zeros: Any | None, scheme: Scheme, out: Any) -> Launch:
    """See `launches.Family`: a thread for 8 weights."""
    kernel = variant("dequantize_affine", BITS=scheme.bits, OUT_T=C_TYPES[from_numpy(out.dtype).name])
    args = (packed, scales, zeros, out, *_shape(out.shape, scheme, scales))
    return Launch(kernel, out.shape[0] * -(-out.shape[1] // 8), BLOCK, args)


def every() -> Iterator[Variant]:
    """See `launches.Family`."""
    for bits, dtype in itertools.product(BITS, KERNEL_DTYPES):
        yield variant("quantize_affine", BITS=bits, IN_T=C_TYPES[dtype])
        yield variant("dequantize_affine", BITS=bits, OUT_T=C_TYPES[dtype])


def _shape(shape: tuple[int, int], scheme: Scheme, scales: Any) -> tuple[np.generic, ...]:
    """The arguments from `rows` to `group` that both kernels have."""
    return (
        *(np.int64(shape[0]), np.int64(shape[1]), np.int64(scales.shape[1])),
        *(np.int32(SCALE_TYPES[scheme.scale_dtype]), np.int32(scheme.group_length(shape[1]))),
    )
