"""Small diffusion models with real tensor names, and calibration for them, in every kind of file that is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .fixtures import write_safetensors

HIDDEN, N_TIMESTEPS = 48, 20
KINDS = ("jsonl", "parquet", "arrow", "arrows")


def flux_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """A double and a single block of Flux, 1:64, bfloat16; columns of very different size, a dead one, and a small
    convolution, which is quantized only by `include`."""
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.uniform(-4, 4, HIDDEN))
    shapes = {
        "double_blocks.0.txt_mlp.2.weight": (HIDDEN, 16),
        "double_blocks.0.img_attn.qkv.weight": (3 * HIDDEN, HIDDEN),
        "double_blocks.0.img_attn.proj.weight": (HIDDEN, HIDDEN),
        "double_blocks.0.img_mod.lin.weight": (6 * HIDDEN, HIDDEN),
        "double_blocks.0.txt_attn.qkv.weight": (3 * HIDDEN, HIDDEN),
        "double_blocks.0.img_mlp.0.weight": (4 * HIDDEN, HIDDEN),
        "single_blocks.0.linear1.weight": (7 * HIDDEN, HIDDEN),
        "x_embedder.proj.weight": (8, 4, 2, 2),
        "double_blocks.0.img_attn.qkv.bias": (3 * HIDDEN,),
    }
    weights = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape, np.float32)
        if shape[-1] == HIDDEN and len(shape) == 2:
            x *= spread.astype(np.float32)
        weights[name] = x.astype(ml_dtypes.bfloat16)
    weights["double_blocks.0.img_attn.qkv.weight"][:, 5] = 0
    return weights


def flux(directory: Path) -> Path:
    """A model directory as the diffusers library writes it."""
    directory.mkdir()
    write_safetensors(directory / "diffusion_pytorch_model.safetensors", flux_weights())
    config = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0", "num_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def llada_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """One layer of LLaDA, a masked diffusion model of text, float16."""
    rng = np.random.default_rng(seed)
    block = "model.transformer.blocks.0."
    shapes = {
        "model.transformer.wte.weight": (96, HIDDEN),
        **{f"{block}{part}_proj.weight": (HIDDEN, HIDDEN) for part in ("q", "k", "v")},
        f"{block}attn_out.weight": (HIDDEN, HIDDEN),
        f"{block}ff_proj.weight": (2 * HIDDEN, HIDDEN),
        f"{block}ff_out.weight": (HIDDEN, 2 * HIDDEN),
        f"{block}attn_norm.weight": (HIDDEN,),
    }
    return {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}


def llada(directory: Path) -> Path:
    """A model directory as the transformers library writes it."""
    directory.mkdir()
    write_safetensors(directory / "model.safetensors", llada_weights())
    config = {"architectures": ["LLaDAModelLM"], "model_type": "llada", "vocab_size": 96}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def channel_rows(layers: Mapping[str, int], seed: int = 1) -> list[dict[str, Any]]:
    """Rows with samples [3, channels] of some time steps of each layer, one of its channels always zero."""
    rng = np.random.default_rng(seed)
    rows = []
    for layer, channels in layers.items():
        spread = np.exp2(rng.uniform(-3, 3, channels))
        spread[channels // 2] = 0
        for step in range(0, N_TIMESTEPS, 7):
            samples = (rng.standard_normal((3, channels)) * spread + 0.25 * spread).astype(np.float32)
            rows.append({"layer": layer, "timestep": step, "samples": samples.tolist()})
    return rows


def range_rows(layers: Sequence[str], seed: int = 2) -> list[dict[str, Any]]:
    """Rows with min and max, for the first half of the time steps."""
    rng = np.random.default_rng(seed)
    return [
        {"layer": layer, "timestep": step, "min": float(np.float32(low)), "max": float(np.float32(low + width))}
        for layer in layers
        for step in range(N_TIMESTEPS // 2)
        for low, width in [(rng.normal(), rng.exponential())]
    ]


def write_calibration(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The rows as a file of the kind that its suffix names (of KINDS): "arrows" is an IPC stream."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    table = pa.Table.from_pylist([dict(row) for row in rows])
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    new = pa.ipc.new_stream if path.suffix == ".arrows" else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path
