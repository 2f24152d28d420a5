"""`RowSink`: writes a quantized model as the rows of one file; Parquet and Arrow IPC say where a row's values lie."""

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
from ..errors import TargetError
from ..schemes import Scheme
from . import Checkpoint, Codes, Entry, Place, TensorInfo
from .output import Output, target_errors
from .pieces import Cut, Piece, pieces
from .row_layout import Row, Rows, Skeleton
from .v2_extended import COLUMNS, CONFIG_KEY, METADATA_KEY, PROVENANCE_KEY, SCALE_DTYPE, identity, values_hash


class _Laid(NamedTuple):
    """What is known of a row before its values are."""

    places: list[Place]
    identity: bytes


class RowSink(abc.ABC):
    """A Sink that makes one file of rows, named like its output: each piece is one. Any shape can be carried.

    The output may hold other files beside this one; `commit` is that of the output. `compression` is
    None or "zstd", which makes kept float tensors smaller, and codes hardly: the file is then written a second time by
    `commit`, and both are on the disk until it ends.
    """

    format: str
    # What the file stores a zero point as.
    _zero_point: np.dtype[Any]

    def __init__(self, output: Output, *, compression: str | None = None) -> None:
        self.output = output
        self.compression = compression
        self._schema = COLUMNS
        self._rows: dict[tuple[str, int], _Laid] = {}

    @abc.abstractmethod
    def _lay_out(self, schema: pa.Schema, rows: Iterable[Row]) -> tuple[Skeleton, Iterator[list[int]]]:
        """Have pyarrow write a file of these rows. Returns it, and the positions of the values row by row."""

    @abc.abstractmethod
    def _rewrite(self, path: Path, target: Path, schema: pa.Schema) -> None:
        """Write the rows of a file into another, with `compression`."""

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme itself: rows carry every scheme. See `Sink`."""
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
        """Make the file in its final size, all but the values in their final content. See `Sink`.

        Raises TargetError where it is larger than the free space.
        """
        target = self.output.target
        # Said now: `create` would find it out after laying out, which takes seconds for a large model.
        needed, free = sum(map(self.n_bytes, entries)), shutil.disk_usage(target.parent).free
        # A run that is resumed has its space already.
        if (file := self.output.path(target.name)).exists():
            free += 512 * file.stat().st_blocks
        if needed > free:
            raise TargetError(f"{target}: {needed:,} bytes are needed and {free:,} are free in {target.parent}")
        metadata = {PROVENANCE_KEY: json.dumps(provenance), METADATA_KEY: json.dumps(source.metadata)}
        if source.config is not None:
            metadata[CONFIG_KEY] = json.dumps(source.config)
        self._schema = COLUMNS.with_metadata({**arrow_columns.schema(SCALE_DTYPE).metadata, **metadata})
        self._rows = {}
        rows = Rows([self.pieces(entry) for entry in entries], self._zero_point)
        skeleton, positions = self._lay_out(self._schema, self._noted(rows))
        for row, found in zip(self._rows.values(), positions, strict=True):
            row.places[:] = [p._replace(offset=at) for p, at in zip(row.places, found, strict=True)]
        self.output.create(target.name, skeleton.size)
        holes = ((p.offset, p.n_bytes) for row in self._rows.values() for p in row.places if p.n_bytes)
        for at, data in skeleton.structure(holes):
            self.output.write(target.name, at, np.frombuffer(data, np.uint8))

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

    def commit(self) -> tuple[Path, ...]:
        """Compress the file if that was asked for, and commit the output. See `Sink`."""
        if self.compression is not None:
            path = self.output.path(self.output.target.name)
            packed = path.with_name(f"{path.name}.{self.compression}")
            with target_errors(self.output.target):
                self._rewrite(path, packed, self._schema)
                packed.replace(path)
        return self.output.commit()

    def _noted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows as they pass, with the sizes of their places."""
        name = self.output.target.name
        for row in rows:
            places = [Place(name, 0, n) for n in row.sizes.values()]
            self._rows[row.piece.entry.info.name, row.piece.number] = _Laid(places, identity(row.batch))
            yield row
