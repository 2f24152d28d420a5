"""The real loaders on a CPU, under one name each: what a model computes, and how far that may be from the reference.

A loader is called with what was written (a directory, or a GGUF file), the Hugging Face directory that it was made
from, and the dtype to compute in. It raises where a weight is missing or not expected. The reference is
`transformers_models.plain` on a float checkpoint of the decoded weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import decoders, gguf_files, llama_cpp, mlx_models, transformers_models
from .inputs import is_encoder


class Loader(NamedTuple):
    """What it computes, and the largest difference to the reference, as a share of the reference's largest value."""

    outputs: Callable[[Path, Path, str], np.ndarray]
    tolerance: float


def _transformers(how: Callable[[Path, str], np.ndarray]) -> Callable[[Path, Path, str], np.ndarray]:
    return lambda written, model, dtype: how(written, dtype)


def _decoded(marks: tuple[str, ...], decode: decoders.Decode) -> Callable[[Path, Path, str], np.ndarray]:
    return lambda written, model, dtype: decoders.run(decoders.checkpoint(written, marks, decode), written, dtype)


def _llama_cpp(written: Path, model: Path, dtype: str) -> np.ndarray:
    return llama_cpp.embeddings(written) if is_encoder(model) else llama_cpp.logits(written)


# llama.cpp and LLM.int8 quantize the activations too, to 8 bits, as do models of compressed-tensors that say so; those
# of FP8 have 3 bits after the point. gptqmodel multiplies in float16.
LOADERS: Mapping[str, Loader] = {
    "transformers": Loader(_transformers(transformers_models.plain), 0.0),
    "transformers-int8-activations": Loader(_transformers(transformers_models.plain), 6e-2),
    "transformers-fp8-activations": Loader(_transformers(transformers_models.plain), 0.15),
    "transformers-dequantize": Loader(_transformers(transformers_models.decompressed), 0.0),
    "transformers-gptqmodel": Loader(_transformers(transformers_models.gptq), 3e-3),
    "transformers-gptqmodel-awq": Loader(_transformers(transformers_models.awq), 3e-3),
    "transformers-bitsandbytes": Loader(_transformers(transformers_models.bitsandbytes), 1e-6),
    "transformers-llm.int8": Loader(_transformers(transformers_models.bitsandbytes), 6e-2),
    "transformers-gguf": Loader(lambda written, model, dtype: transformers_models.gguf(written, dtype), 0.0),
    "llama.cpp": Loader(_llama_cpp, 6e-2),
    "mlx_lm": Loader(lambda written, model, dtype: mlx_models.logits(written), 1e-5),
    "compressed-tensors": Loader(_decoded(("weight_scale",), decoders.compressed_tensors), 0.0),
    "gptqmodel": Loader(_decoded(("qweight",), decoders.gptqmodel), 3e-3),
    "gptqmodel-awq": Loader(_decoded(("qweight",), decoders.awq), 3e-3),
    "bitsandbytes": Loader(_decoded(("weight.absmax", "SCB"), decoders.bitsandbytes), 1e-6),
    "mlx": Loader(_decoded(("scales",), decoders.mlx), 1e-5),
    "modelopt": Loader(_decoded(("weight_scale",), decoders.modelopt), 1e-5),
    "comfy_kitchen": Loader(lambda written, model, dtype: decoders.run(decoders.comfyui(written), model, dtype), 1e-5),
    "gguf": Loader(lambda written, model, dtype: decoders.run(gguf_files.tensors(written, model), model, dtype), 0.0),
}


def reference(decoded: Path, model: Path, dtype: str) -> np.ndarray:
    """What the weights compute that `arrowquant dequantize` wrote, to a directory or, of one file, to one file."""
    if decoded.is_dir():
        return transformers_models.plain(decoded, dtype)
    from safetensors.torch import load_file

    return decoders.run(gguf_files.without_place(model) | load_file(decoded), model, dtype)
