"""A sink as plain as can be, for tests of the engine: a directory with one file for each array of each tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.formats import Checkpoint, Codes, Entry, Place, TensorInfo
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.pieces import Cut, Piece, pieces
from arrowquant_gpu.schemes import Scheme, rows_and_length

ANYWHERE = Cut(within_rows=True)


class PlainSink:
    """Tensor number i becomes the files i.bytes, or i.packed, i.scales and i.zeros."""

    format = "plain"

    def __init__(self, output: Output, cut: Cut = ANYWHERE) -> None:
        self.output, self.cut = output, cut
        self.numbers: dict[str, int] = {}

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        return scheme

    def n_bytes(self, entry: Entry) -> int:
        return entry.info.n_bytes if entry.scheme is None else entry.scheme.n_bytes(entry.info.shape)

    def pieces(self, entry: Entry) -> list[Piece]:
        return pieces(entry, self.cut)

    def open(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        for i, entry in enumerate(entries):
            self.numbers[entry.info.name] = i
            for name, n_bytes in self.files(entry):
                self.output.create(name, n_bytes)

    def files(self, entry: Entry) -> list[tuple[str, int]]:
        """Names and sizes of a tensor's files."""
        i, scheme, shape = self.numbers[entry.info.name], entry.scheme, entry.info.shape
        if scheme is None:
            return [(f"{i}.bytes", entry.info.n_bytes)]
        n_scales = math.prod(scheme.scales_shape(shape))
        found = [(f"{i}.packed", math.prod(scheme.packed_shape(shape)))]
        found.append((f"{i}.scales", n_scales * DTYPES[scheme.scale_dtype].bits // 8))
        return found if scheme.symmetric else [*found, (f"{i}.zeros", n_scales)]

    def places(self, piece: Piece) -> list[Place]:
        entry, scheme = piece.entry, piece.entry.scheme
        names = [name for name, _ in self.files(entry)]
        if scheme is None:
            return [Place(names[0], piece.column, piece.n_bytes)]
        shape = piece.rows, piece.columns
        length = rows_and_length(entry.info.shape)[1]
        row_bytes, width = scheme.packed_shape((1, length))[1], DTYPES[scheme.scale_dtype].bits // 8
        at = piece.row * row_bytes + piece.column * scheme.bits // 8
        found = [Place(names[0], at, math.prod(scheme.packed_shape(shape)))]
        n, first = math.prod(scheme.scales_shape(shape)), 0
        if scheme.granularity == "tensor":
            n = n if piece.number == 0 else 0
        else:
            first = piece.row * scheme.scales_shape((1, length))[1] + piece.column // scheme.group_length(length)
        found.append(Place(names[1], first * width, n * width))
        return found if scheme.symmetric else [*found, Place(names[2], first, n)]

    def stored(self, piece: Piece, codes: Codes | np.ndarray) -> list[Any]:
        if not isinstance(codes, Codes):
            return [codes]
        scheme = piece.entry.scheme
        assert scheme is not None
        once = slice(0 if scheme.granularity == "tensor" and piece.number else None)
        arrays = [codes.packed, codes.scales[once]]
        return arrays if codes.zeros is None else [*arrays, codes.zeros[once]]

    def finish(self, entry: Entry) -> None:
        """See `Sink`. Nothing follows from several pieces."""

    def commit(self) -> tuple[Path, ...]:
        return self.output.commit()


def read_back(folder: Path, number: int, entry: Entry) -> list[np.ndarray]:
    """The arrays of tensor number i: bytes, or packed, scales and zeros."""
    scheme = entry.scheme
    if scheme is None:
        return [np.fromfile(folder / f"{number}.bytes", np.uint8)]
    shape = entry.info.shape
    dtype = DTYPES[scheme.scale_dtype].numpy
    found = [
        np.fromfile(folder / f"{number}.packed", np.uint8).reshape(scheme.packed_shape(shape)),
        np.fromfile(folder / f"{number}.scales", dtype).reshape(scheme.scales_shape(shape)),
    ]
    if not scheme.symmetric:
        found.append(np.fromfile(folder / f"{number}.zeros", np.uint8).reshape(scheme.scales_shape(shape)))
    return found
