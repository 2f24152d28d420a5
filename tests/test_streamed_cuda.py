"""The ring of a CUDA device over the stand-in for CuPy, and faults planted in the engine: each must be found."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arrowquant_gpu import trace
from arrowquant_gpu.engine.streamed import StreamedDevice
from arrowquant_gpu.errors import DeviceError, DeviceMemoryError
from arrowquant_gpu.formats import pieces as pieces_module

from .gpuless.device import Host
from .gpuless.fake_cupy import ENGINE
from .gpuless.loaders import ShimLoader
from .gpuless.stand_in import Edit, backend_over, edited_module
from .simulated_streams import SimulatedStreams
from .test_streamed import GRIDS, MIXED, PIECE_BYTES, SLOT_BYTES, BytesReader, Model, run_all

BATCHES, STREAMED = "arrowquant_gpu.engine.batches", "arrowquant_gpu.engine.streamed"

FEW: tuple[tuple[tuple[int, ...], str, str | None], ...] = (
    ((40, 96), "bfloat16", "int4_g32_asym"),
    ((30, 50), "float8_e4m3fn", "int8_channel_asym"),
    ((7,), "float32", None),
    ((33, 96), "float32", "int4_tensor_asym"),
    ((5, 32), "bfloat16", "int4_g32_asym"),
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", PIECE_BYTES)


def open_over(host: Host, model: Model, *, n_slots: int = 1, index: int = 0, edit: Edit | None = None) -> Any:
    """The ring of one of the stand-in's devices, with a fault planted in engine/cuda.py."""
    module = importlib.import_module(ENGINE) if edit is None else edited_module(ENGINE, edit)
    return module.open_cuda(f"cuda:{index}", BytesReader(model.data), model.smallest, SLOT_BYTES, n_slots)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    return backend_over(ShimLoader(), monkeypatch, tmp_path, n_devices=2)[1]


@pytest.mark.compiler
@pytest.mark.parametrize(("index", "n_slots"), [(0, 1), (0, 4), (1, 2)])
def test_a_ring_on_the_stand_in(host: Host, index: int, n_slots: int) -> None:
    model = Model(FEW * 3, index, start=8 * index)
    device = open_over(host, model, n_slots=n_slots, index=index)
    assert device.name == f"cuda:{index}"
    run_all(device, model)
    assert [gpu.n_launches > 0 for gpu in host.gpus] == [index == 0, index == 1]
    device.close()
    assert not host.gpus[index].reserved


@pytest.mark.compiler
def test_every_family_of_grids_on_the_stand_in(host: Host) -> None:
    model = Model(GRIDS, 2)
    device = open_over(host, model, n_slots=2)
    run_all(device, model)
    device.close()


@pytest.mark.compiler
def test_a_timeline_has_the_times_of_the_streams(host: Host, tmp_path: Path) -> None:
    model = Model(FEW, 0)
    device = open_over(host, model)
    with trace.timeline(tmp_path / "t.json") as timeline:
        run_all(device, model)
    device.close()
    summary = timeline.summary()
    assert {"cuda:0 h2d", "cuda:0 kernel", "cuda:0 d2h"} <= set(summary["tracks"])
    assert all(0 <= row["start"] <= row["end"] <= summary["seconds"] for row in summary["tracks"].values())


def test_a_gpu_without_room(host: Host) -> None:
    model = Model(FEW, 0)
    host.gpus[0].memory = 200_000
    device = open_over(host, model, n_slots=16)
    assert device.notes[0] == "cuda:0: out of memory for 16 slots of 0.03125 MiB; going on with 8 of 0.03125 MiB"
    assert 0 < len(device.slots) < 8
    device.close()
    host.gpus[0].memory = 1000
    with pytest.raises(DeviceMemoryError, match=r"cuda:0: out of memory .*\(cuda:0: cudaErrorMemoryAllocation"):
        open_over(host, model)


def test_a_gpu_that_is_not_there(host: Host) -> None:
    with pytest.raises(DeviceError, match="cuda:2: cudaErrorInvalidDevice"):
        open_over(host, Model(FEW, 0), index=2)


KERNEL = 'with current(self._index), self._streams["kernel"]:\n            self._backend.launch_quantize'
MEMORY = "with current(self._index):\n            memory = cupy.cuda.MemoryPointer"
ON_H2D = 'event.record(self._streams["h2d"])'
CUDA_FAULTS: dict[str, tuple[Edit, str]] = {
    "no wait between streams": (("self._streams[stage].wait_event(event)", "pass"), "differ|assert"),
    "no wait of the host": (("            event.synchronize()", "            pass"), "differ|assert"),
    "an event of the wrong stream": (("event.record(self._streams[stage])", ON_H2D), "differ|assert"),
    "a launch on the null stream": ((KERNEL, KERNEL.replace(', self._streams["kernel"]', "")), "differ|assert"),
    "memory of another device": ((MEMORY, MEMORY.replace("self._index", "0")), "memory of device 0 on a stream of 1"),
    "counters that are not cleared": (("target.data.memset_async(0,", "(lambda *_: 0)(0,"), "assert"),
    "a copy on the null stream": (('source, stream=self._streams["h2d"]', "source"), "differ|assert"),
}


