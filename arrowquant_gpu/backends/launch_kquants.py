"""The CUDA kernels of family kquant: their variants, grids and arguments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np

from ..dtypes import KERNEL_DTYPES, from_numpy
from ..grids import GRIDS
from ..schemes import Scheme
from .launches import BLOCK, Launch
from .variants import C_TYPES, Variant, variant

_WEIGHTS = 256  # of a block
_RUN = 16  # weights that a thread decodes, as in kernels/dequantize_kquants.cu


def quantize(x: Any, scheme: Scheme, packed: Any, scales: Any, zeros: Any | None, counters: Any) -> Launch:
    """See `launches.Family`: a thread for each sub-block, which are 8 of a block for 4 and 5 bits, else 16."""
    kernel = variant("quantize_kquants", BITS=scheme.bits, IN_T=C_TYPES[from_numpy(x.dtype).name])
    blocks, parts = x.size // _WEIGHTS, 8 if scheme.bits in (4, 5) else 16
    return Launch(kernel, blocks, BLOCK // parts, (x, packed, counters, np.int64(blocks)))


def encode(x: Any, scheme: Scheme, scales: Any, zeros: Any | None, packed: Any) -> NoReturn:
    raise NotImplementedError(f"{scheme} has no granularity tensor")


def dequantize(packed: Any, scales: Any, zeros: Any | None, scheme: Scheme, out: Any) -> Launch:
    """See `launches.Family`: a thread for 16 weights."""
    kernel = variant("dequantize_kquants", BITS=scheme.bits, OUT_T=C_TYPES[from_numpy(out.dtype).name])
    runs = out.size // _RUN
    return Launch(kernel, runs, BLOCK, (packed, out, np.int64(runs)))


def every() -> Iterator[Variant]:
    """See `launches.Family`."""
    bits = [grid.bits for grid in GRIDS.values() if grid.family == "kquant"]
    for width, dtype in itertools.product(bits, KERNEL_DTYPES):
        yield variant("quantize_kquants", BITS=width, IN_T=C_TYPES[dtype])
        yield variant("dequantize_kquants", BITS=width, OUT_T=C_TYPES[dtype])
