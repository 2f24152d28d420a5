"""The one front door for arrays: whatever holds weights becomes `Weights`, row blocks that are views of its memory."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import dlpack
from .dtypes import WEIGHT_DTYPES, from_numpy
from .errors import InputError
from .schemes import rows_and_length
from .tensor import QuantizedTensor

# An array whose leading axes do not merge is gathered into new memory where views would be both many and small: each
# block costs a dispatch of tens of microseconds, whatever its size.
MAX_SMALL_VIEWS = 1024
SMALL_VIEW_BYTES = 64 << 10


@dataclass(frozen=True, eq=False, slots=True)
class Weights:
    """One tensor to read, as blocks of rows. Holds its arrays, and through them the memory of whoever made them.

    shape: shape of the tensor
    dtype: name of its element type, one of WEIGHT_DTYPES in dtypes.py
    blocks: arrays [rows, length] of any strides that follow one another along the rows; NumPy arrays, or CuPy arrays
        where the tensor is on a GPU. They are not to be written to
    device: "cpu" or "cuda:N"
    """

    shape: tuple[int, ...]
    dtype: str
    blocks: tuple[Any, ...]
    device: str


def as_weights(x: object, *, name: str = "weights") -> Weights:
    """Read any array as weights, without a copy wherever its memory can be described by strides.

    The first of these that fits is taken:

    1. NumPy arrays and scalars, ml_dtypes included. Any strides: a view.
    2. DLPack objects in CUDA memory (CuPy, torch, JAX): CuPy arrays over the same memory.
    3. Arrow: pyarrow arrays and chunked arrays, and objects with `__arrow_c_array__` or `__arrow_c_stream__`; a table
       counts where it has one column. The nesting of lists gives the shape, and each chunk is a block. A flat array of
       several chunks is one row, so it is joined: a copy.
    4. DLPack objects in host memory (torch, JAX, ...): a view.
    5. The buffer protocol, where the buffer has an element type (memoryview, array.array): a view.

    The result keeps the memory alive, whatever becomes of `x`; the caller must not write to it meanwhile. An array of
    three or more axes whose leading axes do not merge into rows is one block for each run of rows, or a copy where
    that makes more than 1024 blocks of under 64 KiB.

        >>> import pyarrow as pa
        >>> w = as_weights(pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32())))
        >>> w.shape, w.dtype, w.device, w.blocks[0].tolist()
        ((2, 2), 'float32', 'cpu', [[1.0, 2.0], [3.0, 4.0]])
        >>> x = np.zeros((4, 8), np.float32)
        >>> np.shares_memory(as_weights(x[::2, ::-1]).blocks[0], x)
        True

    Raises InputError, which begins with `name`, for anything else: other objects (lists, strings, ...), other element
    types (bool, complex, big-endian, ...), nulls or masked values, ragged lists, other devices; and DeviceError for
    CUDA memory where CuPy is not installed.
    """
    arrays, device = _arrays(x, name)
    dtype = _weight_dtype(arrays[0].dtype, name)
    if arrays[0].ndim == 1 and len(arrays) > 1:
        arrays = [np.concatenate(arrays)]
    shape = arrays[0].shape
    if len(arrays) > 1:
        shape = (sum(len(a) for a in arrays), *shape[1:])
    blocks = tuple(block for a in arrays for block in _row_blocks(a))
    return Weights(tuple(shape), dtype, blocks, device)


def _arrays(x: Any, name: str) -> tuple[Sequence[Any], str]:
    """`x` as arrays that follow one another along the first axis, and their device."""
    if isinstance(x, np.ndarray | np.generic):
        return [_unmasked(x, name)], "cpu"
    if isinstance(x, QuantizedTensor):
        raise InputError(f"{name}: this tensor is already quantized ({x.scheme.id}); dequantize it first")
    has_dlpack = hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")
    is_arrow = hasattr(x, "__arrow_c_array__") or hasattr(x, "__arrow_c_stream__")
    if is_arrow and _is_pyarrow(x, "Array"):
        has_dlpack = False  # pyarrow 18 raises where a list is asked for its device
    if has_dlpack and dlpack.device_of(x, name=name) in (dlpack.CUDA, dlpack.CUDA_MANAGED):
        array = dlpack.device_array(x, name=name)
        return [array], f"cuda:{array.device.id}"
    if is_arrow:
        from .arrow_weights import dense_chunks

        return dense_chunks(x, name=name), "cpu"
    if has_dlpack:
        return [dlpack.host_view(x, name=name)], "cpu"
    return [_from_buffer(x, name)], "cpu"


def _unmasked(x: Any, name: str) -> NDArray[Any]:
    if isinstance(x, np.ma.MaskedArray):
        if n := int(np.count_nonzero(x.mask)):
            raise InputError(f"{name}: {n} masked values; fill them: x.filled(0)")
        x = x.data
    return np.asarray(x)


def _from_buffer(x: Any, name: str) -> NDArray[Any]:
    called = f"{type(x).__module__}.{type(x).__qualname__}"
    if isinstance(x, bytes | bytearray | mmap.mmap) or _is_pyarrow(x, "Buffer"):
        raise InputError(f"{name}: {called} has no element type; pass np.frombuffer(x, dtype)")
    try:
        view = memoryview(x)
    except TypeError as e:
        raise InputError(
            f"{name}: {called} cannot be read as weights: it is no NumPy array and has no DLPack, Arrow or buffer "
            f"protocol. Convert it first, for example np.asarray(x, np.float32)"
        ) from e
    try:
        return np.asarray(view)
    except (ValueError, TypeError, NotImplementedError) as e:
        raise InputError(f"{name}: {called} with buffer format {view.format!r} cannot be read as weights") from e


def _is_pyarrow(x: object, kind: str) -> bool:
    """Whether `x` is an instance of a pyarrow class. Does not import pyarrow: if nobody has, it is not."""
    pa = sys.modules.get("pyarrow")
    return pa is not None and isinstance(x, getattr(pa, kind))


def _weight_dtype(dtype: Any, name: str) -> str:
    try:
        row = from_numpy(dtype)
    except InputError as e:
        raise InputError(f"{name}: {e}") from e
    if row.name not in WEIGHT_DTYPES:
        raise InputError(f"{name}: dtype {row.name} is not a type of weights; use one of {', '.join(WEIGHT_DTYPES)}")
    return row.name


def _row_blocks(x: Any) -> list[Any]:
    """`x`, NumPy or CuPy, as arrays [rows, length] in row order: one view, or one per run of mergeable rows."""
    rows, length = rows_and_length(x.shape)
    if x.ndim <= 2 or x.size == 0:
        return [x.reshape(rows, length)]
    lead = tuple(slice(None) if n > 1 else 0 for n in x.shape[:-1])
    x = x[lead]
    axis = x.ndim - 2  # axes axis .. ndim - 2 merge into rows without a copy
    while axis > 0 and x.strides[axis - 1] == x.strides[axis] * x.shape[axis]:
        axis -= 1
    outer = x.shape[: max(axis, 0)]
    n_blocks = math.prod(outer)
    if n_blocks > MAX_SMALL_VIEWS and x.nbytes // n_blocks < SMALL_VIEW_BYTES:
        return [x.copy().reshape(rows, length)]
    return [x[i].reshape(-1, length) for i in np.ndindex(outer)]
