"""GPUs "cuda:0", "cuda:1" ... that are SimulatedStreams, for everything that takes the name of a device."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest

from arrowquant_gpu import backends
from arrowquant_gpu.engine import Reader, Sizes, ring
from arrowquant_gpu.engine.streamed import StreamedDevice

from .simulated_streams import SimulatedStreams


def simulate(
    patch: pytest.MonkeyPatch, make: Callable[[str], SimulatedStreams], *, slot_bytes: int, n_slots: int
) -> None:
    """Until `patch` is undone, a CUDA device of any number can be used, and its streams are `make(name)`."""

    def open_cuda(
        name: str, reader: Reader, smallest: Sizes, slot_bytes: int, n_slots: int, max_bytes: int | None
    ) -> StreamedDevice:
        return StreamedDevice(make(name), reader, smallest, slot_bytes, n_slots, max_bytes)

    module = types.ModuleType("arrowquant_gpu.engine.cuda")
    module.open_cuda = open_cuda  # type: ignore[attr-defined]
    patch.setitem(sys.modules, module.__name__, module)
    patch.setattr(backends, "_cuda_usable", lambda: (True, "simulated"))
    patch.setattr(ring, "SLOTS", n_slots)
    patch.setattr(ring, "SLOT_BYTES", slot_bytes)
