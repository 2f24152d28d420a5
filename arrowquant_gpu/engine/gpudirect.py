"""`GdsReader`: the source goes from the disk into GPU memory without passing the host (GPUDirect Storage), by kvikio.

Where the machine has no GPUDirect Storage, kvikio itself reads through host memory of its own.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from ..errors import DeviceError, SourceError
from ..formats import Checkpoint
from . import Load
from .readers import BLOCK, BufferedReader


class GdsReader(BufferedReader):
    """Reads into GPU memory; what must come to the host is read as by `BufferedReader`. See `Reader`.

    device_slack: bytes by which the GPU buffer of a load must be larger than the load

    Raises DeviceError where kvikio is not installed or cannot be loaded.
    """

    name = "gds"
    device_slack = 2 * (BLOCK - 1)

    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source)
        try:
            import kvikio
        except (ImportError, OSError) as e:
            raise DeviceError(
                f"reading by GPUDirect needs kvikio, which cannot be imported ({e}): pip install "
                f"'arrowquant_gpu[gds13]' (or gds12, as the CUDA of the driver), or read buffered"
            ) from e
        self._open_cufile = kvikio.CuFile
        self._lock = threading.Lock()
        self._cufiles: dict[Path, Any] = {}

    def read_device(self, load: Load, buffer: Any) -> Any:
        """The bytes [load.n_bytes] of a load, a view of `buffer` at their position in the file modulo 4096.

        buffer: contiguous uint8 array on the GPU, of load.n_bytes + device_slack or more; best at an address that is
        a multiple of 4096, since only whole pages of file and GPU go the direct way. It belongs to the caller, and
        nothing that was queued on a stream may still use it. Returns when the bytes are there.

        Raises SourceError, naming file and position, for a failed or short read.
        """
        assert buffer.size >= load.n_bytes + self.device_slack
        head = load.offset % BLOCK
        if load.n_bytes:
            begin, size = load.offset - head, -(-(head + load.n_bytes) // BLOCK) * BLOCK
            cufile, n_file = self._cufile(load.file)
            # kvikio takes a read over the end of the file for an error.
            size = max(head + load.n_bytes, min(size, n_file - begin))
            try:
                got = cufile.pread(buffer[:size], size, begin).get()
            except (RuntimeError, OSError) as e:  # kvikio translates errors of the C++ library, cuFile and CUDA so
                raise SourceError(
                    f"{load.file}: {load.n_bytes} bytes at {load.offset} cannot be read into GPU memory: {e}"
                ) from e
            if got < head + load.n_bytes:
                raise SourceError(
                    f"{load.file}: {load.n_bytes} bytes at {load.offset} wanted, {max(0, got - head)} got: the file "
                    f"became shorter while it was read. Run again with a file that nothing changes."
                )
        return buffer[head : head + load.n_bytes]

    def close(self) -> None:
        with self._lock:
            while self._cufiles:
                self._cufiles.popitem()[1].close()
        super().close()

    def _cufile(self, file: Path) -> tuple[Any, int]:
        """The file as kvikio has it, and its size; opened when it is known to be the one whose header was read."""
        n_bytes = os.fstat(self._descriptors.of(file)).st_size
        with self._lock:
            if file not in self._cufiles:
                try:
                    self._cufiles[file] = self._open_cufile(file, "r")
                except (RuntimeError, OSError) as e:
                    raise SourceError(f"{file}: kvikio cannot open it: {e}") from e
            return self._cufiles[file], n_bytes
