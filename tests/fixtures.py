"""Small builders of checkpoints for tests, written without the package's own reader or writer of headers.

`write_safetensors` writes one file, `tiny_llama` a complete Hugging Face model directory with seeded data, and
`sparse_llama` one of real Llama-2-7B shapes whose weights are holes in sparse files: any size, no disk space.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arrowquant_gpu.dtypes import DTYPES, from_numpy


class Raw(NamedTuple):
    """A tensor given as bytes: the only way to write the sub-byte types, which NumPy has no packed form of."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def _header(entries: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None) -> bytes:
    """Length and JSON of (name, dtype, shape, bytes), which follow each other in this order."""
    head: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begin = 0
    for name, dtype, shape, size in entries:
        head[name] = {
            "dtype": DTYPES[dtype].safetensors,
            "shape": list(shape),
            "data_offsets": [begin, begin + size],
        }
        begin += size
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    path: Path | str, tensors: Mapping[str, np.ndarray | Raw], metadata: Mapping[str, str] | None = None
) -> Path:
    """One safetensors file: wide types first, then by name, as the safetensors library orders them.

    Any dtype of the format: ml_dtypes arrays for bfloat16 and float8, `Raw` for the types below one byte.
    """
    rows = []
    for name, t in tensors.items():
        raw = t if isinstance(t, Raw) else Raw(from_numpy(t.dtype).name, t.shape, np.ascontiguousarray(t).tobytes())
        rows.append((-DTYPES[raw.dtype].bits, name, raw))
    rows.sort(key=lambda r: r[:2])
    path = Path(path)
    with path.open("wb") as f:
        f.write(_header([(name, raw.dtype, raw.shape, len(raw.data)) for _, name, raw in rows], metadata))
        for _, _, raw in rows:
            f.write(raw.data)
    return path


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> Path:
    """`model.safetensors.index.json` of a sharded checkpoint."""
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}, indent=2))
    return path


def llama_shapes(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tied: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of LlamaForCausalLM, in the order of the model."""
    kv = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}."
        shapes |= {
            p + "self_attn.q_proj.weight": (hidden, hidden),
            p + "self_attn.k_proj.weight": (kv, hidden),
            p + "self_attn.v_proj.weight": (kv, hidden),
            p + "self_attn.o_proj.weight": (hidden, hidden),
            p + "mlp.gate_proj.weight": (intermediate, hidden),
            p + "mlp.up_proj.weight": (intermediate, hidden),
            p + "mlp.down_proj.weight": (hidden, intermediate),
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def _side_files(directory: Path, config: dict[str, object], vocab: int) -> None:
    """config.json, generation_config.json and a word-level tokenizer that the tokenizers library loads."""
    words = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, min(vocab, 1000)))])}
    special = [
        {"id": words[w], "content": w, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for w in ("<unk>", "<s>", "</s>")
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    files: dict[str, object] = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names},
        "special_tokens_map.json": names,
    }
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text("# A model made for tests\n", encoding="utf-8")


def _config(
    dtype: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
    }


def _split(sizes: Mapping[str, int], shards: int) -> list[list[str]]:
    """Names in order, cut into `shards` runs of about equal bytes, none of them empty."""
    if not 1 <= shards <= len(sizes):
        raise ValueError(f"{shards} shards for {len(sizes)} tensors")
    runs: list[list[str]] = [[]]
    total, done = sum(sizes.values()), 0
    for k, (name, size) in enumerate(sizes.items()):
        must = len(sizes) - k <= shards - len(runs)
        if runs[-1] and len(runs) < shards and (must or done >= total * len(runs) / shards):
            runs.append([])
        runs[-1].append(name)
        done += size
    return runs


def random_weights(shapes: Mapping[str, tuple[int, ...]], dtype: str, seed: int) -> dict[str, np.ndarray]:
    """Seeded: linear weights normal with deviation 1/sqrt(row length), embeddings 0.02, biases 0.1, norms near 1."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        x = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith(".bias"):
            x *= np.float32(0.1)
        elif len(shape) == 1:
            x = np.float32(1) + np.float32(0.1) * x
        else:
            x *= np.float32(0.02 if "embed" in name else 1 / math.sqrt(shape[-1]))
        tensors[name] = x.astype(DTYPES[dtype].numpy)
    return tensors


def tiny_llama(
    directory: Path | str,
    dtype: str = "bfloat16",
    shards: int = 1,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 160,
    tied: bool = False,
    seed: int = 0,
) -> Path:
    """A LlamaForCausalLM directory that `transformers` loads: weights, index where shards > 1, config, tokenizer."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    shapes = llama_shapes(layers, hidden, intermediate, heads, kv_heads, vocab, tied)
    tensors = random_weights(shapes, dtype, seed)
    runs = _split({n: t.nbytes for n, t in tensors.items()}, shards)
    weight_map: dict[str, str] = {}
    for i, run in enumerate(runs, 1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        write_safetensors(directory / file, {n: tensors[n] for n in run}, {"format": "pt"})
        weight_map |= dict.fromkeys(run, file)
    if shards > 1:
        write_index(directory, weight_map, sum(t.nbytes for t in tensors.values()))
    _side_files(directory, _config(dtype, layers, hidden, intermediate, heads, kv_heads, vocab, tied), vocab)
    return directory


def sparse_llama(directory: Path | str, gib: float, dtype: str = "bfloat16", shard_gib: float = 4.5) -> Path:
    """A directory of Llama-2-7B shapes, with as many layers as make about `gib` GiB; all weights read as zero.

    The files are sparse: for tests of memory and planning, never of speed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    hidden, intermediate, heads, vocab, width = 4096, 11008, 32, 32000, DTYPES[dtype].bits // 8
    per_layer = (4 * hidden * hidden + 3 * hidden * intermediate + 2 * hidden) * width
    rest = 2 * vocab * hidden * width
    layers = max(1, round((gib * 2**30 - rest) / per_layer))
    shapes = llama_shapes(layers, hidden, intermediate, heads, heads, vocab)
    sizes = {n: math.prod(s) * width for n, s in shapes.items()}
    runs = _split(sizes, max(1, math.ceil(sum(sizes.values()) / (shard_gib * 2**30))))
    weight_map: dict[str, str] = {}
    for i, run in enumerate(runs, 1):
        file = f"model-{i:05d}-of-{len(runs):05d}.safetensors"
        head = _header([(n, dtype, shapes[n], sizes[n]) for n in run], {"format": "pt"})
        with (directory / file).open("wb") as f:
            f.write(head)
            f.truncate(len(head) + sum(sizes[n] for n in run))
        weight_map |= dict.fromkeys(run, file)
    write_index(directory, weight_map, sum(sizes.values()))
    _side_files(directory, _config(dtype, layers, hidden, intermediate, heads, heads, vocab, False), vocab)
    return directory
