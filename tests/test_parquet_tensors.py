"""Quantized models in a directory with one Parquet file per tensor."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu import quantize_checkpoint, verify_checkpoint
from arrowquant_gpu.errors import FormatError, SourceError, TargetError
from arrowquant_gpu.formats import file_names as naming
from arrowquant_gpu.formats import pieces as cutting
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.file_names import file_names
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.parquet import ParquetSink
from arrowquant_gpu.formats.parquet_tensors import INDEX, ParquetTensorsCheckpoint, ParquetTensorsSink
from arrowquant_gpu.formats.quantized import open_quantized

from . import resumed_runs
from .bitwise import assert_bitwise_equal
from .fixtures import tiny_llama
from .row_files import CONFIG, PROVENANCE, SOURCE, Model, assert_holds, fill, in_order, read_all, small_model
from .row_files import write as write_file
from .snapshots import differences, nothing_changes, snapshot
from .test_v2_extended import diffusion_model

# Names that some file system, shell or program would not take as they are, and pairs that would meet.
AWKWARD = (
    "plain.weight",
    "Plain.weight",
    "a/b",
    "a_b",
    "a\\b",
    "a:b",
    "",
    ".",
    "..",
    ".hidden",
    "-rf",
    "../../escape",
    "/etc/passwd",
    "nul",
    "CON.weight",
    "com1",
    "aux",
    "x" * 300,
    "x" * 301,
    "x" * naming.MOST_CHARACTERS,
    "\u00e9",
    "e\u0301",
    "\u2713 and spaces ",
    "trailing.",
    "new\nline",
    "glob*?[a]",
    "~",
    "arrowquant_manifest",
    "w\u0131",
    "wi",
    "WI",
)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "PIECE_BYTES", 5600)


def source_of(folder: Path) -> Any:
    """A model directory with side files: what `ParquetTensorsSink.open` looks at."""
    folder.mkdir(exist_ok=True)
    files = {
        "config.json": json.dumps(CONFIG),
        "tokenizer.json": "{}",
        "1_Pooling/config.json": "{}",
        "README.md": "hi",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    paths = tuple(folder / name for name in files)
    return SimpleNamespace(path=folder, metadata=SOURCE.metadata, config=CONFIG, side_files=paths)


def write(path: Path, model: Model, *, compression: str | None = None, seed: int = 0) -> Path:
    """Write a model as the engine does."""
    sink = ParquetTensorsSink(Output(path, is_directory=True), compression=compression)
    sink.output.begin()
    sink.open(model.entries, source_of(path.parent / "source"), PROVENANCE)
    fill(sink, model, seed)
    sink.commit()
    return path


def files_of(path: Path) -> dict[str, Path]:
    """Tensor -> its file, by the index."""
    return {name: path / file for name, file in json.loads((path / INDEX).read_text())["weight_map"].items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "m", small_model())


class TestFiles:
    @pytest.mark.parametrize("compression", [None, "zstd"])
    @pytest.mark.parametrize("model", [small_model, diffusion_model])
    def test_a_model_comes_back(self, tmp_path: Path, model: Callable[[], Model], compression: str | None) -> None:
        for seed in range(2):
            path = write(tmp_path / str(seed), model(), compression=compression, seed=seed)
            assert_holds(path, model())
        checkpoint = open_quantized(path)
        assert isinstance(checkpoint, ParquetTensorsCheckpoint)
        assert (checkpoint.config, checkpoint.metadata, checkpoint.provenance) == (CONFIG, SOURCE.metadata, PROVENANCE)
        assert (checkpoint.path, checkpoint.format) == (path, "parquet-tensors")

    @pytest.mark.parametrize("compression", [None, "zstd"])
    def test_each_file_is_what_pyarrow_writes_from_its_rows(self, tmp_path: Path, compression: str | None) -> None:
        """And of the same bytes however its rows were written; with the same columns as any other of the model."""
        model = diffusion_model()
        path = write(tmp_path / "m", model, compression=compression, seed=3)
        sink = ParquetSink(Output(tmp_path / "x", is_directory=False))
        schema, batches = in_order(sink, model)
        for name, file in files_of(path).items():
            rows = [b for b in batches if b["layer_name"][0].as_py() == name]
            expected = tmp_path / "expected"
            options = {"use_dictionary": False, "write_statistics": ["layer_name"], "data_page_size": 2**31 - 1}
            with pq.ParquetWriter(expected, schema, compression=compression or "none", **options) as writer:
                for row in rows:
                    writer.write_table(pa.Table.from_batches([row]))
            assert file.read_bytes() == expected.read_bytes()

    def test_a_file_is_a_model_of_one_tensor(self, folder: Path) -> None:
        model = small_model()
        for entry in model.entries:
            one = Model([entry], {entry.info.name: model.want[entry.info.name]})
            assert_holds(files_of(folder)[entry.info.name], one)

    def test_the_folder_is_one_table(self, folder: Path, tmp_path: Path) -> None:
        """Of the rows that one Parquet file of all tensors has."""
        whole = write_file(ParquetSink(Output(tmp_path / "m.parquet", is_directory=False)), small_model())
        rows = sorted(pq.read_table(folder / "tensors").to_pylist(), key=lambda r: (r["layer_name"], r["chunk"]))
        assert rows == sorted(pq.read_table(whole).to_pylist(), key=lambda r: (r["layer_name"], r["chunk"]))
        assert len(rows) > len(small_model().entries)

    def test_what_lies_beside_the_tensors(self, folder: Path) -> None:
        names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        tensors = {f"tensors/{name}.parquet" for name in small_model().want}
        assert names - tensors == {INDEX, "config.json", "tokenizer.json", "1_Pooling/config.json", "README.md"}
        assert json.loads((folder / "config.json").read_text()) == CONFIG
        assert "a Parquet file for each tensor in `tensors/`" in (folder / "README.md").read_text()
        index = json.loads((folder / INDEX).read_text())
        assert list(index["weight_map"]) == list(small_model().want)
        assert index["metadata"]["total_size"] > 0
        assert set(open_quantized(folder).side_files) == {folder / name for name in names - tensors - {INDEX}}

    def test_a_directory_that_is_resumed_keeps_its_pieces(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Opened again, on a disk that is full by then, a sink gives the same places and overwrites none."""
        model, output = small_model(), Output(tmp_path / "m", is_directory=True)
        source = source_of(tmp_path / "source")
        output.begin()
        sink, again = ParquetTensorsSink(output), ParquetTensorsSink(output)
        sink.open(model.entries, source, PROVENANCE)
        fill(sink, model)
        before = {name: output.path(name).read_bytes() for name in output.names()}
        # What a run leaves that is killed while it compresses.
        (leftover := output.path("tensors/norm.parquet.compressed")).write_bytes(b"torn")
        output.resumed = True
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        again.open(model.entries, source, PROVENANCE)
        assert not leftover.exists()
        assert {name: output.path(name).read_bytes() for name in output.names()} == before
        pieces = [piece for entry in model.entries for piece in sink.pieces(entry)]
        assert [sink.places(piece) for piece in pieces] == [again.places(piece) for piece in pieces]
        output.abort()

    def test_more_than_the_free_space_is_refused_at_once(self, tmp_path: Path) -> None:
        model = small_model()
        info = dataclasses.replace(model.entries[0].info, name="big", shape=(1 << 25, 1 << 25), n_bytes=1 << 52)
        model.entries.append(dataclasses.replace(model.entries[0], info=info))
        with pytest.raises(TargetError, match=r"bytes are needed and .* are free"):
            write(tmp_path / "m", model)

    def test_a_row_that_is_too_long_for_parquet_is_refused(self) -> None:
        sink, entry = ParquetTensorsSink(Output("/m", is_directory=True)), small_model().entries[0]
        with pytest.raises(FormatError, match="parquet-tensors: one row of"):
            sink.scheme_for(dataclasses.replace(entry.info, shape=(1, 1 << 32)), entry.scheme)

    def test_few_files_are_open(self, tmp_path: Path) -> None:
        """Neither writing nor reading keeps one open for each tensor."""
        model, x = Model(), np.ones((2, 8), np.float32)
        for i in range(400):
            model.quantized(f"{i}", x, "int4_g4")
        most = 0

        def n_open() -> int:
            return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - not its own descriptor twice

        before = n_open()
        path = write(tmp_path / "m", model)
        checkpoint = open_quantized(path)
        for name in checkpoint.entries:
            for _ in checkpoint.blocks(name):
                most = max(most, n_open())
        assert most - before < 20


