"""The output formats that there are: a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import FormatError


class Target(NamedTuple):
    """Whether a format is a directory, which has place for the side files, and what it can be compressed with."""

    is_directory: bool
    compressions: tuple[str, ...] = ()


TARGETS: Mapping[str, Target] = {
    "compressed-tensors": Target(is_directory=True),
    "parquet": Target(is_directory=False, compressions=("zstd",)),
    "parquet-tensors": Target(is_directory=True, compressions=("zstd",)),
    "arrow": Target(is_directory=False, compressions=("zstd",)),
}


def target(format_name: str, compression: str | None = None) -> Target:
    """The row of a format.

    >>> target("parquet", "zstd").is_directory
    False

    Raises FormatError for a format that does not exist, and for a compression that it does not have.
    """
    if format_name not in TARGETS:
        raise FormatError(f"format {format_name!r}: choose one of {', '.join(TARGETS)}")
    found = TARGETS[format_name]
    if compression is not None and compression not in found.compressions:
        able = ", ".join(name for name, row in TARGETS.items() if compression in row.compressions)
        known = sorted({c for row in TARGETS.values() for c in row.compressions})
        way_out = f"--format {able} can" if able else f"choose {' or '.join(known)}"
        raise FormatError(f"{format_name} cannot be written with compression {compression!r}; {way_out}")
    return found
