"""What the Parquet and the Arrow IPC format must both do: `RowFileTests`, whose subclasses name the format.

Files are written by the sink from the reference's arrays, and looked at through pyarrow alone wherever a fault is
planted.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from arrowquant_gpu import arrow_columns, reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import FormatError, SourceError, TargetError
from arrowquant_gpu.formats import Codes, Diffusion, Entry, TensorInfo, row_layout, v2_extended
from arrowquant_gpu.formats import pieces as cutting
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.pieces import Piece
from arrowquant_gpu.formats.quantized import open_quantized, pieces
from arrowquant_gpu.schemes import Scheme, rows_and_length
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal
from .cases import SCHEMES, cases, make

ROOT = Path(__file__).parent.parent
CONFIG = {"model_type": "test", "nested": {"text": "\u00e4 \u2713"}}
PROVENANCE = {"tool": "arrowquant_gpu", "version": "0", "source": "m"}
SOURCE = SimpleNamespace(path=Path("m"), metadata={"format": "pt"}, config=CONFIG)


@dataclass
class Model:
    """Entries in order, and what belongs to each: a QuantizedTensor of [rows, length], or flat uint8."""

    entries: list[Entry] = field(default_factory=list)
    want: dict[str, QuantizedTensor | np.ndarray] = field(default_factory=dict)

    def quantized(
        self, name: str, x: np.ndarray, scheme: str | Scheme, dtype: str = "float32", known: Diffusion | None = None
    ) -> None:
        scheme = Scheme.parse(scheme)
        rows = x.reshape(rows_and_length(x.shape))
        packed, scales, zeros, _ = reference.quantize(rows, scheme)
        self.want[name] = QuantizedTensor(packed, scales, zeros, rows.shape, scheme, dtype)
        n_bytes = math.prod(x.shape) * DTYPES[dtype].bits // 8
        self.entries.append(Entry(TensorInfo(name, dtype, x.shape, Path("m"), 0, n_bytes), scheme, "linear", known))

    def copied(
        self, name: str, data: np.ndarray, shape: tuple[int, ...], dtype: str, known: Diffusion | None = None
    ) -> None:
        self.want[name] = data.reshape(-1).view(np.uint8)
        info = TensorInfo(name, dtype, shape, Path("m"), 0, self.want[name].size)
        self.entries.append(Entry(info, None, "not a linear weight", known))


def small_model() -> Model:
    """One of each: asymmetric with a tail group, symmetric bf16 scales, per tensor, copied, empty."""
    rng = np.random.default_rng(5)
    model = Model()
    model.quantized("a.weight", rng.standard_normal((40, 100), np.float32), "int4_g32_asym")
    model.quantized("b.weight", rng.standard_normal((30, 64), np.float32), "int3_g16_bf16", "bfloat16")
    model.quantized("c.weight", rng.standard_normal((2, 20, 48), np.float32), "int8_tensor_asym")
    model.copied("norm", rng.standard_normal(500, np.float32), (500,), "float32")
    model.copied("empty", np.empty(0, np.float16), (0, 3), "float16")
    return model


def arrays_of(piece: Piece, want: QuantizedTensor | np.ndarray) -> Codes | np.ndarray:
    """What the engine gives for a piece: codes with scales as the scheme has them, or bytes."""
    if not isinstance(want, QuantizedTensor):
        return want[piece.column : piece.column + piece.n_bytes]
    part = slice(piece.row, piece.row + piece.rows)
    per_tensor = want.scheme.granularity == "tensor"
    scales, zeros = [a if a is None or per_tensor else a[part] for a in (want.scales, want.zeros)]
    return Codes(want.packed[part], scales, zeros)


def fill(sink: Any, model: Model, seed: int = 0) -> None:
    """Write every piece of an opened sink to its places, in an order that depends on the seed."""
    todo = [piece for entry in model.entries for piece in sink.pieces(entry)]
    for i in np.random.default_rng(seed).permutation(len(todo)):
        piece = todo[i]
        arrays = sink.stored(piece, arrays_of(piece, model.want[piece.entry.info.name]))
        for place, array in zip(sink.places(piece), arrays, strict=True):
            assert array.nbytes == place.n_bytes
            sink.output.write(place.file, place.offset, array)


def write(sink: Any, model: Model, *, seed: int = 0) -> Path:
    """Write a model as the engine does."""
    sink.output.begin()
    sink.open(model.entries, SOURCE, PROVENANCE)
    fill(sink, model, seed)
    return sink.commit()[0]


def in_order(sink: Any, model: Model) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """The rows that the file must have, made from the model's arrays without the sink's layout."""
    metadata = {
        b"arrowquant.provenance": json.dumps(PROVENANCE),
        b"arrowquant.source_metadata": json.dumps(SOURCE.metadata),
        b"arrowquant.config": json.dumps(CONFIG),
    }
    names = ("is_diffusion_model", "modality", "time_aware_quant_json", "spatial_quant_json", "activation_stats_json")
    added = [pa.field("reason", pa.string())]
    if any(entry.diffusion for entry in model.entries):
        added += [pa.field(names[0], pa.bool_()), *(pa.field(name, pa.string()) for name in names[1:])]
    columns = pa.schema([*arrow_columns.schema("float32"), *added, pa.field("xxh3_128", pa.string())])
    schema = columns.with_metadata({**arrow_columns.schema("float32").metadata, **metadata})
    batches = []
    for entry in model.entries:
        info, parts = entry.info, sink.pieces(entry)
        for piece in parts:
            codes, place = arrays_of(piece, model.want[info.name]), {"chunk": piece.number, "n_chunks": len(parts)}
            if isinstance(codes, Codes):
                q = QuantizedTensor(*codes, (piece.rows, piece.columns), entry.scheme, info.dtype)
                place |= {"shape": info.shape, "row_offset": piece.row}
                batch = arrow_columns.row(info.name, q, scale_dtype="float32", **place)
            else:
                length = v2_extended.copied_shape(info)[1] * getattr(DTYPES[info.dtype].numpy, "itemsize", 1)
                place |= {"row_offset": piece.column // max(1, length)}
                batch = arrow_columns.copied_row(info.name, codes, info.shape, info.dtype, **place)
            known = entry.diffusion
            values = [entry.reason, *[None] * 5]
            if known:
                values[1:] = True, known.modality, known.time_aware, known.spatial, known.activation_stats
            for column, value in zip(added, values, strict=False):
                batch = batch.append_column(column, pa.array([value], column.type))
            digest = pa.array([v2_extended.row_hash(batch)])
            batches.append(pa.RecordBatch.from_arrays([*batch.columns, digest], schema=schema))
    return schema, batches


def assert_holds(path: Path, model: Model) -> None:
    """Raise unless the file holds the entries and, bit for bit, the arrays of the model."""
    checkpoint = open_quantized(path)
    assert list(checkpoint.entries) == [e.info.name for e in model.entries]
    for entry in model.entries:
        found, info = checkpoint.entries[entry.info.name], entry.info
        assert (found.info.dtype, found.info.shape, found.info.n_bytes) == (info.dtype, info.shape, info.n_bytes)
        assert (found.scheme, found.reason) == (entry.scheme, entry.reason)
        assert_same_diffusion(found.diffusion, entry.diffusion)
        assert_same(list(checkpoint.blocks(info.name)), model.want[info.name], info.name)


def assert_same_diffusion(found: Diffusion | None, want: Diffusion | None) -> None:
    if found is None or want is None:
        assert found is want
        return
    for name in ("modality", "time_aware", "spatial", "activation_stats"):
        assert getattr(found, name) == getattr(want, name), name
    if found.divisors is None or want.divisors is None:
        assert found.divisors is want.divisors
    else:
        assert_bitwise_equal(found.divisors, want.divisors, "divisors")


def assert_same(blocks: Sequence[tuple[int, Any]], want: QuantizedTensor | np.ndarray, name: str) -> None:
    if not isinstance(want, QuantizedTensor):
        parts = [b.reshape(-1).view(np.uint8) for _, b in blocks]
        assert_bitwise_equal(np.concatenate(parts), want, name)
        return
    assert [row for row, _ in blocks] == np.cumsum([0, *(len(b.packed) for _, b in blocks)])[:-1].tolist()
    assert all(b.shape == (len(b.packed), want.shape[1]) for _, b in blocks)
    assert {(b.scheme, b.dtype) for _, b in blocks} == {(want.scheme, want.dtype)}
    assert_bitwise_equal(np.concatenate([b.packed for _, b in blocks]), want.packed, f"{name} packed")
    for what in ("scales", "zeros"):
        arrays, expected = [getattr(b, what) for _, b in blocks], getattr(want, what)
        if expected is None:
            assert arrays == [None] * len(blocks)
        elif want.scheme.granularity == "tensor":
            for array in arrays:
                assert_bitwise_equal(array, expected, f"{name} {what}")
        else:
            assert_bitwise_equal(np.concatenate(arrays), expected, f"{name} {what}")


def read_all(path: Path) -> None:
    """Open the file and read every block."""
    checkpoint = open_quantized(path)
    for name in checkpoint.entries:
        for _ in checkpoint.blocks(name):
            pass


Rows = list[dict[str, Any]]


def swap(column: str, i: int, j: int) -> Callable[[Rows], None]:
    """A fault: two rows exchange a column."""

    def change(rows: Rows) -> None:
        rows[i][column], rows[j][column] = rows[j][column], rows[i][column]

    return change


def put(column: str, value: object, i: int = 0) -> Callable[[Rows], None]:
    """A fault: another value in a column of a row."""

    def change(rows: Rows) -> None:
        assert rows[i][column] != value
        rows[i][column] = value

    return change


def flip_data(rows: Rows) -> None:
    data = bytearray(rows[0]["data"])
    data[len(data) // 2] ^= 0x10
    rows[0]["data"] = bytes(data)


def roll_scales(rows: Rows) -> None:
    """The scales of the row's first group go to another row of weights."""
    rows[0]["scales"] = rows[0]["scales"][1:] + rows[0]["scales"][:1]