class TestNames:
    def test_awkward_names_come_back(self, tmp_path: Path) -> None:
        model = Model()
        for i, name in enumerate(AWKWARD):
            model.quantized(name, np.full((2, 8), i, np.float32), "int8_g8")
        path = write(tmp_path / "m", model)
        assert_holds(path, model)
        assert {p.parent for p in files_of(path).values()} == {path / "tensors"}
        assert len({p.name.lower() for p in (path / "tensors").iterdir()}) == len(AWKWARD)

    def test_plain_names_stay(self) -> None:
        plain = ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight", "double_blocks.0.img_mod-lin"]
        assert file_names(plain, ".parquet") == [f"{name}.parquet" for name in plain]

    def check(self, names: list[str]) -> None:
        found = file_names(names, ".parquet")
        assert len({f.lower() for f in found}) == len(names)
        for name, file in zip(names, found, strict=True):
            assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*(~[0-9a-f]{16})?\.parquet", file), (name, file)
            assert not re.match(r"(?i)(con|prn|aux|nul|com\d|lpt\d)\.", file), (name, file)
            assert len(file.encode()) <= 240
        # The same in any order.
        assert dict(zip(names[::-1], file_names(names[::-1], ".parquet"), strict=True)) == dict(
            zip(names, found, strict=True)
        )

    def test_awkward_names(self) -> None:
        self.check(list(AWKWARD))

    @given(st.lists(st.one_of(st.text(max_size=8), st.text("aA./~_-\u00e9", max_size=6)), unique=True, max_size=30))
    def test_any_names(self, names: list[str]) -> None:
        self.check(names)

    def test_names_that_pretend_to_be_marked(self) -> None:
        (marked,) = file_names(["a/b"], "")
        self.check(["a/b", marked])

    def test_two_alike_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(naming, "N_DIGITS", 0)
        with pytest.raises(FormatError, match="tensors 'a/b' and 'a:b' would have one file name"):
            file_names(["a/b", "a:b"], "")


