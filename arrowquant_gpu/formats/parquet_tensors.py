"""Quantized models in a directory with one Parquet file per tensor, which `model.parquet.index.json` lists.

    model.parquet.index.json      {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}, in the order of
                                  the model
    tensors/NAME.parquet          each is a model of one tensor as parquet.py writes it, with the same columns
    config.json, tokenizer*, ...  the side files of the source

The tensors have a folder of their own, which other programs can read as one table: nothing else is in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import SourceError
from ..tensor import QuantizedTensor
from . import Checkpoint, Entry
from .file_names import file_names
from .model_directory import copy_side_files, write_json
from .output import MANIFEST
from .parquet import ParquetCheckpoint, ParquetSink

INDEX = "model.parquet.index.json"
FOLDER = "tensors"
SUFFIX = ".parquet"


class ParquetTensorsSink(ParquetSink):
    """Writes a directory with a Parquet file for each tensor. What can be carried is what ParquetSink can."""

    format = "parquet-tensors"

    def open(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        """Make every file of the output in its final size, all but the values in their final content. See `Sink`."""
        super().open(entries, source, provenance)
        summary = (
            f"Weights quantized to {provenance.get('scheme', 'integers')} with arrowquant_gpu: a Parquet file for each "
            f"tensor in `{FOLDER}/`, listed in `{INDEX}`. What was done to each tensor is in `{MANIFEST}`."
        )
        copy_side_files(self.output, source, provenance, summary, without=(INDEX,))
        names = [entry.info.name for entry in entries]
        weight_map = {name: file for name, (file, _) in zip(names, self._files(entries), strict=True)}
        index = {"metadata": {"total_size": sum(map(self.n_bytes, entries))}, "weight_map": weight_map}
        write_json(self.output, INDEX, index)

    def _files(self, entries: Sequence[Entry]) -> list[tuple[str, Sequence[Entry]]]:
        names = file_names([entry.info.name for entry in entries], SUFFIX)
        return [(f"{FOLDER}/{name}", [entry]) for name, entry in zip(names, entries, strict=True)]


class ParquetTensorsCheckpoint:
    """Reads a directory that ParquetTensorsSink wrote. See `QuantizedCheckpoint`.

    Its files are opened one after the other, and again for their blocks: few are open at a time. `entries` are in the
    order of the index, each with its own file.

    Raises SourceError, naming the file, for one that is missing, was added, or belongs to another tensor or model, and
    as ParquetCheckpoint does.
    """

    format = "parquet-tensors"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = self._read_index()
        self._check_folder()
        self.entries: dict[str, Entry] = {}
        first: ParquetCheckpoint | None = None
        for name, file in self._files.items():
            one = ParquetCheckpoint(file)
            if list(one.entries) != [name]:
                held = ", ".join(repr(n[:100]) for n in list(one.entries)[:3]) or "nothing"
                raise SourceError(
                    f"{file}: holds {held}, where {INDEX} has {name[:100]!r}; was it exchanged or renamed? Copy the "
                    f"directory again, or quantize again."
                )
            first = first or one
            for what in ("provenance", "metadata", "config"):
                if getattr(one, what) != getattr(first, what):
                    raise SourceError(
                        f"{file}: is of another model or run than {first.path.name}: their {what} differ. Copy the "
                        f"directory again, or quantize again."
                    )
            self.entries |= one.entries
        if first is None:
            raise SourceError(f"{self.path}: {INDEX} lists no tensor")
        self.provenance, self.metadata, self.config = first.provenance, first.metadata, first.config
        own = {self.path / INDEX, self.path / MANIFEST, *self._files.values()}
        self.side_files = tuple(p for p in sorted(self.path.rglob("*")) if p.is_file() and p not in own)

    def blocks(self, name: str) -> Iterator[tuple[int, QuantizedTensor | NDArray[Any]]]:
        """The tensor as it is cut in its file. See `ParquetCheckpoint.blocks`."""
        one = ParquetCheckpoint(self._files[name])
        if name not in one.entries:
            raise SourceError(f"{one.path}: does not hold {name[:100]!r} any more; it was changed since it was opened")
        yield from one.blocks(name)

    def _read_index(self) -> dict[str, Path]:
        """Tensor -> file. Nothing outside of the folder is ever opened."""
        path = self.path / INDEX
        try:
            weight_map = json.loads(path.read_bytes())["weight_map"]
            files = {name: Path(file) for name, file in weight_map.items()}
        except OSError as e:
            raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from e
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise SourceError(f"{path}: has no weight_map, which says where each tensor is: {e!r}") from e
        for name, file in files.items():
            if file.parts != (FOLDER, file.name) or file.suffix != SUFFIX:
                raise SourceError(
                    f"{path}: tensor {name[:100]!r} is in {str(file)[:100]!r}, which is no file of {FOLDER}/"
                )
        return {name: self.path / file for name, file in files.items()}

    def _check_folder(self) -> None:
        folder, wanted = self.path / FOLDER, set(self._files.values())
        there = set(folder.iterdir()) if folder.is_dir() else set()
        missing, added = sorted(wanted - there), sorted(there - wanted)
        # A file that was renamed is both.
        for paths, what in ((missing, f"missing, though {INDEX} lists it"), (added, f"not listed in {INDEX}")):
            if paths:
                more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
                also = f"; {added[0].name} is not listed there" if paths is missing and added else ""
                raise SourceError(f"{paths[0]}{more}: {what}{also}. Copy the directory again, or quantize again.")
