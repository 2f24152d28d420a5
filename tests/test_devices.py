"""Several devices: the same bytes, each does what it has time for, the memory of their rings, one failure ends all."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from arrowquant_gpu import backends, cli, quantize_checkpoint
from arrowquant_gpu.backends import pick_devices
from arrowquant_gpu.engine import ring
from arrowquant_gpu.engine.ring import open_devices
from arrowquant_gpu.errors import DeviceError, InputError
from arrowquant_gpu.formats import pieces as pieces_module
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.pipeline import make_plan
from arrowquant_gpu.pipeline.quantize import open_sink

from .faults import watchdog
from .fixtures import tiny_llama, write_safetensors
from .gpuless.fake_cupy import install
from .gpuless.loaders import ShimLoader
from .gpuless.stand_in import backend_over
from .simulated_gpus import simulate
from .simulated_streams import SimulatedStreams
from .snapshots import differences, snapshot

PATIENCE = 30.0  # seconds
FORMATS = ("compressed-tensors", "parquet", "parquet-tensors", "arrow")


class Watched(SimulatedStreams):
    """Notes how much memory it had at most, and calls `first` before its first wait."""

    def __init__(self, name: str, first: Callable[[Watched], None] = lambda _: None, **options: Any) -> None:
        self.first, self.peak, self.n_brought = first, 0, 0
        super().__init__(name, **options)

    def _memory_of(self, kind: str, n_bytes: int) -> np.ndarray:
        block = super()._memory_of(kind, n_bytes)
        self.peak = max(self.peak, self.live("pinned") + self.live("allocate"))
        return block

    def to_device(self, target: Any, source: np.ndarray) -> None:
        self.n_brought += source.nbytes
        super().to_device(target, source)

    def wait(self, event: Any) -> None:
        if self.calls["wait"] == 0:
            self.first(self)
        super().wait(event)


class Gpus:
    """Simulated GPUs by name, made by `make` when they are opened."""

    def __init__(self, patch: pytest.MonkeyPatch, make: Callable[[str], Watched], *, n_slots: int = 1) -> None:
        self.made: dict[str, Watched] = {}
        patch.setattr(pieces_module, "PIECE_BYTES", 2000)
        simulate(patch, self._make, slot_bytes=1, n_slots=n_slots)
        self._make_one = make

    def _make(self, name: str) -> Watched:
        self.made[name] = self._make_one(name)
        return self.made[name]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "source", shards=3, dtype="float32")


def names(n: int) -> str:
    return ",".join(f"cuda:{i}" for i in range(n))


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_and_memory_of_several_devices(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No device gets its first piece done before each has one."""
    found, peaks = [], []
    for n in (0, 1, 2, 4):
        meeting = threading.Barrier(max(1, n))
        gpus = Gpus(monkeypatch, lambda name, b=meeting: Watched(name, lambda _: b.wait(PATIENCE) and None), n_slots=1)
        (tmp_path / str(n)).mkdir()
        target = tmp_path / str(n) / "out"
        with watchdog(2 * PATIENCE):
            result = quantize_checkpoint(source, target, "int4_g32", format=name, device=names(n) or "reference")
        found.append(snapshot(target.parent))
        assert differences(found[0], found[-1]) == []
        assert list(gpus.made) == (names(n).split(",") if n else [])
        assert all(s.calls["kernel"] > 0 for s in gpus.made.values())
        peaks.append(sum(s.peak for s in gpus.made.values()))
        assert result.run.devices == tuple(gpus.made) or n == 0
        assert sum(s.live("pinned") + s.live("allocate") for s in gpus.made.values()) == 0
    assert peaks == [0, peaks[1], 2 * peaks[1], 4 * peaks[1]]


