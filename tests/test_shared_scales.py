"""Parts of a fused matrix have one global scale: that of the range of all of them, whatever the order of work."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowquant_gpu.engine.journal import Journal
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.safetensors import read_header
from arrowquant_gpu.pipeline.quantize import quantize_checkpoint

from .fixtures import write_safetensors

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ALONE = ("o_proj", "down_proj")


def model(folder: Path) -> dict[str, np.ndarray]:
    """Two layers whose matrices have ranges far apart; a name's parts lie in two files."""
    rng = np.random.default_rng(5)
    folder.mkdir()
    files: list[dict[str, np.ndarray]] = [{}, {}]
    for layer in range(2):
        for i, part in enumerate((*FUSED[0], *FUSED[1], *ALONE)):
            block = "self_attn" if part[0] in "qkvo" else "mlp"
            x = rng.standard_normal((64, 128)).astype(np.float32) * np.float32(10.0 ** ((i * 5 + layer) % 7 - 3))
            files[i % 2][f"model.layers.{layer}.{block}.{part}.weight"] = x
    for i, tensors in enumerate(files, 1):
        write_safetensors(folder / f"model-{i:05d}-of-00002.safetensors", tensors)
    weight_map = {n: f"model-{i:05d}-of-00002.safetensors" for i, t in enumerate(files, 1) for n in t}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return files[0] | files[1]


def written(folder: Path) -> dict[str, np.ndarray]:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in _float_tensors(f).items()}


def _float_tensors(file: Path) -> dict[str, np.ndarray]:
    """Those that NumPy can hold; FP8 scales as bytes."""
    data = np.fromfile(file, np.uint8)
    kinds = {"float32": np.float32}
    return {
        name: data[t.offset : t.offset + t.n_bytes].view(kinds.get(t.dtype, np.uint8))
        for name, t in read_header(file).tensors.items()
    }


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("piece_bytes", [1 << 24, 5000])
def test_one_scale_for_all_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int, piece_bytes: int
) -> None:
    tensors = model(tmp_path / "m")
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", piece_bytes)
    quantize_checkpoint(
        tmp_path / "m", tmp_path / "q", "nvfp4", format="compressed-tensors", device="cpu", threads=threads
    )
    stored = written(tmp_path / "q")
    for layer in range(2):
        for parts in (*FUSED, *((part,) for part in ALONE)):
            names = [n for n in tensors if f"layers.{layer}." in n and n.split(".")[-2] in parts]
            assert len(names) == len(parts)
            largest = max(np.abs(tensors[n]).max() for n in names)
            want = np.float32(448 * 6) / np.float32(largest)
            got = [float(stored[f"{name}_global_scale"][0]) for name in names]
            assert len(set(got)) == 1
            assert got[0] == pytest.approx(float(want), rel=1e-6)


def test_a_part_that_is_lost_is_done_again_with_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that end with some parts finished: what goes on must not take the range of the rest for that of all."""
    model(tmp_path / "m")
    options: dict[str, Any] = {"format": "compressed-tensors", "device": "cpu", "threads": 1}
    quantize_checkpoint(tmp_path / "m", tmp_path / "whole", "nvfp4", **options)
    monkeypatch.setattr(Journal.__init__, "__defaults__", (0.01,))
    keep, left, n_resumed = Output.write, [0], 0

    def write(self: Output, name: str, *place: Any) -> None:
        left[0] -= name.endswith(".safetensors")
        if left[0] < 0:
            time.sleep(0.2)  # the journal notes what is finished in a thread of its own
            raise KeyboardInterrupt
        keep(self, name, *place)

    for n in range(20, 60, 4):
        target, left[0] = tmp_path / f"q{n}", n
        monkeypatch.setattr(Output, "write", write)
        try:
            quantize_checkpoint(tmp_path / "m", target, "nvfp4", **options)
        except KeyboardInterrupt:
            monkeypatch.setattr(Output, "write", keep)
            result = quantize_checkpoint(tmp_path / "m", target, "nvfp4", resume=True, **options)
            n_resumed += result.run.resumed
        for file in sorted((tmp_path / "whole").glob("*.safetensors")):
            assert (target / file.name).read_bytes() == file.read_bytes(), n
    assert n_resumed > 0


@pytest.mark.parametrize(
    ("format_name", "scheme", "alone"),
    [
        ("compressed-tensors", "int4_g128", ["o_proj"]),
        ("gptq", "int4_g128", ["o_proj"]),
        ("modelopt", "nvfp4", ["o_proj"]),
        ("bitsandbytes", "nf4_g64", ["o_proj", "q_proj", "v_proj"]),
        ("mlx", "affine4_g64", ["o_proj", "q_proj", "v_proj"]),
    ],
)
def test_parts_that_engines_fuse_are_kept_alike(
    tmp_path: Path, format_name: str, scheme: str, alone: list[str]
) -> None:
    """One part that the format cannot carry keeps the others, where engines of that format fuse them."""
    folder = tmp_path / "m"
    folder.mkdir()
    shapes = {"q_proj": (64, 128), "k_proj": (64, 120), "v_proj": (64, 128), "o_proj": (64, 128)}
    weights = {f"model.layers.0.self_attn.{p}.weight": np.ones(shape, np.float32) for p, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", weights)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    plan = quantize_checkpoint(folder, tmp_path / "q", scheme, format=format_name, dry_run=True)
    assert sorted(e.info.name.split(".")[-2] for e in plan.entries if e.scheme) == alone
    fused = [e.reason for e in plan.entries if "fused with model.layers.0.self_attn.k_proj" in e.reason]
    assert len(fused) == (0 if len(alone) == 3 else 2)
