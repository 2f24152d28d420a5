"""A stand-in for CuPy that runs the CUDA backend unchanged where there is no GPU.

`install` puts modules named cupy, cupy.cuda, cupy.cuda.runtime and cupyx in sys.modules. They have what this package
uses and nothing else: another name is an AttributeError. Kernels run through the shim (shim.py) or the simulator
(ptx.py); memory and streams are those of device.py. CuPy checks no arguments of a kernel; here a wrong count, width,
kind, device, or a host array is a fault.
"""

from __future__ import annotations

import math
import sys
import time
import types
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowquant_gpu import backends

from .device import Allocation, Gpu, Host, Stream, still_there
from .errors import KernelFault

# (grid, block, arguments, shared memory) -> what a stream has to run; see ShimFunction.prepare.
Prepare = Callable[[Sequence[int], Sequence[int], Sequence[object], int], Callable[[], None]]
# (path of a cubin, name of the entry) -> its kernel; see loaders.py.
Loader = Callable[[Path, str], Prepare]


BACKEND, ENGINE = "arrowquant_gpu.backends.cuda", "arrowquant_gpu.engine.cuda"


class CUDARuntimeError(RuntimeError):
    """What the real one is: any failure of a runtime call."""

    def __init__(self, message: str, status: int = 999):
        super().__init__(message)
        self.status = status


class Memory:
    """cupy.cuda.Memory: memory of the current device that is not of CuPy's pool."""

    def __init__(self, host: Host, n_bytes: int):
        allocation = host.gpu.reserve(n_bytes)
        if allocation is None:
            raise CUDARuntimeError("cudaErrorMemoryAllocation: out of memory", 2)
        self.host, self.allocation = host, allocation


class MemoryPointer:
    """cupy.cuda.MemoryPointer: where an array's data are, in an allocation."""

    def __init__(self, mem: Memory, offset: int):
        self.mem, self.offset, self.ptr = mem, offset, mem.allocation.address + offset

    def memset_async(self, value: int, size: int, stream: StreamHandle | None = None) -> None:
        allocation = self.mem.allocation
        queue = queue_of(self.mem.host, allocation, stream)
        part = allocation.bytes[self.offset : self.offset + size]
        if part.size < size:
            raise KernelFault(f"setting {size} bytes where there are {part.size}")
        queue.submit(still_there(allocation, lambda: part.fill(value), "setting memory"))


