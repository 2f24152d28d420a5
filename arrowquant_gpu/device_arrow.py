"""Arrays as Arrow data where they are: the C device interface over host or CUDA memory, without a copy.

pyarrow builds the array over the raw addresses, which it does not read, and so owns the structures and their release
callbacks; for CUDA memory the 128-byte ArrowDeviceArray that it made is then told its device.
Structures: the Arrow C data and C device data interfaces.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from . import arrow_values

CUDA = 2
MAX_INT32 = (1 << 31) - 1


class ArrowArray(ctypes.Structure):
    """struct ArrowArray."""


ArrowArray._fields_ = (
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(ArrowArray))),
    ("dictionary", ctypes.POINTER(ArrowArray)),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
)


class ArrowDeviceArray(ctypes.Structure):
    """struct ArrowDeviceArray, 128 bytes."""

    _fields_ = (
        ("array", ArrowArray),
        ("device_id", ctypes.c_int64),
        ("device_type", ctypes.c_int32),
        ("sync_event", ctypes.c_void_p),
        ("reserved", ctypes.c_int64 * 3),
    )


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def export(columns: Mapping[str, Any], metadata: Mapping[str, str]) -> tuple[Any, Any]:
    """Capsules (arrow_schema, arrow_device_array) of a struct of one row: a list of the elements of each array.

    The arrays are all NumPy, or all CuPy on one device; what is not row-major is copied. The structures keep them alive
    until the consumer releases them. Lists have 32-bit offsets, which cuDF can read, where the elements allow it, else
    64-bit ones. For CUDA memory the device is synchronized and no event is given: a consumer need not wait.
    """
    parts = {name: _Part(a) for name, a in columns.items()}
    kind = pa.struct([pa.field(name, part.kind) for name, part in parts.items()])
    struct = pa.Array.from_buffers(kind, 1, [None], null_count=0, children=[p.cell() for p in parts.values()])
    schema = pa.field("", kind, metadata=dict(metadata)).__arrow_c_schema__()
    _, capsule = struct.__arrow_c_device_array__()
    exported = ArrowDeviceArray.from_address(_pointer(capsule, b"arrow_device_array"))
    exported.reserved[:] = [0, 0, 0]  # as the format asks for; pyarrow 26 leaves them uninitialised
    device = next(iter(parts.values())).device
    if device is None:
        return schema, capsule
    device.synchronize()
    for i, part in enumerate(parts.values()):
        exported.array.children[i].contents.buffers[1] = part.offsets_address
    exported.device_type, exported.device_id, exported.sync_event = CUDA, device.id, None
    return schema, capsule


class _Part:
    """One array, flat, with the offsets that make it one list; `device` is None for host memory."""

    def __init__(self, a: Any):
        self._array = a if a.flags.c_contiguous else a.copy()
        item = arrow_values.field("item", np.dtype(a.dtype).name)
        is_large = a.size > MAX_INT32
        self.kind = pa.large_list(item) if is_large else pa.list_(item)
        self._offsets = np.array([0, a.size], np.int64 if is_large else np.int32)
        if isinstance(a, np.ndarray):
            self.device, self._address = None, self._array.ctypes.data
            self.offsets_address = self._offsets.ctypes.data
        else:
            import cupy

            self.device, self._address = a.device, self._array.data.ptr
            with a.device:
                self._device_offsets = cupy.asarray(self._offsets)
            self.offsets_address = self._device_offsets.data.ptr

    def cell(self) -> pa.Array:
        """A list array of one row. Its offsets are host memory: pyarrow checks them while it builds."""
        values = pa.Array.from_buffers(self.kind.value_type, self._array.size, [None, self._borrow()], null_count=0)
        offsets = pa.foreign_buffer(self._offsets.ctypes.data, self._offsets.nbytes, base=self)
        return pa.Array.from_buffers(self.kind, 1, [None, offsets], null_count=0, children=[values])

    def _borrow(self) -> pa.Buffer:
        return pa.foreign_buffer(self._address, self._array.nbytes, base=self)
