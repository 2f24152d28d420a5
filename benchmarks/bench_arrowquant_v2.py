"""Layers of 4 MB on every path they can come in by: time, what of it is outside the kernel, and memory. Bits first.

    python benchmarks/bench_arrowquant_v2.py --out benchmarks/results                  # arrowquant_v2.json
    python benchmarks/bench_arrowquant_v2.py --device cuda --out benchmarks/results    # arrowquant_v2_gpu.json

A layer is [1024, 1024] float32. Paths: `list`, Python lists of Python floats; `batch`, a dict of NumPy arrays; `arrow`,
a table of one row and one chunk per layer, with the results as Arrow tables. Each is called once before the call that
counts, and medians are given. The kernel's part is the time of the backend alone on the same weights, into arrays that
are there and have been written. Memory is the peak of the resident memory over what it was before the call, in a
process of its own; the factor is that over the bytes of the weights as float32. Lists are measured on few layers: they
take 32 bytes a weight.

Nothing here asserts a speed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arrowquant_gpu import quantize, reference  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu.schemes import Scheme  # noqa: E402
from arrowquant_gpu.tensor import QuantizedTensor  # noqa: E402
from benchmarks import pictures  # noqa: E402
from benchmarks.bench_cpu import rounded  # noqa: E402
from benchmarks.bench_kernels import Cpu, Gpu, outputs  # noqa: E402
from tests.bitwise import assert_bitwise_equal  # noqa: E402
from tests.record import write  # noqa: E402

SHAPE = (1024, 1024)
LAYERS = (1, 10, 50, 100)

Arrays = dict[str, np.ndarray]


def make_layers(n: int) -> Arrays:
    rng = np.random.default_rng(5)
    return {f"layer.{i}": rng.standard_normal(SHAPE, np.float32) for i in range(n)}


# --- The paths: `given` makes the input, `call` quantizes it ---------------------------------------------------------


class Way(NamedTuple):
    """One way in. `call(given(arrays), scheme, device)` returns codes that `codes` reads for the check."""

    given: Callable[[Arrays], Any]
    call: Callable[[Any, str, str], Any]
    codes: Callable[[Any], list[QuantizedTensor]]
    layers: tuple[int, ...]


def quantize_dict(layers: Arrays, scheme: str, device: str) -> dict[str, QuantizedTensor]:
    return {name: quantize(x, scheme, device=device, name=name) for name, x in layers.items()}


def quantize_lists(layers: dict[str, list[list[float]]], scheme: str, device: str) -> dict[str, QuantizedTensor]:
    return quantize_dict({name: np.asarray(x, np.float32) for name, x in layers.items()}, scheme, device)


def table(layers: Arrays) -> pa.Table:
    """One row and one chunk per layer, over the memory of the arrays."""
    lists = [
        pa.ListArray.from_arrays(np.array([0, x.size], np.int32), pa.array(x.reshape(-1))) for x in layers.values()
    ]
    return pa.table({"layer_name": list(layers), "weights": pa.chunked_array(lists)})


def quantize_table(layers: pa.Table, scheme: str, device: str) -> pa.Table:
    names, chunks = layers["layer_name"].to_pylist(), layers["weights"].chunks
    rows = [quantize(x, scheme, device=device, name=name) for name, x in zip(names, chunks, strict=True)]
    return pa.Table.from_batches([row.to_arrow() for row in rows])


PATHS = {
    "list": Way(
        lambda layers: {name: x.tolist() for name, x in layers.items()},
        quantize_lists,
        lambda result: list(result.values()),
        LAYERS[:2],
    ),
    "batch": Way(lambda layers: layers, quantize_dict, lambda result: list(result.values()), LAYERS),
    "arrow": Way(
        table,
        quantize_table,
        lambda result: [QuantizedTensor.from_arrow(result, row) for row in range(result.num_rows)],
        LAYERS,
    ),
}


# --- Measuring -------------------------------------------------------------------------------------------------------


def check_bits(path: str, scheme: str, device: str) -> None:
    """Raise unless the path gives the reference's bytes for two layers."""
    layers, way = make_layers(2), PATHS[path]
    for x, q in zip(layers.values(), way.codes(way.call(way.given(layers), scheme, device)), strict=True):
        want = reference.quantize(x, Scheme.parse(scheme))
        # On the way through Arrow the rows of a layer follow each other in one.
        for what, expected in zip(("packed", "scales", "zeros"), want[:3], strict=True):
            if expected is not None:
                assert_bitwise_equal(getattr(q, what).reshape(expected.shape), expected, f"{path} {what}")


