"""What a checkpoint's way through the engine is made of, each part alone: its kernels, its output, its input, the link.

Every part does what the engine does with the same pieces in the same order on as many threads, and nothing else: the
kernels read a new map of the same files and write into small buffers of their thread; the output is laid out, and
filled with the same number of bytes from such buffers, at the same places.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arrowquant_gpu.backends.cpu import CpuBackend
from arrowquant_gpu.engine import Load, Sizes
from arrowquant_gpu.engine.host import codes_in, weights_view
from arrowquant_gpu.engine.loads import Queue, sizes
from arrowquant_gpu.engine.readers import open_reader
from arrowquant_gpu.formats import Checkpoint, Sink
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.pieces import Piece
from arrowquant_gpu.pipeline.plan import Plan, make_plan
from arrowquant_gpu.pipeline.quantize import open_sink, provenance
from arrowquant_gpu.schemes import Scheme

READ_BYTES = 32 << 20  # of one read into pinned memory, as a slot of a GPU does


class Job(NamedTuple):
    """A checkpoint to be quantized, planned as the engine plans it."""

    source: Checkpoint
    output: Output
    sink: Sink
    plan: Plan
    pieces: list[list[Piece]]

    @property
    def smallest(self) -> Sizes:
        """Room for any piece."""
        return Sizes(*(max(column) for column in zip(*(sizes(p) for ps in self.pieces for p in ps), strict=True)))

    @property
    def source_bytes(self) -> int:
        return int(self.plan.summary["bytes_before"])

    @property
    def weight_bytes(self) -> int:
        """Bytes of the source that are quantized; the rest is copied."""
        return sum(entry.info.n_bytes for entry in self.plan.entries if entry.scheme is not None)

    @property
    def output_bytes(self) -> int:
        return int(self.plan.summary["bytes_after"])


def plan(source: Path, target: Path, scheme: str) -> Job:
    """The job of `quantize_checkpoint(source, target, scheme)`; nothing is written."""
    opened = open_checkpoint(source)
    output = Output(target, is_directory=True, sources=[source])
    sink = open_sink("compressed-tensors", output, opened.config, tuple(opened.tensors))
    planned = make_plan(opened, sink, Scheme.parse(scheme), (), ())
    return Job(opened, output, sink, planned, [list(sink.pieces(entry)) for entry in planned.entries])


@contextlib.contextmanager
def laid_out(job: Job) -> Iterator[float]:
    """The output's files in their final size, removed at the end; yields the seconds that laying out took."""
    start = time.perf_counter()
    job.output.begin()
    try:
        job.sink.open(job.plan.entries, job.source, provenance(job.source, job.plan))
        yield time.perf_counter() - start
    finally:
        job.output.abort(keep=False)


def seconds(threads: int, work: Callable[[int], None]) -> float:
    """Time until `work(i)` has returned on all of so many threads."""
    errors: list[BaseException] = []
    ready = threading.Barrier(threads + 1)

    def serve(i: int) -> None:
        try:
            ready.wait()
            work(i)
        except BaseException as e:
            errors.append(e)

    started = [threading.Thread(target=serve, args=(i,)) for i in range(threads)]
    for thread in started:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in started:
        thread.join()
    taken = time.perf_counter() - start
    if errors:
        raise errors[0]
    return taken


def _queue(job: Job, threads: int, *, quantized_only: bool) -> Callable[[Sizes], Load | None]:
    pieces = [ps for ps in job.pieces if ps[0].entry.scheme is not None or not quantized_only]
    return Queue(pieces, set(), threads).take


def kernels(source: Path, target: Path, scheme: str, threads: int) -> float:
    """Quantize every piece out of a new map, the result of each over that of the one before."""
    job = plan(source, target, scheme)
    take, most = _queue(job, threads, quantized_only=True), job.smallest
    buffers = [np.zeros(most.results, np.uint8) for _ in range(threads)]
    backend = CpuBackend(1)

    def work(i: int) -> None:
        while (load := take(most)) is not None:
            file = job.source.mapped(load.file)
            for piece in load.pieces:
                weights = weights_view(file[piece.offset : piece.offset + piece.n_bytes], piece)
                backend.quantize(weights, piece.entry.scheme, *codes_in(buffers[i], piece))

    return seconds(threads, work)


class Written(NamedTuple):
    """Seconds of laying the files out, and of writing into them."""

    layout: float
    write: float


def output(source: Path, target: Path, scheme: str, threads: int) -> Written:
    """Write as many bytes as the output has to the same places, from small buffers; they stay in the page cache."""
    job = plan(source, target, scheme)
    take, most = _queue(job, threads, quantized_only=False), job.smallest
    rng = np.random.default_rng(3)
    buffers = [rng.integers(0, 256, max(most), np.uint8) for _ in range(threads)]

    def work(i: int) -> None:
        while (load := take(most)) is not None:
            for piece in load.pieces:
                for place in job.sink.places(piece):
                    data = buffers[i][: place.n_bytes]
                    job.output.write(place.file, place.offset, data, place.lines, place.stride)

    with laid_out(job) as layout:
        return Written(layout, seconds(threads, work))


def source_bytes(source: Path, target: Path, scheme: str, threads: int, reader_name: str = "buffered") -> float:
    """Read all weights into one buffer per thread."""
    job = plan(source, target, scheme)
    reader = open_reader(reader_name, job.source)
    assert reader.slack is not None
    most = Sizes(max(READ_BYTES, job.smallest.source), 1 << 60, 1 << 60)
    take = _queue(job, threads, quantized_only=False)
    buffers = [np.zeros(most.source + reader.slack, np.uint8) for _ in range(threads)]

    def work(i: int) -> None:
        while (load := take(most)) is not None:
            reader.read(load, buffers[i])

    with contextlib.closing(reader):
        return seconds(threads, work)


def link(n_bytes: int, rounds: int = 5) -> float:
    """Seconds of n bytes from page-locked memory to the GPU, in copies of READ_BYTES that follow each other."""
    import cupy
    import cupyx

    host = [cupyx.empty_pinned(READ_BYTES, np.uint8) for _ in range(4)]
    device = cupy.empty(READ_BYTES, np.uint8)
    events = cupy.cuda.Event(), cupy.cuda.Event()
    rates = []
    for _ in range(rounds + 1):
        events[0].record()
        for k in range(64):
            device.set(host[k % len(host)])
        events[1].record()
        events[1].synchronize()
        rates.append(64 * READ_BYTES / cupy.cuda.get_elapsed_time(*events) * 1e3)
    return n_bytes / float(np.median(rates[1:]))
