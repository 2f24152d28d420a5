"""Every scheme and dtype: the kernels' rate beside that of a copy measured in the same run. Bits first.

    python benchmarks/bench_kernels.py --device cpu --out benchmarks/results
    python benchmarks/bench_kernels.py --device cuda --out benchmarks/results

A rate is (bytes read + bytes written) / time, medians of some rounds; a scheme with a scale of the whole tensor reads
its weights twice. What stands beside it is a copy that reads and writes as many bytes in all. Candidates take turns, so
that a slow moment of the machine hits all of them, and no tensor is in a cache when its turn comes.

On a GPU the time is that of the kernels alone, between events on their stream, and the L2 is overwritten before each
call. On the CPU it is that of the backend's call, after calls that do not count: a virtual core that slept takes
milliseconds to come back. `put` and `get` are the copies through pinned memory that host arrays take.

Nothing here asserts a speed. It writes kernels_cpu.json or kernels_gpu.json and a picture of the same name.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arrowquant_gpu import reference  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu.backends import Backend  # noqa: E402
from arrowquant_gpu.backends.cpu import CpuBackend  # noqa: E402
from arrowquant_gpu.backends.cpu_tasks import Task  # noqa: E402
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES  # noqa: E402
from arrowquant_gpu.grids import GRIDS  # noqa: E402
from arrowquant_gpu.schemes import BITS, SCALE_SUFFIXES, Scheme  # noqa: E402
from benchmarks import pictures  # noqa: E402
from benchmarks.bench_cpu import make_weights  # noqa: E402
from tests.bitwise import assert_bitwise_equal  # noqa: E402
from tests.cases import make  # noqa: E402
from tests.record import write  # noqa: E402

GRAINS = (("group", 32), ("group", 64), ("group", 128), ("channel", None), ("tensor", None))
FLUSH_BYTES = 256 << 20  # larger than any L2
HOST_BYTES = 1 << 30


# Of the grids that have more than one scheme.
FLOATS = ("nf4_g64", "fp4_g64", "e4m3_b128", "e4m3_channel", "e4m3_tensor", "e5m2_channel", "mxfp4", "mxfp8", "nvfp4")


def turns() -> dict[str, list[Scheme]]:
    """What takes turns: of each width of whole numbers every granularity and symmetry with float32 scales, and g128
    with every scale type; of the other families each grid."""
    found: dict[str, list[Scheme]] = {}
    for bits, (grain, size), symmetric in itertools.product(BITS, GRAINS, (True, False)):
        for scale_dtype in SCALE_SUFFIXES if size == 128 else ("float32",):
            found.setdefault(f"int{bits}", []).append(Scheme(bits, grain, size, symmetric, scale_dtype))
    found["affine"] = [Scheme.parse(f"affine{bits}_g64") for bits in BITS]
    found["float"] = [Scheme.parse(text) for text in FLOATS]
    for name, grid in GRIDS.items():
        if grid.block:
            found.setdefault(grid.family, []).append(Scheme.parse(name))
    return found


class Outputs(NamedTuple):
    """Arrays for the codes of a tensor; `zeros` is what is stored beside its scales, whatever that is."""

    packed: Any
    scales: Any
    zeros: Any | None

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self if a is not None)


def outputs(backend: Backend, scheme: Scheme, shape: tuple[int, int]) -> Outputs:
    packed = backend.empty(scheme.packed_shape(shape), np.uint8)
    scales = backend.empty(scheme.scales_shape(shape), DTYPES[scheme.scale_storage].numpy)
    beside, kind = scheme.zeros_shape(shape), scheme.zeros_dtype
    zeros = None if beside is None or kind is None else backend.empty(beside, DTYPES[kind].numpy)
    return Outputs(packed, scales, zeros)


def quantize(backend: Backend, x: Any, scheme: Scheme, out: Outputs) -> None:
    """All that the backend computes for one tensor: one kernel, and before it the range where that must be known."""
    if scheme.needs_range:
        backend.value_range(x)
    if scheme.granularity == "tensor":
        backend.encode(x, scheme, out.scales, out.zeros, out.packed)
    else:
        backend.quantize(x, scheme, *out)


def solved(backend: Backend, x: Any, scheme: Scheme, out: Outputs) -> Outputs:
    """The same with what follows from the range of the tensor, where the backend computes."""
    if not scheme.needs_range:
        return out
    low, high, _ = backend.value_range(x)
    bounds = np.full((1, 1), low, np.float32), np.full((1, 1), high, np.float32)
    scales, zeros, _ = reference.solve(*bounds, scheme)
    return Outputs(
        out.packed,
        out.scales if scales is None else backend.put(scales),
        out.zeros if zeros is None else backend.put(zeros),
    )


def check_bits(backend: Backend, scheme: Scheme, dtype: str) -> None:
    """Raise unless the backend gives the reference's bytes for a tensor, with tails if there can be, both ways."""
    host = make("normal", (67, 1024 if GRIDS[scheme.grid].block else 1000), dtype)
    x = backend.put(host)
    out = solved(backend, x, scheme, outputs(backend, scheme, host.shape))
    quantize(backend, x, scheme, out)
    decoded = backend.empty(host.shape, host.dtype)
    backend.dequantize(*out, scheme, decoded)
    want = reference.quantize(host, scheme)[:3]
    wanted = (*want, reference.dequantize(*want, scheme, host.shape[1], dtype))
    names = ("packed", "scales", "zeros", "decoded")
    for name, got, expected in zip(names, (*out, decoded), wanted, strict=True):
        if expected is not None:
            on_host = np.empty(expected.shape, expected.dtype)
            backend.get(got, on_host)
            assert_bitwise_equal(on_host, expected, f"{scheme} {dtype} {name}")


