"""A GPU for the stand-in of CuPy: memory in an address space of its own, and streams that run as late as they may.

What was given to a stream runs when somebody waits for it, and not before. So a host buffer that is reused too early, a
result that is read too early, and a stream that should have waited for another all show in the bytes.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from .errors import KernelFault

ALIGNMENT = 512  # of an allocation, as in CuPy's pool
GARBAGE = 0xC7  # what fresh memory holds
HUGE_BYTES = 1 << 28
FIRST_ADDRESS = 0x7F_0000_0000_00


class PinnedMemory(mmap.mmap):
    """Page-locked host memory: a buffer that transfers may use after the call that started them has returned.

    `bytes` is a second mapping of it, so that a transfer can tell that the first one is gone and fault, not crash.
    """

    bytes: np.ndarray
    address: int

    def __new__(cls, n_bytes: int) -> PinnedMemory:
        fd = os.memfd_create("pinned")
        try:
            os.ftruncate(fd, max(n_bytes, 1))
            self = super().__new__(cls, fd, max(n_bytes, 1))
            self.bytes = np.frombuffer(mmap.mmap(fd, max(n_bytes, 1)), np.uint8)
            self.bytes[:] = GARBAGE
        finally:
            os.close(fd)
        self.address = np.frombuffer(self, np.uint8).ctypes.data
        return self


@dataclass(eq=False)
class Allocation:
    """Device memory, for use on one stream. Its address means nothing to the host.

    CuPy's pool gives freed memory to later work of the same stream. So it may be freed while that stream still has to
    use it, but not while another has. Memory that is not of the pool has no stream.
    """

    device: Gpu
    stream: Stream | None
    address: int
    bytes: np.ndarray


@dataclass
class Work:
    """Something a stream has to do, after what `after` names: pairs of a stream and how much of it must be done."""

    action: Callable[[], None]
    after: list[tuple[Stream, int]]


class Stream:
    """A queue of work on one device. The null stream waits for all others of its device, and they for it."""

    def __init__(self, device: Gpu, ptr: int, non_blocking: bool):
        self.device, self.ptr, self.non_blocking = device, ptr, non_blocking
        self.queue: deque[Work] = deque()
        self.n_submitted = self.n_done = 0

    def submit(self, action: Callable[[], None], after: Iterable[tuple[Stream, int]] = ()) -> None:
        """Queue `action` behind what is already there and what CUDA's rules for the null stream add."""
        with self.device.lock:
            joined = [*after]
            if not self.non_blocking:
                others = [s for s in self.device.streams if not s.non_blocking and 0 in (s.ptr, self.ptr)]
                joined += [(s, s.n_submitted) for s in others]
            self.queue.append(Work(action, [(s, n) for s, n in joined if s is not self]))
            self.n_submitted += 1

    def run(self, until: int) -> None:
        """Do the first `until` pieces of work ever submitted."""
        with self.device.lock:
            while self.n_done < until:
                work = self.queue.popleft()
                self.n_done += 1
                for stream, n in work.after:
                    stream.run(n)
                work.action()


