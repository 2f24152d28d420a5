"""NVFP4 checkpoints as NVIDIA's Model Optimizer exports them: the layout, the sink and the reader.

One linear module `P` of [N, K] weights (docs/formats/modelopt.md):

    P.weight          uint8 [N, K / 2]            the first of two codes in the low bits
    P.weight_scale    float8_e4m3fn [N, K / 16]
    P.weight_scale_2  float32 []                  what scales are multiplied by: 1 / the global scale of nvfp4

and the same description in hf_quant_config.json and in config.json. Only weights are quantized here: scales of
activations (P.input_scale) come from a calibration. Source: NVIDIA/Model-Optimizer, modelopt/torch, export and
quantization/qtensor/nvfp4_tensor.py, version 0.47.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..schemes import Scheme
from ..tensor import QuantizedTensor
from . import Checkpoint, Codes, Entry, Place, TensorInfo, row_parts
from .ignored_modules import TIED_HEADS, any_shape, ignore_list, misfit
from .model_directory import write_json
from .model_sink import ModelSink, Stored, kept
from .pieces import Piece
from .stored_model import StoredModel, packed_entry

SCHEME = Scheme.parse("nvfp4")
DESCRIPTION = "hf_quant_config.json"
# Model Optimizer's name for NVFP4 weights and float activations, and those that can be read.
ALGORITHM = "W4A16_NVFP4"
ALGORITHMS = (ALGORITHM, "NVFP4")
PRODUCER = {"name": "modelopt"}


class ModelOptSink(ModelSink):
    """Writes a model directory. See `ModelSink`."""

    format = "modelopt"
    fused_alike = True

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """nvfp4 and nothing else. See `Sink`."""
        if scheme != SCHEME:
            raise FormatError(f"modelopt has {SCHEME} only, not {scheme}; use that")
        if (reason := misfit(info, self.config, self.format)) is not None:
            raise FormatError(reason)
        if info.shape[1] % 16:
            raise FormatError(
                f"rows of {info.shape[1]} weights are not whole groups of 16, as modelopt needs; {any_shape(scheme)} "
                f"carries the rest as a shorter group"
            )
        return scheme

    def tensors(self, entry: Entry) -> Stored:
        """See `ModelSink`."""
        return kept(entry) if entry.scheme is None else stored_tensors(entry.info)

    def quantized_places(self, piece: Piece, scheme: Scheme) -> list[Place]:
        """See `ModelSink`."""
        name, found = piece.entry.info.name, row_parts.spans(piece, scheme)
        tensors = zip((name, f"{name}_scale", f"{name}_scale_2"), found, strict=True)
        return [self.place(tensor, *span) for tensor, span in tensors if span is not None]

    def quantized_arrays(self, piece: Piece, scheme: Scheme, codes: Codes) -> list[NDArray[Any]]:
        """See `ModelSink`."""
        packed, scales, *beside = row_parts.arrays(piece, scheme, codes)
        return [packed, scales, *(np.float32(1) / zeros for zeros in beside)]

    def described(self, provenance: Mapping[str, str]) -> str:
        """See `ModelSink`."""
        return "NVFP4, in the format of NVIDIA's Model Optimizer"

    def write_beside(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        """See `ModelSink`; and the description in a file of its own, where TensorRT-LLM and older vLLM look."""
        super().write_beside(entries, source, provenance)
        quantization = {
            "quant_algo": ALGORITHM,
            "group_size": 16,
            "kv_cache_quant_algo": None,
            "exclude_modules": ignore_list(entries, self.config, TIED_HEADS),
        }
        write_json(self._output, DESCRIPTION, {"producer": PRODUCER, "quantization": quantization})

    def quantization(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """See `ModelSink`."""
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        quantization = {
            "quant_method": "modelopt",
            "quant_algo": ALGORITHM,
            "group_size": 16,
            "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
            "ignore": ignore_list(entries, self.config, TIED_HEADS),
            "producer": PRODUCER,
        }
        return {"quantization_config": quantization}


class ModelOptCheckpoint(StoredModel):
    """Reads such a model directory, from this package or from Model Optimizer. See `StoredModel`.

    The global scale of a tensor is the reciprocal of what is stored, rounded to float32.
    """

    format = "modelopt"
    added_files = (DESCRIPTION,)

    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """See `StoredModel`."""
        found = config.get("quantization_config")
        if not isinstance(found, dict):
            described = self.read_json(DESCRIPTION).get("quantization")
            found = described if isinstance(described, dict) else {}
        algorithm = found.get("quant_algo")
        if algorithm not in ALGORITHMS:
            raise self.fail(f"quant_algo {algorithm!r}; {' and '.join(ALGORITHMS)} are what can be read")
        entries, parts = {}, set[str]()
        for name, info in self.headers.items():
            if name.endswith(".weight") and info.dtype == "uint8":
                entries[name] = entry = self._entry(info)
                parts |= stored_tensors(entry.info).keys() | {f"{name.removesuffix('weight')}input_scale"}
        return self.with_kept(entries, parts)

    def quantized_blocks(self, entry: Entry, scheme: Scheme) -> Iterator[tuple[int, QuantizedTensor]]:
        """See `StoredModel`."""
        name = entry.info.name
        packed, scales, multiplier = (self.view(self.headers[part]) for part in stored_tensors(entry.info))
        if not np.isfinite(multiplier).all() or (multiplier <= 0).any():
            raise self.fail(f"{name}_scale_2 is {float(multiplier.reshape(-1)[0])}, no positive number")
        with np.errstate(over="ignore"):
            zeros = (np.float32(1) / multiplier).astype(np.float32).reshape(1, 1)
        yield from row_parts.blocks(packed, scales.view(np.uint8), zeros, entry.info, scheme)

    def _entry(self, codes: TensorInfo) -> Entry:
        if len(codes.shape) != 2:
            raise self.fail(f"{codes.name} is {codes.dtype} {list(codes.shape)}, no matrix")
        shape, dtype = (codes.shape[0], 2 * codes.shape[1]), self.weight_dtype(codes.name)
        entry = packed_entry(codes.name, dtype, shape, codes, SCHEME)
        self.check_parts(stored_tensors(entry.info), f"nvfp4 {list(shape)}")
        return entry


def stored_tensors(info: TensorInfo) -> Stored:
    """What a tensor becomes in the file: name -> (dtype, shape). `info` is that of the float tensor.

    >>> from pathlib import Path
    >>> stored_tensors(TensorInfo("fc.weight", "bfloat16", (8, 64), Path("m"), 0, 1024))["fc.weight_scale"]
    ('float8_e4m3fn', (8, 4))
    """
    return {
        info.name: ("uint8", SCHEME.packed_shape(info.shape)),
        f"{info.name}_scale": ("float8_e4m3fn", SCHEME.scales_shape(info.shape)),
        f"{info.name}_scale_2": ("float32", ()),
    }
