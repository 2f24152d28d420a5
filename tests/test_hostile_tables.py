"""Hostile tables: damaged files and streams, structures that lie, and nothing that ends the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arrowquant_gpu.errors import InputError, SourceError
from arrowquant_gpu.tables.dequantize import dequantize_table
from arrowquant_gpu.tables.files import quantize_file
from arrowquant_gpu.tables.quantize import quantize_table
from arrowquant_gpu.tables.sources import open_source
from arrowquant_gpu.tensor import QuantizedTensor

from . import hostile_tables
from .hostile_tables import SCHEME, VALID, cases, judge, samples
from .weight_rows import batch, layers, table

ROOT = Path(__file__).parent.parent


def figures(n: int, seed: int) -> dict[str, Any]:
    """Of damaged tables, judged in a process of its own; where that is ended, the case it was at."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.hostile_tables", str(n), str(seed)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr.rpartition("\r")[2][:3000]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any]) -> None:
    assert found["n_failures"] == 0, "\n".join(found["failures"])
    for suffix in (".arrow", ".arrows", ".parquet", "weights in memory", "results in memory"):
        assert found["found"].get(f"{suffix} {VALID}"), f"no damaged {suffix} stays valid: nothing was compared"
        assert any(n for key, n in found["found"].items() if key.startswith(suffix) and key.endswith("Error"))


def test_a_sample_of_damaged_tables() -> None:
    check(figures(2100, 20261121))


@pytest.mark.soak
def test_damaged_tables(record_property: Callable[[str, object], None]) -> None:
    found = figures(70_000, 1)
    for key, value in found.items():
        record_property(key, value)
    check(found)


def _drops_a_row(src: Any, dst: Any, scheme: str, **options: Any) -> None:
    source = open_source(src)
    rows = quantize_table(source.reader(), scheme, device="cpu")
    with pa.ipc.new_file(dst, rows.schema) as writer:
        writer.write_table(rows.slice(0, rows.num_rows - 1))


def _turns_a_bit(src: Any, dst: Any, scheme: str, **options: Any) -> None:
    rows = quantize_table(open_source(src).reader(), scheme, device="cpu")
    data = rows["quantized_data"].to_pylist()
    data[-1] = bytes([data[-1][0] ^ 1, *data[-1][1:]]) if data[-1] else b"x"
    rows = rows.set_column(1, "quantized_data", pa.array(data, pa.large_binary()))
    with pa.ipc.new_file(dst, rows.schema) as writer:
        writer.write_table(rows)


def _raises_another_error(src: Any, dst: Any, scheme: str, **options: Any) -> None:
    try:
        quantize_file(src, dst, scheme, **options)
    except SourceError as e:
        raise KeyError("weights") from e


@pytest.mark.parametrize("faulty", [_drops_a_row, _turns_a_bit, _raises_another_error])
def test_planted_faults_are_noticed(faulty: Callable[..., Any], tmp_path: Path) -> None:
    noticed = 0
    for _, path in cases(60, 3, tmp_path):
        try:
            judge(path, tmp_path / "q.arrow", faulty)
        except AssertionError:
            noticed += 1
    assert noticed


