"""`Queue`: the pieces that are still to be done, handed out as loads to whichever slot is free."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from ..dtypes import DTYPES
from ..formats.pieces import Piece
from . import Load, Sizes
from .converted import is_converted

# Results begin on a multiple of this, which suits every device.
ALIGNMENT = 256


def up(n_bytes: int) -> int:
    """Rounded up to ALIGNMENT."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def sizes(piece: Piece) -> Sizes:
    """Bytes of a piece, and of its results: codes, scales, zero points and counters, each rounded up to ALIGNMENT."""
    scheme = piece.entry.scheme
    if scheme is None:
        return Sizes(piece.n_bytes, 0)
    converted = 4 * piece.rows * piece.columns if is_converted(piece) else 0
    return Sizes(piece.n_bytes, sum(map(up, [*result_bytes(piece), ALIGNMENT])), converted)


def result_bytes(piece: Piece) -> list[int]:
    """Bytes of the codes and scales of a quantized piece, and of what is stored beside them, if anything is."""
    scheme, shape = piece.entry.scheme, (piece.rows, piece.columns)
    assert scheme is not None
    parts = [math.prod(scheme.packed_shape(shape))]
    parts.append(math.prod(scheme.scales_shape(shape)) * DTYPES[scheme.scale_storage].bits // 8)
    if (zeros := scheme.zeros_shape(shape)) is not None and scheme.zeros_dtype is not None:
        parts.append(math.prod(zeros) * DTYPES[scheme.zeros_dtype].bits // 8)
    return parts


class Queue:
    """Loads for all slots. The source files take turns, `width` of them at a time, because two writers in one output
    file wait for each other.

    `two_pass` names the tensors whose pieces are handed out first for their range; the queue then waits for their
    `second_pass`.
    """

    def __init__(self, work: Iterable[Sequence[Piece]], two_pass: set[str], width: int) -> None:
        files: dict[object, deque[tuple[Piece, bool]]] = {}
        for pieces in work:
            for piece in pieces:
                info = piece.entry.info
                files.setdefault(info.file, deque()).append((piece, info.name in two_pass))
        self._files = deque(files.values())
        self._active: deque[deque[tuple[Piece, bool]]] = deque()
        self._width = max(1, width)
        self._n_deferred = len(two_pass)
        self._is_stopped = False
        self._changed = threading.Condition()

    def take(self, most: Sizes) -> Load | None:
        """The next load of at most these bytes; None when there is nothing more to do. Waits for second passes."""
        with self._changed:
            while not self._is_stopped:
                while self._files and len(self._active) < self._width:
                    self._active.append(self._files.popleft())
                if self._active:
                    return self._next(most)
                if self._n_deferred == 0:
                    return None
                self._changed.wait()
            return None

    def second_pass(self, pieces: Sequence[Piece]) -> None:
        """The pieces of a tensor whose range is known now: they are next, while their bytes may still be in a cache."""
        with self._changed:
            self._active.appendleft(deque((piece, False) for piece in pieces))
            self._n_deferred -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _next(self, most: Sizes) -> Load:
        file = self._active.popleft()
        (first, is_range), room = file[0], most
        pieces: list[Piece] = []
        end = first.offset
        while file:
            piece, wants_range = file[0]
            need = sizes(piece)
            fits = need.source <= room.source and need.results <= room.results
            if pieces and (wants_range != is_range or piece.offset != end or not fits):
                break
            pieces.append(piece)
            file.popleft()
            end = piece.offset + piece.n_bytes
            room = Sizes(room.source - need.source, room.results - need.results)
        if file:
            self._active.append(file)
        return Load(first.entry.info.file, first.offset, end - first.offset, tuple(pieces), is_range)
