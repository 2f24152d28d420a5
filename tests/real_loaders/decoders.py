"""Checkpoints decoded by the library of their format, one weight at a time, and run as float models in transformers.

For what no loader takes as a whole on a CPU: the experts of a mixture where transformers holds them in one tensor, and
BERT in MLX and in GGUF files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import transformers_models

# The tensors of one module without its name, the name, and the quantization_config -> the weight [rows, length].
Decode = Callable[[dict[str, Any], str, dict[str, Any]], Any]
_NOT_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")


def run(tensors: dict[str, Any], model: Path, dtype: str) -> np.ndarray:
    """What a float model computes with these tensors and the config and tokenizer of the directory `model`."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "decoded"
        shutil.copytree(model, directory, ignore=shutil.ignore_patterns(*_NOT_WEIGHTS))
        config = json.loads((directory / "config.json").read_text())
        for key in ("quantization_config", "quantization"):
            config.pop(key, None)
        (directory / "config.json").write_text(json.dumps(config))
        save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
        return transformers_models.plain(directory, dtype)


def checkpoint(directory: Path, marks: tuple[str, ...], decode: Decode) -> dict[str, Any]:
    """Every tensor of a directory; modules that have a tensor called like one of `marks` have one decoded `weight`."""
    from safetensors.torch import load_file

    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    loaded = {n: t for file in sorted(directory.glob("*.safetensors")) for n, t in load_file(file).items()}
    decoded = {}
    for module in sorted({n.removesuffix(f".{mark}") for n in loaded for mark in marks if n.endswith(f".{mark}")}):
        parts = {n.removeprefix(f"{module}."): loaded.pop(n) for n in list(loaded) if n.startswith(f"{module}.")}
        if "bias" in parts:
            loaded[f"{module}.bias"] = parts.pop("bias")
        decoded[f"{module}.weight"] = decode(parts, module, config)
    if not decoded:
        raise AssertionError(f"{directory}: no module is quantized")
    return loaded | decoded


def compressed_tensors(parts: dict[str, Any], module: str, config: dict[str, Any]) -> Any:
    """By the compressor of compressed-tensors that the config names for this module."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    parsed, linear = QuantizationConfig.model_validate(config), torch.nn.Linear(1, 1)
    if is_match(module, linear, parsed.ignore or []):
        raise AssertionError(f"{module} is quantized and ignored")
    (scheme,) = [g for g in parsed.config_groups.values() if is_match(module, linear, g.targets)]
    compressor = BaseCompressor.get_value_from_registry(scheme.format or parsed.format)
    return compressor.decompress(parts, scheme)["weight"]


def gptqmodel(parts: dict[str, Any], module: str, config: dict[str, Any]) -> Any:
    """By the layer of gptqmodel that decodes, in the version of the format that the config names."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    bits, (length, rows) = config["bits"], (len(parts["g_idx"]), parts["scales"].shape[1])
    size, sym, is_v1 = config["group_size"], config["sym"], config["checkpoint_format"] == "gptq"
    layer = TorchLinear(bits, size, sym, config["desc_act"], length, rows, format=FORMAT(config["checkpoint_format"]))
    layer.load_state_dict(parts)
    if is_v1:
        convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
    layer.post_init()
    return layer.eval().dequantize_weight().T


def awq(parts: dict[str, Any], module: str, config: dict[str, Any]) -> Any:
    """By gptqmodel's function for AWQ."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    size = config["group_size"] if config["group_size"] > 0 else parts["qweight"].shape[0]
    return dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], config["bits"], size).T


def bitsandbytes(parts: dict[str, Any], module: str, config: dict[str, Any]) -> Any:
    """By bitsandbytes: 4 bits with what the file says of them, or LLM.int8."""
    import torch
    from bitsandbytes import functional

    packed = parts.pop("weight")
    if "SCB" in parts:
        return functional.int8_vectorwise_dequant(packed, parts["SCB"])
    state = functional.QuantState.from_dict({f"weight.{k}": v for k, v in parts.items()}, torch.device("cpu"))
    return functional.dequantize_4bit(packed, state)


def mlx(parts: dict[str, Any], module: str, config: dict[str, Any]) -> Any:
    """By mlx.core, in the mode that the config names."""
    import mlx.core as mx
    import torch

    mx.set_default_device(mx.cpu)
    own = config.get(module)
    kind = {k: (own if isinstance(own, dict) else config)[k] for k in ("group_size", "bits", "mode")}

    def array(t: Any) -> Any:
        return mx.array(t.view(torch.uint16).numpy()).view(mx.bfloat16) if t.dtype is torch.bfloat16 else mx.array(t)

    biases = array(parts["biases"].contiguous()) if "biases" in parts else None
    weight = mx.dequantize(mx.array(parts["weight"].numpy()), array(parts["scales"]), biases, **kind)
    return torch.from_numpy(np.array(weight.astype(mx.float32)))


def modelopt(parts: dict[str, Any], module: str, config: dict[str, Any]) -> Any:
    """By the tensor of NVIDIA's Model Optimizer, NVFP4."""
    import torch
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    packed, size = parts["weight"], config["group_size"]
    tensor = NVFP4QTensor((packed.shape[0], 2 * packed.shape[1]), torch.float32, packed)
    scales = {"scale": parts["weight_scale"], "double_scale": parts["weight_scale_2"]}
    return tensor.dequantize(torch.float32, **scales, block_sizes={-1: size})


def comfyui(file: Path) -> dict[str, Any]:
    """Every tensor of a file of scaled FP8, decoded by ComfyUI's own kernels for a CPU."""
    import comfy_kitchen
    import torch
    from safetensors.torch import load_file

    loaded = load_file(file)
    loaded.pop("scaled_fp8", None)
    for name in [n for n, t in loaded.items() if t.dtype is torch.float8_e4m3fn]:
        module = name.removesuffix(".weight")
        (scale,) = [loaded.pop(n) for n in (f"{module}.scale_weight", f"{module}.weight_scale") if n in loaded]
        loaded[name] = comfy_kitchen.dequantize_per_tensor_fp8(loaded[name], scale, torch.float32)
    return loaded
