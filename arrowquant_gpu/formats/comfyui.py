"""Scaled FP8 for diffusion models in ComfyUI, one safetensors file: the layout, the sink and the reader.

One linear module `P` of [N, K] weights (docs/formats/comfyui.md):

    P.weight        float8_e4m3fn [N, K]
    P.scale_weight  float32 []            what codes are multiplied by, with `layout=scaled_fp8`; and once in the file
    scaled_fp8      float8_e4m3fn [0]     after the prefix of the model; [2] where activations stay in float
    P.weight_scale  float32 []            the same with `layout=quantization_metadata`, without scaled_fp8; and
                                          `_quantization_metadata`, JSON, in the metadata of the file

Everything else is as in the source. Source: Comfy-Org/ComfyUI, QUANTIZATION.md, comfy/ops.py and comfy/utils.py, whose
`convert_old_quants` makes the second layout of the first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import KERNEL_DTYPES
from ..errors import FormatError
from ..schemes import Scheme
from ..tensor import QuantizedTensor
from . import Checkpoint, Codes, Entry, Place, TensorInfo, row_parts
from .engine_rules import Rule, broken
from .model_sink import ModelSink, Stored, kept
from .pieces import Piece
from .stored_model import StoredModel, packed_entry

SCHEME = Scheme.parse("e4m3_tensor")
CODES = "float8_e4m3fn"
MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"
# What a scale is called after the module, by the layout.
SCALES = {"scaled_fp8": ".scale_weight", "quantization_metadata": ".weight_scale"}
# Where the diffusion model is in a file that holds text encoders and a VAE too.
PREFIX = "model.diffusion_model."

RULES = (
    Rule(
        "ComfyUI",
        "renames the weights of diffusers, but no scales of them; {what} look like some. Start from the model in its "
        "original names, as ComfyUI has it.",
        lambda info, scheme: ".attn.to_q." in info.name or "single_transformer_blocks." in info.name,
    ),
)


class ComfyUISink(ModelSink):
    """Writes one file. See `ModelSink`.

    activations: "dynamic" lets ComfyUI round activations to FP8 too, where the GPU can; "none" has it decode weights
    layout: a key of `SCALES`; every version since scaled FP8 reads the first
    """

    format = "comfyui"
    needs_config = False

    def __init__(
        self, *arguments: Any, activations: str = "dynamic", layout: str = "scaled_fp8", **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        if self._max_shard_size is not None:
            raise FormatError("comfyui is one file, which ComfyUI loads as a whole; leave out --max-shard-size")
        # One file has none, and readers look for the weights' dtype in the file itself.
        self.config = {}
        self.activations, self.layout = activations, layout
        self.prefix = PREFIX if any(name.startswith(PREFIX) for name in self.names) else ""

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """e4m3_tensor and nothing else. See `Sink`."""
        if scheme != SCHEME:
            raise FormatError(f"comfyui has {SCHEME} only, not {scheme}; use that")
        if len(info.shape) != 2 or not info.name.endswith(".weight"):
            raise FormatError(
                "comfyui has scales for linear modules only, 2-D weights named MODULE.weight; --format safetensors "
                "carries others"
            )
        if not info.name.startswith(self.prefix):
            raise FormatError(
                f"not under {self.prefix}, where ComfyUI looks for scales; quantize text encoders in a file of their "
                f"own"
            )
        if info.dtype not in KERNEL_DTYPES:
            raise FormatError(f"comfyui has weights of {', '.join(KERNEL_DTYPES)}, not of {info.dtype}")
        return scheme

    def warnings(self, entries: Sequence[Entry]) -> list[str]:
        """What ComfyUI would not load of these."""
        return broken(RULES, entries)

    def tensors(self, entry: Entry) -> Stored:
        """See `ModelSink`."""
        return kept(entry) if entry.scheme is None else stored_tensors(entry.info, self.layout)

    def quantized_places(self, piece: Piece, scheme: Scheme) -> list[Place]:
        """See `ModelSink`."""
        spans = row_parts.spans(piece, scheme)[:2]
        tensors = zip(stored_tensors(piece.entry.info, self.layout), spans, strict=True)
        return [self.place(tensor, *span) for tensor, span in tensors if span is not None]

    def quantized_arrays(self, piece: Piece, scheme: Scheme, codes: Codes) -> list[NDArray[Any]]:
        """See `ModelSink`."""
        return row_parts.arrays(piece, scheme, codes)

    def file_metadata(self, entries: Sequence[Entry]) -> dict[str, str]:
        """See `ModelSink`."""
        if self.layout != "quantization_metadata":
            return {}
        how = {"format": CODES, **({"full_precision_matrix_mult": True} if self.activations == "none" else {})}
        layers = {e.info.name.removesuffix(".weight"): how for e in entries if e.scheme is not None}
        return {METADATA: json.dumps({"format_version": "1.0", "layers": layers})}

    def file_tensors(self, entries: Sequence[Entry]) -> Stored:
        """The marker, which says by its size whether activations stay in float. See `ModelSink`."""
        if self.layout != "scaled_fp8":
            return {}
        return {f"{self.prefix}{MARKER}": (CODES, (2 if self.activations == "none" else 0,))}

    def shards(self, entries: Sequence[Entry]) -> Iterator[list[Entry]]:
        """One file. See `ModelSink`."""
        yield list(entries)

    def write_beside(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        """Nothing: it is one file. See `ModelSink`."""

    def file_name(self, number: int, n_files: int) -> str:
        """See `ModelSink`."""
        return self._output.target.name

    def described(self, provenance: Mapping[str, str]) -> str:
        """See `ModelSink`. There is no model card beside one file."""
        return "scaled FP8 (E4M3)"

    def quantization(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """See `ModelSink`. There is no config.json beside one file."""
        return {}


class ComfyUICheckpoint(StoredModel):
    """Reads one file in either layout, from this package or another; also with `P.comfy_quant`, JSON as uint8, in place
    of the metadata. See `StoredModel`."""

    format = "comfyui"

    def read_config(self) -> dict[str, Any]:
        """There is none beside one file. See `StoredModel`."""
        return {}

    def weight_files(self) -> list[Path]:
        """The file itself. See `StoredModel`."""
        return [self.path]

    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """See `StoredModel`."""
        self.config = None
        self.provenance = {k: v for k, v in self.records.items() if k != "dtypes"}
        layers = self._layers()
        entries, parts = {}, {f"{PREFIX}{MARKER}", MARKER}
        for name, info in self.headers.items():
            module = name.removesuffix(".weight")
            scale = next((module + s for s in SCALES.values() if module + s in self.headers), None)
            if info.dtype == CODES and name.endswith(".weight") and scale is not None:
                entries[name] = self._entry(info, scale, layers)
                # What is of activations is not read.
                parts |= {name, scale, f"{module}.scale_input", f"{module}.input_scale", f"{module}.comfy_quant"}
        if not entries:
            raise self.fail(
                "no quantized checkpoint but a safetensors file of floats: no FP8 weight has a scale beside it"
            )
        return self.with_kept(entries, parts)

    def quantized_blocks(self, entry: Entry, scheme: Scheme) -> Iterator[tuple[int, QuantizedTensor]]:
        """See `StoredModel`."""
        name = entry.info.name
        codes = self.view(self.headers[name]).view(np.uint8)
        scales = row_parts.as_scales(self.view(self.headers[self._scales[name]]), entry.info.shape, scheme)
        yield from row_parts.blocks(codes, scales, None, entry.info, scheme)

    def _layers(self) -> dict[str, Any]:
        """What the metadata say of each module."""
        self._scales: dict[str, str] = {}
        try:
            described = json.loads(self.metadata.pop(METADATA, "{}"))
            return dict(described.get("layers", {}))
        except (ValueError, RecursionError, TypeError, AttributeError) as e:
            raise self.fail(f"{METADATA} of its metadata cannot be read: {e!r}") from e

    def _entry(self, codes: TensorInfo, scale: str, layers: Mapping[str, Any]) -> Entry:
        module, found = codes.name.removesuffix(".weight"), self.headers[scale]
        how = layers.get(module, {"format": CODES})
        if (own := self.headers.get(f"{module}.comfy_quant")) is not None:
            try:
                how = json.loads(self.view(own).tobytes())
            except (ValueError, RecursionError) as e:
                raise self.fail(f"{own.name} is no JSON: {e}") from e
        if not isinstance(how, dict) or how.get("format") != CODES:
            raise self.fail(f"{module} is described as {str(how)[:100]}; {CODES} is what can be read")
        if found.dtype != "float32" or math.prod(found.shape) != 1:
            raise self.fail(f"{scale} is {found.dtype} {list(found.shape)}; scaled FP8 has one float32")
        self._scales[codes.name] = scale
        return packed_entry(codes.name, self.weight_dtype(codes.name), codes.shape, codes, SCHEME)


def stored_tensors(info: TensorInfo, layout: str) -> Stored:
    """What a tensor becomes in the file: name -> (dtype, shape). `info` is that of the float tensor.

    >>> stored_tensors(TensorInfo("fc.weight", "bfloat16", (8, 64), Path("m"), 0, 1024), "scaled_fp8")
    {'fc.weight': ('float8_e4m3fn', (8, 64)), 'fc.scale_weight': ('float32', ())}
    """
    return {info.name: (CODES, info.shape), info.name.removesuffix(".weight") + SCALES[layout]: ("float32", ())}