def kernel_call(place: Cpu | Gpu, layers: Arrays, scheme: Scheme) -> Callable[[int], None]:
    """The backend alone on all layers, into arrays that are there."""
    backend = place.backend
    work = [(backend.put(x), outputs(backend, scheme, SHAPE)) for x in layers.values()]

    def call(_: int) -> None:
        for x, out in work:
            backend.quantize(x, scheme, *out)

    return call


def seconds(place: Cpu | Gpu, path: str, layers: Arrays, scheme: str, device: str, rounds: int) -> tuple[float, float]:
    """(of the kernels alone, of the path): medians of rounds in which both take turns."""
    way, kernels = PATHS[path], kernel_call(place, layers, Scheme.parse(scheme))
    given, alone, whole = way.given(layers), [], []
    for i in range(rounds + 1):  # the first round does not count
        alone.append(place.seconds(kernels, i))
        way.call(given, scheme, device)  # a virtual core that slept takes milliseconds to come back
        start = time.perf_counter()
        result = way.call(given, scheme, device)
        whole.append(time.perf_counter() - start)
        del result
    return statistics.median(alone[1:]), statistics.median(whole[1:])


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def peak_bytes(path: str, n: int, scheme: str, device: str) -> int:
    """Peak of this process's resident memory during one call, over what it was before. Run in a process of its own."""
    way = PATHS[path]
    given = way.given(make_layers(n))
    small = {"small": np.ones((8, 128), np.float32)}
    way.call(way.given(small), scheme, device)  # what is compiled and imported is there, and no memory is left over
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    result = way.call(given, scheme, device)
    peak = status_bytes("VmHWM") - before
    del result
    return peak


def run(scheme: str, device: str, rounds: int) -> dict[str, Any]:
    """What goes into the results file."""
    place = Cpu(None) if device == "cpu" else Gpu()
    layers = make_layers(max(LAYERS))
    rows = []
    for path, way in PATHS.items():
        check_bits(path, scheme, device)
        for n in way.layers:
            some = dict(list(layers.items())[:n])
            n_rounds = rounds * (20 if n == 1 and path != "list" else 1)
            kernel, whole = seconds(place, path, some, scheme, device, n_rounds)
            command = [sys.executable, __file__, "--peak-of", path, str(n), "--scheme", scheme, "--device", device]
            peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            n_bytes = sum(x.nbytes for x in some.values())
            row = {"path": path, "layers": n, "ms": whole * 1e3, "kernel_ms": kernel * 1e3}
            row |= {"ms_per_layer": whole * 1e3 / n, "kernel_ms_per_layer": kernel * 1e3 / n}
            row |= {"outside_kernel": max(0.0, 1 - kernel / whole), "memory_factor": peak / n_bytes}
            row["gb_s"] = n_bytes / whole / 1e9
            rows.append(row)
            print(
                f"{path:6} {n:4} layers  {row['ms']:9.3f} ms  {row['gb_s']:6.2f} GB/s  outside the kernel "
                f"{row['outside_kernel']:6.1%}  extra memory {row['memory_factor']:5.2f} x input",
                flush=True,
            )
    about = {"scheme": scheme, "device": device, "layer": {"shape": SHAPE, "dtype": "float32"}, "rounds": rounds}
    single = {row["path"]: row for row in rows if row["layers"] == 1}
    return about | {"single_4mb": single, "multi_layer": [row for row in rows if row["layers"] > 1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="int4_g128_asym")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for results and picture")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        path, n = arguments.peak_of
        print(peak_bytes(path, int(n), arguments.scheme, arguments.device))
        return
    path = arguments.out / ("arrowquant_v2.json" if arguments.device == "cpu" else "arrowquant_v2_gpu.json")
    write(path, rounded(run(arguments.scheme, arguments.device, arguments.rounds)))
    pictures.draw(path, pictures.layers)


if __name__ == "__main__":
    main()
