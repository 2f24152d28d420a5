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

    Tensors of the model that have no place in such files, as the pooler of BERT, are taken from it.
    """
    import gguf

    decoded = {}
    for tensor in gguf.GGUFReader(file).tensors:
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        decoded[tensor.name] = x.reshape([int(n) for n in reversed(tensor.shape)]).astype(np.float32)
    return _hugging_face(decoded, file, model)


def restored(decoded: Path, file: Path, model: Path) -> dict[str, Any]:
    """The same of a safetensors file that was made of the GGUF file and has its names."""
    from safetensors.torch import load_file

    return _hugging_face({n: t.float().numpy() for n, t in load_file(decoded).items()}, file, model)


def _hugging_face(decoded: dict[str, np.ndarray], file: Path, model: Path) -> dict[str, Any]:
    """Names, rows and experts as in the model. Raises KeyError for a tensor that it does not have."""
    import gguf
    import torch
    from safetensors.torch import load_file

    fields = {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}
    arch = fields["general.architecture"]
    (kind,) = [k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch]
    table = gguf.get_tensor_name_map(kind, fields[f"{arch}.block_count"])
    stored = load_file(model / "model.safetensors")
    names = {table.get_name(name, (".weight", ".bias")): name for name in stored}
    out = {name: t for name, t in stored.items() if table.get_name(name, (".weight", ".bias")) is None}
    out = {name: t for name, t in out.items() if ".experts." not in name}
    for name, x in decoded.items():
        part = name.split(".")[-2]
        if part in _EXPERTS:
            prefix = f"model.layers.{name.split('.')[1]}.block_sparse_moe.experts"
            own = {f"{prefix}.{i}.{_EXPERTS[part]}.weight": x[i] for i in range(len(x))}
        elif key := _PERMUTED.get(arch, {}).get(part):
            heads = fields[f"{arch}.{key}"]
            rows = x.reshape(heads, len(x) // heads // 2, 2, *x.shape[1:]).swapaxes(1, 2)
            own = {names[name]: rows.reshape(x.shape)}
        else:
            own = {names[name]: x}
        out |= {n: torch.from_numpy(np.ascontiguousarray(values)) for n, values in own.items()}
    return out
