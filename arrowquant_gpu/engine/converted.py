"""Weights that become float32 on the host before a kernel sees them: those of types that kernels cannot read, and those
whose columns are divided before they are quantized. What is decoded is multiplied again. docs/diffusion.md."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import KERNEL_DTYPES
from ..formats import Entry
from ..formats.pieces import Piece
from ..reference import to_float32

# Weights at a time: their float32 form is still in the cache when it is divided and copied.
CONVERTED = 1 << 16


def is_converted(piece: Piece) -> bool:
    """Whether the weights of a quantized piece are not read by kernels as they lie in the source."""
    return piece.entry.info.dtype not in KERNEL_DTYPES or divisors_of(piece) is not None


def divisors_of(piece: Piece) -> NDArray[np.float32] | None:
    """The divisors of the columns of a quantized piece, float32 [columns], None where it has none."""
    return columns_of(piece.entry, piece.column, piece.columns)


def columns_of(entry: Entry, first: int, n: int) -> NDArray[np.float32] | None:
    """The divisors of `n` columns of a quantized tensor from that of weight number `first` (row-major) on."""
    divisors = None if entry.diffusion is None or entry.scheme is None else entry.diffusion.divisors
    if divisors is None:
        return None
    start = first % max(1, divisors.size)
    return divisors[start : start + n]


def convert(x: NDArray[Any], divisors: NDArray[np.float32] | None, out: NDArray[np.float32]) -> None:
    """Write weights `x` [rows, columns] of any numeric type to `out` as float32, then divided by `divisors` [columns].

    Each is one rounding (numerics.md, section 2; one IEEE float32 division).

    >>> out = np.empty((1, 2), np.float32)
    >>> convert(np.array([[3.0, 4.0]]), np.array([2, 8], np.float32), out)
    >>> out.tolist()
    [[1.5, 0.5]]
    """
    rows, columns = x.shape
    step = max(1, CONVERTED // max(1, columns))
    # What is not finite stays so, and is found by the kernel.
    with np.errstate(all="ignore"):
        for row in range(0, rows, step):
            for column in range(0, columns, CONVERTED):
                within = slice(column, column + CONVERTED)
                part = out[row : row + step, within]
                part[...] = to_float32(x[row : row + step, within])
                if divisors is not None:
                    part /= divisors[within]


def recover(decoded: NDArray[np.float32], divisors: NDArray[np.float32] | None) -> None:
    """Multiply decoded weights [rows, columns] by `divisors` [columns] in place, one IEEE float32 product each."""
    if divisors is not None:
        with np.errstate(over="ignore", under="ignore"):
            decoded *= divisors