class DeviceArray:
    """cupy.ndarray: a row-major array in device memory. The host cannot read it but by copying.

    `contents` is the memory itself: for tests, no part of CuPy.
    """

    __array_priority__ = 100

    def __init__(self, shape: Any, dtype: Any, memptr: MemoryPointer):
        memory, n_bytes = memptr.mem.allocation.bytes, math.prod(shape) * np.dtype(dtype).itemsize
        contents = memory[memptr.offset : memptr.offset + n_bytes].view(dtype).reshape(shape)
        self._set(memptr.mem.host, memptr.mem.allocation, contents)

    @classmethod
    def of(cls, host: Host, allocation: Allocation, contents: np.ndarray) -> DeviceArray:
        """An array over a part of an allocation."""
        self = cls.__new__(cls)
        self._set(host, allocation, contents)
        return self

    def _set(self, host: Host, allocation: Allocation, contents: np.ndarray) -> None:
        self._host, self._allocation, self.contents = host, allocation, contents
        self.shape, self.dtype, self.ndim = contents.shape, contents.dtype, contents.ndim
        self.size, self.nbytes, self.itemsize, self.flags = (
            contents.size, contents.nbytes, contents.itemsize, contents.flags,
        )  # fmt: skip

    @property
    def data(self) -> MemoryPointer:
        mem = Memory.__new__(Memory)
        mem.host, mem.allocation = self._host, self._allocation
        return MemoryPointer(mem, self.contents.ctypes.data - self._allocation.bytes.ctypes.data)

    @property
    def device(self) -> Device:
        return Device(self._host, self._allocation.device.index)

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.id

    def __dlpack__(self, **_: object) -> object:
        raise BufferError("the stand-in has no capsules: an address of it is none of this process")

    def _view(self, contents: np.ndarray) -> DeviceArray:
        return DeviceArray.of(self._host, self._allocation, contents)

    def reshape(self, *shape: Any) -> DeviceArray:
        return self._view(self.contents.reshape(*shape))

    def view(self, dtype: Any) -> DeviceArray:
        return self._view(self.contents.view(dtype))

    def __getitem__(self, key: Any) -> DeviceArray:
        contents = self.contents[key]
        if not isinstance(contents, np.ndarray) or contents.base is None:
            raise KernelFault(f"indexing with {key!r} starts a kernel of CuPy's own")
        return self._view(contents)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Copy between two arrays of one device, on the current stream."""
        target = self[key]
        if not isinstance(value, DeviceArray) or (value.shape, value.dtype) != (target.shape, target.dtype):
            raise KernelFault("assigning anything but a device array of the same shape and dtype")
        self._queue(None).submit(lambda: np.copyto(target.contents, value.contents))

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        """Copy a host array in; asynchronous where `arr` is page-locked."""
        if not isinstance(arr, np.ndarray) or (arr.shape, arr.dtype) != (self.shape, self.dtype):
            raise ValueError(f"set needs a NumPy array of shape {self.shape} and dtype {self.dtype}")
        queue = self._queue(stream)
        self._host.copy_in(self.contents, np.ascontiguousarray(arr), queue)

    def get(self, stream: Any = None, order: str = "C", out: np.ndarray | None = None, blocking: bool = True) -> Any:
        """Copy to a host array; with blocking=False asynchronous where `out` is page-locked."""
        if out is None:
            out = np.empty(self.shape, self.dtype)
        if not isinstance(out, np.ndarray) or (out.shape, out.dtype) != (self.shape, self.dtype):
            raise ValueError(f"out must be a NumPy array of shape {self.shape} and dtype {self.dtype}")
        if not out.flags.c_contiguous:
            raise RuntimeError("out must be C-contiguous")
        queue = self._queue(stream)
        self._host.copy_out(out, self.contents, queue)
        if blocking:
            queue.run(queue.n_submitted)
        return out

    def _queue(self, stream: StreamHandle | None) -> Stream:
        return queue_of(self._host, self._allocation, stream)


def queue_of(host: Host, allocation: Allocation, stream: StreamHandle | None) -> Stream:
    """The stream on which something happens to memory: by default the current one of its device."""
    queue = host.current_stream(allocation.device) if stream is None else stream.queue
    if queue.device is not allocation.device:
        raise KernelFault(f"memory of device {allocation.device.index} on a stream of {queue.device.index}")
    return queue


class Device:
    """cupy.cuda.Device: entered, it is the current device of the host."""

    def __init__(self, host: Host, index: int | None = None):
        self._host = host
        self.id = host.current.devices[-1] if index is None else index

    def __enter__(self) -> Device:
        if not 0 <= self.id < len(self._host.gpus):
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self._host.current.devices.append(self.id)
        return self

    def __exit__(self, *_: object) -> None:
        self._host.current.devices.pop()

    def synchronize(self) -> None:
        self._host.gpus[self.id].synchronize()


class StreamHandle:
    """cupy.cuda.Stream: entered, it is the current stream of its device."""

    def __init__(self, host: Host, queue: Stream):
        self._host, self.queue, self.ptr = host, queue, queue.ptr

    def __enter__(self) -> StreamHandle:
        if self.queue.device is not self._host.gpu:
            raise RuntimeError("The device that the stream is created on does not match with the current device")
        self._host.current.streams.append(self.queue)
        return self

    def __exit__(self, *_: object) -> None:
        self._host.current.streams.pop()

    def synchronize(self) -> None:
        self.queue.run(self.queue.n_submitted)

    def wait_event(self, event: Event) -> None:
        self.queue.submit(lambda: None, [] if event.at is None else [event.at])


class Event:
    """cupy.cuda.Event, on the current device."""

    def __init__(self, host: Host, block: bool = False, disable_timing: bool = False):
        self._host, self.is_timed, self.time = host, not disable_timing, 0.0
        self._device = host.gpu
        self.at: tuple[Stream, int] | None = None

    def record(self, stream: StreamHandle | None = None) -> None:
        queue = self._host.current_stream() if stream is None else stream.queue
        if queue.device is not self._device:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: the event is of another device")
        queue.submit(self._stamp)
        self.at = queue, queue.n_submitted

    def synchronize(self) -> None:
        if self.at is not None:
            self.at[0].run(self.at[1])

    def _stamp(self) -> None:
        self.time = time.perf_counter()


def elapsed_time(start: Event, end: Event) -> float:
    """cupy.cuda.get_elapsed_time: milliseconds."""
    if not (start.is_timed and end.is_timed):
        raise CUDARuntimeError("cudaErrorInvalidResourceHandle: an event without timing")
    if any(e.at is None or e.at[0].n_done < e.at[1] for e in (start, end)):
        raise CUDARuntimeError("cudaErrorNotReady: device not ready")
    return (end.time - start.time) * 1e3


class RawKernel:
    """cupy.RawKernel, from a cubin. The shim checks what CuPy leaves unchecked."""

    def __init__(self, host: Host, prepare: Prepare):
        self._host, self._prepare = host, prepare

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], *, shared_mem: int = 0) -> None:
        gpu, queue = self._host.gpu, self._host.current_stream()
        bound = [self._bind(a, gpu) for a in args]
        run = self._prepare(grid, block, bound, shared_mem)
        for a in args:
            if isinstance(a, DeviceArray) and a._allocation.stream is not queue:
                run = still_there(a._allocation, run, "a kernel")
        gpu.n_launches += 1
        queue.submit(run)

    @staticmethod
    def _bind(a: Any, gpu: Gpu) -> Any:
        """What CuPy makes of an argument: strides are ignored, and a Python number is 8 bytes wide."""
        if isinstance(a, DeviceArray):
            if a._allocation.device is not gpu:
                raise KernelFault(f"a kernel on device {gpu.index} uses memory of device {a._allocation.device.index}")
            return a.contents
        if a is None or isinstance(a, np.generic):
            return a
        if isinstance(a, (bool, int, float)):
            return {bool: np.bool_, int: np.int64, float: np.float64}[type(a)](a)
        raise TypeError(f"Unsupported type {type(a)}")


class RawModule:
    """cupy.RawModule(path=...): the functions of one cubin."""

    def __init__(self, host: Host, loader: Loader, path: str):
        if not Path(path).exists():
            raise CUDARuntimeError(f"CUDA_ERROR_FILE_NOT_FOUND: {path}")
        self._host, self._loader, self._path = host, loader, Path(path)

    def get_function(self, name: str) -> RawKernel:
        return RawKernel(self._host, self._loader(self._path, name))


def install(monkeypatch: pytest.MonkeyPatch, loader: Loader, n_devices: int = 1, arch: int = 90) -> Host:
    """Put the stand-in in sys.modules until the test ends. `loader` gives the function for a cubin and an entry.

    Returns the host, through which a test sees devices and streams.
    """
    host = Host([Gpu(i, arch) for i in range(n_devices)])
    cupy, cuda, runtime, cupyx = (_module(n) for n in ("cupy", "cupy.cuda", "cupy.cuda.runtime", "cupyx"))

    def empty(shape: Any, dtype: Any = float) -> DeviceArray:
        dtype = np.dtype(dtype)
        n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        allocation = host.gpu.allocate(n_bytes, host.current_stream())
        return DeviceArray.of(host, allocation, allocation.bytes.view(dtype).reshape(shape))

    def asarray(a: Any, dtype: Any = None) -> DeviceArray:
        if isinstance(a, DeviceArray):
            return a
        source = np.ascontiguousarray(a, dtype)
        array = empty(source.shape, source.dtype)
        array.set(source)
        return array

    def empty_pinned(shape: Any, dtype: Any = float) -> np.ndarray:
        dtype = np.dtype(dtype)
        n = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(host.allocate_pinned(n * dtype.itemsize), dtype, n).reshape(shape)

    def properties(index: int) -> dict[str, Any]:
        if not 0 <= index < len(host.gpus):
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        gpu = host.gpus[index]
        major, minor = divmod(gpu.arch, 10)
        return {
            "name": b"stand-in", "major": major, "minor": minor, "multiProcessorCount": gpu.multiprocessors,
        }  # fmt: skip

    vars(cupy).update(
        cuda=cuda, ndarray=DeviceArray, empty=empty, asarray=asarray,
        RawModule=lambda path: RawModule(host, loader, path),
    )  # fmt: skip
    vars(cuda).update(
        runtime=runtime,
        Device=lambda index=None: Device(host, index),
        Stream=lambda non_blocking=False: StreamHandle(host, host.gpu.stream(non_blocking)),
        get_current_stream=lambda: StreamHandle(host, host.current_stream()),
        alloc_pinned_memory=host.allocate_pinned,
        PinnedMemory=host.allocate_pinned,
        PinnedMemoryPointer=lambda mem, offset: mem,
        Memory=lambda size: Memory(host, size),
        MemoryPointer=MemoryPointer,
        Event=lambda block=False, disable_timing=False: Event(host, block, disable_timing),
        get_elapsed_time=elapsed_time,
    )
    vars(runtime).update(
        getDeviceCount=lambda: len(host.gpus), getDeviceProperties=properties, CUDARuntimeError=CUDARuntimeError
    )
    vars(cupyx).update(empty_pinned=empty_pinned)
    for module in (cupy, cuda, runtime, cupyx):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # These hold the CuPy that they were imported with: import them anew now, and again after the test.
    for name in (BACKEND, ENGINE):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        del sys.modules[name]
    # What the package remembers of the GPUs it found is not for other tests.
    for name, cached in vars(backends).items():
        if hasattr(cached, "cache_clear"):
            monkeypatch.setattr(backends, name, cached.__wrapped__)
    return host


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # find_spec asks for one
    return module
