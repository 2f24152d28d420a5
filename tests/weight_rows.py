"""Tables of weights made from arrays, in every way that Arrow can hold lists of numbers; and results checked against
what `ops.quantize` gives for each array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from arrowquant_gpu import arrow_values, ops
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal

LISTS = {"list": pa.list_, "large_list": pa.large_list}
DTYPES = ("float16", "float32", "float64", "bfloat16", "int8")


def make(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0) -> np.ndarray:
    x = np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32) * 20
    return np.asarray(x).astype(arrow_values.DTYPES[dtype].numpy)


def layers(shapes: Sequence[tuple[int, ...]], dtype: str = "float32", prefix: str = "layer") -> dict[str, np.ndarray]:
    return {f"{prefix}.{i}": make(shape, dtype, i) for i, shape in enumerate(shapes)}


def lists(ends: Sequence[int], items: pa.Array, field: pa.Field, kind: str) -> pa.Array:
    """A list column over `items`, in which row i ends at ends[i + 1]."""
    offsets = pa.array(ends, pa.int32() if kind == "list" else pa.int64())
    made = LISTS[kind](field)
    return pa.Array.from_buffers(made, len(ends) - 1, [None, offsets.buffers()[1]], 0, children=[items])


def flat(arrays: Sequence[np.ndarray], kind: str = "list") -> pa.Array:
    """One flat list per array. With one array, over its memory."""
    items = arrays[0].reshape(-1) if len(arrays) == 1 else np.concatenate([a.reshape(-1) for a in arrays])
    ends = np.cumsum([0, *(a.size for a in arrays)]).tolist()
    return lists(ends, arrow_values.from_numpy(items), arrow_values.field("item", items.dtype.name), kind)


def nested(arrays: Sequence[np.ndarray], kind: str = "list") -> pa.Array:
    """Lists in lists, whose nesting is the shape; all arrays have as many axes, and may differ in every size."""
    items, field = arrow_values.from_numpy(np.concatenate([a.reshape(-1) for a in arrays])), None
    field = arrow_values.field("item", arrays[0].dtype.name)
    for axis in reversed(range(arrays[0].ndim)):
        lengths = [a.shape[axis] for a in arrays for _ in range(int(np.prod(a.shape[:axis])))]
        items = lists(np.cumsum([0, *lengths]).tolist(), items, field, kind)
        field = pa.field("item", items.type)
    return items


def fixed(arrays: Sequence[np.ndarray]) -> pa.Array:
    """fixed_size_list, nested as the arrays' one shape is."""
    items = arrow_values.from_numpy(np.concatenate([a.reshape(-1) for a in arrays]))
    field = arrow_values.field("item", arrays[0].dtype.name)
    for size in reversed(arrays[0].shape):
        kind = pa.list_(field, size)
        items = pa.Array.from_buffers(kind, len(items) // size, [None], 0, children=[items])
        field = pa.field("item", kind)
    return items


def batch(names: Sequence[str], weights: pa.Array, **columns: Any) -> pa.RecordBatch:
    """A record batch whose field of weights keeps the mark of bfloat16."""
    arrays = {"layer_name": pa.array(names, pa.string()), "weights": weights}
    arrays |= {k: v if isinstance(v, pa.Array) else pa.array(v) for k, v in columns.items()}
    return pa.RecordBatch.from_arrays(list(arrays.values()), schema=pa.schema([(k, v.type) for k, v in arrays.items()]))


def table(arrays: Mapping[str, np.ndarray], kind: str = "list") -> pa.Table:
    """One row and one chunk for each array, over its memory, with its shape."""
    shapes = {name: pa.array([list(a.shape)], pa.list_(pa.int64())) for name, a in arrays.items()}
    return pa.Table.from_batches([batch([k], flat([a], kind), shape=shapes[k]) for k, a in arrays.items()])


def check(result: pa.Table | pa.RecordBatch, arrays: Mapping[str, np.ndarray], scheme: str) -> None:
    """Raise unless the rows are these tensors in this order, each with the reference's bytes."""
    assert result["layer_name"].to_pylist() == list(arrays)
    for row, (name, a) in enumerate(arrays.items()):
        same(QuantizedTensor.from_arrow(result, row), ops.quantize(a, scheme, device="reference"), name)


def same(got: QuantizedTensor, want: QuantizedTensor, name: str = "tensor") -> None:
    """Raise unless two quantized tensors are equal in every byte and word."""
    assert (got.shape, got.scheme, got.dtype) == (want.shape, want.scheme, want.dtype), name
    assert_bitwise_equal(got.packed, want.packed, f"{name} packed")
    assert_bitwise_equal(got.scales, want.scales, f"{name} scales")
    assert (got.zeros is None) == (want.zeros is None), name
    if want.zeros is not None:
        assert_bitwise_equal(got.zeros, want.zeros, f"{name} zero points")
