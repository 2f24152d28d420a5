"""Checkpoints with the names, shapes and shards of well-known models: dense ones for speed, sparse ones for memory.

Dense weights are normally distributed bfloat16 on allocated blocks: a block of normals is drawn once, and each tensor
is written from it beginning at another weight. Sparse files hold only headers; their weights read as zero.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

WIDTH = 2  # bytes of a bfloat16
BLOCK_WEIGHTS = 32 << 20

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """What decides the tensors of a decoder: the sizes in its config.json, and how large its publisher made a shard."""

    model_type: str
    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    shard_bytes: int
    head_dim: int = 128
    experts: int = 0
    head_norms: bool = False

    def shapes(self, layers: int | None = None) -> Shapes:
        """Every tensor's name and shape in the order of the model, with all or only so many of its layers."""
        found: Shapes = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers if layers is None else layers):
            found |= {f"model.layers.{i}.{name}": shape for name, shape in self._layer().items()}
        return found | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    def _layer(self) -> Shapes:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer: Shapes = {
            "self_attn.q_proj.weight": (queries, self.hidden),
            "self_attn.k_proj.weight": (keys, self.hidden),
            "self_attn.v_proj.weight": (keys, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, queries),
        }
        if self.head_norms:
            layer |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (self.head_dim,))
        blocks = [f"mlp.experts.{e}." for e in range(self.experts)] or ["mlp."]
        for block in blocks:
            layer |= {
                f"{block}gate_proj.weight": (self.intermediate, self.hidden),
                f"{block}up_proj.weight": (self.intermediate, self.hidden),
                f"{block}down_proj.weight": (self.hidden, self.intermediate),
            }
        if self.experts:
            layer["mlp.gate.weight"] = (self.experts, self.hidden)
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        return layer | dict.fromkeys(norms, (self.hidden,))

    def config(self, layers: int) -> dict[str, Any]:
        """config.json, as far as policy and formats read it."""
        sizes = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
        }
        experts = {"num_experts": self.experts} if self.experts else {}
        names = {"architectures": [self.architecture], "model_type": self.model_type, "torch_dtype": "bfloat16"}
        return names | sizes | experts | {"tie_word_embeddings": False}


_LLAMA = ("llama", "LlamaForCausalLM")
MODELS = {
    "llama-2-7b": Model(*_LLAMA, 32, 4096, 11008, 32, 32, 32000, shard_bytes=9_980_000_000),
    "mistral-7b": Model("mistral", "MistralForCausalLM", 32, 4096, 14336, 32, 8, 32000, shard_bytes=5_000_000_000),
    "qwen3-30b-a3b": Model(
        *("qwen3_moe", "Qwen3MoeForCausalLM", 48, 2048, 768, 32, 4, 151936),
        shard_bytes=4_000_000_000,
        experts=128,
        head_norms=True,
    ),
    "llama-2-70b": Model(*_LLAMA, 80, 8192, 28672, 64, 8, 32000, shard_bytes=9_980_000_000),
}


def n_bytes(shapes: Shapes) -> int:
    """Bytes of the weights alone."""
    return WIDTH * sum(math.prod(shape) for shape in shapes.values())


def most_layers(model: Model, room: int, per_byte: float) -> int:
    """How many layers, 1 to all, fit where a checkpoint takes `per_byte` bytes of room for each of its own."""
    few, one_more = (n_bytes(model.shapes(n)) for n in (1, 2))
    return max(1, min(model.layers, 1 + int((room / per_byte - few) // (one_more - few))))


def make(directory: Path, model: Model, layers: int, *, sparse: bool = False) -> Path:
    """A model directory: shards, index, config.json. Dense weights are on the disk when this returns."""
    directory.mkdir(parents=True)
    shards = list(_shards(model.shapes(layers), model.shard_bytes))
    block = None if sparse else _normals()
    weight_map: dict[str, str] = {}
    for i, shapes in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write(directory / name, shapes, block, seed=i)
        weight_map |= dict.fromkeys(shapes, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": n_bytes(model.shapes(layers))}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(model.config(layers)))
    return directory


def _shards(shapes: Shapes, most: int) -> Iterator[Shapes]:
    """Tensors in order, a new file before each that would make the last one larger than `most` bytes."""
    shard: Shapes = {}
    for name, shape in shapes.items():
        if shard and n_bytes(shard) + n_bytes({name: shape}) > most:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _normals() -> np.ndarray:
    """Bytes of BLOCK_WEIGHTS weights, twice, so that they can be read from any weight of the first half on."""
    x = np.random.default_rng(7).standard_normal(BLOCK_WEIGHTS, np.float32) * np.float32(0.02)
    return np.tile(x.astype(ml_dtypes.bfloat16).view(np.uint8), 2)


def _write(path: Path, shapes: Shapes, block: np.ndarray | None, seed: int) -> None:
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + n_bytes({name: shape})
        head[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(seed)
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if block is None:
            file.truncate(8 + len(text) + end)
            return
        for name, shape in shapes.items():
            left, first = n_bytes({name: shape}), WIDTH * int(rng.integers(BLOCK_WEIGHTS))
            while left:
                part = block[first : first + min(left, len(block) // 2)]
                left -= file.write(part.data)
        os.fsync(file.fileno())
