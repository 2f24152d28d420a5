"""The three backends behind one protocol. Same inputs, same bytes.

`reference` is the specification (NumPy), `cpu` is Numba, `cuda` is raw CUDA kernels. Backends are imported when
first asked for, so that importing the package neither needs a GPU library nor starts a compiler.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ..errors import DeviceError
from ..reference import Findings
from ..schemes import Scheme

log = logging.getLogger(__name__)


# The arguments of `Backend.quantize`: x, scheme, packed, scales, zeros.
Job = tuple[Any, Scheme, Any, Any, Any | None]


class Backend(Protocol):
    """What a backend does. Arguments are checked, row-major, and allocated by the caller; nothing is checked again.

    `x` is [rows, length] of a dtype in KERNEL_DTYPES, aligned to its element. `packed`, `scales` and `zeros` have the
    shapes that the scheme gives for it; `zeros` is None where that has nothing beside scales. All of them live where
    the backend computes: host arrays for `reference` and `cpu`, device arrays for `cuda`. Of granularity block, `x`
    begins where a square does.
    """

    name: str

    def put(self, x: Any) -> Any:
        """`x` where this backend computes: a host array itself for host backends, a device copy for `cuda`."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A new uninitialised array where this backend computes."""
        ...

    def get(self, a: Any, out: Any) -> None:
        """Copy an array of this backend into the host array `out`; returns when `out` holds it."""
        ...

    def quantize(self, x: Any, scheme: Scheme, packed: Any, scales: Any, zeros: Any | None) -> Findings:
        """Find scales and write codes in one pass, for every granularity but tensor.

        A global scale, in `zeros`, is known already and read.
        """
        ...

    def quantize_all(self, jobs: Sequence[Job]) -> list[Findings]:
        """`quantize` of several tensors, the findings of each; on the CPU all threads work on all of them at once."""
        ...

    def value_range(self, x: Any) -> tuple[float, float, Findings]:
        """(min(0, lowest), max(0, highest), findings) of all of `x`: the first pass of schemes that need it."""
        ...

    def encode(self, x: Any, scheme: Scheme, scales: Any, zeros: Any | None, packed: Any) -> None:
        """Write codes with scales that are already known, for granularity tensor."""
        ...

    def dequantize(self, packed: Any, scales: Any, zeros: Any | None, scheme: Scheme, out: Any) -> None:
        """Decode into `out` [rows, length] of a dtype in KERNEL_DTYPES."""
        ...


class Device(NamedTuple):
    """A device that was picked, and why: `name` is "cpu", "cuda:N" or "reference"."""

    name: str
    reason: str


def pick_device(device: str = "auto") -> Device:
    """Resolve a device name. "auto" takes the first usable GPU, else the CPU; what was asked for is never replaced.

    >>> pick_device("cpu")
    Device(name='cpu', reason='asked for')

    Raises DeviceError for an unknown name, and where cuda is asked for and cannot be used, saying why.
    """
    if device in ("cpu", "reference"):
        return Device(device, "asked for")
    if device == "auto":
        usable, reason = _cuda_usable()
        return Device("cuda:0" if usable else "cpu", reason if usable else f"no usable GPU: {reason}")
    match = re.fullmatch(r"cuda(?::([0-9]+))?", device)
    if match is None:
        raise DeviceError(f"device {device!r}: choose auto, cpu, cuda, cuda:N or reference")
    usable, reason = _cuda_usable()
    if not usable:
        raise DeviceError(f"device {device!r} was asked for and cannot be used: {reason}")
    return Device(f"cuda:{match[1] or 0}", "asked for")


def pick_devices(device: str | Sequence[str] = "auto") -> list[Device]:
    """Resolve one or several device names: a list, names with commas between them, or "all" usable GPUs.

    >>> [picked.name for picked in pick_devices("cpu")]
    ['cpu']

    Raises DeviceError as `pick_device` does, for "all" where there is no usable GPU, and for a device named twice.
    """
    if device == "all":
        usable, reason = _cuda_usable()
        if not usable:
            raise DeviceError(f"device 'all' means every GPU, and there is none that can be used: {reason}")
        from .cuda import n_devices

        return [Device(f"cuda:{i}", "one of all") for i in range(n_devices())]
    names = device.split(",") if isinstance(device, str) else device
    picked = [pick_device(name.strip()) for name in names]
    if not picked or len({p.name for p in picked}) < len(picked):
        raise DeviceError(f"device {device!r}: name one device, or several different ones")
    return picked


def get_backend(device: str = "auto", threads: int | None = None) -> Backend:
    """The backend for a device name (see `pick_device`), made once per device and thread count.

    `threads` bounds the CPU backend; by default it is ARROWQUANT_NUM_THREADS, else RAYON_NUM_THREADS, else every core
    this process may use.
    """
    picked = pick_device(device)
    log.debug("device %s: using %s (%s)", device, picked.name, picked.reason)
    return _make(picked.name, threads)


@functools.cache
def _make(name: str, threads: int | None) -> Backend:
    if name == "reference":
        from .numpy_reference import ReferenceBackend

        return ReferenceBackend()
    if name == "cpu":
        from .cpu import CpuBackend

        return CpuBackend(threads)
    from .cuda import CudaBackend

    return CudaBackend(int(name.partition(":")[2]))


@functools.cache
def _cuda_usable() -> tuple[bool, str]:
    """Whether CUDA can be used, and the device's name or the reason why not. Imports CuPy only where it is there."""
    if importlib.util.find_spec("cupy") is None:
        return False, "CuPy is not installed (pip install 'arrowquant_gpu[cuda13]' or [cuda12])"
    try:
        from .cuda import usable
    except ImportError as e:  # a CuPy whose own libraries are missing
        return False, f"CuPy cannot be imported: {e}"
    return usable()
