"""Memory of a simulated launch: global allocations, constants, and the shared memory of each block.

Every access is checked for bounds and alignment, and noted for races. An address of global memory is the number of an
allocation in its upper bits and an offset in its lower 40, so that running past one allocation never hits another.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .errors import KernelFault
from .ptx_integers import integer_dtype
from .ptx_race import Epochs, GlobalShadow, SharedShadow, Threads

OFFSET_BITS = 40
OFFSET_MASK = (1 << OFFSET_BITS) - 1


class GlobalMemory:
    """The allocations of the arguments, then the constants of the module. Allocation 0 is never there: null."""

    def __init__(self, allocations: list[np.ndarray], constants: dict[str, np.ndarray]):
        self.allocations = [*allocations, *constants.values()]
        self.shadows = [GlobalShadow(a.size) for a in self.allocations]
        first = len(allocations)
        self.symbols = {name: self.address(first + i, 0) for i, name in enumerate(constants)}
        self.n_writable = first

    @staticmethod
    def address(allocation: int, offset: int) -> int:
        """The address of a byte; null for allocation -1."""
        return (allocation + 1 << OFFSET_BITS) + offset if allocation >= 0 else 0

    def _parts(self, addresses: np.ndarray, n_bytes: int) -> Iterator[tuple[int, np.ndarray | slice, np.ndarray]]:
        """(allocation, which of the threads, their offsets), checked."""
        numbers = (addresses >> OFFSET_BITS) - 1
        for number in np.unique(numbers):
            which = slice(None) if (numbers == number).all() else np.flatnonzero(numbers == number)
            offsets = addresses[which] & OFFSET_MASK
            if not 0 <= number < len(self.allocations):
                raise KernelFault(f"access through a wild pointer {int(addresses.min()):#x}")
            size = self.allocations[number].size
            if (offsets % n_bytes).any():
                raise KernelFault(f"misaligned access of {n_bytes} bytes at offset {int(offsets.max())}")
            if offsets.max() + n_bytes > size:
                raise KernelFault(f"access out of bounds: byte {int(offsets.max()) + n_bytes} of {size}")
            yield int(number), which, offsets

    def load(self, addresses: np.ndarray, n_bytes: int, count: int, threads: Threads) -> np.ndarray:
        """[threads, count] unsigned values of `n_bytes` each."""
        result = np.empty((addresses.size, count), f"u{n_bytes}")
        for number, which, offsets in self._parts(addresses, n_bytes * count):
            self.shadows[number].read(offsets, n_bytes * count, threads[which])
            result[which] = self._cells(number, n_bytes, count)[offsets // (n_bytes * count)]
        return result

    def store(self, addresses: np.ndarray, values: np.ndarray, threads: Threads) -> None:
        """Store [threads, count] unsigned values."""
        n_bytes, count = values.dtype.itemsize, values.shape[1]
        for number, which, offsets in self._parts(addresses, n_bytes * count):
            self._check_writable(number)
            self.shadows[number].write(offsets, n_bytes * count, threads[which])
            self._cells(number, n_bytes, count)[offsets // (n_bytes * count)] = values[which]

    def atomic(self, operation: str, ptx_type: str, addresses: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Apply an atomic operation thread by thread in order; the old values."""
        dtype = integer_dtype(ptx_type)
        result = np.empty(addresses.shape, dtype)
        values = np.broadcast_to(values, addresses.shape).view(dtype)
        apply = {
            "add": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or, "and": np.bitwise_and,
            "exch": lambda old, new: new,
        }[operation]  # fmt: skip
        for number, which, offsets in self._parts(addresses, dtype.itemsize):
            self._check_writable(number)
            self.shadows[number].update(offsets, dtype.itemsize)
            cells = self._cells(number, dtype.itemsize, 1)[:, 0].view(dtype)
            for thread, cell in zip(np.arange(addresses.size)[which], offsets // dtype.itemsize, strict=True):
                result[thread] = cells[cell]
                cells[cell] = apply(cells[cell], values[thread])
        return result

    def _cells(self, number: int, n_bytes: int, count: int) -> np.ndarray:
        memory = self.allocations[number]
        whole = memory.size // (n_bytes * count) * n_bytes * count
        return memory[:whole].view(f"u{n_bytes}").reshape(-1, count)

    def _check_writable(self, number: int) -> None:
        if number >= self.n_writable or not self.allocations[number].flags.writeable:
            raise KernelFault("write to read-only memory")


class SharedMemory:
    """Shared memory of the blocks that run together; addresses are offsets."""

    def __init__(self, n_blocks: int, n_bytes: int, epochs: Epochs, warps_per_block: int):
        self.n_bytes = -(-n_bytes // 16) * 16
        self.declared = n_bytes
        self.bytes = np.full((n_blocks, self.n_bytes), 0xA5, np.uint8)
        self.shadow = SharedShadow(n_blocks, self.n_bytes, epochs, warps_per_block)

    def _check(self, offsets: np.ndarray, n_bytes: int) -> None:
        if (offsets % n_bytes).any():
            raise KernelFault(f"misaligned access of {n_bytes} bytes in shared memory")
        if (offsets < 0).any() or (offsets + n_bytes > self.declared).any():
            end = int(offsets.max()) + n_bytes
            raise KernelFault(f"access out of bounds of shared memory: byte {end} of {self.declared}")

    def load(
        self, blocks: np.ndarray, offsets: np.ndarray, n_bytes: int, count: int, threads: np.ndarray
    ) -> np.ndarray:
        """[threads, count] unsigned values; `threads` are numbered within their block."""
        self._check(offsets, n_bytes * count)
        self.shadow.read(blocks, offsets, n_bytes * count, threads)
        return self._cells(n_bytes, count)[blocks, offsets // (n_bytes * count)]

    def store(self, blocks: np.ndarray, offsets: np.ndarray, values: np.ndarray, threads: np.ndarray) -> None:
        n_bytes, count = values.dtype.itemsize, values.shape[1]
        self._check(offsets, n_bytes * count)
        self.shadow.write(blocks, offsets, n_bytes * count, threads)
        self._cells(n_bytes, count)[blocks, offsets // (n_bytes * count)] = values

    def _cells(self, n_bytes: int, count: int) -> np.ndarray:
        return self.bytes.view(f"u{n_bytes}").reshape(self.bytes.shape[0], -1, count)
