"""The engine: pieces and slots change nothing, memory stays bounded, the manifest says what happened."""

from __future__ import annotations

import contextlib
import itertools
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
import xxhash

from arrowquant_gpu import reference
from arrowquant_gpu.backends import get_backend
from arrowquant_gpu.engine import Sizes
from arrowquant_gpu.engine import run as engine
from arrowquant_gpu.engine.figures import Figures
from arrowquant_gpu.engine.host import HostDevice
from arrowquant_gpu.engine.journal import Finished, Journal
from arrowquant_gpu.engine.loads import sizes
from arrowquant_gpu.engine.readers import open_reader
from arrowquant_gpu.errors import FormatError, InputError, ScaleOverflowError
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.output import FILES_KEY, MANIFEST, Output
from arrowquant_gpu.formats.pieces import Cut
from arrowquant_gpu.formats.safetensors import layout
from arrowquant_gpu.pipeline import Plan, make_plan, quantize_checkpoint
from arrowquant_gpu.schemes import Scheme, rows_and_length

from .bitwise import assert_bitwise_equal
from .fixtures import Raw, sparse_llama, tiny_llama, write_safetensors
from .plain_sink import ANYWHERE, PlainSink, read_back

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


def run(
    tmp_path: Path,
    tensors: dict[str, Any],
    scheme: str,
    *,
    n_slots: int = 3,
    cut: Cut = ANYWHERE,
    sink_type: type[PlainSink] = PlainSink,
    **options: Any,
) -> tuple[Plan, list[Finished]]:
    """Quantize these tensors with the reference backend into `tmp_path / "out"`, a PlainSink's directory."""
    file = write_safetensors(tmp_path / "m.safetensors", tensors)
    source = open_checkpoint(file)
    output = Output(tmp_path / "out", is_directory=True)
    sink = sink_type(output, cut)
    plan = make_plan(source, sink, scheme)
    smallest = Sizes(*(max(c) for c in zip(*(sizes(p) for e in plan.entries for p in sink.pieces(e)), strict=True)))
    reader = open_reader("mapped", source)
    device = HostDevice(get_backend("reference"), reader, smallest, n_slots)
    try:
        output.begin()
        with contextlib.closing(Journal(output, {})) as journal:
            sink.open(plan.entries, source, {})
            finished = engine.run(plan.entries, sink, output, [device], journal, **options)
        sink.commit()
    except BaseException:
        output.abort()
        raise
    finally:
        device.close()
        reader.close()
    return plan, finished


def hash_of(arrays: list[np.ndarray], cuts: list[tuple[int, ...]]) -> str:
    """The hash of a tensor, from its arrays and the rows (or bytes) at which its pieces begin, and its end."""
    pieces = [
        b"".join(np.ascontiguousarray(a[start:stop]).tobytes() for a in arrays)
        for start, stop in itertools.pairwise(cuts)
    ]
    return xxhash.xxh3_128_hexdigest(b"".join(xxhash.xxh3_128_digest(p) for p in pieces))


@pytest.mark.parametrize("piece_bytes", [1, 3000, 1 << 24])
@pytest.mark.parametrize("scheme", ["int4_g128_asym", "int3_g32_f16", "int8_channel", "int5_tensor_asym"])
def test_pieces_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, piece_bytes: int) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", piece_bytes)
    plan, finished = run(tmp_path, TENSORS, scheme)
    parsed = Scheme.parse(scheme)
    sink = PlainSink(Output(tmp_path / "other", is_directory=True))
    for number, (entry, done) in enumerate(zip(plan.entries, finished, strict=True)):
        name = entry.info.name
        assert done.name == name
        got = read_back(tmp_path / "out", number, entry)
        if entry.scheme is None:
            whole = TENSORS[name]
            want = [np.frombuffer(whole.data if isinstance(whole, Raw) else whole.tobytes(), np.uint8)]
        else:
            x = np.asarray(TENSORS[name])
            want = [a for a in reference.quantize(x.reshape(rows_and_length(x.shape)), parsed)[:3] if a is not None]
        for a, b in zip(got, want, strict=True):
            assert_bitwise_equal(a, b, name)
        cuts = sink.pieces(entry)
        if entry.scheme is None:
            starts = [p.column for p in cuts] + [entry.info.n_bytes]
        elif any(p.column for p in cuts) or parsed.granularity == "tensor":
            continue
        else:
            starts = [p.row for p in cuts] + [len(want[0])]
        assert done.hash == hash_of(want, starts)
    assert {e.info.name for e in plan.entries if e.scheme} == {
        *(n for n in TENSORS if n[:2] in ("a.", "b.", "c.", "d.")),
        "experts.down_proj",
    }


def test_long_rows_are_cut_where_groups_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 1000)
    plan, _ = run(tmp_path, TENSORS, "int3_g40_asym")
    cut = [p for e in plan.entries if e.info.name == "b.weight" for p in formats_pieces.pieces(e, ANYWHERE)]
    assert [(p.row, p.column, p.columns) for p in cut] == [
        (r, c, min(480, 640 - c)) for r in range(3) for c in (0, 480)
    ]
    for number, entry in enumerate(plan.entries):
        if entry.scheme is not None:
            x = np.asarray(TENSORS[entry.info.name])
            want = reference.quantize(x.reshape(rows_and_length(x.shape)), entry.scheme)
            for a, b in zip(read_back(tmp_path / "out", number, entry), want[:3], strict=True):
                assert_bitwise_equal(a, b, entry.info.name)


