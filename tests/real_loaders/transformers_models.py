"""Checkpoints in transformers on a CPU, with compressed-tensors, gptqmodel and bitsandbytes below it.

Every function gives what the model computes: logits [1, tokens, vocabulary] of a language model, normalized sentence
embeddings [sentences, hidden] of BERT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .inputs import IDS, TEXTS, is_encoder


def plain(directory: Path, dtype: str) -> np.ndarray:
    """As it is loaded without any option: also the reference, on a checkpoint of decoded weights."""
    return _outputs(_load(directory, dtype), directory)


def decompressed(directory: Path, dtype: str) -> np.ndarray:
    """compressed-tensors that decodes while it loads: no activation is quantized, and asymmetric weights load."""
    from transformers import CompressedTensorsConfig

    return _outputs(_load(directory, dtype, quantization_config=CompressedTensorsConfig(dequantize=True)), directory)


def gptq(directory: Path, dtype: str) -> np.ndarray:
    """gptqmodel's kernel that decodes and multiplies; the default one on a CPU computes in bfloat16, 2 % off."""
    import torch
    from transformers import GPTQConfig

    torch._dynamo.config.disable = True  # gptqmodel would have its layers compiled, for seconds
    config = GPTQConfig(bits=4, backend="gptq_torch")  # only the backend is taken from here
    return _outputs(_load(directory, dtype, device_map="cpu", quantization_config=config), directory)


def awq(directory: Path, dtype: str) -> np.ndarray:
    """gptqmodel's kernel for AWQ that decodes and multiplies."""
    from transformers import AwqConfig

    config = AwqConfig(backend="torch_awq")
    return _outputs(_load(directory, dtype, device_map="cpu", quantization_config=config), directory)


def bitsandbytes(directory: Path, dtype: str) -> np.ndarray:
    """bitsandbytes, with its way on CPUs of multiplying in bfloat16 switched off."""
    model = _load(directory, dtype)
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    if not layers:
        raise AssertionError(f"{directory}: no layer is quantized")
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return _outputs(model, directory)


def gguf(file: Path, dtype: str) -> np.ndarray:
    """The language model that transformers makes of a GGUF file, decoding it while it loads."""
    from transformers import AutoModelForCausalLM

    return _logits(_checked(AutoModelForCausalLM, file.parent, dtype, gguf_file=file.name))


def _load(directory: Path, dtype: str, **options: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    return _checked(AutoModel if is_encoder(directory) else AutoModelForCausalLM, directory, dtype, **options)


def _checked(kind: Any, directory: Path, dtype: str, **options: Any) -> Any:
    """The model. AssertionError where a weight of it is not in the files, or the other way round."""
    import torch

    model, info = kind.from_pretrained(directory, dtype=getattr(torch, dtype), output_loading_info=True, **options)
    if wrong := {k: sorted(map(str, v))[:4] for k, v in info.items() if v}:
        raise AssertionError(f"{directory}: {wrong}")
    return model.eval()


def _outputs(model: Any, directory: Path) -> np.ndarray:
    if not is_encoder(directory):
        return _logits(model)
    import torch
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(directory)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None].float()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=1).numpy()


def _logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([IDS])).logits.float().numpy()
