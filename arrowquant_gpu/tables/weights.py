"""Rows of weights as `Layer`s: views of the Arrow buffers, checked where they come in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import arrow_values
from ..arrow_values import DTYPE_KEY, to_numpy
from ..arrow_weights import dense_chunks
from ..dtypes import WEIGHT_DTYPES, from_numpy
from ..errors import InputError
from ..schemes import rows_and_length
from . import Layer, Problem

# What columns of uint32 can count.
MAX_CHUNKS = 2**32 - 1
COLUMNS = ("layer_name", "weights", "shape", "chunk", "n_chunks")


def check_schema(schema: pa.Schema) -> None:
    """Raise InputError, saying what is expected, unless a table with this schema can hold weights."""
    names = schema.names
    for column in COLUMNS:
        if (n := names.count(column)) != 1 and (n or column in COLUMNS[:2]):
            raise InputError(
                f"column {column!r} is {'there twice' if n else 'missing'}: a table of weights has "
                f"layer_name (string) and weights (lists of numbers), and may have shape (list<int64>); "
                f"this one has {', '.join(names) or 'no columns'}"
            )
    if not _is_text(schema.field("layer_name").type):
        raise InputError(f"column 'layer_name' is {schema.field('layer_name').type}; it must be string")
    if "shape" in names and not _is_sizes(schema.field("shape").type):
        raise InputError(f"column 'shape' is {schema.field('shape').type}; it must be a list of integers in each row")
    if not _is_listed(kind := schema.field("weights").type):
        raise InputError(f"column 'weights' is {kind}; it must hold a list of numbers in each row")
    if ("chunk" in names) != ("n_chunks" in names):
        raise InputError("columns 'chunk' and 'n_chunks' go together: the table has one of them")
    for column in ("chunk", "n_chunks"):
        if column in names and not pa.types.is_integer(schema.field(column).type):
            raise InputError(f"column {column!r} is {schema.field(column).type}; it must be an integer")
    if "chunk" in names and "shape" not in names:
        raise InputError("column 'shape' is missing: where a tensor is cut into rows, it says the whole one's shape")


def weights_schema(dtype: str, *, is_cut: bool = False) -> pa.Schema:
    """The columns of weights of one element type, any that can be quantized; lists have offsets of 64 bits.

    >>> weights_schema("float16").field("weights").type, weights_schema("float16", is_cut=True).names
    (LargeListType(large_list<item: halffloat>), ['layer_name', 'weights', 'shape', 'chunk', 'n_chunks'])
    """
    fields = [
        ("layer_name", pa.string()),
        ("weights", pa.large_list(arrow_values.field("item", dtype))),
        ("shape", pa.list_(pa.int64())),
    ]
    if is_cut:
        fields += [("chunk", pa.uint32()), ("n_chunks", pa.uint32())]
    return pa.schema(fields)


class Row(Protocol):
    """What a row of weights says beside them; see `Layer`."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def chunk(self) -> int: ...
    @property
    def n_chunks(self) -> int: ...


