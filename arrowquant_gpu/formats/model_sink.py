"""`ModelSink`: what all formats have in common that are a directory of safetensors files with a config.json."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, KERNEL_DTYPES
from ..errors import FormatError
from ..schemes import Scheme
from . import Checkpoint, Codes, Entry, Place, TensorInfo, safetensors
from .model_directory import copy_side_files, write_json
from .output import MANIFEST, Output
from .pieces import Cut, Piece, pieces

INDEX = "model.safetensors.index.json"
# Key of config.json, and of the metadata of the files, under which a sink says how the weights were made.
RECORD = "arrowquant"
# Key of the metadata of a file: the types of weights that were quantized in it, where config.json speaks of another.
WEIGHT_DTYPES = f"{RECORD}.dtypes"

# name -> (dtype, shape) of the tensors that one tensor of the source becomes.
Stored = dict[str, tuple[str, tuple[int, ...]]]


class ModelSink(ABC):
    """Writes a model directory; see `Sink`. A format says what a tensor becomes, where its pieces go, and what
    config.json says of it.

    config: the source's config.json, without which there is nothing to write into
    names: of all tensors of the source
    max_shard_size: bytes of the tensors of one file; None keeps together what is in one file of the source

    Raises FormatError where there is no config.
    """

    format: str
    # Whether it needs the config.json of a model.
    needs_config = True

    def __init__(
        self,
        output: Output,
        config: Mapping[str, Any] | None,
        *,
        names: Sequence[str] = (),
        max_shard_size: int | None = None,
    ) -> None:
        if config is None and self.needs_config:
            raise FormatError(
                f"{self.format} needs a model directory with config.json, where the quantization is described; "
                "use --format safetensors, parquet or arrow for a lone file"
            )
        self.config, self.names = config or {}, tuple(names)
        self._output, self._max_shard_size = output, max_shard_size
        self._places: dict[str, tuple[str, int]] = {}

    # What a format says.

    @abstractmethod
    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """See `Sink`."""

    @abstractmethod
    def tensors(self, entry: Entry) -> Stored:
        """What the tensor becomes in the file; for one that is kept, usually `kept(entry)`."""

    @abstractmethod
    def quantized_places(self, piece: Piece, scheme: Scheme) -> list[Place]:
        """See `Sink.places`; of a quantized tensor."""

    @abstractmethod
    def quantized_arrays(self, piece: Piece, scheme: Scheme, codes: Codes) -> list[NDArray[Any]]:
        """See `Sink.stored`; of a quantized tensor."""

    @abstractmethod
    def quantization(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """What is added to config.json, by key."""

    @abstractmethod
    def described(self, provenance: Mapping[str, str]) -> str:
        """What the model card says that the weights are quantized to."""

    def file_metadata(self, entries: Sequence[Entry]) -> dict[str, str]:
        """What the metadata of a file with these entries say of them. By default nothing."""
        return {}

    def file_tensors(self, entries: Sequence[Entry]) -> Stored:
        """Tensors of zeros that a file with these entries has beside theirs. By default there are none."""
        return {}

    def file_name(self, number: int, n_files: int) -> str:
        """The name of one of the files, counted from 1."""
        return "model.safetensors" if n_files == 1 else f"model-{number:05d}-of-{n_files:05d}.safetensors"

    def cut(self, entry: Entry) -> Cut:
        """How a quantized tensor may be cut."""
        return Cut(within_rows=True)

    def fill(self, entry: Entry) -> None:
        """`put` what is known of a quantized tensor before any weight is read. By default there is nothing."""
        return

    def finish(self, entry: Entry) -> None:
        """See `Sink`. By default nothing follows from several pieces."""
        return

    # What formats use.

    def place(self, tensor: str, offset: int, n_bytes: int) -> Place:
        """Bytes of a tensor of the output, from position `offset` of it on."""
        file, begin = self._places[tensor]
        return Place(file, begin + offset, n_bytes)

    def put(self, tensor: str, values: NDArray[Any]) -> None:
        """Write a whole tensor of the output."""
        place = self.place(tensor, 0, values.nbytes)
        self._output.write(place.file, place.offset, np.ascontiguousarray(values))

    # What engine and plan use.

    def n_bytes(self, entry: Entry) -> int:
        """Bytes of all tensors of this entry, without their part of the header. See `Sink`."""
        return sum(_n_bytes(dtype, shape) for dtype, shape in self.tensors(entry).values())

    def pieces(self, entry: Entry) -> list[Piece]:
        """See `Sink`."""
        return pieces(entry, self.cut(entry))

    def open(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        """Make every file of the output in its final size, all but the weights in their final content. See `Sink`."""
        self.write_beside(entries, source, provenance)
        self._lay_out(entries, {**source.metadata, "format": "pt"}, provenance)
        for entry in entries:
            if entry.scheme is not None:
                self.fill(entry)

    def write_beside(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        """Write what lies beside the files of weights: config.json, a model card, and the side files of the source."""
        summary = (
            f"Weights quantized to {self.described(provenance)}, with arrowquant_gpu. What was done to each tensor is "
            f"in `{MANIFEST}`."
        )
        copy_side_files(self._output, source, provenance, summary, without=("config.json", INDEX))
        write_json(self._output, "config.json", {**self.config, **self.quantization(entries), RECORD: dict(provenance)})

    def places(self, piece: Piece) -> list[Place]:
        """See `Sink`."""
        if piece.entry.scheme is None:
            return [self.place(piece.entry.info.name, piece.column, piece.n_bytes)]
        return self.quantized_places(piece, piece.entry.scheme)

    def stored(self, piece: Piece, codes: Codes | NDArray[np.uint8]) -> list[NDArray[Any]]:
        """See `Sink`."""
        if not isinstance(codes, Codes) or piece.entry.scheme is None:
            return [codes] if isinstance(codes, np.ndarray) else []
        return self.quantized_arrays(piece, piece.entry.scheme, codes)

    def commit(self) -> tuple[Path, ...]:
        """See `Sink`."""
        return self._output.commit()

    def _lay_out(self, entries: Sequence[Entry], metadata: Mapping[str, str], provenance: Mapping[str, str]) -> None:
        files = list(self.shards(entries))
        weight_map: dict[str, str] = {}
        total = 0
        for i, shard in enumerate(files):
            name = self.file_name(i + 1, len(files))
            stored = [(t, dtype, shape) for e in shard for t, (dtype, shape) in self.tensors(e).items()]
            stored += [(t, dtype, shape) for t, (dtype, shape) in self.file_tensors(shard).items()]
            record = {f"{RECORD}.{key}": value for key, value in provenance.items()}
            record |= _dtypes_record(shard, self.config) | self.file_metadata(shard)
            header, places = safetensors.layout(stored, {**metadata, **record})
            self._output.create(name, max([len(header), *(end for _, end in places.values())]))
            self._output.write(name, 0, np.frombuffer(header, np.uint8))
            self._places |= {tensor: (name, begin) for tensor, (begin, _) in places.items()}
            weight_map |= dict.fromkeys(places, name)
            total += sum(end - begin for begin, end in places.values())
        if len(files) > 1:
            write_json(self._output, INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def shards(self, entries: Sequence[Entry]) -> Iterator[list[Entry]]:
        """The entries of each file: those of one file of the source, or as many in order as are not too large."""
        if self._max_shard_size is None:
            for file in dict.fromkeys(e.info.file for e in entries):
                yield [e for e in entries if e.info.file == file]
            return
        shard: list[Entry] = []
        room = self._max_shard_size
        for entry in entries:
            n = self.n_bytes(entry)
            if shard and n > room:
                yield shard
                shard, room = [], self._max_shard_size
            shard.append(entry)
            room -= n
        if shard:
            yield shard


def config_dtype(config: Mapping[str, Any]) -> str:
    """The type of the weights that a config.json speaks of, of itself or of its parts; bfloat16 where it does not.

    >>> config_dtype({"torch_dtype": "float16"}), config_dtype({"text_config": {"dtype": "float32"}}), config_dtype({})
    ('float16', 'float32', 'bfloat16')
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        found = part.get("dtype", part.get("torch_dtype"))
        if isinstance(found, str) and found in KERNEL_DTYPES:
            return found
    return "bfloat16"


def _dtypes_record(entries: Sequence[Entry], config: Mapping[str, Any]) -> dict[str, str]:
    """What the metadata of a file say of the types that its quantized weights had."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        if entry.scheme is not None and entry.info.dtype != config_dtype(config):
            names.setdefault(entry.info.dtype, []).append(entry.info.name)
    return {WEIGHT_DTYPES: json.dumps(names)} if names else {}


def kept(entry: Entry) -> Stored:
    """A tensor as it is in the source."""
    return {entry.info.name: (entry.info.dtype, entry.info.shape)}


def _n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) * DTYPES[dtype].bits // 8)
