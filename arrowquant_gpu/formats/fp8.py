"""FP8 checkpoints with a scale for each square of 128 weights, as DeepSeek and Qwen publish them: layout, sink, reader.

One linear module `P` of [N, K] weights (docs/formats/fp8.md):

    P.weight            float8_e4m3fn [N, K]
    P.weight_scale_inv  float32 [ceil(N / 128), ceil(K / 128)]   what codes are multiplied by, in spite of the name

Source: huggingface/transformers, quantizers/quantizer_finegrained_fp8.py and integrations/finegrained_fp8.py, 5.23;
vllm-project/vllm, layers/quantization/fp8.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import KERNEL_DTYPES
from ..errors import FormatError
from ..schemes import Scheme
from ..tensor import QuantizedTensor
from . import Codes, Entry, Place, TensorInfo, row_parts
from .engine_rules import Rule, broken
from .ignored_modules import TIED_HEADS, ignore_list, misfit, module_of
from .model_sink import ModelSink, Stored, kept
from .pieces import Piece
from .stored_model import StoredModel, packed_entry

SCHEME = Scheme.parse("e4m3_b128")
CODES = "float8_e4m3fn"

RULES = (
    Rule(
        "transformers",
        "without a GPU takes weights apart into as many squares as there are scales, which are not of 128 weights in "
        "{what}: it refuses or misreads them.",
        lambda info, scheme: any(n % 128 for n in info.shape),
    ),
    Rule(
        "vLLM",
        "wants whole squares in every matrix that it fuses or splits; {what} have others.",
        lambda info, scheme: any(n % 128 for n in info.shape),
    ),
)


class Fp8Sink(ModelSink):
    """Writes a model directory. See `ModelSink`."""

    format = "fp8"
    fused_alike = True

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """e4m3_b128 and nothing else. See `Sink`."""
        if scheme != SCHEME:
            raise FormatError(f"fp8 has {SCHEME} only, not {scheme}; use that")
        if (reason := misfit(info, self.config, self.format)) is not None:
            raise FormatError(reason)
        return scheme

    def warnings(self, entries: Sequence[Entry]) -> list[str]:
        """What engines refuse or misread of these, though the format has it."""
        found = broken(RULES, entries)
        # transformers looks for these names at the beginning and at the end of others.
        names = _ignored(entries, self.config)
        taken = [n for e in entries if e.scheme and (n := module_of(e)) and any(_is_taken(n, name) for name in names)]
        if taken:
            found.append(
                f"transformers would take {len(taken)} modules (first: {taken[0]}) for some that stay in float, whose "
                f"names they begin or end with."
            )
        return found

    def tensors(self, entry: Entry) -> Stored:
        """See `ModelSink`."""
        return kept(entry) if entry.scheme is None else stored_tensors(entry.info)

    def quantized_places(self, piece: Piece, scheme: Scheme) -> list[Place]:
        """See `ModelSink`."""
        name, found = piece.entry.info.name, row_parts.spans(piece, scheme)
        assert found.scales is not None
        return [self.place(name, *found.packed), self.place(f"{name}_scale_inv", *found.scales)]

    def quantized_arrays(self, piece: Piece, scheme: Scheme, codes: Codes) -> list[NDArray[Any]]:
        """See `ModelSink`."""
        return row_parts.arrays(piece, scheme, codes)

    def described(self, provenance: Mapping[str, str]) -> str:
        """See `ModelSink`."""
        return "FP8 (E4M3) with a scale for each square of 128 weights"

    def quantization(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """See `ModelSink`."""
        quantization = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": _ignored(entries, self.config),
        }
        return {"quantization_config": quantization}


class Fp8Checkpoint(StoredModel):
    """Reads such a model directory, from this package or another, and those with one scale per tensor. See
    `StoredModel`."""

    format = "fp8"

    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """See `StoredModel`."""
        found = config.get("quantization_config")
        if not isinstance(found, dict) or found.get("quant_method") != "fp8":
            raise self.fail("config.json has no quantization_config with quant_method fp8")
        block = found.get("weight_block_size")
        if block not in (None, [128, 128]):
            raise self.fail(f"weight_block_size {block!r}; [128, 128], or one scale per tensor, is what can be read")
        entries, parts = {}, set[str]()
        for name, info in self.headers.items():
            scale = f"{name}_scale_inv" if f"{name}_scale_inv" in self.headers else f"{name}_scale"
            if info.dtype == CODES and name.endswith(".weight"):
                entries[name] = self._entry(info, scale, has_blocks=block is not None)
                module = name.removesuffix("weight")
                parts |= {name, scale, f"{module}input_scale", f"{module}activation_scale"}
        return self.with_kept(entries, parts)

    def quantized_blocks(self, entry: Entry, scheme: Scheme) -> Iterator[tuple[int, QuantizedTensor]]:
        """See `StoredModel`."""
        name = entry.info.name
        scale = f"{name}_scale_inv" if f"{name}_scale_inv" in self.headers else f"{name}_scale"
        scales = row_parts.as_scales(self.view(self.headers[scale]), entry.info.shape, scheme)
        yield from row_parts.blocks(self.view(self.headers[name]).view(np.uint8), scales, None, entry.info, scheme)

    def _entry(self, codes: TensorInfo, scale: str, *, has_blocks: bool) -> Entry:
        found = self.headers.get(scale)
        if len(codes.shape) != 2:
            raise self.fail(f"{codes.name} is {codes.dtype} {list(codes.shape)}, no matrix")
        if found is None or found.dtype not in KERNEL_DTYPES:
            has = "is missing" if found is None else f"is {found.dtype}; expected one of {', '.join(KERNEL_DTYPES)}"
            raise self.fail(f"{codes.name} is {codes.dtype}, and {scale} {has}")
        granularity, size = ("block", 128) if has_blocks else ("tensor", None)
        scheme = Scheme(8, granularity, size, scale_dtype=found.dtype, grid="e4m3")
        expected = scheme.scales_shape(codes.shape)
        if math.prod(found.shape) != math.prod(expected) or (has_blocks and found.shape != expected):
            raise self.fail(
                f"{scale} is {list(found.shape)}; {scheme.id} {list(codes.shape)} has {list(expected)} scales"
            )
        return packed_entry(codes.name, self.weight_dtype(codes.name), codes.shape, codes, scheme)


def stored_tensors(info: TensorInfo) -> Stored:
    """What a tensor becomes in the file: name -> (dtype, shape). `info` is that of the float tensor.

    >>> from pathlib import Path
    >>> stored_tensors(TensorInfo("fc.weight", "bfloat16", (200, 256), Path("m"), 0, 102400))
    {'fc.weight': ('float8_e4m3fn', (200, 256)), 'fc.weight_scale_inv': ('float32', (2, 2))}
    """
    return {info.name: (CODES, info.shape), f"{info.name}_scale_inv": ("float32", SCHEME.scales_shape(info.shape))}


def _ignored(entries: Sequence[Entry], config: Mapping[str, Any]) -> list[str]:
    return ignore_list(entries, config, TIED_HEADS)


def _is_taken(module: str, ignored: str) -> bool:
    """Whether transformers takes a module for an ignored one: `should_convert_module`."""
    return module.endswith(ignored) or re.match(rf"(?:{ignored})(?:(?<=\.)|(?=\.|$))", module) is not None
