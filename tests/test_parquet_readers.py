"""What others read of our files: pyarrow alone, pandas and DuckDB give what decodes to the bytes that we decode to.

Nothing of the package is used to decode here: a few lines of NumPy, over what each of them gives for a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from arrowquant_gpu import dequantize_checkpoint, quantize_checkpoint, reference
from arrowquant_gpu.formats import pieces as cutting
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .fixtures import tiny_llama, write_safetensors

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]
# The rows of a tensor in order, from a file or a folder of files.
Read = Callable[[Path, str], list[Row]]


def by_pyarrow(path: Path, name: str) -> list[Row]:
    table = pq.read_table(path, filters=[("layer_name", "=", name)])
    return table.sort_by("chunk").to_pylist()


def by_pyarrow_dataset(path: Path, name: str) -> list[Row]:
    return ds.dataset(path).to_table(filter=ds.field("layer_name") == name).sort_by("chunk").to_pylist()


def by_pandas(path: Path, name: str) -> list[Row]:
    frame = pd.read_parquet(path)
    return frame[frame["layer_name"] == name].sort_values("chunk").to_dict("records")


def by_duckdb(path: Path, name: str) -> list[Row]:
    files = str(path / "*.parquet") if path.is_dir() else str(path)
    query = "SELECT * FROM read_parquet(?) WHERE layer_name = ? ORDER BY chunk"
    with duckdb.connect() as connection:
        cursor = connection.execute(query, [files, name])
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


READERS: tuple[Read, ...] = (by_pyarrow, by_pyarrow_dataset, by_pandas, by_duckdb)


def decoded(rows: list[Row]) -> np.ndarray:
    """The tensor in these rows: codes of 4 or 8 bits whose rows are whole groups, or what was kept."""
    parts = []
    for row in rows:
        data = np.frombuffer(bytes(row["data"]), np.uint8)
        if row["quant_type"] == "none":
            parts.append(data)
            continue
        length = int(row["shape"][-1])
        codes = data if row["bit_width"] == 8 else np.stack([data & 15, data >> 4], axis=-1)
        codes = codes.reshape(-1, int(row["group_size"])).astype(np.float32)
        scales = np.array(row["scales"], np.float32).reshape(-1, 1)
        zeros = row["zero_points"]
        zeros = np.float32(2 ** (int(row["bit_width"]) - 1)) if zeros is None else np.array(zeros, np.float32)
        parts.append(((codes - zeros.reshape(-1, 1)) * scales).reshape(-1, length))
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What was quantized, what it decodes to, and the files and folders, by a word."""
    folder = tmp_path_factory.mktemp("models")
    source = tiny_llama(folder / "source", "float32", shards=2)
    made = {"source": source}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "PIECE_BYTES", 8192)
        for scheme in ("int4_g32_asym", "int8_g16"):
            for format_name, where in (("parquet", "."), ("parquet-tensors", "tensors")):
                for compression in (None, "zstd") if scheme == "int4_g32_asym" else (None,):
                    word = f"{scheme} {format_name} {compression}"
                    quantize_checkpoint(
                        source, folder / word, scheme, format=format_name, compression=compression, device="reference"
                    )
                    made[word] = folder / word / where
            dequantize_checkpoint(
                folder / f"{scheme} parquet None", folder / f"{scheme}.safetensors", device="reference"
            )
            made[scheme] = folder / f"{scheme}.safetensors"
    return made


def check(rows: list[Row], want: np.ndarray, name: str) -> None:
    got = decoded(rows)
    if got.dtype == np.uint8:
        got = got.view(want.dtype)
    assert_bitwise_equal(got.reshape(want.shape), want, name)


@pytest.mark.parametrize("format_name", ["parquet", "parquet-tensors"])
@pytest.mark.parametrize(
    ("scheme", "compression"), [("int4_g32_asym", None), ("int4_g32_asym", "zstd"), ("int8_g16", None)]
)
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_every_reader_gives_what_we_decode_to(
    models: dict[str, Path], read: Read, scheme: str, format_name: str, compression: str | None
) -> None:
    path, want = models[f"{scheme} {format_name} {compression}"], open_checkpoint(models[scheme])
    n_rows = []
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"):
        rows = read(path, name)
        n_rows.append(len(rows))
        check(rows, want.view(name), name)
    assert n_rows[0] > 1


@pytest.mark.parametrize("scheme", ["int4_g32_asym", "int8_g16"])
def test_what_we_decode_to_is_what_the_reference_makes_of_the_weights(models: dict[str, Path], scheme: str) -> None:
    """So that a code in a wrong place is noticed, though writer and reader agree on it."""
    source, ours, parsed = open_checkpoint(models["source"]), open_checkpoint(models[scheme]), Scheme.parse(scheme)
    name = "model.layers.0.mlp.up_proj.weight"
    packed, scales, zeros, _ = reference.quantize(source.view(name), parsed)
    want = reference.dequantize(packed, scales, zeros, parsed, source.tensors[name].shape[1])
    assert_bitwise_equal(ours.view(name), want, name)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_the_comparison_notices_a_wrong_code(models: dict[str, Path], read: Read) -> None:
    name, want = "model.layers.0.mlp.up_proj.weight", open_checkpoint(models["int4_g32_asym"])
    rows = read(models["int4_g32_asym parquet None"], name)
    for column in ("data", "zero_points"):
        wrong = [dict(row) for row in rows]
        if column == "data":
            data = bytearray(wrong[1]["data"])
            data[7] ^= 16
            wrong[1]["data"] = bytes(data)
        else:
            wrong[1]["zero_points"] = [z ^ 1 for z in wrong[1]["zero_points"]]
        with pytest.raises(AssertionError):
            check(wrong, want.view(name), name)


def test_arrow_files_in_duckdb_and_pandas(models: dict[str, Path], tmp_path: Path) -> None:
    """Through pyarrow, which maps them."""
    quantize_checkpoint(models["source"], tmp_path / "m.arrow", "int4_g32_asym", format="arrow", device="reference")
    table = pa.ipc.open_file(pa.memory_map(str(tmp_path / "m.arrow"))).read_all()
    name = "model.layers.0.mlp.up_proj.weight"
    want = open_checkpoint(models["int4_g32_asym"]).view(name)
    frame = table.to_pandas()
    check(frame[frame["layer_name"] == name].sort_values("chunk").to_dict("records"), want, name)
    with duckdb.connect() as connection:
        connection.register("model", table)
        cursor = connection.execute("SELECT * FROM model WHERE layer_name = ? ORDER BY chunk", [name])
        names = [column[0] for column in cursor.description]
        check([dict(zip(names, row, strict=True)) for row in cursor.fetchall()], want, name)


def test_the_sql_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = np.random.default_rng(0).standard_normal((16, 256), dtype=np.float32)
    write_safetensors(tmp_path / "model.safetensors", {"fc.weight": weights, "fc.bias": weights[:, 0].copy()})
    for target, format_name in (("model.parquet", "parquet"), ("model", "parquet-tensors")):
        quantize_checkpoint("model.safetensors", target, "int4_g64_asym", format=format_name, device="reference")
    blocks = re.findall(r"^```sql\n(.*?)^```", (ROOT / "docs" / "parquet.md").read_text(), re.MULTILINE | re.DOTALL)
    queries = [query.strip() for block in blocks for query in block.split(";") if query.strip()]
    assert len(queries) >= 3
    with duckdb.connect() as connection:
        for query in queries:
            assert connection.execute(query).fetchall(), query
