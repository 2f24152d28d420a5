"""Tables and streams of quantized tensors back to such of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from .. import arrow_columns, arrow_values, ops
from ..backends import Backend, get_backend
from ..dtypes import DTYPES, KERNEL_DTYPES
from ..errors import InputError
from ..schemes import rows_and_length
from ..tensor import QuantizedTensor
from .quantize import as_reader, batches_of

# Of weights, in one record batch that is written, unless a single row has more.
BATCH_BYTES = 64 << 20


def weights_schema(dtype: str = "float32", *, is_cut: bool = False) -> pa.Schema:
    """The columns of decoded weights, which `quantize_table` takes; lists have offsets of 64 bits.

    >>> weights_schema("float16").field("weights").type, weights_schema(is_cut=True).names
    (LargeListType(large_list<item: halffloat>), ['layer_name', 'weights', 'shape', 'chunk', 'n_chunks'])

    Raises InputError for a dtype that is not decoded to.
    """
    if dtype not in KERNEL_DTYPES:
        raise InputError(f"dtype {dtype!r}: dequantize gives {', '.join(KERNEL_DTYPES)}")
    fields = [
        ("layer_name", pa.string()),
        ("weights", pa.large_list(arrow_values.field("item", dtype))),
        ("shape", pa.list_(pa.int64())),
    ]
    if is_cut:
        fields += [("chunk", pa.uint32()), ("n_chunks", pa.uint32())]
    return pa.schema(fields)


def dequantize_table(
    table: Any, dtype: str | None = None, *, device: str = "auto", threads: int | None = None
) -> pa.Table:
    """Decode a table of results: (code - zero point) * scale in float32, rounded once to `dtype`.

    `table` is as for `quantize_table`, with the columns of results.py. By default `dtype` is what all the tensors were
    before, where that is float32, float16 or bfloat16 (bits as marked uint16), else float32. Rows are in input order
    and in new memory; a tensor in several rows stays in several.

        >>> from arrowquant_gpu.tables.quantize import quantize_table
        >>> table = pa.table({"layer_name": ["fc"], "weights": [[0.0, 3.0, -7.5]]})
        >>> dequantize_table(quantize_table(table, "int4_g32"), device="cpu")["weights"].to_pylist()
        [[0.0, 3.0, -8.0]]

    Raises InputError where a row cannot be decoded, and DeviceError.
    """
    given = as_reader(table)
    table = pa.Table.from_batches(_valid(given), given.schema)
    if dtype is None:
        found = set(map(str, table["dtype"].to_pylist())) if "dtype" in table.column_names else set()
        dtype = found.pop() if len(found) == 1 and found <= set(KERNEL_DTYPES) else "float32"
    stream = dequantize_stream(table, dtype, device=device, threads=threads)
    return pa.Table.from_batches(list(stream), stream.schema)


def dequantize_stream(
    batches: Any, dtype: str = "float32", *, device: str = "auto", threads: int | None = None
) -> pa.RecordBatchReader:
    """Decode a stream of results while it is read, in batches of about BATCH_BYTES.

        >>> from arrowquant_gpu.tables.quantize import quantize_stream
        >>> table = pa.table({"layer_name": ["fc"], "weights": [[0.0, 3.0, -7.5]]})
        >>> quantized, _ = quantize_stream(table, "int8_g32")
        >>> dequantize_stream(quantized, "float16").read_all()["weights"].type
        LargeListType(large_list<item: halffloat>)

    Raises InputError and DeviceError as `dequantize_table`, when the stream is read.
    """
    reader, backend = as_reader(batches), get_backend(device, threads)
    schema = weights_schema(dtype, is_cut="n_chunks" in reader.schema.names)

    def decoded() -> Iterator[pa.RecordBatch]:
        for batch in _valid(reader):
            waiting: list[_Row] = []
            for row in _rows(batch):
                if waiting and sum(r.size for r in [*waiting, row]) * DTYPES[dtype].bits // 8 > BATCH_BYTES:
                    yield _decoded(waiting, schema, dtype, backend)
                    waiting = []
                waiting.append(row)
            if waiting:
                yield _decoded(waiting, schema, dtype, backend)

    return pa.RecordBatchReader.from_batches(schema, decoded())


class _Row(NamedTuple):
    """One row of results; `shape` is that of the whole tensor."""

    name: str
    tensor: QuantizedTensor
    shape: list[int]
    chunk: int
    n_chunks: int

    @property
    def size(self) -> int:
        return math.prod(self.tensor.shape)


def _valid(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """The batches of a stream, which nothing may look into before."""
    for batch in batches_of(reader):
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as e:
            raise InputError(f"a record batch of results is malformed: {e}") from e
        yield batch


def _rows(batch: pa.RecordBatch) -> Iterator[_Row]:
    count, names = batch.num_rows, batch.schema.names
    chunks = batch["chunk"].to_pylist() if "chunk" in names else [0] * count
    n_chunks = batch["n_chunks"].to_pylist() if "n_chunks" in names else [1] * count
    for i, (name, tensor) in enumerate(arrow_columns.read_all(batch)):
        if not isinstance(tensor, QuantizedTensor):
            raise InputError(f"{name}: this tensor is not quantized; `arrowquant dequantize` reads whole checkpoints")
        yield _Row(name, tensor, batch["shape"][i].as_py(), chunks[i] or 0, n_chunks[i] or 1)


def _decoded(rows: list[_Row], schema: pa.Schema, dtype: str, backend: Backend) -> pa.RecordBatch:
    """The weights of some rows, decoded into one allocation."""
    ends = np.cumsum([0, *(row.size for row in rows)], dtype=np.int64)
    values = arrow_values.empty(int(ends[-1]), DTYPES[dtype].numpy)
    for row, start, stop in zip(rows, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        q = row.tensor
        ops.check_tensor(q)
        out = values[start:stop].reshape(rows_and_length(q.shape))
        ops.dequantize_rows(q.packed, q.scales, q.zeros, q.scheme, out, backend=backend, name=row.name)
    kind = schema.field("weights").type
    columns = {
        "layer_name": [row.name for row in rows],
        "weights": pa.Array.from_buffers(
            kind, len(rows), [None, pa.py_buffer(ends)], 0, children=[arrow_values.from_numpy(values)]
        ),
        "shape": [row.shape for row in rows],
        "chunk": [row.chunk for row in rows],
        "n_chunks": [row.n_chunks for row in rows],
    }
    arrays = [columns[f.name] if f.name == "weights" else pa.array(columns[f.name], f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