def test_figures_are_those_of_the_whole_tensor_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = []
    for piece_bytes in (1, 3000, 1 << 24):
        monkeypatch.setattr(formats_pieces, "PIECE_BYTES", piece_bytes)
        folder = tmp_path / str(piece_bytes)
        folder.mkdir()
        _, finished = run(folder, TENSORS, "int4_g32", cut=Cut(), validate=True)
        tables.append({f.name: f.figures for f in finished})
    assert tables[0] == tables[1] == tables[2]
    x = np.asarray(TENSORS["c.weight"])
    packed, scales, zeros, _ = reference.quantize(x, Scheme.parse("int4_g32"))
    y = reference.dequantize(packed, scales, zeros, Scheme.parse("int4_g32"), 96).astype(np.float64)
    x = x.astype(np.float64)
    cosine, sqnr_db, max_error = tables[0]["c.weight"]
    assert cosine == pytest.approx(float((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)), rel=1e-12)
    assert sqnr_db == pytest.approx(10 * math.log10((x * x).sum() / ((x - y) ** 2).sum()), rel=1e-12)
    assert max_error == np.abs(x - y).max()
    assert tables[0]["norm.weight"] is None


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


@pytest.mark.parametrize("format_name", ["compressed-tensors", "parquet", "arrow"])
def test_every_byte_is_the_same_in_every_run(tmp_path: Path, format_name: str) -> None:
    source = tiny_llama(tmp_path / "source", hidden=128, shards=3)
    outputs = []
    for folder, device, threads in (("one", "reference", 1), ("two", "cpu", 1), ("three", "cpu", 5)):
        (tmp_path / folder).mkdir()
        quantize_checkpoint(
            source, tmp_path / folder / "out", "int4_g64_asym", format=format_name, device=device, threads=threads
        )
        found = sorted(p for p in (tmp_path / folder).rglob("*") if p.is_file())
        outputs.append({str(p.relative_to(tmp_path / folder)): p.read_bytes() for p in found})
    assert outputs[0] == outputs[1] == outputs[2]


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
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 5000)
    seen: list[tuple[int, int, str]] = []
    run(tmp_path, TENSORS, "int4_tensor", progress=lambda *args: seen.append(args))
    done, totals, _ = zip(*seen, strict=True)
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}
    assert done[-1] == sum(len(t.data) if isinstance(t, Raw) else t.nbytes for t in TENSORS.values())


class Broken(PlainSink):
    """Gives an error for the first piece of quantized rows."""

    def stored(self, piece: Any, codes: Any) -> Any:
        if piece.entry.scheme is not None:
            raise InputError("the sink broke")
        return super().stored(piece, codes)


def test_an_error_of_a_slot_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 1)
    seen: list[str] = []
    with pytest.raises(InputError, match="the sink broke"):
        run(tmp_path, TENSORS, "int4_g32", sink_type=Broken, progress=lambda done, total, name: seen.append(name))
    assert len(seen) < 20, "it ends soon after, not at the end of the model"
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]
    assert not [t for t in threading.enumerate() if t.name.startswith("arrowquant-")]


class TooLong(PlainSink):
    """Gives an array that does not fit its place."""

    def stored(self, piece: Any, codes: Any) -> Any:
        return [np.concatenate([a.reshape(-1).view(np.uint8), [0]]) for a in super().stored(piece, codes)]


def test_what_does_not_fit_its_place_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"a\.weight: .* bytes for a place of"):
        run(tmp_path, {"a.weight": np.ones((2, 64), np.float32)}, "int4_g32", sink_type=TooLong)


def test_scales_that_overflow_are_counted_over_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 1)
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
    with pytest.raises(FormatError, match="choose one of compressed-tensors"):
        quantize_checkpoint(source, tmp_path / "out", format="onnx", dry_run=True)
    with pytest.raises(FormatError, match=r"needs a model directory with config\.json"):
        quantize_checkpoint(file, tmp_path / "out", format="compressed-tensors", dry_run=True)


PEAK = """
    import sys
    from pathlib import Path
    from arrowquant_gpu import quantize_checkpoint

    def anonymous():
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024

    peak = [0]
    def progress(done, total, name):
        peak[0] = max(peak[0], anonymous())
    quantize_checkpoint(sys.argv[1], sys.argv[2], format=sys.argv[3], device="cpu", threads=2, progress=progress)
    print(peak[0])
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
    assert int(done.stdout) < 240 << 20


def test_figures_of_a_decoded_weight_beyond_the_largest_float() -> None:
    figures = Figures()
    figures.add(np.array([[-3.4e38, 1.0]], np.float32), np.array([[-np.inf, 1.0]], np.float32))
    assert math.isnan(figures.cosine)
    assert (figures.sqnr_db, figures.max_error) == (-math.inf, math.inf)
