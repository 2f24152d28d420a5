"""Quantized models in Parquet: one row group per row (see v2_extended.py), readable by any Parquet reader.

Format: https://parquet.apache.org/docs/file-format/, written and read by pyarrow.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import SourceError
from .row_checkpoint import RowCheckpoint
from .row_sink import RowSink


class ParquetSink(RowSink):
    """Writes one Parquet file.

    No column has a dictionary, and only layer_name has statistics, by which readers find the row groups of a tensor.
    """

    format = "parquet"
    _file: pa.NativeFile | None = None
    _writer: pq.ParquetWriter | None = None

    def _create(self, path: Path, schema: pa.Schema) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pq.ParquetWriter(
            self._file,
            schema,
            compression=self.compression or "none",
            use_dictionary=False,
            write_statistics=["layer_name"],
        )

    def _write(self, batch: pa.RecordBatch) -> None:
        assert self._writer is not None
        # write_batch would hold a row group in memory until the next one begins.
        self._writer.write_table(pa.Table.from_batches([batch]))

    def _close(self) -> None:
        writer, file, self._writer, self._file = self._writer, self._file, None, None
        try:
            if writer is not None:
                writer.close()
        finally:
            if file is not None:
                file.close()


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

    def _row(self, i: int) -> pa.RecordBatch:
        return self._parquet.read_row_group(i).combine_chunks().to_batches()[0]
