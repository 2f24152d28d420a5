"""Arrow arrays as NumPy views of dense tensors: the nesting of lists is the shape.

Taken are integers and float16, float32, float64; list, large_list and fixed_size_list of them, nested to any depth;
fixed-shape tensors; and bit patterns of the types that Arrow lacks: an unsigned integer field with the metadata
{"arrowquant.dtype": "bfloat16"} (or a float8 name), or the extension type arrow.opaque with type name bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .arrow_values import DTYPE_KEY, to_numpy
from .errors import InputError

_WAYS_OUT: tuple[tuple[Callable[[pa.DataType], bool], str], ...] = (
    (pa.types.is_dictionary, "decode it first: dictionary_decode()"),
    (pa.types.is_run_end_encoded, "decode it first: pyarrow.compute.run_end_decode"),
    (lambda t: pa.types.is_list_view(t) or pa.types.is_large_list_view(t), "cast it to list or large_list"),
    (pa.types.is_decimal, "cast it to float64"),
    (pa.types.is_struct, "pass one of its fields"),
    (lambda t: isinstance(t, pa.BaseExtensionType), "pass its .storage if that holds the weights"),
)


def dense_chunks(x: Any, *, name: str) -> list[NDArray[Any]]:
    """`x` as arrays that follow one another along the first axis: read-only views of its buffers, one per chunk.

    `x` is a pyarrow Array or ChunkedArray, or any object with `__arrow_c_array__` or `__arrow_c_stream__`; a table,
    record batch or struct counts where it has one column. The views keep the buffers alive. Only what a slice covers
    is looked at. Chunks of no rows are left out where another chunk has some.

        >>> [a] = dense_chunks(pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32()))[1:], name="w")
        >>> a
        array([[3., 4.],
               [5., 6.]], dtype=float32)

    Raises InputError for nulls, lists of unequal lengths, other types, and lists too empty to tell their length.
    """
    field, chunks = _import(x, name=name)
    if pa.types.is_struct(field.type) and field.type.num_fields == 1:
        field, chunks = field.type.field(0), [_only_field(c, name=name) for c in chunks]
    for chunk in chunks:
        if not chunk.is_cpu:
            raise InputError(f"{name}: Arrow data in device memory; pass it as a DLPack object")
    filled = [c for c in chunks if len(c)] or chunks[:1] or [pa.array([], field.type)]
    arrays = [_dense(c, field, name=name) for c in filled]
    for i, a in enumerate(arrays):
        if a.shape[1:] != arrays[0].shape[1:]:
            raise InputError(
                f"{name}: rows of chunk {i} have shape {list(a.shape[1:])}, rows of chunk 0 {list(arrays[0].shape[1:])}"
            )
    return arrays


class _Capsules:
    """Capsules that were taken from a producer, as a producer themselves."""

    def __init__(self, schema: Any, array: Any = None):
        self._schema, self._array = schema, array

    def __arrow_c_schema__(self) -> Any:
        return self._schema

    def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
        return self._schema, self._array


def _import(x: Any, *, name: str) -> tuple[pa.Field, list[pa.Array]]:
    """The type, with its metadata where the producer has some, and the chunks."""
    if isinstance(x, pa.Array):
        return pa.field(name, x.type), [x]
    if isinstance(x, pa.ChunkedArray):
        return pa.field(name, x.type), x.chunks
    try:
        if hasattr(x, "__arrow_c_array__"):
            schema, array = x.__arrow_c_array__()
            field = pa.field(_Capsules(schema))
            return field, [pa.array(_Capsules(field.__arrow_c_schema__(), array))]
        chunked = pa.chunked_array(x)
    except (pa.ArrowException, ValueError, TypeError) as e:
        raise InputError(f"{name}: {type(x).__module__}.{type(x).__qualname__} cannot be read as Arrow: {e}") from e
    return pa.field(name, chunked.type), chunked.chunks


def _only_field(chunk: pa.StructArray, *, name: str) -> pa.Array:
    _refuse_nulls(chunk, name=name)
    return chunk.field(0)


def _dense(a: pa.Array, field: pa.Field, *, name: str) -> NDArray[Any]:
    """The array as [len(a), ...], a view of the innermost values buffer."""
    _refuse_nulls(a, name=name)
    kind = a.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        length, start = _row_length(a, name=name)
        items = _dense(a.values.slice(start, len(a) * length), kind.value_field, name=name)
        return items.reshape(len(a), length, *items.shape[1:])
    if pa.types.is_fixed_size_list(kind):
        length = kind.list_size
        items = _dense(a.values.slice(a.offset * length, len(a) * length), kind.value_field, name=name)
        return items.reshape(len(a), length, *items.shape[1:])
    if isinstance(kind, pa.FixedShapeTensorType):
        items = _dense(a.storage, pa.field("storage", a.storage.type), name=name).reshape(len(a), *kind.shape)
        return items.transpose(0, *(axis + 1 for axis in _axis_order(kind, name=name)))
    marked_as = (field.metadata or {}).get(DTYPE_KEY, b"").decode(errors="replace")
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.opaque":
        marked_as, a = kind.type_name, a.storage
    if pa.types.is_floating(a.type) or pa.types.is_integer(a.type):
        return to_numpy(a, marked_as, name=name)
    way_out = next((text for test, text in _WAYS_OUT if test(kind)), None)
    raise InputError(
        f"{name}: Arrow type {kind} cannot be read as weights: "
        f"{way_out or 'use float16, float32, float64 or an integer type, or lists of them'}"
    )


def _axis_order(kind: pa.FixedShapeTensorType, *, name: str) -> list[int]:
    """Where each logical axis of a fixed-shape tensor is in memory."""
    order = list(kind.permutation or range(len(kind.shape)))
    # The Arrow format says that logical axis i is axis order[i] in memory; pyarrow writes the inverse (seen in 26.0).
    if any(order[axis] != i for i, axis in enumerate(order)):
        raise InputError(
            f"{name}: fixed-shape tensors with permutation {order} are written in two ways that contradict each other; "
            f"pass an array of the right shape over .storage.flatten()"
        )
    return order


def _row_length(a: pa.Array, *, name: str) -> tuple[int, int]:
    """(length that all lists have, position of the first item in the values)."""
    if len(a) == 0:
        raise InputError(f"{name}: {a.type} of no rows does not tell a row length; use fixed_size_list, or NumPy")
    offsets = a.offsets.to_numpy(zero_copy_only=True)
    lengths = np.diff(offsets)
    ragged = np.flatnonzero(lengths != lengths[0])
    if ragged.size:
        i = int(ragged[0])
        raise InputError(f"{name}: ragged lists: row 0 has {lengths[0]} items and row {i} has {lengths[i]}")
    return int(lengths[0]), int(offsets[0])


def _refuse_nulls(a: pa.Array, *, name: str) -> None:
    if a.null_count:
        first = a.is_null().index(True).as_py()
        raise InputError(
            f"{name}: {a.null_count} nulls among {len(a)} values of {a.type}, the first at {first}; fill or drop them"
        )
