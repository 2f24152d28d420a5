"""The CUDA kernels on a real GPU: bits first, then the rate of each beside a device copy measured in the same run.

    python benchmarks/bench_gpu.py --out benchmarks/results

A rate is (bytes read + bytes written) / time of the kernel alone, between two events on its stream. The tensors are
larger than any L2 cache. `put` and `get` are the copies through pinned memory that host arrays take.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arrowquant_gpu.backends import get_backend  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu.backends.cuda import CudaBackend  # noqa: E402
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES  # noqa: E402
from arrowquant_gpu.schemes import Scheme  # noqa: E402
from tests.bitwise import assert_bitwise_equal  # noqa: E402
from tests.cases import make  # noqa: E402
from tests.record import write  # noqa: E402

SCHEMES = (
    *("int4_g128", "int4_g128_asym", "int4_g32_bf16", "int8_g128", "int8_channel", "int2_g64_asym"),
    *("int3_g128", "int5_g64", "int6_g128", "int4_g100"),
)
ROUNDS = 15


class TimedBackend(CudaBackend):
    """CudaBackend that knows how long its last kernel ran."""

    def __init__(self) -> None:
        super().__init__()
        self.events = cupy.cuda.Event(), cupy.cuda.Event()

    def _launch(self, *args: Any) -> None:
        self.events[0].record()
        super()._launch(*args)
        self.events[1].record()

    def milliseconds(self) -> float:
        self.events[1].synchronize()
        return float(cupy.cuda.get_elapsed_time(*self.events))


def median(timed: Callable[[], float]) -> float:
    """Median of some rounds in milliseconds, after two that do not count."""
    return statistics.median([timed() for _ in range(ROUNDS + 2)][2:])


def copy_rate(n_bytes: int) -> float:
    """GB/s read and written by a device-to-device copy."""
    source, target = cupy.zeros(n_bytes, np.uint8), cupy.empty(n_bytes, np.uint8)
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()

    def once() -> float:
        start.record()
        cupy.copyto(target, source)
        stop.record()
        stop.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, stop))

    return 2 * n_bytes / median(once) / 1e6


def host_rate(n_bytes: int, backend: CudaBackend) -> dict[str, float]:
    """GB/s of `put` and `get` between ordinary host memory and the device."""
    host, device = np.ones(n_bytes, np.uint8), backend.empty((n_bytes,), np.uint8)

    def clock(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    put, get = (
        median(lambda: clock(lambda: backend.put(host))),
        median(lambda: clock(lambda: backend.get(device, host))),
    )
    return {"put_gb_s": n_bytes / put / 1e6, "get_gb_s": n_bytes / get / 1e6}


def check_bits(backend: CudaBackend, scheme: Scheme, dtype: str) -> None:
    """Raise unless GPU and CPU give the same bytes for a tensor with tails."""
    host = get_backend("cpu")
    x = make("normal", (257, 1000), dtype)
    results = []
    for place in (host, backend):
        packed = place.empty(scheme.packed_shape(x.shape), np.uint8)
        scales = place.empty(scheme.scales_shape(x.shape), DTYPES[scheme.scale_dtype].numpy)
        zeros = None if scheme.symmetric else place.empty(scales.shape, np.uint8)
        place.quantize(place.put(x), scheme, packed, scales, zeros)
        out = place.empty(x.shape, x.dtype)
        place.dequantize(packed, scales, zeros, scheme, out)
        results.append([a if place is host else a.get() for a in (packed, scales, out)])
    for want, got in zip(*results, strict=True):
        assert_bitwise_equal(got, want, f"{scheme} {dtype}")


def measure(backend: TimedBackend, scheme: Scheme, dtype: str, shape: tuple[int, int], copy: float) -> dict[str, Any]:
    """Rates of quantize and dequantize for one scheme and dtype."""
    x = cupy.random.standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype].numpy)
    packed = backend.empty(scheme.packed_shape(shape), np.uint8)
    scales = backend.empty(scheme.scales_shape(shape), DTYPES[scheme.scale_dtype].numpy)
    zeros = None if scheme.symmetric else backend.empty(scales.shape, np.uint8)

    def quantize() -> float:
        backend.quantize(x, scheme, packed, scales, zeros)
        return backend.milliseconds()

    def dequantize() -> float:
        backend.dequantize(packed, scales, zeros, scheme, x)
        return backend.milliseconds()

    n_bytes = x.nbytes + packed.nbytes + scales.nbytes + (0 if zeros is None else zeros.nbytes)
    row: dict[str, Any] = {"scheme": scheme.id, "dtype": dtype}
    for name, timed in (("quantize", quantize), ("dequantize", dequantize)):
        rate = n_bytes / median(timed) / 1e6
        row |= {f"{name}_gb_s": round(rate, 1), f"{name}_of_copy": round(rate / copy, 3)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results file")
    arguments = parser.parse_args()
    backend, shape = TimedBackend(), (16384, 16384)
    copy = copy_rate(1 << 30)
    print(f"device copy {copy:.0f} GB/s")
    rows = []
    for scheme in map(Scheme.parse, SCHEMES):
        for dtype in KERNEL_DTYPES:
            check_bits(backend, scheme, dtype)
            row = measure(backend, scheme, dtype, shape, copy)
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()))
    results = {"device_copy_gb_s": round(copy, 1), "shape": shape, "host": host_rate(1 << 30, backend), "kernels": rows}
    write(arguments.out / "gpu.json", results)


if __name__ == "__main__":
    main()
