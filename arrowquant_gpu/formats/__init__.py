"""Where tensors come from and go to. One file per format; this one holds what they have in common.

A source is a `Checkpoint`: names, types and shapes from headers alone, and a read-only view of any tensor's bytes.
A sink says where every piece of every planned tensor belongs, so that they can be written in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..schemes import Scheme
from ..tensor import QuantizedTensor

if TYPE_CHECKING:
    from .pieces import Piece


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a source: `offset` is the absolute position of its first byte in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Diffusion:
    """What is known of a tensor of a diffusion model beside its weights; docs/diffusion.md says what each means.

    modality: text, code, image or audio
    divisors: float32, one for each column; the weights are divided by them before they are quantized, and what is
        decoded must be multiplied by them. None where the weights are quantized as they are
    time_aware, spatial, activation_stats: JSON, as the columns of V2 Extended of that name hold it
    """

    modality: str
    divisors: NDArray[np.float32] | None = None
    time_aware: str | None = None
    spatial: str | None = None
    activation_stats: str | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """What happens to one tensor: quantized with `scheme`, or, where that is None, copied as it is; and why.

    Tensors with the same `shared`, unless that is empty, have one global scale, where their scheme has one at all.
    """

    info: TensorInfo
    scheme: Scheme | None
    reason: str
    diffusion: Diffusion | None = None
    shared: str = ""


class Codes(NamedTuple):
    """What a piece [rows, columns] was quantized to, as QuantizedTensor holds it; what is of all of it is (1, 1)."""

    packed: NDArray[np.uint8]
    scales: NDArray[Any]
    zeros: NDArray[Any] | None


class Checkpoint(Protocol):
    """A readable float checkpoint."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    side_files: tuple[Path, ...]
    left_out: tuple[tuple[Path, str], ...]

    def view(self, name: str) -> NDArray[Any]:
        """Read-only array over the mapped file, in the tensor's dtype and shape; uint8 [n_bytes] for sub-byte types."""
        ...

    def descriptor(self, file: Path, flags: int = 0) -> int:
        """A new descriptor, opened O_RDONLY | `flags`, of one of the files; the caller closes it.

        Raises SourceError where the file was changed since its header was read.
        """
        ...

    def mapped(self, file: Path) -> NDArray[np.uint8]:
        """All bytes of one of the files, as a read-only view of its memory map."""
        ...

    def fingerprint(self) -> str:
        """Hash of all headers and of samples of the weights: tells whether a source is the one seen before."""
        ...


class Place(NamedTuple):
    """Where some bytes of a piece are stored: so many, from `offset` on in a file of the output.

    They are `lines` parts of the same size; from the beginning of one to that of the next are `stride` bytes.
    """

    file: str
    offset: int
    n_bytes: int
    lines: int = 1
    stride: int = 0


class Sink(Protocol):
    """A writable target whose layout follows from the plan: every piece has its places before anything is computed.

    `open` makes every file in its final size (through `Output`), with all content but that of the pieces; called for
    an output that is being resumed it writes the same again and touches no byte that belongs to a piece. Then the
    engine writes what `stored` gives to `places`, in any order and from any thread. Nothing is under its final name
    until `commit`; where it comes to an error instead, the output is aborted.

    A format may say more of itself, which the plan asks for:

        quantizes: roles (models/) beside linear weights that it quantizes by default, a frozenset
        fused_alike: True where parts of a fused matrix must be quantized alike, and are kept alike; False where its
            readers do not fuse, so that nothing is warned of
        side_files: of a single file, whether the tokenizer goes into it
        warnings(entries): sentences on what a known engine refuses
    """

    format: str

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme as this format stores it for this tensor (for example with another scale type).

        Raises FormatError, saying why and which formats can, where the format cannot carry it at all.
        """
        ...

    def n_bytes(self, entry: Entry) -> int:
        """Bytes that this entry takes in the output, known from the plan alone."""
        ...

    def pieces(self, entry: Entry) -> Sequence[Piece]:
        """The tensor's pieces, cut as this format allows (see pieces.py)."""
        ...

    def open(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        """Begin the output: make and lay out its files."""
        ...

    def places(self, piece: Piece) -> Sequence[Place]:
        """Where the bytes of a piece belong. The places of all pieces are disjoint."""
        ...

    def stored(self, piece: Piece, codes: Codes | NDArray[np.uint8]) -> Sequence[NDArray[Any]]:
        """What goes to those places, one row-major array each: views of `codes` where the layout allows.

        `codes` are the bytes themselves where the tensor is copied.
        """
        ...

    def finish(self, entry: Entry) -> None:
        """All pieces of this tensor are written: write what follows from all of them together, if anything does."""
        ...

    def commit(self) -> tuple[Path, ...]:
        """Sync and rename to the final name. Returns the files of the output."""
        ...


class QuantizedCheckpoint(Protocol):
    """A readable quantized checkpoint: what `dequantize` and `verify` read, whatever format it was written in.

    `entries` holds every tensor of the original model under its original name, shape and dtype. `metadata` and
    `config` are the original's; `provenance` says how it was quantized.

    A reader may also have `omitted`, the tensors of the original that its format does without,
    `scales_are_rounded`: whether scales were quantized once more when codes were there already, and, where it has no
    `config`, `sizes` that the file tells, by the names that config.json has for them.
    """

    path: Path
    format: str
    entries: dict[str, Entry]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    provenance: dict[str, str]
    side_files: tuple[Path, ...]

    def blocks(self, name: str) -> Iterator[tuple[int, QuantizedTensor | NDArray[Any]]]:
        """The tensor in row blocks: (first row, rows as QuantizedTensor, or as an array [rows, length] if copied).

        A copied row that is longer than a block comes in several pieces [1, n] with the same first row.
        """
        ...
