"""MLX checkpoints: layout, settings and refusals; what is damaged; and the judge, mlx_lm on a CPU."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arrowquant_gpu import reference
from arrowquant_gpu.errors import ArrowQuantError, FormatError, SourceError
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.pipeline.dequantize import dequantize_checkpoint
from arrowquant_gpu.pipeline.quantize import quantize_checkpoint
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .fixtures import write_safetensors

SCHEMES = ("affine2_g32", "affine3_g64", "affine4_g64", "affine5_g128", "affine6_g64", "affine8_g32")
MODES = ("mxfp4", "mxfp8", "nvfp4")


def model(folder: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    """A model directory with two linear layers, an embedding and a norm; returns its tensors."""
    rng = np.random.default_rng(3)
    shapes = {"fc.weight": (48, 128), "out.weight": (8, 256), "embed_tokens.weight": (40, 128)}
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    tensors["norm.weight"] = np.ones(128, dtype)
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "other", "torch_dtype": dtype}))
    return tensors


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_part_against_the_reference(tmp_path: Path, scheme: str) -> None:
    tensors = model(tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", scheme, format="mlx", include=["embed_tokens"], device="cpu")
    stored, s = load_file(tmp_path / "q" / "model.safetensors"), Scheme.parse(scheme)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization"] == {"group_size": s.group_size, "bits": s.bits, "mode": "affine"}
    assert config["quantization_config"] == config["quantization"]
    for module in ("fc", "out", "embed_tokens"):
        packed, scales, biases, _ = reference.quantize(tensors[f"{module}.weight"], s)
        assert stored[f"{module}.weight"].dtype == np.uint32
        assert_bitwise_equal(stored[f"{module}.weight"].view(np.uint8), packed, module)
        assert_bitwise_equal(stored[f"{module}.scales"], scales, module)
        assert_bitwise_equal(stored[f"{module}.biases"], biases, module)
    assert_bitwise_equal(stored["norm.weight"], tensors["norm.weight"], "norm")


def test_modules_of_other_schemes_are_named(tmp_path: Path) -> None:
    model(tmp_path / "m")
    quantize_checkpoint(
        tmp_path / "m", tmp_path / "q", format="mlx", tensor_schemes=[("^fc", "affine8_g32")], device="cpu"
    )
    settings = json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]
    assert settings["fc"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert settings["bits"] == 4
    entries = open_quantized(tmp_path / "q").entries
    assert entries["fc.weight"].scheme == Scheme.parse("affine8_g32")
    assert entries["out.weight"].scheme == Scheme.parse("affine4_g64")


@pytest.mark.parametrize("scheme", [*SCHEMES, *MODES])
def test_what_is_read_back_is_what_was_written(tmp_path: Path, scheme: str) -> None:
    tensors = model(tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", scheme, format="mlx", device="cpu")
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d", device="cpu")
    decoded = load_file(tmp_path / "d" / "model.safetensors")
    entries = open_quantized(tmp_path / "q").entries
    for name in ("fc.weight", "out.weight"):
        s = entries[name].scheme
        assert s is not None
        parts = reference.quantize(tensors[name], s)[:3]
        assert_bitwise_equal(decoded[name], reference.dequantize(*parts, s, tensors[name].shape[1]), name)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()


@pytest.mark.parametrize(
    ("scheme", "words"),
    [("int4_g128", "affine4_g64"), ("q4_k", "affine4_g64"), ("affine4_g64_bf16", "leave the suffix out")],
)
def test_what_mlx_cannot_carry(tmp_path: Path, scheme: str, words: str) -> None:
    model(tmp_path / "m")
    with pytest.raises(FormatError, match=words):
        quantize_checkpoint(tmp_path / "m", tmp_path / "q", scheme, format="mlx", device="cpu")


def test_rows_that_are_not_whole_groups_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    weights = {"a.weight": np.ones((4, 96), np.float32), "b.weight": np.ones((4, 64), np.float32)}
    write_safetensors(folder / "model.safetensors", weights)
    (folder / "config.json").write_text("{}")
    plan = quantize_checkpoint(folder, tmp_path / "q", format="mlx", dry_run=True)
    assert [(e.info.name, e.scheme is None) for e in plan.entries] == [("a.weight", True), ("b.weight", False)]
    assert "not whole groups of 64" in plan.entries[0].reason


@pytest.mark.parametrize(
    "damage",
    ["no biases", "scales of another type", "no such mode", "seven bits", "no weight", "words of another type"],
)
def test_what_is_damaged_is_a_source_error(tmp_path: Path, damage: str) -> None:
    model(tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", format="mlx", device="cpu")
    file, config = tmp_path / "q" / "model.safetensors", tmp_path / "q" / "config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())
    match damage:
        case "no biases":
            del tensors["fc.biases"]
        case "scales of another type":
            tensors["fc.scales"] = tensors["fc.scales"].astype(np.float16)
        case "no such mode":
            settings["quantization"]["mode"] = "ternary"
        case "seven bits":
            settings["quantization"]["bits"] = 7
        case "no weight":
            del tensors["fc.weight"]
        case _:
            tensors["fc.weight"] = tensors["fc.weight"].view(np.int32)
    save_file(tensors, file)
    config.write_text(json.dumps(settings))
    with pytest.raises(SourceError, match=r"fc|embed_tokens"):
        open_quantized(tmp_path / "q")


def test_any_value_of_the_settings_opens_or_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", format="mlx", device="cpu")
    config = tmp_path / "q" / "config.json"
    whole = json.loads(config.read_text())
    for key in ("bits", "group_size", "mode", "fc", "unknown"):
        for value in (None, 0, -1, 10**9, 1.5, "4", [], {}, {"bits": "x"}, True):
            config.write_text(json.dumps({**whole, "quantization": {**whole["quantization"], key: value}}))
            with contextlib.suppress(ArrowQuantError):
                open_quantized(tmp_path / "q")


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["affine4_g64", *MODES])
def test_mlx_lm_computes_with_the_decoded_weights(tmp_path: Path, scheme: str) -> None:
    from .real_loaders import mlx_models
    from .tiny_models import tiny_llama_gqa

    tiny_llama_gqa(tmp_path / "m", "float32")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", scheme, format="mlx", device="cpu")
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d", device="cpu")
    want, got = mlx_models.logits(tmp_path / "d"), mlx_models.logits(tmp_path / "q")
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()
    broken = tmp_path / "b"
    shutil.copytree(tmp_path / "q", broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(n for n, t in tensors.items() if t.dtype == np.uint32 and "mlp" in n)
    tensors[name] = np.ascontiguousarray(tensors[name].view(np.uint8)[:, ::-1]).view(np.uint32)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert np.abs(mlx_models.logits(broken) - want).max() > 1e-2 * np.abs(want).max()
