"""Launch arguments, checked as strictly as a typed call: what the shim and the simulator share.

NumPy arrays stand for device memory. The array that owns the memory stands for one allocation, aligned like device
memory to 256 bytes; a view of it is a pointer into that allocation. So `x[1:]` is a misaligned pointer, two views of
one array alias, and reading beyond the owner is out of bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import KernelFault

ALIGNMENT = 256
MAX_THREADS = 1024
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter: its name or position, its kind and its width in bytes.

    `kind` is "pointer", "float", "integer", or "any" where the source of the signature does not tell.
    """

    name: str
    kind: str
    n_bytes: int


@dataclass(frozen=True)
class Pointer:
    """An argument that points `offset` bytes into allocation number `allocation`; -1 is the null pointer."""

    allocation: int
    offset: int


@dataclass(frozen=True)
class Bound:
    """Arguments in the order of the parameters, and the allocations that the pointers among them refer to.

    Every allocation is a flat uint8 view of the caller's memory: what a kernel writes there, the caller sees.
    """

    values: list[Pointer | bytes]
    allocations: list[np.ndarray]


def owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory `array` is a view of, as far as NumPy knows."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def bind(args: Sequence[object], parameters: Sequence[Parameter], entry: str) -> Bound:
    """Match `args` with `parameters`; KernelFault for a wrong count, width or kind."""
    if len(args) != len(parameters):
        raise KernelFault(f"{entry}: {len(args)} arguments for {len(parameters)} parameters")
    owners: list[np.ndarray] = []
    values: list[Pointer | bytes] = []
    for position, (value, parameter) in enumerate(zip(args, parameters, strict=True)):
        what = f"{entry}: argument {position} ({parameter.name})"
        if value is None or isinstance(value, np.ndarray):
            if parameter.kind not in ("pointer", "any") or parameter.n_bytes != 8:
                raise KernelFault(f"{what} is an array, the parameter is {_describe(parameter)}")
            values.append(Pointer(-1, 0) if value is None else _point(value, owners, what))
        elif isinstance(value, np.generic):
            values.append(_scalar(value, parameter, what))
        else:
            raise KernelFault(f"{what} is a {type(value).__name__}; pass a NumPy array or a NumPy scalar")
    return Bound(values, [_flat(array) for array in owners])


def _describe(parameter: Parameter) -> str:
    return f"{'a value' if parameter.kind == 'any' else parameter.kind} of {parameter.n_bytes} bytes"


def _point(array: np.ndarray, owners: list[np.ndarray], what: str) -> Pointer:
    root = owner(array)
    if not array.flags.c_contiguous or not root.flags.c_contiguous:
        raise KernelFault(f"{what}: the array is not contiguous, and a kernel ignores strides")
    index = next((i for i, known in enumerate(owners) if known is root), len(owners))
    if index == len(owners):
        owners.append(root)
    return Pointer(index, array.ctypes.data - root.ctypes.data)


def _scalar(value: np.generic, parameter: Parameter, what: str) -> bytes:
    kinds = {"f": "float", "i": "integer", "u": "integer", "b": "integer"}
    kind = kinds.get(value.dtype.kind, "other")
    if value.dtype.itemsize != parameter.n_bytes or parameter.kind not in (kind, "any"):
        raise KernelFault(f"{what} is {value.dtype.name}, the parameter is {_describe(parameter)}")
    return value.tobytes()


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)


def dimensions(
    grid: Sequence[int], block: Sequence[int], entry: str
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block as triples; KernelFault for sizes that no GPU launches."""
    gx, gy, gz = (*map(int, grid), 1, 1)[:3]
    bx, by, bz = (*map(int, block), 1, 1)[:3]
    wide_grid, wide_block = (gx, gy, gz), (bx, by, bz)
    if any(not 1 <= n <= limit for n, limit in zip(wide_grid, MAX_GRID, strict=True)):
        raise KernelFault(f"{entry}: grid {wide_grid} is empty or beyond {MAX_GRID}")
    if bx * by * bz > MAX_THREADS or any(not 1 <= n <= limit for n, limit in zip(wide_block, MAX_BLOCK, strict=True)):
        raise KernelFault(f"{entry}: block {wide_block} is empty or beyond {MAX_THREADS} threads")
    return wide_grid, wide_block


def device_array(values: np.ndarray, offset: int = 0) -> np.ndarray:
    """A copy of `values` that starts `offset` elements into its allocation: for tests of unaligned pointers.

    >>> x = device_array(np.arange(4, dtype=np.float32), offset=1)
    >>> x.tolist(), owner(x).size
    ([0.0, 1.0, 2.0, 3.0], 5)
    """
    memory = np.zeros(offset + values.size, values.dtype)
    memory[offset:] = values.reshape(-1)
    return memory[offset:].reshape(values.shape)
