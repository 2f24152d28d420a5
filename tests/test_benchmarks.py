"""What benchmarks stand on: shapes, sums over timelines, sampled memory, parts that do what they say, bits first.

None of these looks at a time that was measured.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from arrowquant_gpu import quantize_checkpoint
from arrowquant_gpu.backends.cpu import CpuBackend
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.grids import GRIDS
from arrowquant_gpu.schemes import Scheme
from benchmarks import (
    bench_arrowquant_v2,
    bench_checkpoint,
    bench_cpu,
    bench_kernels,
    bench_tables,
    checkpoints,
    parts,
    pictures,
    simulated,
    timelines,
)
from benchmarks.checkpoints import MODELS, Model
from benchmarks.timelines import Event
from benchmarks.watch import cached_share, watch

ROOT = Path(__file__).parent.parent
TINY = Model("llama", "LlamaForCausalLM", 3, 256, 512, 2, 1, 320, shard_bytes=1 << 20)


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between rounds benchmarks let the machine come to rest, which is of no use where nothing is timed."""
    monkeypatch.setattr(bench_checkpoint, "REST", 0)
    monkeypatch.setattr(bench_cpu, "PAUSE", 0)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dense checkpoint of a few shards."""
    monkeypatch.setattr(checkpoints, "BLOCK_WEIGHTS", 1 << 16)
    monkeypatch.setattr(os, "sync", lambda: None)
    return checkpoints.make(tmp_path / "source", TINY, 2)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="np") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dictionary
    return found


# --- Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "shards"),
    [
        ("llama-2-7b", 6_738_415_616, 2),
        ("mistral-7b", 7_241_732_096, 3),
        ("qwen3-30b-a3b", 30_532_122_624, 16),
        ("llama-2-70b", 68_976_648_192, 15),
    ],
)
def test_models_have_the_size_and_shards_that_were_published(name: str, parameters: int, shards: int) -> None:
    shapes = MODELS[name].shapes()
    assert checkpoints.n_bytes(shapes) == 2 * parameters
    assert len(list(checkpoints._shards(shapes, MODELS[name].shard_bytes))) == shards


def test_every_expert_is_quantized_and_no_router(tmp_path: Path) -> None:
    model = MODELS["qwen3-30b-a3b"]
    source = checkpoints.make(tmp_path / "source", model, 1, sparse=True)
    entries = parts.plan(source, tmp_path / "x", "int4_g128").plan.entries
    quantized = {e.info.name for e in entries if e.scheme is not None}
    assert sum(".experts." in name for name in quantized) == 3 * model.experts
    assert sum(".self_attn." in name for name in quantized) == 4
    assert len(quantized) == 3 * model.experts + 4


def test_dense_weights_are_normal_and_on_the_disk(source: Path) -> None:
    found = tensors(source)
    assert {name: x.shape for name, x in found.items()} == TINY.shapes(2)
    for name, x in found.items():
        if x.ndim == 2:
            assert abs(x.astype(np.float32).std() / 0.02 - 1) < 0.05, name
    assert len({x.tobytes() for x in found.values()}) == len(found)
    files = list(source.glob("*.safetensors"))
    assert len(files) > 1
    assert all(f.stat().st_blocks * 512 >= f.stat().st_size for f in files)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()


def test_sparse_weights_take_no_disk(tmp_path: Path) -> None:
    source = checkpoints.make(tmp_path / "source", TINY, 3, sparse=True)
    assert not any(x.any() for x in tensors(source).values())
    assert sum(f.stat().st_blocks * 512 for f in source.iterdir()) < checkpoints.n_bytes(TINY.shapes()) / 10


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_as_many_layers_as_fit(layers: int) -> None:
    room = checkpoints.n_bytes(TINY.shapes(layers)) * 2
    assert checkpoints.most_layers(TINY, room, 2.0) == layers
    assert checkpoints.most_layers(TINY, room - 1, 2.0) == max(1, layers - 1)


# --- Timelines and memory --------------------------------------------------------------------------------------------


def test_overlapping_ranges_are_busy_once() -> None:
    events = [
        Event("read", "a", "one", 0.0, 2.0, 10),
        Event("read", "b", "two", 1.0, 2.0, 20),
        Event("read", "c", "two", 5.0, 1.0, 30),
        Event("write", "a", "one", 9.0, 1.0, 5),
    ]
    read = timelines.stages(events)["read"]
    assert read == {"bytes": 60, "seconds": 5.0, "busy": 0.4, "at_once": 0.5}
    assert timelines.stages(events)["write"]["busy"] == 0.1
    assert [e["start"] for e in timelines.excerpt(events, 4.0)] == [5.0]


def test_a_timeline_is_read_without_planning_and_flush(source: Path, tmp_path: Path) -> None:
    trace = tmp_path / "timeline.json"
    quantize_checkpoint(source, tmp_path / "output", "int4_g128", device="cpu", timeline=trace)
    stages = timelines.stages(timelines.load(trace))
    assert stages.keys() == {"read", "kernel", "write"}
    job = parts.plan(source, tmp_path / "x", "int4_g128")
    assert stages["read"]["bytes"] == job.source_bytes
    assert stages["kernel"]["bytes"] == job.weight_bytes
    assert "flush" not in {e.name for e in timelines.load(trace)}


def test_peak_memory_of_a_process_is_seen() -> None:
    code = "import time; x = bytearray(b'x') * (80 << 20); time.sleep(0.2); del x; time.sleep(0.1)"
    device = iter([5, 30, 20])
    found = watch([sys.executable, "-c", code], lambda: next(device, 5))
    assert 80 << 20 < found.anonymous < 160 << 20
    assert found.device == 25
    with pytest.raises(SystemExit, match="ended with 3"):
        watch([sys.executable, "-c", "raise SystemExit(3)"])


def test_what_is_in_the_page_cache_is_counted(tmp_path: Path) -> None:
    for name, has_holes in (("a", False), ("b", True)):
        with (tmp_path / f"{name}.safetensors").open("wb") as f:
            f.truncate(1 << 20) if has_holes else f.write(bytes(1 << 20))
    assert cached_share(tmp_path) == 0.5


# --- Parts and bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_parts_touch_every_byte_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    written: list[tuple[str, int, int]] = []
    quantized: list[int] = []
    write, quantize = Output.write, CpuBackend.quantize

    def noted_write(self: Output, name: str, offset: int, data: np.ndarray, *lines: int) -> None:
        if offset:  # the header is laid out, not written as a piece
            written.append((name, offset, data.nbytes))
        write(self, name, offset, data, *lines)

    def noted_quantize(self: CpuBackend, x: np.ndarray, *rest: Any) -> Any:
        quantized.append(x.nbytes)
        return quantize(self, x, *rest)

    monkeypatch.setattr(Output, "write", noted_write)
    monkeypatch.setattr(CpuBackend, "quantize", noted_quantize)
    arguments = source, tmp_path / "parts", "int4_g128", threads
    parts.output(*arguments)
    alone, written[:] = sorted(written), []
    parts.kernels(*arguments)
    parts.source_bytes(*arguments)
    assert not list(tmp_path.glob("*parts*"))
    assert sum(quantized) == parts.plan(source, tmp_path / "x", "int4_g128").weight_bytes
    quantize_checkpoint(source, tmp_path / "output", "int4_g128", device="cpu")
    assert alone == sorted(written)


def test_a_part_that_fails_says_so(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "quantize", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        parts.kernels(source, tmp_path / "parts", "int4_g128", 2)


def test_a_wrong_code_in_a_checkpoint_is_noticed(source: Path, tmp_path: Path) -> None:
    output, scheme = tmp_path / "output", Scheme.parse("int4_g128_bf16")
    quantize_checkpoint(source, output, "int4_g128", device="cpu")
    bench_checkpoint.check_bits(source, output, scheme, n=99)
    for file in output.glob("*.safetensors"):
        with file.open("r+b") as f:
            begin = 8 + int.from_bytes(f.read(8), "little")
            size = f.seek(0, os.SEEK_END)
            for at in range(begin, size, 512):
                f.seek(at)
                byte = f.read(1)[0]
                f.seek(at)
                f.write(bytes([byte ^ 1]))
    with pytest.raises(AssertionError):
        bench_checkpoint.check_bits(source, output, scheme, n=99)


@pytest.mark.parametrize("path", bench_arrowquant_v2.PATHS)
def test_a_wrong_code_on_a_path_is_noticed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_arrowquant_v2, "SHAPE", (8, 256))
    bench_arrowquant_v2.check_bits(path, "int4_g128_asym", "cpu")
    monkeypatch.setattr(bench_arrowquant_v2.reference, "quantize", wrong(bench_arrowquant_v2.reference.quantize))
    with pytest.raises(AssertionError):
        bench_arrowquant_v2.check_bits(path, "int4_g128_asym", "cpu")


def test_a_wrong_code_of_a_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuBackend(1)
    ids = ("int4_g128", "int3_channel_asym", "int8_tensor", "int2_tensor_asym", "nvfp4", "e4m3_tensor", "q4_k")
    schemes = [Scheme.parse(text) for text in ids]
    for scheme in schemes:
        bench_kernels.check_bits(backend, scheme, "bfloat16")
    monkeypatch.setattr(bench_kernels.reference, "quantize", wrong(bench_kernels.reference.quantize))
    for scheme in schemes:
        with pytest.raises(AssertionError):
            bench_kernels.check_bits(backend, scheme, "bfloat16")


def wrong(quantize: Any) -> Any:
    """The reference, with one bit of the codes turned."""

    def changed(*arguments: Any) -> Any:
        packed, *rest = quantize(*arguments)
        packed[-1, 0] ^= 1
        return (packed, *rest)

    return changed


# --- Whole runs ------------------------------------------------------------------------------------------------------


def test_kernels_are_all_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_kernels, "make_weights", lambda dtype: [np.ones((64, 1024), dtype)] * 2)
    monkeypatch.setattr(bench_kernels, "check_bits", lambda *_: None)
    results = bench_kernels.run(bench_kernels.Cpu(1), ("float32",), 1)
    names = [row["scheme"] for row in results["kernels"]]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("int") for name in names) == 6 * (5 * 2 + 2 * 2)
    assert {Scheme.parse(name).grid for name in names} == set(GRIDS)
    assert all(row["gb_s"] > 0 for row in results["kernels"])
    assert capsys.readouterr().out.count("of the copy") == len(names)


def test_a_checkpoint_is_measured(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = bench_checkpoint.run(source, tmp_path, "int4_g128", "cpu", 1)
    results["engine"] |= bench_checkpoint.cold(source, tmp_path, "int4_g128", "cpu", 1)
    results["safetensors_load_s"], results["peak"] = bench_checkpoint.load_all(source), {"anonymous_mb": 1.0}
    assert results["alone"].keys() == {"kernels", "read from page cache", "write"}
    assert results["source_bytes"] == checkpoints.n_bytes(TINY.shapes(2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "timeline.json"]
    bench_checkpoint.show(results)
    assert "engine, warm" in capsys.readouterr().out


@pytest.mark.parametrize(("scales", "seconds"), [(1.9, 3.0), (1.5, 5.0)])
def test_what_the_engine_is_compared_with(scales: float, seconds: float) -> None:
    """The larger part where two threads scale, else the sum."""
    medians = {"kernel 1": 2 * scales, "kernel 2": 2.0, "write 1": 3 * 1.9, "write 2": 3.0, "engine": 4.5}
    found = bench_checkpoint.compared_on_cpu(medians, {"kernels": {"seconds": 2.0}, "write": {"seconds": 3.0}})
    assert found["bar"]["seconds"] == seconds
    assert found["ratio"] == 4.5 / seconds


def test_a_simulated_run_gives_the_right_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulated, "FACTOR", 5)
    monkeypatch.setattr(simulated, "SLOT_BYTES", 1 << 20)
    monkeypatch.setattr(simulated, "SLOTS", 4)
    output, results = simulated.run(source, tmp_path, "int4_g128", "h200")
    bench_checkpoint.check_bits(source, output, Scheme.parse("int4_g128_bf16"))
    assert results["is_simulated"]
    assert results["busy"].keys() == {"read", "h2d", "kernel", "d2h", "write"}
    assert results["slowest_stage"] == "read"
    quantize_checkpoint(source, tmp_path / "cpu", "int4_g128", device="cpu")
    for file in output.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "cpu" / file.name).read_bytes()


def test_a_page_cache_in_simulation_is_as_fast_as_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own clock: turns follow each other, however many threads ask."""
    turns: list[tuple[float, float]] = []
    monkeypatch.setattr(simulated.trace, "record", lambda kind, name, start, end, n, track: turns.append((start, end)))

    class Nothing:
        name, slack, notes = "nothing", 0, ()

        def read(self, load: Any, buffer: Any) -> np.ndarray:
            return np.empty(0, np.uint8)

    reader = simulated.PacedReader(Nothing(), 1e9)  # type: ignore[arg-type]
    load = parts.Load(source / "x", 0, 1_000_000, ())
    parts.seconds(4, lambda _: reader.read(load, None))
    turns.sort()
    assert all(abs(end - start - 1e-3) < 1e-9 for start, end in turns)
    assert all(turns[i + 1][0] >= turns[i][1] for i in range(3))


