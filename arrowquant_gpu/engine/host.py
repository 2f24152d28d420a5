"""`HostDevice`: slots that quantize on the host, reading a memory-mapped source where it lies."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ops, trace
from ..backends import Backend
from ..dtypes import DTYPES
from ..formats import Codes
from ..formats.pieces import Piece
from . import Load, Reader, Result, Sizes, Solved
from .loads import up


class HostDevice:
    """`n_slots` slots over one host backend; each needs room for the results of one piece, and none for its weights
    unless the reader copies them.

    `backend` is called by all slots at once, so its own threads multiply theirs.
    """

    def __init__(self, backend: Backend, reader: Reader, smallest: Sizes, n_slots: int) -> None:
        self.name, self.reader = backend.name, reader
        self.notes: tuple[str, ...] = ()
        self.slots = tuple(HostSlot(backend, reader, smallest) for _ in range(n_slots))

    def close(self) -> None:
        self.slots = ()


class HostSlot:
    """Buffers of one thread. See `Slot`."""

    def __init__(self, backend: Backend, reader: Reader, sizes: Sizes) -> None:
        self.sizes = sizes
        self._backend, self._reader = backend, reader
        self._results = np.empty(sizes.results, np.uint8)
        self._source = None if reader.slack is None else np.empty(sizes.source + reader.slack, np.uint8)

    def run(self, load: Load, solved: Mapping[str, Solved]) -> Generator[Result, None, None]:
        """See `Slot`. Each piece is quantized when it is asked for, so that its results are still in the cache."""
        with trace.span("read", load.file.name, load.n_bytes):
            data = self._reader.read(load, self._source)
        for piece in load.pieces:
            start = piece.offset - load.offset
            raw = data[start : start + piece.n_bytes]
            if piece.entry.scheme is None:
                yield Result(piece, raw)
                continue
            weights = weights_view(raw, piece)
            with trace.span("kernel", piece.entry.info.name, piece.n_bytes):
                result = self._range(piece, weights) if load.is_range else self._codes(piece, weights, solved)
            yield result

    def _range(self, piece: Piece, weights: NDArray[np.generic]) -> Result:
        low, high, findings = ops.range_of_rows(weights, backend=self._backend)
        return Result(piece, weights, None, findings, (low, high))

    def _codes(self, piece: Piece, weights: NDArray[np.generic], solved: Mapping[str, Solved]) -> Result:
        scheme, name = piece.entry.scheme, piece.entry.info.name
        assert scheme is not None
        packed, scales, zeros = codes_in(self._results, piece)
        if scheme.granularity == "tensor":
            scales, zeros = solved[name]
            ops.encode_rows(weights, scheme, scales, zeros, packed, backend=self._backend)
            return Result(piece, weights, Codes(packed, scales, zeros))
        findings = ops.quantize_rows(weights, scheme, packed, scales, zeros, backend=self._backend)
        return Result(piece, weights, Codes(packed, scales, zeros), findings)


def weights_view(raw: NDArray[np.uint8], piece: Piece) -> NDArray[np.generic]:
    """The bytes of a piece as its weights [rows, columns]; not always aligned to their element."""
    return np.ndarray((piece.rows, piece.columns), DTYPES[piece.entry.info.dtype].numpy, raw)


def codes_in(results: Any, piece: Piece, at: int = 0) -> Codes:
    """Arrays for the results of a piece, one after the other from position `at` of a buffer on the host or a device."""
    scheme = piece.entry.scheme
    assert scheme is not None
    packed, scales = (of((piece.rows, piece.columns)) for of in (scheme.packed_shape, scheme.scales_shape))
    parts: list[tuple[tuple[int, int], Any]] = [(packed, np.uint8), (scales, DTYPES[scheme.scale_dtype].numpy)]
    if not scheme.symmetric:
        parts.append((scales, np.uint8))
    arrays = []
    for shape, dtype in parts:
        n = math.prod(shape) * np.dtype(dtype).itemsize
        arrays.append(results[at : at + n].view(dtype).reshape(shape))
        at += up(n)
    return Codes(arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None)
