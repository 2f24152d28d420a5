"""`StreamedDevice`: a ring of slots over three streams, of a GPU or of whatever behaves like one.

    read -> pinned input -(h2d stream)-> device input -(kernel stream)-> device results -(d2h stream)-> pinned results

The slots of a device share its streams. A slot puts a whole load on them at once, with events between the stages, and
waits for the last event only; while it waits, other slots read, write, and put theirs behind it. Because a slot waits
before it lets go of a load, none of its buffers is in use when it begins the next.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import trace
from ..backends import counters
from ..dtypes import DTYPES
from ..errors import DeviceError, DeviceMemoryError, InputError
from ..formats import Codes
from ..formats.pieces import Piece
from ..schemes import Scheme
from . import Load, Reader, Result, Sizes, Solved
from .batches import SEAMS, Batch, Placed, Stage, batches
from .converted import convert, divisors_of
from .host import codes_in, weights_view
from .loads import up

log = logging.getLogger(__name__)

STAGES: tuple[Stage, ...] = ("h2d", "kernel", "d2h")

# So many slots keep every stage busy. Where memory is limited, smaller slots are better than fewer.
ENOUGH = 4


class Streams(Protocol):
    """Three streams of one device, and its memory. Methods may be called from any thread, and raise DeviceError.

    What is enqueued to a stage runs in that order, and not before this thread goes on; a buffer is read or written
    when the work runs. Device arrays are row-major and slice, `view` and `reshape` as NumPy's do.
    """

    name: str

    def pinned(self, n_bytes: int) -> NDArray[np.uint8]:
        """Page-locked host memory, not initialised; freed with its last view. Raises DeviceMemoryError."""
        ...

    def allocate(self, n_bytes: int) -> Any:
        """Device memory, uint8 [n_bytes], not initialised; freed with its last view. Raises DeviceMemoryError."""
        ...

    def to_device(self, target: Any, source: NDArray[np.uint8]) -> None:
        """Enqueue a copy of bytes to stage h2d."""
        ...

    def zero(self, target: Any) -> None:
        """Enqueue to stage kernel: set bytes to 0."""
        ...

    def quantize(self, x: Any, scheme: Scheme, packed: Any, scales: Any, zeros: Any | None, found: Any) -> None:
        """Enqueue to stage kernel; findings are added to `found`, uint64 [COUNTERS]. See Backend, also below."""
        ...

    def value_range(self, x: Any, found: Any) -> None:
        """Enqueue to stage kernel; range and findings are added to `found`."""
        ...

    def encode(self, x: Any, scheme: Scheme, scales: Any, zeros: Any | None, packed: Any) -> None:
        """Enqueue to stage kernel."""
        ...

    def to_host(self, target: NDArray[np.uint8], source: Any) -> None:
        """Enqueue a copy of bytes to stage d2h."""
        ...

    def record(self, stage: Stage, *, is_timed: bool = False) -> Any:
        """An event that happens when all that is enqueued to `stage` so far has run."""
        ...

    def after(self, stage: Stage, event: Any) -> None:
        """Let what is enqueued to `stage` from now on wait for `event`."""
        ...

    def wait(self, event: Any) -> None:
        """Block this thread until `event` has happened. Raises what failed on the device."""
        ...

    def time(self, event: Any) -> float:
        """When a timed event happened, in seconds of time.perf_counter(). It has been waited for."""
        ...

    def close(self) -> None:
        """End the streams. Nothing is under way on them."""
        ...


class StreamedDevice:
    """`n_slots` slots for loads of `slot_bytes` of source on these streams, or fewer and smaller ones.

    The ring never takes more than `max_bytes`, of host and device memory together. Where memory runs out all the same
    it has half as many slots, then one of half the size, but no smaller than `smallest`; `notes` and the log say so.
    All memory is allocated here and freed by `close`, which also closes the streams.

    A reader that has `read_device` (GdsReader) is asked to read straight into device memory where a load needs nothing
    but that; `Result.weights` is then empty, so such a run cannot be validated.

    Raises InputError where `max_bytes` is too small for one slot, DeviceMemoryError where memory is, and DeviceError.
    """

    def __init__(
        self,
        streams: Streams,
        reader: Reader,
        smallest: Sizes,
        slot_bytes: int,
        n_slots: int,
        max_bytes: int | None = None,
    ) -> None:
        self.name, self.reader = streams.name, reader
        self.notes: tuple[str, ...] = ()
        self.slots: tuple[StreamedSlot, ...] = ()
        self._streams, self._submitting = streams, threading.Lock()
        try:
            self._make(smallest, slot_bytes, n_slots, max_bytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the ring and close the streams. No slot is running."""
        self._free()
        self._streams.close()

    def _make(self, smallest: Sizes, slot_bytes: int, n_slots: int, max_bytes: int | None) -> None:
        sizes = _enlarged(smallest, slot_bytes)
        if max_bytes is not None:
            while sizes != smallest and max_bytes < min(ENOUGH, n_slots) * _Layout(sizes, self.reader).total:
                sizes = _enlarged(smallest, sizes.source // 2)
            each = _Layout(sizes, self.reader).total
            if max_bytes < each:
                raise InputError(
                    f"{self.name}: the memory limit leaves {max_bytes} bytes, and the smallest slot for this model "
                    f"takes {each}, of host and device memory together. Raise --memory-limit."
                )
            n_slots = min(n_slots, max_bytes // each)
        while (cause := self._try(sizes, n_slots)) is not None:
            had = f"{n_slots} slot{'s' if n_slots > 1 else ''} of {_mib(sizes.source)}"
            if n_slots > 1:
                n_slots //= 2
            elif sizes != smallest:
                sizes = _enlarged(smallest, sizes.source // 2)
            else:
                layout = _Layout(sizes, self.reader)
                raise DeviceMemoryError(
                    f"{self.name}: out of memory for a single slot of the smallest size for this model, "
                    f"{layout.device} bytes on the device and {layout.host} bytes of page-locked host memory, whatever "
                    f"--memory-limit is ({cause}). Free memory there, or choose another --device."
                ) from cause
            note = f"{self.name}: out of memory for {had}; going on with {n_slots} of {_mib(sizes.source)}"
            self.notes += (note,)
            log.warning("%s", note)

    def _try(self, sizes: Sizes, n_slots: int) -> DeviceMemoryError | None:
        """Make the slots. Returns why memory ran out, with all of it freed again."""
        try:
            for _ in range(n_slots):
                self.slots += (StreamedSlot(self._streams, self.reader, sizes, self._submitting),)
        except DeviceMemoryError as e:
            self._free()
            # Its frames would keep the memory of a slot that was half made.
            return e.with_traceback(None)
        return None

    def _free(self) -> None:
        for slot in self.slots:
            slot.free()
        self.slots = ()


class StreamedSlot:
    """Buffers of one thread on shared streams; `submitting` keeps the work of one load together. See `Slot`."""

    def __init__(self, streams: Streams, reader: Reader, sizes: Sizes, submitting: threading.Lock) -> None:
        self.sizes = sizes
        self._streams, self._reader, self._submitting = streams, reader, submitting
        layout = _Layout(sizes, reader)
        host, device = streams.pinned(layout.host), streams.allocate(layout.device)
        self._source = None if reader.slack is None else host[: layout.source]
        self._converted = host[layout.source : layout.source + layout.converted]
        self._results = host[layout.source + layout.converted :]
        self._device_input, self._device_results = device[: layout.input], device[layout.input :]

    def free(self) -> None:
        """Let the memory go; the slot cannot be used any more."""
        del self._source, self._converted, self._results, self._device_input, self._device_results

    def run(self, load: Load, solved: Mapping[str, Solved]) -> Generator[Result, None, None]:
        """See `Slot`. Whenever this yields, nothing is under way."""
        rooms = (self._device_input.nbytes, self._converted.nbytes, self._results.nbytes)
        parts = list(batches(load, *rooms))
        # A kernel needs weights that are aligned to their element.
        read_device = getattr(self._reader, "read_device", None) if load.offset % 4 == 0 else None
        with trace.span("read", load.file.name, load.n_bytes):
            if read_device is not None and [b.copies for b in parts] == [[(0, 0, load.n_bytes)]]:
                under_way = _Read(load, solved, None, read_device(load, self._device_input))
            else:
                under_way = _Read(load, solved, self._reader.read(load, self._source), self._device_input)
        for batch in parts:
            if batch.placed:
                self._bring(under_way, batch)
            for i, piece in enumerate(batch.pieces):
                yield self._result(under_way, batch, piece, batch.placed.get(i))

    def _result(self, read: _Read, batch: Batch, piece: Piece, placed: Placed | None) -> Result:
        if piece.entry.scheme is None:
            return Result(piece, read.bytes_of(piece))
        weights = np.empty(0, DTYPES[piece.entry.info.dtype].numpy) if read.data is None else read.weights(piece)
        codes = None
        if not read.load.is_range:
            codes = codes_in(self._results, piece, 0 if placed is None else placed.codes)
        if placed is None:  # without weights
            return Result(piece, weights, codes, bounds=(0.0, 0.0) if read.load.is_range else None)
        if placed.counter is None:
            return Result(piece, weights, codes)
        found = batch.counters(self._results, placed)
        bounds = counters.bounds(found) if read.load.is_range else None
        return Result(piece, weights, codes, counters.findings(found), bounds)

    def _bring(self, read: _Read, batch: Batch) -> None:
        """Bring a batch through the device; on return its results are in pinned memory."""
        name = next(batch.work())[0].entry.info.name
        for piece, placed in batch.work():
            if placed.is_converted:
                x = read.weights(piece)
                room = self._converted[placed.input : placed.input + 4 * x.size]
                convert(x, divisors_of(piece), room.view(np.float32).reshape(x.shape))
            if placed.given is not None:
                _give(codes_in(self._results, piece, placed.codes), read.solved[piece.entry.info.name])
        try:
            with self._submitting:
                marks = self._submit(name, read, batch)
            self._streams.wait(marks["d2h"][1])
        except BaseException as e:
            self._settle()
            if isinstance(e, DeviceError):
                raise DeviceError(f"{read.load.file}, tensor {name}: {e}") from e
            raise
        for stage, (start, end) in marks.items():
            if start is not None:
                times = self._streams.time(start), self._streams.time(end)
                trace.record(stage, name, *times, batch.bytes_of(stage), track=f"{self._streams.name} {stage}")

    def _submit(self, name: str, read: _Read, batch: Batch) -> dict[Stage, tuple[Any, Any]]:
        """Enqueue all stages of a batch. Returns the events around each; those before it only for a timeline."""
        streams, is_timed = self._streams, trace.is_recording()

        def begin(stage: Stage) -> Any:
            return streams.record(stage, is_timed=True) if is_timed else None

        start = begin("h2d")
        with trace.submission("h2d", name, batch.bytes_of("h2d")):
            if read.data is not None:
                for offset, at, n in batch.copies:
                    streams.to_device(self._device_input[at : at + n], read.data[offset : offset + n])
            if n := batch.n_converted:
                streams.to_device(self._device_input[batch.n_direct : batch.n_direct + n], self._converted[:n])
            for _, placed in batch.work():
                if placed.given is not None:
                    streams.to_device(self._device_results[placed.given], self._results[placed.given])
        copied = start, streams.record("h2d", is_timed=is_timed)

        streams.after("kernel", copied[1])
        start = begin("kernel")
        if batch.n_counters:
            streams.zero(self._device_results[batch.n_codes : batch.n_results])
        for piece, placed in batch.work():
            with trace.submission("kernel", piece.entry.info.name, piece.n_bytes):
                self._launch(read, batch, piece, placed)
        computed = start, streams.record("kernel", is_timed=is_timed)

        streams.after("d2h", computed[1])
        start = begin("d2h")
        with trace.submission("d2h", name, batch.n_results):
            streams.to_host(self._results[: batch.n_results], self._device_results[: batch.n_results])
        return {"h2d": copied, "kernel": computed, "d2h": (start, streams.record("d2h", is_timed=is_timed))}

    def _launch(self, read: _Read, batch: Batch, piece: Piece, placed: Placed) -> None:
        scheme, shape = piece.entry.scheme, (piece.rows, piece.columns)
        assert scheme is not None
        dtype = np.dtype(np.float32 if placed.is_converted else DTYPES[piece.entry.info.dtype].numpy)
        at = placed.input + (batch.n_direct if placed.is_converted else 0)
        x = read.input[at : at + piece.rows * piece.columns * dtype.itemsize].view(dtype).reshape(shape)
        if read.load.is_range:
            self._streams.value_range(x, batch.counters(self._device_results, placed))
            return
        packed, scales, zeros = codes_in(self._device_results, piece, placed.codes)
        if placed.counter is None:
            self._streams.encode(x, scheme, scales, zeros, packed)
        else:
            self._streams.quantize(x, scheme, packed, scales, zeros, batch.counters(self._device_results, placed))

    def _settle(self) -> None:
        """Wait until nothing of this slot is under way any more, or the device is beyond that."""
        for stage in STAGES:
            with contextlib.suppress(DeviceError):
                self._streams.wait(self._streams.record(stage))


class _Read(NamedTuple):
    """A load that has been read: its bytes on the host, None where they went straight to the device; the device input,
    or the part of it where they went."""

    load: Load
    solved: Mapping[str, Solved]
    data: NDArray[np.uint8] | None
    input: Any

    def bytes_of(self, piece: Piece) -> NDArray[np.uint8]:
        assert self.data is not None
        start = piece.offset - self.load.offset
        return self.data[start : start + piece.n_bytes]

    def weights(self, piece: Piece) -> NDArray[Any]:
        return weights_view(self.bytes_of(piece), piece)


class _Layout:
    """Bytes of the parts of a slot. source, converted: pinned host memory; input: device memory; results: both."""

    def __init__(self, sizes: Sizes, reader: Reader) -> None:
        self.source = 0 if reader.slack is None else up(sizes.source + reader.slack)
        self.converted, self.results = up(sizes.converted), up(sizes.results)
        self.input = up(sizes.source) + self.converted + max(SEAMS, up(getattr(reader, "device_slack", 0)))

    @property
    def host(self) -> int:
        return self.source + self.converted + self.results

    @property
    def device(self) -> int:
        return self.input + self.results

    @property
    def total(self) -> int:
        return self.host + self.device


def _give(codes: Codes, solved: Solved) -> None:
    if solved[0] is not None:
        codes.scales[...] = solved[0]
    if codes.zeros is not None and solved[1] is not None:
        codes.zeros[...] = solved[1]


def _enlarged(smallest: Sizes, slot_bytes: int) -> Sizes:
    """Sizes for `slot_bytes` of source, results in proportion; converted pieces go through one after the other."""
    if slot_bytes <= smallest.source:
        return smallest
    results = min(slot_bytes, slot_bytes * smallest.results // max(1, smallest.source))
    return Sizes(slot_bytes, max(up(results), smallest.results), smallest.converted)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 20):.4g} MiB"
