"""Where codes and scales lie in the blocks of ggml's K-quants. docs/numerics_kquants.md draws them.

Codes and scales are uint8 arrays, a row for each block: codes [blocks, 256] in the order of the weights, scales and
minima [blocks, sub-blocks]. Sources: llama.cpp, ggml/src/ggml-common.h, and gguf-py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def join_planes(codes: NDArray[Any], run: int, bits: int) -> Bytes:
    """Fields of `bits` to bytes: runs of `run` codes lie above each other, the first lowest, 8 / bits of them.

    [blocks, n] to [blocks, n * bits / 8]. Only the low `bits` of a code count.
    """
    fields = (codes & ((1 << bits) - 1)).astype(np.uint8).reshape(len(codes), -1, 8 // bits, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    joined: Bytes = np.bitwise_or.reduce(fields << shifts, axis=2).reshape(len(codes), -1)
    return joined


def split_planes(planes: NDArray[Any], run: int, bits: int) -> Bytes:
    """The inverse of `join_planes`: [blocks, n * bits / 8] to [blocks, n]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    fields = planes.reshape(len(planes), -1, 1, run) >> shifts
    return (fields & ((1 << bits) - 1)).astype(np.uint8).reshape(len(planes), -1)


def join_scales_and_minima(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight scales and eight minima of six bits in 12 bytes, Q4_K and Q5_K."""
    low = scales[:, :4] | scales[:, 4:] >> 4 << 6, minima[:, :4] | minima[:, 4:] >> 4 << 6
    return np.hstack([*low, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4])


def split_scales_and_minima(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The inverse of `join_scales_and_minima`."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return np.hstack([a & 63, c & 15 | a >> 6 << 4]), np.hstack([b & 63, c >> 4 | b >> 6 << 4])


def join_scales(scales: Bytes) -> Bytes:
    """Sixteen scales of six bits in 12 bytes, Q3_K: eight bytes of low nibbles, four of high pairs."""
    return np.hstack([join_planes(scales, 8, 4), join_planes(scales >> 4, 4, 2)])


def split_scales(packed: Bytes) -> Bytes:
    """The inverse of `join_scales`."""
    high = split_planes(packed[:, 8:], 4, 2)
    return (split_planes(packed[:, :8], 8, 4) | high << 4).astype(np.uint8)
