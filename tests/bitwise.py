"""The one comparator of arrays: equal bytes, or an AssertionError that shows where they part."""

from __future__ import annotations

import numpy as np


def assert_bitwise_equal(got: np.ndarray, want: np.ndarray, what: str = "array") -> None:
    """Raise unless both arrays have the same shape, dtype and bytes (NaN payloads and zero signs included)."""
    got, want = np.asarray(got), np.asarray(want)
    if got.dtype != want.dtype or got.shape != want.shape:
        raise AssertionError(f"{what}: got {got.dtype} {got.shape}, want {want.dtype} {want.shape}")
    if want.size == 0:
        return
    width = want.dtype.itemsize
    a = np.ascontiguousarray(got).reshape(-1).view(np.uint8).reshape(-1, width)
    b = np.ascontiguousarray(want).reshape(-1).view(np.uint8).reshape(-1, width)
    bad = np.flatnonzero((a != b).any(axis=1))
    if bad.size:
        at = tuple(int(i) for i in np.unravel_index(bad[0], want.shape))
        raise AssertionError(
            f"{what}: {bad.size} of {want.size} elements differ, the first at {at}: got {got[at]!r}, want {want[at]!r}"
        )
