"""Runs for tests of `--resume`: slow, in many small pieces, with a journal that is always up to date; and killed ones.

Runs that are killed are forked from a server that has imported everything, so that 200 of them take minutes.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# What a run imports when it needs it is here for the server.
import arrowquant_gpu.backends.numpy_reference
import arrowquant_gpu.formats.arrow_ipc
import arrowquant_gpu.formats.parquet_tensors  # noqa: F401
from arrowquant_gpu.engine.journal import Finished, Journal
from arrowquant_gpu.formats import pieces
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.pipeline import Manifest, quantize, quantize_checkpoint

PIECE_BYTES = 8192
# How long a write takes, in seconds.
Pause = Callable[[], float]


class PromptJournal(Journal):
    """Notes every tensor before the run goes on, however slow the disk is."""

    def __init__(self, output: Output, fingerprint: Mapping[str, str]) -> None:
        super().__init__(output, fingerprint, interval=0)

    def add(self, finished: Finished, files: Iterable[str]) -> None:
        super().add(finished, files)
        text = json.dumps(finished.name).encode()
        while self._thread.is_alive() and text not in self._output.journal.read_bytes():
            time.sleep(0.001)


def at_once() -> float:
    return 0.0


def slow() -> float:
    """So that there is time for a signal."""
    return 0.004


# What of a commit changes names on the disk: a run can be killed before and after each.
CHANGES = ("link", "unlink", "rename", "replace", "rmdir")


@contextlib.contextmanager
def small_pieces(pause: Pause = at_once) -> Iterator[None]:
    """In this process: small pieces, a prompt journal, and a pause in every write of a piece."""
    old = pieces.PIECE_BYTES, quantize.Journal, Output.write

    def write(self: Output, name: str, offset: int, data: Any, lines: int = 1, stride: int = 0) -> None:
        old[2](self, name, offset, data, lines, stride)
        if threading.current_thread() is not threading.main_thread():
            time.sleep(pause())

    pieces.PIECE_BYTES, quantize.Journal = PIECE_BYTES, PromptJournal
    Output.write = write
    try:
        yield
    finally:
        pieces.PIECE_BYTES, quantize.Journal, Output.write = old


def run(source: Path, target: Path, *, pause: Pause = at_once, **options: Any) -> Manifest:
    """A run to its end, or until `progress` raises."""
    options = {"scheme": "int4_g64", "device": "reference", **options}
    with small_pieces(pause):
        return quantize_checkpoint(source, target, **options)


def leftover(target: Path) -> Path | None:
    """The one temporary directory beside a target."""
    found = list(target.parent.glob(f".{target.name}.arrowquant-*.tmp"))
    if len(found) > 1:
        raise AssertionError(f"several leftovers: {found}")
    return found[0] if found else None


def n_noted(target: Path) -> int:
    """Finished tensors in the journal beside a target."""
    path = leftover(target)
    try:
        return max(0, (path / ".arrowquant_journal.jsonl").read_bytes().count(b"\n") - 1) if path else 0
    except FileNotFoundError:
        return 0


def run_until(source: Path, target: Path, n: int, error: BaseException, **options: Any) -> None:
    """A run that raises from its progress callback as soon as n tensors are noted as finished.

    It has time enough for that: it writes slowly, and very slowly once they are.
    """

    def pause() -> float:
        return 0.02 if n_noted(target) >= n else 0.001

    def progress(done: int, total: int, name: str) -> None:
        if n_noted(target) >= n:
            raise error

    run(source, target, pause=pause, progress=progress, **options)


# Killed runs.

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([__name__])


def killed(
    source: Path, target: Path, *, seconds: float | None = None, changes: int | None = None, **options: Any
) -> bool:
    """A run in a process of its own that is killed so many seconds after it began, or after so many changes of names.

    False where it came to its end before.
    """
    receiver, sender = _SERVER.Pipe(duplex=False)
    process = _SERVER.Process(target=_mortal, args=(sender, source, target, changes, options))
    process.start()
    sender.close()
    try:
        receiver.recv()
        if seconds is not None:
            process.join(seconds)
            process.kill()
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise AssertionError(f"the run ended with {process.exitcode}")
        return process.exitcode != 0
    finally:
        process.kill()
        process.join()
        process.close()
        receiver.close()


def _mortal(begun: Connection, source: Path, target: Path, changes: int | None, options: dict[str, Any]) -> None:
    if changes is not None:
        _die_after(changes)
    begun.send(None)
    run(source, target, **options)


def _die_after(n: int) -> None:
    left = n

    def die() -> None:
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def mortal(real: Callable[..., object]) -> Callable[..., object]:
        def change(*args: object, **kwargs: object) -> object:
            nonlocal left
            die()
            result = real(*args, **kwargs)
            left -= 1
            die()
            return result

        return change

    for name in CHANGES:
        setattr(os, name, mortal(getattr(os, name)))
