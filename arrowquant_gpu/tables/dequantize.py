"""Tables and streams of quantized tensors back to such of weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from .. import arrow_values, ops
from ..backends import Backend, get_backend
from ..dtypes import DTYPES, KERNEL_DTYPES
from ..errors import InputError
from ..schemes import rows_and_length
from .quantize import as_reader, batches_of
from .results import QuantizedRow, read_rows, validate
from .weights import weights_batch, weights_schema

# Of weights, in one record batch that is written, unless a single row has more.
BATCH_BYTES = 64 << 20


def decoded_schema(dtype: str = "float32", *, is_cut: bool = False) -> pa.Schema:
    """The columns of decoded weights, which `quantize_table` takes; see `weights_schema`.

    Raises InputError for a dtype that is not decoded to.
    """
    if dtype not in KERNEL_DTYPES:
        raise InputError(f"dtype {dtype!r}: dequantize gives {', '.join(KERNEL_DTYPES)}")
    return weights_schema(dtype, is_cut=is_cut)


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
    batches = list(batches_of(given))
    for batch in batches:
        validate(batch)
    table = pa.Table.from_batches(batches, given.schema)
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
    schema = decoded_schema(dtype, is_cut="n_chunks" in reader.schema.names)

    def decoded() -> Iterator[pa.RecordBatch]:
        for batch in batches_of(reader):
            waiting: list[QuantizedRow] = []
            n_bytes = 0
            for row in read_rows(batch):
                row_bytes = row.size * DTYPES[dtype].bits // 8
                if waiting and n_bytes + row_bytes > BATCH_BYTES:
                    yield _decoded(waiting, schema, dtype, backend)
                    waiting, n_bytes = [], 0
                waiting.append(row)
                n_bytes += row_bytes
            if waiting:
                yield _decoded(waiting, schema, dtype, backend)

    return pa.RecordBatchReader.from_batches(schema, decoded())


def _decoded(rows: list[QuantizedRow], schema: pa.Schema, dtype: str, backend: Backend) -> pa.RecordBatch:
    """The weights of some rows, decoded into one allocation."""
    sizes = [row.size for row in rows]
    values, stop = arrow_values.empty(sum(sizes), DTYPES[dtype].numpy), 0
    for row, size in zip(rows, sizes, strict=True):
        q, start, stop = row.tensor, stop, stop + size
        ops.check_tensor(q)
        out = values[start:stop].reshape(rows_and_length(q.shape))
        ops.dequantize_rows(q.packed, q.scales, q.zeros, q.scheme, out, backend=backend, name=row.name)
    return weights_batch(rows, sizes, values, schema)
