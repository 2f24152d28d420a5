"""Dicts of arrays, quantized layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..errors import InputError
from ..schemes import Scheme
from .results import LayerResults, layer_result


def quantize_in_turn(
    weights: Mapping[str, Any],
    scheme: Scheme,
    *,
    device: str,
    threads: int | None,
    continue_on_error: bool = False,
    progress_callback: Callable[[str, float], Any] | None = None,
) -> LayerResults:
    """In the order of the dict. See `ArrowQuantV2.quantize_batch_with_progress`."""
    check_names(weights)
    results = LayerResults()
    for i, (name, found) in enumerate(ops.quantize_all(weights, scheme, device=device, threads=threads), 1):
        if isinstance(found, InputError):
            if not continue_on_error:
                raise found
            results.errors[name] = found
        else:
            results[name] = layer_result(found)
        if progress_callback is not None:
            progress_callback(name, i / len(weights))
    return results


def check_names(weights: Any) -> None:
    """Raise InputError unless `weights` is a dict of at least one layer, with text for names."""
    if not isinstance(weights, Mapping):
        raise InputError(
            f"{type(weights).__module__}.{type(weights).__qualname__} is no dict of layer names and arrays; "
            f"quantize_arrow takes tables, quantize_batch_smart whatever holds weights"
        )
    if not weights:
        raise InputError("the dict of weights is empty")
    for name in weights:
        if not isinstance(name, str) or not name:
            raise InputError(f"layer name {name!r}: it must be text that is not empty")


def from_lists(weights: Any) -> dict[str, Any]:
    """A dict whose nested lists of numbers are float32 arrays; all else in it is as it was.

    Raises InputError for ragged lists and for what is no number.
    """
    check_names(weights)
    return {name: _from_list(x, name) if isinstance(x, list | tuple) else x for name, x in weights.items()}


def _from_list(x: list[Any] | tuple[Any, ...], name: str) -> NDArray[np.float32]:
    try:
        a = np.asarray(x)
    except (ValueError, TypeError, OverflowError) as e:
        raise InputError(f"{name}: its lists cannot be read as an array: {e}") from e
    if a.dtype.kind not in "iuf":
        raise InputError(f"{name}: a list of numbers is expected; this one makes an array of {a.dtype}")
    with np.errstate(over="ignore"):  # what overflows float32 is counted and raised with the layer's name
        return a.astype(np.float32)
