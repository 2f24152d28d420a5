"""`numpy_to_arrow_table`: arrays as a table of weights over the same memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import arrow_values
from ..errors import InputError
from ..interchange import as_weights
from .batch import check_names

# Items that offsets of 32 bits can count.
MAX_ITEMS = 2**31 - 1


def numpy_to_arrow_table(weights: Mapping[str, Any]) -> pa.Table:
    """A dict of arrays as a table of weights: columns layer_name, weights and shape, one row for each array.

    Nothing is copied: the values buffer of a list is the memory of its array, which the table keeps alive. There is a
    chunk of `weights` for each array. Do not write to the arrays while the table is in use. What is copied: arrays that
    are not row-major (transposed, strided), which have to be.

    The arrays have one dtype, that of the column: float16, float32, float64, an integer type; or bfloat16 and 8-bit
    floats, whose bits are marked in the field (docs/arrow.md). NumPy arrays, and anything on the host that
    `interchange.as_weights` takes.

        >>> x = np.ones((2, 64), np.float32)
        >>> table = numpy_to_arrow_table({"fc": x})
        >>> table["weights"].type, table["shape"].to_pylist()
        (ListType(list<item: float>), [[2, 64]])
        >>> table["weights"].chunk(0).values.buffers()[1].address == x.ctypes.data
        True

    Raises InputError for what is no array, for arrays of several dtypes, on a GPU, and for no arrays at all.
    """
    check_names(weights)
    arrays: list[NDArray[Any]] = []
    shapes: list[tuple[int, ...]] = []
    for name, x in weights.items():
        found = as_weights(x, name=name)
        if found.device != "cpu":
            raise InputError(f"{name}: it is on {found.device}; quantize it there (quantize_batch), or copy it down")
        flat = [block.reshape(-1) for block in found.blocks]
        arrays.append(flat[0] if len(flat) == 1 else np.concatenate(flat))
        shapes.append(found.shape)
        if arrays[-1].dtype != arrays[0].dtype:
            raise InputError(
                f"{name}: it is {arrays[-1].dtype}, and {next(iter(weights))} {arrays[0].dtype}; a column has one "
                f"type: convert them, make a table of each, or pass the arrays to quantize_batch"
            )
    item = arrow_values.field("item", arrays[0].dtype.name)
    is_large = max(a.size for a in arrays) > MAX_ITEMS
    kind = pa.large_list(item) if is_large else pa.list_(item)
    chunks = [
        pa.Array.from_buffers(
            kind,
            1,
            [None, pa.py_buffer(np.array([0, a.size], np.int64 if is_large else np.int32))],
            null_count=0,
            children=[arrow_values.from_numpy(a)],
        )
        for a in arrays
    ]
    return pa.table(
        {
            "layer_name": pa.array(list(weights), pa.string()),
            "weights": pa.chunked_array(chunks, kind),
            "shape": pa.array([list(shape) for shape in shapes], pa.list_(pa.int64())),
        }
    )