@pytest.mark.compiler
@pytest.mark.parametrize("name", CUDA_FAULTS)
def test_a_fault_in_the_streams_is_found(name: str, host: Host) -> None:
    edit, message = CUDA_FAULTS[name]
    model = Model(FEW, 0)
    with pytest.raises(AssertionError, match=message):
        run_all(open_over(host, model, index=1, edit=edit), model)


# ---------------------------------------------------------------------------------------------------------------------
# Faults planted in engine/streamed.py and engine/batches.py, over the test device.


def check_all(make: Callable[..., StreamedDevice]) -> None:
    """Everything at once, with late streams."""
    model = Model(MIXED, 1, start=3)
    run_all(make(SimulatedStreams(delay=2e-3), BytesReader(model.data), model.smallest, SLOT_BYTES, 2), model)


def check_aligned(make: Callable[..., StreamedDevice]) -> None:
    """Pieces of odd sizes, one after the other."""
    tensors = [((3, 5), "bfloat16", "int4_g5"), ((4, 4), "float32", "int8_channel"), ((1, 3), "float16", "int4_g2")] * 9
    model = Model(tensors, 1)
    run_all(make(SimulatedStreams(), BytesReader(model.data), model.smallest, SLOT_BYTES, 1), model)


def check_failing(make: Callable[..., StreamedDevice]) -> None:
    """A wait that fails while everything else is still to come."""
    model = Model([((40, 96), "bfloat16", "int4_g32")], 0)
    streams = SimulatedStreams(delay=0.05, faults=[("wait", 0)])
    device = make(streams, BytesReader(model.data), model.smallest, SLOT_BYTES, 1)
    with pytest.raises(DeviceError):
        run_all(device, model)
    assert streams.n_under_way() == 0, "still under way"


def check_shrinking(make: Callable[..., StreamedDevice]) -> None:
    """Memory for less than half the ring."""
    model = Model(MIXED, 5)
    streams = SimulatedStreams(faults=[("allocate", 3)])
    device = make(streams, BytesReader(model.data), model.smallest, SLOT_BYTES, 8)
    each = sum(a.nbytes for a in (device.slots[0]._device_input, device.slots[0]._device_results))
    assert streams.live("allocate") == 4 * each, "memory of slots that were given up"


Check = Callable[[Callable[..., StreamedDevice]], None]
COPY = "self._device_input[at : at + n], read.data"
DOWN = "self._results[: batch.n_results], self._device_results[: batch.n_results]"
GIVEN = "if placed.given is not None:\n                    streams"
FREED = "            self._free()\n            # Its frames"
ENGINE_FAULTS: dict[str, tuple[str, Edit, Check]] = {
    "the kernel does not wait": (STREAMED, ('streams.after("kernel", copied[1])', "pass"), check_all),
    "the way down does not wait": (STREAMED, ('streams.after("d2h", computed[1])', "pass"), check_all),
    "the host does not wait": (STREAMED, ('self._streams.wait(marks["d2h"][1])', "pass"), check_all),
    "the host waits for the kernel": (STREAMED, ('wait(marks["d2h"]', 'wait(marks["kernel"]'), check_all),
    "stale counters": (STREAMED, ("if batch.n_counters:", "if False:"), check_all),
    "a wrong offset": (STREAMED, (COPY, COPY.replace("[at : at", "[at + 16 : at + 16")), check_all),
    "converted over the others": (STREAMED, ("+ (batch.n_direct if placed.is_converted else 0)", ""), check_all),
    "bytes taken for floats": (STREAMED, ("np.float32 if placed.is_converted else", ""), check_all),
    "scales that stay behind": (STREAMED, (GIVEN, GIVEN.replace("placed.given is not None", "False")), check_all),
    "a short way down": (STREAMED, (DOWN, DOWN.replace("n_results", "n_codes")), check_all),
    "a wrong part of the load": (STREAMED, ("start = piece.offset - self.load.offset", "start = 0"), check_all),
    "pieces off their element": (BATCHES, ("(at + n) % VECTOR == 0", "True"), check_aligned),
    "pieces over each other": (BATCHES, ("self.n_direct = up(at + n_bytes)", "self.n_direct = up(at)"), check_all),
    "codes over each other": (BATCHES, ("self.n_codes += need.results - ALIGNMENT", "self.n_codes += 0"), check_all),
    "one counter for all": (BATCHES, ("self.n_counters += 1", "self.n_counters = 1"), check_all),
    "no room is looked at": (BATCHES, ("            if is_full:\n", "            if False:\n"), check_all),
    "a failure that leaves work behind": (STREAMED, ("            self._settle()\n", ""), check_failing),
    "slots that are not freed": (STREAMED, (FREED, FREED.partition("\n")[2]), check_shrinking),
}


@pytest.mark.parametrize("name", [None, *ENGINE_FAULTS])
def test_a_fault_in_the_engine_is_found(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    where, edit, check = (None, None, None) if name is None else ENGINE_FAULTS[name]
    for module in (BATCHES, STREAMED):
        monkeypatch.setitem(sys.modules, module, sys.modules[module])
        made = edited_module(module, edit if module == where else None)
    if check is None:
        for sound in (check_all, check_aligned, check_failing, check_shrinking):
            sound(made.StreamedDevice)
    else:
        with pytest.raises((AssertionError, ValueError, DeviceError)):
            check(made.StreamedDevice)
