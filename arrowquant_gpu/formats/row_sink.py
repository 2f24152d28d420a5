"""`RowSink`: writes a quantized model as rows of files; Parquet and Arrow IPC say where a row's values lie."""

from __future__ import annotations

import abc
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import arrow_columns
from ..errors import FormatError, SchemeError, TargetError
from ..schemes import Scheme
from . import Checkpoint, Codes, Entry, Place, TensorInfo
from .output import Output, target_errors
from .pieces import Cut, Piece, pieces
from .row_layout import Row, Rows, Skeleton
from .v2_extended import (
    COLUMNS,
    CONFIG_KEY,
    METADATA_KEY,
    PROVENANCE_KEY,
    SCALE_DTYPE,
    check_divisors,
    columns_of,
    identity,
    values_hash,
)


class _Laid(NamedTuple):
    """What is known of a row before its values are."""

    places: list[Place]
    identity: bytes


class RowSink(abc.ABC):
    """A Sink that makes one file of rows, named like its output: each piece is one. Any shape can be carried.

    A subclass may spread the tensors over several files (`_files`), and the output may hold others beside them;
    `commit` is that of the output. `compression` is None or "zstd", which makes kept float tensors smaller, and codes
    hardly: each file is then written a second time by `commit`, and both are on the disk until that ends.
    """

    format: str
    # What the file stores a zero point as.
    _zero_point: np.dtype[Any]

    def __init__(self, output: Output, *, compression: str | None = None) -> None:
        self.output = output
        self.compression = compression
        self._schema = COLUMNS
        self._names: list[str] = []
        self._rows: dict[tuple[str, int], _Laid] = {}

    @abc.abstractmethod
    def _lay_out(self, schema: pa.Schema, rows: Iterable[Row]) -> tuple[Skeleton, Iterator[list[int]]]:
        """Have pyarrow write a file of these rows. Returns it, and the positions of the values row by row."""

    @abc.abstractmethod
    def _rewrite(self, path: Path, target: Path, schema: pa.Schema) -> None:
        """Write the rows of a file into another, with `compression`."""

    def _files(self, entries: Sequence[Entry]) -> list[tuple[str, Sequence[Entry]]]:
        """The files of rows, (name, tensors in it)."""
        return [(self.output.target.name, entries)]

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme itself, if rows can hold it. See `Sink`."""
        try:
            arrow_columns.check(scheme)
        except SchemeError as e:
            raise FormatError(f"{self.format}: {e}") from e
        return scheme

    def n_bytes(self, entry: Entry) -> int:
        """Bytes of codes, float32 scales and zero points, or of the copied tensor, uncompressed. See `Sink`."""
        scheme, shape = entry.scheme, entry.info.shape
        if scheme is None:
            return entry.info.n_bytes
        rows, row_bytes = scheme.packed_shape(shape)
        n_rows, groups = scheme.scales_shape(shape)
        if scheme.granularity == "tensor":
            n_rows *= len(self.pieces(entry))
        per_group = 4 if scheme.symmetric else 4 + self._zero_point.itemsize
        return rows * row_bytes + n_rows * groups * per_group

    def pieces(self, entry: Entry) -> list[Piece]:
        """See `Sink`. Each is a row of the file."""
        return pieces(entry, Cut())

    def open(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        """Make the files in their final size, all but the values in their final content. See `Sink`.

        Raises TargetError where they are larger than the free space.
        """
        for entry in entries:
            check_divisors(entry)
        target, files = self.output.target, self._files(entries)
        self._names = [name for name, _ in files]
        # Said now: `create` would find it out after laying out, which takes seconds for a large model.
        needed, free = sum(map(self.n_bytes, entries)), shutil.disk_usage(target.parent).free
        for file in map(self.output.path, self._names):
            # A run that is resumed has its space already; and perhaps it was killed while it compressed.
            if file.exists():
                free += 512 * file.stat().st_blocks
            if _compressed(file).exists():
                _compressed(file).unlink()
        if needed > free:
            raise TargetError(f"{target}: {needed:,} bytes are needed and {free:,} are free in {target.parent}")
        metadata = {PROVENANCE_KEY: json.dumps(provenance), METADATA_KEY: json.dumps(source.metadata)}
        if source.config is not None:
            metadata[CONFIG_KEY] = json.dumps(source.config)
        columns = columns_of(entries)
        self._schema = columns.with_metadata({**arrow_columns.schema(SCALE_DTYPE).metadata, **metadata})
        self._rows = {}
        for name, tensors in files:
            rows = Rows([self.pieces(entry) for entry in tensors], self._zero_point, columns)
            self._make(name, rows)

    def places(self, piece: Piece) -> list[Place]:
        """Of data, scales, zero points and hash of the row, where it has them. See `Sink`."""
        return self._rows[piece.entry.info.name, piece.number].places

    def stored(self, piece: Piece, codes: Codes | NDArray[np.uint8]) -> list[NDArray[Any]]:
        """See `Sink`. Scales and zero points are views only if their types are those of the file."""
        arrays: list[NDArray[Any]]
        if isinstance(codes, Codes):
            arrays = [codes.packed, codes.scales.astype(np.float32, copy=False)]
            if codes.zeros is not None:
                arrays.append(codes.zeros)
        else:
            arrays = [codes]
        digest = values_hash(self._rows[piece.entry.info.name, piece.number].identity, arrays)
        if len(arrays) > 2:
            arrays[2] = arrays[2].astype(self._zero_point, copy=False)
        return [*arrays, np.frombuffer(digest.encode(), np.uint8)]

    def finish(self, entry: Entry) -> None:
        """See `Sink`. Nothing follows from several pieces."""
        return

    def commit(self) -> tuple[Path, ...]:
        """Compress the files if that was asked for, and commit the output. See `Sink`."""
        if self.compression is not None:
            for path in map(self.output.path, self._names):
                with target_errors(self.output.target):
                    self._rewrite(path, _compressed(path), self._schema)
                    _compressed(path).replace(path)
        return self.output.commit()

    def _make(self, name: str, rows: Rows) -> None:
        """One file of these rows, and their places in it."""
        laid: list[_Laid] = []
        skeleton, positions = self._lay_out(self._schema, self._noted(name, rows, laid))
        for row, found in zip(laid, positions, strict=True):
            row.places[:] = [p._replace(offset=at) for p, at in zip(row.places, found, strict=True)]
        self.output.create(name, skeleton.size)
        holes = ((p.offset, p.n_bytes) for row in laid for p in row.places if p.n_bytes)
        for at, data in skeleton.structure(holes):
            self.output.write(name, at, np.frombuffer(data, np.uint8))

    def _noted(self, name: str, rows: Iterable[Row], laid: list[_Laid]) -> Iterator[Row]:
        """The rows as they pass, with the sizes of their places in file `name`."""
        for row in rows:
            places = [Place(name, 0, n) for n in row.sizes.values()]
            laid.append(_Laid(places, identity(row.batch)))
            self._rows[row.piece.entry.info.name, row.piece.number] = laid[-1]
            yield row


def _compressed(file: Path) -> Path:
    """Where a file is compressed to, before it takes its place."""
    return file.with_name(f"{file.name}.compressed")
