"""`verify` on every family of grids: what is right passes, one wrong code or scale is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import SourceError
from arrowquant_gpu.formats.safetensors import read_header
from arrowquant_gpu.pipeline.quantize import quantize_checkpoint
from arrowquant_gpu.pipeline.verify import verify_checkpoint

from .fixtures import tiny_llama

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
