"""Diffusion models from end to end: what pyarrow alone reads back is what the formulas of docs/diffusion.md give."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from arrowquant_gpu import dequantize_checkpoint, quantize_checkpoint, verify_checkpoint
from arrowquant_gpu.cli import app
from arrowquant_gpu.diffusion import DiffusionOptions
from arrowquant_gpu.diffusion.prepare import EQUALIZED
from arrowquant_gpu.engine import Sizes
from arrowquant_gpu.engine import decoded as engine_decoded
from arrowquant_gpu.engine.loads import sizes
from arrowquant_gpu.engine.readers import open_reader
from arrowquant_gpu.engine.streamed import StreamedDevice
from arrowquant_gpu.errors import FormatError, InputError, NonFiniteError, TargetError
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats import quantized
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.output import FILES_KEY
from arrowquant_gpu.formats.row_sink import RowSink
from arrowquant_gpu.pipeline import quantize, verify
from arrowquant_gpu.pipeline.widths import Widths

from .diffusion_models import (
    HIDDEN,
    KINDS,
    N_TIMESTEPS,
    channel_rows,
    flux,
    flux_weights,
    llada,
    range_rows,
    write_calibration,
)
from .fixtures import tiny_llama, write_safetensors
from .plain_sink import ANYWHERE
from .resumed_runs import run, run_until
from .simulated_streams import SimulatedStreams
from .snapshots import snapshot

BLOCK = "double_blocks.0.img_attn"
LAYERS = {
    f"{BLOCK}.qkv": HIDDEN,
    f"{BLOCK}.proj.weight": HIDDEN,
    "single_blocks.0.linear1": HIDDEN,
    "double_blocks.0.img_mlp.0": HIDDEN,
    "double_blocks.0.txt_mlp.2": 16,
}
TEXT_LAYERS = tuple(f"model.transformer.blocks.0.{part}" for part in ("q_proj", "attn_out", "ff_out"))


def tensor_of(layer: str) -> str:
    return layer.removesuffix(".weight") + ".weight"


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file of one row per tensor, by plain pyarrow."""
    table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(path).read_all()
    return {row["layer_name"]: row for row in table.to_pylist()}


