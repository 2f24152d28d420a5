"""Rows of quantized tensors: the columns, and a record batch of them that is allocated once and written in place.

| column | type | meaning |
|---|---|---|
| layer_name | utf8 | name of the tensor |
| quantized_data | large_binary | packed codes as drawn in schemes.py |
| scales | list | one per group, row-major: float32, float16, or bfloat16 bits as marked uint16 |
| zero_points | list<uint8> | one per group; null where the scheme is symmetric |
| shape | list<int64> | shape of the whole tensor |
| bit_width | uint8 | bits of a code |
| group_size | uint32 | weights that share a scale; null for granularity channel and tensor |
| scheme | utf8 | the scheme id |
| dtype | utf8 | original element type |
| chunk, n_chunks | uint32 | only where the weights came cut into rows: which one this is, of how many |

A row alone is enough to decode what it holds; `QuantizedTensor.from_arrow` reads it. Lists have offsets of 64 bits
(large_list) where a batch has 2^31 scales or more.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import arrow_columns, arrow_values
from ..dtypes import DTYPES
from ..errors import InputError
from ..schemes import Scheme
from ..tensor import QuantizedTensor
from . import ERRORS_KEY, Layer, Problem, problems_json

# Items that offsets of 32 bits can count.
MAX_ITEMS = 2**31 - 1


@functools.cache
def result_schema(scale_dtype: str = "float32", *, is_cut: bool = False, is_large: bool = False) -> pa.Schema:
    """The columns, with scales of "float32", "float16" or "bfloat16"; `is_cut`: with chunk and n_chunks.

    >>> result_schema().names[:4], result_schema().field("quantized_data").type
    (['layer_name', 'quantized_data', 'scales', 'zero_points'], DataType(large_binary))
    """
    list_of = pa.large_list if is_large else pa.list_
    fields = [
        ("layer_name", pa.string()),
        ("quantized_data", pa.large_binary()),
        ("scales", list_of(arrow_values.field("item", scale_dtype))),
        ("zero_points", list_of(pa.uint8())),
        ("shape", pa.list_(pa.int64())),
        ("bit_width", pa.uint8()),
        ("group_size", pa.uint32()),
        ("scheme", pa.string()),
        ("dtype", pa.string()),
    ]
    if is_cut:
        fields += [("chunk", pa.uint32()), ("n_chunks", pa.uint32())]
    return pa.schema(fields, metadata=arrow_columns.metadata(scale_dtype))


class Room(NamedTuple):
    """Where the result of a layer goes: arrays as QuantizedTensor has them, zeros None where symmetric."""

    packed: NDArray[np.uint8]
    scales: NDArray[Any]
    zeros: NDArray[np.uint8] | None


class Results:
    """A record batch in the making: a row for each of `layers`, quantized by their schemes, which store alike scales.

    `rooms` says where the result of each layer goes. All memory is of Arrow's pool, allocated once. The rows over it
    are made at once: after the kernels, which leave nothing of Python in the caches, that would take far longer.

    is_cut: with columns chunk and n_chunks
    is_stream: one of several batches that have one schema: with lists whose offsets have 32 bits

    Raises InputError where a batch of a stream has more scales than such lists can hold.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        schemes: Sequence[Scheme],
        scale_dtype: str,
        *,
        is_cut: bool = False,
        is_stream: bool = False,
    ) -> None:
        keys = zip((layer.weights.shape for layer in layers), schemes, strict=True)
        # Layers that follow each other are often alike.
        sizes = [n for key, alike in itertools.groupby(keys) for n in [_Sizes.of(*key)] for _ in alike]
        ends = np.zeros((len(sizes) + 1, 3), np.int64)
        np.cumsum([n[:3] for n in sizes] or ends[1:], axis=0, out=ends[1:])
        n_data, n_scales, n_zeros = ends[-1].tolist()
        if is_stream and n_scales > MAX_ITEMS:
            raise InputError(
                f"a record batch of {len(sizes)} rows has {n_scales:,} scales, and a list column of a stream holds "
                f"{MAX_ITEMS:,}; give smaller batches, larger groups, or a table"
            )
        data = arrow_values.empty(n_data, np.uint8)
        scales, zeros = arrow_values.empty(n_scales, DTYPES[scale_dtype].numpy), arrow_values.empty(n_zeros, np.uint8)
        self.rooms = [
            Room(
                data[at[0] : at[0] + n.data].reshape(n.packed_shape),
                scales[at[1] : at[1] + n.scales].reshape(n.scales_shape),
                None if scheme.symmetric else zeros[at[2] : at[2] + n.zeros].reshape(n.scales_shape),
            )
            for n, at, scheme in zip(sizes, ends.tolist(), schemes, strict=False)
        ]
        schema = result_schema(scale_dtype, is_cut=is_cut, is_large=n_scales > MAX_ITEMS)
        ids = {scheme: scheme.id for scheme in set(schemes)}
        symmetric = np.array([scheme.symmetric for scheme in schemes], np.bool_)
        offsets = [None, pa.py_buffer(ends[:, 0].copy()), arrow_values.buffer(data)]
        columns = {
            "layer_name": [layer.name for layer in layers],
            "quantized_data": pa.Array.from_buffers(pa.large_binary(), len(sizes), offsets, 0),
            "scales": _lists(schema.field("scales").type, ends[:, 1], scales),
            "zero_points": _lists(schema.field("zero_points").type, ends[:, 2], zeros, nulls=symmetric),
            "shape": [layer.shape for layer in layers],
            "bit_width": [scheme.bits for scheme in schemes],
            "group_size": [scheme.group_size for scheme in schemes],
            "scheme": [ids[scheme] for scheme in schemes],
            "dtype": [layer.dtype for layer in layers],
        }
        if is_cut:
            columns |= {"chunk": [layer.chunk for layer in layers]}
            columns |= {"n_chunks": [layer.n_chunks for layer in layers]}
        arrays = [c if isinstance(c, pa.Array) else pa.array(c, schema.field(k).type) for k, c in columns.items()]
        self._rows = pa.RecordBatch.from_arrays(arrays, schema=schema)
        self._refused: set[int] = set()

    def refuse(self, i: int) -> None:
        """Layer i has no result, and will be in no row."""
        self._refused.add(i)

    def batch(self, problems: Sequence[Problem] = ()) -> pa.RecordBatch:
        """The rows, over the memory that was written to; a copy without those that were refused, if there are such.

        `problems` are listed in the metadata.
        """
        rows = self._rows
        if self._refused:
            rows = rows.filter(pa.array([i not in self._refused for i in range(rows.num_rows)], pa.bool_()))
        if problems:
            rows = rows.replace_schema_metadata({**rows.schema.metadata, ERRORS_KEY: problems_json(problems)})
        return rows


