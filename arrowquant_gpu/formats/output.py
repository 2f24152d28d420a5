"""`Output`: a file or directory that appears under its final name only when it is complete.

Everything is written into a temporary directory beside the target, `.NAME.arrowquant-XXXXXXXXXXXX.tmp`, which is
locked while its writer lives. `commit` syncs it and renames; `abort` removes it; a killed run leaves it behind, and the
next run for the same target finds it unlocked, and continues or removes it (see leftovers.py). Nothing that was there
before is touched until then.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TargetError
from .leftovers import Temporary, aside, discard, recover
from .open_files import OpenFiles, read_at, write_at

log = logging.getLogger(__name__)

# The manifest beside an output, and the key of its schema metadata that lists every file of that output.
MANIFEST = "arrowquant_manifest.parquet"
FILES_KEY = b"arrowquant.files"
# Lines that are so many bytes apart, or less, go through a memory map; where they are farther, one call for each is no
# slower than bringing in the pages between them.
FAR = 32 << 10
# The table of activation parameters beside an output that has one.
ACTIVATIONS = "activations.arrow"


class Output:
    """One target: a directory, or a file with its manifest beside it.

    `sources` are the files and directories that are read: none of them may be, hold or lie in the target. With
    `overwrite` an existing file is replaced, and so is a directory whose every file an earlier run wrote (its manifest
    says which); never another directory that is not empty. With `resume`, what an interrupted run for this target left
    is continued; `resumed` says whether there was anything. Making an Output does nothing on disk.

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
        self,
        target: str | Path,
        *,
        is_directory: bool,
        sources: Sequence[Path] = (),
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.target = Path(os.path.realpath(target))
        self.is_directory = is_directory
        self.overwrite = overwrite
        self.resume = resume
        self.resumed = False
        self._sources = tuple(Path(os.path.realpath(s)) for s in sources)
        self._temp: Temporary | None = None
        self._files = OpenFiles()
        self._are_names_synced = False

    @property
    def manifest(self) -> str:
        """Name of the manifest in (for a file: beside) this output."""
        return MANIFEST if self.is_directory else f"{self.target.name}.manifest.parquet"

    @property
    def activations(self) -> str:
        """Name of the activation table in (for a file: beside) this output, where it has one."""
        return ACTIVATIONS if self.is_directory else f"{self.target.name}.{ACTIVATIONS}"

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
        if not self.is_directory:
            self._check_beside()
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

    def _check_beside(self) -> None:
        """What lies where files beside a file belong is of an earlier run."""
        beside, table = (self.target.parent / name for name in (self.manifest, self.activations))
        known = _listed_files(beside)
        if beside.exists() and known is None:
            raise TargetError(f"{beside} exists and is not a manifest; its name is needed beside {self.target}")
        if table.exists() and table.name not in (known or ()):
            raise TargetError(f"{table} exists and no manifest lists it; its name is needed beside {self.target}")

    def begin(self) -> None:
        """Check, and make the temporary directory, or with `resume` take the newest that has a finished tensor.

        What else is left of runs that are over is removed, with a warning where work is lost by that.
        """
        with target_errors(self.target):
            leftovers = recover(self.target)
            try:
                self.check()
                if self.resume:
                    self._take_over(leftovers)
                for one in leftovers:
                    self._give_up(one)
            finally:
                for one in leftovers:
                    one.release()
            while self._temp is None or not (self.resumed or self._temp.make()):
                self._temp = Temporary.named(self.target)

    @property
    def journal(self) -> Path:
        """Where the journal of this run belongs while it is being written; never part of the output."""
        return self._begun.journal

    def path(self, name: str) -> Path:
        """Where the file `name` of this output is while it is being written; its folder exists."""
        path = self._begun.path / name
        with target_errors(self.target):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def create(self, name: str, n_bytes: int) -> None:
        """Make a file of `n_bytes` zero bytes whose disk space is reserved: a full disk is an error here.

        In an output that is resumed a file of that size keeps its content; one of another size is made anew.
        """
        path = self.path(name)
        with target_errors(self.target, n_bytes):
            kind = 0 if self.resumed else os.O_EXCL
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | kind, 0o666)
            self._files.add(name, path, fd)
            with self._files.use(name) as fd:
                if os.fstat(fd).st_size != n_bytes:
                    os.ftruncate(fd, 0)
                if n_bytes:
                    os.posix_fallocate(fd, 0, n_bytes)

    def write(self, name: str, offset: int, data: NDArray[Any], lines: int = 1, stride: int = 0) -> None:
        """Put the bytes of a row-major array into a created file, where `Place` says. Safe from several threads."""
        parts = data.reshape(-1).view(np.uint8).reshape(lines, -1)
        with target_errors(self.target):
            with self._lines(name, offset, parts.shape[1], lines, stride, for_writing=True) as found:
                if found is not None:
                    found[...] = parts
                    return
            with self._files.use(name) as fd:
                for i, part in enumerate(parts):
                    write_at(fd, offset + i * stride, part.data)

    def read(self, name: str, offset: int, n_bytes: int, lines: int = 1, stride: int = 0) -> NDArray[np.uint8]:
        """A copy [n_bytes] of what a created file has where `Place` says. Safe from several threads."""
        data = np.empty((lines, n_bytes // lines), np.uint8)
        with target_errors(self.target):
            with self._lines(name, offset, data.shape[1], lines, stride) as found:
                if found is not None:
                    data[...] = found
                    return data.reshape(-1)
            with self._files.use(name) as fd:
                for i, part in enumerate(data):
                    if not read_at(fd, offset + i * stride, part.data):
                        raise TargetError(f"{self.path(name)} has become shorter; run again without --resume")
        return data.reshape(-1)

    @contextlib.contextmanager
    def _lines(
        self, name: str, offset: int, n_bytes: int, lines: int, stride: int, *, for_writing: bool = False
    ) -> Iterator[NDArray[np.uint8] | None]:
        """Lines [lines, n_bytes] in the map of a file; None where there is no map, or calls are as quick."""
        if lines == 1 or stride > FAR:
            yield None
            return
        with self._files.mapped(name) as file:
            yield None if file is None else file.lines(offset, n_bytes, lines, stride, for_writing=for_writing)

    def sync(self, name: str) -> None:
        """Return when all that was written to a created file, and the file itself, survives a power cut."""
        with target_errors(self.target):
            if not self._are_names_synced:
                self._are_names_synced = True
                temp = self._begun.path
                for folder in (*(p for p in temp.rglob("*") if p.is_dir()), temp, temp.parent):
                    sync_path(folder)
            with self._files.use(name) as fd:
                os.fdatasync(fd)

    def names(self) -> list[str]:
        """Names of the files written so far, relative to the output, sorted."""
        if self._temp is None:
            return []
        root = self._temp.path
        return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir() and p != self._temp.journal)

    def commit(self) -> tuple[Path, ...]:
        """Sync, rename to the final name, and return the files of the output (for a file target, that file first)."""
        names, temp = self.names(), self._begun.path
        with target_errors(self.target):
            self._close()
            for path in (*temp.rglob("*"), temp):
                sync_path(path)
            # Looked at again: something may have taken the name while this run was working.
            self.check()
            if self.is_directory:
                self._drop_journal()
                self._place_directory(temp)
                base = self.target
            else:
                base = self.target.parent
                # The manifest before what it lists: a run killed between them leaves nothing that no manifest lists.
                names.sort(key=lambda name: (name != self.target.name, name != self.manifest))
                self._place_files(temp, names)
            self._release()
            try:
                sync_path(self.target.parent)
            except OSError as e:
                text = f"{self.target} is complete, but its name may not survive a power cut: {e}. Run sync(1)."
                raise TargetError(text) from e
        return tuple(base / name for name in names)

    def abort(self, *, keep: bool = False) -> int:
        """Remove what was written; with `keep` leave it for a run with `resume`, if a tensor of it is finished.

        Returns how many are. Does nothing before `begin`, after `commit`, or a second time.
        """
        self._close()
        kept = 0
        try:
            with target_errors(self.target):
                if self._temp is not None:
                    kept = self._temp.n_finished() if keep else 0
                    if not kept:
                        self._temp.remove()
        finally:
            self._release()
        return kept

    @property
    def _kind(self) -> str:
        return "directory" if self.is_directory else "file"

    @property
    def _begun(self) -> Temporary:
        if self._temp is None:
            raise RuntimeError("not begun, or over")
        return self._temp

    def _close(self) -> None:
        self._files.close()

    def _release(self) -> None:
        if self._temp is not None:
            self._temp.release()
            self._temp = None

    def _take_over(self, leftovers: list[Temporary]) -> None:
        """Move the newest from the list to this output."""
        if leftovers:
            self._temp, self.resumed = leftovers.pop(0), True
            # Of a run that was killed at its end. It is written anew, and would be taken for one of the files.
            (self._temp.path / self.manifest).unlink(missing_ok=True)

    def _give_up(self, leftover: Temporary) -> None:
        if not self.resume:
            log.warning(
                "%s: %d finished tensors of an interrupted run are given up; resume (--resume) would have continued it",
                self.target,
                leftover.n_finished(),
            )
        leftover.remove()

    def _drop_journal(self) -> None:
        """The last step before the output gets its name: from here on a killed run starts anew."""
        temp = self._begun
        temp.journal.unlink(missing_ok=True)
        sync_path(temp.path)

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

    def _place_directory(self, temp: Path) -> None:
        if not (self.target.exists() and any(self.target.iterdir())):
            temp.rename(self.target)
            return
        # Two renames: a run killed between them leaves the old output whole, and the next run puts it back.
        previous = aside(self.target, temp)
        try:
            self.target.rename(previous)
            temp.rename(self.target)
        except BaseException:
            if not self.target.exists():
                previous.rename(self.target)
            raise
        discard(previous)

    def _place_files(self, temp: Path, names: list[str]) -> None:
        """The target last: where it exists, all that belongs to it does. An activation table of an output that is
        replaced does not outlive it."""
        parent = self.target.parent
        self._drop_journal()
        try:
            for name in names[1:]:
                (temp / name).replace(parent / name)
            if self.overwrite:
                (temp / names[0]).replace(self.target)
            else:
                # rename() would replace a file that appeared meanwhile; link() refuses.
                os.link(temp / names[0], self.target)
        except BaseException as e:
            if isinstance(e, FileExistsError) or not self.target.exists():
                for name in names[1:]:
                    (parent / name).unlink(missing_ok=True)
            raise
        if self.activations not in names:
            (parent / self.activations).unlink(missing_ok=True)
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


def sync_path(path: Path) -> None:
    """Return when a file, or the names in a directory, are on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