def weights_batch(rows: Sequence[Row], sizes: Sequence[int], values: NDArray[Any], schema: pa.Schema) -> pa.RecordBatch:
    """A record batch over `values`, flat: so many of them for each of `rows`, one row after the other."""
    ends = np.cumsum([0, *sizes], dtype=np.int64)
    kind, items = schema.field("weights").type, arrow_values.from_numpy(values)
    columns = {
        "layer_name": [row.name for row in rows],
        "weights": pa.Array.from_buffers(kind, len(rows), [None, pa.py_buffer(ends)], 0, children=[items]),
        "shape": [row.shape for row in rows],
        "chunk": [row.chunk for row in rows],
        "n_chunks": [row.n_chunks for row in rows],
    }
    arrays = [columns[f.name] if f.name == "weights" else pa.array(columns[f.name], f.type) for f in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


class Rows:
    """Reads one record batch after the other, and knows what came before: names, and tensors cut into rows.

    `layers` gives a Layer for each row, or a Problem for a row that cannot be read. `finish` says which tensors are
    incomplete. Views keep the Arrow buffers alive.

    >>> batch = pa.record_batch({"layer_name": ["fc"], "weights": [[[1.0, 2.0], [3.0, 4.0]]]})
    >>> [layer] = Rows(batch.schema).layers(batch)
    >>> layer.name, layer.shape, layer.dtype, layer.weights.tolist()
    ('fc', (2, 2), 'float64', [[1.0, 2.0], [3.0, 4.0]])

    Raises InputError for a schema that cannot hold weights; see `check_schema`.
    """

    def __init__(self, schema: pa.Schema) -> None:
        check_schema(schema)
        self._schema, self._is_cut = schema, "chunk" in schema.names
        self._seen: set[str] = set()
        self._open: dict[str, _Open] = {}

    def layers(self, batch: pa.RecordBatch | pa.Table) -> Iterator[Layer | Problem]:
        """The rows in order. Raises InputError where the batch, or table, as a whole cannot be read.

        A table costs less than its batches one by one, of which there is one for each chunk.
        """
        self._check_schema(batch.schema)
        try:
            batch.validate(full=True)
            names = batch.column("layer_name").to_pylist()
            columns = [batch.column(c).to_pylist() if c in batch.schema.names else None for c in COLUMNS[2:]]
        except (pa.ArrowInvalid, UnicodeDecodeError) as e:
            raise InputError(f"a record batch of weights is malformed: {e}") from e
        shapes, chunks, counts = (c or [None] * batch.num_rows for c in columns)
        cells = _cells(batch.column("weights"), batch.schema.field("weights"))
        for i, (name, cell) in enumerate(zip(names, cells, strict=True)):
            called = f"row {i}" if name is None else name
            try:
                if not name:
                    raise InputError(f"row {i}: layer_name is {'null' if name is None else 'empty'}")
                a = cell if isinstance(cell, np.ndarray) else _nested(cell, name)
                if self._is_cut:
                    yield self._part(name, a, shapes[i], chunks[i], counts[i])
                else:
                    yield self._whole(name, a, shapes[i])
            except InputError as e:
                # A tensor one of whose rows is refused is not gone on with.
                if name:
                    self._open.pop(name, None)
                    self._seen.add(name)
                yield Problem(called, e)

    def finish(self) -> Iterator[Problem]:
        """What is missing now that there are no more rows."""
        for name, tensor in self._open.items():
            yield Problem(name, InputError(f"{name}: {tensor.next_chunk} of its {tensor.n_chunks} chunks are there"))

    def _check_schema(self, schema: pa.Schema) -> None:
        """Files of one dataset may differ in types, but not in whether their tensors are cut into rows."""
        if schema is self._schema or schema == self._schema:
            return
        check_schema(schema)
        if ("chunk" in schema.names) != self._is_cut:
            here, before = ("with", "without") if "chunk" in schema.names else ("without", "with")
            raise InputError(f"a record batch {here} columns chunk and n_chunks comes after one {before} them")

    def _whole(self, name: str, a: NDArray[Any], shape: Any) -> Layer:
        """A row that holds a whole tensor."""
        if name in self._seen:
            raise InputError(f"{name}: this layer_name is there twice")
        self._seen.add(name)
        dtype = _dtype(a, name)
        dims = a.shape if shape is None else _shape(shape, name)
        if math.prod(dims) != a.size:
            raise InputError(f"{name}: shape {list(dims)} has {math.prod(dims)} weights, and the row has {a.size}")
        return Layer(name, a.reshape(rows_and_length(dims)), dims, dtype)

    def _part(self, name: str, a: NDArray[Any], shape: Any, chunk: int | None, n_chunks: int | None) -> Layer:
        """A row that holds some rows of a tensor, or all of them: chunk 0 of 1."""
        if chunk is None or n_chunks is None or not 0 <= chunk < n_chunks:
            raise InputError(f"{name}: chunk {chunk} of {n_chunks} is no part of a tensor")
        if n_chunks > MAX_CHUNKS:
            raise InputError(f"{name}: {n_chunks} chunks; a tensor has at most {MAX_CHUNKS}")
        dtype, dims = _dtype(a, name), a.shape if shape is None else _shape(shape, name)
        if name in self._seen and name not in self._open:
            raise InputError(f"{name}: chunk {chunk} comes after this tensor was complete, or refused")
        self._seen.add(name)
        tensor = self._open.pop(name, None) or _Open(dims, dtype, n_chunks)
        if (chunk, n_chunks) != (tensor.next_chunk, tensor.n_chunks):
            expected = f"chunk {tensor.next_chunk} of {tensor.n_chunks}"
            raise InputError(f"{name}: chunk {chunk} of {n_chunks}, where {expected} must be")
        if (dims, dtype) != (tensor.shape, tensor.dtype):
            first = f"{tensor.dtype} {list(tensor.shape)}"
            raise InputError(f"{name}: chunk {chunk} is of {dtype} {list(dims)}, and chunk 0 of {first}")
        rows, length = rows_and_length(dims)
        part = a.reshape(-1, length) if length and a.size % length == 0 else None
        if part is None and (length or a.size):
            raise InputError(f"{name}: chunk {chunk} has {a.size} weights, which are no whole rows of {list(dims)}")
        n_rows = rows if part is None else len(part)
        is_last = chunk + 1 == n_chunks
        if tensor.n_rows + n_rows > rows or (is_last and tensor.n_rows + n_rows < rows):
            raise InputError(f"{name}: its chunks have {tensor.n_rows + n_rows} rows, and {list(dims)} has {rows}")
        if not is_last:
            self._open[name] = tensor._replace(next_chunk=chunk + 1, n_rows=tensor.n_rows + n_rows)
        return Layer(name, a.reshape(rows, 0) if part is None else part, dims, dtype, chunk, n_chunks)


class _Open(NamedTuple):
    """A tensor of which some rows are still to come."""

    shape: tuple[int, ...]
    dtype: str
    n_chunks: int
    next_chunk: int = 0
    n_rows: int = 0


def _cells(column: pa.Array | pa.ChunkedArray, field: pa.Field) -> Iterator[NDArray[Any] | _Field]:
    """The cells of a column of weights: flat lists as arrays, what is nested or has nulls as Arrow."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    is_flat = is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
    marked_as = (kind.value_field.metadata or {}).get(DTYPE_KEY, b"").decode(errors="replace") if is_flat else ""
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        is_whole = is_flat and not chunk.null_count
        # A chunk for each row is what tables over arrays have.
        items = None if not is_whole else chunk[0].values if len(chunk) == 1 else chunk.values
        # What most tables are: lists of numbers without nulls. Their views need no Arrow object for each row.
        if items is not None and not items.null_count:
            values = to_numpy(items, marked_as, name="column 'weights'") if marked_as else items.to_numpy()
            if len(chunk) == 1:
                yield values
            else:
                for start, stop in itertools.pairwise(chunk.offsets.to_numpy().tolist()):
                    yield values[start:stop]
        else:
            for i in range(len(chunk)):
                yield _Field(chunk.slice(i, 1), field)


def _nested(cell: _Field, name: str) -> NDArray[Any]:
    """A cell as an array whose shape is its nesting. Raises InputError for nulls, ragged lists, other items."""
    if cell.is_null:
        raise InputError(f"{name}: its weights are null")
    return dense_chunks(cell, name=name)[0][0]  # type: ignore[no-any-return]


class _Field:
    """A cell together with its field, whose metadata a pyarrow array alone would lose."""

    def __init__(self, cell: pa.Array, field: pa.Field) -> None:
        self._cell, self._field = cell, field
        self.is_null = cell.null_count > 0

    def __arrow_c_array__(self, requested_schema: Any = None) -> tuple[Any, Any]:
        return self._field.__arrow_c_schema__(), self._cell.__arrow_c_array__()[1]


def _shape(value: Any, name: str) -> tuple[int, ...]:
    """A cell of column `shape`: a list of numbers, or such a list in a list of one."""
    dims = value[0] if len(value) == 1 and isinstance(value[0], list) else value
    if not isinstance(dims, list) or not all(isinstance(n, int) and 0 <= n < 2**63 for n in dims):
        raise InputError(f"{name}: shape is {value}; it must be a list of sizes")
    return tuple(dims)


def _dtype(a: NDArray[Any], name: str) -> str:
    dtype = from_numpy(a.dtype).name
    if dtype not in WEIGHT_DTYPES:
        raise InputError(f"{name}: weights are {dtype}; use one of {', '.join(WEIGHT_DTYPES)}")
    return dtype


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_sizes(kind: pa.DataType) -> bool:
    """A list of integers, such a list in a list, or no value in any row."""
    if pa.types.is_null(kind):
        return True
    depth = 0
    while _is_listed(kind) and not isinstance(kind, pa.FixedShapeTensorType):
        kind, depth = kind.value_type, depth + 1
    return depth in (1, 2) and bool(pa.types.is_integer(kind) or pa.types.is_null(kind))


def _is_listed(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return isinstance(kind, pa.FixedShapeTensorType) or any(test(kind) for test in lists)
