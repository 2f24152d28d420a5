"""The page on ArrowQuantV2: its code gives the reference's bytes, what it calls refused is, and its script runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from arrowquant_gpu import ArrowQuantV2, numpy_to_arrow_table
from arrowquant_gpu.errors import InputError
from arrowquant_gpu.formats.quantized import open_quantized

from .fixtures import write_safetensors
from .test_v2 import check_layer, check_table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "arrowquant_v2.md"
SCRIPT = ROOT / "docs" / "examples" / "quantize_from_safetensors.py"
SCHEME = "int4_g128_asym"


def blocks() -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in found if ">>>" not in block]


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: str) -> dict[str, Any]:
    """Names after the blocks of the page up to the one that has `until`."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in blocks():
        exec(block, namespace)
        if until in block:
            return namespace
    raise AssertionError(f"{until!r} is in no block of the page")


def test_the_table_of_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(tmp_path, monkeypatch, "weights_data")
    data = names["weights_data"]
    for row, values in zip(names["result_table"].to_pylist(), data["weights"], strict=True):
        check_layer(row, np.array(values, np.float64), SCHEME)
    assert capsys.readouterr().out == "layer.0.weight: 500000 bytes\nlayer.1.weight: 500000 bytes\n"


def test_the_dict_of_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(tmp_path, monkeypatch, "def progress_callback")
    for name, x in names["weights"].items():
        check_layer(names["results"][name], x, SCHEME)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:] == [
        "layer.0.weight: 500000 bytes",
        "layer.1.weight: 500000 bytes",
        "Processing layer.0.weight: 50.0%",
        "Processing layer.1.weight: 100.0%",
    ]


def test_lists_and_what_replaces_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(tmp_path, monkeypatch, "weights_list")
    check_layer(names["result"]["layer.0.weight"], names["weights"], SCHEME)
    names = run(tmp_path, monkeypatch, "results = quantizer.quantize_batch(weights_dict")
    for name, x in names["weights_dict"].items():
        check_layer(names["results"][name], x, SCHEME)
    names = run(tmp_path, monkeypatch, "[w.tolist() for w in weights.values()]")
    weights = {name: x.astype(np.float64) for name, x in names["weights"].items()}
    check_table(names["result_table"], weights, SCHEME)


def test_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"np": np}
    monkeypatch.chdir(tmp_path)
    for block in blocks():
        if "safetensors" in block and "async" not in block:
            exec(block, namespace)
    result = namespace["result"]
    assert result["quantized_path"] == "model_int2/"
    assert {e.scheme.id for e in open_quantized("model_int2").entries.values() if e.scheme} == {"int2_g128_asym"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"Compression: {result['compression_ratio']:.2f}x",
        f"Accuracy: {result['cosine_similarity']:.4f}",
    ]


# --- What pyarrow refuses --------------------------------------------------------------------------------------------


def refusals() -> list[tuple[str, str]]:
    return re.findall(r"^\| `(pa\..*?)`.*? \| `(.*?)`", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("i", range(3))
def test_pyarrow_refuses_what_the_page_says(i: int) -> None:
    refused, instead = refusals()[i]
    assert len(refusals()) == 3
    # The third is one of a matrix only.
    vector, matrix = np.arange(4, dtype=np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)
    for w in (matrix,) if i == 2 else (vector, matrix):
        names = {"pa": pa, "np": np, "w": w, "name": "w", "numpy_to_arrow_table": numpy_to_arrow_table}
        with pytest.raises((pa.ArrowInvalid, pa.ArrowNotImplementedError)):
            eval(refused, names)
    replaced = eval(instead, names)
    table = replaced if i else pa.table({"layer_name": ["w"], "weights": pa.array([replaced.to_pylist()])})
    [row] = ArrowQuantV2(device="cpu").quantize_arrow(table).to_pylist()
    want = matrix if i else matrix.astype(np.float64)
    check_layer(row, want, SCHEME)


def test_a_placeholder_is_no_array() -> None:
    with pytest.raises(InputError, match=r"layer\.0: dtype object"):
        ArrowQuantV2(device="cpu").quantize_batch({"layer.0": np.array(...)})


# --- The script ------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    tensors = {f"blocks.{i}.mlp.weight": rng.standard_normal((64, 512), np.float32) for i in range(3)}
    return write_safetensors(tmp_path / "model.safetensors", tensors)


def script(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})


def test_the_script_quantizes_and_validates(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = ["--bit-width", 2, "--profile", "edge", "--validate", "--modality", "image", "--device", "cpu"]
    done = script("--input", model, "--output", output, *options)
    assert done.returncode == 0, done.stderr
    for line in ("3 tensors in 1 file", "100 %", "modality: image", "bit_width: 2", "validated: passed", "note: image"):
        assert line in done.stdout
    found = open_quantized(output)
    assert {e.scheme.id for e in found.entries.values() if e.scheme} == {"int2_g256_asym"}
    again = script("--input", model, "--output", output)
    assert (again.returncode, "exists" in again.stderr) == (6, True)


def test_the_script_takes_the_width_of_the_profile(model: Path, tmp_path: Path) -> None:
    done = script("--input", model, "--output", tmp_path / "o.parquet", "--profile", "cloud")
    assert done.returncode == 0, done.stderr
    assert {e.scheme.id for e in open_quantized(tmp_path / "o.parquet").entries.values() if e.scheme} == {
        "int8_g64_asym"
    }


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--input", "gone.safetensors"], 5, "gone.safetensors: no such file"),
        (["--bit-width", "7"], 2, "7 bits"),
        (["--modality", "smell"], 3, "modality 'smell'"),
        (["--profile", "cloud", "--bit-width", "2", "--fail-fast"], 10, "cosine"),
    ],
)
def test_errors_of_the_script(model: Path, tmp_path: Path, options: list[str], code: int, message: str) -> None:
    done = script("--input", model, "--output", tmp_path / "out", *options)
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    assert not (tmp_path / "out").exists()
