"""Quantized models in Parquet: one row group per row (see v2_extended.py), readable by any Parquet reader.

Format: https://parquet.apache.org/docs/file-format/, written and read by pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import FormatError, SourceError
from ..schemes import Scheme
from . import TensorInfo
from .row_checkpoint import RowCheckpoint
from .row_layout import Row, Skeleton, unknown_layout
from .row_sink import RowSink

# Lengths in Parquet have 31 bits.
_MOST_BYTES = (1 << 31) - 1
# Values of up to this many bytes are kept with what is around them.
_SHORT = 4096
# What comes before the values in their page is shorter: levels in runs, and the length of a binary value.
_HEAD = 64


class _ParquetSkeleton(Skeleton):
    """A page comes as one write, and ends with its values. The footer says where it is."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: list[dict[str, int]] = []
        self._expected: list[int] = []
        self._passed: set[tuple[int, int]] = set()

    def _expect(self, row: Row) -> None:
        self._sizes.append(row.sizes)
        self._expected = [n for n in row.sizes.values() if n > _SHORT]

    def _values(self, data: Any) -> int:
        head = len(data) - self._expected[0] if self._expected else -1
        # Zeros at both ends: a name of just this length is something else.
        if not 0 <= head < _HEAD or any(data[head : head + _HEAD]) or any(data[-_HEAD:]):
            return 0
        self._passed.add((self.size + head, self._expected[0]))
        return self._expected.pop(0)

    def _missing(self) -> bool:
        return bool(self._expected)

    def positions(self, footer: pq.FileMetaData) -> Iterator[list[int]]:
        """Where the values of each row are: at the end of the only page of their column."""
        leaves = {footer.schema.column(i).path.split(".")[0]: i for i in range(footer.num_columns)}
        for i, sizes in enumerate(self._sizes):
            group, found = footer.row_group(i), []
            for column, n in sizes.items():
                chunk = group.column(leaves[column])
                found.append(chunk.data_page_offset + chunk.total_compressed_size - n)
                if n > _SHORT and (found[-1], n) not in self._passed:
                    raise unknown_layout()
            yield found


class ParquetSink(RowSink):
    """Writes one Parquet file.

    No column has a dictionary, and only layer_name has statistics, by which readers find the row groups of a tensor.
    """

    format = "parquet"
    # Parquet has no integers of one byte.
    _zero_point = np.dtype("<i4")

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme itself, if rows can hold it. See `Sink`."""
        scheme = super().scheme_for(info, scheme)
        row_bytes, n_scales = scheme.packed_shape(info.shape)[1], scheme.scales_shape(info.shape)[1]
        if max(row_bytes, 4 * n_scales) > _MOST_BYTES - _HEAD:
            raise FormatError(
                f"{self.format}: one row of {info.shape[-1]:,} weights is more than the 2 GiB that a value can have "
                f"there; --format arrow carries it"
            )
        return scheme

    def _lay_out(self, schema: pa.Schema, rows: Iterable[Row]) -> tuple[Skeleton, Iterator[list[int]]]:
        skeleton = _ParquetSkeleton()
        footer = _write(pa.PythonFile(skeleton, "w"), schema, skeleton.batches(rows), "none")
        return skeleton, skeleton.positions(footer)

    def _rewrite(self, path: Path, target: Path, schema: pa.Schema) -> None:
        with pq.ParquetFile(path, memory_map=True) as source, pa.OSFile(str(target), "wb") as file:
            groups = map(source.read_row_group, range(source.num_row_groups))
            batches = (group.combine_chunks().to_batches()[0] for group in groups)
            _write(file, schema, batches, self.compression or "none")


def _write(
    file: pa.NativeFile, schema: pa.Schema, batches: Iterable[pa.RecordBatch], compression: str
) -> pq.FileMetaData:
    """Write each batch as a row group of its own, and return the footer."""
    footers: list[pq.FileMetaData] = []
    with pq.ParquetWriter(
        file,
        schema,
        compression=compression,
        use_dictionary=False,
        write_statistics=["layer_name"],
        # The values of a row are contiguous only in a single page; pyarrow 20 would begin another one within a row.
        data_page_size=_MOST_BYTES,
        metadata_collector=footers,
    ) as writer:
        for batch in batches:
            # write_batch would hold a row group in memory until the next one begins.
            writer.write_table(pa.Table.from_batches([batch]))
    return footers[0]


class ParquetCheckpoint(RowCheckpoint):
    """Reads one Parquet file that ParquetSink wrote, row group by row group."""

    format = "parquet"

    def _open(self) -> pa.Schema:
        self._parquet = pq.ParquetFile(self.path, memory_map=True)
        return self._parquet.schema_arrow

    def _columns(self, names: list[str]) -> pa.Table:
        metadata = self._parquet.metadata
        if metadata.num_rows != metadata.num_row_groups:
            raise SourceError(
                f"{self.path}: {metadata.num_rows} rows in {metadata.num_row_groups} row groups; each row "
                f"must be a row group of its own, as arrowquant writes it. Was it rewritten by another program?"
            )
        return self._parquet.read(columns=names)

    def _row(self, i: int, names: list[str] | None = None) -> pa.RecordBatch:
        return self._parquet.read_row_group(i, columns=names).combine_chunks().to_batches()[0]
