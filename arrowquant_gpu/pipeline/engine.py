"""`run`: carry out a plan, tensor by tensor in row blocks, with the few buffers it allocates at its start.

The source is read in place through its memory map. This thread quantizes into one of a few slots; a second thread
hashes and writes the slots that are full, so that arithmetic and output overlap. Nothing appears under the final name
before everything is written, and whatever ends a run early removes what it wrote.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..backends import Backend
from ..dtypes import DTYPES
from ..formats import Checkpoint, Entry, Sink
from ..formats.output import Output, target_errors
from ..reference import Findings
from ..schemes import Scheme, rows_and_length
from .figures import Figures
from .manifest import Manifest, Record, manifest_table, write_manifest
from .plan import Plan

# About this many bytes of weights are in one block; a single longer row is a block too.
BLOCK_BYTES = 16 << 20
# One slot is filled, one is written, one waits.
SLOTS = 3

# Called with (bytes of the source done, bytes in all, name of the tensor), from the thread that called `run`.
Progress = Callable[[int, int, str], None]


def run(
    plan: Plan,
    source: Checkpoint,
    sink: Sink,
    output: Output,
    backend: Backend,
    provenance: Mapping[str, str],
    *,
    validate: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Carry out `plan` from `source` into `sink`, which writes into `output`.

    `validate` measures the error of every quantized tensor while its block is hot. An exception from `progress`
    ends the run like any other.

    Raises NonFiniteError, ScaleOverflowError, SourceError, DeviceError and TargetError; the output is then removed.
    """
    start = time.perf_counter()
    try:
        sink.open(plan.entries, source, dict(provenance))
        with _Writer(sink, plan) as writer:
            work = _Work(source, backend, writer, plan, validate, progress)
            records = [work.entry(entry) for entry in plan.entries]
        finished = [Record(figures, hash_.hexdigest(), seconds) for figures, hash_, seconds in records]
        files = [*output.names(), output.manifest]
        table = manifest_table(plan, finished, files, {**provenance, "backend": backend.name})
        with target_errors(output.target):
            write_manifest(table, output.path(output.manifest))
        written = sink.commit()
    except BaseException:
        sink.abort()
        raise
    return Manifest(plan, table, written, time.perf_counter() - start)


