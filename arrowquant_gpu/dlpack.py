"""DLPack tensors of any producer as arrays: NumPy views for host memory, CuPy arrays for CUDA memory, never a copy.

Host capsules are read here and not by `numpy.from_dlpack`, which knows neither bfloat16 nor the 8-bit floats.
Structures and type codes: dlpack.h 1.1 of the DMLC DLPack project, and the Python protocol of the array API standard.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import DTYPES
from .errors import DeviceError, InputError

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
_OTHER_DEVICES = {4: "OpenCL", 7: "Vulkan", 8: "Metal", 9: "VPI", 10: "ROCm", 11: "ROCm host", 14: "oneAPI"}

# The newest structure layout read here. A producer may answer with an older one.
_MAX_VERSION = (1, 1)

_INT, _UINT, _FLOAT, _BFLOAT = 0, 1, 2, 4
_DTYPES = {
    **{(_INT, bits): f"int{bits}" for bits in (8, 16, 32, 64)},
    **{(_UINT, bits): f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{(_FLOAT, bits): f"float{bits}" for bits in (16, 32, 64)},
    (_BFLOAT, 16): "bfloat16",
    (10, 8): "float8_e4m3fn",
    (12, 8): "float8_e5m2",
}
# Names of the type codes, for errors.
_CODES = {
    0: "int",
    1: "uint",
    2: "float",
    3: "opaque",
    4: "bfloat",
    5: "complex",
    6: "bool",
    7: "float8_e3m4",
    8: "float8_e4m3",
    9: "float8_e4m3b11fnuz",
    10: "float8_e4m3fn",
    11: "float8_e4m3fnuz",
    12: "float8_e5m2",
    13: "float8_e5m2fnuz",
    14: "float8_e8m0fnu",
    15: "float6_e2m3fn",
    16: "float6_e3m2fn",
    17: "float4_e2m1fn",
}


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# Capsule name, its name once consumed, and its structure. PyCapsule keeps the name's pointer: these must live as long
# as the module does.
_LAYOUTS: tuple[tuple[bytes, bytes, type[_Managed] | type[_ManagedVersioned]], ...] = (
    (b"dltensor_versioned", b"used_dltensor_versioned", _ManagedVersioned),
    (b"dltensor", b"used_dltensor", _Managed),
)

_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", ctypes.pythonapi))
_DELETER = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)


class _Borrowed:
    """Owns a consumed managed tensor: calls its deleter once, when the last view of it is gone."""

    def __init__(self, managed: int, deleter: int | None, interface: dict[str, Any]):
        self.__array_interface__ = interface
        self._managed = managed
        self._deleter: Callable[[int], None] | None = _DELETER(deleter) if deleter else None

    def __del__(self) -> None:
        if self._deleter is not None:
            self._deleter(self._managed)


def device_of(x: Any, *, name: str) -> int:
    """The device type of a producer. Raises InputError where it is neither host nor CUDA memory."""
    try:
        kind, _ = x.__dlpack_device__()
    except (BufferError, RuntimeError, ValueError, TypeError) as e:
        raise InputError(f"{name}: {_type(x)} cannot be exported through DLPack: {e}") from e
    if int(kind) not in (CPU, CUDA, CUDA_HOST, CUDA_MANAGED):
        called = _OTHER_DEVICES.get(int(kind), "unknown")
        raise InputError(f"{name}: {_type(x)} is on DLPack device type {int(kind)} ({called}); copy it to CPU or CUDA")
    return int(kind)


def host_view(x: Any, *, name: str) -> NDArray[Any]:
    """A read-only NumPy view, in the producer's shape and strides, of a tensor in host memory. Copies nothing.

    The view owns the capsule's tensor: the producer may be dropped, and its deleter is called once, when the last
    array that refers to the view is gone.

        >>> a = np.arange(6, dtype=np.int16).reshape(2, 3)
        >>> view = host_view(a.T, name="w")
        >>> view.shape, view.ctypes.data == a.ctypes.data, view.flags.writeable
        ((3, 2), True, False)

    Raises InputError for element types outside the table of dtypes.py, and with the producer's own words where it
    refuses to export (for example a tensor that requires a gradient).
    """
    capsule = _export(x, name=name)
    for unused, used, layout in _LAYOUTS:
        if not _is_valid(capsule, unused):
            continue
        address = _pointer(capsule, unused)
        managed = layout.from_address(address)
        if isinstance(managed, _ManagedVersioned) and managed.major > _MAX_VERSION[0]:
            raise InputError(f"{name}: {_type(x)} exports DLPack {managed.major}.{managed.minor}; this reads 1.x")
        dtype = _dtype(managed.tensor, name=name)
        interface = _interface(managed.tensor, dtype)
        if not managed.tensor.data and 0 not in interface["shape"]:
            raise InputError(f"{name}: {_type(x)} exports shape {list(interface['shape'])} and no data")
        owner = _Borrowed(address, managed.deleter, interface)
        _set_name(capsule, used)
        return np.asarray(owner).view(dtype)
    raise InputError(f"{name}: {_type(x)}.__dlpack__() gave {capsule!r}, which is not an unused DLPack capsule")


def device_array(x: Any, *, name: str) -> Any:
    """A CuPy array over the CUDA memory of `x`, ready on CuPy's current stream. Copies nothing.

    Raises DeviceError where CuPy is not installed, and InputError with CuPy's words where it cannot take the array.
    """
    try:
        import cupy
    except ImportError as e:
        raise DeviceError(
            f"{name}: {_type(x)} is in GPU memory, and CuPy is not installed "
            f"(pip install 'arrowquant_gpu[cuda13]' or [cuda12]); or copy it to the CPU first"
        ) from e
    if isinstance(x, cupy.ndarray):
        return x
    try:
        return cupy.from_dlpack(x)
    except (BufferError, RuntimeError, ValueError, TypeError) as e:
        raise InputError(f"{name}: {_type(x)} cannot be read through DLPack: {e}") from e


def _export(x: Any, *, name: str) -> Any:
    try:
        try:
            return x.__dlpack__(max_version=_MAX_VERSION)
        except TypeError:  # a producer from before the keyword
            return x.__dlpack__()
    except (BufferError, RuntimeError, ValueError, TypeError) as e:
        raise InputError(f"{name}: {_type(x)} cannot be exported through DLPack: {e}") from e


def _dtype(tensor: _Tensor, *, name: str) -> np.dtype[Any]:
    code, bits, lanes = tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes
    row = DTYPES.get(_DTYPES.get((code, bits), "")) if lanes == 1 else None
    if row is None or row.numpy is None:
        called = _CODES.get(code, f"of code {code}")
        raise InputError(
            f"{name}: DLPack dtype {called} with {bits} bits and {lanes} lanes is not supported; "
            f"use one of {', '.join(_DTYPES.values())}"
        )
    return row.numpy


def _interface(tensor: _Tensor, dtype: np.dtype[Any]) -> dict[str, Any]:
    """The tensor as NumPy's array interface, in unsigned integers of the element's size."""
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim)) if tensor.strides else None
    order = "<" if sys.byteorder == "little" else ">"
    # NumPy allocates where it is given a null pointer. An empty tensor may have one: any other address will do.
    address = (tensor.data or ctypes.addressof(tensor)) + tensor.byte_offset
    return {
        "version": 3,
        "typestr": f"{order}u{dtype.itemsize}" if dtype.itemsize > 1 else "|u1",
        "shape": shape,
        "strides": strides,
        "data": (address, True),
    }


def _type(x: object) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}"
