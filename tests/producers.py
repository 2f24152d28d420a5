"""Producers of arrays that no library here offers: hand-made DLPack capsules and Arrow structures that count their
releases, and a CuPy whose device memory is host memory."""

from __future__ import annotations

import ctypes
import types
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from arrowquant_gpu import dlpack
from arrowquant_gpu.device_arrow import ArrowArray

_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
# A destructor is handed a dying object, which must not be counted up again: hence addresses, not py_object.
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_CALLBACK = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)

# Address of each exported structure -> (its producer's counts, everything it points to).
_EXPORTED: dict[int, tuple[Counter[str], Any]] = {}


@_CALLBACK
def _delete(address: int) -> None:
    counts, _ = _EXPORTED.pop(address)
    counts["released"] += 1


_LAYOUTS = {b"dltensor": dlpack._Managed, b"dltensor_versioned": dlpack._ManagedVersioned}


@_CALLBACK
def _drop_dlpack_capsule(capsule: int) -> None:
    """What every producer's capsule does when nobody consumed it: call the deleter itself."""
    for name, layout in _LAYOUTS.items():
        if _is_valid(capsule, name):
            address = _pointer(capsule, name)
            _CALLBACK(layout.from_address(address).deleter)(address)


_DLPACK_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "float8_e4m3fn": 10, "float8_e5m2": 12}


