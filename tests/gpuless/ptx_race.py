"""Who touched which byte: data races between threads, and shared memory read before it was written.

A barrier orders all threads of a block, __syncwarp the lanes of a warp, and nothing orders different blocks. Two
accesses of one byte by different threads, one of them a write, are a fault unless one of these lies between them.
In global memory a read before another thread's write is not seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import KernelFault

NOBODY, SEVERAL = -1, -2
# Larger allocations are of tests that simulate a part of a grid, and are not watched.
WATCHED_BYTES = 1 << 28


class Epochs:
    """How many barriers each block, and how many __syncwarp each warp, has passed."""

    def __init__(self, n_blocks: int, n_warps: int):
        self.block = np.zeros(n_blocks, np.int32)
        self.warp = np.zeros(n_warps, np.int32)


@dataclass(frozen=True)
class Threads:
    """The threads that do an access: their number in the whole grid, and the epochs they are in.

    Blocks are padded to whole warps, `per_block` threads each, so that a number tells the block and the warp.
    """

    number: np.ndarray
    per_block: int
    block_epoch: np.ndarray
    warp_epoch: np.ndarray

    def __getitem__(self, which: np.ndarray | slice) -> Threads:
        return Threads(self.number[which], self.per_block, self.block_epoch[which], self.warp_epoch[which])


class GlobalShadow:
    """The last writer of every byte of one allocation, over a whole launch: its number + 1, 0 for nobody."""

    ATOMIC = -1

    def __init__(self, n_bytes: int):
        self.n_bytes = n_bytes
        self.is_watched = n_bytes <= WATCHED_BYTES
        self.written = False

    def _prepare(self) -> None:
        if not self.written:
            size = -(-self.n_bytes // 16) * 16
            self.writer, self.block_epoch, self.warp_epoch = (np.zeros(size, np.int32) for _ in range(3))
            self.written = True

    def read(self, offsets: np.ndarray, n_bytes: int, who: Threads) -> None:
        if self.written:
            self._refuse_unordered(offsets, n_bytes, who, "reads what another thread wrote")

    def write(self, offsets: np.ndarray, n_bytes: int, who: Threads) -> None:
        if not self.is_watched:
            return
        self._prepare()
        self._refuse_unordered(offsets, n_bytes, who, "two threads write one address")
        rows, number = offsets // n_bytes, who.number[:, None] + 1
        writer = self.writer.reshape(-1, n_bytes)
        writer[rows] = number
        if (writer[rows] != number).any():
            raise KernelFault("race in global memory: two threads write one address at once")
        self.block_epoch.reshape(-1, n_bytes)[rows] = who.block_epoch[:, None]
        self.warp_epoch.reshape(-1, n_bytes)[rows] = who.warp_epoch[:, None]

    def update(self, offsets: np.ndarray, n_bytes: int) -> None:
        """An atomic operation, which only other atomic ones may meet."""
        if not self.is_watched:
            return
        self._prepare()
        writer, rows = self.writer.reshape(-1, n_bytes), offsets // n_bytes
        if (writer[rows] > 0).any():
            raise KernelFault("race in global memory: an atomic operation meets a plain write")
        writer[rows] = self.ATOMIC

    def _refuse_unordered(self, offsets: np.ndarray, n_bytes: int, who: Threads, what: str) -> None:
        rows = offsets // n_bytes
        writer = self.writer.reshape(-1, n_bytes)[rows]
        foreign = (writer != 0) & (writer != who.number[:, None] + 1)
        if not foreign.any():
            return
        barrier_since = self.block_epoch.reshape(-1, n_bytes)[rows] < who.block_epoch[:, None]
        sync_since = self.warp_epoch.reshape(-1, n_bytes)[rows] < who.warp_epoch[:, None]
        same_block = (writer - 1) // who.per_block == (who.number // who.per_block)[:, None]
        same_warp = (writer - 1) // 32 == (who.number // 32)[:, None]
        if (foreign & ~(same_block & barrier_since) & ~(same_warp & sync_since)).any():
            raise KernelFault(f"race in global memory: {what}")


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