def test_a_row_group_that_ends_early_is_no_shorter_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a column chunk that was damaged pyarrow 26 may read fewer rows than its row group has, without a word."""
    pq.write_table(table(layers([(3, 20), (7,), (2, 9)])), tmp_path / "short.parquet", row_group_size=2)
    whole = pq.ParquetFile.iter_batches

    def short(self: Any, *arguments: Any, **options: Any) -> Any:
        return iter(()) if options["row_groups"] == [1] else whole(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", short)
    with pytest.raises(SourceError, match=r"short\.parquet: cannot be read.*row group 1 has 1 rows, and 0 can be read"):
        list(open_source(tmp_path / "short.parquet"))


# --- Structures that lie ---------------------------------------------------------------------------------------------


class Lying:
    """Exports a valid record batch whose offsets are changed after it was made: what a C producer may hand over."""

    def __init__(self, offsets: list[int], values: int = 4) -> None:
        self._offsets = np.array([0, values], np.int32)
        items = pa.array(np.ones(values, np.float32))
        kind = pa.list_(pa.float32())
        made = pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(self._offsets)], 0, children=[items])
        self._batch = batch(["fc"], made)
        self._offsets[:] = offsets

    def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
        return self._batch.__arrow_c_array__(requested_schema)


@pytest.mark.parametrize("offsets", [[0, 5], [0, 2**31 - 1], [-4, 4], [4, 0], [3, -1]])
def test_offsets_out_of_range(offsets: list[int]) -> None:
    for run in (quantize_table, dequantize_table):
        with pytest.raises(InputError, match=r"malformed|are missing"):
            run(Lying(offsets), device="cpu")
    assert quantize_table(Lying([0, 4]), device="cpu").num_rows == 1


def bad_text(kind: pa.DataType) -> pa.Array:
    width = np.int32 if kind == pa.string() else np.int64
    return pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(np.array([0, 2], width)), pa.py_buffer(b"\xff\xfe")])


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_name_that_is_no_text(kind: pa.DataType, dictionary: bool) -> None:
    names = bad_text(kind)
    if dictionary:
        names = pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), names)
    given = pa.RecordBatch.from_arrays([names, pa.array([[1.0]])], ["layer_name", "weights"])
    with pytest.raises(InputError, match=r"malformed: .*UTF8"):
        quantize_table(given, device="cpu")


def test_a_dictionary_index_out_of_range() -> None:
    indices = np.array([0], np.int8)
    names = pa.DictionaryArray.from_arrays(pa.Array.from_buffers(pa.int8(), 1, [None, pa.py_buffer(indices)]), ["a"])
    indices[0] = 7
    given = pa.RecordBatch.from_arrays([names, pa.array([[1.0]])], ["layer_name", "weights"])
    with pytest.raises(InputError, match="malformed"):
        quantize_table(given, device="cpu")


def test_column_names_that_are_no_text(tmp_path: Path) -> None:
    given = pa.table({"layer_name": ["a"], "weights": [[1.0]], "zzzzzzzz": [1]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, given.schema) as writer:
        writer.write_table(given)
    data = sink.getvalue().to_pybytes().replace(b"zzzzzzzz", b"\xff" * 8)
    (tmp_path / "w.arrows").write_bytes(data)
    for run in (quantize_table, dequantize_table):
        with pytest.raises(InputError, match="no UTF-8"):
            run(pa.ipc.open_stream(data), device="cpu")
    with pytest.raises(SourceError, match=r"w\.arrows: cannot be read"):
        quantize_file(tmp_path / "w.arrows", tmp_path / "q.arrow", SCHEME, device="cpu")


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"chunk": [0], "n_chunks": [2**40], "shape": [[2**40]]}, "1099511627776 chunks; a tensor has at most"),
        ({"shape": pa.array([[2**63, 0]], pa.list_(pa.uint64()))}, "shape is"),
        ({"shape": [[2**62, 2**62, 0, 1]]}, "has 0 weights, and the row has 1"),
        ({"shape": [[0] * 70]}, "has 0 weights, and the row has 1"),
    ],
)
def test_sizes_that_nothing_can_hold(columns: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        quantize_table(batch(["fc"], pa.array([[1.0]]), **columns), device="cpu")


WRONG_COLUMNS: dict[str, pa.Array] = {
    "dtype": pa.array([{"a": 1}]),
    "scheme": pa.array([b"int4_g32_asym"]),
    "shape": pa.array([[1]], pa.list_(pa.duration("s"))),
    "bit_width": pa.array(["4"]),
    "scales": pa.array([[True]]),
    "zero_points": pa.array([0], pa.uint8()),
    "quantized_data": pa.array(["text"]),
}


@pytest.mark.parametrize("name", WRONG_COLUMNS)
def test_results_with_a_column_of_another_type(name: str) -> None:
    result = quantize_table(table(layers([(3, 20)])), SCHEME, device="cpu")
    wrong = result.set_column(result.column_names.index(name), name, WRONG_COLUMNS[name])
    with pytest.raises(InputError, match=f"column {name} is .*; it must be"):
        dequantize_table(wrong, device="cpu")
    with pytest.raises(InputError, match=f"column {name} is .*; it must be"):
        QuantizedTensor.from_arrow(wrong, 0)


def test_every_row_bad() -> None:
    arrays = {name: np.full_like(a, np.nan) for name, a in layers([(3, 40)] * 50).items()}
    result = quantize_table(table(arrays), device="cpu", continue_on_error=True)
    assert result.num_rows == 0
    assert len(json.loads(result.schema.metadata[b"arrowquant.errors"])) == 50


def test_the_samples_are_valid(tmp_path: Path) -> None:
    for name, data in samples().items():
        (tmp_path / name).write_bytes(data)
        assert judge(tmp_path / name, tmp_path / "q.arrow") == VALID
    assert hostile_tables.run(14, 5)["n_failures"] == 0
