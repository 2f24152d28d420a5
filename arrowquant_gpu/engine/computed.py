"""`ComputedCheckpoint`: a source whose bytes are made as they are read, since no file has them.

Its tensors have the places of a file that does not exist: `offset` of a tensor is where its bytes would begin if those
of each file followed each other. `ComputedReader` gives the bytes at such places.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import SourceError
from ..formats import Checkpoint, TensorInfo
from . import Load


class ComputedCheckpoint(Checkpoint):
    """See `Checkpoint`. `why` says why no file has these bytes."""

    why: str

    @abc.abstractmethod
    def read(self, name: str, begin: int, out: NDArray[np.uint8]) -> None:
        """Write the bytes of a tensor from position `begin` on to `out`. Safe to call from any thread."""

    def view(self, name: str) -> NDArray[Any]:
        """The whole tensor in new memory: see `Checkpoint`."""
        if name not in self.tensors:
            raise SourceError(f"{self.path}: no tensor {name!r}")
        info, dtype = self.tensors[name], DTYPES[self.tensors[name].dtype].numpy
        raw = np.empty(info.n_bytes, np.uint8)
        self.read(name, 0, raw)
        return raw if dtype is None else raw.view(dtype).reshape(info.shape)

    def descriptor(self, file: Path, flags: int = 0) -> int:
        """Raises SourceError: no file has these bytes."""
        raise SourceError(f"{file}: {self.why}; choose --read auto")

    def mapped(self, file: Path) -> NDArray[np.uint8]:
        """Raises SourceError: no file has these bytes."""
        raise SourceError(f"{file}: {self.why}; choose --read auto")


def in_order(infos: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """Tensors by name, at their places in files that do not exist."""
    found: dict[str, TensorInfo] = {}
    ends: dict[Path, int] = {}
    for info in infos:
        n_bytes = -(-math.prod(info.shape) * DTYPES[info.dtype].bits // 8)
        begin = ends.get(info.file, 0)
        found[info.name] = dataclasses.replace(info, offset=begin, n_bytes=n_bytes)
        ends[info.file] = begin + n_bytes
    return found


class ComputedReader:
    """Computes into the caller's buffer. See `Reader`."""

    name = "computed"
    slack: int | None = 0
    notes: tuple[str, ...] = ()

    def __init__(self, source: ComputedCheckpoint) -> None:
        self._source = source
        self._starts: dict[Path, list[tuple[int, str]]] = {}
        for name, info in source.tensors.items():
            if info.n_bytes:
                self._starts.setdefault(info.file, []).append((info.offset, name))

    def read(self, load: Load, buffer: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """The tensors, or parts of tensors, that would be at this place. See `Reader`."""
        assert buffer is not None
        out, starts = buffer[: load.n_bytes], self._starts.get(load.file, [])
        at = load.offset
        number = bisect_right(starts, at, key=lambda start: start[0]) - 1
        while at < load.offset + load.n_bytes:
            begin, name = starts[number]
            stop = min(begin + self._source.tensors[name].n_bytes, load.offset + load.n_bytes)
            self._source.read(name, at - begin, out[at - load.offset : stop - load.offset])
            at, number = stop, number + 1
        return out

    def expect(self, load: Load) -> None:
        """Nothing is known of where the bytes are. See `Reader`."""

    def close(self) -> None:
        """Nothing is held. See `Reader`."""
