"""compressed-tensors: which of its formats holds which scheme, what a module becomes in it, what config.json says.

One linear module `P` of [N, K] weights of b bits (docs/formats/compressed_tensors.md):

    pack-quantized        P.weight_packed        int32 [N, ceil(K b / 32)]   the code stream of schemes.py, whole words
                          P.weight_scale         weights' dtype [N, groups]
                          P.weight_shape         int64 [2]                   N, K
                          P.weight_zero_point    int32 [ceil(N b / 32), groups], asymmetric only: down each column
    int-quantized         P.weight               int8 [N, K]                 signed codes
                          P.weight_scale         [N, 1]
    float-quantized       P.weight               float8_e4m3fn [N, K]
                          P.weight_scale         [1], [N, 1] or [ceil(N / 128), K / 128]
    nvfp4-pack-quantized  P.weight_packed        uint8 [N, K / 2]            the first of two codes in the low bits
                          P.weight_scale         float8_e4m3fn [N, K / 16]
                          P.weight_global_scale  float32 [1]                 what scales were multiplied by
    mxfp4-pack-quantized  P.weight_packed        uint8 [N, K / 2]
                          P.weight_scale         uint8 [N, K / 32]           exponents, with a bias of 127
    mxfp8-quantized       P.weight               float8_e4m3fn [N, K]
                          P.weight_scale         uint8 [N, K / 32]

Codes and zero points of pack-quantized are stored as in this package, offset by 2**(b-1). Source:
vllm-project/compressed-tensors, compressors/ and quantization/quant_config.py, versions 0.12 to 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import SchemeError
from ..schemes import SCALE_SUFFIXES, Scheme
from . import TensorInfo
from .model_sink import Stored

# The widths whose packing every version of the readers agrees on, and which divide a 32-bit word.
BITS = (2, 4, 8)

PACKED, INTS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"


class Container(NamedTuple):
    """One format of compressed-tensors.

    codes, dtype: what the tensor of the codes is called after `weight`, and its type
    scales: the type of its scales, None for that of the scheme
    """

    codes: str
    dtype: str
    scales: str | None = None


CONTAINERS: Mapping[str, Container] = {
    PACKED: Container("_packed", "int32"),
    INTS: Container("", "int8"),
    FLOATS: Container("", "float8_e4m3fn"),
    NVFP4: Container("_packed", "uint8", "float8_e4m3fn"),
    MXFP4: Container("_packed", "uint8", "uint8"),
    MXFP8: Container("", "float8_e4m3fn", "uint8"),
}

# Of schemes with a name: the format, and the scheme with the rule that compressed-tensors itself has for the scales.
_NAMED = {
    "nvfp4": (NVFP4, "nvfp4"),
    "mxfp4": (MXFP4, "mxfp4_round"),
    "mxfp4_round": (MXFP4, "mxfp4_round"),
    "mxfp4_ceil": (MXFP4, "mxfp4_ceil"),
    "mxfp8": (MXFP8, "mxfp8_round"),
    "mxfp8_round": (MXFP8, "mxfp8_round"),
    "mxfp8_ceil": (MXFP8, "mxfp8_ceil"),
}


def container(scheme: Scheme, activations: str = "none") -> tuple[str, Scheme] | None:
    """The format for a scheme, and the scheme that it has there; None where there is no format for it.

    activations: "none", or "dynamic" where an engine is to quantize them too

    >>> container(Scheme.parse("mxfp4"))[1].id, container(Scheme.parse("int8_channel"), "dynamic")[0]
    ('mxfp4_round', 'int-quantized')
    """
    if scheme.id in _NAMED:
        name, stored = _NAMED[scheme.id]
        return (name, Scheme.parse(stored)) if activations == "none" else None
    if scheme.grid == "e4m3" and scheme.granularity in ("tensor", "channel", "block"):
        return FLOATS, scheme
    if scheme.grid != "int" or scheme.granularity not in ("group", "channel"):
        return None
    if activations == "none":
        return (PACKED, scheme) if scheme.bits in BITS else None
    return (INTS, scheme) if scheme.bits == 8 and scheme.granularity == "channel" and scheme.symmetric else None


def n_words(n: int, bits: int) -> int:
    """32-bit words that hold n codes."""
    return -(-n * bits // 32)


def stored_tensors(info: TensorInfo, scheme: Scheme | None, name: str = PACKED) -> Stored:
    """What a tensor becomes in the format `name`: name -> (dtype, shape). `info` is that of the float tensor.

    >>> from pathlib import Path
    >>> info = TensorInfo("fc.weight", "bfloat16", (8, 64), Path("m"), 0, 1024)
    >>> stored_tensors(info, Scheme.parse("int4_g32_bf16"))["fc.weight_packed"]
    ('int32', (8, 8))
    >>> stored_tensors(info, Scheme.parse("e4m3_tensor"), FLOATS)["fc.weight_scale"]
    ('float32', (1,))
    """
    if scheme is None:
        return {info.name: (info.dtype, info.shape)}
    found, (n, k), scales = CONTAINERS[name], info.shape, scheme.scales_shape(info.shape)
    columns = n_words(k, scheme.bits) if name == PACKED else scheme.packed_shape(info.shape)[1]
    stored: Stored = {
        f"{info.name}{found.codes}": (found.dtype, (n, columns)),
        f"{info.name}_scale": (
            found.scales or scheme.scale_dtype,
            (1,) if scheme.granularity == "tensor" else scales,
        ),
    }
    if name == PACKED:
        stored[f"{info.name}_shape"] = ("int64", (2,))
        if not scheme.symmetric:
            stored[f"{info.name}_zero_point"] = ("int32", (n_words(n, scheme.bits), scales[1]))
    if name == NVFP4:
        stored[f"{info.name}_global_scale"] = ("float32", (1,))
    return stored


def weight_arguments(scheme: Scheme) -> dict[str, Any]:
    """What config.json says of the weights of a scheme: only keys that every version of the readers knows."""
    is_int, is_plain = scheme.grid == "int", scheme.scale_dtype in SCALE_SUFFIXES
    arguments: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if is_int else "float",
        "symmetric": scheme.symmetric,
        "strategy": "tensor_group" if scheme.scale_rule == "global" else scheme.granularity,
        "group_size": scheme.group_size if scheme.granularity == "group" else None,
        "dynamic": False,
    }
    if scheme.granularity == "block":
        arguments["block_structure"] = [scheme.group_size, scheme.group_size]
    if not is_plain:
        arguments["scale_dtype"] = "torch.float8_e4m3fn" if scheme.scale_dtype == "e4m3" else "torch.uint8"
    return arguments


def activation_arguments(scheme: Scheme, activations: str) -> dict[str, Any] | None:
    """What config.json says of activations: quantized while the model runs, or not at all.

    What has squares of weights has its activations in groups of as many: there is no engine that has one without the
    other.
    """
    if scheme.granularity != "block" and activations == "none":
        return None
    arguments = {"num_bits": 8, "type": "int" if scheme.grid == "int" else "float", "symmetric": True, "dynamic": True}
    if scheme.granularity == "block":
        return {**arguments, "strategy": "group", "group_size": scheme.group_size}
    return {**arguments, "strategy": "token"}


def parsed(arguments: Mapping[str, Any], name: str, scale_dtype: str) -> Scheme:
    """The scheme of the weights that config.json describes so, in the format `name`; scales are of `scale_dtype`.

    Raises SchemeError with a reason for what this package has no scheme for.
    """
    bits, size = (found if type(found := arguments.get(key)) is int else 0 for key in ("num_bits", "group_size"))
    strategy = str(arguments.get("strategy"))
    is_symmetric, is_int = bool(arguments.get("symmetric", True)), arguments.get("type") == "int"
    if name not in CONTAINERS:
        raise SchemeError(f"compressed-tensors format {name!r}; {', '.join(CONTAINERS)} are what can be read")
    if is_int != (name in (PACKED, INTS)):
        raise SchemeError(f"type {arguments.get('type')!r} in the format {name}")
    if arguments.get("actorder") == "group":
        raise SchemeError("activation order (actorder: group) cannot be read")
    if name == PACKED and bits not in BITS:
        raise SchemeError(
            f"{arguments.get('num_bits')}-bit codes, whose layout depends on what wrote them, cannot be read"
        )
    if name != PACKED and not is_symmetric:
        raise SchemeError(f"zero points in the format {name} cannot be read")
    fixed = {NVFP4: (4, 16, "nvfp4"), MXFP4: (4, 32, "mxfp4_round"), MXFP8: (8, 32, "mxfp8_round")}
    if name in fixed:
        if (bits, size) != fixed[name][:2]:
            raise SchemeError(f"{bits} bits in groups of {size} in the format {name}")
        return Scheme.parse(fixed[name][2])
    if name != PACKED and bits != 8:
        raise SchemeError(f"{bits} bits in the format {name}")
    allowed = ("group", "channel") if name == PACKED else ("group", "channel", "tensor", "block")
    if strategy not in allowed:
        raise SchemeError(f"strategy {strategy!r}; {', '.join(allowed)} are what can be read in the format {name}")
    if strategy == "block":
        structure = arguments.get("block_structure")
        if structure != [128, 128]:
            raise SchemeError(f"block_structure {structure!r}; [128, 128] is what can be read")
        size = 128
    group_size = size if strategy in ("group", "block") else None
    return Scheme(bits, strategy, group_size, is_symmetric, scale_dtype, "int" if is_int else "e4m3")
