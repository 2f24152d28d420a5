"""The engine: blocks and slots change nothing, memory stays bounded, the manifest says what happened."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.errors import FormatError, InputError, ScaleOverflowError
from arrowquant_gpu.formats import Entry
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.output import FILES_KEY, MANIFEST, Output
from arrowquant_gpu.formats.safetensors import layout
from arrowquant_gpu.pipeline import Manifest, Plan, engine, make_plan, quantize_checkpoint
from arrowquant_gpu.pipeline.figures import Figures
from arrowquant_gpu.schemes import Scheme, rows_and_length

from .bitwise import assert_bitwise_equal
from .fixtures import Raw, sparse_llama, tiny_llama, write_safetensors

ROOT = Path(__file__).parent.parent
RNG = np.random.default_rng(20261121)
TENSORS: dict[str, np.ndarray | Raw] = {
    "a.weight": RNG.standard_normal((70, 200), np.float32),
    "b.weight": RNG.standard_normal((3, 640)).astype(np.float16),
    "c.weight": RNG.standard_normal((257, 96)).astype(ml_dtypes.bfloat16),
    "d.weight": RNG.standard_normal((33, 40)),
    "experts.down_proj": RNG.standard_normal((4, 16, 48), np.float32),
    "norm.weight": RNG.standard_normal(96).astype(ml_dtypes.bfloat16),
    "ids": np.arange(12).reshape(3, 4),
    "nothing.weight": np.zeros((0, 8), np.float32),
    "scalar": np.float32(3.5).reshape(()),
    "fp4": Raw("float4_e2m1fn", (3, 4), bytes(range(6))),
}


class Memory:
    """A sink that keeps everything, and notes what was called."""

    format = "memory"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.rows: dict[str, list[tuple[int, Any, Any, Any]]] = {}
        self.bytes: dict[str, bytearray] = {}
        self.threads: set[int] = set()

    def scheme_for(self, info: Any, scheme: Scheme) -> Scheme:
        return scheme

    def n_bytes(self, entry: Entry) -> int:
        return entry.info.n_bytes if entry.scheme is None else entry.scheme.n_bytes(entry.info.shape)

    def open(self, entries: Any, source: Any, provenance: dict[str, str]) -> None:
        self.calls.append("open")
        self.output.begin()

    def write_rows(self, entry: Entry, row: int, packed: Any, scales: Any, zeros: Any) -> None:
        self.threads.add(threading.get_ident())
        copy = None if zeros is None else zeros.copy()
        self.rows.setdefault(entry.info.name, []).append((row, packed.copy(), scales.copy(), copy))

    def write_bytes(self, entry: Entry, offset: int, data: Any) -> None:
        kept = self.bytes.setdefault(entry.info.name, bytearray())
        assert offset == len(kept)
        kept += data.tobytes()

    def commit(self) -> tuple[Path, ...]:
        self.calls.append("commit")
        return self.output.commit()

    def abort(self) -> None:
        self.calls.append("abort")
        self.output.abort()

    output: Output


def run(tmp_path: Path, tensors: dict[str, Any], scheme: str, **options: Any) -> tuple[Memory, Manifest]:
    from arrowquant_gpu.backends import get_backend

    file = write_safetensors(tmp_path / "m.safetensors", tensors)
    source, sink = open_checkpoint(file), Memory()
    sink.output = Output(tmp_path / "out", is_directory=True, overwrite=True)
    plan = make_plan(source, sink, scheme)
    backend = get_backend("reference")
    return sink, engine.run(plan, source, sink, sink.output, backend, {"tool": "test"}, **options)


@pytest.mark.parametrize("block_bytes", [1, 3000, 1 << 24])
@pytest.mark.parametrize("scheme", ["int4_g128_asym", "int3_g32_f16", "int8_channel", "int5_tensor_asym"])
def test_blocks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, block_bytes: int) -> None:
    monkeypatch.setattr(engine, "BLOCK_BYTES", block_bytes)
    sink, manifest = run(tmp_path, TENSORS, scheme)
    parsed = Scheme.parse(scheme)
    for row in manifest.table.to_pylist():
        name = row["name"]
        if row["action"] == "kept":
            whole = TENSORS[name]
            want = whole.data if isinstance(whole, Raw) else whole.tobytes()
            assert bytes(sink.bytes.get(name, b"")) == want
            assert row["hash"] == hashlib.blake2b(want, digest_size=16).hexdigest()
            continue
        x = np.asarray(TENSORS[name])
        packed, scales, zeros, _ = reference.quantize(x.reshape(rows_and_length(x.shape)), parsed)
        blocks = sink.rows[name]
        assert [b[0] for b in blocks] == list(np.cumsum([0, *(len(b[1]) for b in blocks[:-1])]))
        assert_bitwise_equal(np.concatenate([b[1] for b in blocks]), packed, name)
        assert_bitwise_equal(np.concatenate([b[2] for b in blocks]), scales, name)
        if zeros is not None:
            assert_bitwise_equal(np.concatenate([b[3] for b in blocks]), zeros, name)
        parts = [packed.tobytes(), scales.tobytes(), b"" if zeros is None else zeros.tobytes()]
        digests = b"".join(hashlib.blake2b(p, digest_size=16).digest() for p in parts)
        assert row["hash"] == hashlib.blake2b(digests, digest_size=16).hexdigest()
    assert {r["name"] for r in manifest.table.to_pylist() if r["action"] == "quantized"} == {
        *(n for n in TENSORS if n[:2] in ("a.", "b.", "c.", "d.")),
        "experts.down_proj",
    }
    assert sink.calls == ["open", "commit"]
    assert threading.get_ident() not in sink.threads


def test_figures_are_those_of_the_whole_tensor_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = []
    for block_bytes in (1, 3000, 1 << 24):
        monkeypatch.setattr(engine, "BLOCK_BYTES", block_bytes)
        _, manifest = run(tmp_path, TENSORS, "int4_g32", validate=True)
        tables.append(manifest.table.select(["name", "cosine", "sqnr_db", "max_error"]).to_pylist())
        assert manifest.summary["worst_cosine"] == min(r["cosine"] for r in tables[-1] if r["cosine"] is not None)
    assert tables[0] == tables[1] == tables[2]
    by_name = {r["name"]: r for r in tables[0]}
    x = np.asarray(TENSORS["c.weight"])
    packed, scales, zeros, _ = reference.quantize(x, Scheme.parse("int4_g32"))
    y = reference.dequantize(packed, scales, zeros, Scheme.parse("int4_g32"), 96).astype(np.float64)
    x = x.astype(np.float64)
    got = by_name["c.weight"]
    assert got["cosine"] == pytest.approx(float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)), rel=1e-12)
    assert got["sqnr_db"] == pytest.approx(10 * math.log10((x * x).sum() / ((x - y) ** 2).sum()), rel=1e-12)
    assert got["max_error"] == np.abs(x - y).max()
    assert by_name["norm.weight"] == {"name": "norm.weight", "cosine": None, "sqnr_db": None, "max_error": None}


def test_figures_of_zeros_and_of_no_error() -> None:
    zero, one = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    for x, y, expected in [(zero, zero, (1.0, math.inf, 0.0)), (one, one, (1.0, math.inf, 0.0))]:
        figures = Figures()
        figures.add(x, y)
        assert (figures.cosine, figures.sqnr_db, figures.max_error) == pytest.approx(expected)
    figures = Figures()
    figures.add(zero, one)
    assert (figures.cosine, figures.sqnr_db, figures.max_error) == (0.0, -math.inf, 1.0)


def test_manifest_beside_the_output(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", hidden=128)
    result = quantize_checkpoint(source, tmp_path / "out", "int4_g64", device="reference", validate=True)
    stored = pq.read_table(tmp_path / "out" / MANIFEST)
    assert stored.equals(result.table, check_metadata=True)
    assert stored["name"].to_pylist() == [e.info.name for e in result.plan.entries]
    metadata = stored.schema.metadata
    assert json.loads(metadata[FILES_KEY]) == sorted(p.name for p in (tmp_path / "out").iterdir())
    assert metadata[b"arrowquant.scheme"] == b"int4_g64_bf16"
    assert metadata[b"arrowquant.source_hash"].decode() == open_checkpoint(source).fingerprint()
    assert sorted(result.files) == sorted((tmp_path / "out").iterdir())


def test_every_byte_but_the_manifest_is_the_same_in_every_run(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", hidden=128, shards=3)
    for out in ("one", "two"):
        quantize_checkpoint(source, tmp_path / out, "int4_g64_asym", device="reference")
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert {n for n in one if one[n] != two[n]} <= {MANIFEST}


def test_a_dry_run_writes_and_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sparse_llama(tmp_path / "source", gib=1)
    monkeypatch.setattr(Output, "begin", None)
    plan = quantize_checkpoint(source, tmp_path / "out", "int4_g128", dry_run=True, device="no such device")
    assert isinstance(plan, Plan)
    assert plan.summary["n_quantized"] == 7 * (plan.summary["n_tensors"] - 3) // 9
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_the_plan_is_what_happens(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", hidden=128, shards=2)
    plan = quantize_checkpoint(source, tmp_path / "out", "int8_channel_asym", dry_run=True)
    result = quantize_checkpoint(source, tmp_path / "out", "int8_channel_asym", device="reference")
    assert result.table.select(plan.table.column_names).replace_schema_metadata(None).equals(plan.table)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.summary["bytes_after"]


def test_progress_counts_every_byte_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BLOCK_BYTES", 5000)
    seen: list[tuple[int, int, str]] = []
    run(tmp_path, TENSORS, "int4_g32", progress=lambda *args: seen.append(args))
    done, totals, _ = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}
    assert done[-1] == sum(len(t.data) if isinstance(t, Raw) else t.nbytes for t in TENSORS.values())


def test_an_error_of_the_writer_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BLOCK_BYTES", 1)

    def broken(self: Memory, *args: object) -> None:
        raise InputError("the sink broke")

    monkeypatch.setattr(Memory, "write_rows", broken)
    seen: list[str] = []
    with pytest.raises(InputError, match="the sink broke"):
        run(tmp_path, TENSORS, "int4_g32", progress=lambda done, total, name: seen.append(name))
    assert len(seen) < 20, "it ends soon after, not at the end of the model"
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert not [t for t in threading.enumerate() if t.name == "arrowquant-writer"]


def test_an_error_of_the_last_write_ends_the_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Memory, *args: object) -> None:
        raise InputError("the sink broke")

    monkeypatch.setattr(Memory, "write_rows", broken)
    with pytest.raises(InputError, match="the sink broke"):
        run(tmp_path, {"a.weight": np.ones((2, 64), np.float32)}, "int4_g32")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_scales_that_overflow_are_counted_over_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BLOCK_BYTES", 1)
    x = np.ones((9, 64), np.float32)
    x[4, 40] = x[7, 0] = 1e7
    with pytest.raises(ScaleOverflowError) as caught:
        run(tmp_path, {"a.weight": x}, "int4_g32_f16")
    assert (caught.value.name, caught.value.count, caught.value.first) == ("a.weight", 2, 9)


def test_default_formats(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", hidden=128)
    file = source / "model.safetensors"
    formats = {
        (source, None): "compressed-tensors",
        (file, None): "parquet",
        (source, "arrow"): "arrow",
        (file, "arrow"): "arrow",
    }
    for (path, asked), expected in formats.items():
        assert quantize_checkpoint(path, tmp_path / "out", format=asked, dry_run=True).format == expected
    with pytest.raises(FormatError, match="choose one of compressed-tensors, parquet, arrow"):
        quantize_checkpoint(source, tmp_path / "out", format="gguf", dry_run=True)
    with pytest.raises(FormatError, match=r"needs a model directory with config\.json"):
        quantize_checkpoint(file, tmp_path / "out", format="compressed-tensors", dry_run=True)


PEAK = """
    import sys
    from pathlib import Path
    from arrowquant_gpu.formats.checkpoint import open_checkpoint
    from arrowquant_gpu.formats.output import Output
    from arrowquant_gpu.pipeline import engine, make_plan
    from arrowquant_gpu.pipeline.quantize import open_sink
    from arrowquant_gpu.reference import Findings

    class Nothing:
        name = "nothing"
        def quantize(self, x, scheme, packed, scales, zeros):
            packed[...], scales[...] = 0, 0
            return Findings()

    def anonymous():
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    start, peak = anonymous(), [0]
    source = open_checkpoint(sys.argv[1])
    output = Output(sys.argv[2], is_directory=sys.argv[3] == "compressed-tensors")
    sink = open_sink(sys.argv[3], output, source)
    def progress(done, total, name):
        peak[0] = max(peak[0], anonymous())
    engine.run(make_plan(source, sink, "int4_g128"), source, sink, output, Nothing(), {}, progress=progress)
    print(peak[0] - start)
"""


@pytest.mark.parametrize("format_name", ["compressed-tensors", "parquet", "arrow"])
def test_memory_is_blocks_not_tensors(tmp_path: Path, format_name: str) -> None:
    """Two tensors of 256 MiB, one quantized and one kept, take far less than one of them."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text('{"model_type": "llama"}')
    tensors = [(name, "float16", (32768, 4096)) for name in ("a.q_proj.weight", "embed_tokens.weight")]
    header, places = layout(tensors)
    with (tmp_path / "source" / "model.safetensors").open("wb") as f:
        f.write(header)
        f.truncate(max(end for _, end in places.values()))
    program = [
        sys.executable,
        "-c",
        textwrap.dedent(PEAK),
        str(tmp_path / "source"),
        str(tmp_path / "out"),
        format_name,
    ]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 160 << 20


def test_figures_of_a_decoded_weight_beyond_the_largest_float() -> None:
    figures = Figures()
    figures.add(np.array([[-3.4e38, 1.0]], np.float32), np.array([[-np.inf, 1.0]], np.float32))
    assert math.isnan(figures.cosine)
    assert (figures.sqnr_db, figures.max_error) == (-math.inf, math.inf)
