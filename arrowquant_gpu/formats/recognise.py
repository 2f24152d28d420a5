"""What a thing is that is not a float safetensors checkpoint, in words: tables, and the few lines that read them.

Files are known by their first bytes and by their suffix, quantized checkpoints by config.json, by the files beside
it and by the names and types of their tensors. What is refused, and with which words: docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from . import TensorInfo

TO_SAFETENSORS = (
    "convert it first: load the model with transformers and call model.save_pretrained(folder, "
    "safe_serialization=True), or torch.load(file, weights_only=True) and safetensors.torch.save_file"
)
ORIGINAL = "start from the original float checkpoint in safetensors"
REQUANTIZE = (
    f"{ORIGINAL}; --allow-requantize decodes what this program can read, and quantizes it again, with both errors"
)
# The published files of gpt-oss, which have no float original. In its original format transformers 5 would save the
# decoded weights under the names of their codes.
MXFP4_COPY = (
    "a bfloat16 copy can be read, which transformers makes: GptOssForCausalLM.from_pretrained(folder, "
    "quantization_config=Mxfp4Config(dequantize=True)).save_pretrained(copy, save_original_format=False)"
)
DEQUANTIZE = "`arrowquant dequantize` turns such a result of this program back into float safetensors"
# Its weights may be in float too, which the first bytes do not tell.
GGUF = (
    f"a GGUF file, made for llama.cpp; {ORIGINAL}; --allow-requantize reads it, and decodes what is quantized in it, "
    "which then has both errors"
)

# How files begin that are met under the name of a checkpoint; compared in lower case, after white space.
FIRST_BYTES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights; run `git lfs pull`, or download the file again"),
    (b"<!doctype", "an HTML page, not weights; the download ended on a login or error page"),
    (b"<html", "an HTML page, not weights; the download ended on a login or error page"),
    (b"<?xml", "an XML text, not weights; the download ended on an error page"),
    (b"gguf", GGUF),
    (b"pk\x03\x04", f"a zip archive, as torch.save writes; {TO_SAFETENSORS}"),
    *((bytes([0x80, v, op]), f"a Python pickle; {TO_SAFETENSORS}") for v in (2, 3, 4, 5) for op in (*b"\x8a\x95c}",)),
    (b"\x89hdf", f"an HDF5 file; {TO_SAFETENSORS}"),
    (b"arrow1", f"an Arrow file; {DEQUANTIZE}"),
    (b"par1", f"a Parquet file; {DEQUANTIZE}"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    *((b"{" + c, "a JSON text, not weights; give the model directory") for c in (b'"', b"\n", b"\r", b" ", b"}")),
)

# Weights in formats that are not read, by file name.
SUFFIXES: tuple[tuple[str, str], ...] = (
    *((s, f"a PyTorch checkpoint; {TO_SAFETENSORS}") for s in (".bin", ".pt", ".pth", ".ckpt", ".pkl")),
    (".gguf", GGUF),
    (".ggml", f"a GGML file, made for llama.cpp; {ORIGINAL}"),
    (".onnx", f"an ONNX model; {ORIGINAL}"),
    *((s, f"a TensorFlow or Keras checkpoint; {TO_SAFETENSORS}") for s in (".h5", ".keras", ".tflite", ".pb")),
    (".msgpack", f"a Flax checkpoint; {TO_SAFETENSORS}"),
    *((s, "a NumPy archive; write it with safetensors.numpy.save_file") for s in (".npz", ".npy")),
    *((s, f"not a safetensors file; {DEQUANTIZE}") for s in (".parquet", ".arrow", ".feather")),
)

# Keys of config.json that only quantized checkpoints have, with who writes them.
QUANTIZED_KEYS: tuple[tuple[str, str], ...] = (
    ("quantization_config", "transformers"),
    ("compression_config", "compressed-tensors"),
    ("quantization", "MLX"),
)

# Files that only quantized checkpoints have.
QUANTIZED_FILES: tuple[tuple[str, str], ...] = (
    ("quantize_config.json", "GPTQ"),
    ("quant_config.json", "AWQ"),
    ("hf_quant_config.json", "ModelOpt"),
    ("quantization_map.json", "optimum-quanto"),
    ("quanto_qmap.json", "optimum-quanto"),
    ("qmodel.pt", "HQQ"),
    ("mlc-chat-config.json", "MLC"),
    ("model.parquet.index.json", "parquet-tensors of this program"),
)


class Mark(NamedTuple):
    """Two tensors `p + suffix` and `p + beside`, the latter of one of `dtypes` (any where empty), mean `what`."""

    suffix: str
    beside: str
    dtypes: frozenset[str]
    what: str


_EIGHT = frozenset({"int8", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"})
_BYTES = frozenset({"uint8"})
_ANY: frozenset[str] = frozenset()

TENSOR_MARKS: tuple[Mark, ...] = (
    Mark(".weight_packed", ".weight_scale", _ANY, "compressed-tensors"),
    Mark(".g_idx", ".qweight", frozenset({"int32"}), "GPTQ"),
    Mark(".qzeros", ".qweight", frozenset({"int32"}), "GPTQ or AWQ"),
    Mark(".scales", ".qweight", frozenset({"int32"}), "GPTQ or AWQ"),
    Mark(".weight_scale_inv", ".weight", _EIGHT, "FP8 blocks"),
    Mark(".weight_scale_2", ".weight", _EIGHT, "ModelOpt NVFP4"),
    Mark(".weight_scale", ".weight", _EIGHT, "compressed-tensors or FP8 with scales"),
    Mark(".scale_weight", ".weight", _EIGHT, "scaled FP8"),
    Mark(".SCB", ".weight", frozenset({"int8"}), "bitsandbytes LLM.int8"),
    Mark(".weight.absmax", ".weight", _ANY, "bitsandbytes 4 bit"),
    Mark(".scales", ".weight", frozenset({"uint32"}), "MLX"),
    Mark("_scales", "_blocks", _BYTES, "MXFP4"),
    Mark(".scales", ".packed", _BYTES, "packed safetensors of this program"),
    Mark(".scale", ".W_q", _ANY, "HQQ"),
    Mark("_weight_scale", "_weight_qdata", _ANY, "torchao"),
    Mark("._scale", "._data", _ANY, "optimum-quanto"),
)


def by_first_bytes(head: bytes) -> str | None:
    """What a file that begins with `head` is, or None if that says nothing.

    >>> by_first_bytes(b"GGUF\\x03")[:11]
    'a GGUF file'
    """
    # A header of 9044608 bytes begins like a pickle, one of 2683 like a JSON text.
    if head[8:9] == b"{":
        return None
    begin = head.lstrip().lower()
    return next((what for magic, what in FIRST_BYTES if begin.startswith(magic)), None)


def by_suffix(name: str) -> str | None:
    """What a file of this name is, where its suffix says that it holds weights in a format that is not read."""
    return next((what for suffix, what in SUFFIXES if name.lower().endswith(suffix)), None)


def quantized_config(config: Mapping[str, Any]) -> str | None:
    """The method by which config.json, or a part of it, says that the model is quantized; None where it does not.

    >>> quantized_config({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'config.json has quantization_config with quant_method gptq'
    """
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key, writer in QUANTIZED_KEYS:
            found = part.get(key)
            if isinstance(found, dict) and found:
                method = found.get("quant_method")
                return f"config.json has {key} " + (f"with quant_method {method}" if method else f"as {writer} writes")
    return None


def quantized_files(names: Iterable[str]) -> str | None:
    """The file among `names` that only a quantized checkpoint has, with its format, or None."""
    names = set(names)
    return next((f"{name} ({what})" for name, what in QUANTIZED_FILES if name in names), None)


def quantized_tensors(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The first pair of tensors that only a quantized checkpoint has, with its format, or None."""
    suffixes = tuple({mark.suffix for mark in TENSOR_MARKS})
    marked = [name for name in tensors if name.endswith(suffixes)]
    for mark in TENSOR_MARKS:
        for name in marked:
            info = tensors.get(name.removesuffix(mark.suffix) + mark.beside) if name.endswith(mark.suffix) else None
            if info is not None and (not mark.dtypes or info.dtype in mark.dtypes):
                return f"tensors {info.name} ({info.dtype}) and {name} ({mark.what})"
    return None
