"""Spatial: columns of a weight matrix equalized with the input channels that they are multiplied with.

    s_i = sqrt(max|W_i| / max|X_i|)        W / s is quantized, and y = X W^T = (X s) (W / s)^T

Column i of W / s and channel i of X s then have the same largest value, so that neither has outliers that the other
has not. Source of the formula: SmoothQuant (arXiv 2211.10438), equation 4, with migration strength 0.5.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .. import trace
from ..errors import InputError
from ..formats import Checkpoint, TensorInfo
from ..formats.diffusion_columns import Smoothing, Spatial
from ..reference import to_float32
from .calibration import Activations

# Bytes of a block that is looked at.
BLOCK_BYTES = 4 << 20
# Divisors are normal float32 numbers, well inside their range.
SMALLEST, LARGEST = 2.0**-126, 2.0**127

NOT_CALIBRATED = "no calibration data for this layer: weights quantized per group, columns not equalized"
NO_CHANNELS = "its calibration has neither channel_absmax nor samples with channels: columns not equalized"
NOT_A_MATRIX = "not a matrix, whose columns are input channels: columns not equalized"


def column_absmax(source: Checkpoint, name: str) -> NDArray[np.float32]:
    """max|W_i| of each column of a matrix, as float32; NaN or infinite where a weight of the column is.

    Reads the mapped weights once, block by block.
    """
    weights = source.view(name)
    rows, columns = weights.shape
    largest = np.zeros(columns, np.float32)
    step = max(1, BLOCK_BYTES // (4 * columns))
    with trace.span("read", name, weights.nbytes):
        for row in range(0, rows, step):
            np.maximum(largest, np.abs(to_float32(weights[row : row + step])).max(axis=0), out=largest)
    return largest


def divisors(weights: NDArray[np.float32], activations: NDArray[np.float32]) -> NDArray[np.float32]:
    """s_i = sqrt(max|W_i| / max|X_i|), computed in float64 and rounded once to float32.

    1 where either is zero, and where a weight is not finite, which quantizing then reports.

    >>> divisors(np.array([4, 0, 1], np.float32), np.array([1, 1, 0], np.float32)).tolist()
    [2.0, 1.0, 1.0]
    """
    is_defined = (weights > 0) & np.isfinite(weights) & (activations > 0)
    w, x = (np.where(is_defined, a, 1).astype(np.float64) for a in (weights, activations))
    return np.clip(np.sqrt(w / x), SMALLEST, LARGEST).astype(np.float32)


def equalize(source: Checkpoint, info: TensorInfo, activations: Activations | None, alpha: float) -> Spatial:
    """How a tensor that is quantized is equalized, and its activations smoothed; with the reason for what is not.

    Raises InputError where its activations have another number of channels than it has columns.
    """
    if activations is None:
        return Spatial(reason=NOT_CALIBRATED)
    if len(info.shape) != 2:
        return Spatial(reason=NOT_A_MATRIX)
    absmax, mean = activations.absmax, activations.mean
    if absmax is None:
        return Spatial(reason=NO_CHANNELS)
    if absmax.size != info.shape[1]:
        raise InputError(
            f"{info.name}: the calibration has {absmax.size} channels for it, and its shape is {list(info.shape)}: "
            f"{info.shape[1]} columns, one for each input channel"
        )
    return Spatial(
        divisors(column_absmax(source, info.name), absmax),
        None if mean is None else Smoothing(alpha, mean),
        None if mean is not None else "no samples with channels: the mean of its activations is not known",
    )
