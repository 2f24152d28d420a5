"""A whole run of the engine over simulated streams: no GPU, but the speeds of one, all divided by the same factor.

The engine, its slots, reads, buffers and writes are the real ones; only the stages of the device, and the page cache
that is read from, take as long as their bytes need at the speeds below. The factor leaves this machine time for the
work that is really done meanwhile. What the timeline shows is how well the engine overlaps stages of these speeds, and
nothing about a GPU.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowquant_gpu import trace
from arrowquant_gpu.engine import Load, Reader
from arrowquant_gpu.engine import run as engine
from arrowquant_gpu.engine.journal import Journal
from arrowquant_gpu.engine.readers import open_reader
from arrowquant_gpu.engine.ring import SLOT_BYTES, SLOTS
from arrowquant_gpu.engine.streamed import StreamedDevice
from arrowquant_gpu.pipeline.quantize import provenance
from benchmarks import parts, timelines
from tests.simulated_streams import SimulatedStreams

# Bytes per second. Reads, of the page cache, and copies, over the link: PCIe generation 5. Kernels: read and written.
SPEEDS = {"h200": {"read": 50e9, "h2d": 50e9, "kernel": 2900e9, "d2h": 50e9}}
FACTOR = 200
EXCERPT = 1.0  # seconds of the run that the picture shows


class PacedReader:
    """Another reader, as fast as `speed` bytes per second for all threads together. See `Reader`."""

    def __init__(self, reader: Reader, speed: float) -> None:
        self.name, self.slack, self.notes = reader.name, reader.slack, reader.notes
        self._reader, self._speed = reader, speed
        self._end, self._lock = 0.0, threading.Lock()

    def read(self, load: Load, buffer: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """One read after the other has its turn; the bytes are there when it is over."""
        with self._lock:
            start = max(self._end, time.perf_counter())
            end = self._end = start + load.n_bytes / self._speed
        data = self._reader.read(load, buffer)
        time.sleep(max(0.0, end - time.perf_counter()))
        trace.record("read", load.file.name, start, end, load.n_bytes, track=READS)
        return data

    def expect(self, load: Load) -> None:
        self._reader.expect(load)

    def close(self) -> None:
        self._reader.close()


READS = "simulated read"


def run(source: Path, work: Path, scheme: str, machine: str) -> tuple[Path, dict[str, Any]]:
    """(the output, what goes into the results file but its title)."""
    speeds = {stage: speed / FACTOR for stage, speed in SPEEDS[machine].items()}
    job = parts.plan(source, work / "output", scheme)
    streams = SimulatedStreams("simulated", speeds={stage: s for stage, s in speeds.items() if stage != "read"})
    path = work / "simulated.json"
    with contextlib.ExitStack() as stack:
        reader = PacedReader(open_reader("buffered", job.source), speeds["read"])
        stack.callback(reader.close)
        device = StreamedDevice(streams, reader, job.smallest, SLOT_BYTES, SLOTS)
        stack.callback(device.close)
        job.output.begin()
        journal = stack.enter_context(contextlib.closing(Journal(job.output, {})))
        job.sink.open(job.plan.entries, job.source, provenance(job.source, job.plan))
        with trace.timeline(path) as recorded:
            engine.run(job.plan.entries, job.sink, job.output, [device], journal)
    job.sink.commit()
    events = [
        e._replace(track=e.track.replace("arrowquant-simulated-", "slot "))
        for e in timelines.load(path)
        if e.stage != "read" or e.track == READS  # a slot's own range has the wait for its turn in it
    ]
    stages = timelines.stages(events)
    need = {stage: stages[stage]["bytes"] / speeds[stage] for stage in speeds}
    slowest = max(need, key=lambda stage: need[stage])
    return job.output.target, {
        "is_simulated": True,
        "speeds_gb_s": {stage: speed / 1e9 for stage, speed in SPEEDS[machine].items()},
        "factor": FACTOR,
        "source_bytes": job.source_bytes,
        "output_bytes": job.output_bytes,
        "slots": SLOTS,
        "slot_bytes": SLOT_BYTES,
        "seconds": recorded.summary()["seconds"],
        "busy": {stage: row["busy"] for stage, row in stages.items()},
        "slowest_stage": slowest,
        "slowest_busy": stages[slowest]["busy"],
        "slowest_need_of_run": need[slowest] / recorded.summary()["seconds"],
        "events": timelines.excerpt(events, EXCERPT),
    }
