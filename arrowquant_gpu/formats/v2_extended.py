"""A quantized model as rows of one file, for Parquet and Arrow IPC alike: the columns, and the hash of a row.

The columns are those of `arrow_columns` with float32 scales, and two more: `reason` and `xxh3_128` (docs/parquet.md).
Each piece of a tensor (pieces.py) is a row, and every row alone is enough to decode its part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from .. import arrow_columns
from ..dtypes import DTYPES
from ..errors import InputError
from ..schemes import rows_and_length
from . import TensorInfo

# Scales are float32 in files, which holds those of every storage type exactly, so that any reader can use them.
SCALE_DTYPE = "float32"
COLUMNS = pa.schema([*arrow_columns.schema(SCALE_DTYPE), ("reason", pa.string()), ("xxh3_128", pa.string())])

# What a row holds is in three columns; all others but the hash say what it is.
IDENTITY = tuple(name for name in COLUMNS.names if name not in ("data", "scales", "zero_points", "xxh3_128"))

# Keys of the file's metadata; the last three hold JSON.
VERSION_KEY = b"arrowquant.version"
PROVENANCE_KEY = b"arrowquant.provenance"
CONFIG_KEY = b"arrowquant.config"
METADATA_KEY = b"arrowquant.source_metadata"


def copied_shape(info: TensorInfo) -> tuple[int, int]:
    """A copied tensor as (rows, length): of its elements, or of its bytes where NumPy cannot index its type."""
    return (1, info.n_bytes) if DTYPES[info.dtype].numpy is None else rows_and_length(info.shape)


def data_of(batch: pa.RecordBatch) -> NDArray[np.uint8]:
    """The data of a one-row batch, a read-only view of its buffer. Raises InputError for null."""
    column = batch["data"]
    if column.null_count:
        raise InputError("data is null")
    _, offsets, data = column.buffers()
    start, stop = np.frombuffer(offsets, np.int64, 2, 8 * column.offset).tolist()
    return np.empty(0, np.uint8) if start == stop else np.frombuffer(data, np.uint8, stop - start, start)


def identity(batch: pa.RecordBatch) -> bytes:
    """What a one-row batch says it is: the part of its hash that does not depend on its values."""
    return json.dumps([batch[c][0].as_py() for c in IDENTITY], separators=(",", ":")).encode()


def values_hash(identity: bytes, values: Iterable[NDArray[Any]]) -> str:
    """What column xxh3_128 must be for row-major data, float32 scales and uint8 zero points, as far as there are any.

    Data that belong to another tensor, or to another part of it, are found by it too. docs/parquet.md has the recipe.
    """
    digest = xxhash.xxh3_128(identity)
    for array in values:
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def row_hash(batch: pa.RecordBatch) -> str:
    """What column xxh3_128 of a one-row batch must be."""
    cells = [batch[column][0] for column in ("scales", "zero_points")]
    lists = [np.ascontiguousarray(cell.values.to_numpy()) for cell in cells if cell.is_valid]
    return values_hash(identity(batch), [data_of(batch), *lists])
