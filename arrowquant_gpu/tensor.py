"""`QuantizedTensor`: the result of quantizing one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .schemes import Scheme


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedTensor:
    """Packed codes with everything needed to decode them. Holds its arrays; copies nothing.

    packed: uint8 [rows, row bytes], laid out as drawn in schemes.py
    scales: the scheme's scale dtype, [rows, groups of a row] ((1, 1) for granularity tensor)
    zeros: uint8 of the same shape as scales, or None if the scheme is symmetric
    shape: shape of the original tensor
    scheme: how it was quantized
    dtype: name of the original element type (see dtypes.py), which `dequantize` returns by default

    The arrays are NumPy arrays, or CuPy arrays where the result stayed on a GPU.
    """

    packed: Any
    scales: Any
    zeros: Any | None
    shape: tuple[int, ...]
    scheme: Scheme
    dtype: str
