"""The sink for compressed-tensors checkpoints; the layout is in compressed_tensors_layout.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..schemes import SCALE_SUFFIXES, Scheme
from . import Codes, Entry, Place, TensorInfo, row_parts
from .compressed_tensors_layout import (
    BITS,
    INTS,
    PACKED,
    activation_arguments,
    container,
    n_words,
    stored_tensors,
    weight_arguments,
)
from .engine_rules import Rule, broken, is_expert
from .ignored_modules import any_shape, ignore_list, misfit, module_of
from .model_sink import ModelSink, Stored
from .pieces import Cut, Piece

# Group sizes that vLLM's kernels for packed integers (Marlin) have; docs/formats/compressed_tensors.md has the sources.
MARLIN_GROUPS = (32, 64, 128)

# Of all formats; of pack-quantized alone; of int-quantized alone.
RULES = (
    Rule(
        "transformers",
        "with compressed-tensors 0.18 to 0.20 loads zero points only with CompressedTensorsConfig(dequantize=True); "
        "{what} have some.",
        lambda info, scheme: not scheme.symmetric,
    ),
    Rule(
        "transformers",
        "decodes {what} to bfloat16: load the model with dtype bfloat16, or with "
        "CompressedTensorsConfig(dequantize=True).",
        lambda info, scheme: scheme.scale_dtype not in SCALE_SUFFIXES and info.dtype != "bfloat16",
    ),
    Rule(
        "transformers",
        "joins the experts of a layer without their global scales and misreads {what}; use --ignore 'experts', or "
        "another scheme for them.",
        lambda info, scheme: is_expert(info) and scheme.scale_rule == "global",
    ),
    Rule(
        "transformers",
        "joins the experts of a layer, and refuses {what}; use --ignore 'experts', or another scheme for them.",
        lambda info, scheme: is_expert(info) and (not scheme.symmetric or scheme.id in ("mxfp8_round", "mxfp8_ceil")),
    ),
)
PACKED_RULES = (
    Rule(
        "vLLM and SGLang",
        "have packed weights of 4 and 8 bits only; {what} would not load there.",
        lambda info, scheme: scheme.grid == "int" and scheme.bits == 2,
    ),
    Rule(
        "vLLM",
        f"has kernels for groups of {', '.join(map(str, MARLIN_GROUPS))} and for channels only; {{what}} would not "
        "load there.",
        lambda info, scheme: scheme.grid == "int" and scheme.group_size not in (None, *MARLIN_GROUPS),
    ),
    Rule(
        "vLLM",
        "before it padded weights wants rows that are a multiple of 128 long and a number of rows that is one of 64, "
        "in each part of tensor parallelism; that is not so for {what}.",
        lambda info, scheme: scheme.grid == "int" and (info.shape[1] % 128 > 0 or info.shape[0] % 64 > 0),
    ),
)
INT_RULES = (
    Rule(
        "transformers",
        "joins the experts of a layer, and refuses those of int-quantized as {what} are; use --ignore 'experts'.",
        lambda info, scheme: scheme.grid == "int" and is_expert(info),
    ),
)


class CompressedTensorsSink(ModelSink):
    """Writes a model directory; which format of compressed-tensors follows from the scheme. See `ModelSink`.

    activations: "dynamic" has engines quantize activations too, while the model runs: int8_channel is then
        int-quantized (W8A8) instead of pack-quantized, and e4m3 is FP8 for both
    """

    format = "compressed-tensors"
    fused_alike = True

    def __init__(self, *arguments: Any, activations: str = "none", **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.activations = activations

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme as its format holds it: packed integers have scales in the weights' own dtype. See `Sink`."""
        found = container(scheme, self.activations)
        if found is None:
            raise FormatError(f"compressed-tensors: {_why_not(scheme, self.activations)}")
        name, scheme = found
        if (reason := misfit(info, self.config, self.format)) is not None:
            raise FormatError(reason)
        is_plain = scheme.scale_dtype in SCALE_SUFFIXES
        if is_plain and scheme.scale_dtype not in ("float32", info.dtype):
            raise FormatError(
                f"compressed-tensors stores scales in the weights' dtype {info.dtype}, not in {scheme.scale_dtype}; "
                f"leave the suffix out, or use {any_shape(scheme)}"
            )
        if info.shape[1] % scheme.group_length(info.shape[1]):
            raise FormatError(
                f"rows of {info.shape[1]} weights are not whole groups of {scheme.group_size}, as compressed-tensors "
                f"needs; {any_shape(scheme)} carries the rest as a shorter group"
            )
        return dataclasses.replace(scheme, scale_dtype=info.dtype) if name == PACKED else scheme

    def warnings(self, entries: Sequence[Entry]) -> list[str]:
        """What engines refuse or misread of these, though the format has it: a sentence for each broken rule."""
        return broken((*RULES, *(PACKED_RULES if self.activations == "none" else INT_RULES)), entries)

    def tensors(self, entry: Entry) -> Stored:
        """See `ModelSink`."""
        return stored_tensors(entry.info, entry.scheme, "" if entry.scheme is None else self._container(entry.scheme))

    def cut(self, entry: Entry) -> Cut:
        """A word holds the zero points of 32 / bits rows, so these stay together. See `ModelSink`."""
        scheme = entry.scheme
        if scheme is None or scheme.symmetric:
            return Cut(within_rows=True)
        return Cut(rows=32 // scheme.bits)

    def fill(self, entry: Entry) -> None:
        """The shape, which is known before any weight is read. See `ModelSink`."""
        if entry.scheme is not None and self._container(entry.scheme) == PACKED:
            self.put(f"{entry.info.name}_shape", np.array(entry.info.shape, "<i8"))

    def quantized_places(self, piece: Piece, scheme: Scheme) -> list[Place]:
        """See `ModelSink`."""
        name, length = piece.entry.info.name, piece.entry.info.shape[1]
        codes, *beside = self.tensors(piece.entry)
        row_bytes = self._row_bytes(scheme, length)
        column_bytes = piece.column * scheme.bits // 8
        # The last codes of a row are followed by its padding.
        is_end = piece.column + piece.columns == length
        n_codes = piece.rows * ((row_bytes - column_bytes) if is_end else piece.columns * scheme.bits // 8)
        found = [self.place(codes, piece.row * row_bytes + column_bytes, n_codes)]
        _, scales, zeros = row_parts.spans(piece, scheme)
        if scales is not None:
            found.append(self.place(f"{name}_scale", *scales))
        if f"{name}_zero_point" in beside:
            groups = scheme.scales_shape((piece.rows, length))[1]
            first, n = piece.row * scheme.bits // 32, n_words(piece.rows, scheme.bits)
            found.append(self.place(f"{name}_zero_point", first * groups * 4, n * groups * 4))
        elif zeros is not None:
            found.append(self.place(f"{name}_global_scale", *zeros))
        return found

    def quantized_arrays(self, piece: Piece, scheme: Scheme, codes: Codes) -> list[NDArray[Any]]:
        """See `ModelSink`."""
        packed, length, name = codes.packed, piece.entry.info.shape[1], self._container(scheme)
        if name == INTS:
            # Without the offset, as two's complement has it.
            packed = packed ^ np.uint8(scheme.offset)
        elif piece.column + piece.columns == length:
            wanted = self._row_bytes(scheme, length) - piece.column * scheme.bits // 8
            if packed.shape[1] != wanted:
                packed = np.pad(packed, ((0, 0), (0, wanted - packed.shape[1])))
        found = row_parts.arrays(piece, scheme, codes._replace(packed=packed))
        if codes.zeros is not None and scheme.scale_rule != "global":
            found[-1] = _zero_words(codes.zeros, scheme.bits)
        return found

    def described(self, provenance: Mapping[str, str]) -> str:
        """See `ModelSink`."""
        return f"{provenance.get('scheme', 'integers')}, in the format of compressed-tensors"

    def quantization(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """See `ModelSink`."""
        modules: dict[Scheme, list[str]] = {}
        for e in entries:
            if e.scheme is not None:
                # What type the scales have is said by the scales.
                is_plain = e.scheme.scale_dtype in SCALE_SUFFIXES
                scheme = dataclasses.replace(e.scheme, scale_dtype="float32") if is_plain else e.scheme
                modules.setdefault(scheme, []).append(module_of(e))
        schemes = sorted(modules, key=lambda scheme: scheme.id)
        # Beside a class, vLLM never looks for the name of a module that it has fused.
        targets = [["Linear"]] if len(schemes) == 1 else [modules[scheme] for scheme in schemes]
        groups = [self._config_group(scheme, names) for scheme, names in zip(schemes, targets, strict=True)]
        formats = {group["format"] for group in groups}
        quantization = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
            "ignore": ignore_list(entries, self.config),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        return {"quantization_config": quantization}

    def _container(self, scheme: Scheme) -> str:
        found = container(scheme, self.activations)
        assert found is not None  # scheme_for refused it otherwise
        return found[0]

    def _row_bytes(self, scheme: Scheme, length: int) -> int:
        return 4 * n_words(length, scheme.bits) if self._container(scheme) == PACKED else scheme.row_bytes(length)

    def _config_group(self, scheme: Scheme, targets: list[str]) -> dict[str, Any]:
        """What config.json says of the modules of one scheme; `targets` are their names, or their class."""
        return {
            "targets": targets,
            "format": self._container(scheme),
            "input_activations": activation_arguments(scheme, self.activations),
            "output_activations": None,
            "weights": weight_arguments(scheme),
        }


def _why_not(scheme: Scheme, activations: str) -> str:
    """Why there is no format for a scheme, and what to use instead."""
    if activations != "none":
        return (
            f"activations=dynamic goes with int8_channel and e4m3_{{tensor,channel,b128}}, not with {scheme.id}; use "
            f"one of these, or leave the option out"
        )
    if scheme.grid == "int" and scheme.bits not in BITS:
        return (
            f"the readers disagree on the layout of {scheme.bits}-bit codes, which changed in 0.18; use int2, int4 or "
            f"int8"
        )
    if scheme.grid == "int":
        return "pack-quantized has scales per group or per channel, not per tensor; use int8_channel"
    if scheme.family in ("ggml", "kquant"):
        return f"it has no blocks of ggml as {scheme.id} has; use --format gguf"
    other = {"affine": "mlx", "nf4": "bitsandbytes", "fp4": "bitsandbytes"}.get(scheme.grid)
    alternative = f", or --format {other}" if other else ""
    return f"it has no {scheme.id}; use e4m3_{{tensor,channel,b128}}, nvfp4, mxfp4, mxfp8, int4_g128{alternative}"


def _zero_words(zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Zero points [rows, groups] as words [n_words(rows), groups]: a word holds those of 32 / bits rows."""
    per_word = 32 // bits
    words = np.zeros((n_words(len(zeros), bits), zeros.shape[1]), "<u4")
    for k in range(min(per_word, len(zeros))):
        part = zeros[k::per_word].astype(np.uint32) << np.uint32(k * bits)
        words[: len(part)] |= part
    return words
