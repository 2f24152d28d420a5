"""Layers of 4 MB through ArrowQuantV2, on every path: time, what of it is outside the kernel, memory; and loading.

    python benchmarks/bench_arrowquant_v2.py --out benchmarks/results                  # arrowquant_v2.json
    python benchmarks/bench_arrowquant_v2.py --device cuda --out benchmarks/results    # arrowquant_v2_gpu.json

A layer is [1024, 1024] float32. Paths: `list`, nested Python lists; `batch`, a dict of NumPy arrays; `arrow`, a table
of one row and one chunk per layer over the arrays' memory. `convert` is what makes the input of the call from a dict
of NumPy arrays, `quantize` the call, `total` both. Each is called once before the call that counts, and medians are
given. `kernel` is the backend alone on the same weights, as many together as the calls take, into arrays that are there
and have been written; `outside_kernel` is the share of the call that is in none of its ranges of category kernel
(docs/profiling.md). Memory is the peak of the resident memory over what it was before the call, in a process of its
own; `extra_memory` is what of it is over the results themselves, in parts of the input's bytes; 0 where results took
memory that Arrow's pool had left. Lists are measured on few layers: they take 32 bytes a weight.

Loading: a float32 model of N parameters in one sparse file, in tensors of [4096, 4096]. `open_ms` is SafeTensorsLoader
and its summary; `read_ms` copies every tensor once, from the page cache; not of a model that is larger than READ_BYTES.

Nothing here asserts a speed.
"""

from __future__ import annotations

import argparse
import json
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

from arrowquant_gpu import (  # noqa: E402 - the repository is not on the path of a script
    ArrowQuantV2,
    SafeTensorsLoader,
    numpy_to_arrow_table,
    reference,
)
from arrowquant_gpu.ops import TOGETHER_BYTES  # noqa: E402
from arrowquant_gpu.schemes import Scheme  # noqa: E402
from arrowquant_gpu.tensor import QuantizedTensor  # noqa: E402
from arrowquant_gpu.trace import timeline  # noqa: E402
from arrowquant_gpu.v2.results import LayerResults  # noqa: E402
from benchmarks import pictures  # noqa: E402
from benchmarks.bench_cpu import rounded  # noqa: E402
from benchmarks.bench_kernels import Cpu, Gpu, outputs  # noqa: E402
from tests.bitwise import assert_bitwise_equal  # noqa: E402
from tests.record import write  # noqa: E402

SHAPE = (1024, 1024)
LAYERS = (1, 10, 50, 100)
MODELS = {"100M": 100_000_000, "600M": 600_000_000, "7B": 7_000_000_000}
TENSOR = (4096, 4096)
READ_BYTES = 4 << 30
MB = 1 << 20

Arrays = dict[str, np.ndarray]


def make_layers(n: int) -> Arrays:
    rng = np.random.default_rng(5)
    return {f"layer.{i}": rng.standard_normal(SHAPE, np.float32) for i in range(n)}


