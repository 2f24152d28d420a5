"""Rows cut into messages, and put together again: Flight carries no message of 2 GiB, and small ones are quicker.

Columns `chunk` and `n_chunks` say which piece of its tensor a row is. A piece has whole rows of weights, so that
pieces are quantized and decoded alone; they follow each other in order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from .. import arrow_values
from ..errors import InputError
from ..schemes import Scheme, rows_and_length
from ..tables import Layer
from ..tables.results import MAX_ITEMS, QuantizedRow, read_rows
from ..tables.weights import weights_batch, weights_schema
from ..tensor import QuantizedTensor

# What goes into one message. Messages of 32 MB and more are slower: the allocator gives their pages back each time.
MESSAGE_BYTES = 8 << 20
# Tensors under this are gathered by copying until a message is full; others go from where they are.
GATHERED_BYTES = 1 << 20
_PIECE_COLUMNS = (("chunk", pa.uint32()), ("n_chunks", pa.uint32()))


def _message(layers: list[Layer]) -> pa.RecordBatch:
    """A record batch of rows of one element type; of one row, a view of its array."""
    flat = [layer.weights.reshape(-1) for layer in layers]
    values = flat[0] if len(flat) == 1 else np.concatenate(flat)
    return weights_batch(layers, [a.size for a in flat], values, weights_schema(layers[0].dtype, is_cut=True))


def cut_weights(layers: Iterable[Layer], scheme: Scheme, message_bytes: int) -> Iterator[pa.RecordBatch]:
    """Layers of one element type as messages: large ones in pieces, views; small ones together.

    A row of weights is never cut, nor is a tensor that has one scale in all, nor a piece of one that came cut.
    """
    together: list[Layer] = []
    size = 0
    for layer in layers:
        if together and size + layer.weights.nbytes > message_bytes:
            yield _message(together)
            together, size = [], 0
        if layer.weights.nbytes < GATHERED_BYTES:
            together.append(layer)
            size += layer.weights.nbytes
            continue
        if together:
            yield _message(together)
            together, size = [], 0
        for piece in _pieces(layer, scheme, message_bytes):
            yield _message([piece])
    if together:
        yield _message(together)


def _pieces(layer: Layer, scheme: Scheme, message_bytes: int) -> Iterator[Layer]:
    rows = len(layer.weights)
    if layer.n_chunks > 1 or scheme.granularity == "tensor" or layer.weights.nbytes <= message_bytes:
        yield layer
        return
    step = max(1, message_bytes // (layer.weights.nbytes // rows))
    n_chunks = -(-rows // step)
    for chunk in range(n_chunks):
        yield layer._replace(weights=layer.weights[chunk * step : (chunk + 1) * step], chunk=chunk, n_chunks=n_chunks)


class QuantizedRows:
    """Reads record batches of quantized rows, one after the other, and knows which names and pieces came before.

    Raises InputError for rows that cannot be decoded, names that are there twice, and pieces out of order.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._open: tuple[str, int, int] | None = None

    def read(self, batch: pa.RecordBatch) -> Iterator[QuantizedRow]:
        """The rows of the next batch."""
        for row in read_rows(batch):
            self._follow(row.name, row.chunk, row.n_chunks)
            yield row

    def finish(self) -> None:
        """There are no more batches. Raises InputError for a tensor of which pieces are missing."""
        if self._open is not None:
            name, chunk, n_chunks = self._open
            raise InputError(f"{name}: {chunk} of its {n_chunks} chunks are there")

    def _follow(self, name: str, chunk: int, n_chunks: int) -> None:
        if self._open is None:
            if not name:
                raise InputError("layer_name is empty or null")
            if name in self._seen:
                raise InputError(f"{name}: this layer_name is there twice")
            self._seen.add(name)
            self._open = name, 0, n_chunks
        if (name, chunk, n_chunks) != self._open:
            expected = "chunk {1} of {2} of {0}".format(*self._open)
            raise InputError(f"{name}: chunk {chunk} of {n_chunks}, where {expected} must be")
        self._open = None if chunk + 1 == n_chunks else (name, chunk + 1, n_chunks)


