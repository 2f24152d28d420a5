"""The streaming engine: carries a plan out in bounded memory, on any number of devices. docs/engine.md.

    queue of pieces -> [ read -> h2d -> kernel -> d2h -> write ] in each slot of each device's ring -> output

A slot is a set of buffers with one thread that takes a load from the queue, brings it through all stages, and takes
the next. While one slot waits for the disk another is on the link and a third in the kernel, so the stages overlap and
the number of slots bounds the memory. The output's layout is known before anything runs, so loads may finish in any
order. This file holds what the parts have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..formats import Codes
from ..formats.pieces import Piece
from ..reference import Findings

# Called with (bytes of the source done, bytes in all, name of a tensor), from the thread that asked for the work.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Load:
    """What a slot works on at a time: pieces that follow each other in one source file, without a gap.

    offset, n_bytes: their bytes in `file`
    is_range: the first pass over tensors whose scheme needs the range of all of them, which only looks for the extremes
    """

    file: Path
    offset: int
    n_bytes: int
    pieces: tuple[Piece, ...]
    is_range: bool = False


# What a first pass gives, arrays (1, 1): scale and zero point of a tensor of granularity tensor; (None, the global
# scale) of a tensor that has one.
Solved = tuple[NDArray[Any] | None, NDArray[Any] | None]


class Result(NamedTuple):
    """A piece that has come through a device. Arrays are on the host and belong to the slot: valid until the next one.

    weights: [rows, columns] in the tensor's dtype as read, or the bytes [n] of a tensor that is copied
    codes: None where the tensor is copied, and in the first pass
    bounds: (min(0, lowest), max(0, highest)) in the first pass
    """

    piece: Piece
    weights: NDArray[Any]
    codes: Codes | None = None
    findings: Findings = Findings()
    bounds: tuple[float, float] | None = None


class Sizes(NamedTuple):
    """Bytes: of source read by one load, and of results (codes, scales, zero points, each rounded up) it gives.

    converted: of weights as float32, where kernels cannot read them as they lie in the source, see converted.py
    """

    source: int
    results: int
    converted: int = 0


class Slot(Protocol):
    """Buffers for one load, used by one thread at a time."""

    sizes: Sizes

    def run(self, load: Load, solved: Mapping[str, Solved]) -> Generator[Result, None, None]:
        """Bring a load through the device; results come in the order of its pieces.

        `solved` has the tensors that need a first pass, by name. The load fits `sizes`. An iterator that is closed
        early, or raises, leaves the slot ready for another load, and nothing of this one under way.

        Raises SourceError and DeviceError.
        """
        ...


class Device(Protocol):
    """Something that quantizes: its ring of slots, and the memory they hold."""

    name: str
    reader: Reader
    # What users should know of how the ring came about, for example that it was made smaller; sentences.
    notes: tuple[str, ...]

    @property
    def slots(self) -> Sequence[Slot]: ...

    def close(self) -> None:
        """Free the ring. No slot is running."""
        ...


class Reader(Protocol):
    """Gets bytes of the source onto the host; used by all slots at once.

    slack: bytes by which the buffer of a load must be larger than the load; None where `read` needs no buffer
    notes: what users should know of how it reads, sentences
    """

    name: str
    slack: int | None
    notes: tuple[str, ...]

    def read(self, load: Load, buffer: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """The bytes [load.n_bytes], in `buffer` (not always from its start) or in memory of the reader's own.

        Raises SourceError, naming file and position, for a failed or short read.
        """
        ...

    def expect(self, load: Load) -> None:
        """A hint that this load will be read soon."""
        ...

    def close(self) -> None: ...