def test_layers_are_measured_on_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And models are loaded; memory in a process of its own, which reads the same file."""
    monkeypatch.setattr(bench_arrowquant_v2, "SHAPE", (8, 256))
    monkeypatch.setattr(bench_arrowquant_v2, "LAYERS", (1, 2))
    monkeypatch.setattr(bench_arrowquant_v2, "TENSOR", (64, 64))
    monkeypatch.setattr(bench_arrowquant_v2, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(bench_arrowquant_v2, "MODELS", {"small": 100_000, "large": 1_000_000})
    ways = {path: way._replace(layers=(1, 2)) for path, way in bench_arrowquant_v2.PATHS.items()}
    monkeypatch.setattr(bench_arrowquant_v2, "PATHS", ways)
    results = bench_arrowquant_v2.run("int4_g128_asym", "cpu", 1)
    measured = {"layer_size_mb", "convert_median_ms", "quantize_median_ms", "total_median_ms"}
    assert results["single_4mb"].keys() == {"list", "batch", "arrow"}
    assert all(row.keys() >= measured for row in results["single_4mb"].values())
    assert [(row["path"], row["num_layers"]) for row in results["multi_layer"]] == [(path, 2) for path in ways]
    for row in results["multi_layer"]:
        assert row["per_layer_ms"] == row["total_median_ms"] / 2 > 0
        assert 0 <= row["outside_kernel"] < 1
        assert row["output_mb"] > 0
    assert [(row["model"], row["read_ms"] is None) for row in results["loading"]] == [("small", False), ("large", True)]
    assert [row["parameters"] for row in results["loading"]] == [100_032, 1_000_000]
    drawn = set(re.findall(r"row\[[\"'](\w+)", inspect.getsource(pictures.layers)))
    assert drawn
    assert all(row.keys() >= drawn for row in results["multi_layer"])


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels in the shim, behind a stand-in for CuPy that the benchmarks take for a GPU."""
    from .gpuless import fake_cupy
    from .gpuless.loaders import ShimLoader
    from .gpuless.stand_in import backend_over

    def copy(self: Any, source: Any, n_bytes: int) -> None:
        fake_cupy.DeviceArray((n_bytes,), np.uint8, self)[:] = fake_cupy.DeviceArray((n_bytes,), np.uint8, source)

    monkeypatch.setattr(fake_cupy.MemoryPointer, "copy_from_device_async", copy, raising=False)
    (tmp_path / "cubins").mkdir()
    backend_over(ShimLoader(), monkeypatch, tmp_path / "cubins")


