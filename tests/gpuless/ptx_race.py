"""Who touched which byte: data races between threads, and shared memory read before it was written.

A barrier orders all threads of a block, __syncwarp the lanes of a warp, and nothing orders different blocks. Two
accesses of one byte by different threads, one of them a write, are a fault unless one of these lies between them.
"""

from __future__ import annotations

import numpy as np

from .errors import KernelFault

NOBODY, SEVERAL, ATOMIC = -1, -2, -3


class GlobalShadow:
    """The last writer of every byte of one allocation, over a whole launch."""

    def __init__(self, n_bytes: int):
        self.writer = np.full(-(-n_bytes // 16) * 16, NOBODY, np.int32)
        self.written = False

    def _cells(self, offsets: np.ndarray, n_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        return self.writer.reshape(-1, n_bytes), offsets // n_bytes

    def read(self, offsets: np.ndarray, n_bytes: int, threads: np.ndarray) -> None:
        if self.written:
            cells, rows = self._cells(offsets, n_bytes)
            self._refuse((cells[rows] != NOBODY) & (cells[rows] != threads[:, None]), "reads what another thread wrote")

    def write(self, offsets: np.ndarray, n_bytes: int, threads: np.ndarray) -> None:
        cells, rows = self._cells(offsets, n_bytes)
        if self.written:
            self._refuse((cells[rows] != NOBODY) & (cells[rows] != threads[:, None]), "two threads write one address")
        cells[rows] = threads[:, None]
        self._refuse(cells[rows] != threads[:, None], "two threads write one address")
        self.written = True

    def update(self, offsets: np.ndarray, n_bytes: int) -> None:
        """An atomic operation, which only other atomic ones may meet."""
        cells, rows = self._cells(offsets, n_bytes)
        self._refuse((cells[rows] != NOBODY) & (cells[rows] != ATOMIC), "an atomic operation meets a plain write")
        cells[rows] = ATOMIC
        self.written = True

    @staticmethod
    def _refuse(clash: np.ndarray, what: str) -> None:
        if clash.any():
            raise KernelFault(f"race in global memory: {what}")


class Epochs:
    """How many barriers each block, and how many __syncwarp each warp, has passed."""

    def __init__(self, n_blocks: int, n_warps: int):
        self.block = np.zeros(n_blocks, np.int32)
        self.warp = np.zeros(n_warps, np.int32)


class SharedShadow:
    """The last writer and the readers of every byte of shared memory since the last barrier; one row per block."""

    def __init__(self, n_blocks: int, n_bytes: int, epochs: Epochs, warps_per_block: int):
        self.n_bytes, self.epochs, self.warps_per_block = n_bytes, epochs, warps_per_block
        size = n_blocks * n_bytes

        def column(value: int) -> np.ndarray:
            return np.full(size, value, np.int32)

        self.writer, self.write_epoch, self.write_warp_epoch = column(NOBODY), column(0), column(0)
        self.reader, self.reader_warp = column(NOBODY), column(NOBODY)
        self.read_epoch, self.read_warp_epoch = column(-1), column(0)

    def _spread(
        self, blocks: np.ndarray, offsets: np.ndarray, n_bytes: int, threads: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Flat byte index, thread, warp in block, block epoch and warp epoch of every byte touched."""
        index = (blocks * self.n_bytes + offsets)[:, None] + np.arange(n_bytes)
        warp = threads // 32
        warp_epoch = self.epochs.warp[blocks * self.warps_per_block + warp]
        columns = (threads, warp, self.epochs.block[blocks], warp_epoch)
        return index.reshape(-1), *(np.repeat(column.astype(np.int32), n_bytes) for column in columns)

    def read(self, blocks: np.ndarray, offsets: np.ndarray, n_bytes: int, threads: np.ndarray) -> None:
        i, thread, warp, epoch, warp_epoch = self._spread(blocks, offsets, n_bytes, threads)
        writer = self.writer[i]
        if (writer == NOBODY).any():
            raise KernelFault("reads shared memory that nobody wrote")
        ordered = (self.write_epoch[i] != epoch) | (writer == thread)
        ordered |= (writer // 32 == warp) & (self.write_warp_epoch[i] < warp_epoch)
        if not ordered.all():
            raise KernelFault("race in shared memory: a read without a barrier after another thread's write")
        fresh = self.read_epoch[i] != epoch
        for column, value in ((self.reader, thread), (self.reader_warp, warp)):
            merged = np.where(fresh | (column[i] == value), value, SEVERAL)
            column[i] = merged
            column[i[column[i] != merged]] = SEVERAL  # two lanes of this very instruction
        self.read_warp_epoch[i] = np.where(fresh, warp_epoch, np.maximum(self.read_warp_epoch[i], warp_epoch))
        self.read_epoch[i] = epoch

    def write(self, blocks: np.ndarray, offsets: np.ndarray, n_bytes: int, threads: np.ndarray) -> None:
        i, thread, warp, epoch, warp_epoch = self._spread(blocks, offsets, n_bytes, threads)
        writer = self.writer[i]
        ordered = (writer == NOBODY) | (self.write_epoch[i] != epoch) | (writer == thread)
        ordered |= (writer // 32 == warp) & (self.write_warp_epoch[i] < warp_epoch)
        if not ordered.all():
            raise KernelFault("race in shared memory: two threads write one address without a barrier between")
        ordered = (self.read_epoch[i] != epoch) | (self.reader[i] == thread)
        ordered |= (self.reader_warp[i] == warp) & (self.read_warp_epoch[i] < warp_epoch)
        if not ordered.all():
            raise KernelFault("race in shared memory: a write without a barrier after another thread's read")
        self.writer[i] = thread
        if (self.writer[i] != thread).any():
            raise KernelFault("race in shared memory: two threads write one address at once")
        self.write_epoch[i], self.write_warp_epoch[i] = epoch, warp_epoch
