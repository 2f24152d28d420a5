"""Where tensors come from and go to. One file per format; this one holds what they have in common.

A source is a `Checkpoint`: names, types and shapes from headers alone, and a read-only view of any tensor's bytes.
A sink takes planned tensors in order, row block by row block, and leaves nothing under its final name until `commit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from ..schemes import Scheme
from ..tensor import QuantizedTensor


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a source: `offset` is the absolute position of its first byte in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What happens to one tensor: quantized with `scheme`, or, where that is None, copied as it is; and why."""

    info: TensorInfo
    scheme: Scheme | None
    reason: str


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

    def fingerprint(self) -> str:
        """Hash of all headers and of samples of the weights: tells whether a source is the one seen before."""
        ...


class Sink(Protocol):
    """A writable target. Calls come in the order open, then per entry its rows or bytes in order, then commit.

    `abort` may come at any time after open and removes what was written.
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

    def open(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        """Create and preallocate the temporary output."""
        ...

    def write_rows(self, entry: Entry, row: int, packed: NDArray[Any], scales: NDArray[Any], zeros: Any) -> None:
        """The quantized rows row .. row + len(packed) of an entry (scales once, with row 0, for granularity tensor)."""
        ...

    def write_bytes(self, entry: Entry, offset: int, data: NDArray[Any]) -> None:
        """Bytes offset .. offset + len(data) of an entry that is copied."""
        ...

    def commit(self) -> tuple[Path, ...]:
        """Finish, sync and rename to the final name. Returns the files of the output."""
        ...

    def abort(self) -> None:
        """Remove the temporary output."""
        ...


class QuantizedCheckpoint(Protocol):
    """A readable quantized checkpoint: what `dequantize` and `verify` read, whatever format it was written in.

    `entries` holds every tensor of the original model under its original name, shape and dtype. `metadata` and
    `config` are the original's; `provenance` says how it was quantized.
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
