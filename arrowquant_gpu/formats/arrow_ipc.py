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
        # The other columns, which may be compressed, are not touched.
        fields = sorted(self._ipc.schema.get_field_index(name) for name in names)
        options = pa.ipc.IpcReadOptions(included_fields=fields)
        reader = pa.ipc.open_file(pa.memory_map(str(self.path)), options=options)
        batches = [_checked(self.path, i, reader.get_batch(i)) for i in range(reader.num_record_batches)]
        return pa.Table.from_batches(batches, reader.schema).select(names)

    def _row(self, i: int) -> pa.RecordBatch:
        return _checked(self.path, i, self._ipc.get_batch(i))


def _checked(path: Path, i: int, batch: pa.RecordBatch) -> pa.RecordBatch:
    if batch.num_rows != 1:
        raise SourceError(f"{path}: record batch {i} has {batch.num_rows} rows; arrowquant writes one in each")
    # Offsets of a damaged file would lead outside it. This looks at offsets and names, not at codes.
    batch.validate(full=True)
    return batch
