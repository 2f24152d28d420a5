"""Quantized checkpoints back to float safetensors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from arrowquant_gpu import dequantize_checkpoint, quantize_checkpoint, reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.engine.decoded import narrow
from arrowquant_gpu.errors import InputError, SourceError, TargetError
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.arrow_ipc import ArrowSink
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.parquet import ParquetSink
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.formats.safetensors import layout
from arrowquant_gpu.pipeline import dequantize as module
from arrowquant_gpu.schemes import Scheme, rows_and_length

from .bitwise import assert_bitwise_equal
from .fixtures import tiny_llama, write_safetensors
from .row_files import Model, small_model, write

ROOT = Path(__file__).parent.parent
FORMATS = ("compressed-tensors", "parquet", "parquet-tensors", "arrow")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model", "bfloat16", shards=3)


def quantized(llama: Path, folder: Path, format_name: str, scheme: str = "int4_g32") -> Path:
    target = folder / f"quantized {format_name}"
    quantize_checkpoint(llama, target, scheme, format=format_name, device="reference")
    return target


def decoded(x: np.ndarray, scheme: Scheme, dtype: str) -> np.ndarray:
    """Quantized and decoded by the reference."""
    rows = x.reshape(rows_and_length(x.shape))
    packed, scales, zeros, _ = reference.quantize(rows, scheme)
    return reference.dequantize(packed, scales, zeros, scheme, rows.shape[1], dtype).reshape(x.shape)


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("scheme", ["int4_g32", "int8_channel_asym", "int2_g16"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_comes_back(llama: Path, tmp_path: Path, format_name: str, scheme: str, dtype: str | None) -> None:
    source = quantized(llama, tmp_path, format_name, scheme)
    target = tmp_path / ("back" if source.is_dir() else "back.safetensors")
    result = dequantize_checkpoint(source, target, dtype=dtype, device="reference")
    original, back, entries = open_checkpoint(llama), open_checkpoint(target), open_quantized(source).entries
    assert back.tensors.keys() == original.tensors.keys() == entries.keys()
    for name, info in original.tensors.items():
        x, stored = original.view(name), entries[name].scheme
        want = x if stored is None else decoded(x, stored, dtype or info.dtype)
        assert_bitwise_equal(back.view(name), want, name)
    assert result.summary["n_tensors"] == len(original.tensors)
    assert result.summary["n_decoded"] == sum(e.scheme is not None for e in entries.values()) == 14
    assert {p.parent for p in result.files} <= {target, target.parent}
    assert all(p.is_file() for p in result.files)


def test_every_device_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    source = quantized(llama, tmp_path, "parquet")
    files = []
    for device in ("reference", "cpu"):
        for threads in (None, 1):
            files.append(tmp_path / f"{device}{threads}.safetensors")
            dequantize_checkpoint(source, files[-1], device=device, threads=threads)
    assert len({f.read_bytes() for f in files}) == 1


@pytest.mark.gpu
def test_the_gpu_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    for format_name in FORMATS:
        source = quantized(llama, tmp_path, format_name, "int4_g32_asym")
        files = []
        for device in ("reference", "cuda"):
            result = dequantize_checkpoint(source, tmp_path / f"{device} {format_name}", device=device)
            files.append([p.read_bytes() for p in result.files])
        assert files[0] == files[1]


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int64", "uint64"])
@pytest.mark.parametrize("sink", [ParquetSink, ArrowSink])
def test_original_dtypes_that_kernels_do_not_write(tmp_path: Path, sink: type, dtype: str) -> None:
    target = DTYPES[dtype].numpy
    x = np.array([[0, 1, 2, 100] * 8, [5, 7, 3, 1] * 8]).astype(target)
    model = Model()
    model.quantized("w", x, "int8_g16", dtype)
    file = write(sink(Output(tmp_path / "m", is_directory=False)), model)
    dequantize_checkpoint(file, tmp_path / "back.safetensors", device="reference")
    got = open_checkpoint(tmp_path / "back.safetensors").view("w")
    q = model.want["w"]
    exact = reference.dequantize(q.packed, q.scales, q.zeros, q.scheme, 32)
    assert_bitwise_equal(got, narrow(exact, dtype))
    assert np.abs(got.astype(np.float64) - x.astype(np.float64)).max() < 5


def test_narrow_saturates() -> None:
    huge = np.array([-1e30, 1e30, 0.5, 1.5, 2.5, -1.4], np.float32)
    assert narrow(huge, "int8").tolist() == [-128, 127, 0, 2, 2, -1]
    assert narrow(huge, "uint8").tolist() == [0, 255, 0, 2, 2, 0]
    assert narrow(huge[:2], "int64").tolist() == [-(2**63), 2**63 - 1024]
    assert narrow(huge[:2], "uint64").tolist() == [0, 2**64 - 2048]
    assert narrow(huge[:2], "float8_e5m2").astype(np.float32).tolist() == [-57344.0, 57344.0]
    assert narrow(huge[:2], "float64").tolist() == [float(v) for v in huge[:2]]


def test_a_directory_is_whole(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 60_000)
    source, target = quantized(llama, tmp_path, "compressed-tensors"), tmp_path / "back"
    result = dequantize_checkpoint(source, target, device="reference")
    config = json.loads((target / "config.json").read_text())
    assert config == json.loads((llama / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (target / name).read_bytes() == (llama / name).read_bytes()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = sorted(target.glob("*.safetensors"))
    assert [p.name for p in shards] == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, 5)]
    assert set(index["weight_map"].values()) == {p.name for p in shards}
    assert index["metadata"]["total_size"] == result.summary["bytes"]
    assert all(p.stat().st_size < 64_000 for p in shards)
    assert "decoded to float again" in (target / "README.md").read_text()
    metadata = open_checkpoint(target).metadata
    assert metadata["format"] == "pt"
    assert metadata["arrowquant.scheme"] == "int4_g32_bf16"
    assert metadata["arrowquant.dequantized_by"].startswith("arrowquant_gpu ")
    table = pq.read_table(target / "arrowquant_manifest.parquet")
    assert table.column_names == module.COLUMNS.names
    assert table.equals(result.table)


def test_the_result_can_be_quantized_again(llama: Path, tmp_path: Path) -> None:
    """Decoded weights lie on the grid: another round gives the same codes, where no group lost its extreme."""
    source, target = quantized(llama, tmp_path, "compressed-tensors", "int8_g32"), tmp_path / "back"
    dequantize_checkpoint(source, target, device="reference")
    again = quantize_checkpoint(target, tmp_path / "again.parquet", "int8_g32", device="reference")
    assert again.summary["n_quantized"] == 14


def test_an_existing_target(llama: Path, tmp_path: Path) -> None:
    for format_name in ("compressed-tensors", "parquet"):
        source = quantized(llama, tmp_path, format_name)
        target = tmp_path / ("back" if source.is_dir() else "back.safetensors")
        dequantize_checkpoint(source, target, device="reference")
        before = {p: p.read_bytes() for p in (target.rglob("*") if target.is_dir() else [target]) if p.is_file()}
        with pytest.raises(TargetError, match="exists"):
            dequantize_checkpoint(source, target, device="reference")
        dequantize_checkpoint(source, target, device="reference", overwrite=True)
        assert {p: p.read_bytes() for p in before} == before
        with pytest.raises(TargetError, match="is the source itself"):
            dequantize_checkpoint(source, source, device="reference", overwrite=True)


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 1024)
    file = write(ParquetSink(Output(tmp_path / "m.parquet", is_directory=False)), small_model())
    whole = file.read_bytes()
    at = whole.index(small_model().want["norm"].tobytes()[:64])
    calls = []

    def stop(done: int, total: int, name: str) -> None:
        calls.append(name)
        raise KeyboardInterrupt

    target = tmp_path / "back.safetensors"
    with pytest.raises(KeyboardInterrupt):
        dequantize_checkpoint(file, target, device="reference", progress=stop)
    assert calls == ["a.weight"]
    file.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    with pytest.raises(SourceError, match=r"tensor norm: row [0-9]+ is damaged"):
        dequantize_checkpoint(file, target, device="reference")
    assert [p.name for p in tmp_path.iterdir()] == ["m.parquet"]


def test_progress_counts_every_byte(llama: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    source = quantized(llama, tmp_path, "arrow")
    result = dequantize_checkpoint(
        source, tmp_path / "back.safetensors", device="reference", progress=lambda *call: calls.append(call)
    )
    assert [done for done, _, _ in calls] == sorted({done for done, _, _ in calls})
    assert {total for _, total, _ in calls} == {calls[-1][0]} == {result.summary["bytes"]}
    assert {name for _, _, name in calls} == set(result.table["name"].to_pylist())


def test_wrong_input(llama: Path, tmp_path: Path) -> None:
    text, float_file = tmp_path / "a.txt", tmp_path / "m.safetensors"
    text.write_text("nothing")
    write_safetensors(float_file, {"w": np.zeros(3, np.float32)})
    for source, message in (
        (tmp_path / "absent", "cannot be read: No such file"),
        (text, "not known by its first bytes"),
        (float_file, "no quantized checkpoint but a safetensors file"),
        (llama, "no quantization_config"),
        (tmp_path, "config.json cannot be read"),
    ):
        with pytest.raises(SourceError, match=message):
            dequantize_checkpoint(source, tmp_path / "back", device="reference")
    file = quantized(llama, tmp_path, "parquet")
    with pytest.raises(InputError, match="dtype 'int8': choose one of float32, float16, bfloat16"):
        dequantize_checkpoint(file, tmp_path / "back", dtype="int8")
    assert not (tmp_path / "back").exists()


def sparse(path: Path, rows: int) -> Path:
    """One bfloat16 tensor [rows, 16384] of zeros that takes no disk space."""
    header, places = layout([("a.q_proj.weight", "bfloat16", (rows, 16384))])
    with path.open("wb") as f:
        f.write(header)
        f.truncate(places["a.q_proj.weight"][1])
    return path


def peak_anonymous_mb(program: str, *arguments: object) -> float:
    """Largest anonymous memory of a Python program, sampled every 5 ms."""
    peak = 0
    with subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], cwd=ROOT) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            found = re.search(r"^RssAnon:\s*([0-9]+) kB$", status.read_text(), re.MULTILINE)
            peak = max(peak, int(found[1]) if found else 0)
            time.sleep(0.005)
    assert process.returncode == 0
    return peak * 1024 / 1e6


QUANTIZE = "import sys, arrowquant_gpu as a; a.quantize_checkpoint(*sys.argv[1:3], format=sys.argv[3], device='cpu')"
DEQUANTIZE = "import sys, arrowquant_gpu as a; a.dequantize_checkpoint(*sys.argv[1:3], device='cpu')"
VERIFY = "import sys, arrowquant_gpu as a; a.verify_checkpoint(*sys.argv[1:3], device='cpu').check()"


@pytest.mark.parametrize("rows", [10_000, pytest.param(50_000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("format_name", ["parquet", "arrow"])
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, format_name: str, rows: int) -> None:
    """A tensor of 0.33 GB (1.6 GB in soak) through all three commands."""
    source, file = sparse(tmp_path / "m.safetensors", rows), tmp_path / f"m.{format_name}"
    assert peak_anonymous_mb(QUANTIZE, source, file, format_name) < 300
    assert peak_anonymous_mb(VERIFY, file, source) < 300
    assert peak_anonymous_mb(DEQUANTIZE, file, tmp_path / "back.safetensors") < 300
