"""`StoredModel`: what the readers of all formats have in common that are a directory of safetensors files."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, KERNEL_DTYPES
from ..errors import SourceError
from ..schemes import Scheme, rows_and_length
from ..tensor import QuantizedTensor
from . import Entry, TensorInfo, safetensors
from .model_sink import INDEX, RECORD, WEIGHT_DTYPES, Stored, config_dtype
from .output import MANIFEST

_BLOCK_BYTES = 16 << 20
# Keys of config.json that quantization adds.
_ADDED = ("quantization_config", "compression_config", "quantization", RECORD)


class StoredModel(ABC):
    """Reads a quantized model directory; see `QuantizedCheckpoint`. A format says which tensors belong together and
    how they are decoded.

    headers: every tensor of the files, as it is stored
    entries: in the order of the files
    config, metadata, side_files: without what quantization added
    records: what this package noted in the metadata of the files
    provenance: what this package wrote about how the weights were made, empty for other writers

    Blocks are views of the mapped files, which must not change while it is in use. Raises SourceError for what is
    missing, contradicts itself, or is in another format.
    """

    format: str

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        config = self.read_config()
        self.provenance: dict[str, str] = {str(k): str(v) for k, v in (config.get(RECORD) or {}).items()}
        self.config: dict[str, Any] | None = {k: v for k, v in config.items() if k not in _ADDED}
        self.headers: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._maps: dict[Path, NDArray[np.uint8]] = {}
        self.records: dict[str, str] = {}
        self._dtypes: dict[str, str] = {}
        files = self.weight_files()
        for file in files:
            header = safetensors.read_header(file)
            if twice := self.headers.keys() & header.tensors.keys():
                raise SourceError(f"{file}: tensor {min(twice)} is in another file too")
            self.headers |= header.tensors
            own = {k: v for k, v in header.metadata.items() if k.startswith(f"{RECORD}.")}
            self.metadata |= {k: v for k, v in header.metadata.items() if k not in own}
            self.records |= {k.removeprefix(f"{RECORD}."): v for k, v in own.items()}
            self._dtypes |= self._noted_dtypes(file, header.metadata)
        self.entries = self.find(config)
        skipped = {*files, *(self.path / name for name in ("config.json", INDEX, MANIFEST, *self.added_files))}
        self.side_files = tuple(p for p in sorted(self.path.rglob("*")) if p.is_file() and p not in skipped)

    # What a format says.

    # Files beside config.json that only describe the quantization.
    added_files: tuple[str, ...] = ()

    @abstractmethod
    def find(self, config: Mapping[str, Any]) -> dict[str, Entry]:
        """Every tensor of the original model by name, from `headers` and the whole config.json; see `with_kept`."""

    @abstractmethod
    def quantized_blocks(self, entry: Entry, scheme: Scheme) -> Iterator[tuple[int, QuantizedTensor]]:
        """See `QuantizedCheckpoint.blocks`; of a quantized tensor."""

    # What formats use.

    def view(self, info: TensorInfo) -> NDArray[Any]:
        """The stored tensor as a read-only view of its mapped file; uint8 [n_bytes] for sub-byte types."""
        if info.file not in self._maps:
            self._maps[info.file] = np.memmap(info.file, np.uint8, "r")
        raw = self._maps[info.file][info.offset : info.offset + info.n_bytes]
        dtype = DTYPES[info.dtype].numpy
        return np.asarray(raw) if dtype is None else np.asarray(raw).view(dtype).reshape(info.shape)

    def weight_dtype(self, name: str) -> str:
        """The type that a tensor had before it was quantized: what its file says, else that of config.json."""
        return self._dtypes.get(name) or config_dtype(self.config or {})

    def with_kept(self, quantized: Mapping[str, Entry], parts: Collection[str]) -> dict[str, Entry]:
        """All entries in the order of the files: `quantized`, by the stored tensor in whose place each of them is, and
        every other stored tensor that is not one of `parts` as it is."""
        found = [
            quantized[name] if name in quantized else Entry(info, None, "kept")
            for name, info in self.headers.items()
            if name in quantized or name not in parts
        ]
        return {entry.info.name: entry for entry in found}

    def check_parts(self, parts: Stored, whole: str) -> None:
        """Raise SourceError, which says that `whole` has these parts, where one is missing or is not like that."""
        for name, (dtype, shape) in parts.items():
            found = self.headers.get(name)
            # One number is a tensor of one or of no dimension.
            shapes = {(), (1,)} if shape in ((), (1,)) else {shape}
            if found is None or found.dtype != dtype or found.shape not in shapes:
                raise self.fail(f"{name} {described(found)}; {whole} has {dtype} {list(shape)}")

    def fail(self, words: str) -> SourceError:
        """The error that says so, for the caller to raise."""
        return SourceError(f"{self.path}: {words}")

    def read_config(self) -> dict[str, Any]:
        """The whole config.json. Raises SourceError."""
        return self.read_json("config.json")

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object that is in the directory. Raises SourceError."""
        try:
            value = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError, RecursionError) as e:
            raise self.fail(f"{name} cannot be read: {getattr(e, 'strerror', None) or e}") from e
        if not isinstance(value, dict):
            raise self.fail(f"{name} is no JSON object")
        return value

    # What `QuantizedCheckpoint` asks for.

    def blocks(self, name: str) -> Iterator[tuple[int, QuantizedTensor | NDArray[Any]]]:
        """The tensor in blocks of about 16 MiB of whole rows, at least one row. See `QuantizedCheckpoint`."""
        entry = self.entries[name]
        if entry.scheme is not None:
            yield from self.quantized_blocks(entry, entry.scheme)
            return
        x = self.view(entry.info)
        x = x.reshape(1, -1) if DTYPES[entry.info.dtype].numpy is None else x.reshape(rows_and_length(entry.info.shape))
        for row, stop in row_blocks(x.shape[0], x.shape[1] * x.itemsize):
            yield row, x[row:stop]

    def _noted_dtypes(self, file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
        try:
            noted = json.loads(metadata.get(WEIGHT_DTYPES, "{}"))
            return {name: dtype for dtype in noted.keys() & set(KERNEL_DTYPES) for name in noted[dtype]}
        except (ValueError, RecursionError, TypeError, AttributeError) as e:
            raise SourceError(f"{file}: {WEIGHT_DTYPES} of its metadata is no JSON of names by dtype: {e}") from e

    def weight_files(self) -> list[Path]:
        """The files of weights: those of the index, or all. Raises SourceError where one is missing."""
        if not (self.path / INDEX).exists():
            files = sorted(self.path.glob("*.safetensors"))
            if not files:
                raise self.fail("no .safetensors file is there")
            return files
        names = self.read_json(INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise self.fail(f"{INDEX} has no weight_map")
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise self.fail(f"{INDEX} names a file {name!r} that is not in this directory")
            if not (self.path / name).is_file():
                raise self.fail(f"{name}, which {INDEX} names, is missing")
        return [self.path / name for name in sorted(set(names.values()))]


def packed_entry(name: str, dtype: str, shape: tuple[int, ...], codes: TensorInfo, scheme: Scheme) -> Entry:
    """The entry of a float tensor, which is where its codes are."""
    n_bytes = DTYPES[dtype].bits // 8 * math.prod(shape)
    return Entry(TensorInfo(name, dtype, shape, codes.file, codes.offset, n_bytes), scheme, "packed")


def described(found: TensorInfo | None) -> str:
    """What a stored tensor is, for errors.

    >>> described(None), described(TensorInfo("a", "int8", (2, 3), Path("m"), 0, 6))
    ('is missing', 'is int8 [2, 3]')
    """
    return "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"


def row_blocks(rows: int, row_bytes: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """(first row, end) of blocks of about 16 MiB that begin at a multiple of `unit` rows.

    >>> list(row_blocks(10, 4 << 20, 2))
    [(0, 4), (4, 8), (8, 10)]
    """
    step = max(1, _BLOCK_BYTES // max(1, row_bytes * unit)) * unit
    for row in range(0, rows, step):
        yield row, min(row + step, rows)