def rename(folder: Path) -> str:
    file = folder / "tensors" / "a.weight.parquet"
    file.rename(file.with_name("z.weight.parquet"))
    return "a.weight.parquet: missing, though model.parquet.index.json lists it; z.weight.parquet is not listed"


def remove(folder: Path) -> str:
    (folder / "tensors" / "norm.parquet").unlink()
    return "norm.parquet: missing"


def add(folder: Path) -> str:
    shutil.copyfile(folder / "tensors" / "norm.parquet", folder / "tensors" / "more.parquet")
    return "more.parquet: not listed in"


def exchange(folder: Path) -> str:
    a, b, aside = (folder / "tensors" / name for name in ("a.weight.parquet", "b.weight.parquet", "aside"))
    a.rename(aside)
    b.rename(a)
    aside.rename(b)
    return "a.weight.parquet: holds 'b.weight', where model.parquet.index.json has 'a.weight'"


def no_folder(folder: Path) -> str:
    shutil.rmtree(folder / "tensors")
    return "a.weight.parquet (and 4 more): missing"


def whole_model_in_one(folder: Path) -> str:
    write_file(ParquetSink(Output(folder / "whole", is_directory=False)), small_model())
    (folder / "whole").rename(folder / "tensors" / "norm.parquet")
    return "norm.parquet: holds 'a.weight', 'b.weight', 'c.weight', where"


def of_another_run(folder: Path) -> str:
    model = small_model()
    entry = model.entries[3]
    other = Model([entry], {entry.info.name: model.want[entry.info.name]})
    sink = ParquetSink(Output(folder / "other", is_directory=False))
    sink.output.begin()
    sink.open(other.entries, SOURCE, {**PROVENANCE, "source": "another"})
    fill(sink, other)
    sink.commit()
    (folder / "other").rename(folder / "tensors" / "norm.parquet")
    return "norm.parquet: is of another model or run than a.weight.parquet: their provenance differ"


def empty_file(folder: Path) -> str:
    (folder / "tensors" / "c.weight.parquet").write_bytes(b"")
    return "c.weight.parquet: cannot be read as parquet"


def bit_in_the_codes(folder: Path) -> str:
    file = folder / "tensors" / "a.weight.parquet"
    whole = bytearray(file.read_bytes())
    codes = pq.read_table(file)["data"][1].as_py()
    whole[whole.index(codes)] ^= 1
    file.write_bytes(whole)
    return "a.weight.parquet, tensor a.weight: row 1 is damaged"


def index_that_leads_outside(folder: Path) -> str:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["norm"] = "tensors/../../norm.parquet"
    (folder / INDEX).write_text(json.dumps(index))
    return "tensor 'norm' is in 'tensors/../../norm.parquet', which is no file of tensors/"


def no_index_but_text(folder: Path) -> str:
    (folder / INDEX).write_text("[1]")
    return f"{INDEX}: has no weight_map"


def empty_index(folder: Path) -> str:
    (folder / INDEX).write_text('{"weight_map": {}}')
    shutil.rmtree(folder / "tensors")
    return f"{INDEX} lists no tensor"


