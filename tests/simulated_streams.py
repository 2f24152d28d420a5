"""`SimulatedStreams`: a device for tests of the engine, with three streams that are threads of this process.

What is enqueued runs later, in the order of its stream, after the events that the stream waits for, and after a random
while; a copy reads its source and writes its target only then. So a buffer that is used too early or let go of too late
shows in the bytes. Device memory is NumPy's, but the host can only reach it by copies; the kernels are the CPU backend
with one thread.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from queue import SimpleQueue
from typing import Any

import numpy as np

from arrowquant_gpu.backends import counters, get_backend
from arrowquant_gpu.engine.streamed import STAGES, Stage
from arrowquant_gpu.errors import DeviceError, DeviceMemoryError
from arrowquant_gpu.schemes import Scheme

GARBAGE = 0xC7  # what fresh memory holds


class DeviceArray:
    """Device memory: it can be sliced and viewed, and that is all. `contents` is for the streams, and for tests."""

    def __init__(self, contents: np.ndarray) -> None:
        self.contents = contents
        self.shape, self.dtype, self.size, self.nbytes = contents.shape, contents.dtype, contents.size, contents.nbytes

    def __getitem__(self, key: slice) -> DeviceArray:
        return DeviceArray(self.contents[key])

    def view(self, dtype: Any) -> DeviceArray:
        return DeviceArray(self.contents.view(dtype))

    def reshape(self, shape: tuple[int, ...]) -> DeviceArray:
        return DeviceArray(self.contents.reshape(shape))

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise TypeError("device memory is not for the host")


class Event:
    """Happens once. `time` is when, by the stream's own clock (see SimulatedStreams)."""

    def __init__(self) -> None:
        self.happened = threading.Event()
        self.time = 0.0


