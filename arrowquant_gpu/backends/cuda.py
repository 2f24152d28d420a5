"""The CUDA backend: arguments, grid and stream of the kernels in kernels/. What they compute: docs/kernels.md.

Everything runs on the caller's current CuPy stream of the backend's device. This module imports CuPy when it is
imported itself, which happens only when a GPU is asked for or looked for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cupy
import cupyx
import numpy as np
from numpy.typing import NDArray

from ..dtypes import from_numpy
from ..errors import DeviceError, DeviceMemoryError
from ..reference import Findings
from ..schemes import Scheme
from . import Job, launches, nvrtc, variants
from . import counters as counted
from .counters import COUNTERS
from .launches import BLOCK, SCALE_TYPES
from .variants import Variant

BLOCKS_PER_SM = 16  # a few waves, to even out; the kernels loop over what is beyond
WEIGHTS_PER_THREAD = 32
STAGE_BYTES = 16 << 20  # of one pinned staging buffer
MIN_ARCH = 75

# Weights with one scale can be cut anywhere: pieces of this many occupy the whole GPU, whatever the shape.
_PIECE = 4096
# Up to this many weights one warp decides a group, beyond a whole block.
_WARP_WEIGHTS = 8192

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, CUDA_ERROR_OUT_OF_MEMORY


def usable() -> tuple[bool, str]:
    """Whether the first GPU can be used, and its name; else the reason why not."""
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return False, "no NVIDIA GPU"
        properties = cupy.cuda.runtime.getDeviceProperties(0)
    except Exception as e:  # CuPy has no common base for a missing driver, a missing library and a driver error
        return False, str(e).splitlines()[0]
    name, arch = properties["name"].decode(), _arch(properties)
    if arch < MIN_ARCH:
        return False, f"{name} has compute capability {arch / 10}; {MIN_ARCH / 10} is needed"
    reason = nvrtc.missing()
    return (False, f"{name}: {reason}") if reason else (True, name)


def _arch(properties: dict[str, Any]) -> int:
    return 10 * int(properties["major"]) + int(properties["minor"])


def n_devices() -> int:
    """How many GPUs there are. Raises DeviceError where CUDA cannot be used."""
    with current(0):
        return int(cupy.cuda.runtime.getDeviceCount())


@contextlib.contextmanager
def current(index: int) -> Iterator[Any]:
    """Make a device this thread's current one, and yield the stream that is current there.

    What CUDA fails at becomes DeviceError, and DeviceMemoryError where it is memory.
    """
    try:
        with cupy.cuda.Device(index):  # a new one each time: the object remembers what was current before
            yield cupy.cuda.get_current_stream()
    except DeviceError:
        raise
    except (RuntimeError, MemoryError) as e:  # CuPy's errors of the runtime, the driver, and device memory
        is_memory = isinstance(e, MemoryError) or getattr(e, "status", None) == _OUT_OF_MEMORY
        error = DeviceMemoryError if is_memory else DeviceError
        raise error(f"cuda:{index}: {str(e).splitlines()[0]}") from e


class CudaBackend:
    """The kernels on CUDA device number `index`; see Backend for the contract of each method.

    Device arrays are CuPy arrays; bfloat16 is the dtype of ml_dtypes. Raises DeviceError where there is no such device,
    or it is too old, or (when first needed) a kernel does not compile or load.
    """

    name = "cuda"

    def __init__(self, index: int = 0) -> None:
        self._index = index
        self._functions: dict[Variant, Any] = {}
        with current(self._index):
            properties = cupy.cuda.runtime.getDeviceProperties(index)
            # Page-locked and never written again: a copy of it may still be under way when a call has returned.
            self._zeros = cupyx.empty_pinned(COUNTERS, np.uint64)
        self._zeros[...] = 0
        self._arch = _arch(properties)
        if self._arch < MIN_ARCH:
            raise DeviceError(f"cuda:{index} has compute capability {self._arch / 10}; {MIN_ARCH / 10} is needed")
        self._max_blocks = int(properties["multiProcessorCount"]) * BLOCKS_PER_SM

    def put(self, x: NDArray[Any]) -> Any:
        """A device copy of the host array `x`, through pinned memory; `x` is free again when this returns."""
        with current(self._index) as stream:
            a = cupy.empty(x.shape, x.dtype)
            source, target = _bytes(x), _bytes(a)
            for part, stage, copied in _stages(a.nbytes):
                stage[...] = source[part]
                target[part].set(stage, stream=stream)
                copied.record(stream)
            return a

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        with current(self._index):
            return cupy.empty(shape, dtype)

    def get(self, a: Any, out: NDArray[Any]) -> None:
        """Copy the device array `a` into the row-major host array `out`, through pinned memory."""
        with current(self._index) as stream:
            source, target = _bytes(a), _bytes(out)
            before: tuple[slice, Any, Any] | None = None
            for part, stage, copied in _stages(a.nbytes):
                source[part].get(stream=stream, out=stage, blocking=False)
                copied.record(stream)
                if before is not None:
                    _unload(target, *before)
                before = part, stage, copied
            if before is not None:
                _unload(target, *before)

    def quantize(self, x: Any, scheme: Scheme, packed: Any, scales: Any, zeros: Any | None) -> Findings:
        with current(self._index) as stream:
            counters = self._new_counters(stream)
            self.launch_quantize(x, scheme, packed, scales, zeros, counters)
            return counted.findings(_read(counters, stream))

    def quantize_all(self, jobs: Sequence[Job]) -> list[Findings]:
        return [self.quantize(*job) for job in jobs]

    def value_range(self, x: Any) -> tuple[float, float, Findings]:
        with current(self._index) as stream:
            counters = self._new_counters(stream)
            self.launch_value_range(x, counters)
            counts = _read(counters, stream)
        return *counted.bounds(counts), counted.findings(counts)

    def launch_quantize(
        self, x: Any, scheme: Scheme, packed: Any, scales: Any, zeros: Any | None, counters: Any
    ) -> None:
        """`quantize` without waiting for it: what it finds is added to `counters`, uint64 [COUNTERS] on the device."""
        if x.size == 0:
            return
        if scheme.family != "int":
            self._run(launches.family(scheme.family).quantize(x, scheme, packed, scales, zeros, counters))
            return
        cut = _Cut.into_groups(x.shape, scheme)
        variant = variants.quantize(scheme.bits, scheme.symmetric, from_numpy(x.dtype).name, cut.group)
        with current(self._index):
            self._write_codes(variant, cut, x, scheme, packed, scales, zeros, counters)

    def launch_value_range(self, x: Any, counters: Any) -> None:
        """`value_range` without waiting for it: range and findings are added to `counters`."""
        if x.size == 0:
            return
        variant = variants.value_range(from_numpy(x.dtype).name)
        with current(self._index):
            self._launch(variant, -(-x.size // WEIGHTS_PER_THREAD), BLOCK, x, np.int64(x.size), counters)

    def encode(self, x: Any, scheme: Scheme, scales: Any, zeros: Any | None, packed: Any) -> None:
        """Write codes with scales that are already known; does not wait."""
        if x.size == 0:
            return
        if scheme.family != "int":
            self._run(launches.family(scheme.family).encode(x, scheme, scales, zeros, packed))
            return
        variant = variants.encode(scheme.bits, scheme.symmetric, from_numpy(x.dtype).name)
        with current(self._index):
            self._write_codes(variant, _Cut.into_pieces(x.shape, scheme), x, scheme, packed, scales, zeros, None)

    def dequantize(self, packed: Any, scales: Any, zeros: Any | None, scheme: Scheme, out: Any) -> None:
        if out.size == 0:
            return
        if scheme.family != "int":
            self._run(launches.family(scheme.family).dequantize(packed, scales, zeros, scheme, out))
            return
        cut = _Cut.into_pieces(out.shape, scheme)
        variant = variants.dequantize(scheme.bits, scheme.symmetric, from_numpy(out.dtype).name)
        lanes = cut.warp_lanes(1)
        with current(self._index):
            args = (packed, scales, zeros, out, *cut.args(scheme), np.int32(lanes))
            self._launch(variant, cut.n_runs, BLOCK // lanes, *args)

    def _new_counters(self, stream: Any) -> Any:
        counters = cupy.empty(COUNTERS, np.uint64)
        counters.set(self._zeros, stream=stream)
        return counters

    def _write_codes(
        self,
        variant: Variant,
        cut: _Cut,
        x: Any,
        scheme: Scheme,
        packed: Any,
        scales: Any,
        zeros: Any | None,
        counters: Any | None,
    ) -> None:
        if variant.defines["GROUP"] != "0":
            lanes = max(1, cut.group // WEIGHTS_PER_THREAD)  # LANES of kernels/quantize.cu
        else:
            lanes = cut.warp_lanes(8) if cut.run <= _WARP_WEIGHTS else BLOCK
        args = (x, packed, scales, zeros, counters, *cut.args(scheme), np.int32(lanes))
        self._launch(variant, cut.n_runs, BLOCK // lanes, *args)

    def _run(self, launch: launches.Launch) -> None:
        with current(self._index):
            self._launch(launch.variant, launch.n_units, launch.units_per_block, *launch.args)

    def _launch(self, variant: Variant, n_units: int, units_per_block: int, *args: Any) -> None:
        """Run a kernel over `n_units` units of work on the current stream; it loops where the grid is smaller."""
        function = self._functions.get(variant)
        if function is None:
            cubin = nvrtc.build(variant.source, variant.defines, self._arch)
            function = cupy.RawModule(path=str(cubin.path)).get_function(variant.source)
            self._functions[variant] = function
        blocks = min(-(-n_units // units_per_block), self._max_blocks)
        function((blocks,), (BLOCK,), args)


class _Cut(NamedTuple):
    """A tensor as a kernel sees it: `rows` of `length` weights, cut into groups of `group`.

    The scale of group g in row r is number r * across + g * along. Rows without tails arrive as one long row.
    """

    rows: int
    length: int
    group: int
    across: int
    along: int

    @classmethod
    def into_groups(cls, shape: tuple[int, int], scheme: Scheme) -> _Cut:
        """One group per scale: where scales are decided."""
        rows, length = shape
        group = scheme.group_length(length)
        if length % group == 0 and group % 8 == 0:
            rows, length = 1, rows * length
        return cls(rows, length, group, -(-length // group), 1)

    @classmethod
    def into_pieces(cls, shape: tuple[int, int], scheme: Scheme) -> _Cut:
        """Where scales are known, those of rows and of the whole tensor serve pieces of equal length."""
        rows, length = shape
        if scheme.granularity == "group":
            return cls.into_groups(shape, scheme)
        if scheme.granularity == "channel":
            return cls(rows, length, _PIECE, 1, 0)
        if length % 8 == 0:
            rows, length = 1, rows * length
        return cls(rows, length, _PIECE, 0, 0)

    @property
    def run_groups(self) -> int:
        """Groups that one team of threads handles: the fewest whose codes end on a byte, whatever their width."""
        return min(-(-self.length // self.group), 8 // math.gcd(8, self.group))

    @property
    def run(self) -> int:
        """Weights of one run."""
        return min(self.length, self.run_groups * self.group)

    @property
    def runs_per_row(self) -> int:
        return -(-self.length // (self.run_groups * self.group))

    @property
    def n_runs(self) -> int:
        return self.rows * self.runs_per_row

    def warp_lanes(self, least: int) -> int:
        """Threads of a warp that share a run: a power of two."""
        wanted = -(-self.run // WEIGHTS_PER_THREAD)
        return max(least, min(32, 1 << (wanted - 1).bit_length()))

    def args(self, scheme: Scheme) -> tuple[np.generic, ...]:
        """The arguments from `rows` to `along` that the kernels quantize and dequantize have in common."""
        return (
            *(np.int64(self.rows), np.int64(self.length), np.int64(self.runs_per_row)),
            np.int32(SCALE_TYPES[scheme.scale_dtype]),
            *(np.int64(self.group), np.int32(self.run_groups), np.int64(self.across), np.int64(self.along)),
        )


def _bytes(a: Any) -> Any:
    """All of a row-major array as flat bytes, without a copy."""
    return a.reshape(-1).view(np.uint8)


def _stages(n_bytes: int) -> Iterator[tuple[slice, Any, Any]]:
    """Cut n bytes into parts, each with a pinned buffer and an event to be recorded after the copy from or to it.

    Two buffers take turns, so that the host uses one while the other is copied. At the end all copies have ended.
    """
    turns = [
        (cupyx.empty_pinned((min(n_bytes, STAGE_BYTES),), np.uint8), cupy.cuda.Event(block=True, disable_timing=True))
        for _ in range(1 + (n_bytes > STAGE_BYTES))
    ]
    for turn, start in enumerate(range(0, n_bytes, STAGE_BYTES)):
        buffer, copied = turns[turn % 2]
        if turn >= 2:
            copied.synchronize()
        part = slice(start, min(n_bytes, start + STAGE_BYTES))
        yield part, buffer[: part.stop - start], copied
    for _, copied in turns:
        copied.synchronize()


def _unload(target: NDArray[np.uint8], part: slice, stage: Any, copied: Any) -> None:
    """Take a part off its staging buffer, once the copy into that has ended."""
    copied.synchronize()
    target[part] = stage


def _read(counters: Any, stream: Any) -> NDArray[np.uint64]:
    """The counters on the host; waits for the stream."""
    counts: NDArray[np.uint64] = cupyx.empty_pinned(COUNTERS, np.uint64)
    counters.get(stream=stream, out=counts)
    stream.synchronize()
    return counts
