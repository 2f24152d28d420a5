"""The CPU backend beside a copy and its peers, in one run: bits first, then rates.

    python benchmarks/bench_cpu.py --out benchmarks/results

A rate is bytes of weights per second, read by quantizers and written by decode, of one call on a [4096, 4096] tensor.
The weights are normally distributed, in memory that has been written, and there are enough tensors that none is in
the cache when its turn comes. Outputs of this package, of the copy and of llama.cpp are allocated beforehand; the other
peers allocate their own, as they do when they are used. Candidates take turns (A B C A B C ...), so that a slow moment
of the machine hits all of them, and each is called for a while before the call that counts.

Nothing here asserts a speed. It exits with an error if a peer is missing, or if bits or a peer's values are wrong.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arrowquant_gpu import ops, reference  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu.backends.cpu import CpuBackend  # noqa: E402
from arrowquant_gpu.backends.cpu_tasks import Task  # noqa: E402
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES  # noqa: E402
from arrowquant_gpu.schemes import Scheme  # noqa: E402
from benchmarks import cpu_peers  # noqa: E402
from tests.bitwise import assert_bitwise_equal  # noqa: E402
from tests.record import write  # noqa: E402

SCHEMES = ("int4_g128", "int4_g128_asym", "int8_g128", "int8_channel", "int2_g64_asym")
SHAPE = (4096, 4096)
THREADS = (1, 2)
PAUSE = 0.02  # seconds between two calls: the idle threads of an OpenMP pool go on spinning for a while
WAKING = 0.05  # seconds of calls that do not count: a virtual core that slept takes milliseconds to come back
OURS, COPY = "arrowquant int4_g128", "copy"


class Candidate(NamedTuple):
    """`run(i)` works on weights number i, of `n_bytes`."""

    name: str
    dtype: str
    threads: int | None
    n_bytes: int
    run: Callable[[int], Any]


def cache_bytes() -> int:
    """The largest cache of the first core, or 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
    return max(sizes)


