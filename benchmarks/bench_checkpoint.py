"""Whole checkpoints of well-known shapes through the engine, beside each of its parts alone. Bits first.

    python benchmarks/bench_checkpoint.py --out benchmarks/results                  # on the CPU: checkpoint.json
    python benchmarks/bench_checkpoint.py --device cuda --out benchmarks/results    # on a GPU: checkpoint_gpu.json
    python benchmarks/bench_checkpoint.py --memory --out benchmarks/results         # peak memory of a 70B: memory.json
    python benchmarks/bench_checkpoint.py --simulate h200 --out benchmarks/results  # simulated_overlap.json

The weights are bfloat16 and normally distributed, on allocated blocks, in shards as the model's publisher made them; as
many layers as leave source and output in the page cache. All figures of a file come from one run; parts and engine take
turns, and medians are given.

On the CPU the parts are the kernels alone, over a new map of the same warm files into small buffers, and the write of
the same output bytes alone, both with the engine's pieces and threads (parts.py). Before each write and each run of the
engine the machine rests until everything is on the disk and memory that was freed is back with the host of a virtual
machine. Getting it again costs more than writing; without the rest, whoever is quicker gets more of it for nothing.
Cores share the memory behind them: where two threads do the same work less than 1.6 times as fast as one, kernels and
write do not run beside each other for nothing, and what the engine is compared with is their sum; otherwise the larger.
On a GPU the parts are the copy over the link from page-locked memory, the read out of the page cache, and the write;
the engine is compared with the slowest. The engine's seconds are without the final flush, which stands beside them;
reading, planning, layout, hashes and manifest are in them.

The peers quantize the tensors of one layer that are in memory already, without reading or writing files.
"""

from __future__ import annotations

import argparse
import contextlib
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
import safetensors

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arrowquant_gpu import quantize_checkpoint, reference  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu.engine.ring import SLOTS  # noqa: E402
from arrowquant_gpu.schemes import Scheme  # noqa: E402
from benchmarks import checkpoints, cpu_peers, parts, pictures, timelines  # noqa: E402
from benchmarks.bench_cpu import rounded  # noqa: E402
from benchmarks.watch import cached_share, watch  # noqa: E402
from tests.bitwise import assert_bitwise_equal  # noqa: E402
from tests.record import write  # noqa: E402

# Two threads that do the same work less than this many times as fast as one get in each other's way.
FULL_SCALING = 1.6
# Source and output together, per byte of source; and how much of the free memory and disk they may take.
PER_BYTE, CACHE_SHARE, DISK_SHARE = 1.35, 0.85, 0.9
SIMULATED_LAYERS = 6
# Seconds before each write and each run of the engine.
REST = 3.0


# --- The source ------------------------------------------------------------------------------------------------------


def fitting_layers(model: checkpoints.Model, work: Path) -> int:
    """As many layers as leave source and output in the page cache, and on the disk of `work`."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    memory = int(lines["MemAvailable"].split()[0]) << 10
    room = min(CACHE_SHARE * memory, DISK_SHARE * shutil.disk_usage(work).free)
    return checkpoints.most_layers(model, int(room), PER_BYTE)


def drop_cache(source: Path) -> str:
    """Take the source out of the page cache; returns how."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        for file in source.glob("*.safetensors"):
            with file.open("rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return "posix_fadvise(DONTNEED)"
    return "/proc/sys/vm/drop_caches"


def rest() -> None:
    """Until what was written is on the disk, and a host has had time to take back what was freed."""
    os.sync()
    time.sleep(REST)


def load_all(source: Path) -> float:
    """Seconds that safetensors takes to load every tensor into memory, one after the other."""
    start = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="np") as f:
            for name in f.keys():  # noqa: SIM118 - not a dictionary
                f.get_tensor(name)
    return time.perf_counter() - start


