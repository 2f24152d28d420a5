"""`pieces`: how a tensor is cut for reading, quantizing, hashing and writing.

The cut depends on the plan and the output format alone, never on devices, threads or memory, so that hashes and the
rows of a Parquet file are the same in every run. A piece is whole rows, or a part of one long row that begins where a
group begins.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..dtypes import DTYPES
from ..schemes import rows_and_length
from . import Entry, TensorInfo

# About this many bytes of the source are in one piece.
PIECE_BYTES = 16 << 20


class Cut(NamedTuple):
    """Where a format lets a quantized tensor be cut: after a multiple of `rows`; within a row only if `within_rows`."""

    rows: int = 1
    within_rows: bool = False


class Piece(NamedTuple):
    """Weights [rows, columns] of one tensor, from row `row` and column `column` on.

    Of a tensor that is copied as it is, a piece is bytes, of whole rows where these fit: `row` 0, `rows` 1, `column`
    the first byte, `columns` how many. `number` counts the tensor's pieces from 0; `offset` is the absolute position of
    its `n_bytes` in the source file.
    """

    entry: Entry
    number: int
    row: int
    rows: int
    column: int
    columns: int
    offset: int
    n_bytes: int


def pieces(entry: Entry, cut: Cut) -> list[Piece]:
    """All pieces of a tensor, in order; an empty tensor has one.

    >>> from pathlib import Path
    >>> from arrowquant_gpu.formats import TensorInfo
    >>> from arrowquant_gpu.schemes import Scheme
    >>> info = TensorInfo("w", "bfloat16", (11008, 4096), Path("a.safetensors"), 80, 2 * 11008 * 4096)
    >>> [(p.row, p.rows, p.offset) for p in pieces(Entry(info, Scheme.parse("int4_g128"), ""), Cut())][:2]
    [(0, 2048, 80), (2048, 2048, 16777296)]
    """
    info, scheme = entry.info, entry.scheme
    if scheme is None:
        row = copied_row_bytes(info)
        step = PIECE_BYTES // row * row if 0 < row <= PIECE_BYTES else PIECE_BYTES
        spans = [(at, min(step, info.n_bytes - at)) for at in range(0, info.n_bytes, step)] or [(0, 0)]
        return [Piece(entry, i, 0, 1, at, n, info.offset + at, n) for i, (at, n) in enumerate(spans)]
    rows, length = rows_and_length(info.shape)
    width = DTYPES[info.dtype].bits // 8
    if rows and cut.within_rows and scheme.granularity in ("group", "tensor") and length * width > PIECE_BYTES:
        # Codes of a multiple of 8 weights fill whole bytes at every width.
        unit = math.lcm(8, scheme.group_size or 8)
        step = max(unit, PIECE_BYTES // width // unit * unit)
        corners = [(row, column) for row in range(rows) for column in range(0, length, step)]
        sizes = [(1, min(step, length - column)) for _, column in corners]
    else:
        whole = max(1, PIECE_BYTES // max(1, length * width))
        unit = math.lcm(cut.rows, scheme.group_size or 1) if scheme.granularity == "block" else cut.rows
        step = max(1, whole // unit) * unit
        corners = [(row, 0) for row in range(0, rows, step)] or [(0, 0)]
        sizes = [(min(step, rows - row), length) for row, _ in corners]
    return [
        Piece(entry, i, row, n, column, m, info.offset + (row * length + column) * width, n * m * width)
        for i, ((row, column), (n, m)) in enumerate(zip(corners, sizes, strict=True))
    ]


def copied_row_bytes(info: TensorInfo) -> int:
    """Bytes of one row of a tensor that is copied; all of its bytes where NumPy cannot index its type."""
    dtype = DTYPES[info.dtype].numpy
    return info.n_bytes if dtype is None else rows_and_length(info.shape)[1] * dtype.itemsize
