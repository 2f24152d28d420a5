"""`open_reader`: the ways in which bytes of a source come to the host. docs/decisions/0033-reading.md says why these.

mapped    views of the memory map; the page cache is the only copy
buffered  read into the caller's buffer, through the page cache
direct    read into the caller's buffer, past the page cache (O_DIRECT)
gds       read into GPU memory without passing the host, with kvikio (gpudirect.py)
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, SourceError
from ..formats import Checkpoint
from ..formats.mapped_file import MADV_POPULATE_READ, advise
from . import Load, Reader
from .computed import ComputedCheckpoint, ComputedReader

READERS = ("mapped", "buffered", "direct", "gds")

# The address of a load is its position in the file modulo this, so tensors aligned in the file are aligned in memory.
LINE = 64
# O_DIRECT takes whole blocks of this at addresses that are a multiple of it: no common disk has larger blocks.
BLOCK = 4096

log = logging.getLogger(__name__)


def open_reader(name: str, source: Checkpoint) -> Reader:
    """The reader of this name over the files of `source`, which it opens when they are first read; of a source that is
    computed, the one that computes.

    Raises InputError for a name that is none of READERS, and DeviceError for gds where kvikio is not installed.
    """
    if isinstance(source, ComputedCheckpoint):
        return ComputedReader(source)
    if name == "mapped":
        return MappedReader(source)
    if name == "buffered":
        return BufferedReader(source)
    if name == "direct":
        return DirectReader(source)
    if name == "gds":
        from .gpudirect import GdsReader

        return GdsReader(source)
    raise InputError(f"reader {name!r}: it is one of {', '.join(READERS)}")


class MappedReader:
    """Views of the memory-mapped files. See `Reader`.

    Bytes come from the disk when they are looked at, unless they were expected. The size of a file is checked when it
    is mapped; a file that is cut shorter while it is in use ends the process with SIGBUS.
    """

    name = "mapped"
    slack: int | None = None
    notes: tuple[str, ...] = ()

    def __init__(self, source: Checkpoint) -> None:
        self._source = source

    def read(self, load: Load, buffer: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """A read-only view of the map; `buffer` is not used."""
        for piece in load.pieces:
            if piece.entry.scheme is None:
                # A write straight from a map waits for every page that is not in the page tables yet.
                self._advise(load.file, piece.offset, piece.n_bytes, MADV_POPULATE_READ)
        return self._source.mapped(load.file)[load.offset : load.offset + load.n_bytes]

    def expect(self, load: Load) -> None:
        """Start reading ahead; a load that reaches over the end of the file is cut there."""
        self._advise(load.file, load.offset, load.n_bytes, mmap.MADV_WILLNEED)

    def _advise(self, file: Path, offset: int, n_bytes: int, advice: int) -> None:
        """Tell the kernel about whole pages of a file. It may refuse: what it is told only saves time."""
        data = self._source.mapped(file)
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = min(offset + n_bytes, data.size)
        if start < end:
            advise(data.ctypes.data + start, end - start, advice)

    def close(self) -> None:
        """Nothing: the map belongs to the checkpoint."""


class Descriptors:
    """One descriptor for each file of a source, opened with `flags` when it is first asked for; for all threads."""

    def __init__(self, source: Checkpoint, flags: int = 0) -> None:
        self._source, self._flags = source, flags
        self._lock = threading.Lock()
        self._descriptors: dict[Path, int] = {}

    def of(self, file: Path) -> int:
        """Raises SourceError where the file was changed since its header was read."""
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = self._source.descriptor(file, self._flags)
            return self._descriptors[file]

    def close(self) -> None:
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])


class BufferedReader:
    """Reads through the page cache. See `Reader`."""

    name = "buffered"
    slack: int | None = LINE - 1
    notes: tuple[str, ...] = ()

    def __init__(self, source: Checkpoint) -> None:
        self._descriptors = Descriptors(source)

    def read(self, load: Load, buffer: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """The bytes, in `buffer` at an address that is their position in the file modulo LINE."""
        assert buffer is not None
        assert buffer.size >= load.n_bytes + LINE - 1, "slack"
        start = (load.offset - buffer.ctypes.data) % LINE
        memory = buffer[start : start + load.n_bytes]
        if load.n_bytes:
            _fill(self._descriptors.of(load.file), load, memory, 0, 1)
        return memory

    def expect(self, load: Load) -> None:
        """Start reading ahead."""
        if load.n_bytes:
            os.posix_fadvise(self._descriptors.of(load.file), load.offset, load.n_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        self._descriptors.close()


class DirectReader:
    """Reads whole blocks past the page cache, and those around the load with it. See `Reader`.

    Where the file system refuses O_DIRECT, a file is read through the page cache, and `notes` says so.
    """

    name = "direct"
    slack: int | None = 3 * (BLOCK - 1)

    def __init__(self, source: Checkpoint) -> None:
        self._descriptors = Descriptors(source, os.O_DIRECT)
        self._lock = threading.Lock()
        self._refused: set[Path] = set()
        self._buffered = BufferedReader(source)
        self.notes: tuple[str, ...] = ()

    def read(self, load: Load, buffer: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """The bytes, in `buffer` at an address that is their position in the file modulo BLOCK, or LINE if buffered."""
        assert buffer is not None
        assert buffer.size >= load.n_bytes + 3 * (BLOCK - 1), "slack"
        begin, head = -buffer.ctypes.data % BLOCK, load.offset % BLOCK
        memory = buffer[begin : begin + -(-(head + load.n_bytes) // BLOCK) * BLOCK]
        if load.n_bytes and load.file not in self._refused:
            try:
                _fill(self._descriptors.of(load.file), load, memory, head, BLOCK)
            except SourceError as e:
                if not isinstance(e.__cause__, OSError) or e.__cause__.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._refuse(load.file)
        if load.file in self._refused:
            return self._buffered.read(load, buffer)
        return memory[head : head + load.n_bytes]

    def expect(self, load: Load) -> None:
        """Nothing is read ahead where there is no cache to hold it."""
        if load.file in self._refused:
            self._buffered.expect(load)

    def close(self) -> None:
        self._descriptors.close()
        self._buffered.close()

    def _refuse(self, file: Path) -> None:
        """From now on this file is buffered. Its descriptor stays open: another thread may be reading from it."""
        note = f"{file}: the file system refuses O_DIRECT, so this file is read through the page cache."
        with self._lock:
            if file in self._refused:
                return
            self._refused.add(file)
            self.notes = (*self.notes, note)
        log.info(note)


def _fill(fd: int, load: Load, memory: NDArray[np.uint8], head: int, unit: int) -> None:
    """Read a load, and the `head` bytes before it, into `memory`, asking only for positions that are a multiple of
    `unit`. What lies after the load is read where `memory` has room and the file has more."""
    begin, need, have = load.offset - head, head + load.n_bytes, 0
    while have < need:
        at = have // unit * unit
        try:
            # Python repeats the call after a signal.
            got = os.preadv(fd, [memory[at:].data], begin + at)
        except OSError as e:
            raise SourceError(
                f"{load.file}: {load.n_bytes} bytes at {load.offset} cannot be read: {e.strerror}, at {begin + at}"
            ) from e
        if at + got <= have:
            raise SourceError(
                f"{load.file}: {load.n_bytes} bytes at {load.offset} wanted, {max(0, have - head)} got: the file "
                f"became shorter while it was read. Run again with a file that nothing changes."
            )
        have = at + got
