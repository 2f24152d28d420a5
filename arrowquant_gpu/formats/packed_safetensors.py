"""Plain safetensors of packed tensors, format `safetensors`: every scheme, every shape, and no engine in mind.

A directory as that of a model, whatever the source is. Of a quantized tensor `NAME` (docs/formats/safetensors.md):

    NAME.packed  uint8 [rows, bytes of a row]   the codes, as schemes.py draws them
    NAME.scales  [rows, groups]                 as `Scheme.scales_shape`; uint8 for e8m0 and e4m3; none for ggml blocks
    NAME.zeros   as `Scheme.zeros_shape`        where the scheme has any

and in the metadata of its file, under `arrowquant.tensor.NAME`, JSON with `scheme`, `shape` and `dtype`. config.json is
the source's with quant_method `arrowquant`; where the source has none, it says nothing but that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, WEIGHT_DTYPES
from ..errors import FormatError, SchemeError
from ..schemes import Scheme
from ..tensor import QuantizedTensor
from . import Codes, Entry, Place, TensorInfo, row_parts
from .model_sink import RECORD, ModelSink, Stored, kept
from .pieces import Piece
from .stored_model import StoredModel, packed_entry

METHOD = "arrowquant"
# Key of the metadata of a file for one tensor.
TENSOR = "tensor."


class PackedSafetensorsSink(ModelSink):
    """Writes a directory of safetensors files; max_shard_size as for models. See `ModelSink`."""

    format = "safetensors"
    needs_config = False

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme itself: every one is carried, where it fits the shape. See `Sink`."""
        if (reason := scheme.misfit(info.shape)) is not None:
            raise FormatError(reason)
        return scheme

    def tensors(self, entry: Entry) -> Stored:
        """See `ModelSink`."""
        return kept(entry) if entry.scheme is None else stored_tensors(entry.info, entry.scheme)

    def file_metadata(self, entries: Sequence[Entry]) -> dict[str, str]:
        """See `ModelSink`."""
        return {
            f"{RECORD}.{TENSOR}{e.info.name}": json.dumps(
                {"scheme": e.scheme.id, "shape": list(e.info.shape), "dtype": e.info.dtype}
            )
            for e in entries
            if e.scheme is not None
        }

    def quantized_places(self, piece: Piece, scheme: Scheme) -> list[Place]:
        """See `ModelSink`."""
        name, found = piece.entry.info.name, row_parts.spans(piece, scheme)
        tensors = zip((f"{name}.packed", f"{name}.scales", f"{name}.zeros"), found, strict=True)
        return [self.place(tensor, *span) for tensor, span in tensors if span is not None]

    def quantized_arrays(self, piece: Piece, scheme: Scheme, codes: Codes) -> list[NDArray[Any]]:
        """See `ModelSink`."""
        return row_parts.arrays(piece, scheme, codes)

    def described(self, provenance: Mapping[str, str]) -> str:
        """See `ModelSink`."""
        return f"{provenance.get('scheme', 'codes')}, as packed tensors in safetensors files"

    def quantization(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """See `ModelSink`."""
        return {"quantization_config": {"quant_method": METHOD}}


class PackedSafetensorsCheckpoint(StoredModel):
    """Reads a directory that PackedSafetensorsSink wrote. See `StoredModel`."""

    format = "safetensors"

    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """See `StoredModel`."""
        # A lone file has no config.json of its own.
        self.config = self.config or None
        entries, parts = {}, set[str]()
        for key, value in self.records.items():
            if key.startswith(TENSOR):
                name = key.removeprefix(TENSOR)
                entries[f"{name}.packed"] = entry = self._entry(name, value)
                parts |= stored_tensors(entry.info, entry.scheme).keys() if entry.scheme else set()
        return self.with_kept(entries, parts)

    def quantized_blocks(self, entry: Entry, scheme: Scheme) -> Iterator[tuple[int, QuantizedTensor]]:
        """See `StoredModel`."""
        name = entry.info.name
        views = {part: self.view(self.headers[part]) for part in stored_tensors(entry.info, scheme)}
        scales = views.get(f"{name}.scales")
        if scales is None:
            scales = np.zeros(scheme.scales_shape(entry.info.shape), DTYPES[scheme.scale_storage].numpy)
        yield from row_parts.blocks(views[f"{name}.packed"], scales, views.get(f"{name}.zeros"), entry.info, scheme)

    def _entry(self, name: str, text: str) -> Entry:
        """The tensor that a record describes, all of whose parts are checked."""
        codes = self.headers.get(f"{name}.packed")
        if codes is None:
            raise self.fail(f"{name}.packed is missing, though the metadata describe {name}")
        try:
            described = json.loads(text)
            scheme, shape, dtype = Scheme.parse(str(described["scheme"])), described["shape"], described["dtype"]
        except (ValueError, KeyError, TypeError, RecursionError, SchemeError) as e:
            raise self.fail(f"the metadata of {name} cannot be read: {e!r}") from e
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise self.fail(f"the metadata of {name} have shape {shape!r}, no list of sizes")
        if dtype not in WEIGHT_DTYPES:
            raise self.fail(f"the metadata of {name} have dtype {dtype!r}; expected one of {', '.join(WEIGHT_DTYPES)}")
        if (reason := scheme.misfit(tuple(shape))) is not None:
            raise self.fail(f"{name}: {reason}")
        entry = packed_entry(name, dtype, tuple(shape), codes, scheme)
        self.check_parts(stored_tensors(entry.info, scheme), f"{scheme.id} {shape}")
        return entry


def stored_tensors(info: TensorInfo, scheme: Scheme) -> Stored:
    """What a tensor becomes in the file: name -> (dtype, shape). `info` is that of the float tensor.

    >>> from pathlib import Path
    >>> list(stored_tensors(TensorInfo("w", "float32", (2, 3, 64), Path("m"), 0, 0), Scheme.parse("int4_g32")).items())
    [('w.packed', ('uint8', (6, 32))), ('w.scales', ('float32', (6, 2)))]
    """
    stored: Stored = {f"{info.name}.packed": ("uint8", scheme.packed_shape(info.shape))}
    if row_parts.has_scales(scheme):
        stored[f"{info.name}.scales"] = (scheme.scale_storage, scheme.scales_shape(info.shape))
    if scheme.zeros_dtype is not None and (beside := scheme.zeros_shape(info.shape)) is not None:
        stored[f"{info.name}.zeros"] = (scheme.zeros_dtype, beside)
    return stored
