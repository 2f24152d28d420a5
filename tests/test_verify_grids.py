"""`verify` on every family of grids: what is right passes, one wrong code or scale is found."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu import dequantize, quantize
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import SourceError
from arrowquant_gpu.formats.safetensors import read_header
from arrowquant_gpu.pipeline.quantize import quantize_checkpoint
from arrowquant_gpu.pipeline.verify import least_cosine, verify_checkpoint
from arrowquant_gpu.schemes import Scheme

from .fixtures import tiny_llama, write_safetensors

CASES = [
    *(("mlx", scheme) for scheme in ("affine4_g32", "mxfp4", "mxfp8", "nvfp4")),
    *(("compressed-tensors", scheme) for scheme in ("e4m3_channel", "e4m3_tensor", "mxfp4", "nvfp4", "int8_g32_asym")),
    ("bitsandbytes", "nf4_g64"),
    ("gptq", "int4_g32"),
    ("awq", "int4_g32_asym"),
    ("modelopt", "nvfp4"),
    *(("safetensors", scheme) for scheme in ("q4_0", "iq4_nl", "q4_k", "affine3_g32_f16", "e5m2_g16", "fp4_g32")),
]
# Parts of a module that say nothing about the weights, or that nobody reads where the scheme is symmetric.
NOT_DECODED = (".weight_shape", ".quant_map", ".g_idx", ".bitsandbytes__nf4")


def written(tmp_path: Path, format_name: str, scheme: str) -> tuple[Path, Path]:
    tiny_llama(tmp_path / "m", dtype="float32", shards=1, hidden=256, intermediate=256)
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", scheme, format=format_name, device="cpu")
    return tmp_path / "q", tmp_path / "m"


@pytest.mark.parametrize(("format_name", "scheme"), CASES)
def test_what_is_right_passes_and_one_code_or_scale_is_found(tmp_path: Path, format_name: str, scheme: str) -> None:
    quantized, original = written(tmp_path, format_name, scheme)
    report = verify_checkpoint(quantized, original, device="cpu")
    assert [f for f in report.findings if f.problem] == []
    assert sum(f.action == "quantized" for f in report.findings) >= 14
    file = quantized / "model.safetensors"
    whole, tensors = file.read_bytes(), read_header(file).tensors
    parts = [t for n, t in tensors.items() if "layers.0.mlp.down_proj" in n and not n.endswith(NOT_DECODED)]
    assert parts
    for info in parts:
        data = bytearray(whole)
        width = DTYPES[info.dtype].bits // 8
        # Of a scale an exponent bit: what is within its rounding is not an error.
        data[info.offset + info.n_bytes // 2 // width * width + width - 1] ^= 0x08
        file.write_bytes(data)
        try:
            damaged = verify_checkpoint(quantized, original, device="cpu").failed
        except SourceError as e:
            damaged = (str(e),)
        assert ["layers.0.mlp.down_proj" in what for what in damaged] == [True], info.name


# Every grid beside int; the groups of those that choose are the largest of a threshold. docs/verify.md has the figures.
SCHEMES = (
    *("affine2_g128", "affine3_g128", "affine4_g128", "affine5_g128", "affine6_g128", "affine8_g128"),
    *("nf4_g64", "nf4_g256", "fp4_g64", "fp4_g256", "mxfp4", "mxfp4_ceil", "nvfp4", "nvfp4_local"),
    *("e4m3_g128", "e4m3_channel", "e4m3_tensor", "e4m3_b128", "mxfp8", "mxfp8_ceil", "e5m2_channel", "e5m2_tensor"),
    *("f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "ggml_mxfp4", "ggml_nvfp4"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    a, b = x.astype(np.float64), y.astype(np.float64)
    return float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_default_thresholds_have_a_margin(scheme: str) -> None:
    """Laplace weights, whose tails are heavier than trained layers' usually are, pass; another tensor does not."""
    rng = np.random.default_rng(0)
    least = least_cosine(Scheme.parse(scheme))
    for draw in (rng.standard_normal, rng.laplace):
        x = draw(size=(128, 2048)).astype(np.float32)
        y = dequantize(quantize(x, scheme, device="cpu"), device="cpu")
        assert cosine(x, y) > least
    assert cosine(x, rng.permutation(y.reshape(-1)).reshape(x.shape)) < least


@pytest.mark.parametrize("within_step", [True, False])
@pytest.mark.parametrize("scheme", ["nf4_g64", "e4m3_tensor", "nvfp4", "affine4_g32", "q4_k"])
def test_weights_that_are_not_finite_are_a_problem(tmp_path: Path, scheme: str, within_step: bool) -> None:
    x = np.random.default_rng(0).standard_normal((40, 256)).astype(np.float32)
    for name in ("m", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    write_safetensors(tmp_path / "m" / "model.safetensors", {"a.q_proj.weight": x})
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", scheme, format="safetensors", device="cpu")
    for bad in (np.nan, np.inf, -np.inf):
        x[30, 5] = bad
        write_safetensors(tmp_path / "b" / "model.safetensors", {"a.q_proj.weight": x})
        (found,) = verify_checkpoint(tmp_path / "q", tmp_path / "b", device="cpu", within_step=within_step).findings
        assert found.problem == "row 30 is not finite, in the original or decoded"
        assert found.cosine is not None
        assert math.isnan(found.cosine)
        assert (found.max_error, found.max_steps) == (math.inf, None)
