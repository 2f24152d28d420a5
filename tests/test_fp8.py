"""FP8 with a scale for each square of 128 weights: bytes, config, reader, and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu import reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats import Entry, TensorInfo, stored_model
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.fp8 import Fp8Checkpoint, Fp8Sink
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .fixtures import tiny_llama
from .model_files import copied, decoded_by, load, logits, model, quantize, rewrite

RNG = np.random.default_rng(20261123)
SCHEME = Scheme.parse("e4m3_b128")
E4M3 = DTYPES["float8_e4m3fn"].numpy


def by_hand(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, square by square."""
    n, k = weights.shape
    scales = np.zeros((-(-n // 128), -(-k // 128)), np.float32)
    codes = np.zeros((n, k), E4M3)
    for i, j in np.ndindex(scales.shape):
        square = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        x = weights[square].astype(np.float32)
        scales[i, j] = np.abs(x).max() / np.float32(448)
        codes[square] = (x / scales[i, j]).astype(E4M3)
    return codes, scales


@pytest.mark.parametrize("shape", [(128, 128), (200, 256), (5, 384), (300, 200)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_part_by_hand_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 1000)
    weights = RNG.standard_normal(shape, np.float32).astype(DTYPES[dtype].numpy)
    config = {"architectures": ["LlamaModel"], "torch_dtype": "bfloat16"}
    tensors = {"a.weight": weights, "a.bias": weights[:, 0].copy()}
    target = quantize(model(tmp_path / "m", tensors, config), tmp_path / "out", "e4m3_b128", format="fp8")
    codes, scales = by_hand(weights)
    out = load(target)
    assert sorted(out) == ["a.bias", "a.weight", "a.weight_scale_inv"]
    assert_bitwise_equal(out["a.weight"], codes)
    assert_bitwise_equal(out["a.weight_scale_inv"], scales)
    assert_bitwise_equal(out["a.bias"], tensors["a.bias"])

    monkeypatch.setattr(stored_model, "_BLOCK_BYTES", 1000)
    reader = open_quantized(target)
    assert isinstance(reader, Fp8Checkpoint)
    entry = reader.entries["a.weight"]
    assert (entry.info.dtype, entry.info.shape, entry.scheme) == (dtype, shape, SCHEME)
    packed, found, zeros, _ = reference.quantize(weights, SCHEME)
    want = reference.dequantize(packed, found, zeros, SCHEME, shape[1], dtype)
    assert_bitwise_equal(decoded_by(reader, "a.weight", dtype), want)
    assert reader.config == config


def test_config(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", hidden=256)
    config = json.loads((quantize(source, tmp_path / "out", "e4m3_b128", format="fp8") / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    config.pop("arrowquant")
    assert config == json.loads((source / "config.json").read_text())


def sink_of(tmp_path: Path) -> Fp8Sink:
    return Fp8Sink(Output(tmp_path / "out", is_directory=True), {"architectures": ["LlamaForCausalLM"]})


def entry_of(name: str, shape: tuple[int, ...], scheme: Scheme | None = SCHEME) -> Entry:
    return Entry(TensorInfo(name, "bfloat16", shape, Path("m"), 0, 0), scheme, "")


@pytest.mark.parametrize("scheme", ["int4_g128", "e4m3_tensor", "nvfp4"])
def test_other_schemes_are_refused(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(FormatError, match=f"fp8 has e4m3_b128 only, not {scheme}; use that"):
        sink_of(tmp_path).scheme_for(entry_of("a.weight", (128, 128)).info, Scheme.parse(scheme))


@pytest.mark.parametrize("name", ["a.bias", "model.embed_tokens.weight"])
def test_what_is_no_linear_module_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="fp8"):
        sink_of(tmp_path).scheme_for(entry_of(name, (128, 128)).info, SCHEME)


def test_tied_heads_are_listed_by_name(tmp_path: Path) -> None:
    quantization = sink_of(tmp_path).quantization([entry_of("model.layers.0.q.weight", (128, 128))])
    names = quantization["quantization_config"]["modules_to_not_convert"]
    assert "lm_head" in names
    assert not any(name.startswith("re:") for name in names)


@pytest.mark.parametrize(("shape", "n"), [((128, 256), 0), ((192, 128), 2), ((128, 200), 2)])
def test_squares_that_are_not_whole_are_a_warning(tmp_path: Path, shape: tuple[int, int], n: int) -> None:
    found = sink_of(tmp_path).warnings([entry_of("layers.0.q.weight", shape), entry_of("lm_head.weight", (8, 8), None)])
    assert len(found) == n
    assert not found or found[0].startswith("transformers without a GPU takes weights apart")


@pytest.mark.parametrize(
    ("kept", "is_said"),
    [("proj", True), ("layers.0", True), ("layers.0.q", False), ("layers.0.q_proj.x", False), ("q_proj", True)],
)
def test_a_name_that_transformers_finds_in_others_is_a_warning(tmp_path: Path, kept: str, is_said: bool) -> None:
    quantized = entry_of("layers.0.q_proj.weight", (128, 128))
    found = sink_of(tmp_path).warnings([quantized, entry_of(f"{kept}.weight", (8, 8), None)])
    assert [w.startswith("transformers would take 1 modules") for w in found] == [True] * is_said


# Reading.


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    tensors = {"a.weight": RNG.standard_normal((128, 256), np.float32), "norm.weight": np.ones(64, np.float32)}
    return quantize(model(folder / "m", tensors), folder / "out", "e4m3_b128", format="fp8")


def _config(**values: Any) -> Any:
    return lambda t, c: c["quantization_config"].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t.pop("a.weight_scale_inv"), "a.weight is float8_e4m3fn, and a.weight_scale is missing"),
        (lambda t, c: t.update({"a.weight_scale_inv": np.ones((2, 1), np.float32)}), "a.weight_scale_inv is .2, 1."),
        (lambda t, c: t.update({"a.weight_scale_inv": np.ones((1, 2), np.uint8)}), "is uint8; expected one of"),
        (lambda t, c: t.update({"a.weight": np.ones(128, E4M3)}), "a.weight is float8_e4m3fn .128., no matrix"),
        (_config(weight_block_size=[64, 64]), r"weight_block_size .64, 64."),
        (_config(weight_block_size=None), "a.weight_scale_inv is .1, 2.; e4m3_tensor"),
        (_config(quant_method="gptq"), "no quantization_config with quant_method fp8"),
    ],
)
def test_a_broken_checkpoint_is_a_clear_error(written: Path, tmp_path: Path, change: Any, words: str) -> None:
    copy = copied(written, tmp_path / "copy")
    rewrite(copy, lambda t, c: None)
    assert Fp8Checkpoint(copy).entries["a.weight"].scheme == SCHEME
    rewrite(copy, change)
    with pytest.raises(SourceError, match=words):
        Fp8Checkpoint(copy)


def test_one_scale_per_tensor_as_other_writers_have_it(written: Path, tmp_path: Path) -> None:
    copy = copied(written, tmp_path / "copy")

    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        config["quantization_config"].pop("weight_block_size")
        config["torch_dtype"] = "float16"
        tensors.pop("a.weight_scale_inv")
        tensors["a.weight_scale"], tensors["a.input_scale"] = np.full((), 0.5, np.float32), np.ones((), np.float32)

    rewrite(copy, change)
    reader = Fp8Checkpoint(copy)
    assert set(reader.entries) == {"a.weight", "norm.weight"}
    assert reader.entries["a.weight"].scheme == Scheme.parse("e4m3_tensor")
    assert reader.entries["a.weight"].info.dtype == "float16"
    want = load(copy)["a.weight"].astype(np.float32) * np.float32(0.5)
    assert_bitwise_equal(decoded_by(reader, "a.weight", "float32"), want)


@given(data=st.data())
def test_a_truncated_or_damaged_file_is_an_error(written: Path, data: st.DataObject) -> None:
    file = written / "model.safetensors"
    whole = file.read_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    n_header = int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            at = data.draw(st.integers(0, min(len(damaged), 8 + n_header) - 1))
            damaged[at] = data.draw(st.integers(0, 255))
    try:
        file.write_bytes(damaged)
        reader = Fp8Checkpoint(written)
        assert all(list(reader.blocks(name)) for name in reader.entries)
    except SourceError:
        pass
    finally:
        file.write_bytes(whole)


# The real loader.


@pytest.mark.interop
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_gives_the_logits_of_the_decoded_weights(tmp_path: Path, dtype: str) -> None:
    source = tiny_llama(tmp_path / "source", dtype, hidden=256, intermediate=384)
    target = quantize(source, tmp_path / "out", "e4m3_b128", format="fp8")
    reader = Fp8Checkpoint(target)
    weights = {n: decoded_by(reader, n, dtype) for n, e in reader.entries.items() if e.scheme}
    assert len(weights) == 14
    want, got = logits(source, dtype, weights), logits(target, dtype)
    assert float((want - got).abs().max()) <= 1e-6 * float(want.abs().max())


@pytest.mark.interop
def test_what_is_warned_of_is_so(tmp_path: Path) -> None:
    """192 rows have two scales, from which transformers makes two squares of 96."""
    source = tiny_llama(tmp_path / "source", "float32", hidden=128, intermediate=192)
    target = quantize(source, tmp_path / "out", "e4m3_b128", format="fp8")
    reader = Fp8Checkpoint(target)
    weights = {n: decoded_by(reader, n, "float32") for n, e in reader.entries.items() if e.scheme}
    want, got = logits(source, "float32", weights), logits(target, "float32")
    assert float((want - got).abs().max()) > 1e-3 * float(want.abs().max())
