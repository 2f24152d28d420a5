"""The CUDA kernels of family ggml: their variants, grids and arguments. A tensor is one run of whole blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..dtypes import KERNEL_DTYPES, from_numpy
from ..grids import GRIDS
from ..schemes import Scheme
from .launches import BLOCK, Launch
from .variants import C_TYPES, Variant, variant

# Grids without blocks -> the dtype that their bytes are.
CASTS = {"f16": "float16", "bf16": "bfloat16"}
BLOCKS = tuple(name for name, grid in GRIDS.items() if grid.family == "ggml" and name not in CASTS)
_HELD, _DECODED = 32, 8  # weights of a thread, as in kernels/quantize_ggml.cu and dequantize_ggml.cu


def quantize(x: Any, scheme: Scheme, packed: Any, scales: Any, zeros: Any | None, counters: Any) -> Launch:
    """See `launches.Family`: a thread for each 32 weights, 8 where they are cast."""
    dtype = from_numpy(x.dtype).name
    if scheme.grid in CASTS:
        return _cast(dtype, CASTS[scheme.grid], x.size, x, packed, counters)
    n_units = x.size // _HELD
    kernel = variant("quantize_ggml", GRID=scheme.grid, IN_T=C_TYPES[dtype])
    return Launch(kernel, n_units, BLOCK, (x, packed, counters, np.int64(n_units)))


def encode(x: Any, scheme: Scheme, scales: Any, zeros: Any | None, packed: Any) -> Launch:
    """Blocks have no scale that could be known before them."""
    raise NotImplementedError(f"{scheme.id} has no granularity tensor")


def dequantize(packed: Any, scales: Any, zeros: Any | None, scheme: Scheme, out: Any) -> Launch:
    """See `launches.Family`: a thread for each 8 weights."""
    dtype = from_numpy(out.dtype).name
    if scheme.grid in CASTS:
        return _cast(CASTS[scheme.grid], dtype, out.size, packed, out, None)
    n_units = out.size // _DECODED
    kernel = variant("dequantize_ggml", GRID=scheme.grid, OUT_T=C_TYPES[dtype])
    return Launch(kernel, n_units, BLOCK, (packed, out, np.int64(n_units)))


def every() -> Iterator[Variant]:
    """See `launches.Family`."""
    for grid, dtype in itertools.product(BLOCKS, KERNEL_DTYPES):
        yield variant("quantize_ggml", GRID=grid, IN_T=C_TYPES[dtype])
        yield variant("dequantize_ggml", GRID=grid, OUT_T=C_TYPES[dtype])
    for source, target in itertools.product(KERNEL_DTYPES, KERNEL_DTYPES):
        if (source, target) != ("float32", "float32"):
            yield variant("cast_ggml", IN_T=C_TYPES[source], OUT_T=C_TYPES[target])


def _cast(source: str, target: str, n: int, x: Any, out: Any, counters: Any) -> Launch:
    kernel = variant("cast_ggml", IN_T=C_TYPES[source], OUT_T=C_TYPES[target])
    return Launch(kernel, -(-n // _DECODED), BLOCK, (x, out, counters, np.int64(n)))
