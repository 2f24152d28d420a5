"""`quantize` and `dequantize` as functions of Arrow's compute engine, for expressions over a Dataset.

An expression names a function of the process's registry, whose argument types are fixed; so each pair of types and
options is registered when it is first asked for. Registering is safe from several threads and lasts as long as the
process.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from . import arrow_columns
from .backends import get_backend
from .schemes import Scheme
from .tables.dequantize import decoded_schema, dequantize_stream
from .tables.quantize import TableQuantizer
from .tables.results import result_schema
from .tables.weights import check_schema

_LOCK = threading.Lock()
_REGISTERED: set[str] = set()


def quantize(
    weights: Any,
    scheme: str | Scheme = "int4_g128_asym",
    *,
    type: pa.DataType,  # noqa: A002 - what pyarrow calls it
    shape: Any = None,
    device: str = "auto",
    threads: int | None = None,
) -> Any:
    """An expression that quantizes a column: each row to a struct with the columns of results.py but the name.

    weights: an expression, such as `pc.field("weights")`
    type: its type: lists of numbers, whose nesting is the shape unless there is a column of shapes
    shape: an expression of list<int64>
    device, threads: as in `ops.quantize`

    A null stays null.

        >>> import pyarrow.compute as pc
        >>> import pyarrow.dataset as ds
        >>> table = pa.table({"layer_name": ["fc"], "weights": [[1.0, 2.0]]})
        >>> q = quantize(pc.field("weights"), "int8_g32", type=table.schema.field("weights").type, device="cpu")
        >>> result = ds.dataset(table).to_table(columns={"layer_name": pc.field("layer_name"), "q": q})
        >>> result["q"][0].as_py()["quantized_data"], result["q"][0].as_py()["shape"]
        (b'\\xc0\\xff', [2])

    Raises SchemeError, DeviceError, and InputError for a type that cannot hold weights. What evaluates the expression
    raises InputError, NonFiniteError and ScaleOverflowError; they call a row by its number in its record batch.
    """
    scheme = Scheme.parse(scheme)
    arrow_columns.check(scheme)
    check_schema(pa.schema([("layer_name", pa.string()), ("weights", type)]))
    get_backend(device, threads)  # raises here, and not in a thread of the engine
    arguments = {"weights": type} | ({} if shape is None else {"shape": pa.list_(pa.int64())})

    def function(context: Any, *columns: Any) -> pa.Array:
        column, *shapes = (_rows(x, context.batch_length) for x in columns)
        return _quantized(column, shapes[0] if shapes else None, scheme, device, threads)

    name = _register(f"quantize.{scheme.id}.{device}.{threads}", function, arguments, quantized_type(scheme))
    return weights._call(name, [weights] if shape is None else [weights, shape])


def dequantize(
    quantized: Any,
    dtype: str = "float32",
    *,
    scale_dtype: str = "float32",
    device: str = "auto",
    threads: int | None = None,
) -> Any:
    """An expression that decodes a column of structs that `quantize` made to flat lists (large_list).

    dtype: float32, float16 or bfloat16 (bits as marked uint16)
    scale_dtype: of the schemes in the column
    device, threads: as in `ops.dequantize`

    A null stays null.

        >>> import pyarrow.compute as pc
        >>> import pyarrow.dataset as ds
        >>> table = pa.table({"weights": [[0.0, 3.0, -7.5]]})
        >>> q = quantize(pc.field("weights"), "int4_g32", type=table.schema.field("weights").type)
        >>> ds.dataset(table).to_table(columns={"w": dequantize(q)})["w"].to_pylist()
        [[0.0, 3.0, -8.0]]

    Raises InputError for another dtype, and DeviceError; what evaluates the expression raises InputError.
    """
    kind = decoded_schema(dtype).field("weights").type
    get_backend(device, threads)

    def function(context: Any, column: Any) -> pa.Array:
        return _dequantized(_rows(column, context.batch_length), dtype, kind, device, threads)

    takes = _struct(scale_dtype)
    name = _register(f"dequantize.{dtype}.{scale_dtype}.{device}.{threads}", function, {"quantized": takes}, kind)
    return quantized._call(name, [quantized])


def quantized_type(scheme: str | Scheme) -> pa.DataType:
    """What `quantize` makes of each row.

    >>> quantized_type("int4_g128_asym").names[:3]
    ['quantized_data', 'scales', 'zero_points']
    """
    return _struct(Scheme.parse(scheme).scale_dtype)


def _struct(scale_dtype: str) -> pa.DataType:
    return pa.struct([field for field in result_schema(scale_dtype) if field.name != "layer_name"])


def _register(what: str, function: Any, arguments: dict[str, pa.DataType], result: pa.DataType) -> str:
    """The name under which the function is in the registry."""
    import pyarrow.compute as pc

    name = f"arrowquant.{what}({', '.join(str(kind) for kind in arguments.values())})"
    with _LOCK:
        if name not in _REGISTERED:
            about = {"summary": f"arrowquant {what}", "description": "See arrowquant_gpu.compute."}
            pc.register_scalar_function(function, name, about, arguments, result)
            _REGISTERED.add(name)
    return name


def _quantized(column: pa.Array, shapes: pa.Array | None, scheme: Scheme, device: str, threads: int | None) -> pa.Array:
    """The function behind the expression. The column's own type says what is bfloat16, not the one it was named for."""
    there = _places(column)
    fields = [pa.field("layer_name", pa.string()), pa.field("weights", column.type)]
    arrays = [pa.array([f"row {i}" for i in there.tolist()], pa.string()), column.drop_null()]
    if shapes is not None:
        fields.append(pa.field("shape", shapes.type))
        arrays.append(shapes.take(pa.array(there)) if column.null_count else shapes)
    batch = pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))
    rows = TableQuantizer(batch.schema, scheme, device=device, threads=threads).batch(batch)
    made = pa.StructArray.from_arrays(rows.columns[1:], fields=list(quantized_type(scheme)))
    return _spread(made, column)


def _dequantized(column: pa.Array, dtype: str, kind: pa.DataType, device: str, threads: int | None) -> pa.Array:
    names = pa.array([f"row {i}" for i in _places(column).tolist()], pa.string())
    fields = [pa.field("layer_name", pa.string()), *column.type]
    batch = pa.RecordBatch.from_arrays([names, *column.drop_null().flatten()], schema=pa.schema(fields))
    batches = list(dequantize_stream(batch, dtype, device=device, threads=threads))
    lists = pa.concat_arrays([b["weights"] for b in batches]) if batches else pa.array([], kind)
    return _spread(lists, column)


def _rows(column: Any, length: int) -> pa.Array:
    """What the engine hands over: a column, or one value for all rows."""
    return pa.repeat(column, length) if isinstance(column, pa.Scalar) else column


def _places(column: pa.Array) -> NDArray[np.intp]:
    """Where there are values."""
    return np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))


def _spread(made: pa.Array, column: pa.Array) -> pa.Array:
    """One value for each that `column` has, and nulls where it has nulls."""
    if not column.null_count:
        return made
    is_there = column.is_valid().to_numpy(zero_copy_only=False)
    return made.take(pa.array(np.cumsum(is_there) - 1, pa.int64(), mask=~is_there))
