"""`RowCheckpoint`: reads a quantized model from the rows of one file; Parquet and Arrow IPC say how to get at a row."""

from __future__ import annotations

import abc
import contextlib
import itertools
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import arrow_columns
from ..dtypes import DTYPES
from ..errors import ArrowQuantError, SourceError
from ..schemes import Scheme, rows_and_length
from ..tensor import QuantizedTensor
from . import Diffusion, Entry, TensorInfo
from .pieces import copied_row_bytes
from .v2_extended import (
    COLUMNS,
    CONFIG_KEY,
    DIFFUSION,
    IDENTITY,
    METADATA_KEY,
    PROVENANCE_KEY,
    VERSION_KEY,
    copied_shape,
    data_of,
    diffusion_cells,
    diffusion_of,
    row_hash,
)

# Read of all rows when a file is opened: what there is, and nothing that is large.
_INDEX = pa.schema([COLUMNS.field(name) for name in IDENTITY])
# Alike in all rows of one tensor.
_SHARED = ("shape", "dtype", "scheme", "n_chunks", "num_params", "reason")


class RowCheckpoint(abc.ABC):
    """A QuantizedCheckpoint in one file of rows. Its small columns are checked as a whole when it is opened.

    `entries` are in the order of the file, which is also their infos' `file`; the infos' `offset` is 0. They have
    `diffusion` where the file has its columns. `provenance` says by what and from what the file was made; `config` and
    `metadata` are the source's. Columns that are not known are ignored.

    Raises SourceError, naming file and tensor, for a file that is missing, truncated, not of this kind, or that
    contradicts itself. `blocks` raises it for a row whose content has not the hash in its column xxh3_128.
    """

    format: str

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.side_files: tuple[Path, ...] = ()
        self._lock = threading.Lock()
        with self._errors():
            schema = self._open()
            self._check_schema(schema)
            metadata = schema.metadata
            self.provenance: dict[str, str] = json.loads(metadata.get(PROVENANCE_KEY, "{}"))
            self.metadata: dict[str, str] = json.loads(metadata.get(METADATA_KEY, "{}"))
            self.config: dict[str, Any] | None = json.loads(metadata.get(CONFIG_KEY, "null"))
            self.entries: dict[str, Entry] = {}
            self._rows: dict[str, list[int]] = {}
            self._has_diffusion = _has(schema, DIFFUSION.field(0))
            self._read_index(self._columns(_INDEX.names).cast(_INDEX))

    @abc.abstractmethod
    def _open(self) -> pa.Schema:
        """Open the file and return its schema, with the file's metadata."""

    @abc.abstractmethod
    def _columns(self, names: list[str]) -> pa.Table:
        """These columns of all rows."""

    @abc.abstractmethod
    def _row(self, i: int, names: list[str] | None = None) -> pa.RecordBatch:
        """Row i of the file, with these columns, or all."""

    def blocks(self, name: str) -> Iterator[tuple[int, QuantizedTensor | NDArray[Any]]]:
        """The tensor as it is cut in the file: (first row, rows as QuantizedTensor or as array [rows, length]).

        A copied row that is larger than a chunk comes in several pieces [1, n] with the same first row, and elements
        of less than one byte come as uint8. The arrays are read-only views of a row of the file and keep it alive.
        Safe to call from any thread.
        """
        entry = self.entries[name]
        total = rows_and_length(entry.info.shape)[0] if entry.scheme else entry.info.n_bytes
        done = 0
        for i in self._rows[name]:
            with self._errors(name):
                with self._lock:
                    batch = self._row(i)
                if row_hash(batch) != batch["xxh3_128"][0].as_py():
                    raise self._error(name, f"row {i} is damaged: its content has not the hash in its column xxh3_128")
                block = _quantized(batch) if entry.scheme else _copied(batch, entry.info)
                first = done if entry.scheme else done // max(1, copied_row_bytes(entry.info))
                if batch["row_offset"][0].as_py() != first:
                    raise self._error(name, f"row {i} does not begin where the one before it ends, at {first}")
                if self._has_diffusion:
                    self._check_diffusion(entry, i, batch)
                done += block.nbytes if isinstance(block, np.ndarray) else block.packed.shape[0]
            yield first, block
        if done != total:
            raise self._error(name, f"{done} of its {total} {'rows' if entry.scheme else 'bytes'} are there")

    def _check_schema(self, schema: pa.Schema) -> None:
        version = (schema.metadata or {}).get(VERSION_KEY)
        wanted = [*COLUMNS, *(DIFFUSION if set(DIFFUSION.names) & set(schema.names) else ())]
        missing = [f"column {f.name} of {f.type}" for f in wanted if not _has(schema, f)]
        if version is None or missing:
            missing.append(f"{VERSION_KEY.decode()} in its metadata")
            raise SourceError(f"{self.path}: not a quantized model of arrowquant; there is no {missing[0]}")
        if version != arrow_columns.VERSION.encode():
            raise SourceError(
                f"{self.path}: its columns are of version {version.decode()}, and this package reads version "
                f"{arrow_columns.VERSION}. Update arrowquant_gpu."
            )

    def _read_index(self, index: pa.Table) -> None:
        """Fill `entries` and `_rows`: the rows of a tensor follow each other, all of them are there, and agree."""
        for name, group in itertools.groupby(enumerate(index.to_pylist()), lambda numbered: numbered[1]["layer_name"]):
            numbered = list(group)
            at, first = numbered[0]
            if name is None:
                raise SourceError(f"{self.path}: row {at} has no layer_name")
            if name in self.entries:
                raise self._error(name, f"row {at} holds this name a second time")
            for part, (i, row) in enumerate(numbered):
                if row["chunk"] != part:
                    raise self._error(name, f"row {i} is part {row['chunk']}, where part {part} must be")
                if differ := [key for key in _SHARED if row[key] != first[key]]:
                    raise self._error(name, f"row {i} differs from the first one of this tensor in {differ[0]}")
            if len(numbered) != first["n_chunks"]:
                raise self._error(name, f"{len(numbered)} of its {first['n_chunks']} parts are there")
            self.entries[name] = self._entry(name, at, first)
            self._rows[name] = [i for i, _ in numbered]

    def _entry(self, name: str, i: int, row: dict[str, Any]) -> Entry:
        dtype, shape = row["dtype"], tuple(row["shape"] or ())
        if dtype not in DTYPES:
            raise self._error(name, f"dtype {dtype!r} is not known")
        if row["shape"] is None or row["num_params"] != math.prod(shape):
            raise self._error(name, f"shape {row['shape']} and num_params {row['num_params']} disagree")
        with self._errors(name):
            scheme = None if row["scheme"] is None else Scheme.parse(row["scheme"])
            if scheme is not None:
                arrow_columns.check(scheme)
        n_bytes = -(-math.prod(shape) * DTYPES[dtype].bits // 8)
        info = TensorInfo(name, dtype, shape, self.path, 0, n_bytes)
        return Entry(info, scheme, row["reason"] or "", self._diffusion(info, i, scheme))

    def _diffusion(self, info: TensorInfo, i: int, scheme: Scheme | None) -> Diffusion | None:
        """What row i, the first of a tensor, says beside its weights."""
        if not self._has_diffusion:
            return None
        with self._errors(info.name), self._lock:
            cells = self._row(i, DIFFUSION.names).to_pylist()[0]
        try:
            known = diffusion_of(cells)
        except SourceError as e:
            raise self._error(info.name, f"row {i}: {e}") from e
        if known is not None and known.divisors is not None:
            n_columns = rows_and_length(info.shape)[1]
            if scheme is None:
                raise self._error(info.name, f"row {i} has divisors, and the tensor is not quantized")
            if known.divisors.size != n_columns:
                raise self._error(info.name, f"row {i} has {known.divisors.size} divisors for {n_columns} columns")
        return known

    def _check_diffusion(self, entry: Entry, i: int, batch: pa.RecordBatch) -> None:
        """Every row of a tensor says the same; the first one was looked at when the file was opened."""
        for column, value in diffusion_cells(entry.diffusion).items():
            if batch[column][0].as_py() not in (value, value or False):
                raise self._error(entry.info.name, f"row {i} differs from the first one of this tensor in {column}")

    def _error(self, name: str, what: str) -> SourceError:
        return SourceError(f"{self.path}, tensor {name}: {what}. Copy the file again, or quantize again.")

    @contextlib.contextmanager
    def _errors(self, name: str | None = None) -> Iterator[None]:
        """Errors of reading and of contradicting values as a SourceError that names the file and the tensor."""
        try:
            yield
        except SourceError:
            raise
        except (ArrowQuantError, OSError, ValueError, KeyError, TypeError, pa.ArrowException) as e:
            where = f"{self.path}" if name is None else f"{self.path}, tensor {name}"
            raise SourceError(f"{where}: cannot be read as {self.format}: {e}") from e


def _has(schema: pa.Schema, field: pa.Field) -> bool:
    i = schema.get_field_index(field.name)
    return i >= 0 and bool(schema.field(i).type == field.type)


def _quantized(batch: pa.RecordBatch) -> QuantizedTensor:
    """The row as a QuantizedTensor [rows, length]."""
    _, q = arrow_columns.read(batch)
    if not isinstance(q, QuantizedTensor):
        raise SourceError("a row without a scheme")
    shape = (q.packed.shape[0], rows_and_length(q.shape)[1])
    return QuantizedTensor(q.packed, q.scales, q.zeros, shape, q.scheme, q.dtype)


def _copied(batch: pa.RecordBatch, info: TensorInfo) -> NDArray[Any]:
    """The row as an array [rows, length], or [1, n] of a piece of one row."""
    data, dtype, row_bytes = data_of(batch), DTYPES[info.dtype].numpy, copied_row_bytes(info)
    if batch["n_chunks"][0].as_py() == 1:
        shape = copied_shape(info)
    elif data.size % row_bytes == 0:
        shape = (data.size // row_bytes, copied_shape(info)[1])
    else:
        shape = (1, -1)
    return data.view(dtype or np.uint8).reshape(shape)
