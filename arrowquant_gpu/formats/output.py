"""`Output`: a file or directory that appears under its final name only when it is complete.

Everything is written into a temporary directory beside the target, `.NAME.arrowquant-XXXXXXXXXXXX.tmp`, which is
locked while its writer lives. `commit` syncs it and renames; `abort` removes it; a killed run leaves it behind, and the
next run for the same target finds it unlocked and removes it. Nothing that was there before is touched until then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TargetError

# The manifest beside an output, and the key of its schema metadata that lists every file of that output.
MANIFEST = "arrowquant_manifest.parquet"
FILES_KEY = b"arrowquant.files"


class Output:
    """One target: a directory, or a file with its manifest beside it.

    `sources` are the files and directories that are read: none of them may be, hold or lie in the target. With
    `overwrite` an existing file is replaced, and so is a directory whose every file an earlier run wrote (its manifest
    says which); never another directory that is not empty. Making an Output does nothing on disk.

        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> output = Output(folder / "model", is_directory=True)
        >>> output.begin()
        >>> output.create("weights.bin", 4)
        >>> output.write("weights.bin", 2, np.array([7, 8], np.uint8))
        >>> (folder / "model").exists()
        False
        >>> [path.name for path in output.commit()], (folder / "model" / "weights.bin").read_bytes()
        (['weights.bin'], b'\\x00\\x00\\x07\\x08')

    Raises TargetError from every method, with the reason and the way out.
    """

    def __init__(
        self, target: str | Path, *, is_directory: bool, sources: Sequence[Path] = (), overwrite: bool = False
    ) -> None:
        self.target = Path(os.path.realpath(target))
        self.is_directory = is_directory
        self.overwrite = overwrite
        self._sources = tuple(Path(os.path.realpath(s)) for s in sources)
        self._temp: Path | None = None
        self._lock = -1
        self._files: dict[str, int] = {}

    @property
    def manifest(self) -> str:
        """Name of the manifest in (for a file: beside) this output."""
        return MANIFEST if self.is_directory else f"{self.target.name}.manifest.parquet"

    def check(self) -> None:
        """Raise TargetError where this target cannot or must not be written; changes nothing."""
        with target_errors(self.target):
            self._check()

    def _check(self) -> None:
        target, parent = self.target, self.target.parent
        if not parent.is_dir():
            raise TargetError(f"{target}: the folder {parent} does not exist; create it first")
        if not target.name:
            raise TargetError(f"{target} cannot be an output; give the name of a new {self._kind}")
        for source in self._sources:
            if source == target or (target.exists() and source.exists() and target.samefile(source)):
                raise TargetError(f"{target} is the source itself; choose another target")
            if source.is_relative_to(target):
                raise TargetError(f"{target} holds the source {source}; choose another target")
            if source.is_dir() and target.is_relative_to(source):
                raise TargetError(f"{target} lies in the source {source}; choose a target outside it")
        beside = parent / self.manifest
        if not self.is_directory and beside.exists() and _listed_files(beside) is None:
            raise TargetError(f"{beside} exists and is not a manifest; its name is needed beside {target}")
        if not target.exists():
            return
        if target.is_dir() != self.is_directory:
            raise TargetError(f"{target} exists and is not a {self._kind}; choose another target")
        if self.is_directory and not any(target.iterdir()):
            return
        if not self.overwrite:
            raise TargetError(f"{target} exists; choose another target, or pass overwrite (--overwrite) to replace it")
        if self.is_directory:
            self._check_replaceable()

    def begin(self) -> None:
        """Check, remove what killed runs left, and make the temporary directory."""
        with target_errors(self.target):
            self._recover()
            self.check()
            while True:
                self._temp = self._beside("tmp")
                self._temp.mkdir()
                self._lock = _lock(self._temp)
                if self._lock >= 0:
                    return

    def path(self, name: str) -> Path:
        """Where the file `name` of this output is while it is being written; its folder exists."""
        if self._temp is None:
            raise RuntimeError("path() before begin()")
        path = self._temp / name
        with target_errors(self.target):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def create(self, name: str, n_bytes: int) -> None:
        """Make a file of `n_bytes` zero bytes whose disk space is reserved: a full disk is an error here."""
        path = self.path(name)
        with target_errors(self.target, n_bytes):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            self._files[name] = fd
            if n_bytes:
                os.posix_fallocate(fd, 0, n_bytes)

    def write(self, name: str, offset: int, data: NDArray[Any]) -> None:
        """Put the bytes of a row-major array at `offset` of a created file. Safe from several threads."""
        rest = data.reshape(-1).view(np.uint8).data
        with target_errors(self.target):
            while rest:
                n = os.pwrite(self._files[name], rest, offset)
                rest, offset = rest[n:], offset + n

    def names(self) -> list[str]:
        """Names of the files written so far, relative to the output, sorted."""
        if self._temp is None:
            return []
        return sorted(str(p.relative_to(self._temp)) for p in self._temp.rglob("*") if not p.is_dir())

    def commit(self) -> tuple[Path, ...]:
        """Sync, rename to the final name, and return the files of the output (for a file target, that file first)."""
        temp = self._temp
        if temp is None:
            raise RuntimeError("commit() before begin()")
        names = self.names()
        with target_errors(self.target):
            self._close()
            for path in (*temp.rglob("*"), temp):
                _sync(path)
            # Looked at again: something may have taken the name while this run was working.
            self.check()
            if self.is_directory:
                self._place_directory(temp)
                base = self.target
            else:
                base = self.target.parent
                names.sort(key=lambda name: name != self.target.name)
                self._place_files(temp, names)
            self._release()
            _sync(self.target.parent)
        return tuple(base / name for name in names)

    def abort(self) -> None:
        """Remove what was written. Does nothing before `begin`, after `commit`, or a second time."""
        self._close()
        if self._temp is not None:
            shutil.rmtree(self._temp, ignore_errors=True)
        self._release()

    @property
    def _kind(self) -> str:
        return "directory" if self.is_directory else "file"

    def _beside(self, suffix: str) -> Path:
        return self.target.parent / f".{self.target.name}.arrowquant-{secrets.token_hex(6)}.{suffix}"

    def _close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _release(self) -> None:
        self._temp = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _check_replaceable(self) -> None:
        """Only what an earlier run wrote, and nothing that was added since, may be replaced as a whole."""
        known = _listed_files(self.target / MANIFEST)
        if known is None:
            raise TargetError(
                f"{self.target} is a directory that arrowquant did not write (it has no {MANIFEST}); it is never "
                f"overwritten. Choose another target, or remove it yourself."
            )
        present = {str(p.relative_to(self.target)) for p in self.target.rglob("*") if p.is_symlink() or not p.is_dir()}
        added = sorted(present - known)
        if added:
            more = f" and {len(added) - 3} more" if len(added) > 3 else ""
            raise TargetError(
                f"{self.target} holds files that arrowquant did not write, which overwriting would lose: "
                f"{', '.join(added[:3])}{more}. Move them away first."
            )

    def _recover(self) -> None:
        """Remove the temporary directories of dead runs; put back what a dead run had set aside."""
        parent = self.target.parent
        if not parent.is_dir():
            return
        ours = re.compile(re.escape(f".{self.target.name}.arrowquant-") + r"[0-9a-f]{12}\.(tmp|previous)")
        for path in sorted(parent.iterdir()):
            match = ours.fullmatch(path.name)
            if match is None or path.is_symlink():
                continue
            if match[1] == "previous":
                if self.target.exists():
                    raise TargetError(
                        f"{path} is what {self.target} was before a run that was killed while replacing it. "
                        f"Delete it, or move it away, and run again."
                    )
                path.rename(self.target)
                continue
            lock = _lock(path)
            if lock < 0:
                raise TargetError(f"{self.target} is being written by another run (in {path}); wait for its end")
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)

    def _place_directory(self, temp: Path) -> None:
        if not (self.target.exists() and any(self.target.iterdir())):
            temp.rename(self.target)
            return
        # Two renames: a run killed between them leaves the old output whole, and the next run puts it back.
        aside = self._beside("previous")
        self.target.rename(aside)
        try:
            temp.rename(self.target)
        except BaseException:
            aside.rename(self.target)
            raise
        trash = self._beside("tmp")
        aside.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _place_files(self, temp: Path, names: list[str]) -> None:
        """The target last: where it exists, all that belongs to it does."""
        parent = self.target.parent
        for name in names[1:]:
            (temp / name).replace(parent / name)
        if self.overwrite:
            (temp / names[0]).replace(self.target)
        else:
            try:
                # rename() would replace a file that appeared meanwhile; link() refuses.
                os.link(temp / names[0], self.target)
            except BaseException:
                for name in names[1:]:
                    (parent / name).unlink()
                raise
        shutil.rmtree(temp, ignore_errors=True)


@contextlib.contextmanager
def target_errors(target: Path, n_bytes: int | None = None) -> Iterator[None]:
    """Turn an OSError of the body into a TargetError that names the target and says what to do."""
    try:
        yield
    except TargetError:
        raise
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            need = "" if n_bytes is None else f" {n_bytes:,} bytes are needed for one file, and"
            free = shutil.disk_usage(target.parent).free
            text = f"the disk is full:{need} {free:,} bytes are free in {target.parent}"
        elif e.errno == errno.EFBIG:
            text = "the file would be larger than this process or file system may write (ulimit -f)"
        elif e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            text = f"{e.filename or target.parent} is not writable ({e.strerror})"
        elif e.errno in (errno.EEXIST, errno.ENOTEMPTY):
            text = "it has appeared while this run was working; choose another target"
        else:
            text = str(e)
        raise TargetError(f"{target}: {text}. Nothing was changed there.") from e


def _listed_files(manifest: Path) -> set[str] | None:
    """The files of an output by its manifest; None where there is none, or the file is something else."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(manifest).metadata or {}
        return set(json.loads(metadata[FILES_KEY]))
    except (OSError, KeyError, ValueError, pa.ArrowException):
        return None


def _lock(directory: Path) -> int:
    """A descriptor that holds a directory's lock while it is open; -1 where another run holds it or removed it."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if directory.exists() and os.path.samestat(os.fstat(fd), directory.stat()):
            return fd
    except BlockingIOError:
        pass
    os.close(fd)
    return -1


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
