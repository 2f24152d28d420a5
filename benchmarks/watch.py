"""Peak memory of a process, watched from outside; and how much of a checkpoint is in the page cache.

Anonymous memory is what a process allocates; pages of mapped files are the kernel's to drop.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

PERIOD = 0.005  # seconds between two samples


class Peak(NamedTuple):
    """The largest samples, in bytes; `device` is 0 where no GPU was watched."""

    anonymous: int
    device: int
    seconds: float


def anonymous_bytes(pid: int) -> int:
    """Resident anonymous memory of a process now; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def watch(command: Sequence[str], device_bytes: Callable[[], int] = lambda: 0) -> Peak:
    """Run a command until it ends. `device_bytes` says how much memory of the GPU is taken by anybody now.

    Raises SystemExit where the command fails.
    """
    start, before = time.perf_counter(), device_bytes()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        anonymous = device = 0
        while process.poll() is None:
            anonymous = max(anonymous, anonymous_bytes(process.pid))
            device = max(device, device_bytes() - before)
            time.sleep(PERIOD)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Peak(anonymous, device, time.perf_counter() - start)


def cached_share(folder: Path) -> float:
    """The part, 0 to 1, of the safetensors files of a folder that is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    n_pages = n_cached = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            data = np.frombuffer(mapped, np.uint8)
            pages = np.zeros(-(-data.size // mmap.PAGESIZE), np.uint8)
            if libc.mincore(data.ctypes.data, data.size, pages.ctypes.data):
                raise OSError(ctypes.get_errno(), "mincore", str(path))
            n_pages, n_cached = n_pages + pages.size, n_cached + int((pages & 1).sum())
            del data
    return n_cached / n_pages
