"""Quantized sources: what is read from them is what `dequantize` writes, and so are the bytes made of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from arrowquant_gpu.engine import decoded
from arrowquant_gpu.engine.decoded import DecodedCheckpoint
from arrowquant_gpu.errors import InputError, SourceError
from arrowquant_gpu.formats import pieces
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.formats.targets import TARGETS
from arrowquant_gpu.pipeline.dequantize import dequantize_checkpoint
from arrowquant_gpu.pipeline.quantize import quantize_checkpoint

from .fixtures import tiny_llama


def quantized(tmp_path: Path, format_name: str, scheme: str) -> tuple[Path, Path]:
    """A small model, quantized, and the float model that is decoded from that."""
    tiny_llama(tmp_path / "m", dtype="bfloat16", shards=2)
    source = tmp_path / ("q" if TARGETS[format_name].is_directory else f"q.{format_name}")
    options = {"tokenizer": "none"} if format_name == "gguf" else None
    quantize_checkpoint(tmp_path / "m", source, scheme, format=format_name, format_options=options, device="cpu")
    back = tmp_path / ("d" if source.is_dir() else "d.safetensors")
    dequantize_checkpoint(source, back, device="cpu")
    return source, back


@pytest.mark.parametrize(
    ("format_name", "scheme"),
    [
        ("compressed-tensors", "int8_g32_asym"),
        ("mlx", "affine6_g32"),
        ("gptq", "int4_g32"),
        ("bitsandbytes", "nf4_g64"),
        ("fp8", "e4m3_b128"),
        ("modelopt", "nvfp4"),
        ("safetensors", "q5_1"),
        ("gguf", "q8_0"),
        ("parquet", "int5_g24"),
        ("arrow", "int4_tensor"),
    ],
)
@pytest.mark.parametrize("piece_bytes", [1 << 24, 3000])
def test_the_bytes_are_those_of_the_decoded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str, scheme: str, piece_bytes: int
) -> None:
    source, back = quantized(tmp_path, format_name, scheme)
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    for name, src in (("again", source), ("plain", back)):
        quantize_checkpoint(
            src,
            tmp_path / f"{name}.parquet",
            "int3_g16",
            format="parquet",
            device="cpu",
            allow_requantize=src == source,
        )
        dequantize_checkpoint(tmp_path / f"{name}.parquet", tmp_path / f"{name}.safetensors", device="cpu")
    got, want = (load_file(tmp_path / f"{name}.safetensors") for name in ("again", "plain"))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].tobytes() == tensor.tobytes(), name


def test_a_model_stays_a_model(tmp_path: Path) -> None:
    source, _ = quantized(tmp_path, "compressed-tensors", "int8_g32")
    result = quantize_checkpoint(
        source, tmp_path / "again", "int4_g32", format="compressed-tensors", device="cpu", allow_requantize=True
    )
    assert any("quantized already (compressed-tensors: int8_g32_bf16)" in w for w in result.plan.warnings)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    assert {p.name for p in (tmp_path / "again").glob("*.safetensors")} == {
        p.name for p in source.glob("*.safetensors")
    }


def test_it_has_to_be_allowed(tmp_path: Path) -> None:
    source, _ = quantized(tmp_path, "compressed-tensors", "int8_g32")
    with pytest.raises(SourceError, match="--allow-requantize"):
        quantize_checkpoint(source, tmp_path / "again", device="cpu")


def test_a_float_source_is_read_as_ever(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m", dtype="float32", shards=1)
    for name, allowed in (("a", True), ("b", False)):
        quantize_checkpoint(
            tmp_path / "m",
            tmp_path / f"{name}.arrow",
            "int4_g32",
            format="arrow",
            device="cpu",
            allow_requantize=allowed,
        )
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()


def test_what_is_neither_says_both(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x80\x02\x8a")
    with pytest.raises(SourceError, match=r"no quantized checkpoint but.*As a float checkpoint"):
        quantize_checkpoint(tmp_path / "x.bin", tmp_path / "y.parquet", device="cpu", allow_requantize=True)


def test_it_is_read_in_its_own_way_only(tmp_path: Path) -> None:
    source, _ = quantized(tmp_path, "compressed-tensors", "int8_g32")
    with pytest.raises(InputError, match="--read auto"):
        quantize_checkpoint(
            source, tmp_path / "a.arrow", format="arrow", read="direct", allow_requantize=True, device="cpu"
        )


def test_any_part_of_any_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = quantized(tmp_path, "mlx", "affine4_g32")
    checkpoint = DecodedCheckpoint(open_quantized(source))
    monkeypatch.setattr(decoded.pieces, "__defaults__", (100,))
    rng = np.random.default_rng(0)
    for name, info in checkpoint.tensors.items():
        whole = checkpoint.view(name).reshape(-1).view(np.uint8)
        assert whole.size == info.n_bytes
        for _ in range(5):
            begin, end = sorted(rng.integers(0, info.n_bytes + 1, 2).tolist())
            part = np.full(end - begin, 0xA5, np.uint8)
            checkpoint.read(name, begin, part)
            assert part.tobytes() == whole[begin:end].tobytes()


def test_the_fingerprint_tells_sources_apart(tmp_path: Path) -> None:
    source, _ = quantized(tmp_path, "mlx", "affine4_g32")
    before = DecodedCheckpoint(open_quantized(source)).fingerprint()
    assert before == DecodedCheckpoint(open_quantized(source)).fingerprint()
    file = sorted(source.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 64 * 32 + 5] ^= 1
    file.write_bytes(data)
    assert before != DecodedCheckpoint(open_quantized(source)).fingerprint()
