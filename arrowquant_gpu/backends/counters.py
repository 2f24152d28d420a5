"""What a pass over weights on a device leaves in its counters, and how the host reads it.

The layout is the enum Counter of kernels/common.cuh. All counters start at 0 and only grow, so "the first" is kept as
2^64 - 1 minus its index.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..reference import Findings

COUNTERS = 7  # uint64 each
_RANGE = slice(5, 7)
_LAST = 2**64 - 1


def findings(counts: NDArray[np.uint64]) -> Findings:
    """The findings in counters [COUNTERS] on the host."""
    n_nan, n_inf, not_first, n_overflow, not_first_overflow = (int(n) for n in counts[:5])
    if n_nan or n_inf:  # scales of such weights mean nothing
        n_overflow = not_first_overflow = 0
    return Findings(
        n_nan,
        n_inf,
        _LAST - not_first if not_first else -1,
        n_overflow,
        _LAST - not_first_overflow if not_first_overflow else -1,
    )


def bounds(counts: NDArray[np.uint64]) -> tuple[float, float]:
    """(min(0, lowest), max(0, highest)) after `value_range`; zeros where something was not finite."""
    if counts[0] or counts[1]:
        return 0.0, 0.0
    hi, lo = counts[_RANGE].astype(np.uint32).view(np.float32) + np.float32(0)
    return float(lo), float(hi)


def write(counts: NDArray[np.uint64], found: Findings, low: float = 0.0, high: float = 0.0) -> None:
    """Add what a pass saw, as a kernel does: for devices that are not a GPU.

    >>> counts = np.zeros(COUNTERS, np.uint64)
    >>> write(counts, Findings(n_overflow=1, first_overflow=5), -1.5, 2.0)
    >>> findings(counts).first_overflow, bounds(counts)
    (5, (-1.5, 2.0))
    """
    counts[0] += np.uint64(found.n_nan)
    counts[1] += np.uint64(found.n_inf)
    counts[3] += np.uint64(found.n_overflow)
    for i, first in ((2, found.first), (4, found.first_overflow)):
        if first >= 0:
            counts[i] = max(int(counts[i]), _LAST - first)
    for i, bound in zip((5, 6), np.array([high, low], np.float32).view(np.uint32), strict=True):
        counts[i] = max(int(counts[i]), int(bound))
