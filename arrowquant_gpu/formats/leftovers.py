"""What runs that were killed left beside a target: `.NAME.arrowquant-XXXXXXXXXXXX.tmp`, and what they had set aside.

A temporary directory is locked while its run lives. One that is not was left behind, and can be continued where its
journal has a finished tensor.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from pathlib import Path

from ..errors import TargetError
from .lines import read_lines

# The journal in a temporary directory. No side file has this name: hidden ones stay with the source.
JOURNAL = ".arrowquant_journal.jsonl"


class Temporary:
    """A temporary directory of an output, locked by this process until `release`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path, self._lock = path, lock

    @classmethod
    def named(cls, target: Path) -> Temporary:
        """A name beside `target` for a new one; nothing is on the disk, so an interrupt leaves nothing behind."""
        return cls(target.parent / f".{target.name}.arrowquant-{secrets.token_hex(6)}.tmp", -1)

    def make(self) -> bool:
        """Make and lock it; False where another run, which took it for a leftover, has removed it. Raises OSError."""
        self.path.mkdir()
        self._lock = _lock(self.path)
        return self._lock >= 0

    @property
    def journal(self) -> Path:
        """Where its journal is, if it has one."""
        return self.path / JOURNAL

    def n_finished(self) -> int:
        """Tensors that its journal has as finished. Raises OSError."""
        try:
            fd = os.open(self.journal, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            records, _ = read_lines(fd)
        finally:
            os.close(fd)
        return len({r["name"] for r in records[1:] if "name" in r})

    def remove(self) -> None:
        """Delete it; what cannot be deleted now is left to the next run. Still locked."""
        shutil.rmtree(self.path, ignore_errors=True)

    def release(self) -> None:
        """Unlock it. Does nothing a second time."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def aside(target: Path, replacement: Path) -> Path:
    """The name under which `target` is set aside for `replacement`, a directory: with its inode, by which it is known
    under every name it gets."""
    return target.parent / f".{target.name}.arrowquant-{replacement.stat().st_ino:012x}.previous"


def recover(target: Path) -> list[Temporary]:
    """Put back what a killed run had set aside; lock and return what can be continued, the newest first.

    What killed runs left and cannot be continued is removed.

    Raises TargetError where a run for this target is alive, and where both what was set aside and something else that
    did not replace it are there; OSError.
    """
    if not target.parent.is_dir():
        return []
    ours = re.compile(re.escape(f".{target.name}.arrowquant-") + r"([0-9a-f]{12,16})\.(tmp|previous)")
    matches = [(p, m) for p in sorted(target.parent.iterdir()) if (m := ours.fullmatch(p.name)) and not p.is_symlink()]
    found: list[Temporary] = []
    try:
        # All locks before anything else: a run that lives is perhaps just replacing the target.
        for path in (p for p, m in matches if m[2] == "tmp"):
            lock = _lock(path)
            if lock >= 0:
                found.append(Temporary(path, lock))
            elif path.exists():
                raise TargetError(f"{target} is being written by another run (in {path}); wait for its end")
        for path, inode in ((p, int(m[1], 16)) for p, m in matches if m[2] == "previous"):
            _put_back(target, path, inode)
        for one in [one for one in found if not one.n_finished()]:
            found.remove(one)
            one.remove()
            one.release()
    except BaseException:
        for one in found:
            one.release()
        raise
    return sorted(found, key=lambda t: t.path.stat().st_mtime_ns, reverse=True)


def _put_back(target: Path, path: Path, inode: int) -> None:
    if not target.exists():
        path.rename(target)
    elif target.stat().st_ino == inode:
        # The run was killed after its output had taken the place.
        discard(path)
    else:
        raise TargetError(
            f"{path} is what {target} was before a run that was killed while replacing it. "
            f"Delete it, or move it away, and run again."
        )


def discard(path: Path) -> None:
    """Delete a directory that was set aside; one that is half deleted is never taken for the whole."""
    trash = path.with_name(f"{path.name.rpartition('-')[0]}-{secrets.token_hex(6)}.tmp")
    try:
        path.rename(trash)
    except FileNotFoundError:
        return
    shutil.rmtree(trash, ignore_errors=True)


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
