"""`CpuBackend`: the kernels of cpu_kernels.py over rows shared among threads.

The threads are Python's own, because the kernels hold no GIL: Numba's parallel loops abort the process where two
threads enter them at once, and do not survive a fork. Here concurrent callers share one pool, a caller always works
itself and never waits for work that has not begun, and a forked child starts a pool of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from ..dtypes import from_numpy
from ..errors import DeviceError
from ..reference import Findings
from ..schemes import Scheme
from . import Job, cpu_kernels
from .cpu_tasks import Task, address, family
from .cpu_vectors import KINDS

# Say how many threads a call uses at most; the first that is set counts. The second is what Rust programs are told by,
# so that one setting serves a process with both.
THREAD_VARIABLES = ("ARROWQUANT_NUM_THREADS", "RAYON_NUM_THREADS")
# Weights per thread that are worth waking it for: the time in which it wakes, about 50 microseconds.
SHARE = 1 << 18
# Pieces per thread, and weights in the smallest piece: so small that a thread which wakes late, or which the system
# takes away, is not waited for long.
PIECES = 8
PIECE = 1 << 16
# A row with one scale that is longer than this comes from memory twice in any case: its range may be found by all
# threads first, and its codes written by all threads then.
LONG_ROW = 1 << 18


class CpuBackend:
    """All schemes on the host's cores; see Backend for the contract of each method.

    Arrays are read and written in place: read-only, memory-mapped and Arrow-backed ones too. Nothing of the size of a
    tensor is allocated. Calls may come from any number of threads. `threads` is how many one call uses at most, itself
    included: by default ARROWQUANT_NUM_THREADS, else RAYON_NUM_THREADS, else every core that this process may use. It
    changes no byte.

    >>> import numpy as np
    >>> backend, scheme = CpuBackend(threads=2), Scheme.parse("int4_g4")
    >>> x = np.array([[-1.0, 0.0, 0.5, 1.5]], np.float32)
    >>> packed, scales = np.empty((1, 2), np.uint8), np.empty((1, 1), np.float32)
    >>> backend.quantize(x, scheme, packed, scales, None).n_nan, packed.tolist()
    (0, [[131, 250]])

    Raises DeviceError if `threads` or the variable that counts is not a positive number, or Numba may not compile.
    """

    name = "cpu"

    def __init__(self, threads: int | None = None) -> None:
        if numba.config.DISABLE_JIT:
            raise DeviceError("the cpu backend needs Numba's compiler: unset NUMBA_DISABLE_JIT, or use reference")
        self.threads = _default_threads() if threads is None else threads
        if self.threads < 1:
            raise DeviceError(f"threads is {threads}: it must be 1 or more")
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # with the process that started its threads

    def put(self, x: NDArray[Any]) -> NDArray[Any]:
        return x

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.empty(shape, dtype)

    def get(self, a: NDArray[Any], out: NDArray[Any]) -> None:
        np.copyto(out, a)

    def quantize(
        self,
        x: NDArray[Any],
        scheme: Scheme,
        packed: NDArray[np.uint8],
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
    ) -> Findings:
        return self.quantize_all([(x, scheme, packed, scales, zeros)])[0]

    def quantize_all(self, jobs: Sequence[Job]) -> list[Findings]:
        """`quantize` of several tensors, by arguments, shared among the threads as if they were one: see `Backend`."""
        findings: dict[int, Findings] = {}
        tasks: dict[int, Task] = {}
        for i, (x, scheme, packed, scales, zeros) in enumerate(jobs):
            rows, length = x.shape
            if x.size == 0:
                findings[i] = Findings()
            elif scheme.family != "int":
                tasks[i] = family(scheme.family).coding(x, scheme, packed, scales, zeros, known=False)
            elif scheme.granularity == "channel" and length >= LONG_ROW and rows < 4 * self.threads:
                findings[i] = self._long_rows(x, scheme, packed, scales, zeros)
            else:
                unit = min(math.lcm(scheme.group_length(length), 8), _whole_bytes(length))
                tasks[i] = _coding(x, scheme, packed, scales, zeros, unit, known=False)
        for i, results in zip(tasks, self._share(list(tasks.values())), strict=True):
            found = _overflows(results)
            findings[i] = self._find(jobs[i][0]) if found is None else found
        return [findings[i] for i in range(len(jobs))]

    def value_range(self, x: NDArray[Any]) -> tuple[float, float, Findings]:
        if x.size == 0:
            return 0.0, 0.0, Findings()
        low, high = self._extremes(x)
        if not (np.isfinite(low) and np.isfinite(high)):
            return 0.0, 0.0, self._find(x)
        return float(low), float(high), Findings()

    def encode(
        self,
        x: NDArray[Any],
        scheme: Scheme,
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
        packed: NDArray[np.uint8],
    ) -> None:
        if x.size and scheme.family != "int":
            self._share([family(scheme.family).coding(x, scheme, packed, scales, zeros, known=True)])
        elif x.size:
            unit = min(cpu_kernels.TILE, _whole_bytes(x.shape[1]))
            self._share([_coding(x, scheme, packed, scales, zeros, unit, known=True)])

    def dequantize(
        self,
        packed: NDArray[np.uint8],
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
        scheme: Scheme,
        out: NDArray[Any],
    ) -> None:
        rows, length = out.shape
        if out.size == 0:
            return
        if scheme.family != "int":
            self._share([family(scheme.family).decoding(packed, scales, zeros, scheme, out)])
            return
        kernel, unit = cpu_kernels.dequantize(), min(cpu_kernels.TILE, _whole_bytes(length))
        arguments = (
            *(address(packed), address(scales), address(zeros), address(out)),
            *(length, scheme.group_length(length), _row_scales(scheme, scales), scheme.bits, int(scheme.symmetric)),
            *(KINDS[out.dtype.name], KINDS[scheme.scale_dtype], unit),
        )
        self._share([Task(rows * -(-length // unit), unit, lambda begin, end: kernel(*arguments, begin, end))])

    def _long_rows(
        self,
        x: NDArray[Any],
        scheme: Scheme,
        packed: NDArray[np.uint8],
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
    ) -> Findings:
        """`quantize` for few long rows of one scale each: all threads work on each row, first on its range."""
        bounds = np.array([self._extremes(row) for row in x])  # a row's scale is that of its two extremes
        unused = np.empty(scheme.packed_shape(bounds.shape), np.uint8)
        findings = _overflows(self._share([_coding(bounds, scheme, unused, scales, zeros, 8, known=False)])[0])
        if findings is None:
            return self._find(x)
        self.encode(x, scheme, scales, zeros, packed)
        return findings

    def _extremes(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """min(0, lowest) and max(0, highest) of all of `x`; one of them is not finite where `x` is not."""
        kernel, weights, kind = cpu_kernels.value_range(), address(x), KINDS[x.dtype.name]
        [bounds] = self._share([Task(x.size, 1, lambda begin, end: kernel(weights, kind, begin, end))])
        low, high = (max(ends) for ends in zip(*bounds, strict=True))
        return np.array([0 if low == cpu_kernels.SIGN else low, high], np.uint32).view(np.float32)

    def _find(self, x: NDArray[Any]) -> Findings:
        """Count what is not finite: a second pass, over weights that are going to be refused."""
        kernel, weights, kind = cpu_kernels.find(), address(x), KINDS[x.dtype.name]
        [found] = self._share([Task(x.size, 1, lambda begin, end: kernel(weights, kind, begin, end))])
        first = min((first for _, _, first in found if first >= 0), default=-1)
        return Findings(sum(n for n, _, _ in found), sum(n for _, n, _ in found), first)

    def _share(self, tasks: Sequence[Task]) -> list[list[Any]]:
        """For each task its results over pieces of its units, in any order."""
        n_units, n_weights = sum(t.n_units for t in tasks), sum(t.n_units * t.unit for t in tasks)
        helpers = min(self.threads, n_units, n_weights // SHARE) - 1
        results: list[list[Any]] = [[] for _ in tasks]
        if helpers < 1:
            for task, found in zip(tasks, results, strict=True):
                found.append(task.run(0, task.n_units))
            return results
        pieces: deque[tuple[int, int, int]] = deque()
        for i, task in enumerate(tasks):
            n = max(1, min(task.n_units, task.n_units * task.unit // PIECE, PIECES * (helpers + 1)))
            pieces.extend((i, *ends) for ends in pairwise(task.n_units * k // n for k in range(n + 1)))

        def work() -> None:
            while pieces:
                try:
                    i, begin, end = pieces.popleft()
                except IndexError:  # another thread was faster
                    return
                results[i].append(tasks[i].run(begin, end))

        futures: list[Future[None]] = []
        try:
            with contextlib.suppress(RuntimeError):  # no more threads here, or the interpreter is ending
                futures += (self._executor().submit(work) for _ in range(helpers))
            work()
        finally:
            pieces.clear()  # where `work` was interrupted, the others stop before the caller lets its arrays go
            for future in futures:
                if not future.cancel():
                    future.result()
        return results

    def _executor(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(self.threads - 1, "arrowquant")
        return self._pool[1]


def _coding(
    x: NDArray[Any],
    scheme: Scheme,
    packed: NDArray[np.uint8],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
    unit: int,
    *,
    known: bool,
) -> Task:
    """The quantize kernel on a tensor."""
    rows, length = x.shape
    kernel = cpu_kernels.quantize()
    arguments = (
        *(address(x), address(packed), address(scales), address(zeros)),
        *(length, scheme.group_length(length), _row_scales(scheme, scales), scheme.bits, int(scheme.symmetric)),
        *(KINDS[from_numpy(x.dtype).name], KINDS[scheme.scale_dtype], int(known), unit),
    )
    return Task(rows * -(-length // unit), unit, lambda begin, end: kernel(*arguments, begin, end))


def _overflows(results: Sequence[tuple[bool, int, int]]) -> Findings | None:
    """What the quantize kernel says of the pieces of a tensor, or None if one of them is not finite."""
    if not all(finite for finite, _, _ in results):
        return None
    first = min((first for _, n, first in results if n), default=-1)
    return Findings(n_overflow=sum(n for _, n, _ in results), first_overflow=first)


def _default_threads() -> int:
    for variable in THREAD_VARIABLES:
        text = os.environ.get(variable)
        if text is not None and (variable, text) != ("RAYON_NUM_THREADS", "0"):  # 0 is Rayon's word for all cores
            if not text.isdecimal() or int(text) < 1:
                raise DeviceError(f"{variable} is {text!r}: it must be a number, 1 or more")
            return int(text)
    return getattr(os, "process_cpu_count", lambda: len(os.sched_getaffinity(0)))() or 1


def _whole_bytes(length: int) -> int:
    """`length` rounded up to codes that fill whole bytes at every width."""
    return -(-length // 8) * 8


def _row_scales(scheme: Scheme, scales: NDArray[Any]) -> int:
    return 0 if scheme.granularity == "tensor" else scales.shape[1]
