"""The sink for compressed-tensors checkpoints, format `pack-quantized`; the layout is in compressed_tensors.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import FormatError
from ..schemes import Scheme
from . import Codes, Entry, Place, TensorInfo
from .compressed_tensors import BITS, n_words, stored_tensors
from .ignored_modules import ANY_SCHEME, ignore_list, misfit, module_of
from .model_sink import ModelSink
from .pieces import Cut, Piece


class CompressedTensorsSink(ModelSink):
    """Writes a model directory. See `ModelSink`."""

    format = "compressed-tensors"

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme with scales in the weights' own dtype. See `Sink`."""
        if scheme.bits not in BITS:
            raise FormatError(
                f"compressed-tensors: the readers disagree on the layout of {scheme.bits}-bit codes (it changed in "
                f"0.18); use int2, int4 or int8, or {ANY_SCHEME}"
            )
        if scheme.granularity == "tensor":
            raise FormatError(
                "compressed-tensors: pack-quantized has scales per group or per channel, not per tensor; "
                f"use int8_channel, or {ANY_SCHEME}"
            )
        if (reason := misfit(info, self.config, self.format)) is not None:
            raise FormatError(reason)
        if scheme.scale_dtype not in ("float32", info.dtype):
            raise FormatError(
                f"compressed-tensors stores scales in the weights' dtype {info.dtype}, not in {scheme.scale_dtype}; "
                f"leave the suffix out, or use {ANY_SCHEME}"
            )
        if info.shape[1] % scheme.group_length(info.shape[1]):
            raise FormatError(
                f"rows of {info.shape[1]} weights are not whole groups of {scheme.group_size}, as compressed-tensors "
                f"needs; {ANY_SCHEME} carries the rest as a shorter group"
            )
        return dataclasses.replace(scheme, scale_dtype=info.dtype)

    def tensors(self, entry: Entry) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `ModelSink`."""
        return stored_tensors(entry.info, entry.scheme)

    def cut(self, entry: Entry) -> Cut:
        """A word holds the zero points of 32 / bits rows, so these stay together. See `ModelSink`."""
        scheme = entry.scheme
        if scheme is None or scheme.symmetric:
            return Cut(within_rows=True)
        return Cut(rows=32 // scheme.bits)

    def fill(self, entry: Entry) -> None:
        """The shape, which is known before any weight is read. See `ModelSink`."""
        self.put(module_of(entry) + ".weight_shape", np.array(entry.info.shape, "<i8"))

    def quantized_places(self, piece: Piece, scheme: Scheme) -> list[Place]:
        """See `ModelSink`."""
        entry = piece.entry
        module, length = module_of(entry), entry.info.shape[1]
        row_bytes, group = 4 * n_words(length, scheme.bits), scheme.group_length(length)
        column_bytes = piece.column * scheme.bits // 8
        # The last codes of a row are followed by its padding.
        is_end = piece.column + piece.columns == length
        n_codes = piece.rows * ((row_bytes - column_bytes) if is_end else piece.columns * scheme.bits // 8)
        scale_bytes = DTYPES[scheme.scale_dtype].bits // 8
        groups = -(-length // group)
        n_scales = piece.rows * -(-piece.columns // group)
        found = [
            self.place(module + ".weight_packed", piece.row * row_bytes + column_bytes, n_codes),
            self.place(
                module + ".weight_scale",
                (piece.row * groups + piece.column // group) * scale_bytes,
                n_scales * scale_bytes,
            ),
        ]
        if not scheme.symmetric:
            first, n = piece.row * scheme.bits // 32, n_words(piece.rows, scheme.bits)
            found.append(self.place(module + ".weight_zero_point", first * groups * 4, n * groups * 4))
        return found

    def quantized_arrays(self, piece: Piece, scheme: Scheme, codes: Codes) -> list[NDArray[Any]]:
        """See `ModelSink`."""
        packed, length = codes.packed, piece.entry.info.shape[1]
        if piece.column + piece.columns == length:
            wanted = 4 * n_words(length, scheme.bits) - piece.column * scheme.bits // 8
            if packed.shape[1] != wanted:
                packed = np.pad(packed, ((0, 0), (0, wanted - packed.shape[1])))
        arrays: list[NDArray[Any]] = [packed, codes.scales]
        if codes.zeros is not None:
            arrays.append(_zero_words(codes.zeros, scheme.bits))
        return arrays

    def described(self, provenance: Mapping[str, str]) -> str:
        """See `ModelSink`."""
        return f"{provenance.get('scheme', 'integers')}, in the format pack-quantized of compressed-tensors"

    def quantization(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """See `ModelSink`."""
        modules: dict[Scheme, list[str]] = {}
        for e in entries:
            if e.scheme is not None:
                # What type the scales have is said by the scales.
                modules.setdefault(dataclasses.replace(e.scheme, scale_dtype="float32"), []).append(module_of(e))
        schemes = sorted(modules, key=lambda scheme: scheme.id)
        # Beside a class, vLLM never looks for the name of a module that it has fused.
        targets = [["Linear"]] if len(schemes) == 1 else [modules[scheme] for scheme in schemes]
        groups = map(_config_group, schemes, targets)
        quantization = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
            "ignore": ignore_list(entries, self.config),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        return {"quantization_config": quantization}


def _config_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """What config.json says of the modules of one scheme; `targets` are their names, or their class."""
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": scheme.granularity,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "weights": weights,
    }


def _zero_words(zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Zero points [rows, groups] as words [n_words(rows), groups]: a word holds those of 32 / bits rows."""
    per_word = 32 // bits
    words = np.zeros((n_words(len(zeros), bits), zeros.shape[1]), "<u4")
    for k in range(min(per_word, len(zeros))):
        part = zeros[k::per_word].astype(np.uint32) << np.uint32(k * bits)
        words[: len(part)] |= part
    return words
