"""Tables of weights on disk: peak memory and throughput, beside pyarrow copying the same. Bits first.

    python benchmarks/bench_tables.py --out benchmarks/results    # tables.json; 30 GB of disk are needed meanwhile

A table has rows of [1024, 1024] float32 in record batches, or row groups, of 128 MB. Sources: `stream`, an Arrow IPC
stream in a file; `pipe`, the same through a pipe; `dataset`, a directory of Parquet files. Each is quantized to an
Arrow IPC file in a process of its own. The copy is pyarrow reading every record batch of the columns, of a dataset with
its Scanner, and writing it to an Arrow IPC file. Sources have just been written: what fits is in the page cache.

Memory is sampled: anonymous is what the process allocated, resident has the pages of mapped files too, which are the
kernel's to drop. Weights are the same in every batch, under other names.

Nothing here asserts a speed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arrowquant_gpu import QuantizedTensor, reference  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu.schemes import Scheme  # noqa: E402
from arrowquant_gpu.tables.files import quantize_file  # noqa: E402
from arrowquant_gpu.tables.quantize import quantize_table  # noqa: E402
from benchmarks.bench_cpu import rounded  # noqa: E402
from benchmarks.watch import watch  # noqa: E402
from tests.bitwise import assert_bitwise_equal  # noqa: E402
from tests.record import write  # noqa: E402

SHAPE = (1024, 1024)
LAYERS = 32  # of one record batch or row group
FILE_GROUPS = 8  # row groups of one file of the dataset
SOURCES = ("stream", "pipe", "dataset")


def weights() -> np.ndarray:
    """Of every record batch: [layers, rows, length]."""
    return np.random.default_rng(7).standard_normal((LAYERS, *SHAPE), np.float32)


def batches(n: int) -> Iterator[pa.RecordBatch]:
    """`n` record batches over the same weights."""
    values, size = weights().reshape(-1), SHAPE[0] * SHAPE[1]
    lists = pa.ListArray.from_arrays(np.arange(0, values.size + 1, size, np.int32), pa.array(values))
    shapes = pa.array([SHAPE] * LAYERS, pa.list_(pa.int64()))
    for i in range(n):
        names = pa.array([f"layer.{i * LAYERS + k}" for k in range(LAYERS)])
        yield pa.record_batch({"layer_name": names, "weights": lists, "shape": shapes})


def make(source: str, folder: Path, n: int) -> Path:
    """The table on disk."""
    made, schema = batches(n), next(batches(1)).schema
    if source != "dataset":
        path = folder / "weights.arrows"
        with pa.ipc.new_stream(path, schema) as writer:
            for batch in made:
                writer.write_batch(batch)
        return path
    path = folder / "weights"
    path.mkdir()
    for i in range(0, n, FILE_GROUPS):
        name = path / f"part-{i // FILE_GROUPS:03d}.parquet"
        with pq.ParquetWriter(name, schema, compression="none", use_dictionary=["layer_name"]) as writer:
            for batch in itertools.islice(made, FILE_GROUPS):
                writer.write_table(pa.Table.from_batches([batch]), row_group_size=LAYERS)
    return path


# --- Work in a process of its own ------------------------------------------------------------------------------------


def copy(src: str, dst: str) -> None:
    """What pyarrow makes of the table without this package."""
    if Path(src).is_dir():
        reader = ds.dataset(src).scanner().to_reader()
    else:
        reader = pa.ipc.open_stream(sys.stdin.buffer if src == "-" else pa.memory_map(src))
    with pa.ipc.new_file(dst, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)


def work(what: str, src: str, dst: str, scheme: str, device: str) -> dict[str, float]:
    """Seconds, and the peak of resident memory."""
    if what == "quantize":  # what is compiled and imported is there
        small = pa.table({"layer_name": ["small"], "weights": [[1.0] * 256]})
        quantize_table(small, scheme, device=device)
    start = time.perf_counter()
    if what == "copy":
        copy(src, dst)
    else:
        quantize_file(sys.stdin.buffer if src == "-" else src, dst, scheme, device=device)
    seconds = time.perf_counter() - start
    lines = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    return {"seconds": seconds, "resident_mb": resident / 1e6}


def measured(what: str, source: str, src: Path, dst: Path, scheme: str, device: str) -> dict[str, Any]:
    """`work` in a process of its own, and the peak of its anonymous memory."""
    report = dst.with_suffix(".json")
    arguments = [__file__, "--work", what, "-" if source == "pipe" else str(src), str(dst), str(report)]
    command = [sys.executable, *arguments, "--scheme", scheme, "--device", device]
    if source == "pipe":
        command = ["bash", "-c", 'exec "$@" < <(cat "$0")', str(src), *command]
    peak = watch(command)
    found = json.loads(report.read_text()) | {"anonymous_mb": peak.anonymous / 1e6}
    report.unlink()
    return found


# --- Results ---------------------------------------------------------------------------------------------------------


def check_bits(result: Path, scheme: str, n: int) -> None:
    """Raise unless the layers of the first and the last batch, two of each, are what the reference makes of them."""
    rows, made = pa.ipc.open_file(pa.memory_map(str(result))).read_all(), weights()
    assert rows.num_rows == n * LAYERS
    for row in (0, LAYERS - 1, (n - 1) * LAYERS, n * LAYERS - 1):
        assert rows["layer_name"][row].as_py() == f"layer.{row}"
        got = QuantizedTensor.from_arrow(rows, row)
        want = reference.quantize(made[row % LAYERS], Scheme.parse(scheme))
        for name, expected in zip(("packed", "scales", "zeros"), want[:3], strict=True):
            if expected is not None:
                assert_bitwise_equal(getattr(got, name), expected, f"layer.{row} {name}")


def run(folder: Path, gigabytes: float, scheme: str, device: str, rounds: int) -> dict[str, Any]:
    """What goes into the results file."""
    batch_bytes = LAYERS * SHAPE[0] * SHAPE[1] * 4
    n = max(1, round(gigabytes * 1e9 / batch_bytes))
    rows, made = [], {}
    for source in SOURCES:
        kind = "stream" if source == "pipe" else source
        if kind not in made:
            for old in made.values():  # the disk need not hold both
                shutil.rmtree(old) if old.is_dir() else old.unlink()
            made = {kind: make(kind, folder, n)}
        row: dict[str, Any] = {"source": source}
        for what in ("quantize", "copy"):
            each = []
            for _ in range(rounds):
                target = folder / "result.arrow"
                os.sync()
                each.append(measured(what, source, made[kind], target, scheme, device))
                if what == "quantize":
                    check_bits(target, scheme, n)
                target.unlink()
            best = {key: max(x[key] for x in each) for key in ("anonymous_mb", "resident_mb")}
            best |= {"seconds": statistics.median(x["seconds"] for x in each)}
            row[what] = best | {"gb_s": n * batch_bytes / best["seconds"] / 1e9}
        rows.append(row)
        print(
            f"  {source:8} quantize {row['quantize']['gb_s']:5.2f} GB/s, {row['quantize']['anonymous_mb']:5.0f} MB "
            f"anonymous, {row['quantize']['resident_mb']:6.0f} resident;  copy {row['copy']['gb_s']:5.2f} GB/s, "
            f"{row['copy']['anonymous_mb']:5.0f} MB",
            flush=True,
        )
    about = {"scheme": scheme, "device": device, "rounds": rounds, "weight_bytes": n * batch_bytes}
    return about | {"batch_bytes": batch_bytes, "layer": {"shape": SHAPE, "dtype": "float32"}, "tables": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0, help="weights of one table")
    parser.add_argument("--scheme", default="int4_g128_asym")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for sources and results; a temporary one by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results file")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        what, src, dst, report = arguments.work
        found = work(what, src, dst, arguments.scheme, arguments.device)
        Path(report).write_text(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="arrowquant-bench-") as folder:
        results = run(Path(folder), arguments.gigabytes, arguments.scheme, arguments.device, arguments.rounds)
    write(arguments.out / "tables.json", rounded(results))


if __name__ == "__main__":
    main()
