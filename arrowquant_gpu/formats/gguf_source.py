"""`GgufSource`: what a GGUF file that is written again as GGUF says beside its weights. docs/formats/gguf.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .gguf_file import MAGIC, StoredValue, Value, read_header
from .gguf_homes import RECORD

# What config.json calls the sizes that mixes depend on -> key without the architecture.
_SIZES = {"num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv"}
_SIZES |= {"num_local_experts": "expert_count"}


class GgufSource(NamedTuple):
    """The keys of a file but those of this package's record, in their order, as they are stored.

    sizes: as `sizes_of` gives them
    alignment: of its tensors, in bytes, which one of the keys may say
    """

    keys: Mapping[str, StoredValue]
    sizes: Mapping[str, int]
    alignment: int


def open_source(file: Path) -> GgufSource | None:
    """What a file says, None where it is no GGUF file. Raises SourceError for one that is damaged."""
    try:
        with file.open("rb") as f:
            is_gguf = f.read(len(MAGIC)) == MAGIC
    except OSError:
        return None
    if not is_gguf:
        return None
    header = read_header(file)
    keys = {key: value for key, value in header.stored.items() if not key.startswith(RECORD)}
    return GgufSource(keys, sizes_of(header.keys), header.alignment)


def sizes_of(keys: Mapping[str, Value]) -> dict[str, int]:
    """Sizes that mixes depend on, by the names that config.json has for them; of the first layer where layers differ.

    >>> keys = {"general.architecture": "llama", "llama.attention.head_count": 8}
    >>> sizes_of(keys | {"llama.attention.head_count_kv": np.array([2, 4], "<i4")})
    {'num_attention_heads': 8, 'num_key_value_heads': 2}
    """
    found = {}
    for name, key in _SIZES.items():
        value = keys.get(f"{keys.get('general.architecture')}.{key}")
        if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "iu":
            value = int(value[0])
        if isinstance(value, int) and not isinstance(value, bool):
            found[name] = value
    return found