@dataclass(eq=False)
class Gpu:
    """One device: its properties, its memory and its streams; stream 0 is the null stream."""

    index: int
    arch: int = 90
    multiprocessors: int = 1
    streams: list[Stream] = field(default_factory=list)
    n_reserved: int = 0
    n_launches: int = 0
    memory: int | None = None  # bytes that `reserve` may have given away at a time
    reserved: weakref.WeakSet[Allocation] = field(default_factory=weakref.WeakSet)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.streams.append(Stream(self, 0, non_blocking=False))

    def reserve(self, n_bytes: int) -> Allocation | None:
        """Memory that is not of the pool, or None where there is too little."""
        if self.memory is not None and sum(a.bytes.nbytes for a in self.reserved) + n_bytes > self.memory:
            return None
        allocation = self.allocate(n_bytes, None)
        self.reserved.add(allocation)
        return allocation

    def allocate(self, n_bytes: int, stream: Stream | None) -> Allocation:
        """Fresh memory, full of garbage; very much of it is zeros, which take no memory until they are written."""
        address = FIRST_ADDRESS + (self.index << 40) + self.n_reserved
        self.n_reserved += -(-n_bytes // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        contents = np.full(n_bytes, GARBAGE, np.uint8) if n_bytes < HUGE_BYTES else np.zeros(n_bytes, np.uint8)
        return Allocation(self, stream, address, contents)

    def stream(self, non_blocking: bool) -> Stream:
        """A new stream."""
        self.streams.append(Stream(self, FIRST_ADDRESS + len(self.streams), non_blocking))
        return self.streams[-1]

    def synchronize(self) -> None:
        """Do everything that was submitted to any stream."""
        for stream in self.streams:
            stream.run(stream.n_submitted)


class _Current(threading.local):
    """What is current in a thread: it begins with device 0 and its null stream."""

    def __init__(self) -> None:
        self.devices = [0]
        self.streams: list[Stream] = []


class Host:
    """The host's side: which devices there are, which one is current, and which host memory is page-locked."""

    def __init__(self, gpus: list[Gpu]):
        self.gpus = gpus
        self.current = _Current()
        self.pinned: weakref.WeakSet[PinnedMemory] = weakref.WeakSet()

    @property
    def gpu(self) -> Gpu:
        return self.gpus[self.current.devices[-1]]

    def current_stream(self, gpu: Gpu | None = None) -> Stream:
        """The stream in use on a device, the current one if not given; by default its null stream."""
        gpu = gpu or self.gpu
        return next((s for s in reversed(self.current.streams) if s.device is gpu), gpu.streams[0])

    def allocate_pinned(self, n_bytes: int) -> PinnedMemory:
        memory = PinnedMemory(n_bytes)
        self.pinned.add(memory)
        return memory

    def pinned_part(self, array: np.ndarray) -> tuple[PinnedMemory, np.ndarray] | None:
        """The page-locked memory that `array` lies in, and the same bytes in its second mapping."""
        for memory in list(self.pinned):
            offset = array.ctypes.data - memory.address
            if offset >= 0 and offset + array.nbytes <= len(memory):
                return memory, memory.bytes[offset : offset + array.nbytes]
        return None

    def copy_in(self, target: np.ndarray, source: np.ndarray, stream: Stream) -> None:
        """Host to device: pageable memory is staged at once, page-locked memory is read when the stream comes to it."""
        pinned = self.pinned_part(source)
        if pinned is None:
            stream.submit(copying(target, flat_bytes(source).copy()))
        else:
            memory, part = pinned
            stream.submit(still_there(memory, copying(target, part), "a copy to the device"))

    def copy_out(self, target: np.ndarray, source: np.ndarray, stream: Stream) -> None:
        """Device to host: into pageable memory the call waits, into page-locked memory it does not."""
        pinned = self.pinned_part(target)
        if pinned is None:
            stream.submit(copying(target, source))
            stream.run(stream.n_submitted)
        else:
            memory, part = pinned
            stream.submit(still_there(memory, copying(part, source), "a copy to the host"))


def flat_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of a contiguous array, as a view."""
    return array.reshape(-1).view(np.uint8)


def copying(target: np.ndarray, source: np.ndarray) -> Callable[[], None]:
    """A function that copies bytes between contiguous arrays when it is called."""
    return lambda: np.copyto(flat_bytes(target), flat_bytes(source))


def still_there(memory: PinnedMemory | Allocation, action: Callable[[], None], what: str) -> Callable[[], None]:
    """`action`, or a KernelFault where nobody holds `memory` any more when it comes to run."""
    reference = weakref.ref(memory)

    def run() -> None:
        if reference() is None:
            raise KernelFault(f"{what} runs after its memory was freed")
        action()

    return run
