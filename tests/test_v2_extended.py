"""The columns of a quantized model: that each is covered by the hash, and those of diffusion models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats import Diffusion, v2_extended
from arrowquant_gpu.formats import pieces as cutting
from arrowquant_gpu.formats.diffusion_columns import Smoothing, Spatial, to_json
from arrowquant_gpu.formats.quantized import open_quantized

from . import test_arrow_ipc, test_parquet
from .row_files import Model, RowFileTests, Rows, assert_holds, put, read_all, small_model

FORMATS = (test_parquet.TestParquet(), test_arrow_ipc.TestArrowIpc())
FIVE = ("is_diffusion_model", "modality", "time_aware_quant_json", "spatial_quant_json", "activation_stats_json")
# XXH3-128 of the hashes of all rows of `small_model`, one after the other.
HASHES = "52d16b9dac1e5a7829570d014a27868e"


def divided(x: np.ndarray, seed: int) -> tuple[np.ndarray, Diffusion]:
    """Weights with their columns divided, and what is to be said of them."""
    divisors = np.random.default_rng(seed).lognormal(size=x.shape[-1]).astype(np.float32)
    mean = np.linspace(-1, 1, x.shape[-1], dtype=np.float32)
    spatial = to_json(Spatial(divisors, Smoothing(0.5, mean)))
    return x / divisors, Diffusion("image", divisors, None, spatial, '{"min": -1.5, "max": 2.0, "n": 32}')


def diffusion_model() -> Model:
    """Equalized in several rows, time-aware, of known modality alone, and one of which nothing is known."""
    rng, model = np.random.default_rng(6), Model()
    x, known = divided(rng.standard_normal((40, 100), np.float32), 1)
    model.quantized("a.weight", x, "int4_g32_asym", known=known)
    # Longer than a page that is kept whole, and beyond ASCII.
    time_aware = json.dumps([{"t_start": i, "scale": 0.1 * i, "note": "\u00e4 \u2713"} for i in range(300)])
    model.quantized("b.weight", x[:30, :64], "int3_g16_bf16", "bfloat16", Diffusion("text", None, time_aware))
    x, known = divided(rng.standard_normal((2, 8, 900), np.float32), 2)
    model.quantized("c.weight", x, "int8_tensor_asym", known=known)
    model.copied("norm", rng.standard_normal(500, np.float32), (500,), "float32", Diffusion("audio"))
    model.copied("bias", np.zeros(8, np.float16), (8,), "float16")
    return model


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "PIECE_BYTES", 5600)


@pytest.fixture(params=FORMATS, ids=lambda tests: tests.suffix[1:])
def tests(request: pytest.FixtureRequest) -> RowFileTests:
    return request.param


_WRITTEN: dict[str, bytes] = {}


@pytest.fixture
def file(tests: RowFileTests, tmp_path: Path) -> Path:
    path = tmp_path / f"m{tests.suffix}"
    if tests.suffix not in _WRITTEN:
        _WRITTEN[tests.suffix] = tests.write(path, diffusion_model()).read_bytes()
    path.write_bytes(_WRITTEN[tests.suffix])
    return path


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_diffusion_model_comes_back(tests: RowFileTests, tmp_path: Path, compression: str | None) -> None:
    for seed in range(2):
        path = tests.write(tmp_path / f"{seed}{tests.suffix}", diffusion_model(), compression=compression, seed=seed)
        assert_holds(path, diffusion_model())
        tests.assert_as_in_order(path, diffusion_model(), compression)


def test_every_row_says_it_in_plain_arrow(tests: RowFileTests, file: Path) -> None:
    schema, batches = tests.read_batches(file)
    assert schema.names[-7:] == ["reason", *FIVE, "xxh3_128"]
    rows = pa.Table.from_batches(batches).to_pylist()
    spatial = {
        json.dumps(json.loads(r["spatial_quant_json"])["divisors"]) for r in rows if r["layer_name"] == "a.weight"
    }
    assert len([r for r in rows if r["layer_name"] == "a.weight"]) == 3
    (divisors,) = spatial
    want = diffusion_model().entries[0].diffusion
    np.testing.assert_array_equal(np.array(json.loads(divisors), np.float32), want.divisors)
    known = {r["layer_name"]: (r["is_diffusion_model"], r["modality"]) for r in rows}
    assert known == {
        "a.weight": (True, "image"),
        "b.weight": (True, "text"),
        "c.weight": (True, "image"),
        "norm": (True, "audio"),
        "bias": (None, None),
    }


def test_files_of_other_models_are_as_they_were(tests: RowFileTests, tmp_path: Path) -> None:
    """Their columns, and the hashes of their rows, which are of all other columns."""
    schema, batches = tests.read_batches(tests.write(tmp_path / f"m{tests.suffix}", small_model()))
    assert schema.names == [
        *("layer_name", "shape", "dtype", "data", "num_params", "quant_type", "scales", "zero_points", "quant_axis"),
        *("group_size", "bit_width", "scheme", "chunk", "n_chunks", "row_offset", "reason", "xxh3_128"),
    ]
    hashes = "\n".join(b["xxh3_128"][0].as_py() for b in batches)
    assert xxhash.xxh3_128_hexdigest(hashes.encode()) == HASHES


def flipped(value: Any, kind: pa.DataType) -> Any:
    """The value with one bit changed; a value where there is none."""
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        items = value or [None]
        return [flipped(items[0], kind.value_type), *items[1:]]
    if pa.types.is_boolean(kind):
        return not value
    if pa.types.is_integer(kind):
        return (value or 0) ^ 1
    if pa.types.is_floating(kind):
        return float((np.array(value or 0, np.float32).view(np.uint32) ^ 1).view(np.float32))
    if pa.types.is_large_binary(kind):
        return bytes([*value[:-1], value[-1] ^ 1])
    return chr(ord(value[0]) ^ 1) + value[1:] if value else "x"


@pytest.mark.parametrize("column", v2_extended.columns_of(diffusion_model().entries).names)
@pytest.mark.parametrize("i", [0, 1, -2, -1], ids=["first part", "second part", "kept", "nothing known"])
def test_a_flipped_bit_in_any_column_is_found(tests: RowFileTests, file: Path, column: str, i: int) -> None:
    def change(rows: Rows) -> None:
        before = rows[i][column]
        rows[i][column] = flipped(before, tests.read_batches(file)[0].field(column).type)
        assert rows[i][column] != before

    tests.rewrite(file, change)
    with pytest.raises(SourceError) as e:
        read_all(file)
    assert str(file) in str(e.value)


def test_a_file_that_is_only_rewritten_is_whole(tests: RowFileTests, file: Path) -> None:
    """So that what the tests above find is what they changed."""
    tests.rewrite(file, lambda rows: None)
    assert_holds(file, diffusion_model())


def said(name: str, **cells: Any) -> Callable[[Rows], None]:
    """A fault: all rows of a tensor say something else."""

    def change(rows: Rows) -> None:
        for row in rows:
            if row["layer_name"] == name:
                row.update(cells)

    return change


def spatial_of(n: int, first: float = 1.0) -> str:
    return to_json(Spatial(np.array([first, *[1.0] * (n - 1)], np.float32)))


FAULTS: tuple[tuple[str, Callable[[Rows], Any], str], ...] = (
    ("not a diffusion model", said("a.weight", is_diffusion_model=False), "is_diffusion_model is false and modality"),
    ("nothing is known", said("norm", is_diffusion_model=None), "is_diffusion_model is null and modality is not null"),
    (
        "no modality",
        said("norm", modality=None),
        "tensor norm: row 20: is_diffusion_model is true and modality is null",
    ),
    ("few divisors", said("a.weight", spatial_quant_json=spatial_of(99)), "99 divisors for 100 columns"),
    ("divisors of what was kept", said("norm", spatial_quant_json=spatial_of(500)), "the tensor is not quantized"),
    ("a divisor of 0", said("a.weight", spatial_quant_json=spatial_of(100, 0.0)), "tensor a.weight: row 0: spatial"),
    ("no JSON", said("a.weight", spatial_quant_json="{"), "tensor a.weight: row 0: spatial_quant_json"),
    (
        "one part says another",
        put("modality", "audio", 1),
        "row 1 differs from the first one of this tensor in modality",
    ),
    (
        "one part says less",
        put("spatial_quant_json", None, 2),
        "row 2 differs from the first one of this tensor in spa",
    ),
)


@pytest.mark.parametrize(("fault", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_contradiction_is_found(tests: RowFileTests, file: Path, fault: Callable[[Rows], Any], message: str) -> None:
    """With hashes that fit."""
    tests.rewrite(file, lambda rows: None, rehash=True)
    assert_holds(file, diffusion_model())
    tests.rewrite(file, fault, rehash=True)
    with pytest.raises(SourceError) as e:
        read_all(file)
    assert message in str(e.value)
    assert str(file) in str(e.value)


def test_false_says_as_little_as_null(tests: RowFileTests, file: Path) -> None:
    tests.rewrite(file, said("bias", is_diffusion_model=False), rehash=True)
    assert_holds(file, diffusion_model())


@pytest.mark.parametrize("gone", [FIVE[:1], FIVE[1:2], FIVE[3:], FIVE])
def test_columns_that_were_dropped_are_missed(tests: RowFileTests, file: Path, gone: tuple[str, ...]) -> None:
    schema, batches = tests.read_batches(file)
    fewer = pa.schema([f for f in schema if f.name not in gone], schema.metadata)
    tests.write_batches(file, fewer, [b.drop_columns(list(gone)) for b in batches])
    message = "row 0 is damaged" if gone == FIVE else f"there is no column {gone[0]}"
    with pytest.raises(SourceError, match=message):
        read_all(file)


def test_a_column_of_another_type_is_refused(tests: RowFileTests, file: Path) -> None:
    schema, batches = tests.read_batches(file)
    changed = schema.set(schema.get_field_index("is_diffusion_model"), pa.field("is_diffusion_model", pa.string()))
    tests.write_batches(file, changed, [b.cast(changed) for b in batches])
    with pytest.raises(SourceError, match="there is no column is_diffusion_model of bool"):
        open_quantized(file)


@pytest.mark.parametrize("spatial", [None, spatial_of(4, 2.0), spatial_of(3)])
def test_divisors_that_the_file_would_lose_are_refused(
    tests: RowFileTests, tmp_path: Path, spatial: str | None
) -> None:
    model = Model()
    model.quantized(
        "w", np.ones((2, 4), np.float32), "int4_g4", known=Diffusion("image", np.ones(4, "f4"), None, spatial)
    )
    with pytest.raises(FormatError, match="w: its divisors are not those in its spatial_quant_json"):
        tests.write(tmp_path / f"m{tests.suffix}", model)
