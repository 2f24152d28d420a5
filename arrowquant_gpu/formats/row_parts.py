"""Codes, scales and what is stored beside them as row-major tensors: where the parts of a piece belong, and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..ops import scale_rows
from ..schemes import Scheme, rows_and_length
from ..tensor import QuantizedTensor
from . import Codes, TensorInfo
from .pieces import Piece
from .stored_model import row_blocks


class Span(NamedTuple):
    """Bytes of a tensor: so many, from `offset` on."""

    offset: int
    n_bytes: int


class Spans(NamedTuple):
    """Where the parts of a piece belong, each in its own tensor; None where the piece has no such part.

    What is of a whole tensor comes with its first piece.
    """

    packed: Span
    scales: Span | None
    zeros: Span | None


def has_scales(scheme: Scheme) -> bool:
    """Whether there are scales beside the codes: ggml blocks hold theirs."""
    return scheme.scales_shape((1, 1))[1] > 0


def spans(piece: Piece, scheme: Scheme) -> Spans:
    """Where the parts of a piece belong in tensors of the shapes that `Scheme` gives for a whole tensor.

    >>> from pathlib import Path
    >>> from arrowquant_gpu.formats import Entry
    >>> from arrowquant_gpu.formats.pieces import Cut, pieces
    >>> scheme = Scheme.parse("int4_g32")
    >>> piece = pieces(Entry(TensorInfo("w", "float32", (8, 64), Path("m"), 0, 2048), scheme, ""), Cut())[0]
    >>> spans(piece, scheme)[:2]
    (Span(offset=0, n_bytes=256), Span(offset=0, n_bytes=64))
    """
    shape, length = piece.entry.info.shape, rows_and_length(piece.entry.info.shape)[1]
    start = piece.row * scheme.row_bytes(length) + scheme.row_bytes(piece.column)
    packed = Span(start, piece.rows * scheme.row_bytes(piece.columns))
    # First and number of scales; those of the whole tensor come with its first piece.
    n_scales = math.prod(scheme.scales_shape(shape))
    groups: tuple[int, int] | None = (0, n_scales) if piece.number == 0 else None
    beside = groups if scheme.scale_rule != "global" or groups is None else (0, min(1, n_scales))
    if scheme.granularity != "tensor":
        group = scheme.group_length(length)
        rows_before, per_row = scheme.scales_shape((piece.row, length))
        n_rows = scheme.scales_shape((piece.rows, length))[0]
        groups = rows_before * per_row + piece.column // group, n_rows * -(-piece.columns // group)
        beside = beside if scheme.scale_rule == "global" else groups
    return Spans(
        packed,
        _span(groups, scheme.scale_storage) if has_scales(scheme) else None,
        _span(beside, scheme.zeros_dtype) if scheme.zeros_dtype else None,
    )


def _span(elements: tuple[int, int] | None, dtype: str) -> Span | None:
    """The bytes of so many elements, from one on."""
    width = DTYPES[dtype].bits // 8
    return None if elements is None else Span(elements[0] * width, elements[1] * width)


def arrays(piece: Piece, scheme: Scheme, codes: Codes) -> list[NDArray[Any]]:
    """What goes to those of `spans` that a piece has, in their order."""
    _, scales, zeros = spans(piece, scheme)
    found: list[NDArray[Any]] = [codes.packed]
    if scales is not None:
        found.append(codes.scales)
    if zeros is not None and codes.zeros is not None:
        found.append(codes.zeros)
    return found


def as_scales(stored: NDArray[Any], shape: tuple[int, ...], scheme: Scheme) -> NDArray[Any]:
    """Scales of a tensor of this shape that a file holds in some other one: an empty tensor has none at all."""
    expected = scheme.scales_shape(shape)
    return stored.reshape(expected) if math.prod(shape) else np.zeros(expected, stored.dtype)


def blocks(
    packed: NDArray[np.uint8], scales: NDArray[Any], zeros: NDArray[Any] | None, info: TensorInfo, scheme: Scheme
) -> Iterator[tuple[int, QuantizedTensor]]:
    """A whole tensor `info` in blocks of whole rows, views of the arrays; see `QuantizedCheckpoint.blocks`."""
    rows, length = rows_and_length(info.shape)
    unit = scheme.group_size or 1 if scheme.granularity == "block" else 1
    for row, stop in row_blocks(rows, packed.shape[1], unit):
        part = slice(row, stop)
        beside = scale_rows(scheme, scales, zeros, part)
        yield row, QuantizedTensor(packed[part], *beside, (stop - row, length), scheme, info.dtype)
