"""GGUF files read by the gguf package, whose names become those of Hugging Face again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# What llama.cpp's converter does to rows: those of queries and keys are in another order in the family of Llama.
_PERMUTED = {"llama": {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}}
_EXPERTS = {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}
# Of BERT, and in no GGUF file: embeddings of sentences do not need them.
_NO_PLACE = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")


def tensors(file: Path, model: Path) -> dict[str, Any]:
    """Every tensor under its name in `model`, a Hugging Face directory, decoded to float32 by the gguf package.

    Raises KeyError for a tensor that the model does not have.
    """
    import gguf
    import torch
    from safetensors.torch import load_file

    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = fields["general.architecture"]
    (kind,) = [k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch]
    table = gguf.get_tensor_name_map(kind, fields[f"{arch}.block_count"])
    names = {table.get_name(name, (".weight", ".bias")): name for name in load_file(model / "model.safetensors")}
    out = without_place(model)
    for tensor in reader.tensors:
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        x = x.reshape([int(n) for n in reversed(tensor.shape)])
        part = tensor.name.split(".")[-2]
        if part in _EXPERTS:
            prefix = f"model.layers.{tensor.name.split('.')[1]}.block_sparse_moe.experts"
            own = {f"{prefix}.{i}.{_EXPERTS[part]}.weight": x[i] for i in range(len(x))}
        elif key := _PERMUTED.get(arch, {}).get(part):
            heads = fields[f"{arch}.{key}"]
            rows = x.reshape(heads, len(x) // heads // 2, 2, *x.shape[1:]).swapaxes(1, 2)
            own = {names[tensor.name]: rows.reshape(x.shape)}
        else:
            own = {names[tensor.name]: x}
        out |= {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in own.items()}
    return out


def without_place(model: Path) -> dict[str, Any]:
    """The tensors of a model that a GGUF file has no place for."""
    from safetensors.torch import load_file

    return {name: t for name, t in load_file(model / "model.safetensors").items() if name in _NO_PLACE}
