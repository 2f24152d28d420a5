"""GGUF files read by the gguf package, whose names become those of Hugging Face again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# What llama.cpp's converter does to rows: those of queries and keys are in another order in the family of Llama.
_PERMUTED = {"llama": {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}}
_EXPERTS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}


def tensors(file: Path, model: Path) -> dict[str, Any]:
    """Every tensor under its name in `model`, a Hugging Face directory, decoded to float32 by the gguf package.

    Raises AssertionError for a tensor of the file that the model does not have, and the other way round.
    """
    import gguf
    import torch

    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = fields["general.architecture"]
    names = _names(model, arch, fields[f"{arch}.block_count"])
    out = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float32)
        part = tensor.name.split(".")[-2]
        if key := _PERMUTED.get(arch, {}).get(part):
            heads = fields[f"{arch}.{key}"]
            x = x.reshape(heads, len(x) // heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        if part in _EXPERTS:
            prefix = f"model.layers.{tensor.name.split('.')[1]}.block_sparse_moe.experts"
            own = {f"{prefix}.{i}.{_EXPERTS[part]}.weight": x[i] for i in range(len(x))}
        else:
            own = {names[tensor.name]: x}
        out |= {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in own.items()}
    return out


def _names(model: Path, arch: str, blocks: int) -> dict[str, str]:
    """Name in the file -> name in the model, by the gguf package's own table."""
    import gguf
    from safetensors import safe_open

    (kind,) = [k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch]
    table = gguf.get_tensor_name_map(kind, blocks)
    with safe_open(model / "model.safetensors", "np") as f:
        stored = list(f.keys())
    return {found: name for name in stored if (found := table.get_name(name, (".weight", ".bias")))}
