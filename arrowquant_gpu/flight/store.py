"""Quantized rows under names: a directory of Arrow IPC files, each of which appears when it is complete."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from ..errors import NotFoundError, SourceError, TargetError
from ..formats.output import sync_path, target_errors

log = logging.getLogger(__name__)

SUFFIX, UNFINISHED, LOCK = ".arrow", ".part", ".lock"


class Stored(NamedTuple):
    """One stored result: its rows are read in place when they are asked for."""

    name: str
    path: Path
    reader: pa.ipc.RecordBatchFileReader
    n_bytes: int

    @property
    def n_rows(self) -> int:
        return sum(self.reader.get_batch(i).num_rows for i in range(self.reader.num_record_batches))

    def batches(self) -> Iterator[pa.RecordBatch]:
        for i in range(self.reader.num_record_batches):
            yield self.reader.get_batch(i)


class Store:
    """A directory that one server writes to. Names are checked by whoever calls (`requests.check_name`).

    Raises TargetError where the directory cannot be used, or another server uses it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with target_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(self._lock)
            raise TargetError(f"{directory} is the store of another server that runs; give each its own") from e
        for left in directory.glob(f".*{UNFINISHED}"):
            log.warning("%s is removed: a server was killed while it wrote it", left)
            left.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another server have the directory."""
        os.close(self._lock)

    def names(self) -> list[str]:
        return sorted(p.name.removesuffix(SUFFIX) for p in self.directory.glob(f"*{SUFFIX}") if p.is_file())

    def open(self, name: str) -> Stored:
        """Raises NotFoundError, and SourceError for a file that is damaged."""
        path = self._path(name)
        try:
            return Stored(name, path, pa.ipc.open_file(pa.memory_map(str(path))), path.stat().st_size)
        except FileNotFoundError as e:
            raise NotFoundError(f"{name}: there is no stored result of this name; list() gives those there are") from e
        except (OSError, pa.ArrowException) as e:
            raise SourceError(f"{path} cannot be read: {e}") from e

    def drop(self, name: str) -> None:
        """Delete a result; those who are reading it read on. Raises NotFoundError."""
        try:
            self._path(name).unlink()
        except FileNotFoundError as e:
            raise NotFoundError(f"{name}: there is no stored result of this name") from e

    def check_free(self, name: str, overwrite: bool) -> None:
        """Raise TargetError if there is a result of this name that may not be replaced."""
        if not overwrite and self._path(name).exists():
            raise TargetError(f"{name}: a stored result has this name; drop it, or pass overwrite to replace it")

    @contextlib.contextmanager
    def writing(self, name: str, schema: pa.Schema, *, overwrite: bool) -> Iterator[pa.ipc.RecordBatchFileWriter]:
        """A writer whose file gets its name when the body ends, and is removed when the body raises.

        Raises TargetError.
        """
        target = self._path(name)
        self.check_free(name, overwrite)
        with target_errors(target):
            fd, temporary = tempfile.mkstemp(UNFINISHED, f".{name}.", self.directory)
        try:
            with target_errors(target), os.fdopen(fd, "wb") as file:
                os.fchmod(fd, 0o666 & ~_umask())
                with pa.ipc.new_file(file, schema) as writer:
                    yield writer
                file.flush()
                os.fsync(fd)
            with target_errors(target):
                if overwrite:
                    Path(temporary).replace(target)
                else:
                    # rename() would replace a result that appeared meanwhile; link() refuses.
                    os.link(temporary, target)
                sync_path(self.directory)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}{SUFFIX}"


def _umask() -> int:
    """What a file that is made now may not be; read without setting it, which other threads would see."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:"))
    return int(line.split()[1], 8)
