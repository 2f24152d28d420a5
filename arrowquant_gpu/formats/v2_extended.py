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

from .. import arrow_columns
from ..dtypes import DTYPES
from ..schemes import rows_and_length
from . import Entry, TensorInfo

CHUNK_BYTES = 16 << 20

# Scales are float32 in files, which holds those of every storage type exactly, so that any reader can use them.
SCALE_DTYPE = "float32"
COLUMNS = pa.schema([*arrow_columns.schema(SCALE_DTYPE), ("reason", pa.string()), ("sha256", pa.string())])

# What says which tensor, and which part of it, a row is.
PLACE = ("layer_name", "shape", "dtype", "scheme", "chunk", "n_chunks", "row_offset")

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
        (Split(units=32000, step=7598), 5)
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


def row_hash(batch: pa.RecordBatch) -> str:
    """What column sha256 of a one-row batch must be: a hash of what the row says it is, and of what it holds.

    The place is part of it, so that data which belong to another tensor, or to another part of it, are found too.
    The recipe is in docs/parquet.md.
    """
    place = [batch[column][0].as_py() for column in PLACE]
    digest = hashlib.sha256(json.dumps(place, separators=(",", ":")).encode())
    digest.update(batch["data"][0].as_buffer())
    for column in ("scales", "zero_points"):
        if (cell := batch[column][0]).is_valid:
            digest.update(np.ascontiguousarray(cell.values.to_numpy()).data)
    return digest.hexdigest()