# --- The paths -------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """One way in.

    convert: a dict of arrays to the input of `call`
    call: the input to results
    codes: results as tensors, for the check
    n_bytes: of results
    """

    convert: Callable[[Arrays], Any]
    call: Callable[[ArrowQuantV2, Any], Any]
    codes: Callable[[Any], list[QuantizedTensor]]
    n_bytes: Callable[[Any], int]
    layers: tuple[int, ...]


def tensors(results: LayerResults) -> list[QuantizedTensor]:
    return [results.tensor(name) for name in results]


def dict_bytes(results: LayerResults) -> int:
    arrays = (result[key] for result in results.values() for key in ("scales", "zero_points"))
    return sum(len(result["quantized_data"]) for result in results.values()) + sum(
        a.nbytes for a in arrays if a is not None
    )


PATHS = {
    "list": Way(
        lambda layers: {name: x.tolist() for name, x in layers.items()},
        lambda quantizer, layers: quantizer.quantize(layers),
        tensors,
        dict_bytes,
        LAYERS[:2],
    ),
    "batch": Way(
        lambda layers: layers, lambda quantizer, layers: quantizer.quantize_batch(layers), tensors, dict_bytes, LAYERS
    ),
    "arrow": Way(
        numpy_to_arrow_table,
        lambda quantizer, table: quantizer.quantize_arrow(table),
        lambda result: [QuantizedTensor.from_arrow(result, row) for row in range(result.num_rows)],
        lambda result: result.nbytes,
        LAYERS,
    ),
}


# --- Measuring -------------------------------------------------------------------------------------------------------


def check_bits(path: str, scheme: str, device: str) -> None:
    """Raise unless the path gives the reference's bytes for two layers."""
    layers, way = make_layers(2), PATHS[path]
    results = way.call(ArrowQuantV2(scheme=scheme, device=device), way.convert(layers))
    for x, q in zip(layers.values(), way.codes(results), strict=True):
        want = reference.quantize(x, Scheme.parse(scheme))
        # On the way through Arrow the rows of a layer follow each other in one.
        for what, expected in zip(("packed", "scales", "zeros"), want[:3], strict=True):
            if expected is not None:
                assert_bitwise_equal(getattr(q, what).reshape(expected.shape), expected, f"{path} {what}")


