"""`Figures`: how far decoded weights are from the original ones, in float64, summed in one fixed order."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Rows are compared in pieces of about this many weights, so that the float64 copies stay small.
_PIECE = 1 << 18


class Errors(NamedTuple):
    """Of a block of rows: sums [4, rows] of x*x, y*y, x*y and (x-y)*(x-y), originals x and decoded y; largest |x-y|."""

    sums: NDArray[np.float64]
    largest: float


def errors(original: NDArray[Any], decoded: NDArray[Any]) -> Errors:
    """Compare two blocks [rows, length] of any float dtype; `original` is finite."""
    rows, length = original.shape
    sums, largest = np.zeros((4, rows)), 0.0
    if original.size:
        step = max(1, _PIECE // length)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            x, y = original[part].astype(np.float64), decoded[part].astype(np.float64)
            sums[:3, part] = np.sum(x * x, axis=1), np.sum(y * y, axis=1), np.sum(x * y, axis=1)
            y -= x
            largest = max(largest, float(np.abs(y).max()))
            sums[3, part] = np.sum(y * y, axis=1)
    return Errors(sums, largest)


class Figures:
    """Error figures of one tensor, from its row blocks in order.

    Each row is summed by itself and the rows are added one after the other, so the figures do not depend on how the
    tensor was cut into blocks.

        >>> figures = Figures()
        >>> figures.add(np.array([[3.0, 4.0]], np.float32), np.array([[3.0, 3.0]], np.float32))
        >>> round(figures.cosine, 4), round(figures.sqnr_db, 2), figures.max_error
        (0.9899, 13.98, 1.0)
    """

    __slots__ = ("_sums", "max_error")

    def __init__(self) -> None:
        self.max_error = 0.0
        # Of x*x, y*y, x*y and (x-y)*(x-y), for originals x and decoded y.
        self._sums = np.zeros((4, 1))

    def add(self, original: NDArray[Any], decoded: NDArray[Any]) -> None:
        """The next block: see `errors`."""
        self.extend(errors(original, decoded))

    def extend(self, block: Errors) -> None:
        """The next block, compared already."""
        self.max_error = max(self.max_error, block.largest)
        self._sums = np.cumsum(np.hstack([self._sums, block.sums]), axis=1)[:, -1:]

    @property
    def cosine(self) -> float:
        """x.y / (|x| |y|); 1 where both are all zero, 0 where one is; NaN where a decoded weight is infinite."""
        xx, yy, xy, _ = self._sums[:, 0]
        if math.isinf(yy):
            return math.nan
        if xx == 0 or yy == 0:
            return 1.0 if xx == yy else 0.0
        # One root each: the product of the sums could overflow.
        return float(xy / math.sqrt(xx) / math.sqrt(yy))

    @property
    def sqnr_db(self) -> float:
        """10 log10(|x|^2 / |x - y|^2), decibels; infinite where nothing differs."""
        xx, _, _, ee = self._sums[:, 0]
        if ee == 0:
            return math.inf
        return 10.0 * math.log10(xx / ee) if xx > 0 and ee < math.inf else -math.inf
