"""`OpenFiles`: descriptors of the many files of an output, of which only some are open at any time."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from .mapped_file import MappedFile

# Processes may often open 1024 files; a model in one file per tensor has more.
MOST_OPEN = 128


class _Open:
    """A descriptor, the map where there is one, and how many threads use them now."""

    def __init__(self, fd: int) -> None:
        self.fd, self.n_users = fd, 0
        self.map: MappedFile | None = None


class OpenFiles:
    """Files by name. What was closed for want of room is opened again when it is used; safe from several threads.

    >>> import tempfile
    >>> folder, files = Path(tempfile.mkdtemp()), OpenFiles(1)
    >>> for name in ("a", "b"):
    ...     files.add(name, folder / name, os.open(folder / name, os.O_RDWR | os.O_CREAT))
    ...     with files.use(name) as fd:
    ...         _ = os.pwrite(fd, name.encode(), 0)
    >>> with files.use("a") as fd:
    ...     os.pread(fd, 1, 0)
    b'a'
    >>> files.close()
    """

    def __init__(self, most: int = MOST_OPEN) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._paths: dict[str, Path] = {}
        # The one that was used last is last.
        self._open: OrderedDict[str, _Open] = OrderedDict()

    def add(self, name: str, path: Path, fd: int) -> None:
        """Take over a descriptor of the file at `path`, opened for reading and writing."""
        with self._lock:
            self._paths[name] = path
            self._open[name] = _Open(fd)
            self._make_room()

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[int]:
        """The descriptor of a file that was added; it stays open in the body. Raises OSError, KeyError."""
        with self._used(name) as file:
            yield file.fd

    @contextlib.contextmanager
    def mapped(self, name: str) -> Iterator[MappedFile | None]:
        """The map of a file that was added, which is kept as long as its descriptor; None where it cannot be mapped.

        Raises OSError, KeyError.
        """
        with self._used(name) as file:
            if file.map is None:
                with self._lock, contextlib.suppress(OSError):
                    file.map = file.map or MappedFile(file.fd)
            yield file.map

    @contextlib.contextmanager
    def _used(self, name: str) -> Iterator[_Open]:
        with self._lock:
            file = self._open.get(name)
            if file is None:
                fd = os.open(self._paths[name], os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                file = self._open[name] = _Open(fd)
            file.n_users += 1
            self._open.move_to_end(name)
            self._make_room()
        try:
            yield file
        finally:
            with self._lock:
                file.n_users -= 1
                self._make_room()

    def close(self) -> None:
        """Close all, and forget them. Does nothing a second time."""
        with self._lock:
            self._paths.clear()
            while self._open:
                os.close(self._open.popitem()[1].fd)

    def _make_room(self) -> None:
        """Close those that nobody uses, the longest unused first. What is in use stays, even if that is too many."""
        if len(self._open) <= self._most:
            return
        idle = [name for name, file in self._open.items() if not file.n_users]
        for name in idle[: len(self._open) - self._most]:
            os.close(self._open.pop(name).fd)


def write_at(fd: int, offset: int, data: memoryview) -> None:
    """Put bytes into an open file. Raises OSError."""
    while data:
        n = os.pwrite(fd, data, offset)
        data, offset = data[n:], offset + n


def read_at(fd: int, offset: int, into: memoryview) -> bool:
    """Fill `into` from an open file; False where that ends before. Raises OSError."""
    while into:
        n = os.preadv(fd, [into], offset)
        if n == 0:
            return False
        into, offset = into[n:], offset + n
    return True
