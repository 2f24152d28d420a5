"""Page-locked host memory: as a table to build weights in, and as the way down from the GPU.

A GPU copies from and to page-locked memory at the full speed of its link and asynchronously; ordinary memory goes
through the driver's own staging buffer first. Locking pages is slow: allocate once, and fill the same table again.
CuPy's pool keeps freed blocks for reuse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from . import arrow_values, dlpack
from .dtypes import DTYPES, WEIGHT_DTYPES
from .errors import DeviceError, InputError

# Columns start on a multiple of this, as the Arrow format recommends.
ALIGNMENT = 64


def pinned_table(
    columns: Mapping[str, tuple[tuple[int, ...], str]], *, fallback: Literal["pageable"] | None = None
) -> tuple[pa.Table, dict[str, NDArray[Any]]]:
    """A table over page-locked memory, and writable NumPy views of its columns: fill the views, pass the table on.

    `columns` maps a name to (shape, dtype): the first axis is the table's rows, the same for all columns; the other
    axes become nested fixed_size_list. dtypes are those of weights (dtypes.py); bfloat16 and the float8 types are
    stored as unsigned integers, marked in field metadata, and come back as what they are from `as_weights`. The memory
    is not initialised.

    Table and views share one block of memory, and each of them keeps it alive. Arrow data counts as immutable: finish
    writing before the table is handed to somebody who may still be reading it at the next write.

    Without CuPy or a usable GPU there is no page-locked memory: a DeviceError, or with fallback="pageable" ordinary
    memory.

        >>> table, views = pinned_table({"w": ((2, 3), "float32")}, fallback="pageable")
        >>> views["w"][...] = [[1, 2, 3], [4, 5, 6]]
        >>> table["w"].to_pylist(), table.schema.field("w").type
        ([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], FixedSizeListType(fixed_size_list<item: float>[3]))

    Raises InputError for shapes that do not agree in their first axis, or have none, and for other dtypes.
    """
    if fallback not in (None, "pageable"):
        raise InputError(f"fallback {fallback!r}: it is None or 'pageable'")
    n_rows = {shape[0] if shape else None for shape, _ in columns.values()}
    if None in n_rows or len(n_rows) != 1:
        given = ", ".join(f"{name} {list(shape)}" for name, (shape, _) in columns.items())
        raise InputError(f"the columns of a table have one number of rows, their first axis; given: {given or 'none'}")
    for name, (shape, dtype) in columns.items():
        if not all(0 <= n < 1 << 31 for n in shape[1:]) or shape[0] < 0:
            raise InputError(f"{name}: shape {list(shape)}: a fixed_size_list holds 0 to 2147483647 items")
        if dtype not in WEIGHT_DTYPES:
            raise InputError(f"{name}: dtype {dtype!r} is not a type of weights; use one of {', '.join(WEIGHT_DTYPES)}")
    parts = _carve([(shape, DTYPES[dtype].numpy) for shape, dtype in columns.values()], fallback)
    views = dict(zip(columns, parts, strict=True))
    made = [_column(name, view, columns[name][1]) for name, view in views.items()]
    return pa.Table.from_arrays([array for _, array in made], schema=pa.schema([field for field, _ in made])), views


def to_host(arrays: Sequence[Any]) -> list[NDArray[Any]]:
    """Copies of GPU arrays (CuPy, or anything with DLPack) in one block of page-locked memory, complete on return.

    Raises DeviceError where CuPy or the GPU cannot be used.
    """
    arrays = [dlpack.device_array(a, name="array") for a in arrays]
    views = _carve([(tuple(a.shape), a.dtype) for a in arrays], None)
    for a, view in zip(arrays, views, strict=True):
        a.device.synchronize()  # whichever stream wrote it
        if view.size:
            a.get(out=view)
    return views


def _carve(parts: Sequence[tuple[tuple[int, ...], Any]], fallback: str | None) -> list[NDArray[Any]]:
    """One block of memory cut into aligned arrays, each of which keeps it alive."""
    offsets, end = [], 0
    for shape, dtype in parts:
        offsets.append(end)
        end += -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
    block = _block(end, fallback)
    return [
        block[at : at + math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
        for at, (shape, dtype) in zip(offsets, parts, strict=True)
    ]


def _block(n_bytes: int, fallback: str | None) -> NDArray[np.uint8]:
    try:
        memory = _page_locked(max(n_bytes, 1))
    except DeviceError:
        if fallback is None:
            raise
        memory = pa.allocate_buffer(max(n_bytes, 1))
    return np.frombuffer(memory, np.uint8, n_bytes)


def _page_locked(n_bytes: int) -> Any:
    try:
        import cupy
    except ImportError as e:
        raise DeviceError(
            "page-locked memory needs CuPy, which is not installed (pip install 'arrowquant_gpu[cuda13]' or [cuda12])"
        ) from e
    try:
        return cupy.cuda.alloc_pinned_memory(n_bytes)
    except RuntimeError as e:  # CUDARuntimeError: no driver, no device, or no memory to lock
        raise DeviceError(f"{n_bytes} bytes of page-locked memory cannot be had: {e}") from e


def _column(name: str, view: NDArray[Any], dtype: str) -> tuple[pa.Field, pa.Array]:
    """The view as a column: each axis after the first is one level of fixed_size_list."""
    field, array = arrow_values.field("item", dtype), arrow_values.from_numpy(view)
    for axis in range(view.ndim - 1, 0, -1):
        kind = pa.list_(field, view.shape[axis])
        array = pa.Array.from_buffers(kind, math.prod(view.shape[:axis]), [None], null_count=0, children=[array])
        field = pa.field("item", kind)
    return field.with_name(name), array
