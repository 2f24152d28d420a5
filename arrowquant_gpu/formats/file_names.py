"""`file_names`: a file name for every tensor, which every file system and shell takes, and no two of which meet.

A name of a tensor that is a harmless file name stays as it is. Any other gets its harmless characters, and after `~`,
which no harmless name has, the beginning of the SHA-256 of the true one. So what a file is called depends on its tensor
alone, but where two tensors differ in case alone.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

from ..errors import FormatError

# Of bytes, on most file systems 255 for the whole; what else a name may get (a suffix, `.compressed`) takes the rest.
MOST_CHARACTERS = 180
# Digits of the hash.
N_DIGITS = 16

_HARMFUL = re.compile(r"[^A-Za-z0-9._-]")
# Hidden files, options of commands.
_NO_BEGINNING = re.compile(r"^[.-]+")
# Devices of Windows, with any extension.
_DEVICES = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$)", re.IGNORECASE)


def file_names(names: Sequence[str], suffix: str) -> list[str]:
    """File names for tensor names, in their order; each depends on the set of names alone.

    >>> file_names(["model.layers.0.q_proj.weight", "down/0", "nul", "W", "w"], ".parquet")[:2]
    ['model.layers.0.q_proj.weight.parquet', 'down_0~77c224279178558c.parquet']

    Raises FormatError for two tensors whose file names are alike after all.
    """
    alike = Counter(name.casefold() for name in names)
    made = [_marked(name) if alike[name.casefold()] > 1 else _file_name(name) for name in names]
    first: dict[str, str] = {}
    for name, file in zip(names, made, strict=True):
        if (other := first.setdefault(file.casefold(), name)) is not name:
            raise FormatError(
                f"tensors {other[:100]!r} and {name[:100]!r} would have one file name; rename one of them"
            )
    return [file + suffix for file in made]


def _file_name(name: str) -> str:
    return name if name == _harmless(name) else _marked(name)


def _marked(name: str) -> str:
    digits = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:N_DIGITS]
    return f"{_harmless(name)}~{digits}"


def _harmless(name: str) -> str:
    name = _NO_BEGINNING.sub("_", _HARMFUL.sub("_", name[:MOST_CHARACTERS])) or "_"
    return f"_{name}" if _DEVICES.match(name) else name
