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
from ..reference import Findings
from . import Load, Reader, Result, Sizes, Solved
from .converted import convert, divisors_of
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
        # Memory only where columns are divided: weights of other types are converted by `ops`, block by block.
        self._converted = np.empty(sizes.converted, np.uint8)
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
                x = self._divided(piece, weights)
                if load.is_range:
                    low, high, findings = ops.range_of_rows(x, backend=self._backend)
                    result = Result(piece, weights, None, findings, (low, high))
                else:
                    codes, findings = self._codes(piece, x, solved)
                    result = Result(piece, weights, codes, findings)
            yield result

    def _divided(self, piece: Piece, weights: NDArray[Any]) -> NDArray[Any]:
        """The weights that are to be quantized."""
        if (divisors := divisors_of(piece)) is None:
            return weights
        x = self._converted[: 4 * weights.size].view(np.float32).reshape(weights.shape)
        convert(weights, divisors, x)
        return x

    def _codes(self, piece: Piece, x: NDArray[Any], solved: Mapping[str, Solved]) -> tuple[Codes, Findings]:
        scheme, name = piece.entry.scheme, piece.entry.info.name
        assert scheme is not None
        packed, scales, zeros = codes_in(self._results, piece)
        if scheme.granularity == "tensor":
            scale, zeros = solved[name]
            ops.encode_rows(x, scheme, scale, zeros, packed, backend=self._backend)
            return Codes(packed, scale if scale is not None else scales, zeros), Findings()
        if scheme.needs_range:
            zeros = solved[name][1]
        findings = ops.quantize_rows(x, scheme, packed, scales, zeros, backend=self._backend)
        return Codes(packed, scales, zeros), findings


def weights_view(raw: NDArray[np.uint8], piece: Piece) -> NDArray[np.generic]:
    """The bytes of a piece as its weights [rows, columns]; not always aligned to their element."""
    return np.ndarray((piece.rows, piece.columns), DTYPES[piece.entry.info.dtype].numpy, raw)


def codes_in(results: Any, piece: Piece, at: int = 0) -> Codes:
    """Arrays for the results of a piece, one after the other from position `at` of a buffer on the host or a device."""
    scheme = piece.entry.scheme
    assert scheme is not None
    whole = piece.rows, piece.columns
    parts: list[tuple[tuple[int, int], Any]] = [(scheme.packed_shape(whole), np.uint8)]
    parts.append((scheme.scales_shape(whole), DTYPES[scheme.scale_storage].numpy))
    if (zeros := scheme.zeros_shape(whole)) is not None and scheme.zeros_dtype is not None:
        parts.append((zeros, DTYPES[scheme.zeros_dtype].numpy))
    arrays = []
    for shape, dtype in parts:
        n = math.prod(shape) * np.dtype(dtype).itemsize
        arrays.append(results[at : at + n].view(dtype).reshape(shape))
        at += up(n)
    return Codes(arrays[0], arrays[1], arrays[2] if len(arrays) > 2 else None)