@pytest.mark.compiler
@pytest.mark.usefixtures("stand_in")
def test_the_benchmark_of_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [Scheme.parse(s) for s in ("int4_g128", "int4_tensor_asym", "q4_0", "nvfp4")]
    monkeypatch.setattr(bench_kernels, "turns", lambda: {"some": chosen})
    monkeypatch.setattr(bench_kernels, "FLUSH_BYTES", 1 << 12)
    monkeypatch.setattr(bench_kernels, "HOST_BYTES", 1 << 12)
    monkeypatch.setattr(bench_kernels.Gpu, "shape", (16, 256))
    launches = []
    place = bench_kernels.Gpu()
    seconds = place.seconds
    monkeypatch.setattr(place, "seconds", lambda *a: (seconds(*a), launches.append(len(place.spans)))[0])
    results = bench_kernels.run(place, ("bfloat16",), 1)
    assert [row["scheme"] for row in results["kernels"]] == [s.id for s in chosen]
    assert launches == [1, 1, 2, 1, 2] * 2  # the copy, one kernel, and two where the range must be known
    assert results["host"].keys() == {"put_gb_s", "get_gb_s"}


@pytest.mark.compiler
@pytest.mark.usefixtures("stand_in")
def test_the_benchmark_of_layers_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "FLUSH_BYTES", 1 << 12)
    monkeypatch.setattr(bench_arrowquant_v2, "SHAPE", (16, 256))
    layers = bench_arrowquant_v2.make_layers(2)
    for path in bench_arrowquant_v2.PATHS:
        bench_arrowquant_v2.check_bits(path, "int4_g128_asym", "cuda")
        times = bench_arrowquant_v2.seconds(bench_kernels.Gpu(), path, layers, "int4_g128_asym", "cuda", 1)
        assert min(times) > 0


