"""--max-shard-size: files of at most that size, an index over them, the same bytes of every tensor, every time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu.errors import FormatError
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.safetensors import read_header
from arrowquant_gpu.pipeline.dequantize import dequantize_checkpoint
from arrowquant_gpu.pipeline.quantize import quantize_checkpoint

from .fixtures import tiny_llama


def tensors(folder: Path) -> dict[str, bytes]:
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        found |= {n: data[t.offset : t.offset + t.n_bytes] for n, t in read_header(file).tensors.items()}
    return found


@pytest.mark.parametrize(
    ("format_name", "scheme"), [("compressed-tensors", "int4_g32"), ("gptq", "int4_g32"), ("mlx", "affine4_g32")]
)
def test_files_of_at_most_that_size(tmp_path: Path, format_name: str, scheme: str) -> None:
    tiny_llama(tmp_path / "m", dtype="float32", shards=2)
    whole = {"format": format_name, "device": "cpu"}
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", scheme, **whole)
    for name in ("a", "b"):
        quantize_checkpoint(tmp_path / "m", tmp_path / name, scheme, max_shard_size=20_000, **whole)
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert len(files) > 3
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    found = tensors(tmp_path / "a")
    assert found == tensors(tmp_path / "q")
    assert index["metadata"]["total_size"] == sum(map(len, found.values()))
    assert index["weight_map"] == {n: f.name for f in files for n in read_header(f).tensors}
    for file in files:
        sizes = [t.n_bytes for t in read_header(file).tensors.values()]
        # What one matrix becomes is never torn apart: only it alone may be larger.
        assert sum(sizes) <= 20_000 or len({n.rsplit(".", 1)[0] for n in read_header(file).tensors}) == 1
    for file in (p for p in (tmp_path / "a").rglob("*") if p.is_file()):
        assert (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes() == file.read_bytes(), file.name


def test_a_file_is_larger_for_one_matrix_alone(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m", dtype="float32", shards=1)
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", "int8_channel", device="cpu", max_shard_size=1)
    source = open_checkpoint(tmp_path / "m").tensors
    assert len(list((tmp_path / "q").glob("*.safetensors"))) == len(source)
    dequantize_checkpoint(tmp_path / "q", tmp_path / "d", device="cpu")
    back, original = open_checkpoint(tmp_path / "d"), open_checkpoint(tmp_path / "m")
    for name in source:
        assert np.abs(back.view(name) - original.view(name)).max() < 0.02


def test_a_format_that_is_one_file_has_no_shards(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "m", dtype="float32", shards=1)
    with pytest.raises(FormatError, match=r"max-shard-size.*compressed-tensors"):
        quantize_checkpoint(tmp_path / "m", tmp_path / "q.parquet", format="parquet", max_shard_size=10**9)
