"""The JSON of column spatial_quant_json: how a tensor's columns were equalized, and how its activations are smoothed.

    {"formula": "...", "divisors": [1.5, 0.25], "smoothing": {"alpha": 0.5, "mean": [0.0, 0.125]}, "reason": null}

`divisors` and `smoothing` are null where there are none; `reason` then says why. Numbers have at most nine significant
digits, which give every float32 back exactly, also to a reader that takes them for float64 first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SourceError

FORMULA = "divisors_i = sqrt(max|W_i| / max|X_i|); W = W_q * divisors; x_smooth = x * (1 - alpha) + mean * alpha"


@dataclass(frozen=True, slots=True, eq=False)
class Smoothing:
    """Of activations: x_smooth = x * (1 - alpha) + mean * alpha; mean: float32, one for each column."""

    alpha: float
    mean: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Spatial:
    """What column spatial_quant_json says of one tensor.

    divisors: float32, positive, one for each column of the weights, None where they were not divided
    smoothing: None where the mean of its activations is not known
    reason: why something is None, else None
    """

    divisors: NDArray[np.float32] | None = None
    smoothing: Smoothing | None = None
    reason: str | None = None


def to_json(spatial: Spatial) -> str:
    """The JSON of `spatial`.

    >>> spatial = Spatial(np.array([0.1, 3.0], np.float32), reason="no samples")
    >>> to_json(spatial).partition("divisors\\": ")[2]
    '[0.100000001, 3.0], "smoothing": null, "reason": "no samples"}'
    """
    smoothing = spatial.smoothing
    return json.dumps(
        {
            "formula": FORMULA,
            "divisors": None if spatial.divisors is None else _numbers(spatial.divisors),
            "smoothing": None if smoothing is None else {"alpha": smoothing.alpha, "mean": _numbers(smoothing.mean)},
            "reason": spatial.reason,
        },
        allow_nan=False,
    )


def from_json(text: str) -> Spatial:
    """The inverse of `to_json`.

    Raises SourceError for anything that `to_json` cannot have written.

    >>> from_json(to_json(Spatial(np.array([0.1, 3.0], np.float32)))).divisors
    array([0.1, 3. ], dtype=float32)
    """
    try:
        found = json.loads(text)
        divisors, smoothing, reason = (found[key] for key in ("divisors", "smoothing", "reason"))
        spatial = Spatial(
            None if divisors is None else _array(divisors),
            None if smoothing is None else Smoothing(float(smoothing["alpha"]), _array(smoothing["mean"])),
            None if reason is None else str(reason),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise SourceError(f"spatial_quant_json {text[:60]!r} is not what arrowquant writes: {e!r}") from e
    if spatial.divisors is not None and not (spatial.divisors > 0).all():
        i = int(np.flatnonzero(~(spatial.divisors > 0))[0])
        raise SourceError(f"spatial_quant_json: divisor {i} is {spatial.divisors[i]}; every divisor is positive")
    return spatial


def divisors_of(spatial_json: str | None) -> NDArray[np.float32] | None:
    """The divisors in a cell of column spatial_quant_json, which may be null. Raises SourceError as `from_json`."""
    return None if spatial_json is None else from_json(spatial_json).divisors


def _numbers(values: NDArray[np.float32]) -> list[float]:
    # Nine digits lie so close to their float32 that the detour over float64 cannot end at a neighbour.
    return [float(f"{value:.9g}") for value in values]


def _array(values: Any) -> NDArray[np.float32]:
    array = np.array(values)
    if not isinstance(values, list) or array.ndim != 1 or array.dtype.kind not in "fiu":
        raise ValueError("not a list of numbers")
    with np.errstate(over="ignore"):
        numbers: NDArray[np.float32] = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError("not a list of float32 numbers")
    return numbers