def kernel_call(place: Cpu | Gpu, layers: Arrays, scheme: Scheme) -> Callable[[int], None]:
    """The backend alone on all layers, as many together as the paths take, into arrays that are there."""
    backend = place.backend
    work = [(backend.put(x), scheme, *outputs(backend, scheme, SHAPE)) for x in layers.values()]
    n = max(1, TOGETHER_BYTES // next(iter(layers.values())).nbytes)

    def call(_: int) -> None:
        for start in range(0, len(work), n):
            backend.quantize_all(work[start : start + n])

    return call


class Seconds(NamedTuple):
    """kernel: of the backend alone; in_kernel: the share of `quantize` that is in ranges of category kernel."""

    kernel: float
    convert: float
    quantize: float
    total: float
    in_kernel: float


def seconds(place: Cpu | Gpu, path: str, layers: Arrays, scheme: str, device: str, rounds: int) -> Seconds:
    """Medians of rounds in which the kernels alone and the path take turns."""
    way, kernels = PATHS[path], kernel_call(place, layers, Scheme.parse(scheme))
    quantizer, found = ArrowQuantV2(scheme=scheme, device=device), []
    with tempfile.TemporaryDirectory() as folder, timeline(Path(folder, "trace.json")) as recorded:
        for i in range(rounds + 1):  # the first round does not count
            alone = place.seconds(kernels, i)
            way.call(quantizer, way.convert(layers))  # a virtual core that slept takes milliseconds to come back
            before = recorded.summary()["categories"]["kernel"]["seconds"]
            start = time.perf_counter()
            given = way.convert(layers)
            converted = time.perf_counter()
            result = way.call(quantizer, given)
            end = time.perf_counter()
            in_kernel = recorded.summary()["categories"]["kernel"]["seconds"] - before
            found.append(Seconds(alone, converted - start, end - converted, end - start, in_kernel / (end - converted)))
            del result, given
    return Seconds(*(statistics.median(values) for values in zip(*found[1:], strict=True)))


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def memory(path: str, n: int, scheme: str, device: str) -> tuple[int, int]:
    """(peak of this process's resident memory during one call over what it was before, bytes of results).

    Run in a process of its own.
    """
    way, quantizer = PATHS[path], ArrowQuantV2(scheme=scheme, device=device)
    given = way.convert(make_layers(n))
    small = {"small": np.ones((8, 128), np.float32)}
    way.call(quantizer, way.convert(small))  # what is compiled and imported is there, and no memory is left over
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    result = way.call(quantizer, given)
    return status_bytes("VmHWM") - before, way.n_bytes(result)


# --- Loading ---------------------------------------------------------------------------------------------------------


def sparse_model(path: Path, n_parameters: int) -> Path:
    """A float32 model of zeros in tensors of `TENSOR`, the last one smaller; it takes no disk."""
    rows, columns = TENSOR
    header: dict[str, Any] = {"__metadata__": {"modality": "text"}}
    done = 0
    while done < n_parameters:
        some = min(rows, -(-(n_parameters - done) // columns))
        offsets = [4 * done, 4 * (done + some * columns)]
        header[f"layers.{len(header) - 1}.weight"] = {
            "dtype": "F32",
            "shape": [some, columns],
            "data_offsets": offsets,
        }
        done += some * columns
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + 4 * done)
    return path


def loading(folder: Path, name: str, n_parameters: int, rounds: int) -> dict[str, Any]:
    """Milliseconds to open a model, and to read all of it."""
    file = sparse_model(folder / f"{name}.safetensors", n_parameters)
    opens, reads, buffer = [], [], np.ones(TENSOR, np.float32)
    for _ in range(rounds + 1):  # the first round does not count
        start = time.perf_counter()
        loader = SafeTensorsLoader(file)
        loader.summary()
        opened = time.perf_counter()
        opens.append(opened - start)
        if loader.total_bytes <= READ_BYTES:
            started = time.perf_counter()
            for x in loader.get_all_tensors().values():
                np.copyto(buffer[: len(x)], x)
            reads.append(time.perf_counter() - started)
    row = {"model": name, "parameters": loader.total_parameters, "size_mb": loader.total_bytes / MB}
    row |= {"open_ms": statistics.median(opens[1:]) * 1e3}
    row |= {"read_ms": statistics.median(reads[1:]) * 1e3 if reads else None}
    file.unlink()
    return row


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
            found = seconds(place, path, some, scheme, device, n_rounds)
            command = [sys.executable, __file__, "--memory-of", path, str(n), "--scheme", scheme, "--device", device]
            done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peak, results = map(int, done.split())
            n_bytes = sum(x.nbytes for x in some.values())
            row = {"path": path, "num_layers": n, "layer_size_mb": n_bytes / n / MB}
            row |= {"convert_median_ms": found.convert * 1e3, "quantize_median_ms": found.quantize * 1e3}
            row |= {"total_median_ms": found.total * 1e3, "per_layer_ms": found.total * 1e3 / n}
            row |= {"kernel_median_ms": found.kernel * 1e3, "kernel_per_layer_ms": found.kernel * 1e3 / n}
            row |= {"outside_kernel": 1 - found.in_kernel, "gb_s": n_bytes / found.total / 1e9}
            row |= {"output_mb": results / MB, "peak_mb": peak / MB, "extra_memory": max(0, peak - results) / n_bytes}
            rows.append(row)
            print(
                f"{path:6} {n:4} layers  {row['total_median_ms']:9.3f} ms  {row['gb_s']:6.2f} GB/s  outside the kernel "
                f"{row['outside_kernel']:6.1%}  memory beyond the output {row['extra_memory']:6.1%} of the input",
                flush=True,
            )
    about = {"scheme": scheme, "device": device, "layer": {"shape": SHAPE, "dtype": "float32"}, "rounds": rounds}
    single = {row["path"]: row for row in rows if row["num_layers"] == 1}
    found = about | {"single_4mb": single, "multi_layer": [row for row in rows if row["num_layers"] > 1]}
    if device == "cpu":
        with tempfile.TemporaryDirectory() as folder:
            found["loading"] = [loading(Path(folder), name, n, rounds) for name, n in MODELS.items()]
        for row in found["loading"]:
            read = "not read" if row["read_ms"] is None else f"read {row['read_ms']:8.1f} ms"
            print(f"{row['model']:5} {row['size_mb']:8.0f} MB  open {row['open_ms']:6.2f} ms  {read}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="int4_g128_asym")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for results and picture")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        path, n = arguments.memory_of
        print(*memory(path, int(n), arguments.scheme, arguments.device))
        return
    path = arguments.out / ("arrowquant_v2.json" if arguments.device == "cpu" else "arrowquant_v2_gpu.json")
    write(path, rounded(run(arguments.scheme, arguments.device, arguments.rounds)))
    pictures.draw(path, pictures.layers)


if __name__ == "__main__":
    main()
