"""Calibration files: the same numbers from every kind of file, and a clear word for everything that is wrong in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arrowquant_gpu.diffusion import calibration
from arrowquant_gpu.diffusion.calibration import Extremes, read_calibration
from arrowquant_gpu.errors import InputError, SourceError

from .diffusion_models import KINDS, channel_rows, range_rows, write_calibration

NAMES = ("a.weight", "b.weight", "c")
ROW = {"layer": "a", "timestep": 0, "min": -1.0, "max": 2.0}


def row(**columns: Any) -> dict[str, Any]:
    return {**ROW, **columns}


def samples(values: Any, **columns: Any) -> dict[str, Any]:
    return {"layer": "a", "timestep": 0, "samples": values, **columns}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["layer", "tensor"])
def test_min_and_max_of_every_kind(tmp_path: Path, kind: str, name: str) -> None:
    rows = range_rows(["a" if name == "layer" else "a.weight", "c"])
    found = read_calibration(write_calibration(tmp_path / f"c.{kind}", rows), NAMES)
    assert found.unknown == ()
    assert found.n_timesteps == 1 + max(r["timestep"] for r in rows)
    assert set(found.layers) == {"a.weight", "c"}
    for layer, activations in found.layers.items():
        own = [r for r in rows if r["layer"].removesuffix(".weight") == layer.removesuffix(".weight")]
        assert activations.steps == {r["timestep"]: Extremes(r["min"], r["max"], 1) for r in own}
        assert activations.whole == (min(r["min"] for r in own), max(r["max"] for r in own), len(own))
        assert activations.absmax is activations.mean is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 100])
def test_the_first_samples_of_every_kind(tmp_path: Path, kind: str, n: int) -> None:
    """Two rows for a layer and time step are one, and the limit is for both."""
    rows = channel_rows({"a": 5, "b": 3})
    rows += [{**r, "samples": [[9.0] * len(r["samples"][0])] * 2} for r in rows if r["layer"] == "a"]
    found = read_calibration(write_calibration(tmp_path / f"c.{kind}", rows), NAMES, n_samples=n)
    for layer in ("a", "b"):
        by_step: dict[int, list[list[float]]] = {}
        for r in rows:
            if r["layer"] == layer:
                by_step.setdefault(r["timestep"], []).extend(r["samples"])
        used = {step: np.array(values[:n], np.float32) for step, values in by_step.items()}
        activations = found.layers[f"{layer}.weight"]
        assert activations.steps == {step: Extremes(float(x.min()), float(x.max()), len(x)) for step, x in used.items()}
        together = np.concatenate(list(used.values()))
        assert activations.absmax is not None
        assert np.array_equal(activations.absmax, np.abs(together).max(axis=0))
        np.testing.assert_allclose(activations.mean, together.astype(np.float64).mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_without_channels(tmp_path: Path, kind: str) -> None:
    rows = [samples([3.0, -4.0, 5.0]), samples([-1.0, 70.0]), samples([0.5], timestep=4)]
    found = read_calibration(write_calibration(tmp_path / f"c.{kind}", rows), NAMES, n_samples=4)
    activations = found.layers["a.weight"]
    assert activations.steps == {0: Extremes(-4.0, 5.0, 4), 4: Extremes(0.5, 0.5, 1)}
    assert activations.absmax is activations.mean is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_of_each_channel_may_be_given(tmp_path: Path, kind: str) -> None:
    rows = [row(channel_absmax=[1.0, 0.0, 3.0]), row(channel_absmax=[0.5, 2.0, 1.0], timestep=1)]
    activations = read_calibration(write_calibration(tmp_path / f"c.{kind}", rows), NAMES).layers["a.weight"]
    assert activations.absmax is not None
    assert activations.absmax.tolist() == [1.0, 2.0, 3.0]
    assert activations.mean is None


def test_arrow_types_that_mean_the_same(tmp_path: Path) -> None:
    values = [[[1.0, -2.0], [3.0, 4.0]], [[0.0, 0.5], [0.25, -8.0]]]
    halves = [[list(np.float16(row)) for row in sample] for sample in values]
    for inner in (pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float16(), 2)):
        for outer in (pa.list_(inner), pa.large_list(inner), pa.list_(inner, 2)):
            table = pa.table(
                {
                    "note": ["not", "read"],
                    "layer": pa.array(["a", "a"]).dictionary_encode(),
                    "timestep": pa.array([0, 3], pa.uint8()),
                    "samples": pa.array(halves, pa.list_(pa.list_(pa.float16()))).cast(outer),
                }
            )
            pq.write_table(table, tmp_path / "c.parquet")
            for sliced in (table, table.slice(0, 2)):
                with pa.ipc.new_file(str(tmp_path / "c.arrow"), sliced.schema) as writer:
                    writer.write_table(sliced)
                for name in ("c.parquet", "c.arrow"):
                    activations = read_calibration(tmp_path / name, NAMES).layers["a.weight"]
                    assert activations.absmax is not None
                    assert activations.absmax.tolist() == [3.0, 8.0]
                    assert activations.whole == (-8.0, 4.0, 4)


def test_layers_that_no_tensor_has_are_listed(tmp_path: Path) -> None:
    path = write_calibration(tmp_path / "c.jsonl", [row(layer="x"), ROW, row(layer="y"), row(layer="x")])
    assert read_calibration(path, NAMES).unknown == ("x", "y")
    path = write_calibration(tmp_path / "c.jsonl", [row(layer="x")])
    with pytest.raises(InputError, match=r"none of its layers .* like x, the tensors like a\.weight, b\.weight, c\."):
        read_calibration(path, NAMES)


HOSTILE: list[tuple[str, list[dict[str, Any]], str]] = [
    ("nan", [ROW, row(min=float("nan"))], r"layer a: min and max: nan is not a finite float32"),
    ("infinite", [row(max=float("inf"))], "inf is not a finite"),
    ("beyond float32", [row(max=1e39)], r"1e\+39 is not a finite"),
    ("nan sample", [samples([1.0, float("nan")])], "samples: nan"),
    ("infinite channel", [row(channel_absmax=[float("inf")])], "channel_absmax: inf"),
    ("min over max", [row(min=3.0)], r"min 3\.0 is over max 2\.0"),
    ("negative step", [row(timestep=-1)], "timestep -1: it must be at least 0 and less than 10"),
    ("step beyond", [row(timestep=10)], r"timestep 10: .* less than 10 \(--timesteps\)"),
    ("fractional step", [row(timestep=1.5)], r"timestep 1\.5 is not an integer"),
    ("no step", [row(timestep=None)], "timestep is missing"),
    ("no layer", [row(layer=None)], "layer is missing"),
    ("no max", [row(max=None)], "one of min and max without the other"),
    ("nothing", [row(min=None, max=None, samples=None)], "neither min and max nor samples"),
    ("other channels", [samples([[1.0, 2.0]]), samples([[1.0]])], "1 channels, an earlier row of this layer 2"),
    ("ragged", [samples([[1.0, 2.0], [3.0]])], "samples: not numbers"),
    ("empty samples", [samples([1.0]), samples([])], r"samples of shape \[0\]"),
    ("negative absmax", [row(channel_absmax=[-1.0])], "none of them negative"),
    ("null sample", [samples([1.0, None])], "samples: "),
    ("null samples of channels", [samples([[1.0], None])], "samples: "),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "match"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_what_is_wrong_is_named(tmp_path: Path, kind: str, rows: list[dict[str, Any]], match: str) -> None:
    path = write_calibration(tmp_path / f"c.{kind}", rows)
    with pytest.raises(InputError, match=match) as caught:
        read_calibration(path, NAMES, n_timesteps=10)
    where = "line" if kind == "jsonl" else "row"
    assert str(caught.value).startswith(f"{path}, {where} ")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "it has no rows"),
        ("\n  \n", "it has no rows"),
        (json.dumps(ROW) + "\n{broken", "line 2: not JSON"),
        (json.dumps(ROW) + "\n[1, 2]\n", "line 2: not an object"),
        ("7", "line 1: not an object"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"layer": "a", "timestep": true, "min": 0, "max": 1}', "timestep True is not an integer"),
        ('{"layer": 7, "timestep": 0, "min": 0, "max": 1}', "layer 7 is not a name"),
        ('{"layer": "a", "timestep": 0, "min": "0", "max": "1"}', "min and max: not numbers"),
        ('{"layer": "a", "timestep": 0, "samples": ["1"]}', "samples: not numbers"),
        ('{"layer": "a", "timestep": 0, "samples": 1}', r"samples of shape \[\]"),
        ('{"layer": "a", "timestep": 0, "samples": {"a": 1}}', "samples: not numbers"),
        ('{"layer": "a", "timestep": 0, "samples": [[[1]]]}', r"samples of shape \[1, 1, 1\]"),
        ('{"layer": "a", "timestep": 0, "min": 0, "max": 1' + "0" * 400 + "}", "min and max: not numbers"),
        ('{"layer": "a", "timestep": 0, "min": 0, "max": 1, "channel_absmax": [[1]]}', "channel_absmax: one number"),
    ],
)
def test_lines_that_are_no_rows(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(InputError, match=match):
        read_calibration(tmp_path / "c.jsonl", NAMES)


def test_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_LINE", 100)
    path = write_calibration(tmp_path / "c.jsonl", [ROW, samples([0.25] * 50)])
    with pytest.raises(InputError, match="line 2: longer than 100 bytes"):
        read_calibration(path, NAMES)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(
    ("missing", "match"), [("layer", "no column layer"), ("timestep", "no column timestep"), ("max", "neither min")]
)
def test_columns_that_are_missing(tmp_path: Path, kind: str, missing: str, match: str) -> None:
    path = write_calibration(tmp_path / f"c.{kind}", [{k: v for k, v in ROW.items() if k != missing}])
    with pytest.raises(InputError, match=rf"{match}.*its columns are "):
        read_calibration(path, NAMES)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_files_that_are_cut_or_damaged(tmp_path: Path, kind: str) -> None:
    """At every length, and with a byte changed at every place: read, or refused with a typed error."""
    path = write_calibration(tmp_path / f"c.{kind}", channel_rows({"a": 3})[:2])
    data = path.read_bytes()
    n_refused = 0
    for i in range(0, len(data), 7):
        for text in (data[:i], data[:i] + bytes([data[i] ^ 0x55]) + data[i + 1 :]):
            path.write_bytes(text)
            try:
                read_calibration(path, NAMES)
            except (InputError, SourceError) as e:
                n_refused += str(path) in str(e)
    assert n_refused > len(data) // 7


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.jsonl: cannot be read"):
        read_calibration(tmp_path / "none.jsonl", NAMES)


@pytest.mark.parametrize("options", [{"n_samples": 0}, {"n_timesteps": 0}])
def test_numbers_that_make_no_sense(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        read_calibration(write_calibration(tmp_path / "c.jsonl", [ROW]), NAMES, **options)


def test_rows_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a Parquet file is cut into row groups."""
    asked = []
    real = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, batch_size: int, **options: Any) -> Any:
        for batch in real(self, batch_size, **options):
            asked.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    path = write_calibration(tmp_path / "c.parquet", [row(timestep=i) for i in range(100)])
    assert len(read_calibration(path, NAMES).layers["a.weight"].steps) == 100
    assert sum(asked) == 100
    assert max(asked) <= calibration.BATCH_ROWS