class DlpackProducer:
    """Exports `array` through DLPack and nothing else, as JAX does.

    `counts` holds the numbers of structures exported and released. `fields` overwrite those of the structure.
    """

    def __init__(
        self, array: np.ndarray, *, versioned: bool = True, device: tuple[int, int] = (dlpack.CPU, 0), **fields: Any
    ):
        self.array, self.versioned, self.device, self.fields = array, versioned, device, fields
        self.counts: Counter[str] = Counter()

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: Any = None, max_version: tuple[int, int] | None = None) -> Any:
        a, n = self.array, self.array.ndim
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        managed = _LAYOUTS[name]()
        address = ctypes.addressof(managed)
        numbers = (ctypes.c_int64 * (2 * n))(*a.shape, *(s // a.itemsize for s in a.strides))
        tensor, at = managed.tensor, ctypes.addressof(numbers)
        tensor.data, tensor.ndim = a.ctypes.data, n
        tensor.device.device_type, tensor.device.device_id = self.device
        code = _DLPACK_CODES.get(a.dtype.name, _DLPACK_CODES.get(a.dtype.name.rstrip("0123456789"), 255))
        tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes = code, a.itemsize * 8, 1
        tensor.shape = ctypes.cast(at, ctypes.POINTER(ctypes.c_int64))
        tensor.strides = ctypes.cast(at + 8 * n, ctypes.POINTER(ctypes.c_int64))
        if self.versioned:
            managed.major, managed.minor, managed.flags = 1, 0, 1
        managed.deleter = ctypes.cast(_delete, ctypes.c_void_p)
        for field, value in self.fields.items():
            holder = next(h for h in (managed, tensor, tensor.dtype) if hasattr(h, field))
            setattr(holder, field, value)
        _EXPORTED[address] = (self.counts, (managed, numbers, a))
        self.counts["exported"] += 1
        return _new_capsule(address, name, ctypes.cast(_drop_dlpack_capsule, ctypes.c_void_p))


@_CALLBACK
def _release_array(address: int) -> None:
    """An Arrow release callback: `address` is where the consumer moved the structure to."""
    array = ArrowArray.from_address(address)
    key, array.release = array.private_data, None
    counts, _ = _EXPORTED.pop(key)
    counts["released"] += 1


@_CALLBACK
def _drop_arrow_capsule(capsule: int) -> None:
    address = _pointer(capsule, b"arrow_array")
    if ArrowArray.from_address(address).release:
        _release_array(address)
    _MOVED_FROM.pop(address)


# The structure itself belongs to the capsule; what it points to, to whoever releases it.
_MOVED_FROM: dict[int, ArrowArray] = {}


class ArrowProducer:
    """Exports a flat array of numbers through `__arrow_c_array__` and nothing else, over hand-made structures."""

    def __init__(self, array: np.ndarray, field: pa.Field):
        self.array, self.field = array, field
        self.counts: Counter[str] = Counter()

    def __arrow_c_array__(self, requested_schema: Any = None) -> tuple[Any, Any]:
        a = self.array
        buffers = (ctypes.c_void_p * 2)(None, a.ctypes.data)
        c = ArrowArray(length=a.size, null_count=0, offset=0, n_buffers=2, n_children=0)
        c.buffers = ctypes.cast(buffers, ctypes.POINTER(ctypes.c_void_p))
        c.release = ctypes.cast(_release_array, ctypes.c_void_p)
        c.private_data = key = ctypes.addressof(buffers)
        _EXPORTED[key] = (self.counts, (buffers, a))
        _MOVED_FROM[ctypes.addressof(c)] = c
        self.counts["exported"] += 1
        capsule = _new_capsule(ctypes.addressof(c), b"arrow_array", ctypes.cast(_drop_arrow_capsule, ctypes.c_void_p))
        return self.field.__arrow_c_schema__(), capsule


class StreamProducer:
    """Exports what pyarrow would through `__arrow_c_stream__` and nothing else."""

    def __init__(self, data: Any):
        self.data = data

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.data.__arrow_c_stream__(requested_schema)


class FakeDevice:
    """cupy.cuda.Device: counts synchronizations, and knows which device is current."""

    current: ClassVar[int] = 0
    synchronized: ClassVar[Counter[int]] = Counter()

    def __init__(self, index: int = 0):
        self.id = index

    def synchronize(self) -> None:
        FakeDevice.synchronized[self.id] += 1

    def __enter__(self) -> FakeDevice:
        self._before, FakeDevice.current = FakeDevice.current, self.id
        return self

    def __exit__(self, *exc: object) -> None:
        FakeDevice.current = self._before


class FakeCupyArray:
    """cupy.ndarray over host memory that only its own methods may read: NumPy may not convert it."""

    def __init__(self, memory: np.ndarray, device: int = 0):
        self.memory, self.device = memory, FakeDevice(device)
        self.data = types.SimpleNamespace(ptr=memory.ctypes.data)

    shape = property(lambda self: self.memory.shape)
    dtype = property(lambda self: self.memory.dtype)
    strides = property(lambda self: self.memory.strides)
    flags = property(lambda self: self.memory.flags)
    ndim = property(lambda self: self.memory.ndim)
    size = property(lambda self: self.memory.size)
    nbytes = property(lambda self: self.memory.nbytes)

    def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
        raise TypeError("implicit copy of device memory")

    def __getitem__(self, at: Any) -> FakeCupyArray:
        return FakeCupyArray(self.memory[at], self.device.id)

    def reshape(self, *shape: Any) -> FakeCupyArray:
        return FakeCupyArray(self.memory.reshape(*shape), self.device.id)

    def copy(self) -> FakeCupyArray:
        return FakeCupyArray(self.memory.copy(), self.device.id)

    def get(self, *, out: np.ndarray) -> np.ndarray:
        assert out.dtype == self.dtype
        assert out.shape == self.shape
        assert out.flags.c_contiguous
        out[...] = self.memory
        return out

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, self.device.id

    def __dlpack__(self, **options: Any) -> Any:
        return DlpackProducer(self.memory, device=self.__dlpack_device__()).__dlpack__()


class PinnedMemory(bytearray):
    """cupy.cuda.PinnedMemoryPointer: writable bytes. (A plain bytearray takes no weak references.)"""


def fake_cupy() -> types.ModuleType:
    """A module to put into sys.modules as cupy. `pinned` on it lists sizes of the page-locked blocks it gave out."""
    cupy = types.ModuleType("cupy")
    cupy.ndarray = FakeCupyArray
    cupy.pinned = []

    def from_dlpack(x: Any) -> FakeCupyArray:
        kind, index = x.__dlpack_device__()
        assert kind in (dlpack.CUDA, dlpack.CUDA_MANAGED)
        return FakeCupyArray(dlpack.host_view(x, name="fake device memory"), index)

    def alloc_pinned_memory(n_bytes: int) -> PinnedMemory:
        memory = PinnedMemory(n_bytes)
        cupy.pinned.append(n_bytes)
        return memory

    cupy.from_dlpack = from_dlpack
    cupy.asarray = lambda a: FakeCupyArray(a.copy(), FakeDevice.current)
    cupy.cuda = types.SimpleNamespace(Device=FakeDevice, alloc_pinned_memory=alloc_pinned_memory)
    return cupy