class _Sizes(NamedTuple):
    """Of the result of one row of weights: bytes of codes, number of scales and zero points, and their shapes."""

    data: int
    scales: int
    zeros: int
    packed_shape: tuple[int, int]
    scales_shape: tuple[int, int]

    @classmethod
    def of(cls, shape: tuple[int, ...], scheme: Scheme) -> _Sizes:
        packed, scales = scheme.packed_shape(shape), scheme.scales_shape(shape)
        n_scales = math.prod(scales)
        return cls(math.prod(packed), n_scales, 0 if scheme.symmetric else n_scales, packed, scales)


def _lists(
    kind: pa.DataType, ends: NDArray[np.int64], items: NDArray[Any], nulls: NDArray[np.bool_] | None = None
) -> pa.Array:
    """A list column over the memory of `items`, row i of which ends at ends[i + 1]."""
    offsets = pa.py_buffer(ends.astype(np.int64 if pa.types.is_large_list(kind) else np.int32))
    children = [pa.Array.from_buffers(kind.value_type, int(ends[-1]), [None, arrow_values.buffer(items)], 0)]
    if nulls is None or not nulls.any():
        return pa.Array.from_buffers(kind, len(ends) - 1, [None, offsets], 0, children=children)
    valid = pa.py_buffer(np.packbits(~nulls, bitorder="little"))
    return pa.Array.from_buffers(kind, len(ends) - 1, [valid, offsets], int(nulls.sum()), children=children)


class QuantizedRow(NamedTuple):
    """A row of quantized tensors that was read: `tensor` is what it holds, views of it; `shape` the whole tensor's."""

    name: str
    tensor: QuantizedTensor
    shape: tuple[int, ...]
    chunk: int
    n_chunks: int

    @property
    def size(self) -> int:
        """Weights that it decodes to."""
        return math.prod(self.tensor.shape)


def read_rows(batch: pa.RecordBatch) -> Iterator[QuantizedRow]:
    """The rows of a batch with these columns, or those of `arrow_columns`.

    Raises InputError where one cannot be decoded, or holds a tensor that is not quantized.
    """
    validate(batch)
    columns = {c: batch.column(c).to_pylist() for c in ("shape", "chunk", "n_chunks") if c in batch.schema.names}
    for i, (name, tensor) in enumerate(arrow_columns.read_all(batch)):
        if not isinstance(tensor, QuantizedTensor):
            raise InputError(
                f"row {i} ({name}): this tensor is not quantized; `arrowquant dequantize` reads checkpoints"
            )
        chunk, n_chunks = (columns.get(c, {i: other})[i] or other for c, other in (("chunk", 0), ("n_chunks", 1)))
        yield QuantizedRow(name, tensor, tuple(columns["shape"][i]), chunk, n_chunks)


def validate(batch: pa.RecordBatch) -> None:
    """Raise InputError for a batch of quantized rows whose buffers are not what they say; nothing may look before."""
    try:
        batch.validate(full=True)
    except (pa.ArrowInvalid, UnicodeDecodeError) as e:
        raise InputError(f"a record batch of quantized rows is malformed: {e}") from e
