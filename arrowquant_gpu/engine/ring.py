"""`open_devices`: every device with a ring of slots, as large as is useful and the memory limit allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..backends import get_backend
from ..errors import InputError
from ..formats import Checkpoint
from ..formats.pieces import PIECE_BYTES, Piece
from . import Device, Reader, Sizes
from .computed import ComputedCheckpoint
from .converted import is_converted
from .host import HostDevice
from .loads import sizes
from .readers import open_reader

# A GPU's slots: large enough that a launch and two events cost nothing, and so many that reading and writing, at a few
# GB/s a thread, keep up with the link.
SLOT_BYTES, SLOTS = 2 * PIECE_BYTES, 16
# Left to the interpreter, compilers and libraries under a memory limit, beyond what they hold when a run begins.
RESERVE = 48 << 20


@contextlib.contextmanager
def open_devices(
    names: Sequence[str],
    source: Checkpoint,
    pieces: Sequence[Piece],
    *,
    threads: int | None = None,
    read: str = "auto",
    memory_limit: int | None = None,
    validate: bool = False,
) -> Iterator[list[Device]]:
    """The devices of these names (see `pick_device`), each with its ring and a reader of its own, until the body ends.

    threads: slots of a host device; by default all cores
    read: how the source is read, see readers.py; "auto" maps it for a host device and reads into the pinned slots else
    memory_limit: bytes of anonymous host memory and device memory together, the process as it is now included

    Raises InputError where the limit is too small, saying what is needed, and where gds is asked for without a GPU or
    together with validation, and DeviceError.
    """
    if read == "gds" and (validate or not all(name.startswith("cuda") for name in names)):
        raise InputError(
            "reader gds brings weights straight into GPU memory: it needs devices that are GPUs, and nothing to "
            "validate on the host. Choose another --read, or --read auto."
        )
    if read != "auto" and isinstance(source, ComputedCheckpoint):
        raise InputError(f"reader {read}: {source.why}; choose --read auto")
    smallest = Sizes(*(max(column, default=0) for column in zip(*map(sizes, pieces), strict=True)))
    room = None if memory_limit is None else max(0, memory_limit - anonymous_bytes() - RESERVE) // len(names)
    with contextlib.ExitStack() as stack:
        devices: list[Device] = []
        for name in names:
            is_host = not name.startswith("cuda")
            reader = open_reader(("mapped" if is_host else "buffered") if read == "auto" else read, source)
            stack.callback(reader.close)
            if is_host:
                n_threads = getattr(get_backend(name, threads), "threads", 1)
                each = _host_bytes(reader, smallest, pieces, validate)
                n = min(n_threads, max(1, len(pieces)))
                if room is not None:
                    n = min(n, room // max(1, each))
                if n < 1:
                    raise InputError(_too_small(memory_limit or 0, each * len(names)))
                # Threads that have no slot help those that have one.
                device: Device = HostDevice(get_backend(name, -(-n_threads // n)), reader, smallest, n)
            else:
                from .cuda import open_cuda

                # Locking memory takes time: no more slots than there are loads.
                n_loads = -(-sum(piece.n_bytes for piece in pieces) // SLOT_BYTES)
                device = open_cuda(name, reader, smallest, SLOT_BYTES, max(1, min(SLOTS, n_loads)), room)
            stack.callback(device.close)
            devices.append(device)
        yield devices


def _host_bytes(reader: Reader, smallest: Sizes, pieces: Sequence[Piece], validate: bool) -> int:
    """Bytes of a slot on the host: its buffers, and while it is at work decoded weights and weights converted."""
    buffers = smallest.results + (0 if reader.slack is None else smallest.source + reader.slack)
    quantized = [p for p in pieces if p.entry.scheme is not None]
    weights = 4 * max((p.rows * p.columns for p in quantized), default=0)
    return buffers + weights * (int(validate) + int(any(map(is_converted, quantized))))


def _too_small(limit: int, rings: int) -> str:
    needed = -(-(anonymous_bytes() + RESERVE + rings) // 1_000_000)
    return (
        f"memory limit {limit / 1e6:.0f} MB: this model needs at least {needed} MB, most of it for its "
        f"largest piece and for Python itself. Raise --memory-limit."
    )


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
