"""`Home`: where a tensor of a model is in its GGUF file, by what is known of its architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from ..models import Model
from ..models.gguf import ggufs

# Diffusion models, whose tensors keep their names: name in `models` -> general.architecture of ComfyUI-GGUF.
DIFFUSION = {"flux": "flux", "sd3": "sd3", "sdxl": "sdxl", "wan": "wan"}

# Beginning of the keys under which this package's reader finds what a file was made from.
RECORD = "arrowquant."


class Home(NamedTuple):
    """Where a tensor of the source is in the file.

    name: there
    expert: which matrix of a stack it is; None where it is no part of one
    heads: its rows are put in llama.cpp's order, head by head; 0 where they stay
    add: what is added to every value
    """

    name: str
    expert: int | None = None
    heads: int = 0
    add: float = 0.0


def find_homes(
    model: Model, config: Mapping[str, Any], names: Iterable[str]
) -> tuple[dict[str, Home | None], dict[str, Any]]:
    """Every tensor's home, None for those that are left out; and the keys of the architecture with its sizes.

    Raises FormatError for an architecture that is not in the table, a tensor that has no name there, and a config
    without the sizes that GGUF stores.
    """
    gguf = model.gguf
    if gguf is None:
        if model.name in DIFFUSION:
            return {name: Home(name) for name in names}, {}
        known = ", ".join([*(name for name, row in ggufs().items() if not row.same_names), *DIFFUSION])
        raise FormatError(
            f"architecture {model.name or 'of this checkpoint'} has no names for GGUF here; those that are known are "
            f"{known}"
        )
    sizes = gguf.keys(config)
    q, kv = (sizes.get(f"{gguf.architecture}.attention.head_count{s}") for s in ("", "_kv"))
    heads = {None: 0, "q": q, "k": kv or q}
    homes: dict[str, Home | None] = {}
    for name in names:
        is_omitted = gguf.omits(name, config)
        found = None if is_omitted else gguf.name(name)
        if found is None and not is_omitted:
            raise FormatError(f"{name}: {model.name} has no such tensor in GGUF files; leave it out first")
        if found is None or name in model.tied:
            homes[name] = None
        else:
            homes[name] = Home(found.name, found.expert, heads[found.permute] or 0, found.add)
    return homes, sizes


def permuted(rows: NDArray[Any], head: int) -> NDArray[Any]:
    """Rows [n, length] of whole heads of `head` rows each, in llama.cpp's order, which rotates neighbouring pairs.

    transformers rotates row i of a head with row i + head / 2.

    >>> permuted(np.arange(8)[:, None], 4)[:, 0].tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return np.ascontiguousarray(rows.reshape(-1, 2, head // 2, rows.shape[1]).swapaxes(1, 2)).reshape(rows.shape)


def unpermuted(rows: NDArray[Any], head: int) -> NDArray[Any]:
    """The inverse of `permuted`."""
    return np.ascontiguousarray(rows.reshape(-1, head // 2, 2, rows.shape[1]).swapaxes(1, 2)).reshape(rows.shape)
