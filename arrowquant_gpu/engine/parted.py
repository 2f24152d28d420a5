"""`PartedCheckpoint`: a checkpoint some of whose tensors are cut into parts, as a format wants them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import models
from ..dtypes import DTYPES
from ..errors import FormatError
from ..formats import Checkpoint, TensorInfo
from ..models.parts import Part
from .computed import ComputedCheckpoint, in_order


def in_parts(source: Checkpoint, format_name: str) -> Checkpoint:
    """`source`, or where the format has some of its tensors in parts, those in their place.

    Raises FormatError for a config.json without the sizes that this needs, and for a tensor of another shape.
    """
    gguf = models.find(source.config, source.tensors).gguf if format_name == "gguf" else None
    parts = {} if gguf is None else gguf.parts(source.config or {}, source.tensors)
    return PartedCheckpoint(source, parts) if parts else source


class PartedCheckpoint(ComputedCheckpoint):
    """`source` with the parts of a tensor in the place of the tensor, wherever `parts` names it.

    Of a tensor that is cut, one matrix at a time is read; every other one is as it was.

    Raises FormatError for a tensor that is not of the shape that its parts need.
    """

    why = "its tensors are cut into parts as they are read"

    def __init__(self, source: Checkpoint, parts: Mapping[str, Sequence[Part]]) -> None:
        self.source, self.path = source, source.path
        self.metadata, self.config, self.side_files = source.metadata, source.config, source.side_files
        self.left_out = source.left_out
        self._parts: dict[str, tuple[TensorInfo, Part]] = {}
        self.tensors = in_order(self._cut(parts))

    def _cut(self, parts: Mapping[str, Sequence[Part]]) -> Iterator[TensorInfo]:
        for name, info in self.source.tensors.items():
            if name not in parts:
                yield info
                continue
            if DTYPES[info.dtype].numpy is None:
                raise FormatError(f"{name} is {info.dtype}, and cannot be cut into {parts[name][0].name}")
            for part in parts[name]:
                self._parts[part.name] = info, part
                yield dataclasses.replace(info, name=part.name, shape=part.shape(info.shape))

    def view(self, name: str) -> NDArray[Any]:
        """See `Checkpoint`: a part is new memory."""
        return super().view(name) if name in self._parts or name not in self.tensors else self.source.view(name)

    def read(self, name: str, begin: int, out: NDArray[np.uint8]) -> None:
        """See `ComputedCheckpoint`."""
        if name not in self._parts:
            self._bytes(self.source.tensors[name], begin, out)
            return
        info, part = self._parts[name]
        n, rows, columns = part.matrices(info.shape)
        dtype = DTYPES[info.dtype].numpy
        assert dtype is not None
        matrix = np.empty(rows * columns * dtype.itemsize, np.uint8)
        size, at = self.tensors[name].n_bytes // n, 0
        while at < out.size:
            number, skipped = divmod(begin + at, size)
            self._bytes(info, number * matrix.size, matrix)
            cut = part.cut(matrix.view(dtype).reshape(1, rows, columns))
            found = np.ascontiguousarray(cut).reshape(-1).view(np.uint8)[skipped : skipped + out.size - at]
            out[at : at + found.size] = found
            at += found.size

    def fingerprint(self) -> str:
        """That of the source. See `Checkpoint`."""
        return self.source.fingerprint()

    def _bytes(self, info: TensorInfo, begin: int, out: NDArray[np.uint8]) -> None:
        """The bytes of a tensor of the source."""
        if isinstance(self.source, ComputedCheckpoint):
            self.source.read(info.name, begin, out)
            return
        raw: NDArray[Any] = self.source.mapped(info.file)
        out[...] = raw[info.offset + begin : info.offset + begin + out.size]