@pytest.mark.compiler
@pytest.mark.usefixtures("stand_in")
def test_the_benchmark_of_a_checkpoint_on_a_gpu(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from arrowquant_gpu.engine import ring

    monkeypatch.setattr(parts, "READ_BYTES", 1 << 18)
    for module, name, value in ((ring, "SLOTS", 2), (ring, "SLOT_BYTES", 1 << 18), (bench_checkpoint, "SLOTS", 2)):
        monkeypatch.setattr(module, name, value)
    results = bench_checkpoint.run(source, tmp_path, "int4_g128", "cuda", 1)
    assert results["alone"].keys() == {"link from pinned memory", "read from page cache", "write"}
    assert results["stages"].keys() == {"read", "h2d", "kernel", "d2h", "write"}
    assert results["bar"]["seconds"] == max(row["seconds"] for row in results["alone"].values())


def test_tables_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the sizes given here in processes of their own, which know only what is on the disk."""
    monkeypatch.setattr(bench_tables, "SHAPE", (16, 256))
    monkeypatch.setattr(bench_tables, "LAYERS", 4)
    monkeypatch.setattr(bench_tables, "FILE_GROUPS", 2)
    monkeypatch.setattr(os, "sync", lambda: None)
    results = bench_tables.run(tmp_path, 5 * 4 * 16 * 256 * 4 / 1e9, "int4_g128_asym", "cpu", 1)
    assert [row["source"] for row in results["tables"]] == list(bench_tables.SOURCES)
    assert results["weight_bytes"] == 5 * 4 * 16 * 256 * 4
    for row in results["tables"]:
        assert all(row[what][key] > 0 for what in ("quantize", "copy") for key in row[what])
    assert capsys.readouterr().out.count("quantize") == 3
    assert len(list((tmp_path / "weights").iterdir())) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_a_wrong_code_in_a_table_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tables, "SHAPE", (16, 256))
    monkeypatch.setattr(bench_tables, "LAYERS", 4)
    source = bench_tables.make("stream", tmp_path, 2)
    bench_tables.quantize_file(source, tmp_path / "q.arrow", "int4_g128_asym", device="cpu")
    bench_tables.check_bits(tmp_path / "q.arrow", "int4_g128_asym", 2)
    monkeypatch.setattr(bench_tables.reference, "quantize", wrong(bench_tables.reference.quantize))
    with pytest.raises(AssertionError):
        bench_tables.check_bits(tmp_path / "q.arrow", "int4_g128_asym", 2)


def test_make_runs_every_benchmark() -> None:
    """With options that it has."""
    lines = re.findall(r"(benchmarks/\w+\.py)(.*)", (ROOT / "Makefile").read_text())
    scripts = {str(p.relative_to(ROOT)) for p in (ROOT / "benchmarks").glob("bench_*.py")}
    assert {script for script, _ in lines} == scripts | {"benchmarks/sass.py"}
    for script, words in lines:
        text = (ROOT / script).read_text()
        assert all(f'"{option}"' in text for option in re.findall(r"--[a-z-]+", words)), (script, words)
