"""`run`: every piece of a plan through whichever slot is free, and into its places in the output."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from .. import ops, trace
from ..backends import get_backend
from ..formats import Codes, Entry, Sink
from ..formats.output import Output
from ..formats.pieces import Piece
from ..reference import Findings
from ..schemes import rows_and_length
from . import Device, Load, Progress, Result, Slot, Solved
from .converted import divisors_of, recover
from .figures import Errors, Figures, errors
from .hashes import piece_digest, tensor_hash
from .interrupts import no_interrupt
from .journal import Finished, Journal, verify
from .loads import Queue

# So many loads ahead of the one that is taken, the source is told that it will be read.
AHEAD = 4
# Longest wait in seconds of the thread that asked for the run, which then reports and can be interrupted.
TICK = 0.1


def run(
    entries: Sequence[Entry],
    sink: Sink,
    output: Output,
    devices: Sequence[Device],
    journal: Journal,
    *,
    validate: bool = False,
    progress: Progress | None = None,
) -> list[Finished]:
    """Write every entry that the journal does not have as finished; returns what was done, in the order of entries.

    `sink` is open. `validate` measures the error of every quantized tensor while its piece is at hand. When this
    returns or raises, every thread it started has ended; the first error of any of them is raised, and so is one of
    `progress`.

    Raises NonFiniteError, ScaleOverflowError, SourceError, DeviceError and TargetError.
    """
    n_slots = sum(len(device.slots) for device in devices)
    work = _Work(entries, sink, output, n_slots, journal, validate)
    work.skip_finished()
    threads = [
        threading.Thread(target=work.serve, args=(device, slot), name=f"arrowquant-{device.name}-{i}", daemon=True)
        for device in devices
        for i, slot in enumerate(device.slots)
    ]
    try:
        with no_interrupt():
            for thread in threads:
                thread.start()
        while work.is_under_way(wants_news=progress is not None):
            work.report(progress)
        work.report(progress)
    finally:
        _end(work, threads)
    if work.error is not None:
        raise work.error
    return [work.tensors[e.info.name].result() for e in entries]


class _Tensor:
    """What is known of one tensor while its pieces come in, in any order."""

    def __init__(self, entry: Entry, pieces: Sequence[Piece]) -> None:
        self.entry, self.pieces = entry, pieces
        self.n_left = len(pieces)
        self.digests = [b""] * len(pieces)
        self.findings = [Findings()] * len(pieces)
        self.errors: list[Errors | None] = [None] * len(pieces)
        self.bounds: list[tuple[float, float]] = []
        self.is_bounded = False
        has_global = entry.scheme is not None and entry.scheme.scale_rule == "global"
        self.shared = entry.shared if has_global else ""
        self.files: set[str] = set()
        self.finished: Finished | None = None

    def check(self) -> None:
        """Raise for what the findings of all pieces count."""
        scheme, info = self.entry.scheme, self.entry.info
        if scheme is None:
            return
        length = rows_and_length(info.shape)[1]
        groups = scheme.scales_shape(info.shape)[1]
        found = Findings()
        for piece, part in zip(self.pieces, self.findings, strict=True):
            scales_before = scheme.scales_shape((piece.row, 1))[0] * groups + piece.column // scheme.group_length(
                length
            )
            found = ops.merge(found, part, piece.row * length + piece.column, scales_before)
        ops.check(found, scheme, name=info.name, shape=info.shape)

    def result(self) -> Finished:
        """What became of it. Raises RuntimeError where a piece is missing: its place would read as zeros."""
        if self.finished is None:
            raise RuntimeError(f"{self.entry.info.name}: {self.n_left} of its pieces were never done")
        return self.finished

    def figures(self) -> tuple[float, float, float] | None:
        if self.errors[0] is None:
            return None
        figures = Figures()
        for part in self.errors:
            if part is not None:
                figures.extend(part)
        return figures.cosine, figures.sqnr_db, figures.max_error


class _Done(NamedTuple):
    """How far a run is."""

    n_bytes: int
    name: str


class _Work:
    """One run: what the threads of all slots share. `_lock` guards the tensors, `error` and the count of bytes."""

    def __init__(
        self,
        entries: Sequence[Entry],
        sink: Sink,
        output: Output,
        n_slots: int,
        journal: Journal,
        validate: bool,
    ) -> None:
        self.sink, self.output, self.journal, self.validate = sink, output, journal, validate
        self.tensors = {e.info.name: _Tensor(e, sink.pieces(e)) for e in entries}
        self.together: dict[str, list[_Tensor]] = {}
        for tensor in self.tensors.values():
            if tensor.shared:
                self.together.setdefault(tensor.shared, []).append(tensor)
        self.total = sum(e.info.n_bytes for e in entries)
        self.n_slots = self.n_serving = n_slots
        self.solved: dict[str, Solved] = {}
        self.error: BaseException | None = None
        self.is_stopped = False
        self.done = _Done(0, "")
        self._reported = -1
        self._lock = threading.Condition()
        self._scratch = threading.local()
        self.queue = Queue([], set(), 1)

    def skip_finished(self) -> None:
        """Believe the journal where the bytes in the output are still those it speaks of; queue everything else."""
        known = [t for name, t in self.tensors.items() if name in self.journal.finished]
        with ThreadPoolExecutor(min(8, self.n_slots), "arrowquant-verify") as pool:
            with no_interrupt():
                intact = pool.map(self._is_intact, known)
            kept = {t.entry.info.name for t, is_intact in zip(known, intact, strict=True) if is_intact}
        # Tensors that share a global scale are done together: it is that of the range of all of them.
        begun = {t.shared for name, t in self.tensors.items() if name not in kept}
        kept = {name for name in kept if not (shared := self.tensors[name].shared) or shared not in begun}
        for name in kept:
            tensor = self.tensors[name]
            tensor.finished = self.journal.finished[name]
            self.done = _Done(self.done.n_bytes + tensor.entry.info.n_bytes, name)
        rest = [t for name, t in self.tensors.items() if name not in kept]
        two_pass = {t.entry.info.name for t in rest if t.entry.scheme and t.entry.scheme.needs_range}
        self.queue = Queue([t.pieces for t in rest], two_pass, self.n_slots)

    def _is_intact(self, tensor: _Tensor) -> bool:
        entry = tensor.entry
        return verify(self.output, self.sink, entry, self.journal.finished[entry.info.name].hash)

    def serve(self, device: Device, slot: Slot) -> None:
        """The life of a slot's thread."""
        try:
            while (load := self.queue.take(slot.sizes)) is not None:
                ahead = load.offset + AHEAD * load.n_bytes
                device.reader.expect(Load(load.file, ahead, load.n_bytes, ()))
                with contextlib.closing(slot.run(load, self.solved)) as results:
                    for result in results:
                        if self.is_stopped:
                            return
                        if load.is_range:
                            self._bound(result)
                        else:
                            self._store(result)
        except BaseException as e:
            with self._lock:
                if self.error is None:
                    self.error = e
            self.stop()
        finally:
            with self._lock:
                self.n_serving -= 1
                self._lock.notify_all()

    def _bound(self, result: Result) -> None:
        """Take in a piece of a first pass; the last one of a tensor, or of all that share a scale, gives that."""
        tensor, info = self.tensors[result.piece.entry.info.name], result.piece.entry.info
        scheme = result.piece.entry.scheme
        assert scheme is not None
        assert result.bounds is not None
        together = self.together.get(tensor.shared, [tensor])
        with self._lock:
            tensor.findings[result.piece.number] = result.findings
            tensor.bounds.append(result.bounds)
            if len(tensor.bounds) < len(tensor.pieces):
                return
            tensor.is_bounded = True
            is_last = all(t.is_bounded for t in together)
        tensor.check()
        if not is_last:
            return
        low = min(b[0] for t in together for b in t.bounds)
        high = max(b[1] for t in together for b in t.bounds)
        solved = ops.solve_tensor(low, high, scheme, name=info.name, shape=info.shape)
        for t in together:
            self.solved[t.entry.info.name] = solved
            self.queue.second_pass(t.pieces)

    def _store(self, result: Result) -> None:
        """Write a piece, and finish its tensor with the last one."""
        piece, name = result.piece, result.piece.entry.info.name
        tensor = self.tensors[name]
        digest, measured = b"", None
        # Once something was found the tensor is only looked through: the error counts all of it.
        if result.findings.first < 0 and result.findings.first_overflow < 0:
            digest = self._write(tensor, result)
            if self.validate and result.codes is not None:
                measured = errors(result.weights, self._decoded(piece, result.codes))
        with self._lock:
            tensor.digests[piece.number], tensor.errors[piece.number] = digest, measured
            tensor.findings[piece.number] = result.findings
            tensor.n_left -= 1
            is_last = tensor.n_left == 0
        if is_last:
            tensor.check()
            self.sink.finish(tensor.entry)
            tensor.finished = Finished(name, tensor_hash(tensor.digests), tensor.figures())
            self.journal.add(tensor.finished, tensor.files)
        with self._lock:
            self.done = _Done(self.done.n_bytes + piece.n_bytes, name)
            self._lock.notify_all()

    def _write(self, tensor: _Tensor, result: Result) -> bytes:
        piece, codes = result.piece, result.codes
        arrays = self.sink.stored(piece, result.weights if codes is None else codes)
        places = self.sink.places(piece)
        with trace.span("write", piece.entry.info.name, sum(place.n_bytes for place in places)):
            for place, array in zip(places, arrays, strict=True):
                if array.nbytes != place.n_bytes:
                    raise RuntimeError(f"{piece.entry.info.name}: {array.nbytes} bytes for a place of {place.n_bytes}")
                self.output.write(place.file, place.offset, array, place.lines, place.stride)
                tensor.files.add(place.file)
            return piece_digest(arrays)

    def _decoded(self, piece: Piece, codes: Codes) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """The weights that the codes stand for, in memory of this thread that is used again."""
        scheme, n = piece.entry.scheme, piece.rows * piece.columns
        assert scheme is not None
        room = getattr(self._scratch, "decoded", np.empty(0, np.float32))
        if room.size < n:
            room = self._scratch.decoded = np.empty(n, np.float32)
        out = room[:n].reshape(piece.rows, piece.columns)
        ops.dequantize_rows(codes.packed, codes.scales, codes.zeros, scheme, out, backend=get_backend("cpu", 1))
        recover(out, divisors_of(piece))
        return out

    def stop(self) -> None:
        """Let every thread end with the piece it is at."""
        self.is_stopped = True
        self.queue.stop()

    def is_under_way(self, *, wants_news: bool) -> bool:
        """Wait a moment, less where there is news of a piece that is done; False once every slot has ended."""
        with self._lock:
            if self.n_serving and not (wants_news and self.done.n_bytes != self._reported):
                self._lock.wait(TICK)
            return self.n_serving > 0

    def report(self, progress: Progress | None) -> None:
        done = self.done
        if progress is not None and done.n_bytes != self._reported and self.error is None:
            progress(done.n_bytes, self.total, done.name)
        self._reported = done.n_bytes


def _end(work: _Work, threads: Sequence[threading.Thread]) -> None:
    """Stop and join them, also where Ctrl-C is pressed again: they end soon, and use what is freed after this."""
    for thread in threads:
        while thread.is_alive():
            with contextlib.suppress(KeyboardInterrupt):
                work.stop()
                thread.join()
