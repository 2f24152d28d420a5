"""ggml's blocks of 256 weights: family kquant. docs/numerics.md."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..schemes import Scheme
from .weights import Findings


def quantize(
    x: NDArray[Any], scheme: Scheme, zeros: NDArray[Any] | None = None
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any] | None, Findings]:
    raise NotImplementedError(scheme.id)


def encode_packed(
    x: NDArray[np.float32], scales: NDArray[Any], zeros: NDArray[Any] | None, scheme: Scheme
) -> NDArray[np.uint8]:
    raise NotImplementedError(scheme.id)


def solve(
    low: NDArray[np.float32], high: NDArray[np.float32], scheme: Scheme
) -> tuple[NDArray[Any] | None, NDArray[Any] | None, Findings]:
    raise NotImplementedError(scheme.id)


def dequantize(
    packed: NDArray[np.uint8],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
    scheme: Scheme,
    length: int,
    dtype: str = "float32",
) -> NDArray[Any]:
    raise NotImplementedError(scheme.id)