class SimulatedStreams:
    """See `Streams`. `seed` fixes the delays, between 0 and `delay` seconds before a piece of work runs.

    speeds: bytes per second of some stages, slower than this machine, for tests of overlap: work takes as long as its
        bytes need. A stage has a clock of its own, which counts only that, so that late wake-ups do not add up
    faults: (kind, n): call number n, from 0, of a kind fails: "pinned", "allocate", "h2d", "kernel", "d2h", "wait". It
        does nothing then, a wait does not wait. From call number n of all on, "lost" fails every call, and nothing that
        is enqueued runs any more
    memory: bytes of device memory
    """

    def __init__(
        self,
        name: str = "sim:0",
        seed: int = 0,
        *,
        speeds: Mapping[Stage, float] | None = None,
        delay: float = 0.0,
        faults: Collection[tuple[str, int]] = (),
        memory: int | None = None,
    ) -> None:
        self.name = name
        self.calls: Counter[str] = Counter()
        self._speeds, self._delay, self._faults, self._memory = speeds or {}, delay, frozenset(faults), memory
        self._blocks: list[tuple[str, weakref.ref[np.ndarray], int]] = []
        self._failure: BaseException | None = None
        self._is_lost = False
        self._n_under_way = 0
        self._backend = get_backend("cpu", 1)
        self._lock = threading.Lock()
        self._delays = {stage: random.Random(f"{seed} {stage}") for stage in STAGES}
        # (the stream's clock -> its clock afterwards, when that was enqueued)
        self._queues: dict[Stage, SimpleQueue[tuple[Callable[[float], float], float] | None]] = {
            stage: SimpleQueue() for stage in STAGES
        }
        self._threads = [
            threading.Thread(target=self._run, args=(stage,), name=f"{name} {stage}", daemon=True) for stage in STAGES
        ]
        for thread in self._threads:
            thread.start()

    def pinned(self, n_bytes: int) -> np.ndarray:
        return self._memory_of("pinned", n_bytes)

    def allocate(self, n_bytes: int) -> DeviceArray:
        return DeviceArray(self._memory_of("allocate", n_bytes))

    def to_device(self, target: DeviceArray, source: np.ndarray) -> None:
        _check_copy(target.contents, source)
        self._enqueue("h2d", lambda: np.copyto(target.contents, source), target.nbytes)

    def to_host(self, target: np.ndarray, source: DeviceArray) -> None:
        _check_copy(target, source.contents)
        self._enqueue("d2h", lambda: np.copyto(target, source.contents), target.nbytes)

    def zero(self, target: DeviceArray) -> None:
        self._enqueue("kernel", lambda: target.contents.fill(0), 0)

    def quantize(
        self,
        x: DeviceArray,
        scheme: Scheme,
        packed: DeviceArray,
        scales: DeviceArray,
        zeros: DeviceArray | None,
        found: DeviceArray,
    ) -> None:
        _check_aligned(x, packed, scales, found)
        outs = packed.contents, scales.contents, None if zeros is None else zeros.contents

        def run() -> None:
            counters.write(found.contents, self._backend.quantize(x.contents, scheme, *outs))

        self._enqueue("kernel", run, x.nbytes + packed.nbytes + scales.nbytes)

    def value_range(self, x: DeviceArray, found: DeviceArray) -> None:
        _check_aligned(x, found)

        def run() -> None:
            low, high, findings = self._backend.value_range(x.contents)
            counters.write(found.contents, findings, low, high)

        self._enqueue("kernel", run, x.nbytes)

    def encode(
        self, x: DeviceArray, scheme: Scheme, scales: DeviceArray, zeros: DeviceArray | None, packed: DeviceArray
    ) -> None:
        _check_aligned(x, packed, scales)
        known = scales.contents, None if zeros is None else zeros.contents
        run = lambda: self._backend.encode(x.contents, scheme, *known, packed.contents)  # noqa: E731
        self._enqueue("kernel", run, x.nbytes + packed.nbytes)

    def record(self, stage: Stage, *, is_timed: bool = False) -> Event:
        event = Event()

        def happen(clock: float) -> float:
            event.time = clock
            event.happened.set()
            return clock

        self._put(stage, happen)
        return event

    def after(self, stage: Stage, event: Event) -> None:
        def await_it(clock: float) -> float:
            event.happened.wait()
            return max(clock, event.time)

        self._put(stage, await_it)

    def wait(self, event: Event) -> None:
        self._call("wait")
        event.happened.wait()
        if self._is_lost or self._failure is not None:
            raise DeviceError(f"{self.name}: the device is lost") from self._failure

    def time(self, event: Event) -> float:
        assert event.happened.is_set(), "the time of an event that was not waited for"
        return event.time

    def close(self) -> None:
        """End the threads; what is still enqueued runs first."""
        for queue in self._queues.values():
            queue.put(None)
        for thread in self._threads:
            thread.join()

    def live(self, kind: str) -> int:
        """Bytes allocated and not freed, of kind "pinned" or "allocate"."""
        with self._lock:
            return sum(n for k, block, n in self._blocks if k == kind and block() is not None)

    def n_under_way(self) -> int:
        """How many copies and kernels were enqueued and have not run."""
        with self._lock:
            return self._n_under_way

    def _call(self, kind: str) -> None:
        with self._lock:
            n, of_all = self.calls[kind], self.calls.total()
            self.calls[kind] += 1
        self._is_lost |= ("lost", of_all) in self._faults
        if self._is_lost:
            raise DeviceError(f"{self.name}: the device is lost")
        if (kind, n) in self._faults:
            error = DeviceMemoryError if kind in ("pinned", "allocate") else DeviceError
            raise error(f"{self.name}: {kind} number {n} fails")

    def _memory_of(self, kind: str, n_bytes: int) -> np.ndarray:
        self._call(kind)
        if kind == "allocate" and self._memory is not None and self.live(kind) + n_bytes > self._memory:
            raise DeviceMemoryError(f"{self.name}: {self._memory} bytes in all, {n_bytes} more asked for")
        block = np.full(n_bytes + 4096, GARBAGE, np.uint8)
        with self._lock:
            self._blocks.append((kind, weakref.ref(block), n_bytes))
        return block[-block.ctypes.data % 4096 :][:n_bytes]

    def _enqueue(self, stage: Stage, action: Callable[[], None], n_bytes: int) -> None:
        self._call(stage)
        speed, delays = self._speeds.get(stage), self._delays[stage]

        def run(clock: float) -> float:
            if self._delay:
                time.sleep(delays.random() * self._delay)
            if not self._is_lost:
                action()
            with self._lock:
                self._n_under_way -= 1
            if speed is None:
                return time.perf_counter()
            end = clock + n_bytes / speed
            time.sleep(max(0.0, end - time.perf_counter()))
            return end

        with self._lock:
            self._n_under_way += 1
        self._put(stage, run)

    def _put(self, stage: Stage, work: Callable[[float], float]) -> None:
        self._queues[stage].put((work, time.perf_counter()))

    def _run(self, stage: Stage) -> None:
        """One stream: the thread's loop. Its clock is when the work done so far ended."""
        clock = 0.0
        while (item := self._queues[stage].get()) is not None:
            work, enqueued = item
            try:
                clock = work(max(clock, enqueued))
            except BaseException as e:  # raised where somebody waits
                self._failure = e


def _check_copy(target: np.ndarray, source: np.ndarray) -> None:
    assert target.dtype == source.dtype == np.uint8
    assert target.shape == source.shape


def _check_aligned(*arrays: DeviceArray) -> None:
    """What kernels take for granted."""
    assert all(a.contents.flags.aligned and a.contents.flags.c_contiguous for a in arrays)
