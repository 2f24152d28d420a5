"""`MappedFile`: short lines of a file as one array, without a call for each. docs/decisions/0047-mapped-lines.md."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
from numpy.typing import NDArray

# Linux 5.14; the mmap module does not know them.
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23

_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def advise(address: int, n_bytes: int, advice: int) -> bool:
    """madvise(2) without the interpreter's lock, which mmap.madvise keeps though it may wait for the disk.

    `address` is that of a page. Returns whether the kernel did it.
    """
    return int(_libc.madvise(address, n_bytes, advice)) == 0


class MappedFile:
    """The memory map of an open file, of the size that it has now. It goes with the last reference to it or its lines.

    Python's map keeps a second descriptor of the file. Raises OSError where there can be no map, as on some network
    file systems.

    >>> import os, tempfile
    >>> fd, name = tempfile.mkstemp()
    >>> os.posix_fallocate(fd, 0, 8)
    >>> MappedFile(fd).lines(1, 2, 2, 4, for_writing=True)[...] = [[1, 2], [3, 4]]
    >>> os.pread(fd, 8, 0)
    b'\\x00\\x01\\x02\\x00\\x00\\x03\\x04\\x00'
    >>> os.close(fd)
    """

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, 0)
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data

    def lines(
        self, offset: int, n_bytes: int, lines: int, stride: int, *, for_writing: bool = False
    ) -> NDArray[np.uint8] | None:
        """The bytes [lines, n_bytes] of the file, each line `stride` after the one before, to read or to write.

        Their pages are brought in first. None where the kernel cannot do that: the disk or the file system fails, the
        file has become shorter, or the kernel is older than 5.14. Looking at these pages could end the process with
        SIGBUS; calls fail with the reason.
        """
        end = offset + (lines - 1) * stride + n_bytes
        if end > len(self._map):
            return None
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        advice = MADV_POPULATE_WRITE if for_writing else MADV_POPULATE_READ
        if not advise(self._address + begin, end - begin, advice):
            return None
        return np.ndarray((lines, n_bytes), np.uint8, self._map, offset, (stride, 1))