def make_weights(dtype: str) -> list[np.ndarray]:
    """Tensors that are together at least twice as large as the largest cache."""
    width = DTYPES[dtype].bits // 8
    n = max(2, -(-2 * cache_bytes() // (SHAPE[0] * SHAPE[1] * width)))
    rng = np.random.default_rng(1)
    return [(rng.standard_normal(SHAPE, np.float32) * np.float32(0.02)).astype(DTYPES[dtype].numpy) for _ in range(n)]


def copies(weights: list[np.ndarray], dtype: str) -> list[Candidate]:
    """np.copyto into memory that is there, rows shared among threads as the backend shares them."""
    out = np.zeros_like(weights[0])
    found = []
    for threads in THREADS:
        share = CpuBackend(threads)._share

        def run(i: int, share: Callable[..., Any] = share) -> None:
            share([Task(*SHAPE, lambda begin, end: np.copyto(out[begin:end], weights[i][begin:end]))])

        found.append(Candidate(COPY, dtype, threads, out.nbytes, run))
    return found


def ours(weights: list[np.ndarray], dtype: str) -> list[Candidate]:
    """The backend itself, after its bits are found equal to the reference's."""
    found = []
    for scheme in map(Scheme.parse, SCHEMES):
        packed = np.zeros(scheme.packed_shape(SHAPE), np.uint8)
        scales = np.zeros(scheme.scales_shape(SHAPE), DTYPES[scheme.scale_dtype].numpy)
        zeros = None if scheme.symmetric else np.zeros(scales.shape, np.uint8)
        out = np.zeros(SHAPE, DTYPES[dtype].numpy)
        for threads in THREADS:
            backend = CpuBackend(threads)

            def quantize(i: int, backend: CpuBackend = backend, outputs: Any = (scheme, packed, scales, zeros)) -> None:
                backend.quantize(weights[i], *outputs)

            def dequantize(
                i: int, backend: CpuBackend = backend, inputs: Any = (packed, scales, zeros, scheme, out)
            ) -> None:
                backend.dequantize(*inputs)

            quantize(0)
            dequantize(0)
            check_bits(weights[0], scheme, dtype, packed, scales, zeros, out)
            found.append(Candidate(f"arrowquant {scheme}", dtype, threads, out.nbytes, quantize))
            if scheme.id == SCHEMES[0]:
                found.append(Candidate(f"arrowquant {scheme} decode", dtype, threads, out.nbytes, dequantize))
    return found


def check_bits(x: np.ndarray, scheme: Scheme, dtype: str, *got: np.ndarray | None) -> None:
    """Raise unless a sample of rows equals the reference."""
    rows = np.r_[:40, SHAPE[0] // 2 : SHAPE[0] // 2 + 40, -40:0]
    packed, scales, zeros, _ = reference.quantize(x[rows], scheme)
    decoded = reference.dequantize(packed, scales, zeros, scheme, SHAPE[1], dtype)
    for what, a, want in zip(
        ("packed", "scales", "zeros", "decoded"), got, (packed, scales, zeros, decoded), strict=True
    ):
        if want is not None and a is not None:
            assert_bitwise_equal(a[rows], want, f"{scheme} {dtype} {what}")


def peers(weights: list[np.ndarray], dtype: str) -> list[Candidate]:
    found = []
    for threads in THREADS:
        for peer in cpu_peers.peers(weights, dtype, threads):
            x = weights[0].astype(np.float32)
            error = float(np.sqrt(np.mean((peer.decode(peer.run(0)) - x) ** 2)) / x.std())
            if not 1e-4 < error < 0.2:
                raise SystemExit(f"{peer.name}: a relative error of {error:.3g} says that it was called wrongly")
            found.append(Candidate(peer.name, dtype, peer.threads, weights[0].nbytes, peer.run))
    return found


def measure(candidates: list[Candidate], n_weights: int, rounds: int) -> list[dict[str, Any]]:
    """Median, lowest and highest GB/s of each candidate over the rounds, after one that does not count."""
    rates: list[list[float]] = [[] for _ in candidates]
    for turn in range(rounds + 1):
        for candidate, seen in zip(candidates, rates, strict=True):
            time.sleep(PAUSE)
            awake = time.perf_counter() + WAKING
            while time.perf_counter() < awake:
                candidate.run((turn + 1) % n_weights)
            start = time.perf_counter()
            candidate.run(turn % n_weights)
            seen.append(candidate.n_bytes / (time.perf_counter() - start) / 1e9)
    rows = []
    for candidate, seen in zip(candidates, rates, strict=True):
        counted = sorted(seen[1:])
        row = {"name": candidate.name, "dtype": candidate.dtype, "threads": candidate.threads}
        rows.append(row | {"gb_s": statistics.median(counted), "min": counted[0], "max": counted[-1]})
    return rows


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Each rate beside that of the copy and of this package's int4_g128 at as many threads (one, if it decides)."""
    for row in rows:
        same = {other["name"]: other["gb_s"] for other in rows if other["threads"] == (row["threads"] or 1)}
        row["of_copy"] = row["gb_s"] / same[COPY]
        if not row["name"].startswith(("arrowquant", COPY)):
            row["ours_is_faster_by"] = same[OURS] / row["gb_s"]


def layer() -> dict[str, float]:
    """Microseconds of `ops.quantize` on one 4 MB layer, its outputs allocated, checks and all."""
    x = np.random.default_rng(2).standard_normal((1024, 1024), np.float32)
    times = []
    for _ in range(600):
        start = time.perf_counter()
        ops.quantize(x, "int4_g128", device="cpu")
        times.append((time.perf_counter() - start) * 1e6)
    counted = sorted(times[100:])
    return {"p50_us": counted[len(counted) // 2], "p90_us": counted[len(counted) * 9 // 10]}


FIRST_CALL = """
import time
start = time.perf_counter()
import numpy as np
from arrowquant_gpu.backends.cpu import CpuBackend
from arrowquant_gpu.schemes import Scheme
imported = time.perf_counter()
packed, scales = np.empty((1, 64), np.uint8), np.empty((1, 1), np.float32)
CpuBackend(1).quantize(np.ones((1, 128), np.float32), Scheme.parse("int4_g128"), packed, scales, None)
print(imported - start, time.perf_counter() - imported)
"""


def first_call() -> dict[str, float]:
    """Seconds that a new process takes to import the backend, and to its first codes with and without a warm cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": cache}
        command = [sys.executable, "-c", FIRST_CALL]
        cold, warm = (
            [
                float(word)
                for word in subprocess.run(command, env=environment, capture_output=True, check=True).stdout.split()
            ]
            for _ in range(2)
        )
    return {"import_s": warm[0], "compile_s": cold[1], "from_cache_s": warm[1]}


def rounded(value: Any) -> Any:
    """Floats to four digits, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results file")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"peers": cpu_peers.versions(), "shape": SHAPE, "rounds": arguments.rounds}
    results["load_before"] = os.getloadavg()[0]  # near 0, or the figures are of a machine that had other work
    results["layer_4_mb"], results["first_call"] = layer(), first_call()
    for name in ("layer_4_mb", "first_call"):
        print(name, *(f"{key} {value:.3g}" for key, value in results[name].items()), sep="  ")
    results["rates"] = []
    print(f"{'':32} {'':9} threads    GB/s  (   min -    max)   of copy   ours is faster by")
    for dtype in KERNEL_DTYPES:
        weights = make_weights(dtype)
        rows = measure(
            [*copies(weights, dtype), *ours(weights, dtype), *peers(weights, dtype)], len(weights), arguments.rounds
        )
        add_ratios(rows)
        for row in rows:
            threads, faster = row["threads"] or "own", row.get("ours_is_faster_by")
            print(
                f"{row['name']:32} {dtype:9} {threads!s:>7} {row['gb_s']:7.3f}  ({row['min']:6.2f} - {row['max']:6.2f})"
                f"   {row['of_copy']:7.4f}" + (f"   {faster:6.1f}" if faster else "")
            )
        results["rates"] += rows
    write(arguments.out / "bench_cpu.json", rounded(results))


if __name__ == "__main__":
    main()