def roll_zeros(rows: Rows) -> None:
    rows[0]["zero_points"] = [z ^ 1 for z in rows[0]["zero_points"]]


def shorten(column: str) -> Callable[[Rows], None]:
    """A fault: an item too few."""

    def change(rows: Rows) -> None:
        rows[0][column] = rows[0][column][:-1]

    return change


# (what, fault, part of the message). Rows 0.. are those of a.weight, of which there are several.
FAULTS: tuple[tuple[str, Callable[[Rows], Any], str], ...] = (
    ("a flipped bit", flip_data, "tensor a.weight: row 0 is damaged"),
    ("scales of another row", roll_scales, "tensor a.weight: row 0 is damaged"),
    ("other zero points", roll_zeros, "tensor a.weight: row 0 is damaged"),
    ("data of another part", swap("data", 0, 1), "tensor a.weight: row 0 is damaged"),
    ("no hash", put("xxh3_128", None), "tensor a.weight: row 0 is damaged"),
    ("two rows in the wrong order", lambda rows: rows.insert(0, rows.pop(1)), "row 0 is part 1, where part 0 must be"),
    ("parts renumbered", lambda rows: [swap(c, 0, 1)(rows) for c in ("chunk", "row_offset")], "row 0 is part 1"),
    ("row offsets exchanged", swap("row_offset", 0, 1), "tensor a.weight: row 0 is damaged"),
    ("a missing part", lambda rows: rows.pop(1), "row 1 is part 2, where part 1 must be"),
    ("the last part missing", lambda rows: rows.pop(2), "tensor a.weight: 2 of its 3 parts are there"),
    ("a part twice", lambda rows: rows.insert(1, rows[0]), "row 1 is part 0, where part 1 must be"),
    ("a tensor twice", lambda rows: rows.append(rows[-1]), "is part 0, where part 1 must be"),
    ("a tensor in two places", lambda rows: rows.append(rows[0]), "holds this name a second time"),
    ("another name", put("layer_name", "z.weight", -1), "tensor z.weight: row"),
    ("no name", put("layer_name", None), "row 0 has no layer_name"),
    ("an unknown scheme in one part", put("scheme", "nf4_g64", 1), "row 1 differs from the first one of this tensor"),
    ("an unknown scheme throughout", lambda rows: [r.update(scheme="nf9_g64") for r in rows[:3]], "nf9"),
    ("a grid that rows cannot hold", lambda rows: [r.update(scheme="nf4_g64") for r in rows[:3]], "codes of grid nf4"),
    ("another scheme", lambda rows: [r.update(scheme="int4_g16_asym") for r in rows[:3]], "damaged"),
    ("an unknown dtype", lambda rows: [r.update(dtype="float31") for r in rows[:3]], "dtype 'float31' is not known"),
    ("another dtype", lambda rows: [r.update(dtype="float16") for r in rows[:3]], "damaged"),
    ("another shape", lambda rows: [r.update(shape=[100, 40]) for r in rows[:3]], "damaged"),
    ("a shape of another size", lambda rows: [r.update(shape=[40, 101]) for r in rows[:3]], "num_params 4000 disagree"),
    ("another axis", put("quant_axis", 0), "damaged"),
    ("another reason", lambda rows: [r.update(reason="chance") for r in rows[:3]], "damaged"),
    ("no shape", lambda rows: [r.update(shape=None) for r in rows[:3]], "shape None"),
)