def decoded(row: dict[str, Any]) -> np.ndarray:
    """Weights of a row of symmetric 8-bit codes, in NumPy alone, in float64."""
    rows, columns = row["shape"]
    codes = np.frombuffer(row["data"], np.uint8).reshape(rows, columns).astype(np.float64) - 128
    scales = np.array(row["scales"]).reshape(rows, -1)
    return codes * np.repeat(scales, -(-columns // scales.shape[1]), axis=1)[:, :columns]


def expected_divisors(weights: np.ndarray, rows: list[dict[str, Any]], layer: str) -> np.ndarray:
    """sqrt(max|W_i| / max|X_i|), one column after the other."""
    samples = np.concatenate([row["samples"] for row in rows if row["layer"] == layer])
    out = []
    for i in range(weights.shape[1]):
        w, x = max(abs(float(v)) for v in weights[:, i]), max(abs(float(v)) for v in samples[:, i])
        out.append(math.sqrt(w / x) if w and x else 1.0)
    return np.array(out)


@pytest.mark.parametrize("kind", KINDS)
def test_spatial_from_calibration_to_recovered_weights(tmp_path: Path, kind: str) -> None:
    rows = channel_rows(LAYERS)
    options = DiffusionOptions(calibration=write_calibration(tmp_path / f"c.{kind}", rows), smoothing=0.25)
    out, source = tmp_path / "out.parquet", flux(tmp_path / "flux")
    result = quantize_checkpoint(
        source, out, "int8_g16", format="parquet", device="cpu", diffusion=options, validate=True
    )
    stored, weights = rows_of(out), flux_weights()
    figures = {row["name"]: row for row in result.table.to_pylist()}
    assert not (tmp_path / "out.parquet.activations.arrow").exists()
    for layer in LAYERS:
        name = tensor_of(layer)
        row, original = stored[name], weights[name].astype(np.float64)
        assert row["is_diffusion_model"] is True
        assert row["modality"] == "image"
        assert row["time_aware_quant_json"] is None
        spatial = json.loads(row["spatial_quant_json"])
        divisors = np.array(spatial["divisors"])
        want = expected_divisors(weights[name], rows, layer)
        # Rounded to float32 once, and exactly that.
        assert np.array_equal(divisors.astype(np.float32), want.astype(np.float32))
        samples = np.concatenate([r["samples"] for r in rows if r["layer"] == layer])
        assert spatial["smoothing"]["alpha"] == 0.25
        np.testing.assert_allclose(spatial["smoothing"]["mean"], samples.mean(axis=0), rtol=1e-6, atol=1e-9)
        stats = json.loads(row["activation_stats_json"])
        assert (np.float32(stats["min"]), np.float32(stats["max"])) == (samples.min(), samples.max())
        assert stats["n"] == len(samples)
        # W = W_q * s, within half a step of the divided weights.
        recovered = decoded(row) * divisors
        steps = np.repeat(np.array(row["scales"]).reshape(len(original), -1), 16, axis=1)[:, : original.shape[1]]
        assert (np.abs(recovered - original) <= 0.501 * steps * divisors).all()
        cosine = (recovered * original).sum() / np.linalg.norm(recovered) / np.linalg.norm(original)
        assert figures[name]["cosine"] == pytest.approx(cosine, abs=1e-6)
        assert figures[name]["max_error"] == pytest.approx(np.abs(recovered - original).max(), rel=1e-4)
        assert figures[name]["reason"] == "linear weight; columns equalized by calibration"
    # It has no calibration, and says so.
    other = stored["double_blocks.0.img_mod.lin.weight"]
    assert json.loads(other["spatial_quant_json"])["divisors"] is None
    assert "no calibration data" in json.loads(other["spatial_quant_json"])["reason"]
    assert "no calibration data" in figures["double_blocks.0.img_mod.lin.weight"]["reason"]
    # Copied as it is.
    bias = stored[f"{BLOCK}.qkv.bias"]
    assert (bias["modality"], bias["spatial_quant_json"]) == ("image", None)
    metadata = pq.read_schema(tmp_path / "out.parquet.manifest.parquet").metadata
    assert metadata[b"arrowquant.modality"] == b"image"
    assert b"FluxTransformer2DModel" in metadata[b"arrowquant.modality_from"]


def test_equalizing_makes_the_error_smaller_where_activations_are_large(tmp_path: Path) -> None:
    """What it is for: the error of W x, on columns and channels of very different size."""
    rows = channel_rows(LAYERS)
    calibration = write_calibration(tmp_path / "c.parquet", rows)
    source = flux(tmp_path / "flux")
    name, layer = f"{BLOCK}.proj.weight", f"{BLOCK}.proj.weight"
    x = np.concatenate([r["samples"] for r in rows if r["layer"] == layer]).T
    original = flux_weights()[name].astype(np.float64)
    errors = []
    for options in (DiffusionOptions(), DiffusionOptions(calibration=calibration)):
        out = tmp_path / f"{len(errors)}.parquet"
        quantize_checkpoint(source, out, "int8_channel", format="parquet", device="cpu", diffusion=options)
        row = rows_of(out)[name]
        divisors = json.loads(row["spatial_quant_json"])["divisors"]
        weights = decoded(row) * (np.ones(HIDDEN) if divisors is None else np.array(divisors))
        errors.append(np.linalg.norm((weights - original) @ x))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_time_aware_from_calibration_to_activation_parameters(tmp_path: Path, kind: str) -> None:
    rows = range_rows(TEXT_LAYERS)
    n_groups = 6
    options = DiffusionOptions(
        calibration=write_calibration(tmp_path / f"c.{kind}", rows), n_timesteps=N_TIMESTEPS, time_groups=n_groups
    )
    out, plain = tmp_path / "out.arrow", tmp_path / "plain.arrow"
    source = llada(tmp_path / "llada")
    quantize_checkpoint(source, out, "int8_g16", format="arrow", device="cpu", diffusion=options)
    table = pa.ipc.open_file(tmp_path / "out.arrow.activations.arrow").read_all()
    stored = rows_of(out)
    assert table.num_rows == len(TEXT_LAYERS) * n_groups
    assert table.schema.metadata[b"arrowquant.modality"] == b"text"
    by_layer: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        by_layer.setdefault(row["layer"], []).append(row)
    assert set(by_layer) == {tensor_of(layer) for layer in TEXT_LAYERS}
    for layer in TEXT_LAYERS:
        for i, group in enumerate(by_layer[tensor_of(layer)]):
            start, end = i * N_TIMESTEPS // n_groups, (i + 1) * N_TIMESTEPS // n_groups
            assert (group["group"], group["t_start"], group["t_end"], group["bit_width"]) == (i, start, end, 8)
            inside = [r for r in rows if r["layer"] == layer and start <= r["timestep"] < end]
            if not inside:
                assert [group[k] for k in ("min", "max", "scale", "zero_point")] == [None] * 4
                continue
            low, high = min(r["min"] for r in inside), max(r["max"] for r in inside)
            assert (group["min"], group["max"]) == (low, high)
            lowest, highest = np.float32(min(low, 0)), np.float32(max(high, 0))
            scale = (highest - lowest) / np.float32(255)
            assert np.float32(group["scale"]) == scale
            assert group["zero_point"] == min(255, max(0, round(-lowest / scale - np.float32(128)) + 128))
        row = stored[tensor_of(layer)]
        said = json.loads(row["time_aware_quant_json"])
        assert said["n_timesteps"] == N_TIMESTEPS
        for group, of_table in zip(said["groups"], by_layer[tensor_of(layer)], strict=True):
            floats = {k: np.float32(group[k]) for k in ("min", "max", "scale") if group[k] is not None}
            assert {**group, **floats} == {k: v for k, v in of_table.items() if k != "layer"}
        assert row["spatial_quant_json"] is None
        own = [r for r in rows if r["layer"] == layer]
        stats = json.loads(row["activation_stats_json"])
        assert np.float32(stats["min"]) == min(r["min"] for r in own)
        assert (np.float32(stats["max"]), stats["n"]) == (max(r["max"] for r in own), len(own))
    # Time steps have no part in the weights: codes and scales are those of a run that knows of none.
    quantize_checkpoint(source, plain, "int8_g16", format="arrow", device="cpu")
    assert {k: (v["data"], v["scales"]) for k, v in stored.items()} == {
        k: (v["data"], v["scales"]) for k, v in rows_of(plain).items()
    }
    without = rows_of(plain)[tensor_of(TEXT_LAYERS[0])]
    assert (without["modality"], without["time_aware_quant_json"]) == ("text", None)


@contextlib.contextmanager
def simulated(names: Any, source: Any, pieces: Any, **_: Any) -> Iterator[list[StreamedDevice]]:
    """`open_devices`, with a simulated device in place of the ones that are asked for."""
    smallest = Sizes(*(max(column) for column in zip(*map(sizes, pieces), strict=True)))
    reader = open_reader("buffered", source)
    ring = StreamedDevice(SimulatedStreams(delay=0.0003), reader, smallest, 1 << 16, 3)
    try:
        yield [ring]
    finally:
        ring.close()
        reader.close()


@pytest.mark.parametrize(
    ("scheme", "piece_bytes"),
    [("int4_g16", None), ("int8_tensor_asym", 2048), ("int2_channel_bf16", 512), ("int4_g16_asym", 64)],
)
def test_every_device_gives_the_same_bytes(
    tmp_path: Path, scheme: str, piece_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tensors, rows and parts of rows, each of which takes its columns' divisors."""
    if piece_bytes is not None:
        monkeypatch.setattr(formats_pieces, "PIECE_BYTES", piece_bytes)
        monkeypatch.setattr(RowSink, "pieces", lambda self, entry: formats_pieces.pieces(entry, ANYWHERE))
    options = DiffusionOptions(calibration=write_calibration(tmp_path / "c.parquet", channel_rows(LAYERS)))
    source, files = flux(tmp_path / "flux"), []
    for device in ("reference", "cpu", "simulated"):
        (tmp_path / device).mkdir()
        asked = device
        if device == "simulated":
            monkeypatch.setattr(quantize, "open_devices", simulated)
            asked = "cpu"
        quantize_checkpoint(
            source, tmp_path / device / "out.arrow", scheme, format="arrow", device=asked, diffusion=options
        )
        files.append(snapshot(tmp_path / device))
    assert files[0] == files[1]
    assert files[0] == files[2]


def test_pieces_change_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes of a tensor in one piece are those of its rows in many, with the same divisors."""
    options = DiffusionOptions(calibration=write_calibration(tmp_path / "c.parquet", channel_rows(LAYERS)))
    source, codes = flux(tmp_path / "flux"), []
    for piece_bytes in (None, 480):
        if piece_bytes is not None:
            monkeypatch.setattr(formats_pieces, "PIECE_BYTES", piece_bytes)
        out = tmp_path / f"{piece_bytes}.parquet"
        quantize_checkpoint(source, out, "int8_g16", format="parquet", device="cpu", diffusion=options)
        data: dict[str, bytes] = {}
        for row in pq.read_table(out).to_pylist():
            data[row["layer_name"]] = data.get(row["layer_name"], b"") + row["data"]
        codes.append(data)
    assert codes[0] == codes[1]


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize("piece_weights", [None, 24])
def test_dequantize_multiplies_again(
    tmp_path: Path, dtype: str | None, piece_weights: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = DiffusionOptions(calibration=write_calibration(tmp_path / "c.jsonl", channel_rows(LAYERS)))
    out, back = tmp_path / "out.parquet", tmp_path / "back.safetensors"
    quantize_checkpoint(flux(tmp_path / "flux"), out, "int8_g16", format="parquet", device="cpu", diffusion=options)
    if piece_weights is not None:
        # Parts of rows, too.
        small = functools.partial(quantized.pieces, n_weights=piece_weights)
        monkeypatch.setattr(engine_decoded, "pieces", small)
    dequantize_checkpoint(out, back, dtype=dtype, device="cpu")
    found = open_checkpoint(back)
    for layer in LAYERS:
        row = rows_of(out)[tensor_of(layer)]
        divisors = np.array(json.loads(row["spatial_quant_json"])["divisors"], np.float32)
        want = decoded(row).astype(np.float32) * divisors
        tensor = found.view(tensor_of(layer))
        assert tensor.dtype == (dtype or ml_dtypes.bfloat16)
        assert np.array_equal(tensor, want.astype(tensor.dtype))


def test_verify_is_of_the_recovered_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = DiffusionOptions(calibration=write_calibration(tmp_path / "c.jsonl", channel_rows(LAYERS)))
    out, source = tmp_path / "out.parquet", flux(tmp_path / "flux")
    result = quantize_checkpoint(
        source, out, "int8_g16", format="parquet", device="cpu", diffusion=options, validate=True
    )
    report = verify_checkpoint(out, source, device="cpu")
    report.check()
    figures = {row["name"]: row for row in result.table.to_pylist()}
    for found in report.findings:
        assert found.cosine == figures[found.name]["cosine"]
        assert found.max_steps is None or 0 < found.max_steps < 0.51

    # One divisor that is off by 1 % is a weight further off than rounding explains.
    def spoiled(path: Path) -> Any:
        checkpoint = quantized.open_quantized(path)
        entry = checkpoint.entries[f"{BLOCK}.proj.weight"]
        divisors = entry.diffusion.divisors.copy()
        divisors[7] *= 1.01
        diffusion = dataclasses.replace(entry.diffusion, divisors=divisors)
        checkpoint.entries[entry.info.name] = dataclasses.replace(entry, diffusion=diffusion)
        return checkpoint

    monkeypatch.setattr(verify, "open_quantized", spoiled)
    assert verify_checkpoint(out, source, device="cpu").failed == (f"{BLOCK}.proj.weight",)


def test_compressed_tensors_cannot_carry_divisors(tmp_path: Path) -> None:
    calibration = write_calibration(tmp_path / "c.jsonl", channel_rows(LAYERS))
    source, out = flux(tmp_path / "flux"), tmp_path / "out"
    with pytest.raises(FormatError, match=r"(?s)divisors.*c\.jsonl.*--format parquet, parquet-tensors or arrow"):
        quantize_checkpoint(source, out, "int4_g16", device="cpu", diffusion=DiffusionOptions(calibration=calibration))
    assert not out.exists()
    # Without calibration there are none, and the run says so.
    result = quantize_checkpoint(source, out, "int4_g16", device="cpu")
    assert sum("no calibration data: weights are quantized per group" in w for w in result.plan.warnings) == 1


def test_activations_lie_in_a_directory(tmp_path: Path) -> None:
    calibration = write_calibration(tmp_path / "c.jsonl", range_rows(TEXT_LAYERS))
    out = tmp_path / "out"
    options = DiffusionOptions(calibration=calibration, time_groups=4)
    result = quantize_checkpoint(llada(tmp_path / "llada"), out, "int4_g16", device="cpu", diffusion=options)
    assert out / "activations.arrow" in result.files
    table = pa.ipc.open_file(out / "activations.arrow").read_all()
    assert table.num_rows == 4 * len(TEXT_LAYERS)
    assert "activations.arrow" in json.loads(pq.read_schema(out / "arrowquant_manifest.parquet").metadata[FILES_KEY])
    verify_checkpoint(out, tmp_path / "llada", device="cpu").check()
    # It is of the quantized model: float weights need it as little as they did before.
    dequantize_checkpoint(out, tmp_path / "back", device="cpu")
    assert not (tmp_path / "back" / "activations.arrow").exists()
    # The whole directory is this program's own, and may be replaced as such.
    quantize_checkpoint(tmp_path / "llada", out, "int4_g16", device="cpu", overwrite=True)
    assert not (out / "activations.arrow").exists()


def test_activations_beside_a_file_are_replaced_with_it(tmp_path: Path) -> None:
    calibration = write_calibration(tmp_path / "c.jsonl", range_rows(TEXT_LAYERS))
    source, out = llada(tmp_path / "llada"), tmp_path / "out.parquet"
    table = tmp_path / "out.parquet.activations.arrow"
    options: dict[str, Any] = {"format": "parquet", "device": "cpu"}
    table.write_text("mine")
    with pytest.raises(TargetError, match="no manifest lists it"):
        quantize_checkpoint(source, out, "int4_g16", **options)
    assert table.read_text() == "mine"
    table.unlink()
    diffusion = DiffusionOptions(calibration=calibration, time_groups=4)
    result = quantize_checkpoint(source, out, "int4_g16", diffusion=diffusion, **options)
    assert table in result.files
    first = table.read_bytes()
    diffusion = dataclasses.replace(diffusion, time_groups=5)
    quantize_checkpoint(source, out, "int4_g16", diffusion=diffusion, overwrite=True, **options)
    assert table.read_bytes() != first
    quantize_checkpoint(source, out, "int4_g16", overwrite=True, **options)
    assert not table.exists()


def test_a_run_is_not_continued_with_another_calibration(tmp_path: Path) -> None:
    source, out = llada(tmp_path / "llada"), tmp_path / "out.parquet"
    calibrations = [write_calibration(tmp_path / f"{i}.jsonl", range_rows(TEXT_LAYERS, seed=i)) for i in range(2)]
    options: dict[str, Any] = {"scheme": "int4_g16", "format": "parquet"}
    diffusion = [DiffusionOptions(calibration=c, time_groups=4) for c in calibrations]
    with pytest.raises(KeyboardInterrupt):
        run_until(source, out, 3, KeyboardInterrupt(), diffusion=diffusion[0], **options)
    with pytest.raises(TargetError, match="calibration"):
        run(source, out, diffusion=diffusion[1], resume=True, **options)
    resumed = run(source, out, diffusion=diffusion[0], resume=True, **options)
    assert resumed.run.resumed >= 3
    whole = tmp_path / "whole" / "out.parquet"
    whole.parent.mkdir()
    run(source, whole, diffusion=diffusion[0], **options)
    for name in ("out.parquet", "out.parquet.activations.arrow", "out.parquet.manifest.parquet"):
        assert (tmp_path / name).read_bytes() == (whole.parent / name).read_bytes()


def test_a_weight_that_is_not_finite_is_reported_as_ever(tmp_path: Path) -> None:
    weights = {name: w.astype(np.float32) for name, w in flux_weights().items()}
    weights[f"{BLOCK}.proj.weight"][2, 3] = np.nan
    weights[f"{BLOCK}.proj.weight"][4, 3] = np.inf
    source = write_safetensors(tmp_path / "m.safetensors", weights)
    options = DiffusionOptions(calibration=write_calibration(tmp_path / "c.jsonl", channel_rows(LAYERS)))
    with pytest.raises(NonFiniteError, match=f"1 NaN and 1 infinite .* flat index {2 * HIDDEN + 3} "):
        quantize_checkpoint(source, tmp_path / "out.parquet", "int4_g16", device="cpu", diffusion=options)


def test_what_is_no_matrix_is_not_equalized(tmp_path: Path) -> None:
    rows = [{"layer": "x_embedder.proj", "timestep": 0, "samples": [[1.0, 2.0]]}]
    options = DiffusionOptions(calibration=write_calibration(tmp_path / "c.jsonl", [*rows, *channel_rows(LAYERS)]))
    out = tmp_path / "out.parquet"
    include = {"include": ["x_embedder"], "format": "parquet", "device": "cpu"}
    quantize_checkpoint(flux(tmp_path / "flux"), out, "int8_g16", diffusion=options, **include)
    row = rows_of(out)["x_embedder.proj.weight"]
    said = json.loads(row["spatial_quant_json"])
    assert said["divisors"] is None
    assert said["reason"].startswith("not a matrix")
    assert row["quant_type"] == "int8"


def test_a_dry_run_says_what_calibration_does(tmp_path: Path) -> None:
    options = DiffusionOptions(calibration=write_calibration(tmp_path / "c.jsonl", channel_rows(LAYERS)))
    source, out = flux(tmp_path / "flux"), tmp_path / "out.parquet"
    plan = quantize_checkpoint(source, out, "int4_g16", format="parquet", dry_run=True, diffusion=options)
    reasons = {row["name"]: row["reason"] for row in plan.table.to_pylist()}
    assert reasons[f"{BLOCK}.qkv.weight"] == "linear weight; columns equalized by calibration"
    assert ["it has nothing for" in w for w in plan.warnings] == [True]
    assert not out.exists()


def test_widths_are_measured_of_divided_weights(tmp_path: Path) -> None:
    """What decides is the cosine that a run with --validate finds."""
    options = DiffusionOptions(calibration=write_calibration(tmp_path / "c.jsonl", channel_rows(LAYERS)))
    result = quantize_checkpoint(
        flux(tmp_path / "flux"),
        tmp_path / "out.parquet",
        "int2_g16",
        format="parquet",
        device="cpu",
        diffusion=options,
        widths=Widths(min_accuracy=0.9),
        validate=True,
    )
    rows = [row for row in result.table.to_pylist() if row["scheme"]]
    assert all(row["accuracy"] == row["cosine"] for row in rows)
    assert any(row["reason"].endswith(f"; {EQUALIZED}") for row in rows)


def test_an_unknown_modality_is_a_warning_and_changes_nothing(tmp_path: Path) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", {"fc.weight": np.eye(16, dtype=np.float32)})
    plain, asked = (tmp_path / name for name in ("plain.parquet", "asked.parquet"))
    assert quantize_checkpoint(source, plain, "int4_g16", device="cpu").plan.warnings == ()
    result = quantize_checkpoint(source, asked, "int4_g16", device="cpu", diffusion=DiffusionOptions())
    assert ["the modality of m.safetensors is not known" in w for w in result.plan.warnings] == [True]
    assert result.table.schema.metadata[b"arrowquant.modality"] == b"unknown"
    assert pq.read_table(plain).equals(pq.read_table(asked))
    calibration = write_calibration(tmp_path / "c.jsonl", channel_rows({"fc": 16}))
    with pytest.raises(InputError, match="known modality"):
        quantize_checkpoint(source, asked, diffusion=DiffusionOptions(calibration=calibration), overwrite=True)
    # The user's word is enough.
    diffusion = DiffusionOptions(modality="image", calibration=calibration)
    quantize_checkpoint(source, asked, "int4_g16", device="cpu", diffusion=diffusion, overwrite=True)
    assert rows_of(asked)["fc.weight"]["spatial_quant_json"] is not None


def test_a_model_that_is_no_diffusion_model_has_no_such_columns(tmp_path: Path) -> None:
    source, out = tiny_llama(tmp_path / "llama"), tmp_path / "out.parquet"
    result = quantize_checkpoint(source, out, "int4_g16", format="parquet", device="cpu")
    assert "modality" not in pq.read_schema(out).names
    assert b"arrowquant.modality" not in result.table.schema.metadata


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"modality": "video"}, "choose one of text, code, image, audio"),
        ({"time_groups": 0}, "time_groups 0"),
        ({"n_timesteps": -1}, "n_timesteps -1"),
        ({"calibration_samples": 0}, "calibration_samples 0"),
        ({"activation_bits": 7}, "activation_bits 7"),
        ({"smoothing": 1.5}, "smoothing 1.5"),
        ({"smoothing": math.nan}, "smoothing nan"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        DiffusionOptions(**options)


def test_the_command_line(tmp_path: Path) -> None:
    calibration = write_calibration(tmp_path / "c.parquet", range_rows(TEXT_LAYERS))
    source, out = llada(tmp_path / "llada"), tmp_path / "out"
    words = ["quantize", str(source), str(out), "--scheme", "int4_g16", "--device", "cpu", "--quiet"]
    given = ["--calibration", str(calibration), "--timesteps", "30", "--time-groups", "3", "--modality", "code"]
    assert CliRunner().invoke(app, [*words, *given]).exit_code == 0
    table = pa.ipc.open_file(out / "activations.arrow").read_all()
    assert table["t_end"].to_pylist()[:3] == [10, 20, 30]
    assert table.schema.metadata[b"arrowquant.modality"] == b"code"
    refused = CliRunner().invoke(app, [*words, "--time-groups", "3", "--overwrite"])
    assert refused.exit_code == InputError.exit_code
    assert "--calibration" in refused.stderr
    # A profile has time groups of its own.
    given = ["--calibration", str(calibration), "--profile", "edge", "--group-size", "16", "--overwrite"]
    assert CliRunner().invoke(app, [*words[:3], "--device", "cpu", *given]).exit_code == 0
    assert pa.ipc.open_file(out / "activations.arrow").read_all()["group"].to_pylist()[:6] == [0, 1, 2, 3, 4, 0]
