"""`open_cuda`: a ring of slots on a CUDA device. Importing this needs CuPy."""

from __future__ import annotations

import time
from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from ..backends.cuda import CudaBackend, current
from ..schemes import Scheme
from . import Reader, Sizes
from .batches import Stage
from .streamed import StreamedDevice


def open_cuda(
    name: str, reader: Reader, smallest: Sizes, slot_bytes: int, n_slots: int, max_bytes: int | None = None
) -> StreamedDevice:
    """The device "cuda:N" with a ring of slots; for the sizes, and what they raise, see StreamedDevice.

    Raises DeviceError where there is no such device, or it is too old.
    """
    streams = CudaStreams(int(name.partition(":")[2]))
    return StreamedDevice(streams, reader, smallest, slot_bytes, n_slots, max_bytes)


class CudaStreams:
    """Three streams of CUDA device number `index` that wait neither for the null stream nor for each other.

    See `Streams`. Device arrays are CuPy arrays. Memory comes from CUDA itself, exactly as much as is asked for: CuPy's
    pools round pinned blocks up to a power of two and keep what is freed.
    """

    def __init__(self, index: int) -> None:
        self.name, self._index = f"cuda:{index}", index
        self._backend = CudaBackend(index)
        with current(index):
            self._streams: dict[Stage, Any] = {
                "h2d": cupy.cuda.Stream(non_blocking=True),
                "kernel": cupy.cuda.Stream(non_blocking=True),
                "d2h": cupy.cuda.Stream(non_blocking=True),
            }
            self._zero = cupy.cuda.Event(block=True)
            self._zero.record(self._streams["h2d"])
            self._zero.synchronize()
        self._zero_time = time.perf_counter()

    def pinned(self, n_bytes: int) -> NDArray[np.uint8]:
        with current(self._index):
            memory = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(max(1, n_bytes)), 0)
        return np.frombuffer(memory, np.uint8, n_bytes)

    def allocate(self, n_bytes: int) -> Any:
        with current(self._index):
            memory = cupy.cuda.MemoryPointer(cupy.cuda.Memory(max(1, n_bytes)), 0)
            return cupy.ndarray((n_bytes,), np.uint8, memptr=memory)

    def to_device(self, target: Any, source: NDArray[np.uint8]) -> None:
        with current(self._index):
            target.set(source, stream=self._streams["h2d"])

    def zero(self, target: Any) -> None:
        with current(self._index):
            target.data.memset_async(0, target.nbytes, self._streams["kernel"])

    def quantize(self, x: Any, scheme: Scheme, packed: Any, scales: Any, zeros: Any | None, found: Any) -> None:
        with current(self._index), self._streams["kernel"]:
            self._backend.launch_quantize(x, scheme, packed, scales, zeros, found)

    def value_range(self, x: Any, found: Any) -> None:
        with current(self._index), self._streams["kernel"]:
            self._backend.launch_value_range(x, found)

    def encode(self, x: Any, scheme: Scheme, scales: Any, zeros: Any | None, packed: Any) -> None:
        with current(self._index), self._streams["kernel"]:
            self._backend.encode(x, scheme, scales, zeros, packed)

    def to_host(self, target: NDArray[np.uint8], source: Any) -> None:
        with current(self._index):
            source.get(stream=self._streams["d2h"], out=target, blocking=False)

    def record(self, stage: Stage, *, is_timed: bool = False) -> Any:
        with current(self._index):
            # A thread that waits for a blocking event sleeps, and leaves its core to those that read and write.
            event = cupy.cuda.Event(block=True, disable_timing=not is_timed)
            event.record(self._streams[stage])
            return event

    def after(self, stage: Stage, event: Any) -> None:
        with current(self._index):
            self._streams[stage].wait_event(event)

    def wait(self, event: Any) -> None:
        with current(self._index):
            event.synchronize()

    def time(self, event: Any) -> float:
        with current(self._index):
            return self._zero_time + float(cupy.cuda.get_elapsed_time(self._zero, event)) / 1e3

    def close(self) -> None:
        self._streams.clear()
