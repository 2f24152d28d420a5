"""Faults at chosen moments of a real run of `quantize_checkpoint`, and small models to run it on.

A moment is a call: the n-th write, the n-th copy to a device. Calls of the system go through hooks in `os`; GPUs are
SimulatedStreams; everything else is the code that users run. What is synced is not: the disk is no part of this.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.engine.host import HostSlot
from arrowquant_gpu.engine.journal import Journal
from arrowquant_gpu.errors import (
    ArrowQuantError,
    DeviceError,
    DeviceMemoryError,
    NonFiniteError,
    SourceError,
    TargetError,
)
from arrowquant_gpu.formats import pieces as pieces_module
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.pipeline import quantize

from .fixtures import write_index, write_safetensors
from .plain_sink import PlainSink
from .simulated_gpus import simulate
from .simulated_streams import SimulatedStreams
from .snapshots import snapshot

FORMATS = ("compressed-tensors", "parquet", "arrow", "plain", "parquet-tensors")


class CancelledError(Exception):
    """Raised by a callback for progress: no error of this package."""


class SinkError(ArrowQuantError):
    """Raised by a sink."""


class Hang(BaseException):
    """A run that did not end; the message has the stacks of all threads."""


class Kind(NamedTuple):
    """What a fault ends a run with, and at about which call of its kind it comes."""

    error: type[BaseException]
    typical: int


KINDS: Mapping[str, Kind] = {
    "pinned": Kind(DeviceMemoryError, 4),
    "allocate": Kind(DeviceMemoryError, 4),
    "h2d": Kind(DeviceError, 20),
    "kernel": Kind(DeviceError, 20),
    "d2h": Kind(DeviceError, 8),
    "wait": Kind(DeviceError, 8),
    "lost": Kind(DeviceError, 60),
    "host kernel": Kind(DeviceError, 10),
    "read": Kind(SourceError, 4),
    "short read": Kind(SourceError, 4),
    "verify": Kind(TargetError, 2),
    "write": Kind(TargetError, 60),
    "full disk": Kind(TargetError, 60),
    "reserve": Kind(TargetError, 1),
    "sync": Kind(TargetError, 4),
    "journal": Kind(TargetError, 1),
    "rename": Kind(TargetError, 0),
    "stored": Kind(SinkError, 25),
    "cancelled": Kind(CancelledError, 2),
    "interrupt": Kind(KeyboardInterrupt, 200),
    "nan": Kind(NonFiniteError, 0),
}
# Faults that a run gets over, with a note.
SURVIVED = frozenset({"pinned", "allocate"})


class Faults:
    """Which call of which kind fails in one run, and what came of it. Thread-safe."""

    def __init__(self, planned: Mapping[str, int], seed: int = 0) -> None:
        self.planned = dict(planned)
        self.reached: set[str] = set()
        self.raised: list[BaseException] = []
        self.is_armed = False
        self._calls: Counter[str] = Counter()
        self._lock, self._random = threading.Lock(), random.Random(seed)

    def at(self, kind: str) -> bool:
        """Count a call of this kind; True where it is to fail. Some calls are late."""
        with self._lock:
            fails = self.planned.get(kind) == self._calls[kind]
            is_interrupt = self.planned.get("interrupt") == self._calls.total()
            self._calls[kind] += 1
            if fails:
                self.reached.add(kind)
            delay = self._random.random()
        if delay < 0.05:
            time.sleep(delay / 50)
        if is_interrupt:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return fails

    def note(self, error: BaseException) -> BaseException:
        """Remember an error that was injected."""
        self.raised.append(error)
        return error

    def fail(self, kind: str, number: int = errno.EIO) -> None:
        """Raise an OSError if this call is to fail."""
        if self.at(kind):
            raise self.note(OSError(number, os.strerror(number)))

    def part(self, n_bytes: int, unit: int = 1) -> int:
        """How much of a call's bytes it does: now and then only some of them."""
        with self._lock:
            if n_bytes <= unit or self._random.random() < 0.9:
                return n_bytes
            return min(n_bytes, -(-self._random.randrange(1, n_bytes) // unit) * unit)


# All that were made and are still referred to.
MADE: weakref.WeakSet[SimulatedStreams] = weakref.WeakSet()


class FaultyStreams(SimulatedStreams):
    """SimulatedStreams whose calls are counted over all devices of a run."""

    def __init__(self, name: str, seed: int, delay: float, faults: Faults) -> None:
        self.faults = faults
        super().__init__(name, seed, delay=delay)
        MADE.add(self)

    def _call(self, kind: str) -> None:
        self._is_lost |= self.faults.at("lost")
        super()._call(kind)
        if self.faults.at(kind):
            error = DeviceMemoryError if kind in SURVIVED else DeviceError
            raise self.faults.note(error(f"{self.name}: {kind} fails"))


class Machine(NamedTuple):
    """What a run is carried out by."""

    devices: str = "cuda:0"
    n_slots: int = 2
    slot_bytes: int = 1 << 13
    delay: float = 0.0
    threads: int = 1
    read: str = "auto"
    interval: float = 0.0  # of the journal


class Model:
    """A small checkpoint of one seed, how it is to be quantized, and what comes of it with the reference alone."""

    def __init__(self, seed: int, folder: Path) -> None:
        rng = random.Random(seed)
        self.format = FORMATS[seed % len(FORMATS)]
        self.piece_bytes = rng.choice([512, 2000, 6000])
        self.source = folder / "model"
        self.options: dict[str, Any] = {"validate": rng.random() < 0.3}
        if self.format == "compressed-tensors":
            self.options["scheme"] = rng.choice(["int4_g32", "int4_g32_asym", "int8_channel_asym", "int2_g16"])
        else:
            grain = rng.choice(["g32", "g5", "g100_asym", "channel", "channel_asym", "tensor", "tensor_asym"])
            self.options["scheme"] = f"int{rng.choice([2, 3, 4, 5, 6, 8])}_{grain}"
        self.source.mkdir(parents=True)
        tensors = _tensors(rng, is_linear=self.format == "compressed-tensors")
        names = sorted(tensors, key=lambda _: rng.random())
        n_files = rng.randrange(1, 4)
        weight_map = {}
        for i in range(n_files):
            file = f"model-{i + 1:05d}-of-{n_files:05d}.safetensors"
            write_safetensors(self.source / file, {n: tensors[n] for n in names[i::n_files]}, {"format": "pt"})
            weight_map |= dict.fromkeys(names[i::n_files], file)
        write_index(self.source, weight_map, sum(t.nbytes for t in tensors.values()))
        if self.format == "compressed-tensors":
            (self.source / "config.json").write_text('{"model_type": "llama"}')
        made = folder / "expected"
        made.mkdir()
        result = self.run(made / "out", Faults({}), Machine("reference"))
        self.entries = result.plan.entries
        self.expected = snapshot(made)

    def run(
        self,
        target: Path,
        faults: Faults,
        machine: Machine,
        *,
        seed: int = 0,
        source: Path | None = None,
        streams: list[SimulatedStreams] | None = None,
        **options: Any,
    ) -> Any:
        """Quantize it into `target`, whose folder exists, under these faults; `streams` takes those of the GPUs."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces_module, "PIECE_BYTES", self.piece_bytes)
            patch.setattr(quantize, "open_sink", self._open_sink(faults))
            patch.setattr(quantize, "Journal", lambda *args: Journal(*args, interval=machine.interval))
            _hook_system(patch, faults, is_direct=machine.read == "direct")
            _hook_devices(patch, faults, machine, seed, [] if streams is None else streams)
            name = "compressed-tensors" if self.format == "plain" else self.format

            def progress(*_: object) -> None:
                if faults.at("cancelled"):
                    raise faults.note(CancelledError())

            with interruptible(faults):
                return quantize.quantize_checkpoint(
                    source or self.source,
                    target,
                    format=name,
                    device=machine.devices,
                    threads=machine.threads,
                    read=machine.read,
                    progress=progress,
                    **self.options,
                    **options,
                )

    def with_nan(self, folder: Path, rng: random.Random) -> Path:
        """A copy of the source with one NaN in a tensor that is quantized."""
        entry = rng.choice([e for e in self.entries if e.scheme and e.info.n_bytes and "int" not in e.info.dtype])
        shutil.copytree(self.source, folder)
        dtype = np.dtype(DTYPES[entry.info.dtype].numpy)
        at = entry.info.offset + dtype.itemsize * rng.randrange(entry.info.n_bytes // dtype.itemsize)
        with (folder / entry.info.file.name).open("r+b") as f:
            f.seek(at)
            f.write(np.array(np.nan).astype(dtype).tobytes())
        return folder

    def _open_sink(self, faults: Faults) -> Callable[..., Any]:
        real = quantize.open_sink

        def open_sink(name: str, output: Output, config: Any, names: Any, **options: Any) -> Any:
            sink = PlainSink(output) if self.format == "plain" else real(name, output, config, names, **options)
            stored = sink.stored

            def hooked(piece: Any, codes: Any) -> Any:
                if faults.at("stored"):
                    raise faults.note(SinkError("the sink broke"))
                return stored(piece, codes)

            sink.stored = hooked
            return sink

        return open_sink


def _tensors(rng: random.Random, *, is_linear: bool) -> dict[str, np.ndarray]:
    """Of every kind that a plan knows: quantized and copied, small and large, empty, and of types to be converted."""
    values = np.random.default_rng(rng.randrange(1 << 32))
    kernel = [np.float32, np.float16, ml_dtypes.bfloat16]
    others = [np.float64, ml_dtypes.float8_e4m3fn, np.int16]
    tensors: dict[str, np.ndarray] = {}
    for i in range(rng.randrange(4, 9)):
        rows, columns = rng.randrange(1, 40), 32 * rng.randrange(1, 6) if is_linear else rng.randrange(1, 200)
        dtype = rng.choice(kernel if is_linear else kernel + others)
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = (4 * values.standard_normal((rows, columns))).astype(dtype)
    tensors["model.embed_tokens.weight"] = values.standard_normal((50, 32), np.float32).astype(ml_dtypes.bfloat16)
    tensors["model.norm.weight"] = values.standard_normal(33, np.float32)
    tensors["ids"] = np.arange(rng.randrange(2000)).reshape(1, -1)
    tensors["scalar"] = np.float32(3.5).reshape(())
    if not is_linear:
        tensors["nothing.weight"] = np.zeros((0, 8), np.float32)
        tensors["experts.down_proj"] = values.standard_normal((3, 5, 48), np.float32)
    return tensors


def _hook_system(patch: pytest.MonkeyPatch, faults: Faults, *, is_direct: bool) -> None:
    preadv, pwrite, fallocate, write = os.preadv, os.pwrite, os.posix_fallocate, os.write

    def hooked_preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if threading.current_thread().name.startswith("arrowquant-verify"):
            faults.fail("verify")
            return preadv(fd, buffers, offset)
        faults.fail("read")
        if faults.at("short read"):
            return 0
        got = preadv(fd, buffers, offset)
        part = faults.part(got, 4096 if is_direct else 1)
        buffers[0][part:got] = b"\xa5" * (got - part)
        return part

    def hooked_pwrite(fd: int, data: Any, offset: int) -> int:
        faults.fail("write")
        faults.fail("full disk", errno.ENOSPC)
        return pwrite(fd, data[: faults.part(len(data))], offset)

    def hooked_fallocate(fd: int, offset: int, n_bytes: int) -> None:
        faults.fail("reserve", errno.ENOSPC)
        fallocate(fd, offset, n_bytes)

    def hooked_write(fd: int, data: Any) -> int:
        if threading.current_thread().name != "arrowquant-journal":
            return write(fd, data)
        faults.fail("journal")
        return write(fd, data[: faults.part(len(data))])

    def before(name: str, kind: str) -> None:
        real = getattr(os, name)

        def hooked(*args: Any, **more: Any) -> Any:
            faults.fail(kind)
            return real(*args, **more)

        patch.setattr(os, name, hooked)

    patch.setattr(os, "preadv", hooked_preadv)
    patch.setattr(os, "pwrite", hooked_pwrite)
    patch.setattr(os, "posix_fallocate", hooked_fallocate)
    patch.setattr(os, "write", hooked_write)
    patch.setattr(os, "fsync", lambda fd: faults.fail("sync"))
    patch.setattr(os, "fdatasync", lambda fd: faults.fail("sync"))
    for name in ("rename", "replace", "link"):
        before(name, "rename")


def _hook_devices(
    patch: pytest.MonkeyPatch, faults: Faults, machine: Machine, seed: int, made: list[SimulatedStreams]
) -> None:
    def make(name: str) -> FaultyStreams:
        streams = FaultyStreams(name, seed, machine.delay, faults)
        made.append(streams)
        return streams

    def before(name: str) -> None:
        real = getattr(HostSlot, name)

        def hooked(*args: Any) -> Any:
            if faults.at("host kernel"):
                raise faults.note(DeviceError("cpu: host kernel fails"))
            time.sleep(machine.delay)
            return real(*args)

        patch.setattr(HostSlot, name, hooked)

    simulate(patch, make, slot_bytes=machine.slot_bytes, n_slots=machine.n_slots)
    # Of every piece, before the kernel for its codes or its range.
    before("_divided")


@contextlib.contextmanager
def interruptible(faults: Faults) -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt once while the body runs, and does nothing before and after."""

    def interrupt(*_: object) -> None:
        if faults.is_armed:
            faults.is_armed = False
            faults.reached.add("interrupt")
            raise faults.note(KeyboardInterrupt())

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        faults.is_armed = True
        yield
    finally:
        faults.is_armed = False
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Raise Hang in the main thread where the body takes longer: whatever it waits for there, a signal ends it."""

    def ring_out(*_: object) -> None:
        names = {t.ident: t.name for t in threading.enumerate()}
        stacks = (
            f"\n{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
            for ident, frame in sys._current_frames().items()
        )
        raise Hang(f"no end after {seconds} s{''.join(stacks)}")

    before = signal.signal(signal.SIGALRM, ring_out)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, and the cause of that."""
    while error is not None:
        yield error
        error = error.__cause__
