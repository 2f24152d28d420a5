"""`RowSink`: writes a quantized model as the rows of one file; Parquet and Arrow IPC say how a row gets into it."""

from __future__ import annotations

import abc
import contextlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import arrow_columns
from ..dtypes import DTYPES
from ..errors import TargetError
from ..schemes import Scheme, rows_and_length
from ..tensor import QuantizedTensor
from . import Checkpoint, Entry, TensorInfo
from .output import Output, target_errors
from .v2_extended import (
    COLUMNS,
    CONFIG_KEY,
    METADATA_KEY,
    PROVENANCE_KEY,
    SCALE_DTYPE,
    Split,
    copied_row_bytes,
    row_hash,
    scale_bytes,
)


class RowSink(abc.ABC):
    """A Sink that makes one file of rows, named like its output. Any scheme and any shape can be carried.

    Holds one chunk of at most CHUNK_BYTES (or one row of weights, if that is larger) and what the file's writer needs
    to write it. The output may hold other files beside this one; `commit` and `abort` are those of the output.
    `compression` is None or "zstd", which makes kept float tensors smaller, and codes hardly.
    """

    format: str

    def __init__(self, output: Output, *, compression: str | None = None) -> None:
        self.output = output
        self.compression = compression
        self._entries: list[Entry] = []
        self._at = self._done = 0
        self._split = Split(0, 1)
        self._chunk: list[NDArray[Any]] = []

    @abc.abstractmethod
    def _create(self, path: Path, schema: pa.Schema) -> None:
        """Make the file."""

    @abc.abstractmethod
    def _write(self, batch: pa.RecordBatch) -> None:
        """Append one row, and no longer refer to its memory."""

    @abc.abstractmethod
    def _close(self) -> None:
        """Finish the file, if it was made."""

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme itself: rows carry every scheme for every shape."""
        return scheme

    def n_bytes(self, entry: Entry) -> int:
        """Bytes of codes, float32 scales and zero points, or of the copied tensor."""
        scheme, shape = entry.scheme, entry.info.shape
        if scheme is None:
            return entry.info.n_bytes
        n_scales = math.prod(scheme.scales_shape(shape))
        if scheme.granularity == "tensor":
            n_scales *= Split.of(entry).n_chunks
        return math.prod(scheme.packed_shape(shape)) + n_scales * scale_bytes(scheme.symmetric)

    def open(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        """Begin the output and write the file's schema with its metadata.

        Raises TargetError where the output may not be written, or is larger than the free space.
        """
        self.output.begin()
        self._entries = list(entries)
        target = self.output.target
        needed, free = sum(map(self.n_bytes, entries)), shutil.disk_usage(target.parent).free
        if self.compression is None and needed > free:
            raise TargetError(f"{target}: {needed:,} bytes are needed and {free:,} are free in {target.parent}")
        metadata = {PROVENANCE_KEY: json.dumps(provenance), METADATA_KEY: json.dumps(source.metadata)}
        if source.config is not None:
            metadata[CONFIG_KEY] = json.dumps(source.config)
        columns = COLUMNS.with_metadata({**arrow_columns.schema(SCALE_DTYPE).metadata, **metadata})
        with target_errors(target):
            self._create(self.output.path(target.name), columns)
        self._begin_entry()

    def write_rows(self, entry: Entry, row: int, packed: NDArray[Any], scales: NDArray[Any], zeros: Any) -> None:
        """The next rows of a quantized entry; they are copied, and written as soon as they fill a chunk."""
        if not self._is_next(entry, row):
            return
        per_group = [scales] if zeros is None else [scales, zeros]
        if not _per_tensor(entry):
            self._fill(entry, [packed, *per_group])
            return
        if row == 0:
            for room, part in zip(self._chunk[1:], per_group, strict=True):
                room[...] = part
        self._fill(entry, [packed])

    def write_bytes(self, entry: Entry, offset: int, data: NDArray[Any]) -> None:
        """The next bytes of a copied entry; they are copied, and written as soon as they fill a chunk."""
        if self._is_next(entry, offset):
            self._fill(entry, [data.reshape(-1).view(np.uint8)])

    def commit(self) -> tuple[Path, ...]:
        """Finish the file, and commit the output. Returns the output's files, this one first."""
        if self._at < len(self._entries):
            raise RuntimeError(f"{self._entries[self._at].info.name}: not all of it was written before commit")
        with target_errors(self.output.target):
            self._close()
        return self.output.commit()

    def abort(self) -> None:
        """Remove the temporary output."""
        # What cannot be finished, on a full disk say, is about to be removed anyway.
        with contextlib.suppress(OSError, pa.ArrowException):
            self._close()
        self.output.abort()

    def _is_next(self, entry: Entry, position: int) -> bool:
        """False for an entry without bytes, which is written already; otherwise the call must be the next in order."""
        if self.n_bytes(entry) == 0:
            return False
        if self._at >= len(self._entries) or self._entries[self._at] != entry or position != self._done:
            raise RuntimeError(f"{entry.info.name}: position {position} is not the next to be written")
        return True

    def _begin_entry(self) -> None:
        """Make room for a chunk of the entry that is next. Entries without bytes are written on the way."""
        self._done = 0
        self._chunk = []
        while self._at < len(self._entries):
            entry = self._entries[self._at]
            self._split = Split.of(entry)
            if self.n_bytes(entry):
                self._chunk = _room(entry, min(self._split.step, self._split.units))
                return
            self._chunk = _room(entry, self._split.units)
            self._emit(entry, 0, 1, self._split.units)
            self._at += 1

    def _fill(self, entry: Entry, block: list[NDArray[Any]]) -> None:
        start, split = 0, self._split
        while start < len(block[0]):
            chunk, filled = divmod(self._done, split.step)
            n = min(len(block[0]) - start, split.step - filled)
            for room, part in zip(self._chunk, block, strict=False):
                room[filled : filled + n] = part[start : start + n]
            start += n
            self._done += n
            if filled + n == split.step or self._done == split.units:
                self._emit(entry, chunk, split.n_chunks, filled + n)
        if self._done == split.units:
            self._at += 1
            self._begin_entry()

    def _emit(self, entry: Entry, chunk: int, n_chunks: int, units: int) -> None:
        """Write the first `units` of the chunk as a row of the file."""
        info, scheme, first = entry.info, entry.scheme, chunk * self._split.step
        data = self._chunk[0][:units]
        if scheme is None:
            batch = arrow_columns.copied_row(
                info.name,
                data,
                info.shape,
                info.dtype,
                chunk=chunk,
                n_chunks=n_chunks,
                row_offset=first // max(1, copied_row_bytes(info)),
            )
        else:
            scales, *zeros = [a if _per_tensor(entry) else a[:units] for a in self._chunk[1:]]
            part = (units, rows_and_length(info.shape)[1])
            batch = arrow_columns.row(
                info.name,
                QuantizedTensor(data, scales, zeros[0] if zeros else None, part, scheme, info.dtype),
                scale_dtype=SCALE_DTYPE,
                shape=info.shape,
                chunk=chunk,
                n_chunks=n_chunks,
                row_offset=first,
            )
        batch = batch.append_column("reason", pa.array([entry.reason], pa.string()))
        arrays = [*batch.columns, pa.array([row_hash(batch)], pa.string())]
        with target_errors(self.output.target):
            self._write(pa.RecordBatch.from_arrays(arrays, schema=COLUMNS))


def _per_tensor(entry: Entry) -> bool:
    return entry.scheme is not None and entry.scheme.granularity == "tensor"


def _room(entry: Entry, units: int) -> list[NDArray[Any]]:
    """Arrays for so many units: codes, scales and zero points, or bytes."""
    scheme, shape = entry.scheme, entry.info.shape
    if scheme is None:
        return [np.empty(units, np.uint8)]
    n_scales = scheme.scales_shape(shape) if _per_tensor(entry) else (units, scheme.scales_shape(shape)[1])
    arrays = [
        np.empty((units, scheme.packed_shape(shape)[1]), np.uint8),
        np.empty(n_scales, DTYPES[scheme.scale_dtype].numpy),
    ]
    return arrays if scheme.symmetric else [*arrays, np.empty(n_scales, np.uint8)]
