"""`Journal`: which tensors of an output are finished, so that an interrupted run can be continued. docs/checkpoints.md.

A file beside the output while it is being written: a line with the fingerprint of the run, and one for each tensor
whose bytes are on the disk, with their hash. A line is only written when the data it speaks of has been synced, and it
is only believed when the hash is still that of the data (`verify`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..errors import TargetError
from ..formats import Entry, Sink
from ..formats.lines import line, read_lines
from ..formats.output import Output, target_errors
from .hashes import piece_digest, tensor_hash
from .interrupts import no_interrupt

FORMAT = 1
# Longest wait of `close` in seconds for a sync that is under way: nothing can interrupt it.
PATIENCE = 0.5


class Finished(NamedTuple):
    """A tensor whose stored bytes have this hash (hashes.py); figures: (cosine, sqnr_db, max_error) where measured."""

    name: str
    hash: str
    figures: tuple[float, float, float] | None = None


class Journal:
    """The journal of an output that has begun; where that is resumed, `finished` has what an earlier run finished.

    fingerprint: what must be the same in a run that continues this one, by names that users know
    interval: seconds for which finished tensors are gathered before their files are synced

    Raises TargetError where the earlier run had another fingerprint. The output is then given up, and what the earlier
    run left stays as it is: nothing of it was done by this one.
    """

    def __init__(self, output: Output, fingerprint: Mapping[str, str], interval: float = 2.0) -> None:
        self.finished: dict[str, Finished] = {}
        self._output, self._interval = output, interval
        self._waiting: list[tuple[Finished, frozenset[str]]] = []
        self._error: BaseException | None = None
        self._lock, self._added, self._stopped = threading.Lock(), threading.Event(), threading.Event()
        with target_errors(output.target):
            self._fd = os.open(output.journal, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                self._read(dict(fingerprint))
            except BaseException:
                os.close(self._fd)
                raise
        self._thread = threading.Thread(target=self._work, name="arrowquant-journal", daemon=True)
        try:
            with no_interrupt():
                self._thread.start()
        except BaseException:
            if self._thread.ident is None:
                os.close(self._fd)
            else:
                self.close()
            raise

    def add(self, finished: Finished, files: Iterable[str]) -> None:
        """Note that all bytes of a tensor were written, to these files of the output. Returns at once; thread-safe.

        Raises TargetError where tensors that were added before could not be synced or noted.
        """
        self._raise_error()
        with self._lock:
            self._waiting.append((finished, frozenset(files)))
        self._added.set()

    def close(self) -> None:
        """Stop. What was added and is not yet on the disk is not noted any more, and is done again on a resume.

        Does nothing a second time. Raises TargetError as `add` does.
        """
        self._stopped.set()
        self._added.set()
        # A sync that takes longer ends on its own; the thread touches nothing after it.
        self._thread.join(PATIENCE)
        self._raise_error()

    def _raise_error(self) -> None:
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _read(self, fingerprint: dict[str, str]) -> None:
        records, n_bytes = read_lines(self._fd) if self._output.resumed else ([], 0)
        if records:
            self._compare(records[0], fingerprint)
        for record in records[1:]:
            figures = record["figures"] and tuple(record["figures"])
            self.finished[record["name"]] = Finished(record["name"], record["hash"], figures)
        # A torn line goes, or the next one would be part of it.
        os.ftruncate(self._fd, n_bytes)
        if not records:
            self._write(line({"format": FORMAT, "fingerprint": fingerprint}))

    def _compare(self, header: Mapping[str, object], fingerprint: dict[str, str]) -> None:
        known = header.get("fingerprint")
        old = {"journal format": header.get("format"), **(known if isinstance(known, dict) else {})}
        new = {"journal format": FORMAT, **fingerprint}
        changed = [
            f"{key} was {old.get(key, 'not noted')} and is {new.get(key, 'not given')}"
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
        if changed:
            self._output.abort(keep=True)
            raise TargetError(
                f"{self._output.target}: the interrupted run cannot be continued: {'; '.join(changed)}. "
                f"Run it again as it was, or without --resume to start anew."
            )

    def _work(self) -> None:
        """The thread: gathers for a while, syncs the data, and only then writes the lines."""
        try:
            while not self._stopped.is_set():
                self._added.wait()
                if self._stopped.wait(self._interval):
                    return
                self._added.clear()
                with self._lock:
                    taken, self._waiting = self._waiting, []
                for name in sorted(frozenset().union(*(files for _, files in taken))):
                    self._output.sync(name)
                    if self._stopped.is_set():
                        return
                lines = b"".join(line(finished._asdict()) for finished, _ in taken)
                with target_errors(self._output.target):
                    self._append(lines)
        except BaseException as e:
            with self._lock:
                self._error = e
        finally:
            os.close(self._fd)

    def _append(self, lines: bytes) -> None:
        self._write(lines)
        os.fsync(self._fd)

    def _write(self, lines: bytes) -> None:
        os.lseek(self._fd, 0, os.SEEK_END)
        while lines:
            lines = lines[os.write(self._fd, lines) :]


def verify(output: Output, sink: Sink, entry: Entry, expected: str) -> bool:
    """Whether what a resumed output holds of a tensor has this hash. Reads all of it, a place at a time.

    Raises TargetError for a failed read.
    """
    digests = (piece_digest(output.read(*place) for place in sink.places(piece)) for piece in sink.pieces(entry))
    return tensor_hash(digests) == expected