# --- The two places where kernels run --------------------------------------------------------------------------------


class Cpu:
    """The CPU backend and NumPy's copy, on all cores."""

    name, shape, beside = "cpu", (4096, 4096), "memcpy"

    def __init__(self, threads: int | None) -> None:
        self.backend = CpuBackend(threads)
        self.threads = self.backend.threads

    def weights(self, dtype: str) -> list[np.ndarray]:
        """Normally distributed, and so many tensors that none is in the cache when its turn comes."""
        return make_weights(dtype)

    def seconds(self, call: Callable[[int], Any], i: int) -> float:
        """Time of `call(i)`, after calls on other weights that do not count."""
        for _ in range(2):
            call(i + 1)
        start = time.perf_counter()
        call(i)
        return time.perf_counter() - start

    def copy(self, n_bytes: int) -> Callable[[int], None]:
        """A copy of n bytes, shared among threads as the backend shares its rows."""
        rows = 1024
        sources = [np.ones((rows, n_bytes // rows), np.uint8) for _ in range(3)]
        target = np.zeros_like(sources[0])

        def run(i: int) -> None:
            source = sources[i % len(sources)]
            copy = Task(rows, target.shape[1], lambda begin, end: np.copyto(target[begin:end], source[begin:end]))
            self.backend._share([copy])

        return run

    def about(self) -> dict[str, Any]:
        return {"threads": self.threads}


class Gpu:
    """The CUDA backend, timed by events around each kernel, and the device's own copy."""

    name, shape, beside = "gpu", (16384, 16384), "device copy"

    def __init__(self) -> None:
        import cupy

        from arrowquant_gpu.backends.cuda import CudaBackend

        spans = self.spans = []
        self.cupy = cupy

        class Timed(CudaBackend):
            """Puts an event before and after every kernel."""

            def _launch(self, *args: Any) -> None:
                events = cupy.cuda.Event(), cupy.cuda.Event()
                events[0].record()
                super()._launch(*args)
                events[1].record()
                spans.append(events)

        self.backend = Timed()
        self.flush = cupy.empty(FLUSH_BYTES, np.uint8)

    def weights(self, dtype: str) -> list[Any]:
        """One tensor larger than any L2, made of one block of normals many times over."""
        kind = DTYPES[dtype].numpy
        rows = min(1024, self.shape[0])
        block = (np.random.default_rng(1).standard_normal((rows, self.shape[1]), np.float32) * 0.02).astype(kind)
        x = self.backend.empty(self.shape, kind)
        for row in range(0, self.shape[0], rows):
            x[row : row + rows].set(block)
        return [x]

    def seconds(self, call: Callable[[int], Any], i: int) -> float:
        """Time that the kernels of `call(i)` run, with nothing of its arrays in the L2."""
        self.flush.data.memset_async(0, FLUSH_BYTES)
        self.spans.clear()
        call(i)
        self.spans[-1][1].synchronize()
        return sum(self.cupy.cuda.get_elapsed_time(*pair) for pair in self.spans) / 1e3

    def copy(self, n_bytes: int) -> Callable[[int], None]:
        source, target = (self.cupy.empty(n_bytes, np.uint8) for _ in range(2))
        events = self.cupy.cuda.Event(), self.cupy.cuda.Event()

        def run(_: int) -> None:
            events[0].record()
            target.data.copy_from_device_async(source.data, n_bytes)
            events[1].record()
            self.spans.append(events)

        return run

    def about(self) -> dict[str, Any]:
        """GB/s of `put` and `get` between ordinary host memory and the device."""
        host = np.ones(HOST_BYTES, np.uint8)
        device = self.backend.put(host)

        def rate(call: Callable[[], Any]) -> float:
            times = []
            for _ in range(6):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            return round(len(host) / statistics.median(times[1:]) / 1e9, 2)

        put, get = rate(lambda: self.backend.put(host)), rate(lambda: self.backend.get(device, host))
        return {"host": {"put_gb_s": put, "get_gb_s": get}}


# --- Measuring -------------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """`run(i)` works on weights number i and moves `n_bytes` in all."""

    scheme: Scheme | None
    n_bytes: int
    run: Callable[[int], Any]


def candidates(place: Cpu | Gpu, weights: list[Any], schemes: Sequence[Scheme]) -> list[Candidate]:
    """A copy that moves as many bytes as the first scheme does, and the kernels of each."""
    backend, x = place.backend, weights[0]
    half = (x.nbytes + schemes[0].n_bytes(x.shape)) // 2048 * 1024
    found = [Candidate(None, 2 * half, place.copy(half))]
    for scheme in schemes:
        out = solved(backend, x, scheme, outputs(backend, scheme, x.shape))
        moved = (2 if scheme.needs_range else 1) * x.nbytes + out.nbytes

        def run(i: int, scheme: Scheme = scheme, out: Outputs = out) -> None:
            quantize(backend, weights[i % len(weights)], scheme, out)

        found.append(Candidate(scheme, moved, run))
    return found


def measure(place: Cpu | Gpu, dtype: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(a row for each scheme, GB/s of the copy in each turn) with weights of one dtype."""
    weights = place.weights(dtype)
    rows, copies = [], {}
    for name, schemes in turns().items():
        turn = candidates(place, weights, schemes)
        rates: list[list[float]] = [[] for _ in turn]
        for i in range(rounds + 1):  # the first round does not count
            for candidate, seen in zip(turn, rates, strict=True):
                seen.append(candidate.n_bytes / place.seconds(candidate.run, i) / 1e9)
        copy, *medians = (statistics.median(seen[1:]) for seen in rates)
        copies[name] = round(copy, 2)
        for candidate, rate in zip(turn[1:], medians, strict=True):
            row = {"scheme": str(candidate.scheme), "dtype": dtype}
            rows.append(row | {"gb_s": round(rate, 2), "of_copy": round(rate / copy, 3)})
    return rows, copies


def run(place: Cpu | Gpu, dtypes: Sequence[str], rounds: int) -> dict[str, Any]:
    """What goes into the results file."""
    for scheme, dtype in itertools.product(itertools.chain(*turns().values()), dtypes):
        check_bits(place.backend, scheme, dtype)
    results: dict[str, Any] = {"shape": place.shape, "rounds": rounds, "beside": place.beside, **place.about()}
    results |= {"copy_gb_s": {}, "kernels": []}
    for dtype in dtypes:
        rows, results["copy_gb_s"][dtype] = measure(place, dtype, rounds)
        results["kernels"] += rows
        copies = results["copy_gb_s"][dtype].values()
        print(f"{dtype}: {place.beside} {min(copies):.1f} to {max(copies):.1f} GB/s, read and written")
        for row in rows:
            print(f"  {row['scheme']:20} {row['gb_s']:8.2f} GB/s  {row['of_copy']:6.3f} of the copy", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--threads", type=int, help="of the CPU; all cores by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for results and picture")
    arguments = parser.parse_args()
    place = Cpu(arguments.threads) if arguments.device == "cpu" else Gpu()
    path = arguments.out / f"kernels_{place.name}.json"
    write(path, run(place, KERNEL_DTYPES, arguments.rounds))
    pictures.draw(path, pictures.kernels)


if __name__ == "__main__":
    main()
