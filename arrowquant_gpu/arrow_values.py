"""Elements between NumPy and Arrow without a copy, also those of types that Arrow lacks.

bfloat16 and the 8-bit floats travel as unsigned integers of their width; the field that holds them is marked with the
metadata {"arrowquant.dtype": "bfloat16"}.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .dtypes import DTYPES, WEIGHT_DTYPES
from .errors import InputError

DTYPE_KEY = b"arrowquant.dtype"

_BITS = {8: pa.uint8(), 16: pa.uint16()}


def field(name: str, dtype: str) -> pa.Field:
    """The field of one element of a weight dtype.

    >>> field("item", "float16").type, field("item", "bfloat16").type, field("item", "bfloat16").metadata
    (DataType(halffloat), DataType(uint16), {b'arrowquant.dtype': b'bfloat16'})
    """
    row = DTYPES[dtype]
    try:
        return pa.field(name, pa.from_numpy_dtype(row.numpy))
    except pa.ArrowNotImplementedError:
        return pa.field(name, _BITS[row.bits], metadata={DTYPE_KEY: dtype.encode()})


def empty(shape: int | tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """A new uninitialised array in memory of Arrow's pool.

    The pool keeps pages of results that are gone for those to come, where NumPy gives them back to the system and gets
    zeroed ones: that takes as long as quantizing.
    """
    kind, size = np.dtype(dtype), math.prod(shape) if isinstance(shape, tuple) else shape
    if size == 0:
        return np.empty(shape, kind)
    return np.frombuffer(pa.allocate_buffer(size * kind.itemsize), kind, size).reshape(shape)


def buffer(a: NDArray[Any]) -> pa.Buffer:
    """The memory of an array as a buffer that keeps it alive; of an array that is not row-major, a copy."""
    return pa.py_buffer(np.ascontiguousarray(a))


def from_numpy(a: NDArray[Any]) -> pa.Array:
    """The elements of an array, row-major, over the same memory; in the type of `field` for its dtype."""
    kind = field("item", a.dtype.name).type
    return pa.Array.from_buffers(kind, a.size, [None, buffer(a)], null_count=0)


def to_numpy(a: pa.Array, marked_as: str = "", *, name: str) -> NDArray[Any]:
    """A read-only view of a flat array of numbers, as the bits of dtype `marked_as` where that is given.

        >>> to_numpy(pa.array([0x3F80, 0xC000], pa.uint16()), "bfloat16", name="w")
        array([1, -2], dtype=bfloat16)

    Raises InputError for marks of other widths or unknown types.
    """
    row, values = DTYPES.get(marked_as), a.to_numpy(zero_copy_only=True)
    if not marked_as or marked_as == values.dtype.name:
        return values  # type: ignore[no-any-return]
    if row is None or row.numpy is None or marked_as not in WEIGHT_DTYPES:
        raise InputError(f"{name}: {a.type} values marked as {marked_as!r}, which cannot be read as weights")
    if not pa.types.is_unsigned_integer(a.type) or a.type.bit_width != row.bits:
        raise InputError(f"{name}: {a.type} values marked as {marked_as}; its bits are uint{row.bits}")
    return values.view(row.numpy)  # type: ignore[no-any-return]