def test_a_slow_device_gets_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One device is held at its first load until the other one has done everything else."""
    weights = {f"{i}.weight": np.full((20, 64), i + 1, np.float32) for i in range(12)}
    file = write_safetensors(tmp_path / "m.safetensors", weights)
    others_are_done, n_done = threading.Event(), [0]

    def hold(slow: Watched) -> None:
        if not others_are_done.wait(PATIENCE):
            raise RuntimeError(f"{slow.name} holds {slow.n_brought} bytes, and the other device did only {n_done[0]}")

    def progress(done: int, total: int, _: str) -> None:
        n_done[0] = done
        slow = gpus.made["cuda:1"]
        if slow.n_brought and done + slow.n_brought == total:
            others_are_done.set()

    def make(name: str) -> Watched:
        return Watched(name, hold if name == "cuda:1" else lambda _: taken.wait(PATIENCE) and None)

    # The fast one begins when the slow one has a load, or it might do all of them.
    taken = threading.Event()
    real = Watched.to_device

    def to_device(self: Watched, target: Any, source: np.ndarray) -> None:
        real(self, target, source)
        if self.name == "cuda:1":
            taken.set()

    monkeypatch.setattr(Watched, "to_device", to_device)
    gpus = Gpus(monkeypatch, make)
    with watchdog(2 * PATIENCE):
        quantize_checkpoint(file, tmp_path / "out", "int4_g32", format="parquet", device=names(2), progress=progress)
    waits = [s.calls["wait"] for s in gpus.made.values()]
    assert waits[1] == 1
    assert waits[0] > 12


@pytest.mark.parametrize("kind", ["h2d", "kernel", "d2h", "wait", "lost"])
def test_a_device_that_fails_ends_the_others(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """They are at a load when it fails, and let go of it."""
    failed = threading.Event()

    class Failing(Watched):
        def _call(self, kind: str) -> None:
            try:
                super()._call(kind)
            except DeviceError:
                failed.set()
                raise

    def make(name: str) -> Watched:
        n = 4 if kind == "lost" else 0
        if name == "cuda:1":
            return Failing(name, faults=[(kind, n)])
        return Watched(name, lambda _: failed.wait(PATIENCE) and None)

    before = threading.enumerate()
    gpus = Gpus(monkeypatch, make, n_slots=2)
    with watchdog(2 * PATIENCE), pytest.raises(DeviceError, match=r"cuda:1: (the device is lost|.* number 0 fails)"):
        quantize_checkpoint(source, tmp_path / "out", "int4_g32", device=names(3))
    assert set(threading.enumerate()) <= set(before)
    assert list(tmp_path.iterdir()) == []
    assert list(gpus.made) == ["cuda:0", "cuda:1", "cuda:2"]


def test_devices_that_were_opened_are_closed_when_another_cannot_be(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.enumerate()
    gpus = Gpus(monkeypatch, lambda name: Watched(name, memory=1 if name == "cuda:1" else None))
    with pytest.raises(DeviceError, match="cuda:1: out of memory for a single slot"):
        quantize_checkpoint(source, tmp_path / "out", "int4_g32", device=names(2))
    assert set(threading.enumerate()) <= set(before)
    assert gpus.made["cuda:0"].peak > 0
    assert sum(s.live("pinned") + s.live("allocate") for s in gpus.made.values()) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Memory.


def test_a_ring_that_was_halved_is_spoken_of(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, lambda name: Watched(name, faults=[("allocate", 2)]), n_slots=4)
    result = quantize_checkpoint(source, tmp_path / "one", "int4_g32", device=names(2))
    notes = result.run.notes
    assert [note.partition(":")[0] for note in notes] == ["cuda", "cuda"]
    assert all(re.fullmatch(r"cuda:\d: out of memory for 4 slots of .*; going on with 2 of .*", n) for n in notes), (
        notes
    )
    assert all(s.calls["pinned"] == 5 for s in gpus.made.values())
    shown = CliRunner().invoke(
        cli.app, ["quantize", str(source), str(tmp_path / "two"), "--scheme", "int4_g32", "--device", "cuda:0"]
    )
    assert shown.exit_code == 0, shown.output
    assert "cuda:0: out of memory for 4 slots of" in " ".join(shown.stdout.split())


# What the process is said to hold already.
HELD = 100_000_000


@pytest.fixture
def open_some(source: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Opens devices for a model under a memory limit; how many slots each has."""
    monkeypatch.setattr(ring, "anonymous_bytes", lambda: HELD)
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 2000)
    checkpoint = open_checkpoint(source)
    sink = open_sink("parquet", Output(source.parent / "never", is_directory=False), checkpoint.config)
    pieces = [p for entry in make_plan(checkpoint, sink, "int4_g32").entries for p in sink.pieces(entry)]

    def opened(names: list[str], limit: int | None, **options: Any) -> list[int]:
        with open_devices(names, checkpoint, pieces, memory_limit=limit, **options) as devices:
            return [len(device.slots) for device in devices]

    return opened


