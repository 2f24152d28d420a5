"""Throughput of the engine with 1, 2 and 4 devices where the devices are what takes the time. They are simulated.

    python benchmarks/bench_scaling.py --out benchmarks/results

Each device is SimulatedStreams: real buffers, threads, copies, reads and writes, and kernels that take as long as their
bytes need at a speed far below this machine's, so that its own work fits in beside them. Outputs are first compared
with that of the CPU, byte for byte. The result says how well one queue keeps several devices busy, and nothing about a
GPU. Medians of rounds in which the numbers of devices take turns; nothing here asserts a speed.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arrowquant_gpu import quantize_checkpoint  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu.engine import run as engine  # noqa: E402
from arrowquant_gpu.engine.journal import Journal  # noqa: E402
from arrowquant_gpu.engine.readers import open_reader  # noqa: E402
from arrowquant_gpu.engine.streamed import StreamedDevice  # noqa: E402
from benchmarks import parts  # noqa: E402
from tests.fixtures import write_index, write_safetensors  # noqa: E402
from tests.record import write  # noqa: E402
from tests.simulated_streams import SimulatedStreams  # noqa: E402

SCHEME = "int4_g128"
DEVICES, BARS = (1, 2, 4), {2: 1.9, 4: 3.6}
N_FILES, N_TENSORS, SHAPE = 4, 160, (512, 1024)  # 1 MiB of bfloat16 each
SLOTS, SLOT_BYTES = 3, 1 << 20
# Bytes per second of one device: its kernel is the slowest stage by far.
SPEEDS = {"h2d": 400e6, "kernel": 40e6, "d2h": 400e6}
ROUNDS = 3


def make(folder: Path) -> Path:
    """A model directory whose every tensor is one load."""
    folder.mkdir()
    values = np.random.default_rng(1).standard_normal(SHAPE, np.float32).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for i in range(N_FILES):
        file = f"model-{i + 1:05d}-of-{N_FILES:05d}.safetensors"
        names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(i, N_TENSORS, N_FILES)]
        write_safetensors(folder / file, {name: np.roll(values, k) for k, name in enumerate(names)}, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    write_index(folder, weight_map, N_TENSORS * values.nbytes)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def run(source: Path, target: Path, n: int) -> float:
    """Quantize with n devices into `target`, a new one; seconds from the first load to the last piece written."""
    job = parts.plan(source, target, SCHEME)
    with contextlib.ExitStack() as stack:
        devices = []
        for i in range(n):
            reader = open_reader("buffered", job.source)
            stack.callback(reader.close)
            streams = SimulatedStreams(f"simulated:{i}", speeds=SPEEDS)
            devices.append(StreamedDevice(streams, reader, job.smallest, SLOT_BYTES, SLOTS))
            stack.callback(devices[-1].close)
        job.output.begin()
        journal = stack.enter_context(contextlib.closing(Journal(job.output, {})))
        job.sink.open(job.plan.entries, job.source, {})
        start = time.perf_counter()
        engine.run(job.plan.entries, job.sink, job.output, devices, journal)
        seconds = time.perf_counter() - start
    job.sink.commit()
    return seconds


def check_bits(source: Path, folder: Path) -> None:
    """Raise unless the weights of every number of devices are those of the CPU."""
    quantize_checkpoint(source, folder / "cpu", SCHEME, device="cpu")
    for n in DEVICES:
        run(source, folder / str(n), n)
        for path in sorted((folder / "cpu").glob("*.safetensors")):
            if _data(folder / str(n) / path.name) != _data(path):
                raise SystemExit(f"{n} devices: {path.name} differs from the CPU's")
        shutil.rmtree(folder / str(n))


def _data(path: Path) -> bytes:
    """A safetensors file without its header, which says how the file was made."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results file")
    arguments = parser.parse_args()
    seconds: dict[int, list[float]] = {n: [] for n in DEVICES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make(folder / "source")
        check_bits(source, folder)
        for _ in range(ROUNDS):
            for n in DEVICES:
                seconds[n].append(run(source, folder / "out", n))
                shutil.rmtree(folder / "out")
    medians = {n: statistics.median(taken) for n, taken in seconds.items()}
    n_bytes = N_TENSORS * 2 * SHAPE[0] * SHAPE[1]
    write(
        arguments.out / "scaling.json",
        {
            "is_simulated": True,
            "speeds_mb_s": {stage: speed / 1e6 for stage, speed in SPEEDS.items()},
            "source_bytes": n_bytes,
            "slots": SLOTS,
            "slot_bytes": SLOT_BYTES,
            "rounds": ROUNDS,
            "seconds": {str(n): [round(s, 4) for s in taken] for n, taken in seconds.items()},
            "speedup": {str(n): round(medians[1] / medians[n], 3) for n in DEVICES},
            "bar": {str(n): bar for n, bar in BARS.items()},
        },
    )
    print("simulated devices whose kernel is the slowest stage; bytes are those of the CPU")
    for n in DEVICES:
        bar = f", {BARS[n]} wanted" if n in BARS else ""
        print(f"{n} devices: {n_bytes / medians[n] / 1e6:6.1f} MB/s, {medians[1] / medians[n]:.2f} of one{bar}")


if __name__ == "__main__":
    main()