FAULTS = (
    rename,
    remove,
    add,
    exchange,
    no_folder,
    whole_model_in_one,
    of_another_run,
    empty_file,
    bit_in_the_codes,
    index_that_leads_outside,
    no_index_but_text,
    empty_index,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(folder: Path, fault: Callable[[Path], str]) -> None:
    read_all(folder)
    message = fault(folder)
    with pytest.raises(SourceError) as e:
        read_all(folder)
    assert message in str(e.value)
    assert str(folder) in str(e.value)


def test_a_file_that_changes_after_opening_is_noticed(folder: Path) -> None:
    checkpoint = open_quantized(folder)
    exchange(folder)
    with pytest.raises(SourceError, match=r"does not hold 'a\.weight' any more"):
        next(checkpoint.blocks("a.weight"))


# Whole runs.


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model", "bfloat16", shards=2)


@pytest.mark.parametrize("format_name", ["parquet", "parquet-tensors", "arrow"])
def test_a_compressed_model_is_the_same_model(llama: Path, tmp_path: Path, format_name: str) -> None:
    """The same manifest, rows and weights."""
    results = [
        quantize_checkpoint(llama, tmp_path / str(c), "int4_g32", format=format_name, compression=c, device="reference")
        for c in (None, "zstd")
    ]
    assert results[0].table.equals(results[1].table)
    plain, packed = (open_quantized(tmp_path / str(c)) for c in (None, "zstd"))
    assert list(plain.entries) == list(packed.entries)
    for name in plain.entries:
        for (_, a), (_, b) in zip(plain.blocks(name), packed.blocks(name), strict=True):
            for x, y in ((a, b),) if isinstance(a, np.ndarray) else ((a.packed, b.packed), (a.scales, b.scales)):
                assert_bitwise_equal(x, y, name)
    verify_checkpoint(tmp_path / "zstd", llama, device="reference").check()
    if format_name != "arrow":
        file = (
            next((tmp_path / "zstd" / "tensors").iterdir()) if format_name == "parquet-tensors" else tmp_path / "zstd"
        )
        group = pq.read_metadata(file).row_group(0)
        assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}


@pytest.mark.parametrize(
    ("format_name", "compression", "words"),
    [
        (
            "compressed-tensors",
            "zstd",
            "compressed-tensors cannot be .* 'zstd'; --format parquet, parquet-tensors, arrow",
        ),
        ("parquet", "gzip", "parquet cannot be written with compression 'gzip'; choose zstd"),
        ("parquet-tensor", None, "format 'parquet-tensor': choose one of compressed-tensors"),
    ],
)
def test_what_cannot_be_is_refused(
    llama: Path, tmp_path: Path, format_name: str, compression: str | None, words: str
) -> None:
    with nothing_changes(tmp_path), pytest.raises(FormatError, match=words):
        quantize_checkpoint(llama, tmp_path / "m", format=format_name, compression=compression, device="reference")


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("format_name", ["parquet", "parquet-tensors"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_run_that_ends_while_it_compresses_is_continued(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format_name: str,
    compression: str | None,
    n: int,
) -> None:
    """Before a file is compressed, with half of it written, or after some; with and without compression."""
    for name in ("whole", "m"):
        (tmp_path / name).mkdir()
    resumed_runs.run(llama, tmp_path / "whole" / "m", format=format_name, compression=compression)
    rewrite, left = ParquetSink._rewrite, n

    def interrupted(self: Any, path: Path, target: Path, schema: pa.Schema) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            target.write_bytes(b"PAR1")
            raise KeyboardInterrupt
        rewrite(self, path, target, schema)
        if format_name == "parquet":
            raise KeyboardInterrupt

    monkeypatch.setattr(ParquetSink, "_rewrite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resumed_runs.run(llama, tmp_path / "m" / "m", format=format_name, compression="zstd")
    monkeypatch.undo()
    result = resumed_runs.run(llama, tmp_path / "m" / "m", format=format_name, compression=compression, resume=True)
    assert result.run.resumed > 0
    assert differences(snapshot(tmp_path / "m"), snapshot(tmp_path / "whole")) == []


def test_a_directory_is_replaced_and_refused_as_a_source(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    for scheme in ("int4_g32", "int8_g32"):
        quantize_checkpoint(llama, target, scheme, format="parquet-tensors", device="reference", overwrite=True)
    assert {e.scheme.bits for e in open_quantized(target).entries.values() if e.scheme} == {8}
    with pytest.raises(SourceError, match=r"already quantized: model\.parquet\.index\.json .* `arrowquant dequantize`"):
        open_checkpoint(target)


def test_plan_knows_that_side_files_have_a_place(llama: Path, tmp_path: Path) -> None:
    for format_name, is_said in (("parquet", True), ("parquet-tensors", False)):
        plan = quantize_checkpoint(llama, tmp_path / "m", format=format_name, dry_run=True)
        assert any("files of the model directory are not in it" in w for w in plan.warnings) == is_said