@pytest.mark.parametrize("options", [{}, {"validate": True}, {"read": "buffered"}], ids=str)
@pytest.mark.parametrize("names", [["cpu"], ["cpu", "reference"]], ids=str)
def test_a_limit_that_is_asked_for_is_enough(
    open_some: Callable[..., list[int]], names: list[str], options: dict[str, Any]
) -> None:
    """Of devices on the host: what the error says is needed is enough for a slot each; four times are not five."""
    fixed = HELD + ring.RESERVE
    with pytest.raises(InputError, match=r"memory limit 150 MB: this model needs at least \d+ MB") as caught:
        open_some(names, fixed, threads=8, **options)
    found = re.search(r"at least (\d+) MB", str(caught.value))
    assert found is not None
    enough = int(found[1]) * 1_000_000
    assert min(open_some(names, enough, threads=8, **options)) >= 1
    low, high = fixed, enough
    while high - low > 1:
        middle = (low + high) // 2
        try:
            open_some(names, middle, threads=8, **options)
            high = middle
        except InputError:
            low = middle
    assert enough - high < 1_000_000, "rounded up, and no more"
    each = high - fixed
    assert open_some(names, fixed + 4 * each, threads=8, **options)[0] == 4
    assert open_some(names, fixed + 5 * each - 1, threads=8, **options)[0] == 4
    assert open_some(["cpu"], None, threads=8, **options) == [8]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rings_share_what_a_limit_leaves(
    open_some: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    gpus = Gpus(monkeypatch, Watched, n_slots=16)
    room = 1_000_000
    slots = open_some(names(n).split(","), HELD + ring.RESERVE + room)
    assert len(set(slots)) == 1
    peaks = [s.peak for s in gpus.made.values()]
    each = peaks[0] // slots[0]
    assert sum(peaks) <= room < sum(peaks) + n * each or slots[0] == 16
    with pytest.raises(InputError, match=r"cuda:0: the memory limit leaves 1000 bytes, .* Raise --memory-limit"):
        open_some(names(n).split(","), HELD + ring.RESERVE + 1000 * n)


# ---------------------------------------------------------------------------------------------------------------------
# Over the stand-in for CuPy.


def picked(device: Any) -> list[str]:
    return [one.name for one in pick_devices(device)]


def test_names_of_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ShimLoader(), 3, 90)
    monkeypatch.setattr(backends, "_cuda_usable", lambda: (True, "the stand-in"))
    assert picked("all") == ["cuda:0", "cuda:1", "cuda:2"]
    assert picked("cuda:2,cuda:0") == picked(["cuda:2", "cuda:0"]) == picked(" cuda:2 , cuda:0") == ["cuda:2", "cuda:0"]
    assert picked(["cuda", "cpu"]) == ["cuda:0", "cpu"]
    for twice in ("cuda,cuda:0", ["cpu", "cpu"], "auto,cuda:0", []):
        with pytest.raises(DeviceError, match="name one device, or several different ones"):
            pick_devices(twice)
    with pytest.raises(DeviceError, match="choose auto, cpu, cuda"):
        pick_devices("cuda:0,")


def test_all_devices_where_there_is_none() -> None:
    if backends._cuda_usable()[0]:
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="'all' means every GPU, and there is none that can be used"):
        pick_devices("all")


@pytest.mark.compiler
def test_a_checkpoint_over_the_stand_in(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CudaStreams, its events and memory, and the compiled kernels, on two devices."""
    (tmp_path / "cubins").mkdir()
    _, host = backend_over(ShimLoader(), monkeypatch, tmp_path / "cubins", n_devices=2)
    monkeypatch.setattr(backends, "_cuda_usable", lambda: (True, "the stand-in"))
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 2000)
    monkeypatch.setattr(ring, "SLOT_BYTES", 1)
    monkeypatch.setattr(ring, "SLOTS", 2)
    found = []
    for device in ("reference", "all"):
        (tmp_path / device).mkdir()
        with watchdog(PATIENCE):
            result = quantize_checkpoint(source, tmp_path / device / "out", "int4_g32_asym", device=device)
        found.append(snapshot(tmp_path / device))
    assert differences(*found) == []
    assert result.run.devices == ("cuda:0", "cuda:1")
    assert all(gpu.n_launches > 0 for gpu in host.gpus)
