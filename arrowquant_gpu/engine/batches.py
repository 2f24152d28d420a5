"""`batches`: which pieces of a load are on a device together, and where in a slot's buffers each of them is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..backends.counters import COUNTERS
from ..errors import DeviceError
from ..formats.pieces import Piece
from ..schemes import Scheme
from . import Load
from .loads import ALIGNMENT, result_bytes, sizes, up

Stage = Literal["h2d", "kernel", "d2h"]

# A piece that is copied together with the one before it begins at a multiple of this, as the kernels' wide loads want.
VECTOR = 16
# Room in the device's input for pieces that have to begin anew, at a multiple of ALIGNMENT.
SEAMS = 64 * ALIGNMENT


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a piece is in the buffers of a slot.

    input: of its weights in the device input; where they are converted, in the part for those
    codes: of its codes, scales and zero points in the results
    given: the part of the results that holds scales, zero points or a global scale which are known and go up with the
        weights
    counter: the number of its counters, if it has any
    """

    input: int
    is_converted: bool
    codes: int
    given: slice | None
    counter: int | None


@dataclass(slots=True)
class Batch:
    """Pieces that follow each other in a load and are on the device together.

    Of the device input, pieces that kernels can read come first, n_direct bytes; converted ones follow. Of the results,
    codes come first, n_codes bytes; counters follow.

    pieces: all of them
    placed: those that have work for the device
    copies: (position in the load, position in the device input, bytes)
    """

    pieces: list[Piece] = field(default_factory=list)
    placed: dict[int, Placed] = field(default_factory=dict)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    n_direct: int = 0
    n_converted: int = 0
    n_codes: int = 0
    n_counters: int = 0

    @property
    def n_results(self) -> int:
        return self.n_codes + self.n_counters * ALIGNMENT

    def bytes_of(self, stage: Stage) -> int:
        """Bytes that a stage moves, or, of stage kernel, reads and writes."""
        n_input = sum(n for _, _, n in self.copies) + self.n_converted
        return {"h2d": n_input, "kernel": n_input + self.n_results, "d2h": self.n_results}[stage]

    def work(self) -> Iterator[tuple[Piece, Placed]]:
        """The pieces that have work for the device."""
        return ((self.pieces[i], placed) for i, placed in self.placed.items())

    def counters(self, results: Any, placed: Placed) -> Any:
        """The counters of a piece, uint64 [COUNTERS], in the results on the host or on the device."""
        assert placed.counter is not None
        at = self.n_codes + placed.counter * ALIGNMENT
        return results[at : at + 8 * COUNTERS].view(np.uint64)

    def add(self, load: Load, piece: Piece, n_input: int, n_converted: int, n_results: int) -> bool:
        """Add a piece, unless it does not fit into rooms of these sizes any more."""
        scheme = piece.entry.scheme
        if scheme is not None and piece.rows * piece.columns:
            need = sizes(piece)
            direct = 0 if need.converted else up(need.source)
            results = ALIGNMENT if load.is_range else need.results
            is_full = (
                self.n_direct + direct + self.n_converted + need.converted > n_input
                or self.n_converted + need.converted > n_converted
                or self.n_results + results > n_results
            )
            if is_full:
                return False
            self.placed[len(self.pieces)] = self._place(load, piece, scheme)
        self.pieces.append(piece)
        return True

    def _place(self, load: Load, piece: Piece, scheme: Scheme) -> Placed:
        need = sizes(piece)
        if need.converted:
            at = self.n_converted
            self.n_converted = up(at + need.converted)
        else:
            at = self._copied(piece.offset - load.offset, piece.n_bytes)
        codes, given, counter = self.n_codes, None, None
        if not load.is_range:
            self.n_codes += need.results - ALIGNMENT
        if scheme.needs_range and not load.is_range:
            parts = result_bytes(piece)
            # Of a tensor with one scale that scale is given, and what is beside it; of others the latter alone.
            first = 1 if scheme.granularity == "tensor" else 2
            given = slice(codes + sum(map(up, parts[:first])), self.n_codes)
        if scheme.granularity != "tensor" or load.is_range:
            counter = self.n_counters
            self.n_counters += 1
        return Placed(at, need.converted > 0, codes, given, counter)

    def _copied(self, start: int, n_bytes: int) -> int:
        """Add bytes of the load to what is copied; returns where they are in the device input."""
        if self.copies:
            first, at, n = self.copies[-1]
            if first + n == start and (at + n) % VECTOR == 0:
                self.copies[-1] = first, at, n + n_bytes
                self.n_direct = up(at + n + n_bytes)
                return at + n
        at = self.n_direct
        self.copies.append((start, at, n_bytes))
        self.n_direct = up(at + n_bytes)
        return at


def batches(load: Load, n_input: int, n_converted: int, n_results: int) -> Iterator[Batch]:
    """A load in as few batches as these rooms allow: mostly one.

    Raises DeviceError for a piece that is larger than the rooms.
    """
    rooms = n_input, n_converted, n_results
    batch = Batch()
    for piece in load.pieces:
        if not batch.add(load, piece, *rooms):
            yield batch
            batch = Batch()
            if not batch.add(load, piece, *rooms):
                raise DeviceError(f"{load.file}, tensor {piece.entry.info.name}: a piece is larger than the slot")
    yield batch
