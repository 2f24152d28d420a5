"""MLX checkpoints: the layout, the sink and the reader. docs/formats/mlx.md.

One module `P` of [N, K] weights, a linear layer or an embedding, of b bits in groups of g:

    P.weight  uint32 [N, K b / 32]   the code stream of schemes.py
    P.scales  [N, K / g]             in the weights' dtype (affine), or uint8 (mxfp4, mxfp8, nvfp4)
    P.biases  [N, K / g]             in the weights' dtype, affine only

A module is quantized where `P.scales` exists. Source: ml-explore/mlx-lm, mlx_lm/utils.py, version 0.32; the grids are
those of ml-explore/mlx, `mlx.core.quantize`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, KERNEL_DTYPES
from ..errors import FormatError, SchemeError
from ..schemes import Scheme
from ..tensor import QuantizedTensor
from . import Codes, Entry, Place, TensorInfo, row_parts
from .ignored_modules import module_of
from .model_sink import ModelSink, Stored, kept
from .pieces import Piece
from .stored_model import StoredModel

# The schemes as MLX quantizes them, by those that say the same with another rule for the scales; and their modes.
NAMES = {"mxfp4": "mxfp4_ceil", "mxfp8": "mxfp8_ceil", "nvfp4": "nvfp4_local"}
MODES = {"mxfp4_ceil": "mxfp4", "mxfp8_ceil": "mxfp8", "nvfp4_local": "nvfp4"}


class MlxSink(ModelSink):
    """Writes a model directory for mlx_lm. See `ModelSink`."""

    format = "mlx"
    # mlx_lm fuses no matrices.
    fused_alike = False
    # What mlx_lm quantizes itself, beside linear layers.
    quantizes = frozenset({"embedding", "head"})

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme with scales in the weights' own dtype, and with MLX's rule for the scales. See `Sink`."""
        stored = Scheme.parse(NAMES.get(scheme.id, scheme.id))
        if stored.family != "affine" and stored.id not in MODES:
            raise FormatError(
                f"mlx has affine2 to affine8 in groups of 32, 64 or 128, and {', '.join(NAMES)}, not {scheme.id}; use "
                f"affine{min(scheme.bits, 8)}_g64"
            )
        if len(info.shape) != 2 or not info.name.endswith(".weight"):
            raise FormatError("mlx quantizes only 2-D weights of modules, named MODULE.weight")
        if info.dtype not in KERNEL_DTYPES:
            raise FormatError(f"mlx has weights of {', '.join(KERNEL_DTYPES)}, not of {info.dtype}")
        if info.shape[1] % stored.group_length(info.shape[1]):
            raise FormatError(
                f"rows of {info.shape[1]} weights are not whole groups of {stored.group_size}, as mlx needs"
            )
        if stored.family != "affine":
            return stored
        if scheme.scale_dtype not in ("float32", info.dtype):
            raise FormatError(
                f"mlx stores scales in the weights' dtype {info.dtype}, not in {scheme.scale_dtype}; leave the suffix "
                f"out"
            )
        return dataclasses.replace(stored, scale_dtype=info.dtype)

    def tensors(self, entry: Entry) -> Stored:
        """See `ModelSink`."""
        return kept(entry) if entry.scheme is None else stored_tensors(entry.info, entry.scheme)

    def quantized_places(self, piece: Piece, scheme: Scheme) -> list[Place]:
        """See `ModelSink`."""
        module, found = module_of(piece.entry), row_parts.spans(piece, scheme)
        parts = zip(("weight", "scales", "biases"), found, strict=True)
        return [self.place(f"{module}.{part}", *span) for part, span in parts if span is not None]

    def quantized_arrays(self, piece: Piece, scheme: Scheme, codes: Codes) -> list[NDArray[Any]]:
        """See `ModelSink`."""
        return row_parts.arrays(piece, scheme, codes)

    def quantization(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """The settings of most modules, and those of each other module by its name. See `ModelSink`."""
        found = {module_of(e): _settings(e.scheme) for e in entries if e.scheme is not None}
        common = Counter(tuple(settings.items()) for settings in found.values()).most_common(1)[0][0]
        settings = dict(common) | {module: own for module, own in found.items() if tuple(own.items()) != common}
        return {"quantization": settings, "quantization_config": settings}

    def described(self, provenance: Mapping[str, str]) -> str:
        """See `ModelSink`."""
        return f"{provenance.get('scheme', 'integers')}, in the format of MLX"


class MlxCheckpoint(StoredModel):
    """Reads a quantized model directory of mlx_lm, from this package or another. See `StoredModel`."""

    format = "mlx"

    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """See `StoredModel`."""
        settings = config.get("quantization")
        if not isinstance(settings, dict):
            raise self.fail("config.json has no quantization: this is no quantized model of MLX")
        modules = [name.removesuffix(".scales") for name in self.headers if name.endswith(".scales")]
        found = {f"{module}.weight": self._entry(module, settings, config) for module in modules}
        parts = {part for entry in found.values() for part in stored_tensors(entry.info, entry.scheme)}
        return self.with_kept(found, parts)

    def quantized_blocks(self, entry: Entry, scheme: Scheme) -> Iterator[tuple[int, QuantizedTensor]]:
        """See `StoredModel`."""
        module = module_of(entry)
        packed = self.view(self.headers[f"{module}.weight"]).view(np.uint8)
        scales = self.view(self.headers[f"{module}.scales"])
        biases = self.view(self.headers[f"{module}.biases"]) if scheme.family == "affine" else None
        yield from row_parts.blocks(packed, scales, biases, entry.info, scheme)

    def _entry(self, module: str, settings: Mapping[str, Any], config: Mapping[str, Any]) -> Entry:
        """The float tensor of a module, all of whose parts are checked against each other."""
        own = settings.get(module)
        merged: dict[str, Any] = {**settings, **(own if isinstance(own, dict) else {})}
        mode, size, bits = merged.get("mode"), merged.get("group_size"), merged.get("bits")
        words, scales = self.headers.get(f"{module}.weight"), self.headers[f"{module}.scales"]
        if words is None or words.dtype != "uint32" or len(words.shape) != 2:
            raise self.fail(f"{module}.scales has no {module}.weight of 2-D uint32 beside it")
        dtype, ids = scales.dtype, {mode: scheme for scheme, mode in MODES.items()}
        try:
            if mode in (None, "affine") and isinstance(bits, int):
                scheme = Scheme(bits, "group", size, False, scales.dtype, "affine")
            elif mode in ids:
                scheme = Scheme.parse(ids[mode])
                dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
            else:
                raise self.fail(
                    f"{module}: mode {mode!r} of {bits!r} bits; affine, {', '.join(ids)} are what can be read"
                )
        except (SchemeError, TypeError) as e:
            raise self.fail(f"{module}: {e}") from e
        if dtype not in KERNEL_DTYPES:
            raise self.fail(f"{module}: weights of {dtype}; expected one of {', '.join(KERNEL_DTYPES)}")
        shape = words.shape[0], words.shape[1] * 32 // scheme.bits
        info = TensorInfo(f"{module}.weight", dtype, shape, words.file, words.offset, 0)
        info = dataclasses.replace(info, n_bytes=shape[0] * shape[1] * DTYPES[dtype].bits // 8)
        for part, expected in stored_tensors(info, scheme).items():
            there = self.headers.get(part)
            if there is None or (there.dtype, there.shape) != expected or shape[1] % scheme.group_length(shape[1]):
                has = "is missing" if there is None else f"is {there.dtype} {list(there.shape)}"
                raise self.fail(f"{part} {has}; {scheme.id} {list(shape)} has {expected[0]} {list(expected[1])}")
        return Entry(info, scheme, "packed")


def stored_tensors(info: TensorInfo, scheme: Scheme | None) -> Stored:
    """What a quantized tensor becomes in the file. `info` is that of the float tensor.

    >>> from pathlib import Path
    >>> info = TensorInfo("fc.weight", "bfloat16", (8, 64), Path("m"), 0, 1024)
    >>> stored_tensors(info, Scheme.parse("affine4_g32_bf16"))["fc.weight"]
    ('uint32', (8, 8))
    """
    assert scheme is not None
    module, (n, k) = info.name.removesuffix(".weight"), info.shape
    groups = scheme.scales_shape(info.shape)
    stored: Stored = {
        info.name: ("uint32", (n, k * scheme.bits // 32)),
        f"{module}.scales": (scheme.scale_storage, groups),
    }
    if scheme.family == "affine":
        stored[f"{module}.biases"] = (scheme.scale_storage, groups)
    return stored


def _settings(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": MODES.get(scheme.id, "affine")}
