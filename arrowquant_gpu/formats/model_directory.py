"""What an output directory holds beside the weights: the side files of the source, its model card, JSON files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import BinaryIO

from ..errors import SourceError
from . import Checkpoint
from .model_card import model_card
from .output import MANIFEST, Output, target_errors

CARD = "README.md"


def copy_side_files(
    output: Output, source: Checkpoint, provenance: Mapping[str, str], summary: str, without: Collection[str] = ()
) -> None:
    """Copy the side files of `source` under their names, but those in `without`; the model card with `summary` in it.

    Raises SourceError for one that cannot be read, and TargetError.
    """
    root = source.path if source.path.is_dir() else source.path.parent
    card = None
    for file in source.side_files:
        name = str(file.relative_to(root))
        if name == CARD:
            with _open(file) as f:
                card = f.read()
        elif name not in (*without, MANIFEST):
            with _open(file) as f, target_errors(output.target), output.path(name).open("wb") as target:
                shutil.copyfileobj(f, target)
    write_bytes(output, CARD, model_card(card, provenance, summary))


def write_json(output: Output, name: str, value: object) -> None:
    """Write a JSON file of an output. Raises TargetError."""
    write_bytes(output, name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(output: Output, name: str, data: bytes) -> None:
    """Write a small file of an output as a whole. Raises TargetError."""
    with target_errors(output.target, len(data)):
        output.path(name).write_bytes(data)


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as e:
        raise SourceError(f"{file}: cannot be read: {e.strerror}") from e
