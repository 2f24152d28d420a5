"""The three backends behind one protocol. Same inputs, same bytes.

`reference` is the specification (NumPy), `cpu` is Numba, `cuda` is raw CUDA kernels. Backends are imported when
first asked for, so that importing the package neither needs a GPU library nor starts a compiler.
"""

from __future__ import annotations

from typing import Any, Protocol

from ..reference import Findings
from ..schemes import Scheme


class Backend(Protocol):
    """What a backend does. Arguments are checked, row-major, and allocated by the caller; nothing is checked again.

    `x` is [rows, length] of a dtype in KERNEL_DTYPES, aligned to its element. `packed`, `scales` and `zeros` have the
    shapes that the scheme gives for it; `zeros` is None where the scheme is symmetric. All of them live where the
    backend computes: host arrays for `reference` and `cpu`, device arrays for `cuda`.
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
        """Find scales and write codes in one pass, for granularity group or channel."""
        ...

    def value_range(self, x: Any) -> tuple[float, float, Findings]:
        """(min(0, lowest), max(0, highest), findings) of all of `x`: the first pass of granularity tensor."""
        ...

    def encode(self, x: Any, scheme: Scheme, scales: Any, zeros: Any | None, packed: Any) -> None:
        """Write codes with scales that are already known."""
        ...

    def dequantize(self, packed: Any, scales: Any, zeros: Any | None, scheme: Scheme, out: Any) -> None:
        """Decode into `out` [rows, length] of a dtype in KERNEL_DTYPES."""
        ...