# The same with the hash made to fit, so that only what a row says of itself can tell.
CONTRADICTIONS: tuple[tuple[str, Callable[[Rows], Any], str], ...] = (
    ("data too short", shorten("data"), "tensor a.weight"),
    ("scales too few", shorten("scales"), "scales has"),
    ("zero points too few", shorten("zero_points"), "zero_points has"),
    ("no zero points", put("zero_points", None), "zero_points is null"),
    ("no data", put("data", None), "tensor a.weight"),
    ("another bit width", put("bit_width", 8), "bit_width is 8 and the scheme is int4_g32_asym"),
    ("another group size", put("group_size", 64), "group_size is 64 and the scheme is int4_g32_asym"),
    ("another kind", put("quant_type", "int2"), "quant_type is 'int2' and the scheme is int4_g32_asym"),
    ("another offset", put("row_offset", 5, 1), "row 1 does not begin where the one before it ends"),
    ("a row of weights too few", lambda rows: _drop_row(rows[2]), "39 of its 40 rows are there"),
)


def _drop_row(row: dict[str, Any]) -> None:
    row["data"], row["scales"], row["zero_points"] = row["data"][:-50], row["scales"][:-4], row["zero_points"][:-4]


@contextlib.contextmanager
def small_files_only() -> Iterator[None]:
    """Writes fail past 4 KiB of a file. No longer than the body: it holds for the log that pytest writes as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class RowFileTests:
    """Tests of one format. A subclass says how its files are written and, through pyarrow, read and rewritten."""

    suffix: str
    sink: Any
    checkpoint: Any

    @staticmethod
    def read_batches(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
        raise NotImplementedError

    @staticmethod
    def write_batches(
        path: Path, schema: pa.Schema, batches: list[pa.RecordBatch], compression: str | None = None
    ) -> None:
        """With the options that docs/parquet.md promises: no dictionary, statistics of names, one page in a column."""
        raise NotImplementedError

    def write(self, path: Path, model: Model, *, compression: str | None = None, seed: int = 0) -> Path:
        return write(self.sink(Output(path, is_directory=False), compression=compression), model, seed=seed)

    def rewrite(self, path: Path, change: Callable[[Rows], Any], *, rehash: bool = False) -> None:
        """Change rows of a file with pyarrow; `rehash` makes the hash of each row fit what it then holds."""
        schema, batches = self.read_batches(path)
        rows = [row for batch in batches for row in batch.to_pylist()]
        change(rows)
        batches = [pa.RecordBatch.from_pylist([row], schema) for row in rows]
        if rehash:
            hashed = [
                {**b.to_pylist()[0], "xxh3_128": v2_extended.row_hash(b)} for b in batches if b["data"][0].is_valid
            ]
            batches = [pa.RecordBatch.from_pylist([row], schema) for row in hashed] if hashed else batches
        self.write_batches(path, schema, batches)

    @pytest.fixture
    def chunked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pieces of 5600 bytes of the source, so that small tensors take several rows."""
        monkeypatch.setattr(cutting, "PIECE_BYTES", 5600)

    @pytest.fixture
    def file(self, tmp_path: Path, chunked: None) -> Path:
        return self.write(tmp_path / f"m{self.suffix}", small_model())

    @pytest.mark.usefixtures("chunked")
    def test_every_scheme_comes_back(self, tmp_path: Path) -> None:
        model = Model()
        for scheme in SCHEMES:
            model.quantized(scheme.id, make("normal", (11, 133), "float32"), scheme)
        path = self.write(tmp_path / f"m{self.suffix}", model)
        assert_holds(path, model)
        assert any(b["n_chunks"][0].as_py() > 1 for b in self.read_batches(path)[1])

    @pytest.mark.usefixtures("chunked")
    def test_sampled_cases_come_back(self, tmp_path: Path) -> None:
        model = Model()
        for i, (scheme, dtype, shape, content) in enumerate(cases(every=499)):
            model.quantized(f"{i}.{content}", make(content, shape, dtype), scheme, dtype)
        assert len(model.entries) > 250
        assert_holds(self.write(tmp_path / f"m{self.suffix}", model), model)

    def check_any_cutting(self, data: st.DataObject) -> None:
        """Pieces may end anywhere. (Hypothesis wants a test in each subclass.)"""
        model = Model()
        for i in range(2):
            shape = (*data.draw(st.lists(st.integers(0, 5), max_size=2)), data.draw(st.integers(0, 70)))
            x = np.random.default_rng(i).standard_normal(shape).astype(np.float32)
            model.quantized(f"q{i}", x, data.draw(st.sampled_from(SCHEMES)))
            model.copied(f"c{i}", x, shape, "float32")
        piece, seed = data.draw(st.sampled_from([16, 64, 256, 1024, 1 << 24])), data.draw(st.integers(0, 9))
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(cutting, "PIECE_BYTES", piece)
            path = self.write(Path(folder) / f"m{self.suffix}", model, seed=seed)
            assert_holds(path, model)
            self.assert_as_in_order(path, model)

    @pytest.mark.usefixtures("chunked")
    @pytest.mark.parametrize("compression", [None, "zstd"])
    def test_every_shape_and_dtype_is_copied(self, tmp_path: Path, compression: str | None) -> None:
        rng, model = np.random.default_rng(3), Model()
        for dtype, row in DTYPES.items():
            for shape in ((), (0,), (3, 0), (0, 4), (1,), (24,), (5, 16), (2, 3, 4), (2, 700), (12, 64)):
                bits = math.prod(shape) * row.bits
                if bits % 8 == 0:
                    data = rng.integers(0, 2 if dtype == "bool" else 256, bits // 8, dtype=np.uint8)
                    model.copied(f"{dtype} {shape}", data, shape, dtype)
        path = self.write(tmp_path / f"m{self.suffix}", model, compression=compression)
        assert_holds(path, model)
        checkpoint = open_quantized(path)
        for name, entry in checkpoint.entries.items():
            for _, block in checkpoint.blocks(name):
                assert block.ndim == 2
                assert block.dtype == (DTYPES[entry.info.dtype].numpy or np.uint8)

    @pytest.mark.parametrize("compression", [None, "zstd"])
    @pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0), (0, 8), (1, 5), (2, 3, 40), (2, 0, 4), (2, 3, 4, 5)])
    def test_every_shape_is_quantized(self, tmp_path: Path, shape: tuple[int, ...], compression: str | None) -> None:
        x, model = np.random.default_rng(1).standard_normal(shape).astype(np.float32), Model()
        x = np.asarray(x, np.float32)
        for scheme in ("int4_g32", "int5_channel_asym_bf16", "int3_tensor", "int8_tensor_asym_f16", "int2_g1_asym"):
            model.quantized(scheme, x, scheme)
        assert_holds(self.write(tmp_path / f"m{self.suffix}", model, compression=compression), model)

    @pytest.mark.parametrize("n_weights", [1, 64, 100, 1000, 10**6])
    def test_pieces_decode_to_the_tensor(self, tmp_path: Path, chunked: None, n_weights: int) -> None:
        model = Model()
        for scheme in SCHEMES[::7]:
            model.quantized(scheme.id, make("normal", (5, 333), "float32"), scheme)
        checkpoint = open_quantized(self.write(tmp_path / f"m{self.suffix}", model))
        for name in checkpoint.entries:
            q, done, parts = model.want[name], 0, []
            for at, piece in pieces(checkpoint, name, n_weights):
                assert at == done
                rows, length = piece.shape
                parts.append(
                    reference.dequantize(piece.packed, piece.scales, piece.zeros, q.scheme, length).reshape(-1)
                )
                done += rows * length
            want = reference.dequantize(q.packed, q.scales, q.zeros, q.scheme, q.shape[1])
            assert_bitwise_equal(np.concatenate(parts), want.reshape(-1), name)
            if n_weights == 100 and (q.scheme.group_size or 1) <= 64:
                assert len(parts) > 5

    def test_metadata_comes_back(self, file: Path) -> None:
        checkpoint = open_quantized(file)
        assert isinstance(checkpoint, self.checkpoint)
        assert (checkpoint.config, checkpoint.metadata, checkpoint.provenance) == (CONFIG, SOURCE.metadata, PROVENANCE)
        assert (checkpoint.path, checkpoint.format, checkpoint.side_files) == (file, self.sink.format, ())
        schema, _ = self.read_batches(file)
        assert schema.names == v2_extended.COLUMNS.names
        assert json.loads(schema.metadata[b"arrowquant.config"]) == CONFIG

    def test_no_config_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SOURCE, "config", None)
        path = self.write(tmp_path / f"m{self.suffix}", small_model())
        assert open_quantized(path).config is None

    def assert_as_in_order(self, path: Path, model: Model, compression: str | None = None) -> None:
        """Raise unless the file is, byte for byte, what pyarrow writes when given the rows one after the other."""
        schema, batches = in_order(self.sink(Output(path, is_directory=False)), model)
        with tempfile.TemporaryDirectory() as folder:
            expected = Path(folder) / "in order"
            self.write_batches(expected, schema, batches, compression)
            assert path.read_bytes() == expected.read_bytes()
        table = pa.Table.from_batches(self.read_batches(path)[1])
        assert table.equals(pa.Table.from_batches(batches))

    @pytest.mark.parametrize("compression", [None, "zstd"])
    @pytest.mark.parametrize("n_bytes", [500, 6000, 16 << 20])
    def test_the_order_of_writing_does_not_matter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_bytes: int, compression: str | None
    ) -> None:
        monkeypatch.setattr(cutting, "PIECE_BYTES", n_bytes)
        for seed in range(2):
            path = self.write(tmp_path / f"{seed}{self.suffix}", small_model(), compression=compression, seed=seed)
            assert_holds(path, small_model())
            self.assert_as_in_order(path, small_model(), compression)

    def test_long_values_pass_through(self, tmp_path: Path) -> None:
        """Values that are not held while the file is laid out: data, scales and zero points, next to long names."""
        rng, model = np.random.default_rng(1), Model()
        model.quantized("n" * 5000, rng.standard_normal((64, 1 << 13), np.float32), "int4_g8_asym_f16")
        model.quantized("scales alone", rng.standard_normal((1, 1 << 14), np.float32), "int2_g1")
        model.quantized("n" * 3991, rng.standard_normal((1, 8000), np.float32), "int4_channel")
        model.quantized("n" * 4097, np.zeros((2, 8194), np.float32), "int2_g64_bf16", "bfloat16")
        model.copied("copied", rng.standard_normal(1 << 18, np.float32), (1 << 9, 1 << 9), "float32")
        path = self.write(tmp_path / f"m{self.suffix}", model)
        assert_holds(path, model)
        self.assert_as_in_order(path, model)

    def test_a_file_that_is_resumed_keeps_its_pieces(
        self, tmp_path: Path, chunked: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Opened again, on a disk that is full by then, a sink writes what is around the places as it is."""
        model, output = small_model(), Output(tmp_path / f"m{self.suffix}", is_directory=False)
        output.begin()
        sink, again = self.sink(output), self.sink(output)
        sink.open(model.entries, SOURCE, PROVENANCE)
        fill(sink, model)
        before = output.path(output.target.name).read_bytes()

        made, wrote = [], []
        monkeypatch.setattr(output, "create", lambda *size: made.append(size))
        monkeypatch.setattr(output, "write", lambda _, offset, data: wrote.append((offset, data.tobytes())))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        again.open(model.entries, SOURCE, PROVENANCE)
        assert made == [(output.target.name, len(before))]
        parts = [piece for entry in model.entries for piece in sink.pieces(entry)]
        places = [place for piece in parts for place in sink.places(piece)]
        assert places == [place for piece in parts for place in again.places(piece)]
        counted = np.zeros(len(before), int)
        for place in places:
            counted[place.offset : place.offset + place.n_bytes] += 1
        for offset, data in wrote:
            assert before[offset : offset + len(data)] == data
            counted[offset : offset + len(data)] += 1
        assert (counted == 1).all()
        sink.output.abort()

    def test_memory_does_not_grow_with_the_values(self, tmp_path: Path) -> None:
        """Of a model of 3 GB that is laid out, no more than a piece or two is ever in memory."""
        program = f"""
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from arrowquant_gpu.formats import Entry, TensorInfo
from {self.sink.__module__} import {self.sink.__name__}
from arrowquant_gpu.schemes import Scheme

output = SimpleNamespace(target=Path({str(tmp_path)!r}) / "m", path=Path, create=print, write=lambda *_: None)
sink = {self.sink.__name__}(output)
def entry(n, scheme):
    info = TensorInfo(f"{{n}} {{scheme}}", "float32", (n, 1 << 22), Path("m"), 0, n << 24)
    return Entry(info, scheme and Scheme.parse(scheme), "")
import shutil
shutil.disk_usage = lambda _: SimpleNamespace(free=1 << 60)
source = SimpleNamespace(metadata={{}}, config=None)
sink.open([entry(1, "int8_g1_asym"), entry(1, None)], source, {{}})
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sink.open([entry(64, "int8_g4_asym"), entry(64, "int4_g32_asym_bf16"), entry(64, None)], source, {{}})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
"""
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
        assert int(done.stdout.split()[-1]) < 32 << 10

    def test_another_layout_than_the_known_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Model()
        model.quantized("w", np.zeros((64, 512), np.float32), "int4_g32")
        keep = row_layout.Skeleton.write
        monkeypatch.setattr(row_layout.Skeleton, "write", lambda self, data: keep(self, bytes(data) + b"."))
        sink = self.sink(Output(tmp_path / f"m{self.suffix}", is_directory=False))
        sink.output.begin()
        with pytest.raises(FormatError, match="lays files out in a way that arrowquant does not know"):
            sink.open(model.entries, SOURCE, PROVENANCE)
        sink.output.abort()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(("fault", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
    def test_a_fault_is_found(self, file: Path, fault: Callable[[Rows], Any], message: str) -> None:
        self.rewrite(file, lambda rows: None)
        assert_holds(file, small_model())
        self.rewrite(file, fault)
        with pytest.raises(SourceError) as e:
            read_all(file)
        assert message in str(e.value)
        assert str(file) in str(e.value)

    @pytest.mark.parametrize(("fault", "message"), [f[1:] for f in CONTRADICTIONS], ids=[f[0] for f in CONTRADICTIONS])
    def test_a_contradiction_is_found(self, file: Path, fault: Callable[[Rows], Any], message: str) -> None:
        self.rewrite(file, lambda rows: None, rehash=True)
        assert_holds(file, small_model())
        self.rewrite(file, fault, rehash=True)
        with pytest.raises(SourceError) as e:
            read_all(file)
        assert message in str(e.value)
        assert str(file) in str(e.value)

    def test_extra_columns_are_ignored(self, file: Path) -> None:
        schema, batches = self.read_batches(file)
        wider = pa.schema([*schema, ("note", pa.string())], schema.metadata)
        rows = [pa.RecordBatch.from_arrays([*b.columns, pa.array(["mine"])], schema=wider) for b in batches]
        self.write_batches(file, wider, rows)
        assert_holds(file, small_model())

    def test_a_foreign_file_is_refused(self, file: Path) -> None:
        schema, batches = self.read_batches(file)
        for new, message in (
            (
                pa.schema([("a", pa.int64())]),
                "not a quantized model of arrowquant; there is no column layer_name of string",
            ),
            (schema.remove_metadata(), "there is no arrowquant.version in its metadata"),
            (schema.with_metadata({**schema.metadata, b"arrowquant.version": b"2"}), "version 2, and this package"),
            (schema.with_metadata({**schema.metadata, b"arrowquant.config": b"{"}), "cannot be read as"),
        ):
            kept = [b for b in batches if len(new) > 1]
            self.write_batches(file, new, [b.replace_schema_metadata(new.metadata) for b in kept])
            with pytest.raises(SourceError) as e:
                open_quantized(file)
            assert message in str(e.value)
            assert str(file) in str(e.value)

    @pytest.mark.parametrize(
        ("column", "other"),
        [
            ("data", pa.binary()),
            ("scales", pa.large_list(pa.float64())),
            ("chunk", pa.int64()),
            ("scheme", pa.binary()),
        ],
    )
    def test_a_column_of_another_type_is_refused(self, file: Path, column: str, other: pa.DataType) -> None:
        schema, batches = self.read_batches(file)
        changed = schema.set(schema.get_field_index(column), pa.field(column, other))
        self.write_batches(file, changed, [b.cast(changed) for b in batches])
        with pytest.raises(SourceError, match=f"there is no column {column} of"):
            open_quantized(file)

    def test_a_truncated_file_is_refused(self, file: Path) -> None:
        whole = file.read_bytes()
        for n in [*range(0, len(whole), len(whole) // 97), len(whole) - 1]:
            file.write_bytes(whole[:n])
            with pytest.raises(SourceError, match=file.name):
                read_all(file)

    def test_a_flipped_bit_anywhere_is_found_or_harmless(self, file: Path) -> None:
        """Of a body of codes every bit counts; padding and what no reader looks at may change."""
        whole, rng = file.read_bytes(), np.random.default_rng(8)
        found = 0
        body = len(whole) * 2 // 3
        for at in rng.integers(0, body, 150).tolist():
            file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << int(rng.integers(8)))]) + whole[at + 1 :])
            with contextlib.suppress(SourceError):
                assert_holds(file, small_model())
                continue
            found += 1
        assert found > 75

    def test_nothing_is_there_before_commit(self, tmp_path: Path) -> None:
        model, path = small_model(), tmp_path / f"m{self.suffix}"
        sink = self.sink(Output(path, is_directory=False))
        sink.output.begin()
        sink.open(model.entries, SOURCE, PROVENANCE)
        fill(sink, model)
        assert not path.exists()
        sink.output.abort()
        sink.output.abort()
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_target_is_kept(self, file: Path) -> None:
        before = file.read_bytes()
        sink = self.sink(Output(file, is_directory=False))
        with pytest.raises(TargetError, match="exists"):
            write(sink, small_model())
        sink.output.abort()
        assert file.read_bytes() == before

    def test_more_than_the_free_space_is_refused_at_once(self, tmp_path: Path) -> None:
        info = TensorInfo("w", "float32", (1 << 25, 1 << 25), Path("m"), 0, 1 << 52)
        sink = self.sink(Output(tmp_path / f"m{self.suffix}", is_directory=False))
        sink.output.begin()
        with pytest.raises(TargetError, match=r"bytes are needed and .* are free"):
            sink.open([Entry(info, Scheme.parse("int4_g128"), "")], SOURCE, PROVENANCE)
        sink.output.abort()
        assert list(tmp_path.iterdir()) == []

    def test_a_failing_write_leaves_nothing(self, tmp_path: Path) -> None:
        sink = self.sink(Output(tmp_path / f"m{self.suffix}", is_directory=False))
        with small_files_only(), pytest.raises(TargetError, match=f"m{self.suffix}"):
            write(sink, small_model())
        sink.output.abort()
        assert list(tmp_path.iterdir()) == []
