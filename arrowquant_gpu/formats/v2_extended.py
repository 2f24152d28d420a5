"""A quantized model as rows of one file, for Parquet and Arrow IPC alike: columns, cutting, and the hash of a row.

The columns are those of `arrow_columns` with float32 scales, and two more: `reason` and `sha256` (docs/parquet.md).
A tensor is one row. One whose codes and scales are larger than CHUNK_BYTES is several, cut between rows of weights, so
that neither writing nor reading ever holds more than about two of them; every row alone is enough to decode its part.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import arrow_columns
from ..dtypes import DTYPES
from ..errors import InputError
from ..schemes import rows_and_length
from . import Entry, TensorInfo

CHUNK_BYTES = 16 << 20

# Scales are float32 in files, which holds those of every storage type exactly, so that any reader can use them.
SCALE_DTYPE = "float32"
COLUMNS = pa.schema([*arrow_columns.schema(SCALE_DTYPE), ("reason", pa.string()), ("sha256", pa.string())])

# What a row holds is in three columns; all others but the hash say what it is.
IDENTITY = tuple(name for name in COLUMNS.names if name not in ("data", "scales", "zero_points", "sha256"))

# Keys of the file's metadata; the last three hold JSON.
VERSION_KEY = b"arrowquant.version"
PROVENANCE_KEY = b"arrowquant.provenance"
CONFIG_KEY = b"arrowquant.config"
METADATA_KEY = b"arrowquant.source_metadata"


@dataclass(frozen=True, slots=True)
class Split:
    """How a tensor is cut: `units` (rows of codes, or bytes of a copied tensor) in runs of `step`."""

    units: int
    step: int

    @classmethod
    def of(cls, entry: Entry) -> Split:
        """Whole rows up to CHUNK_BYTES, at least one; the bytes of a longer row that is copied are cut within it.

        >>> from pathlib import Path
        >>> from arrowquant_gpu.schemes import Scheme
        >>> info = TensorInfo("w", "float32", (32000, 4096), Path("a.safetensors"), 0, 4 * 32000 * 4096)
        >>> split = Split.of(Entry(info, Scheme.parse("int4_g128"), "")); split, split.n_chunks
        (Split(units=32000, step=7710), 5)
        """
        info, scheme = entry.info, entry.scheme
        if scheme is None:
            row = copied_row_bytes(info)
            return cls(info.n_bytes, CHUNK_BYTES // row * row if 0 < row <= CHUNK_BYTES else CHUNK_BYTES)
        rows, row_bytes = scheme.packed_shape(info.shape)
        if scheme.granularity != "tensor":
            row_bytes += scheme.scales_shape(info.shape)[1] * scale_bytes(scheme.symmetric)
        return cls(rows, max(1, CHUNK_BYTES // max(1, row_bytes)))

    @property
    def n_chunks(self) -> int:
        """Rows of the file that the tensor takes: at least one, also for an empty tensor."""
        return max(1, -(-self.units // self.step))


def scale_bytes(symmetric: bool) -> int:
    """Bytes in the file of one scale and its zero point."""
    return 4 if symmetric else 5


def copied_shape(info: TensorInfo) -> tuple[int, int]:
    """A copied tensor as (rows, length): of its elements, or of its bytes where NumPy cannot index its type."""
    return (1, info.n_bytes) if DTYPES[info.dtype].numpy is None else rows_and_length(info.shape)


def copied_row_bytes(info: TensorInfo) -> int:
    """Bytes of one row of `copied_shape`."""
    dtype = DTYPES[info.dtype].numpy
    return copied_shape(info)[1] * (1 if dtype is None else dtype.itemsize)


def data_of(batch: pa.RecordBatch) -> NDArray[np.uint8]:
    """The data of a one-row batch, a read-only view of its buffer. Raises InputError for null."""
    column = batch["data"]
    if column.null_count:
        raise InputError("data is null")
    _, offsets, data = column.buffers()
    start, stop = np.frombuffer(offsets, np.int64, 2, 8 * column.offset).tolist()
    return np.empty(0, np.uint8) if start == stop else np.frombuffer(data, np.uint8, stop - start, start)


def row_hash(batch: pa.RecordBatch) -> str:
    """What column sha256 of a one-row batch must be: a hash of what the row says it is, and of what it holds.

    Data that belong to another tensor, or to another part of it, are found by it too. docs/parquet.md has the recipe.
    """
    digest = hashlib.sha256(json.dumps([batch[c][0].as_py() for c in IDENTITY], separators=(",", ":")).encode())
    digest.update(data_of(batch).data)
    for column in ("scales", "zero_points"):
        if (cell := batch[column][0]).is_valid:
            digest.update(np.ascontiguousarray(cell.values.to_numpy()).data)
    return digest.hexdigest()
