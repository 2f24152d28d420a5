"""Quantized tensors as Arrow rows: the one set of columns (V2 Extended) that `to_arrow`, Parquet and Arrow IPC share.

| column | type | meaning |
|---|---|---|
| layer_name | utf8 | name of the tensor |
| shape | list<uint64> | shape of the whole tensor |
| dtype | utf8 | its original element type, as named in dtypes.py |
| data | large_binary | packed codes as drawn in schemes.py; of a tensor that is not quantized, its bytes, row-major |
| num_params | uint64 | weights in the whole tensor |
| quant_type | utf8 | int2, int3, int4, int5, int6, int8; or none |
| scales | large_list | one per group, row-major; see `schema` for the item type |
| zero_points | large_list<uint8> | one per group; null where the scheme is symmetric |
| quant_axis | int32 | the axis that rows and groups run along: the last; null for granularity tensor |
| group_size | uint32 | weights that share a scale; null for granularity channel and tensor |
| bit_width | uint8 | bits of a code |
| scheme | utf8 | the scheme id; null for none |
| chunk, n_chunks | uint32 | a large tensor may be cut into several rows of the table: which one this is, of how many |
| row_offset | uint64 | the first row of weights ([rows, length]) that this row of the table holds |

A row alone is enough to decode what it holds: a piece of a granularity-tensor tensor repeats the one scale.
Offsets are 64 bits wide, so a cell may be larger than 2 GiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from . import arrow_values
from .dtypes import DTYPES
from .errors import InputError, SchemeError
from .schemes import SCALE_SUFFIXES, Scheme, rows_and_length
from .tensor import QuantizedTensor

VERSION = "1"

# Without these a row cannot be decoded. The others repeat what they say, or have a default.
_REQUIRED = ("shape", "dtype", "data", "scales", "zero_points", "scheme")
# Tables of results (tables/results.py) have the packed codes under this name.
_OTHER_NAMES = {"data": "quantized_data"}


def schema(scale_dtype: str) -> pa.Schema:
    """The columns, with scales of "float32", "float16" or "bfloat16" (uint16 bit patterns, marked in the item field).

    The schema metadata says how to decode a row without this package.

        >>> schema("bfloat16").field("scales").type
        LargeListType(large_list<item: uint16>)
        >>> schema("float32").metadata[b"arrowquant.version"]
        b'1'

    Raises SchemeError for another scale dtype.
    """
    if scale_dtype not in SCALE_SUFFIXES:
        raise SchemeError(f"scale dtype {scale_dtype!r}: choose one of {', '.join(SCALE_SUFFIXES)}")
    return pa.schema(
        [
            ("layer_name", pa.string()),
            ("shape", pa.list_(pa.uint64())),
            ("dtype", pa.string()),
            ("data", pa.large_binary()),
            ("num_params", pa.uint64()),
            ("quant_type", pa.string()),
            ("scales", pa.large_list(arrow_values.field("item", scale_dtype))),
            ("zero_points", pa.large_list(pa.uint8())),
            ("quant_axis", pa.int32()),
            ("group_size", pa.uint32()),
            ("bit_width", pa.uint8()),
            ("scheme", pa.string()),
            ("chunk", pa.uint32()),
            ("n_chunks", pa.uint32()),
            ("row_offset", pa.uint64()),
        ],
        metadata=metadata(scale_dtype),
    )


def metadata(scale_dtype: str) -> dict[str, str]:
    """The schema metadata: what there is to know for decoding a row that its columns do not say."""
    return {
        "arrowquant.version": VERSION,
        "arrowquant.scale_dtype": scale_dtype,
        "arrowquant.packing": "bit stream, lowest bit first; each row of weights starts on a byte",
        "arrowquant.decode": "(code - zero_point) * scale in float32; zero_point is 2**(bit_width - 1) where null",
    }


def check(scheme: Scheme) -> None:
    """Raise SchemeError unless rows can hold tensors of this scheme: codes of whole numbers, scales and zero points.

    >>> check(Scheme.parse("int4_g128_asym"))
    """
    if scheme.family != "int":
        raise SchemeError(
            f"{scheme.id} has codes of grid {scheme.grid}, and rows of Arrow tables hold whole numbers with scales and "
            f"zero points: int2 to int8"
        )


def row(
    name: str,
    tensor: QuantizedTensor,
    *,
    scale_dtype: str | None = None,
    shape: tuple[int, ...] | None = None,
    chunk: int = 0,
    n_chunks: int = 1,
    row_offset: int = 0,
) -> pa.RecordBatch:
    """One row that refers to the host arrays of `tensor` without a copy, and keeps them alive.

    The arrays must not be written to while the row is in use. Arrays that are not row-major are copied, and so are
    scales where `scale_dtype` is wider than the scheme's own: "float32" widens float16 and bfloat16 exactly, for files
    that any reader can use. For a piece of a larger tensor give the whole tensor's `shape` and the piece's place.

        >>> import numpy as np
        >>> from arrowquant_gpu.reference import quantize
        >>> s = Scheme.parse("int4_g4")
        >>> q = QuantizedTensor(*quantize(np.ones((1, 8), np.float32), s)[:3], (8,), s, "float32")
        >>> batch = row("w", q)
        >>> batch["quant_type"][0].as_py(), batch["scheme"][0].as_py(), batch["num_params"][0].as_py()
        ('int4', 'int4_g4', 8)
        >>> batch["data"].buffers()[2].address == q.packed.ctypes.data
        True

    Raises SchemeError for a scheme that rows cannot hold (`check`), and where `scale_dtype` is narrower than its own.
    """
    scheme, whole = tensor.scheme, tensor.shape if shape is None else shape
    check(scheme)
    columns = schema(scale_dtype or scheme.scale_dtype)
    fields: dict[str, Any] = {
        "layer_name": name,
        "shape": whole,
        "dtype": tensor.dtype,
        "num_params": math.prod(whole),
        "quant_type": f"int{scheme.bits}",
        "quant_axis": None if scheme.granularity == "tensor" else max(len(whole) - 1, 0),
        "group_size": scheme.group_size,
        "bit_width": scheme.bits,
        "scheme": scheme.id,
        "chunk": chunk,
        "n_chunks": n_chunks,
        "row_offset": row_offset,
    }
    scales = _widen(tensor.scales, scheme, scale_dtype or scheme.scale_dtype)
    return _batch(
        columns,
        fields,
        data=_binary_cell(tensor.packed),
        scales=_list_cell(columns.field("scales").type, scales),
        zero_points=_list_cell(columns.field("zero_points").type, tensor.zeros),
    )


def copied_row(
    name: str,
    data: NDArray[Any],
    shape: tuple[int, ...],
    dtype: str,
    *,
    scale_dtype: str = "float32",
    chunk: int = 0,
    n_chunks: int = 1,
    row_offset: int = 0,
) -> pa.RecordBatch:
    """One row of quant_type none: a tensor that is kept as it is, or a piece of its rows, without a copy.

    `data` holds the elements in row-major order, of any dtype, or uint8 bytes of the element type `dtype`.
    `scale_dtype` is the one of the other rows of the table.

        >>> import numpy as np
        >>> copied_row("norm", np.ones(3, np.float16), (3,), "float16")["data"][0].as_py().hex()
        '003c003c003c'
    """
    columns = schema(scale_dtype)
    fields = {
        "layer_name": name,
        "shape": shape,
        "dtype": dtype,
        "num_params": math.prod(shape),
        "quant_type": "none",
        "chunk": chunk,
        "n_chunks": n_chunks,
        "row_offset": row_offset,
    }
    return _batch(columns, fields, data=_binary_cell(data))


def read(batch: pa.RecordBatch | pa.Table, i: int = 0) -> tuple[str, QuantizedTensor | NDArray[Any]]:
    """Row `i` of a batch or table with these columns: (name, tensor), views of the Arrow buffers without a copy.

    The tensor is a QuantizedTensor, or for quant_type none a NumPy array (flat uint8 for sub-byte dtypes). A row that
    is one of several holds rows `row_offset` and following of its tensor, and comes back as [rows, length]. The arrays
    are read-only and keep the buffers alive. Scales that were widened to float32 are narrowed (a copy) to what the
    scheme calls for; other columns, and 32-bit variants of the list, binary and string types, are accepted. So are the
    rows of a table of results, which have `quantized_data` for `data` and a shape of int64. To read every row of a
    table take `read_all`.

        >>> import numpy as np
        >>> name, norm = read(copied_row("norm", np.ones(3, np.float16), (3,), "float16"))
        >>> name, norm
        ('norm', array([1., 1., 1.], dtype=float16))

    Raises InputError, naming row and column, for a missing column, a null, and values that contradict one another.
    """
    columns = _columns_of(batch.schema)
    if not 0 <= i < batch.num_rows:
        raise InputError(f"row {i}: the table has {batch.num_rows} rows")
    return _read(_Row(batch, columns, i, i))


def read_all(batch: pa.RecordBatch | pa.Table) -> Iterator[tuple[str, QuantizedTensor | NDArray[Any]]]:
    """Every row in order, as `read` gives it. However many there are, each is looked for only in its own batch.

        >>> import numpy as np
        >>> table = pa.Table.from_batches([copied_row(name, np.ones(2, np.int8), (2,), "int8") for name in "ab"])
        >>> [(name, x.tolist()) for name, x in read_all(table)]
        [('a', [1, 1]), ('b', [1, 1])]

    Raises InputError as `read` does, once it comes to the row.
    """
    columns = _columns_of(batch.schema)
    before = 0
    for part in [batch] if isinstance(batch, pa.RecordBatch) else batch.to_batches():
        for i in range(part.num_rows):
            yield _read(_Row(part, columns, i, before + i))
        before += part.num_rows


def _columns_of(schema: pa.Schema) -> dict[str, int]:
    """Where each column is, by the names of this module."""
    version = (schema.metadata or {}).get(b"arrowquant.version", VERSION.encode()).decode(errors="replace")
    if version != VERSION:
        raise InputError(f"columns of version {version}: this package reads version {VERSION}; update it")
    columns = {name: i for i, name in enumerate(schema.names)}
    if len(columns) < len(schema.names):
        raise InputError(f"the table has two columns of one name: {', '.join(schema.names)}")
    for name, other in _OTHER_NAMES.items():
        if other in columns and name in columns:
            raise InputError(f"the table has a column {name} and a column {other}: which one holds is not known")
        if other in columns:
            columns[name] = columns.pop(other)
    if missing := [c for c in _REQUIRED if c not in columns]:
        raise InputError(f"columns {', '.join(missing)} are missing; the table has {', '.join(schema.names)}")
    for name, (is_right, words) in _KINDS.items():
        kind = schema.types[columns[name]] if name in columns else pa.null()
        if not (pa.types.is_null(kind) or is_right(kind)):
            raise InputError(f"column {schema.names[columns[name]]} is {kind}; it must be {words}")
    return columns


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def _is_number(kind: pa.DataType) -> bool:
    # Whole numbers with nulls between them are floats in pandas.
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests) and _is_number(kind.value_type)


def _is_sizes(kind: pa.DataType) -> bool:
    return _is_list(kind) and bool(pa.types.is_integer(kind.value_type))


# What a column that is read must be, and how an error says it. One of type null has no values.
_KINDS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    **dict.fromkeys(("layer_name", "dtype", "quant_type", "scheme"), (_is_text, "string")),
    **dict.fromkeys(("bit_width", "group_size", "n_chunks"), (_is_number, "an integer")),
    **dict.fromkeys(("scales", "zero_points"), (_is_list, "a list of numbers")),
    "shape": (_is_sizes, "a list of integers"),
    "data": (_is_bytes, "binary"),
}


def _read(cell: _Row) -> tuple[str, QuantizedTensor | NDArray[Any]]:
    name = cell.get("layer_name") or ""
    shape, dtype = tuple(cell.need("shape")), cell.need("dtype")
    if any(n is None or n < 0 for n in shape):
        raise InputError(f"{cell.where}: shape {list(shape)} has a null or a negative size")
    if dtype not in DTYPES:
        raise InputError(f"{cell.where}: dtype {dtype!r} is not known")
    data = cell.bytes_of("data")
    is_piece = (cell.get("n_chunks") or 1) > 1
    if cell.get("scheme") is None:
        if cell.get("quant_type") not in (None, "none"):
            raise InputError(f"{cell.where}: quant_type {cell.get('quant_type')!r} and no scheme")
        return name, _copied(cell, data, shape, dtype, is_piece)
    return name, _quantized(cell, data, shape, dtype, is_piece)


def _quantized(
    cell: _Row, data: NDArray[np.uint8], shape: tuple[int, ...], dtype: str, is_piece: bool
) -> QuantizedTensor:
    scheme = Scheme.parse(cell.need("scheme"))
    check(scheme)
    for column, value in (
        ("bit_width", scheme.bits),
        ("group_size", scheme.group_size),
        ("quant_type", f"int{scheme.bits}"),
    ):
        if (found := cell.get(column)) not in (None, value):
            raise InputError(f"{cell.where}: {column} is {found!r} and the scheme is {scheme.id}")
    rows, row_bytes = scheme.packed_shape(shape)
    if is_piece:
        rows, length = (data.size // row_bytes if row_bytes else 0), rows_and_length(shape)[1]
        shape = (rows, length)
    packed_shape, scales_shape = scheme.packed_shape(shape), scheme.scales_shape(shape)
    cell.check_size("data", data.size, math.prod(packed_shape), scheme, shape)
    scales = _narrow(cell, cell.values("scales"), scheme)
    cell.check_size("scales", scales.size, math.prod(scales_shape), scheme, shape)
    zeros = None
    if scheme.symmetric:
        if cell.cell("zero_points") is not None:
            raise InputError(f"{cell.where}: zero_points is not null and the scheme {scheme.id} is symmetric")
    else:
        zeros = cell.values("zero_points")
        if zeros.dtype != np.uint8:
            raise InputError(f"{cell.where}: zero_points are {zeros.dtype}; they must be uint8")
        cell.check_size("zero_points", zeros.size, math.prod(scales_shape), scheme, shape)
        zeros = zeros.reshape(scales_shape)
    return QuantizedTensor(data.reshape(packed_shape), scales.reshape(scales_shape), zeros, shape, scheme, dtype)


def _copied(cell: _Row, data: NDArray[np.uint8], shape: tuple[int, ...], dtype: str, is_piece: bool) -> NDArray[Any]:
    kind = DTYPES[dtype]
    if kind.numpy is None:
        return data
    length = rows_and_length(shape)[1]
    if is_piece and length and data.size % (length * kind.numpy.itemsize) == 0:
        shape = (data.size // (length * kind.numpy.itemsize), length)
    if data.size != math.prod(shape) * kind.numpy.itemsize:
        raise InputError(f"{cell.where}: data has {data.size} bytes, which does not fit {dtype} {list(shape)}")
    return data.view(kind.numpy).reshape(shape)


class _Row:
    """Cells of row `i`, with errors that say which one it was: `number`."""

    def __init__(self, batch: pa.RecordBatch | pa.Table, columns: dict[str, int], i: int, number: int):
        self._batch, self._columns, self._i = batch, columns, i
        self.where = f"row {number}"
        if name := self.get("layer_name"):
            self.where += f" ({name})"

    def cell(self, column: str) -> pa.Array | None:
        """The cell as an array of one value, or None where it is null or the table has no such column."""
        if column not in self._columns:
            return None
        cell = self._batch.column(self._columns[column]).slice(self._i, 1)
        if isinstance(cell, pa.ChunkedArray):
            cell = cell.chunk(0)
        return None if cell.null_count else cell

    def get(self, column: str) -> Any:
        cell = self.cell(column)
        return None if cell is None else cell[0].as_py()

    def need(self, column: str) -> Any:
        return self._present(column, self.cell(column))[0].as_py()

    def bytes_of(self, column: str) -> NDArray[np.uint8]:
        """The bytes of a binary cell, a view of its buffer (a pyarrow scalar would copy them)."""
        cell = self._present(column, self.cell(column))
        if not (pa.types.is_large_binary(cell.type) or pa.types.is_binary(cell.type)):
            cell = cell.cast(pa.large_binary())
        width = np.int32 if pa.types.is_binary(cell.type) else np.int64
        _, offsets, data = cell.buffers()
        start, stop = np.frombuffer(offsets, width, 2, cell.offset * np.dtype(width).itemsize).tolist()
        view = np.frombuffer(data, np.uint8, stop - start, start) if stop > start else np.empty(0, np.uint8)
        view.flags.writeable = False
        return view

    def values(self, column: str) -> NDArray[Any]:
        """The items of a list cell, a view of its buffer."""
        values = self._present(column, self.cell(column)).flatten()
        if values.null_count:
            raise InputError(f"{self.where}: {column} has {values.null_count} nulls")
        return values.to_numpy(zero_copy_only=True)  # type: ignore[no-any-return]

    def _present(self, column: str, cell: pa.Array | None) -> pa.Array:
        if cell is None:
            raise InputError(f"{self.where}: {column} is null")
        return cell

    def check_size(self, column: str, found: int, want: int, scheme: Scheme, shape: tuple[int, ...]) -> None:
        if found != want:
            raise InputError(f"{self.where}: {column} has {found} items; {scheme.id} of {list(shape)} has {want}")


def _widen(scales: NDArray[Any], scheme: Scheme, scale_dtype: str) -> NDArray[Any]:
    if scale_dtype == scheme.scale_dtype:
        return scales
    if scale_dtype != "float32":
        raise SchemeError(f"{scheme.id}: its {scheme.scale_dtype} scales cannot be stored as {scale_dtype}")
    return scales.astype(np.float32, copy=False)


def _narrow(cell: _Row, scales: NDArray[Any], scheme: Scheme) -> NDArray[Any]:
    """Scales in the scheme's own type: as they are, bit patterns viewed, or float32 narrowed without loss."""
    target = np.dtype(DTYPES[scheme.scale_dtype].numpy)
    if scales.dtype == target:
        return scales
    if scheme.scale_dtype == "bfloat16" and scales.dtype == np.uint16:
        return scales.view(target)
    if scales.dtype != np.float32:
        raise InputError(f"{cell.where}: scales are {scales.dtype}; {scheme.id} has {scheme.scale_dtype}, or float32")
    with np.errstate(over="ignore", under="ignore"):
        narrow = scales.astype(target)
    lost = np.flatnonzero(narrow.astype(np.float32) != scales)
    if lost.size:
        raise InputError(
            f"{cell.where}: {lost.size} scales are not {scheme.scale_dtype} values, which {scheme.id} calls for; "
            f"the first is scale number {lost[0]}, {scales[lost[0]]!r}"
        )
    return narrow


def _batch(columns: pa.Schema, fields: dict[str, Any], **cells: pa.Array | None) -> pa.RecordBatch:
    arrays = []
    for field in columns:
        cell = cells.get(field.name)
        arrays.append(pa.array([fields.get(field.name)], field.type) if cell is None else cell)
    return pa.RecordBatch.from_arrays(arrays, schema=columns)


def _binary_cell(a: NDArray[Any]) -> pa.Array:
    offsets = pa.py_buffer(np.array([0, a.nbytes], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, arrow_values.buffer(a)], null_count=0)


def _list_cell(kind: pa.DataType, a: NDArray[Any] | None) -> pa.Array | None:
    if a is None:
        return None
    offsets = pa.py_buffer(np.array([0, a.size], np.int64))
    return pa.Array.from_buffers(kind, 1, [None, offsets], null_count=0, children=[arrow_values.from_numpy(a)])
