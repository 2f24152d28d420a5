"""Weights through the Flight service on one machine, beside Flight alone: the same bytes to a server that drops them.

    python benchmarks/bench_flight.py --out benchmarks/results     # flight.json

Server and client are processes of their own, joined by the loopback interface; the client sends the same float32
tensors over and over, from where they lie. The three ways take turns in each round, and medians are given:

- quantize: `Client.quantize_stream`, of which the rows that come back are dropped;
- exchange: a DoExchange that answers each record batch with a number;
- put: a DoPut that drops what comes.

GB/s are of weights. Memory is the largest sample of anonymous memory, and of all resident memory, of each process. A
sample of what comes back is compared with the reference first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arrowquant_gpu.flight import Client, Server  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu.flight.cuts import MESSAGE_BYTES  # noqa: E402
from arrowquant_gpu.tables.quantize import quantize_table  # noqa: E402
from arrowquant_gpu.tables.weights import weights_schema  # noqa: E402
from benchmarks.watch import PERIOD, anonymous_bytes  # noqa: E402
from tests.record import write  # noqa: E402

# Of one tensor: 64 MB.
SHAPE = (4096, 4096)
WAYS = ("quantize", "exchange", "put")
MESSAGE_MB = (1, 4, 8, 16, 32, 64)


# --- The processes ---------------------------------------------------------------------------------------------------


class Nothing(fl.FlightServerBase):  # type: ignore[misc]
    """A Flight server that reads what comes, and drops it."""

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        for _ in reader:
            pass

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        writer.begin(pa.schema([("n", pa.int64())]))
        for _ in reader:
            writer.write_batch(pa.record_batch({"n": [1]}))


def serve(way: str) -> None:
    """Until stdin ends; the location is the first line of stdout."""
    if way == "quantize":
        with Server("grpc://127.0.0.1:0", device="cpu") as server:
            print(server.location, flush=True)
            sys.stdin.read()
        return
    with Nothing("grpc://127.0.0.1:0") as nothing:
        print(f"grpc://127.0.0.1:{nothing.port}", flush=True)
        sys.stdin.read()


def send(way: str, location: str, scheme: str, n_tensors: int, rows: int, message_bytes: int) -> None:
    """A client for as long as stdin has lines; each is a run, whose seconds are a line of stdout."""
    w = np.random.default_rng(0).standard_normal((rows, SHAPE[1]), np.float32)
    run = {"quantize": _quantize, "exchange": _exchange, "put": _put}[way]
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run(location, w, scheme, n_tensors, message_bytes)
        print(time.perf_counter() - start, flush=True)


def tensors(w: np.ndarray, n: int) -> Iterator[pa.RecordBatch]:
    """The same memory under n names."""
    offsets = pa.array([0, w.size], pa.int64())
    cells = pa.LargeListArray.from_arrays(offsets, pa.array(w.reshape(-1)))
    for i in range(n):
        yield pa.record_batch({"layer_name": [f"layer.{i}"], "weights": cells, "shape": [list(w.shape)]})


def pieces(w: np.ndarray, n: int, message_bytes: int) -> Iterator[pa.RecordBatch]:
    """The same bytes in messages of one size, with the columns that the client sends."""
    step = max(1, message_bytes // (4 * w.shape[1]))
    schema = weights_schema("float32", is_cut=True)
    for i in range(n):
        for at in range(0, len(w), step):
            flat = pa.array(w[at : at + step].reshape(-1))
            cells = pa.LargeListArray.from_arrays(pa.array([0, len(flat)], pa.int64()), flat)
            rest = [pa.array([x], t) for x, t in ((0, pa.uint32()), (1, pa.uint32()))]
            arrays = [pa.array([f"layer.{i}"]), cells, pa.array([list(w.shape)], pa.list_(pa.int64())), *rest]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _quantize(location: str, w: np.ndarray, scheme: str, n: int, message_bytes: int) -> None:
    with Client(location, message_bytes=message_bytes) as client:
        source = pa.RecordBatchReader.from_batches(next(tensors(w, 1)).schema, tensors(w, n))
        stream, _ = client.quantize_stream(source, scheme)
        n_rows = sum(sum(c == 0 for c in batch["chunk"].to_pylist()) for batch in stream)
    if n_rows != n:
        raise SystemExit(f"{n} tensors were sent, and {n_rows} came back")


def _exchange(location: str, w: np.ndarray, scheme: str, n: int, message_bytes: int) -> None:
    with fl.connect(location) as client:
        writer, reader = client.do_exchange(fl.FlightDescriptor.for_command(b"nothing"))
        writer.begin(weights_schema("float32", is_cut=True))
        sender = threading.Thread(target=lambda: [writer.write_batch(b) for b in pieces(w, n, message_bytes)])
        sender.start()
        for _ in range(sum(1 for _ in pieces(w, n, message_bytes))):
            reader.read_chunk()
        sender.join()
        writer.close()


def _put(location: str, w: np.ndarray, scheme: str, n: int, message_bytes: int) -> None:
    with fl.connect(location) as client:
        writer, _ = client.do_put(fl.FlightDescriptor.for_command(b"nothing"), weights_schema("float32", is_cut=True))
        for batch in pieces(w, n, message_bytes):
            writer.write_batch(batch)
        writer.close()


# --- The run ---------------------------------------------------------------------------------------------------------


class Pair:
    """A server and a client, whose memory is watched while the client runs."""

    def __init__(self, way: str, scheme: str, n_tensors: int, rows: int, message_bytes: int) -> None:
        self.n_bytes = n_tensors * rows * SHAPE[1] * 4
        self.peaks: dict[str, int] = {}
        self._server, location = _start("--serve", way)
        self._client, _ = _start("--send", way, location, scheme, *(str(x) for x in (n_tensors, rows, message_bytes)))

    def run(self) -> float:
        """Seconds of one run."""
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        is_over = threading.Event()
        watching = threading.Thread(target=self._watch, args=(is_over,))
        watching.start()
        try:
            self._client.stdin.write("go\n")
            self._client.stdin.flush()
            return float(self._client.stdout.readline())
        finally:
            is_over.set()
            watching.join()

    def close(self) -> None:
        for process in (self._client, self._server):
            process.communicate()
            if process.returncode:
                raise SystemExit(f"{process.args} ended with {process.returncode}")

    def _watch(self, is_over: threading.Event) -> None:
        while not is_over.wait(PERIOD):
            for side, process in (("server", self._server), ("client", self._client)):
                for what, found in (("anonymous", anonymous_bytes(process.pid)), ("resident", _resident(process.pid))):
                    key = f"{side}_{what}_mb"
                    self.peaks[key] = max(self.peaks.get(key, 0), found)


def _resident(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS")), 0)


def _start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A process of this script, and the first line that it prints."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def check_bits(scheme: str) -> None:
    """Raise SystemExit unless what comes back is what the reference makes."""
    w = np.random.default_rng(1).standard_normal((300, 512), np.float32)
    table = pa.Table.from_batches(tensors(w, 3))
    with Server("grpc://127.0.0.1:0", device="cpu") as server, Client(server.location, message_bytes=1 << 17) as client:
        if not client.quantize(table, scheme).equals(quantize_table(table, scheme, device="reference")):
            raise SystemExit(f"{scheme}: what came back is not what the reference makes")


def measure(scheme: str, n_bytes: int, rounds: int, message_bytes: int, rows: int = SHAPE[0]) -> dict[str, Any]:
    """Seconds, GB/s and peak memory of each way, medians of rounds in which they take turns."""
    n_tensors = max(1, -(-n_bytes // (rows * SHAPE[1] * 4)))
    pairs = {way: Pair(way, scheme, n_tensors, rows, message_bytes) for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(rounds + 1):
        for way, pair in pairs.items():
            took = pair.run()
            if i:  # in the first round kernels are compiled, and memory is got
                seconds[way].append(took)
    result: dict[str, Any] = {"message_bytes": message_bytes, "weight_bytes": next(iter(pairs.values())).n_bytes}
    for way, pair in pairs.items():
        pair.close()
        median = statistics.median(seconds[way])
        peaks = {key: peak / 1e6 for key, peak in sorted(pair.peaks.items())}
        result[way] = {"seconds": median, "gb_s": pair.n_bytes / median / 1e9, **peaks, "all_seconds": seconds[way]}
    result["share_of_exchange"] = result["quantize"]["gb_s"] / result["exchange"]["gb_s"]
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write flight.json to this directory")
    parser.add_argument("--scheme", default="int4_g128_asym")
    parser.add_argument("--gigabytes", type=float, default=5.0, help="float32 weights of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--send", nargs=6, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        serve(given.serve)
    elif given.send:
        send(*given.send[:3], *map(int, given.send[3:]))
    else:
        check_bits(given.scheme)
        n_bytes = int(given.gigabytes * 1e9)
        found = {"scheme": given.scheme, "rounds": given.rounds}
        found |= measure(given.scheme, n_bytes, given.rounds, MESSAGE_BYTES)
        sizes = [measure(given.scheme, n_bytes // 5, given.rounds, mb << 20) for mb in MESSAGE_MB]
        found["by_message_size"] = [
            {"message_bytes": s["message_bytes"]}
            | {way: {k: s[way][k] for k in ("gb_s", "server_anonymous_mb")} for way in WAYS}
            for s in sizes
        ]
        print(json.dumps(found, indent=1))
        if given.out:
            write(given.out / "flight.json", found)


if __name__ == "__main__":
    main()
