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
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import arrow_columns, arrow_values
from ..dtypes import DTYPES
from ..errors import InputError
from ..schemes import Scheme
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
    """A record batch in the making, with room for the results of `layers` by their schemes; all store alike scales.

    For each layer in order `room` says where its result goes, and `keep` that it is there. One that is not kept leaves
    no trace: the next gets its room. The memory is of Arrow's pool, allocated once.
    """

    def __init__(self, layers: Sequence[Layer], schemes: Sequence[Scheme], scale_dtype: str) -> None:
        self._layers, self._schemes, self._scale_dtype = layers, schemes, scale_dtype
        keys = zip((layer.weights.shape for layer in layers), schemes, strict=True)
        # Layers that follow each other are often alike.
        self._sizes = [n for key, alike in itertools.groupby(keys) for n in [_Sizes.of(*key)] for _ in alike]
        self._data = arrow_values.empty(sum(n.data for n in self._sizes), np.uint8)
        self._scales = arrow_values.empty(sum(n.scales for n in self._sizes), DTYPES[scale_dtype].numpy)
        self._zeros = arrow_values.empty(sum(n.zeros for n in self._sizes), np.uint8)
        self._kept: list[int] = []
        # After each layer that was kept: bytes of data, scales, zero points.
        self._ends = [(0, 0, 0)]

    def room(self, i: int) -> Room:
        """Views for the result of layer i."""
        n, (data, scales, zeros) = self._sizes[i], self._ends[-1]
        return Room(
            self._data[data : data + n.data].reshape(n.packed_shape),
            self._scales[scales : scales + n.scales].reshape(n.scales_shape),
            None if self._schemes[i].symmetric else self._zeros[zeros : zeros + n.zeros].reshape(n.scales_shape),
        )

    def keep(self, i: int) -> None:
        """The room that was given for layer i holds its result."""
        n, (data, scales, zeros) = self._sizes[i], self._ends[-1]
        self._ends.append((data + n.data, scales + n.scales, zeros + n.zeros))
        self._kept.append(i)

    def forget(self, n: int) -> None:
        """The last n that were kept are not, and their room is free again."""
        del self._kept[-n:], self._ends[-n:]

    def batch(
        self, *, is_cut: bool = False, problems: Sequence[Problem] = (), is_large: bool | None = None
    ) -> pa.RecordBatch:
        """The rows that were kept, over the memory they were written to; problems are listed in the metadata.

        Raises InputError where they have more scales than lists with offsets of 32 bits can hold, and `is_large` is no.
        """
        ends = np.fromiter(itertools.chain.from_iterable(self._ends), np.int64).reshape(-1, 3)
        layers, schemes = [self._layers[i] for i in self._kept], [self._schemes[i] for i in self._kept]
        if is_large is None:
            is_large = int(ends[-1, 1]) > MAX_ITEMS
        elif not is_large and ends[-1, 1] > MAX_ITEMS:
            raise InputError(
                f"a record batch of {len(self._kept)} rows has {ends[-1, 1]:,} scales, and a list column of a stream "
                f"holds {MAX_ITEMS:,}; give smaller batches, larger groups, or a table"
            )
        schema = result_schema(self._scale_dtype, is_cut=is_cut, is_large=is_large)
        if problems:
            schema = schema.with_metadata({**schema.metadata, ERRORS_KEY: problems_json(problems)})
        n = len(self._kept)
        ids = {scheme: scheme.id for scheme in set(schemes)}
        symmetric = np.array([scheme.symmetric for scheme in schemes], np.bool_)
        columns = {
            "layer_name": [layer.name for layer in layers],
            "quantized_data": pa.Array.from_buffers(
                pa.large_binary(), n, [None, pa.py_buffer(ends[:, 0].copy()), arrow_values.buffer(self._data)], 0
            ),
            "scales": _lists(schema.field("scales").type, ends[:, 1], self._scales),
            "zero_points": _lists(schema.field("zero_points").type, ends[:, 2], self._zeros, nulls=symmetric),
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
        return pa.RecordBatch.from_arrays(arrays, schema=schema)


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