def quantized_schema(schema: pa.Schema) -> pa.Schema:
    """Columns of rows that `cut_quantized` gives: with chunk and n_chunks, without what was true of the row alone."""
    for column in ("row_offset", "xxh3_128"):
        if (i := schema.get_field_index(column)) >= 0:
            schema = schema.remove(i)
    for name, kind in _PIECE_COLUMNS:
        if name not in schema.names:
            schema = schema.append(pa.field(name, kind))
    return schema


def cut_quantized(
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    message_bytes: int,
    *,
    expansion: bool = False,
    came_cut: set[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Quantized rows as messages with the columns `schema`; large ones in pieces, views.

    Names of tensors that are in pieces already go to `came_cut`; such a piece is not cut again.

    `expansion`: a message holds what gives `message_bytes` of decoded float32. Without it a tensor that has one scale
    in all is not cut, since `join` would find that scale in every piece.
    """
    rows = QuantizedRows()
    for batch in batches:
        for i, cell in enumerate(rows.read(batch)):
            row = _with_pieces(batch.slice(i, 1), schema, cell.chunk, cell.n_chunks)
            tensor = cell.tensor
            if cell.n_chunks > 1 and came_cut is not None:
                came_cut.add(cell.name)
            n_rows, length = rows_and_length(tensor.shape)
            size = 4 * n_rows * length if expansion else tensor.packed.nbytes + tensor.scales.nbytes
            is_one = tensor.scheme.granularity == "tensor" and not expansion
            if is_one or cell.n_chunks > 1 or size <= message_bytes or n_rows <= 1:
                yield row
                continue
            step = max(1, message_bytes // (size // n_rows))
            n_chunks = -(-n_rows // step)
            for chunk in range(n_chunks):
                part = slice(chunk * step, (chunk + 1) * step)
                yield _piece(row, schema, tensor, part, chunk, n_chunks)
    rows.finish()


def _with_pieces(row: pa.RecordBatch, schema: pa.Schema, chunk: int, n_chunks: int) -> pa.RecordBatch:
    found = {"chunk": chunk, "n_chunks": n_chunks}
    arrays = [pa.array([found[f.name]], f.type) if f.name in found else row.column(f.name) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _piece(
    row: pa.RecordBatch, schema: pa.Schema, tensor: QuantizedTensor, part: slice, chunk: int, n_chunks: int
) -> pa.RecordBatch:
    by_row = tensor.scheme.granularity != "tensor"
    scales = tensor.scales[part] if by_row else tensor.scales
    zeros = tensor.zeros[part] if by_row and tensor.zeros is not None else tensor.zeros
    arrays = []
    for field in schema:
        if field.name in ("data", "quantized_data"):
            offsets = pa.py_buffer(np.array([0, tensor.packed[part].nbytes], np.int64))
            data = arrow_values.buffer(tensor.packed[part])
            cell = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, data], 0).cast(field.type)
        elif field.name == "scales":
            cell = _list_cell(field.type, scales)
        elif field.name == "zero_points" and zeros is not None:
            cell = _list_cell(field.type, zeros)
        elif field.name in ("chunk", "n_chunks"):
            cell = pa.array([chunk if field.name == "chunk" else n_chunks], field.type)
        else:
            cell = row.column(field.name)
        arrays.append(cell)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _list_cell(kind: pa.DataType, a: NDArray[Any]) -> pa.Array:
    """A list column of one row; bits where its items are bits, widened where they are wider."""
    items = arrow_values.from_numpy(np.ascontiguousarray(a))
    if items.type != kind.value_type:
        items = arrow_values.from_numpy(a.astype(np.float32)).cast(kind.value_type)
    width = np.int64 if pa.types.is_large_list(kind) else np.int32
    offsets = pa.py_buffer(np.array([0, a.size], width))
    return pa.Array.from_buffers(kind, 1, [None, offsets], 0, children=[items])


def join(batches: Iterable[pa.RecordBatch], schema: pa.Schema, came_cut: Collection[str] | None = None) -> pa.Table:
    """Rows of one table, in one chunk; pieces of a tensor are one row again. Codes and items are copied once.

    came_cut: names of tensors whose pieces stay rows; None where there are none, and nobody asks for the columns that
        count pieces

    Raises InputError for pieces that are out of order.
    """
    table = pa.Table.from_batches(batches, schema)
    is_cut = "chunk" in schema.names
    starts = _starts(table, came_cut or ()) if is_cut else np.arange(table.num_rows)
    joined, fields = [], []
    for field in schema:
        column = table.column(field.name)
        if field.name in ("chunk", "n_chunks"):
            if came_cut is None:
                continue
            names = [name in came_cut for name in table.column("layer_name").take(pa.array(starts)).to_pylist()]
            whole = pa.scalar(int(field.name == "n_chunks"), field.type)
            cells: Any = pc.if_else(pa.array(names, pa.bool_()), column.combine_chunks().take(pa.array(starts)), whole)
        elif field.name in ("data", "quantized_data"):
            cells = _joined_bytes(column, starts)
        elif field.name in ("scales", "zero_points", "weights"):
            cells = _joined_lists(column, starts)
        else:
            cells = column.combine_chunks().take(pa.array(starts)) if is_cut else column.combine_chunks()
        joined.append(cells)
        fields.append(field.with_type(cells.type))
    return pa.Table.from_arrays(joined, schema=pa.schema(fields, schema.metadata))


def _starts(table: pa.Table, came_cut: Collection[str]) -> NDArray[np.int64]:
    """The rows that will be rows: where a tensor begins, and every piece of those that came cut."""
    chunk, n_chunks = (table.column(c).to_numpy().astype(np.int64) for c in ("chunk", "n_chunks"))
    names = table.column("layer_name").to_pylist()
    starts, i = [], 0
    while i < len(names):
        n = 1 if names[i] in came_cut else int(n_chunks[i])
        part = slice(i, i + n)
        if names[i] not in came_cut and (chunk[part].tolist() != list(range(n)) or set(names[part]) != {names[i]}):
            raise InputError(f"{names[i]}: its {n} chunks do not follow each other")
        starts.append(i)
        i += max(n, 1)
    return np.array(starts, np.int64)


def _joined_bytes(column: pa.ChunkedArray, starts: NDArray[np.int64]) -> pa.Array:
    parts = [_binary_parts(chunk.cast(pa.large_binary())) for chunk in column.chunks]
    ends = _ends([lengths for lengths, _ in parts], starts)
    data = arrow_values.empty(int(ends[-1]), np.uint8)
    at = 0
    for _, view in parts:
        data[at : at + view.size] = view
        at += view.size
    return pa.Array.from_buffers(
        pa.large_binary(), len(starts), [None, pa.py_buffer(ends), arrow_values.buffer(data)], 0
    )


def _binary_parts(a: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Lengths of the cells, and their bytes."""
    _, offsets, data = a.buffers()
    ends = np.frombuffer(offsets, np.int64, len(a) + 1, a.offset * 8) if len(a) else np.zeros(1, np.int64)
    view = np.frombuffer(data, np.uint8)[ends[0] : ends[-1]] if ends[-1] > ends[0] else np.empty(0, np.uint8)
    return np.diff(ends), view


def _joined_lists(column: pa.ChunkedArray, starts: NDArray[np.int64]) -> pa.Array:
    """Lists whose items follow each other."""
    lengths = [
        np.nan_to_num(chunk.value_lengths().to_numpy(zero_copy_only=False)).astype(np.int64) for chunk in column.chunks
    ]
    ends = _ends(lengths, starts)
    items = pa.chunked_array([c.flatten() for c in column.chunks], column.type.value_type).combine_chunks()
    is_large = ends[-1] > MAX_ITEMS or pa.types.is_large_list(column.type)
    kind = (pa.large_list if is_large else pa.list_)(column.type.value_field)
    nulls = column.is_null().to_numpy()[starts] if column.null_count else None
    valid = None if nulls is None else pa.py_buffer(np.packbits(~nulls, bitorder="little"))
    n_null = 0 if nulls is None else int(nulls.sum())
    offsets = pa.py_buffer(ends.astype(np.int64 if is_large else np.int32))
    return pa.Array.from_buffers(kind, len(starts), [valid, offsets], n_null, children=[items])


def _ends(lengths: list[NDArray[np.int64]], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where the cells that begin with the rows `starts` begin and end, if all follow each other."""
    ends = np.concatenate([[0], np.cumsum(np.concatenate([np.zeros(0, np.int64), *lengths]))]).astype(np.int64)
    wanted: NDArray[np.int64] = ends[np.append(starts, len(ends) - 1)]
    return wanted
