"""The specification in plain NumPy. docs/numerics.md says the same in words; every backend equals this bit for bit.

Operation order is part of the definition: each arithmetic line is one IEEE float32 operation per element, rounded to
nearest even. Nothing here is fast, and nothing here may be changed for speed.

Each family of grids (grids.py) is a module with the same four functions, which these here choose among:

    quantize       [rows, length] weights to packed codes, scales, what is stored beside them, and findings
    encode_packed  the codes alone, with a scale that is already known: granularity tensor
    solve          from the range of a whole tensor, its scale or global scale
    dequantize     back to weights
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemes import Scheme
from . import affine, floats, ggml, integers, kquants
from .integers import EPS, TINY, encode, group_range, pack, scales_and_zeros, spread, unpack
from .weights import F32, Findings, find, to_float32

__all__ = [
    "EPS",
    "F32",
    "TINY",
    "Findings",
    "dequantize",
    "encode",
    "encode_packed",
    "find",
    "group_range",
    "pack",
    "quantize",
    "scales_and_zeros",
    "solve",
    "spread",
    "to_float32",
    "unpack",
]

FAMILIES: dict[str, ModuleType] = {
    "int": integers,
    "affine": affine,
    "float": floats,
    "ggml": ggml,
    "kquant": kquants,
}


def quantize(
    x: NDArray[Any], scheme: Scheme, zeros: NDArray[Any] | None = None
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any] | None, Findings]:
    """Quantize a [rows, length] tensor of any numeric type: packed codes, scales, zeros, findings.

    `zeros` is the global scale of a scheme that has one, float32 [1, 1]; by default that of `x` itself. Where the
    findings count anything, the other three are not defined.
    """
    found: tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any] | None, Findings]
    found = FAMILIES[scheme.family].quantize(x, scheme, zeros)
    return found


def encode_packed(
    x: NDArray[np.float32], scales: NDArray[Any], zeros: NDArray[Any] | None, scheme: Scheme
) -> NDArray[np.uint8]:
    """Packed codes of weights with known scales, for granularity tensor."""
    packed: NDArray[np.uint8] = FAMILIES[scheme.family].encode_packed(x, scales, zeros, scheme)
    return packed


def solve(
    low: NDArray[np.float32], high: NDArray[np.float32], scheme: Scheme
) -> tuple[NDArray[Any] | None, NDArray[Any] | None, Findings]:
    """What follows from the range of a whole tensor, arrays [1, 1]: (scale, zeros), None for what does not."""
    solved: tuple[NDArray[Any] | None, NDArray[Any] | None, Findings] = FAMILIES[scheme.family].solve(low, high, scheme)
    return solved


def dequantize(
    packed: NDArray[np.uint8],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
    scheme: Scheme,
    length: int,
    dtype: str = "float32",
) -> NDArray[Any]:
    """Decode in float32, then one rounding to `dtype`: an array [rows, length]."""
    weights: NDArray[Any] = FAMILIES[scheme.family].dequantize(packed, scales, zeros, scheme, length, dtype)
    return weights
