"""A quantized model as rows of one file, for Parquet and Arrow IPC alike: the columns, and the hash of a row.

The columns are those of `arrow_columns` with float32 scales, and two more: `reason` and `xxh3_128` (docs/parquet.md).
A model of which more is known than its weights (`Diffusion`) has five others before the hash. Each piece of a tensor
(pieces.py) is a row, and every row alone is enough to decode its part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from .. import arrow_columns
from ..dtypes import DTYPES
from ..errors import FormatError, InputError, SourceError
from ..schemes import rows_and_length
from . import Diffusion, Entry, TensorInfo
from .diffusion_columns import divisors_of

# Scales are float32 in files, which holds those of every storage type exactly, so that any reader can use them.
SCALE_DTYPE = "float32"
COLUMNS = pa.schema([*arrow_columns.schema(SCALE_DTYPE), ("reason", pa.string()), ("xxh3_128", pa.string())])

# What is known of a tensor of a diffusion model beside its weights; all null where nothing is.
DIFFUSION = pa.schema(
    [
        ("is_diffusion_model", pa.bool_()),
        ("modality", pa.string()),
        ("time_aware_quant_json", pa.string()),
        ("spatial_quant_json", pa.string()),
        ("activation_stats_json", pa.string()),
    ]
)

# What a row holds is in three columns; all others but the hash say what it is.
IDENTITY = tuple(name for name in COLUMNS.names if name not in ("data", "scales", "zero_points", "xxh3_128"))

# Keys of the file's metadata; the last three hold JSON.
VERSION_KEY = b"arrowquant.version"
PROVENANCE_KEY = b"arrowquant.provenance"
CONFIG_KEY = b"arrowquant.config"
METADATA_KEY = b"arrowquant.source_metadata"


def columns_of(entries: Iterable[Entry]) -> pa.Schema:
    """The columns of a file with these entries: `COLUMNS`, with those of `DIFFUSION` where any entry needs them.

    >>> columns_of([]).equals(COLUMNS)
    True
    """
    if all(entry.diffusion is None for entry in entries):
        return COLUMNS
    *kept, digest = COLUMNS
    return pa.schema([*kept, *DIFFUSION, digest])


def diffusion_cells(known: Diffusion | None) -> dict[str, Any]:
    """The cells of `DIFFUSION`, by column. The divisors are those in spatial_quant_json (see `check_divisors`)."""
    if known is None:
        return dict.fromkeys(DIFFUSION.names)
    cells = (True, known.modality, known.time_aware, known.spatial, known.activation_stats)
    return dict(zip(DIFFUSION.names, cells, strict=True))


def check_divisors(entry: Entry) -> None:
    """Raise FormatError where the divisors of an entry are not those in its JSON: what is decoded would be wrong."""
    known = entry.diffusion
    if known is None:
        return
    stored = divisors_of(known.spatial)
    if not (stored is known.divisors is None or np.array_equal(stored, known.divisors)):  # type: ignore[arg-type]
        raise FormatError(f"{entry.info.name}: its divisors are not those in its spatial_quant_json")


def diffusion_of(cells: Mapping[str, Any]) -> Diffusion | None:
    """The inverse of `diffusion_cells`. Raises SourceError for cells that contradict one another."""
    is_known, modality, time_aware, spatial, stats = (cells[name] for name in DIFFUSION.names)
    if not is_known:
        if others := [name for name in DIFFUSION.names[1:] if cells[name] is not None]:
            raise SourceError(f"is_diffusion_model is {json.dumps(is_known)} and {others[0]} is not null")
        return None
    if modality is None:
        raise SourceError("is_diffusion_model is true and modality is null")
    return Diffusion(modality, divisors_of(spatial), time_aware, spatial, stats)


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
    names = IDENTITY if DIFFUSION.names[0] not in batch.schema.names else (*IDENTITY, *DIFFUSION.names)
    return json.dumps([batch[c][0].as_py() for c in names], separators=(",", ":")).encode()


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
