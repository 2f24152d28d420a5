"""What all families have in common: weights as float32, and what is found in them that is not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

F32 = np.float32


class Findings(NamedTuple):
    """What a pass saw in the weights: counts, and flat indices of the first (-1 where the count is 0).

    `first` counts weights in row-major order; `first_overflow` counts scales in row-major order.
    """

    n_nan: int = 0
    n_inf: int = 0
    first: int = -1
    n_overflow: int = 0
    first_overflow: int = -1


def to_float32(x: NDArray[Any]) -> NDArray[np.float32]:
    """Convert to float32 with one rounding; values beyond its range become infinite (and are then refused)."""
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(F32)


def find(x: NDArray[np.float32]) -> Findings:
    """Count what is not finite in `x`, of any shape."""
    nan, inf = np.isnan(x).reshape(-1), np.isinf(x).reshape(-1)
    bad = np.flatnonzero(nan | inf)
    return Findings(int(nan.sum()), int(inf.sum()), int(bad[0]) if bad.size else -1)
