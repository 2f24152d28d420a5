"""Weights as rows of Arrow tables in, quantized tensors as rows of Arrow tables out; docs/tables.md.

One row is a tensor, or a part of one: columns `layer_name`, `weights` (lists of numbers), and where the nesting of the
lists is not the shape, `shape`. This file says what a row of weights is; `weights` reads them, `results` holds what is
written, `quantize` is between the two, for record batches, tables, streams and dicts alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ..errors import ArrowQuantError


class Layer(NamedTuple):
    """One row of weights.

    weights: [rows, length], a read-only view of the Arrow buffer
    shape: of the whole tensor
    dtype: name of its element type
    chunk, n_chunks: which of how many rows of the table that hold this tensor, in order; each has whole rows of it
    """

    name: str
    weights: NDArray[Any]
    shape: tuple[int, ...]
    dtype: str
    chunk: int = 0
    n_chunks: int = 1


@dataclass(frozen=True, slots=True)
class Problem:
    """A layer that could not be quantized, and why."""

    layer: str
    error: ArrowQuantError


# Key of the schema metadata that lists the layers which are not in a table of results.
ERRORS_KEY = b"arrowquant.errors"


def problems_json(problems: Iterable[Problem]) -> str:
    """The value of ERRORS_KEY: a JSON list of {"layer", "error", "message"}.

    >>> from arrowquant_gpu.errors import InputError
    >>> problems_json([Problem("fc", InputError("fc: no weights"))])
    '[{"layer": "fc", "error": "InputError", "message": "fc: no weights"}]'
    """
    return json.dumps([{"layer": p.layer, "error": type(p.error).__name__, "message": str(p.error)} for p in problems])
