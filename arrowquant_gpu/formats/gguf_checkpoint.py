"""`GgufCheckpoint`: reads a GGUF file, from this package or another."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import models
from ..dtypes import DTYPES
from ..errors import SourceError
from ..schemes import Scheme, rows_and_length
from ..tensor import QuantizedTensor
from . import Entry, TensorInfo
from .gguf_file import BY_DTYPE, TYPES, GgufTensor, Value, read_header
from .gguf_homes import RECORD, Home, unpermuted
from .gguf_source import sizes_of
from .stored_model import row_blocks

# Types that a kept tensor of this dtype may have in a file of this package.
_KEPT = {"float32": ("F32",), "float16": ("F16", "F32"), "bfloat16": ("BF16", "F32"), "float64": ("F32",)}
_KEPT |= {"float8_e4m3fn": ("F16", "F32"), "float8_e5m2": ("F16", "F32")}


class GgufCheckpoint:
    """Reads one GGUF file of version 2 or 3. See `QuantizedCheckpoint`.

    Of a file that this package wrote, `entries` have the names, dtypes and rows of the original, and `omitted` names
    the tensors of it that are not in the file. Of any other, names are those in the file, blocks decode to float32, and
    F32, F16 and BF16 are kept tensors; `sizes` are what its keys tell, as `QuantizedCheckpoint` has them. `keys` are
    all keys of the file. Blocks are views of the mapped file, which must not change while it is in use, but for rows
    that are put back in order.

    Raises SourceError for a file that is damaged, has tensors of a type that is not read, or is one of several files.
    """

    format = "gguf"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = read_header(self.path)
        self.keys: Mapping[str, Value] = header.keys
        n_files = header.keys.get("split.count", 1)
        if isinstance(n_files, int) and n_files > 1:
            raise SourceError(
                f"{self.path}: one of {n_files} files of a model; make one of them first: llama-gguf-split --merge"
            )
        self.side_files: tuple[Path, ...] = ()
        own = {k.removeprefix(RECORD): v for k, v in header.keys.items() if k.startswith(RECORD) and isinstance(v, str)}
        record = self._object(own.pop("tensors", "null"), "tensors")
        self.metadata: dict[str, str] = {}
        self.config: dict[str, Any] | None = None
        self.omitted: tuple[str, ...] = ()
        self._homes: dict[str, tuple[GgufTensor, Home]] = {}
        self.provenance: dict[str, str] = {}
        if record is None:
            self.entries = {name: self._other(t, header.tensors) for name, t in header.tensors.items()}
        else:
            self.metadata = {k: str(v) for k, v in (self._object(own.pop("metadata", "{}"), "metadata") or {}).items()}
            self.config = self._object(own.pop("config", "null"), "config")
            self.provenance = own
            self.omitted = self._omitted(record)
            self.entries = {n: self._own(n, row, header.tensors) for n, row in record.items() if row is not None}
        self.sizes = sizes_of(header.keys) if self.config is None else {}
        self._data: NDArray[np.uint8] | None = None

    def blocks(self, name: str) -> Iterator[tuple[int, QuantizedTensor | NDArray[Any]]]:
        """The tensor in blocks of about 16 MiB of whole rows, at least one row. See `QuantizedCheckpoint`."""
        entry, (tensor, home) = self.entries[name], self._homes[name]
        rows, length = rows_and_length(entry.info.shape)
        if home.heads and len(entry.info.shape) == 1:
            # A bias for each row.
            rows, length = length, 1
        row_bytes = length // tensor.type.block * tensor.type.block_bytes
        unit = rows // home.heads if home.heads else 1
        begin = tensor.offset + (home.expert or 0) * rows * row_bytes
        data = self._mapped()
        for row, stop in row_blocks(rows, row_bytes, unit):
            n = stop - row
            part = data[begin + row * row_bytes : begin + (row + n) * row_bytes].reshape(n, row_bytes)
            if home.heads:
                part = unpermuted(part, unit)
            if entry.scheme is not None:
                scales = np.empty(entry.scheme.scales_shape((n, length)), np.float16)
                yield row, QuantizedTensor(part, scales, None, (n, length), entry.scheme, entry.info.dtype)
            elif entry.info.shape and home.heads and len(entry.info.shape) == 1:
                yield 0, self._kept(part.reshape(1, -1), tensor, home, entry)
            else:
                yield from ((row, self._kept(p, tensor, home, entry)) for p in _cut(part, tensor.type.block_bytes))

    def _kept(self, part: NDArray[np.uint8], tensor: GgufTensor, home: Home, entry: Entry) -> NDArray[Any]:
        """Values as they were in the source, from the bytes of those in the file."""
        assert tensor.type.dtype is not None
        stored, dtype = DTYPES[tensor.type.dtype].numpy, DTYPES[entry.info.dtype].numpy
        assert stored is not None
        values = part.view(stored)
        if home.add:
            values = values - np.float32(home.add)
        return values.astype(dtype, copy=False)

    def _other(self, tensor: GgufTensor, tensors: Mapping[str, GgufTensor]) -> Entry:
        """A tensor of a file that another program wrote."""
        kind = tensor.type
        scheme = None if kind.dtype is not None or kind.scheme is None else Scheme.parse(kind.scheme)
        # ComfyUI-GGUF has shapes that ggml does not have in a key.
        said = self.keys.get(f"comfy.gguf.orig_shape.{tensor.name}")
        shape = tensor.shape
        if isinstance(said, np.ndarray) and math.prod(said.tolist()) == math.prod(shape) and (said > 0).all():
            shape = tuple(said.tolist()) if scheme is None else shape
        self._homes[tensor.name] = tensor, Home(tensor.name)
        beside = {f"{tensor.name.removesuffix('.weight')}.scale", f"{tensor.name}.scale"} & tensors.keys()
        if kind is TYPES["NVFP4"] and beside:
            raise SourceError(f"{self.path}: {tensor.name} has a global scale, {min(beside)}, which cannot be read")
        return self._entry(tensor.name, kind.dtype or "float32", shape, tensor, scheme, "")

    def _own(self, name: str, row: Any, tensors: Mapping[str, GgufTensor]) -> Entry:
        """A tensor of the source, from what the record says; everything in that is checked against the file."""
        try:
            home = Home(row["name"], row.get("expert"), row.get("heads", 0), float(row.get("add", 0.0)))
            tensor, dtype, is_quantized = tensors[home.name], row["dtype"], bool(row.get("quantized", False))
            whole = tuple(row.get("shape", tensor.shape if home.expert is None else tensor.shape[1:]))
            n_stack = 1 if home.expert is None else tensor.shape[0]
            is_whole = math.prod(whole) * n_stack == math.prod(tensor.shape) and all(n >= 0 for n in whole)
            if is_quantized:
                is_known = tensor.type.scheme is not None and dtype in DTYPES
            else:
                is_known = tensor.type.name in (_KEPT[dtype] if dtype in _KEPT else (BY_DTYPE[dtype].name,))
            is_stacked = home.expert is None or 0 <= home.expert < n_stack
            is_paired = home.heads >= 0 and (not home.heads or not whole[0] % (2 * home.heads))
            is_paired &= not home.heads or len(whole) < 3
            fits = (whole[-1] if whole else 1) % tensor.type.block == 0
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
            raise SourceError(f"{self.path}: the record of {name[:100]!r} is damaged: {e!r}") from e
        if not (is_whole and is_known and is_stacked and is_paired and fits):
            raise SourceError(f"{self.path}: the record of {name[:100]!r} does not fit {home.name[:100]!r}")
        scheme = Scheme.parse(tensor.type.scheme) if is_quantized and tensor.type.scheme else None
        self._homes[name] = tensor, home
        return self._entry(name, dtype, whole, tensor, scheme, "quantized" if is_quantized else "kept")

    def _omitted(self, record: Mapping[str, Any]) -> tuple[str, ...]:
        """The tensors that the record has no place for, each of which readers can do without."""
        omitted = tuple(name for name, row in record.items() if row is None)
        model = models.find(self.config, record) if omitted else None
        for name in omitted:
            if model is None or model.gguf is None or not (name in model.tied or model.gguf.omits(name, self.config)):
                raise SourceError(f"{self.path}: the record of {name[:100]!r} has no place for it, and it is needed")
        return omitted

    def _entry(
        self, name: str, dtype: str, shape: tuple[int, ...], tensor: GgufTensor, scheme: Scheme | None, reason: str
    ) -> Entry:
        n_bytes = math.prod(shape) * DTYPES[dtype].bits // 8
        return Entry(TensorInfo(name, dtype, shape, self.path, tensor.offset, n_bytes), scheme, reason)

    def _object(self, text: str, what: str) -> dict[str, Any] | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise SourceError(f"{self.path}: {RECORD}{what} is not valid JSON: {e}") from e
        if value is not None and not isinstance(value, dict):
            raise SourceError(f"{self.path}: {RECORD}{what} is no JSON object")
        return value

    def _mapped(self) -> NDArray[np.uint8]:
        if self._data is None:
            self._data = np.memmap(self.path, np.uint8, "r")
        return self._data


def _cut(rows: NDArray[np.uint8], width: int) -> Iterator[NDArray[np.uint8]]:
    """Rows as they are; one that is longer than a block in parts of whole elements of `width` bytes."""
    if not rows.shape[1]:
        yield rows
    for at, stop in row_blocks(rows.shape[1], 1, width):
        yield rows[:, at:stop]
