"""NVFP4 as Model Optimizer has it: bytes, description, reader, and its own code."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu import reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats import TensorInfo, stored_model
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.modelopt import ModelOptCheckpoint, ModelOptSink
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .fixtures import tiny_llama
from .model_files import copied, decoded_by, load, model, quantize, rewrite, torch_tensor

RNG = np.random.default_rng(20261124)
SCHEME = Scheme.parse("nvfp4")
E4M3 = DTYPES["float8_e4m3fn"].numpy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_part_against_the_reference_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 1000)
    weights = RNG.standard_normal((40, 272), np.float32).astype(DTYPES[dtype].numpy)
    tensors = {"a.weight": weights, "a.bias": weights[:, 0].copy()}
    target = quantize(model(tmp_path / "m", tensors), tmp_path / "out", "nvfp4", format="modelopt")
    packed, scales, zeros, _ = reference.quantize(weights, SCHEME)
    assert zeros is not None
    out = load(target)
    assert sorted(out) == ["a.bias", "a.weight", "a.weight_scale", "a.weight_scale_2"]
    values = reference.unpack(packed, 4, 272)
    assert_bitwise_equal(out["a.weight"], values[:, ::2] | values[:, 1::2] << 4)
    assert_bitwise_equal(out["a.weight_scale"], scales.view(E4M3))
    assert_bitwise_equal(out["a.weight_scale_2"], (np.float32(1) / zeros).reshape(()))

    monkeypatch.setattr(stored_model, "_BLOCK_BYTES", 1000)
    reader = open_quantized(target)
    assert isinstance(reader, ModelOptCheckpoint)
    entry = reader.entries["a.weight"]
    assert (entry.info.dtype, entry.info.shape, entry.scheme) == (dtype, (40, 272), SCHEME)
    want = reference.dequantize(packed, scales, zeros, SCHEME, 272)
    # The reciprocal of a reciprocal is off by a rounding or two.
    np.testing.assert_allclose(decoded_by(reader, "a.weight", "float32"), want, rtol=3e-7)
    assert "hf_quant_config.json" not in {p.name for p in reader.side_files}


def test_both_descriptions(tmp_path: Path) -> None:
    target = quantize(tiny_llama(tmp_path / "source", hidden=128), tmp_path / "out", "nvfp4", format="modelopt")
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    assert config == {
        "quant_method": "modelopt",
        "quant_algo": "W4A16_NVFP4",
        "group_size": 16,
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt"},
    }
    assert json.loads((target / "hf_quant_config.json").read_text()) == {
        "producer": {"name": "modelopt"},
        "quantization": {
            "quant_algo": "W4A16_NVFP4",
            "group_size": 16,
            "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head"],
        },
    }


@pytest.mark.parametrize(
    ("scheme", "shape", "words"),
    [
        ("int4_g128", (64, 128), "nvfp4 only, not int4_g128"),
        ("nvfp4", (64, 100), "not whole groups of 16.*--format safetensors"),
    ],
)
def test_what_it_cannot_carry_is_refused_with_the_way_out(
    tmp_path: Path, scheme: str, shape: tuple[int, int], words: str
) -> None:
    sink = ModelOptSink(Output(tmp_path / "out", is_directory=True), {})
    info = TensorInfo("a.weight", "bfloat16", shape, Path("m"), 0, 0)
    with pytest.raises(FormatError, match=words):
        sink.scheme_for(info, Scheme.parse(scheme))


def test_fused_parts_have_one_global_scale(tmp_path: Path) -> None:
    out = load(quantize(tiny_llama(tmp_path / "source", hidden=128), tmp_path / "out", "nvfp4", format="modelopt"))
    for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        ends = tuple(f"{part}.weight_scale_2" for part in parts)
        found = [v for n, v in out.items() if n.startswith("model.layers.0.") and n.endswith(ends)]
        assert len(found) == len(parts)
        assert len({float(v) for v in found}) == 1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modelopt")
    tensors = {"a.weight": RNG.standard_normal((16, 64), np.float32), "norm.weight": np.ones(64, np.float32)}
    return quantize(model(folder / "m", tensors), folder / "out", "nvfp4", format="modelopt")


def _put(name: str, value: np.ndarray) -> Any:
    return lambda t, c: t.update({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t.pop("a.weight_scale"), "a.weight_scale is missing; nvfp4 .16, 64. has float8_e4m3fn .16, 4."),
        (lambda t, c: t.pop("a.weight_scale_2"), "a.weight_scale_2 is missing"),
        (_put("a.weight_scale_2", np.ones(2, np.float32)), "a.weight_scale_2 is float32 .2."),
        (_put("a.weight_scale_2", np.zeros((), np.float32)), "a.weight_scale_2 is 0.0, no positive number"),
        (_put("a.weight_scale_2", np.full((), np.nan, np.float32)), "a.weight_scale_2 is nan"),
        (_put("a.weight", np.zeros((16, 24), np.uint8)), "a.weight_scale is float8_e4m3fn .16, 4."),
        (_put("a.weight", np.zeros(16, np.uint8)), "no matrix"),
        (lambda t, c: c["quantization_config"].update(quant_algo="FP8"), "quant_algo 'FP8'; W4A16_NVFP4 and NVFP4"),
    ],
)
def test_a_broken_checkpoint_is_a_clear_error(written: Path, tmp_path: Path, change: Any, words: str) -> None:
    copy = copied(written, tmp_path / "copy")
    rewrite(copy, change)
    with pytest.raises(SourceError, match=words):
        list(ModelOptCheckpoint(copy).blocks("a.weight"))


def test_what_calibration_adds_is_left_out(written: Path, tmp_path: Path) -> None:
    copy = copied(written, tmp_path / "copy")

    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        config["quantization_config"]["quant_algo"] = "NVFP4"
        tensors["a.input_scale"] = np.ones((), np.float32)

    rewrite(copy, change)
    assert set(ModelOptCheckpoint(copy).entries) == {"a.weight", "norm.weight"}


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_junk_in_the_config_is_an_error(written: Path, junk: bytes) -> None:
    text = (written / "config.json").read_bytes()
    try:
        (written / "config.json").write_bytes(junk)
        with pytest.raises(SourceError):
            open_quantized(written)
    finally:
        (written / "config.json").write_bytes(text)


# Model Optimizer's own code.


@pytest.mark.interop
def test_model_optimizer_writes_the_same_bytes_and_decodes_the_same_values(tmp_path: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weights = RNG.standard_normal((256, 384), np.float32)
    target = quantize(model(tmp_path / "m", {"a.weight": weights}), tmp_path / "out", "nvfp4", format="modelopt")
    found = {name: torch_tensor(value) for name, value in load(target).items()}
    tensor = NVFP4QTensor((256, 384), torch.float32, found["a.weight"])
    scales = {"scale": found["a.weight_scale"], "double_scale": found["a.weight_scale_2"]}
    got = tensor.dequantize(torch.float32, **scales, block_sizes={-1: 16}).numpy()
    np.testing.assert_allclose(got, decoded_by(ModelOptCheckpoint(target), "a.weight", "float32"), rtol=1e-6)

    made, scale, scale_2 = NVFP4QTensor.quantize(torch.from_numpy(weights), 16)
    np.testing.assert_allclose(float(found["a.weight_scale_2"]), float(scale_2), rtol=2e-7)
    # Its global scale is rounded once where the reciprocal of ours is rounded twice: a code in many is another.
    same_scales = found["a.weight_scale"].view(torch.uint8) == scale.view(torch.uint8)
    same_codes = found["a.weight"] == made._quantized_data
    assert float(same_scales.float().mean()) > 0.9999
    assert float(same_codes.float().mean()) > 0.999
