"""How a file of rows is laid out before any of its values are known.

pyarrow writes the whole file once, with zeros for all values, into a `Skeleton`, which keeps everything but them.
Without compression, dictionaries and statistics of values nothing else depends on what the values are, so the file is
what pyarrow would have written from the true rows as soon as every value is in its place.
"""

from __future__ import annotations

import abc
import math
import mmap
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from .. import arrow_columns
from ..errors import FormatError
from ..tensor import QuantizedTensor
from .pieces import Piece, copied_row_bytes
from .v2_extended import SCALE_DTYPE, diffusion_cells

# Hexadecimal digits of a row's hash.
HASH_BYTES = 32


class Row(NamedTuple):
    """A piece as a row with zeros for its values, and the bytes of these by column."""

    piece: Piece
    batch: pa.RecordBatch
    sizes: dict[str, int]


class Rows:
    """The rows of a file, one for each piece. `zero_point` is what the file stores a zero point as, and `columns` are
    those of `v2_extended.columns_of`.

    The zeros take up no memory: they are one mapping.
    """

    def __init__(self, tensors: Sequence[Sequence[Piece]], zero_point: np.dtype[Any], columns: pa.Schema) -> None:
        self._tensors, self._zero_point, self._columns = tensors, zero_point, columns
        n_bytes = max((max(self.sizes(piece).values()) for pieces in tensors for piece in pieces), default=1)
        zeros = mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        self._zeros = np.frombuffer(zeros, np.uint8)

    def __iter__(self) -> Iterator[Row]:
        for pieces in self._tensors:
            for piece in pieces:
                yield Row(piece, self._batch(piece, len(pieces)), self.sizes(piece))

    def sizes(self, piece: Piece) -> dict[str, int]:
        """In the order of the file; what is null is not there."""
        scheme, shape = piece.entry.scheme, (piece.rows, piece.columns)
        if scheme is None:
            return {"data": piece.n_bytes, "xxh3_128": HASH_BYTES}
        n_scales = math.prod(scheme.scales_shape(shape))
        sizes = {"data": math.prod(scheme.packed_shape(shape)), "scales": 4 * n_scales}
        if not scheme.symmetric:
            sizes["zero_points"] = n_scales * self._zero_point.itemsize
        return {**sizes, "xxh3_128": HASH_BYTES}

    def _batch(self, piece: Piece, n_pieces: int) -> pa.RecordBatch:
        info, scheme, zeros = piece.entry.info, piece.entry.scheme, self._zeros
        if scheme is None:
            first = piece.column // max(1, copied_row_bytes(info))
            data = zeros[: piece.n_bytes]
            batch = arrow_columns.copied_row(
                info.name, data, info.shape, info.dtype, chunk=piece.number, n_chunks=n_pieces, row_offset=first
            )
        else:
            shape = piece.rows, piece.columns
            packed, scales = scheme.packed_shape(shape), scheme.scales_shape(shape)
            n_codes, n_scales = math.prod(packed), math.prod(scales)
            tensor = QuantizedTensor(
                zeros[:n_codes].reshape(packed),
                zeros[: 4 * n_scales].view(np.float32).reshape(scales),
                None if scheme.symmetric else zeros[:n_scales].reshape(scales),
                shape,
                scheme,
                info.dtype,
            )
            batch = arrow_columns.row(
                info.name,
                tensor,
                scale_dtype=SCALE_DTYPE,
                shape=info.shape,
                chunk=piece.number,
                n_chunks=n_pieces,
                row_offset=piece.row,
            )
        added = {"reason": piece.entry.reason, **diffusion_cells(piece.entry.diffusion), "xxh3_128": "0" * HASH_BYTES}
        fields = [*self._columns][len(batch.columns) :]
        cells = [pa.array([added[field.name]], field.type) for field in fields]
        return pa.RecordBatch.from_arrays([*batch.columns, *cells], schema=self._columns)


class Skeleton(abc.ABC):
    """The file object that pyarrow writes into. It keeps what is written in `kept`, as (position, bytes), but for the
    long values of the row at hand, which pass through.

    size: of the whole file, bytes
    """

    def __init__(self) -> None:
        self.size = 0
        self.closed = False
        self.kept: list[tuple[int, bytearray]] = [(0, bytearray())]

    @abc.abstractmethod
    def _values(self, data: Any) -> int:
        """How many bytes at the end of this write are values that need not be kept."""

    @abc.abstractmethod
    def _expect(self, row: Row) -> None:
        """Begin a row."""

    @abc.abstractmethod
    def _missing(self) -> bool:
        """Whether values of the row have not been seen that should have been."""

    def write(self, data: Any) -> int:
        n = len(data)
        values = self._values(data)
        if values < n:
            self.kept[-1][1].extend(memoryview(data)[: n - values])
        self.size += n
        if values:
            self.kept.append((self.size, bytearray()))
        return n

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        self.closed = True

    def batches(self, rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
        """The rows, each of which is to be written before the next one is asked for."""
        for row in rows:
            self._expect(row)
            yield row.batch
            if self._missing():
                raise unknown_layout()

    def structure(self, places: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytearray]]:
        """What was kept and lies in none of these places, (position, size) in the order of the file."""
        holes = deque(places)
        for start, data in self.kept:
            at, end = start, start + len(data)
            while holes and holes[0][0] < end:
                offset, n = holes.popleft()
                if offset > at:
                    yield at, data[at - start : offset - start]
                at = offset + n
            if at < end:
                yield at, data[at - start :]


def unknown_layout() -> FormatError:
    """pyarrow did not write what is known of it; going on would put values in wrong places."""
    return FormatError(
        f"pyarrow {pa.__version__} lays files out in a way that arrowquant does not know; install the version that "
        f"environment.yml names, or choose --format compressed-tensors"
    )