class _Hash:
    """The hash of one tensor, as manifest.py defines it; updated by the writer in row order."""

    def __init__(self, *, is_quantized: bool) -> None:
        self.parts = [hashlib.blake2b(digest_size=16) for _ in range(3 if is_quantized else 1)]

    def update(self, part: int, data: NDArray[Any]) -> None:
        self.parts[part].update(data.reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        if len(self.parts) == 1:
            return self.parts[0].hexdigest()
        return hashlib.blake2b(b"".join(p.digest() for p in self.parts), digest_size=16).hexdigest()


class _Slot(NamedTuple):
    """Memory for the results of one block."""

    packed: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    zeros: NDArray[np.uint8]


class _Writer:
    """The second thread: takes jobs from a bounded queue, in order. Its first error is raised in the first thread."""

    def __init__(self, sink: Sink, plan: Plan) -> None:
        self.sink = sink
        sizes = np.zeros(3, np.int64)
        for entry in plan.entries:
            if entry.scheme is not None:
                sizes = np.maximum(sizes, _block_sizes(entry, entry.scheme))
        self.free: queue.Queue[_Slot] = queue.Queue()
        for _ in range(SLOTS):
            self.free.put(_Slot(*(np.empty(int(n), np.uint8) for n in sizes)))
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=SLOTS)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="arrowquant-writer", daemon=True)

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and self._error is None:
            self._error = error
        self._jobs.put(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def rows(
        self, entry: Entry, row: int, block: tuple[NDArray[Any], NDArray[Any], Any], slot: _Slot, hash_: _Hash
    ) -> None:
        """Hash and write a block of rows that lies in `slot`, then give the slot back."""

        def job() -> None:
            try:
                if self._error is None:
                    for part, data in enumerate(block):
                        if data is not None:
                            hash_.update(part, data)
                    self.sink.write_rows(entry, row, *block)
            finally:
                self.free.put(slot)

        self._put(job)

    def bytes(self, entry: Entry, offset: int, data: NDArray[np.uint8], hash_: _Hash) -> None:
        """Hash and write bytes of a kept tensor, straight from the source's map."""

        def job() -> None:
            if self._error is None:
                hash_.update(0, data)
                self.sink.write_bytes(entry, offset, data)

        self._put(job)

    def _put(self, job: Callable[[], None]) -> None:
        if self._error is not None:
            raise self._error
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as e:
                # Later jobs are only drained, so that the first thread never waits for a slot in vain.
                self._error = self._error or e


class _Work:
    """The first thread's part: every entry in blocks."""

    def __init__(
        self,
        source: Checkpoint,
        backend: Backend,
        writer: _Writer,
        plan: Plan,
        validate: bool,
        progress: Progress | None,
    ) -> None:
        self.source, self.backend, self.writer = source, backend, writer
        self.validate, self.progress = validate, progress
        self.done, self.total = 0, sum(e.info.n_bytes for e in plan.entries)
        rows = [_block_rows(e) * rows_and_length(e.info.shape)[1] for e in plan.entries if e.scheme and validate]
        self.decoded = np.empty(max(rows, default=0), np.float32)

    def entry(self, entry: Entry) -> tuple[Figures | None, _Hash, float]:
        start = time.perf_counter()
        hash_ = _Hash(is_quantized=entry.scheme is not None)
        figures = None
        if entry.scheme is None:
            self._keep(entry, hash_)
        else:
            figures = Figures() if self.validate else None
            self._quantize(entry, entry.scheme, hash_, figures)
        return figures, hash_, time.perf_counter() - start

    def _keep(self, entry: Entry, hash_: _Hash) -> None:
        data = self.source.view(entry.info.name).reshape(-1).view(np.uint8)
        for offset in range(0, len(data), BLOCK_BYTES):
            part = data[offset : offset + BLOCK_BYTES]
            self.writer.bytes(entry, offset, part, hash_)
            self._report(len(part), entry)

    def _quantize(self, entry: Entry, scheme: Scheme, hash_: _Hash, figures: Figures | None) -> None:
        name, shape = entry.info.name, entry.info.shape
        length = rows_and_length(shape)[1]
        solved = None
        if scheme.granularity == "tensor":
            blocks = (x for _, x in self._blocks(entry))
            solved = ops.tensor_scale(blocks, scheme, backend=self.backend, name=name, shape=shape)
        findings = Findings()
        for row, x in self._blocks(entry):
            slot = self.writer.free.get()
            packed, scales, zeros = _views(slot, scheme, x.shape)
            if solved is None:
                found = ops.quantize_rows(x, scheme, packed, scales, zeros, backend=self.backend)
                findings = ops.merge(findings, found, row * length, row * scales.shape[1])
            else:
                scales, zeros = solved
                ops.encode_rows(x, scheme, scales, zeros, packed, backend=self.backend)
            # Once something was found the tensor is only looked through: the error counts all of it.
            if findings.first < 0 and findings.first_overflow < 0:
                if figures is not None:
                    decoded = self.decoded[: x.size].reshape(x.shape)
                    ops.dequantize_rows(packed, scales, zeros, scheme, decoded, backend=self.backend)
                    figures.add(x, decoded)
                if solved is not None and row > 0:
                    scales, zeros = scales[:0], None if zeros is None else zeros[:0]
                self.writer.rows(entry, row, (packed, scales, zeros), slot, hash_)
            else:
                self.writer.free.put(slot)
            self._report(x.nbytes, entry)
        ops.check(findings, scheme, name=name, shape=shape)

    def _blocks(self, entry: Entry) -> Iterator[tuple[int, NDArray[Any]]]:
        x = self.source.view(entry.info.name).reshape(rows_and_length(entry.info.shape))
        step = _block_rows(entry)
        for row in range(0, x.shape[0], step):
            yield row, x[row : row + step]

    def _report(self, n_bytes: int, entry: Entry) -> None:
        self.done += n_bytes
        if self.progress is not None:
            self.progress(self.done, self.total, entry.info.name)


def _block_rows(entry: Entry) -> int:
    """Rows of one block: whole rows, at least one, no more than there are."""
    rows, length = rows_and_length(entry.info.shape)
    return min(rows, max(1, BLOCK_BYTES * 8 // max(1, length * DTYPES[entry.info.dtype].bits)))


def _block_sizes(entry: Entry, scheme: Scheme) -> NDArray[np.int64]:
    """Bytes of codes, scales and zero points of one block."""
    shape = _block_rows(entry), rows_and_length(entry.info.shape)[1]
    groups = np.prod(scheme.scales_shape(shape), dtype=np.int64)
    width = DTYPES[scheme.scale_dtype].bits // 8
    return np.array([np.prod(scheme.packed_shape(shape), dtype=np.int64), groups * width, groups])


def _views(
    slot: _Slot, scheme: Scheme, shape: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.uint8] | None]:
    """Arrays for the results of a block of this shape, in a slot's memory."""
    packed, groups = scheme.packed_shape(shape), scheme.scales_shape(shape)
    n, dtype = groups[0] * groups[1], DTYPES[scheme.scale_dtype].numpy
    assert dtype is not None
    return (
        slot.packed[: packed[0] * packed[1]].reshape(packed),
        slot.scales[: n * dtype.itemsize].view(dtype).reshape(groups),
        None if scheme.symmetric else slot.zeros[:n].reshape(groups),
    )
