"""Quantized models in Arrow IPC files: one record batch per row (see v2_extended.py), read in place.

Format: https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format, written and read by pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import SourceError
from .row_checkpoint import RowCheckpoint
from .row_layout import Row, Skeleton
from .row_sink import RowSink


class _ArrowSkeleton(Skeleton):
    """Values are known by their address: pyarrow hands every buffer of a batch to the file as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: list[list[int]] = []
        self._expected: list[tuple[int, int]] = []

    def _expect(self, row: Row) -> None:
        # The last buffer of a binary cell holds its bytes, and of a list cell its items.
        self._expected = [(row.batch[c].buffers()[-1].address if n else 0, n) for c, n in row.sizes.items()]
        self.positions.append([])
        self._skip_empty()

    def _values(self, data: Any) -> int:
        if not self._expected or not isinstance(data, pa.Buffer) or (data.address, data.size) != self._expected[0]:
            return 0
        del self._expected[0]
        self.positions[-1].append(self.size)
        self._skip_empty()
        return int(data.size)

    def _missing(self) -> bool:
        return bool(self._expected)

    def _skip_empty(self) -> None:
        """Nothing is written of a value without bytes."""
        while self._expected and self._expected[0][1] == 0:
            del self._expected[0]
            self.positions[-1].append(self.size)


class ArrowSink(RowSink):
    """Writes one Arrow IPC file. Without compression a reader can map it and use the codes where they are."""

    format = "arrow"
    _zero_point = np.dtype(np.uint8)

    def _lay_out(self, schema: pa.Schema, rows: Iterable[Row]) -> tuple[Skeleton, Iterator[list[int]]]:
        skeleton = _ArrowSkeleton()
        _write(pa.PythonFile(skeleton, "w"), schema, skeleton.batches(rows), None)
        return skeleton, iter(skeleton.positions)

    def _rewrite(self, path: Path, target: Path, schema: pa.Schema) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batches = map(reader.get_batch, range(reader.num_record_batches))
        with pa.OSFile(str(target), "wb") as file:
            _write(file, schema, batches, self.compression)


def _write(file: pa.NativeFile, schema: pa.Schema, batches: Iterable[pa.RecordBatch], compression: str | None) -> None:
    with pa.ipc.new_file(file, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for batch in batches:
            writer.write_batch(batch)


class ArrowCheckpoint(RowCheckpoint):
    """Reads one Arrow IPC file that ArrowSink wrote. Its blocks are views of the mapped file."""

    format = "arrow"

    def _open(self) -> pa.Schema:
        self._ipc = pa.ipc.open_file(pa.memory_map(str(self.path)))
        self._narrow: tuple[list[str], pa.ipc.RecordBatchFileReader] | None = None
        return self._ipc.schema

    def _columns(self, names: list[str]) -> pa.Table:
        reader = self._reader(names)
        # Copied: a batch of some columns lies in a buffer as large as one of all of them.
        batches = [_checked(self.path, i, reader.get_batch(i)).take([0]) for i in range(reader.num_record_batches)]
        return pa.Table.from_batches(batches, reader.schema).select(names)

    def _row(self, i: int, names: list[str] | None = None) -> pa.RecordBatch:
        if names is None:
            return _checked(self.path, i, self._ipc.get_batch(i))
        return _checked(self.path, i, self._reader(names).get_batch(i)).select(names)

    def _reader(self, names: list[str]) -> pa.ipc.RecordBatchFileReader:
        """A reader of these columns: the others, which may be compressed, are not touched."""
        if self._narrow is None or self._narrow[0] != names:
            fields = sorted(self._ipc.schema.get_field_index(name) for name in names)
            options = pa.ipc.IpcReadOptions(included_fields=fields)
            self._narrow = list(names), pa.ipc.open_file(pa.memory_map(str(self.path)), options=options)
        return self._narrow[1]


def _checked(path: Path, i: int, batch: pa.RecordBatch) -> pa.RecordBatch:
    if batch.num_rows != 1:
        raise SourceError(f"{path}: record batch {i} has {batch.num_rows} rows; arrowquant writes one in each")
    # Offsets of a damaged file would lead outside it. This looks at offsets and names, not at codes.
    batch.validate(full=True)
    return batch