# --- The engine ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quantized(source: Path, work: Path, scheme: str, device: str, **options: Any) -> Iterator[tuple[Path, Any]]:
    """The output of a run and its summary; removed at the end, and what it left to be written is."""
    target = work / "output"
    try:
        yield target, quantize_checkpoint(source, target, scheme, device=device, **options).summary
    finally:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()


def check_bits(source: Path, target: Path, scheme: Scheme, n: int = 6) -> None:
    """Raise unless samples of rows of n tensors, spread over the model, are what the reference makes of the source."""
    stored = {}
    for file in target.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="np") as f:
            stored |= {name: file for name in f.keys() if name.endswith(".weight_packed")}  # noqa: SIM118
    names = sorted(stored)
    for name in names[:: max(1, len(names) // n)]:
        module = name.removesuffix("_packed")
        with safetensors.safe_open(stored[name], framework="np") as f:
            codes, scales = f.get_tensor(name).view(np.uint8), f.get_tensor(f"{module}_scale")
        file = next(file for file in source.glob("*.safetensors") if module in _names(file))
        with safetensors.safe_open(file, framework="np") as f:
            weights = f.get_tensor(module)
        rows = np.r_[0:3, len(weights) // 2, len(weights) - 3 : len(weights)]
        wanted, wanted_scales, _, _ = reference.quantize(weights[rows], scheme)
        assert_bitwise_equal(codes[rows], wanted, f"{module} codes")
        assert_bitwise_equal(scales[rows], wanted_scales, f"{module} scales")


def _names(file: Path) -> set[str]:
    with safetensors.safe_open(file, framework="np") as f:
        return set(f.keys())


def peak(source: Path, work: Path, device: str, options: list[str], target: str = "output") -> dict[str, float]:
    """Peak memory in MB of the command line in a process of its own."""
    device_bytes = (lambda: 0) if device == "cpu" else _device_bytes
    command = ["quantize", str(source), str(work / target), "--device", device, "--quiet", *options]
    try:
        found = watch([sys.executable, "-m", "arrowquant_gpu.cli", *command], device_bytes)
    finally:
        for left in work.glob(f"*{target}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    sizes = {"anonymous_mb": found.anonymous / 1e6} | ({} if device == "cpu" else {"device_mb": found.device / 1e6})
    return sizes | {"seconds": found.seconds}


def _device_bytes() -> int:
    import cupy

    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


# --- The run ---------------------------------------------------------------------------------------------------------


def run(source: Path, work: Path, scheme: str, device: str, rounds: int) -> dict[str, Any]:
    """Every figure of checkpoint.json but those of the peers."""
    on_cpu = device == "cpu"
    threads = len(os.sched_getaffinity(0)) if on_cpu else SLOTS
    target = work / "parts"
    job = parts.plan(source, target, scheme)
    source_bytes, output_bytes, weight_bytes = job.source_bytes, job.output_bytes, job.weight_bytes
    stored = Scheme.parse(job.plan.summary["stored_schemes"][0])
    del job
    with quantized(source, work, scheme, device) as (output, _):
        check_bits(source, output, stored)

    times: dict[str, list[float]] = {}

    def take(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    for i in range(rounds + 1):
        if i == 1:
            times.clear()  # the first round does not count
        counts = sorted({1, 2, threads} if on_cpu else {threads}, reverse=bool(i % 2))
        for n in counts:
            if on_cpu:
                take(f"kernel {n}", parts.kernels(source, target, scheme, n))
        for n in counts:
            rest()
            written = parts.output(source, target, scheme, n)
            take(f"layout {n}", written.layout)
            take(f"write {n}", written.write)
        take("read", parts.source_bytes(source, target, scheme, threads))
        take("cached", cached_share(source))
        rest()
        with quantized(source, work, scheme, device) as (_, summary):
            take("engine", summary["seconds"])
            take("flush", summary["flush_seconds"])
        take("cached", cached_share(source))
    trace = work / "timeline.json"
    rest()
    with quantized(source, work, scheme, device, timeline=trace) as (_, summary):
        timeline_s = summary["seconds"]
    medians = {name: statistics.median(seen) for name, seen in times.items()}
    alone = {
        name: {"stage": stage, "seconds": seconds, "gb_s": n_bytes / seconds / 1e9}
        for name, stage, seconds, n_bytes in (
            ("kernels", "kernel", medians.get(f"kernel {threads}"), weight_bytes),
            ("link from pinned memory", "h2d", None if on_cpu else parts.link(source_bytes), source_bytes),
            ("read from page cache", "read", medians["read"], source_bytes),
            ("write", "write", medians[f"write {threads}"], output_bytes),
        )
        if seconds is not None
    }
    return {
        "device": device,
        "threads": threads,
        "rounds": rounds,
        "source_bytes": source_bytes,
        "quantized_source_bytes": weight_bytes,
        "output_bytes": output_bytes,
        "alone": alone,
        "layout_s": medians[f"layout {threads}"],
        "engine": {"warm_s": medians["engine"], "flush_s": medians["flush"], "timeline_s": timeline_s},
        "source_gb_s": source_bytes / medians["engine"] / 1e9,
        "source_cached_at_least": min(times["cached"]),
        **(compared_on_cpu(medians, alone) if on_cpu else compared_on_gpu(medians, alone)),
        **stage_shares(trace, threads, on_cpu=on_cpu),
        "all_rounds": times,
    }


def compared_on_cpu(medians: dict[str, float], alone: dict[str, Any]) -> dict[str, Any]:
    """How two threads scale, what follows for the comparison, and the engine's seconds beside it."""
    scaling = {part: medians[f"{part} 1"] / medians[f"{part} 2"] for part in ("kernel", "write")}
    both = alone["kernels"]["seconds"], alone["write"]["seconds"]
    adds_up = min(scaling.values()) < FULL_SCALING
    bar = {
        "name": "kernels + write" if adds_up else "the larger of both",
        "seconds": sum(both) if adds_up else max(both),
    }
    ratios = {"to_larger": medians["engine"] / max(both), "to_sum": medians["engine"] / sum(both)}
    return {
        "scaling_of_two_threads": scaling,
        "bar": bar,
        "ratio": medians["engine"] / bar["seconds"],
        "ratios": ratios,
    }


def compared_on_gpu(medians: dict[str, float], alone: dict[str, Any]) -> dict[str, Any]:
    """The slowest part, and the share of its rate that the engine reaches."""
    name, slowest = max(alone.items(), key=lambda item: item[1]["seconds"])
    bar = {"name": f"the slowest: {name}", "seconds": slowest["seconds"]}
    return {"bar": bar, "share_of_slowest": slowest["seconds"] / medians["engine"]}


def stage_shares(trace: Path, threads: int, *, on_cpu: bool) -> dict[str, Any]:
    """What part of the run each stage took: of the threads' time on the CPU; of the time itself on a GPU."""
    stages = timelines.stages(timelines.load(trace))
    shares = {name: row["at_once"] / threads if on_cpu else row["busy"] for name, row in stages.items()}
    what = "of the threads' time" if on_cpu else "of the run, in which the stage is busy"
    return {"stages": stages, "shares": shares, "shares_are": what}


def cold(source: Path, work: Path, scheme: str, device: str, rounds: int) -> dict[str, Any]:
    """The engine with nothing of the source in the page cache, beside reading it alone."""
    threads = len(os.sched_getaffinity(0)) if device == "cpu" else SLOTS
    times: dict[str, list[float]] = {"read_s": [], "cold_s": [], "cold_flush_s": []}
    for _ in range(rounds):
        how = drop_cache(source)
        times["read_s"].append(parts.source_bytes(source, work / "parts", scheme, threads))
        drop_cache(source)
        with quantized(source, work, scheme, device) as (_, summary):
            times["cold_s"].append(summary["seconds"])
            times["cold_flush_s"].append(summary["flush_seconds"])
    return {"dropped_by": how, **{name: statistics.median(seen) for name, seen in times.items()}}


def first_layer(source: Path) -> Iterator[np.ndarray]:
    """Copies of the matrices of layer 0 that are quantized, at most seven."""
    left = 7
    for file in sorted(source.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="np") as f:
            names = [n for n in f.keys() if ".layers.0." in n and n.endswith("_proj.weight")]  # noqa: SIM118
            for name in names[:left]:
                yield f.get_tensor(name).copy()
            left -= len(names[:left])


# --- Peak memory of a 70B --------------------------------------------------------------------------------------------


def memory(work: Path, device: str, layers: int | None) -> dict[str, Any]:
    """Peak anonymous memory for a sparse 70B, as many layers of it as leave its output room on the disk.

    To compressed-tensors, and to Parquet, whose writer keeps a footer that grows with the model.
    """
    name = "llama-2-70b"
    model = checkpoints.MODELS[name]
    layers = layers or checkpoints.most_layers(model, int(DISK_SHARE * shutil.disk_usage(work).free), 0.3)
    source, n_bytes = work / "source", checkpoints.n_bytes(model.shapes(layers))
    print(f"{name}, {layers} of {model.layers} layers, {n_bytes / 1e9:.1f} GB in sparse files")
    checkpoints.make(source, model, layers, sparse=True)
    rows = []
    for scheme, file_format, target in (
        ("int4_g128", "compressed-tensors", "output"),
        ("int4_g128_asym", "parquet", "output.parquet"),
    ):
        row = {"scheme": scheme, "format": file_format, "layers": layers, "source_bytes": n_bytes}
        row |= peak(source, work, device, ["--scheme", scheme, "--format", file_format], target)
        rows.append(row)
        print(f"  {scheme}, {file_format}: peak anonymous {row['anonymous_mb']:.1f} MB ({row['seconds']:.0f} s)")
    return {"model": name, "of_layers": model.layers, "is_sparse": True, "device": device, "runs": rows}


# --- A simulated GPU -------------------------------------------------------------------------------------------------


def simulate(work: Path, model: str, layers: int, scheme: str, machine: str) -> dict[str, Any]:
    """simulated_overlap.json."""
    from benchmarks import simulated

    source = checkpoints.make(work / "source", checkpoints.MODELS[model], layers)
    output, results = simulated.run(source, work, scheme, machine)
    check_bits(source, output, Scheme.parse(parts.plan(source, work / "x", scheme).plan.summary["stored_schemes"][0]))
    speeds = ", ".join(f"{stage} {speed:g}" for stage, speed in results["speeds_gb_s"].items())
    title = f"SIMULATED: {machine.upper()} speeds ({speeds} GB/s), all divided by {results['factor']}"
    print(f"{title}\n  {model}, {layers} layers, {results['source_bytes'] / 1e9:.1f} GB in {results['seconds']:.2f} s")
    for stage, busy in results["busy"].items():
        print(f"  {stage:8} busy {busy:6.1%} of the run" + ("  (slowest)" if stage == results["slowest_stage"] else ""))
    return {"title": f"{title}. No GPU was used.", "model": model, "layers": layers, "scheme": scheme, **results}


# --- Command line ----------------------------------------------------------------------------------------------------


def show(results: dict[str, Any]) -> None:
    """The table for whoever waits for it."""
    for name, row in results["alone"].items():
        print(f"  {name + ' alone':32} {row['seconds']:7.3f} s  {row['gb_s']:6.2f} GB/s")
    for part, times in results.get("scaling_of_two_threads", {}).items():
        print(f"  {part + ': two threads beside one':32} {times:7.2f} times as fast")
    print(f"  {results['bar']['name']:32} {results['bar']['seconds']:7.3f} s")
    engine = results["engine"]
    if results["source_cached_at_least"] < 0.999:
        print(f"  NOT WARM: only {results['source_cached_at_least']:.1%} of the source stayed in the page cache")
    print(f"  {'engine, warm':32} {engine['warm_s']:7.3f} s  {results['source_gb_s']:6.2f} GB/s", end="")
    ratio = f"{results['ratio']:.2f} x" if "ratio" in results else f"{results['share_of_slowest']:.1%} of"
    print(f"  {ratio} {results['bar']['name']}; then flush {engine['flush_s']:.2f} s")
    print(f"  {'engine, cold':32} {engine['cold_s']:7.3f} s  (reading alone {engine['read_s']:.2f} s)")
    print("  " + ", ".join(f"{name} {share:.0%}" for name, share in results["shares"].items()), results["shares_are"])
    print(f"  {'safetensors, load alone':32} {results['safetensors_load_s']:7.3f} s")
    print("  peak " + ", ".join(f"{name} {value:.1f}" for name, value in results["peak"].items()))
    for row in results.get("peers", ()):
        faster = row["ours_end_to_end_is_faster_by"]
        print(f"  {row['name']:32} {row['gb_s']:7.4f} GB/s without reading or writing; ours is {faster:.0f} x as fast")


def dense(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """checkpoint.json."""
    model = checkpoints.MODELS[arguments.model]
    layers = arguments.layers or fitting_layers(model, work)
    if not arguments.without_peers:
        cpu_peers.versions()  # an absent one is said before the work, not after it
    results: dict[str, Any] = {"model": arguments.model, "layers": layers, "of_layers": model.layers}
    n_bytes = checkpoints.n_bytes(model.shapes(layers))
    print(f"{arguments.model}, {layers} of {model.layers} layers, {n_bytes / 1e9:.1f} GB: ", end="", flush=True)
    print("all of it" if layers == model.layers else "as asked" if arguments.layers else "what the page cache holds")
    source = checkpoints.make(work / "source", model, layers)
    scheme, device = arguments.scheme, arguments.device
    results |= {"scheme": scheme, "load_before": os.getloadavg()[0]}
    results |= run(source, work, scheme, device, arguments.rounds)
    results["safetensors_load_s"] = load_all(source)
    results["peak"] = peak(source, work, device, ["--scheme", scheme])
    results["engine"] |= cold(source, work, scheme, device, min(2, arguments.rounds))
    if not arguments.without_peers:
        rates = cpu_peers.layer(list(first_layer(source)), results["threads"])
        results["peers"] = [
            {"name": name, "gb_s": rate, "ours_end_to_end_is_faster_by": results["source_gb_s"] / rate}
            for name, rate in rates.items()
        ]
        results["peers_are"] = "measured on one layer in memory, without reading or writing"
        results["peer_versions"] = cpu_peers.versions()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=checkpoints.MODELS, default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="by default as many as fit")
    parser.add_argument("--scheme", default="int4_g128", help="symmetric, of 2, 4 or 8 bits")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak memory of a sparse 70B instead")
    parser.add_argument(
        "--simulate", choices=("h200",), help="the engine over simulated streams of such speeds instead"
    )
    parser.add_argument("--work", type=Path, help="folder for source and output; a temporary one by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for results and picture")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="arrowquant-bench-") as folder:
        if arguments.memory:
            results = memory(Path(folder), arguments.device, arguments.layers)
            write(arguments.out / "memory.json", rounded(results))
            return
        if arguments.simulate:
            layers = arguments.layers or SIMULATED_LAYERS
            results = simulate(Path(folder), arguments.model, layers, arguments.scheme, arguments.simulate)
            path = arguments.out / "simulated_overlap.json"
            write(path, rounded(results))
            pictures.draw(path, pictures.timeline)
            return
        results = dense(arguments, Path(folder))
    show(results)
    model = "" if arguments.model == "llama-2-7b" else f"_{arguments.model}"
    path = arguments.out / f"checkpoint{model}{'' if arguments.device == 'cpu' else '_gpu'}.json"
    write(path, rounded(results))
    pictures.draw(path, pictures.checkpoint)


if __name__ == "__main__":
    main()
