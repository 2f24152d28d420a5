"""Quantized models in Arrow IPC files: one record batch per row (see v2_extended.py), read in place.

Format: https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format, written and read by pyarrow.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from ..errors import SourceError
from .row_checkpoint import RowCheckpoint
from .row_sink import RowSink


class ArrowSink(RowSink):
    """Writes one Arrow IPC file. Without compression a reader can map it and use the codes where they are."""

    format = "arrow"
    _file: pa.NativeFile | None = None
    _writer: pa.ipc.RecordBatchFileWriter | None = None

    def _create(self, path: Path, schema: pa.Schema) -> None:
        self._file = pa.OSFile(str(path), "wb")
        options = pa.ipc.IpcWriteOptions(compression=self.compression)
        self._writer = pa.ipc.new_file(self._file, schema, options=options)

    def _write(self, batch: pa.RecordBatch) -> None:
        assert self._writer is not None
        self._writer.write_batch(batch)

    def _close(self) -> None:
        writer, file, self._writer, self._file = self._writer, self._file, None, None
        try:
            if writer is not None:
                writer.close()
        finally:
            if file is not None:
                file.close()


class ArrowCheckpoint(RowCheckpoint):
    """Reads one Arrow IPC file that ArrowSink wrote. Its blocks are views of the mapped file."""

    format = "arrow"

    def _open(self) -> pa.Schema:
        self._ipc = pa.ipc.open_file(pa.memory_map(str(self.path)))
        return self._ipc.schema

    def _columns(self, names: list[str]) -> pa.Table:
        batches = [self._row(i).select(names) for i in range(self._ipc.num_record_batches)]
        return pa.Table.from_batches(batches, pa.schema([self._ipc.schema.field(name) for name in names]))

    def _row(self, i: int) -> pa.RecordBatch:
        batch = self._ipc.get_batch(i)
        if batch.num_rows != 1:
            raise SourceError(f"{self.path}: record batch {i} has {batch.num_rows} rows; arrowquant writes one in each")
        return batch
