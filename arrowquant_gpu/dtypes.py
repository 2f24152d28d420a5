"""The table of element types: one name for each, as in NumPy and ml_dtypes, with its safetensors name and width.

>>> from arrowquant_gpu.dtypes import DTYPES, from_safetensors
>>> DTYPES["bfloat16"].bits, from_safetensors("BF16").name
(16, 'bfloat16')
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .errors import InputError


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    `numpy` is None for the sub-byte types, which NumPy cannot index in their packed form. `is_float` says whether
    the type can hold weights that are worth quantizing.
    """

    name: str
    safetensors: str
    bits: int
    is_float: bool
    numpy: np.dtype[Any] | None


def _row(name: str, safetensors: str, bits: int, is_float: bool, scalar: type | None) -> tuple[str, DType]:
    return name, DType(name, safetensors, bits, is_float, None if scalar is None else np.dtype(scalar))


DTYPES: dict[str, DType] = dict(
    [
        _row("float64", "F64", 64, True, np.float64),
        _row("float32", "F32", 32, True, np.float32),
        _row("float16", "F16", 16, True, np.float16),
        _row("bfloat16", "BF16", 16, True, ml_dtypes.bfloat16),
        _row("float8_e4m3fn", "F8_E4M3", 8, True, ml_dtypes.float8_e4m3fn),
        _row("float8_e5m2", "F8_E5M2", 8, True, ml_dtypes.float8_e5m2),
        _row("float8_e8m0fnu", "F8_E8M0", 8, False, ml_dtypes.float8_e8m0fnu),
        _row("float8_e4m3fnuz", "F8_E4M3FNUZ", 8, False, ml_dtypes.float8_e4m3fnuz),
        _row("float8_e5m2fnuz", "F8_E5M2FNUZ", 8, False, ml_dtypes.float8_e5m2fnuz),
        _row("float6_e2m3fn", "F6_E2M3", 6, False, None),
        _row("float6_e3m2fn", "F6_E3M2", 6, False, None),
        _row("float4_e2m1fn", "F4", 4, False, None),
        _row("complex64", "C64", 64, False, np.complex64),
        _row("int64", "I64", 64, False, np.int64),
        _row("int32", "I32", 32, False, np.int32),
        _row("int16", "I16", 16, False, np.int16),
        _row("int8", "I8", 8, False, np.int8),
        _row("uint64", "U64", 64, False, np.uint64),
        _row("uint32", "U32", 32, False, np.uint32),
        _row("uint16", "U16", 16, False, np.uint16),
        _row("uint8", "U8", 8, False, np.uint8),
        _row("bool", "BOOL", 8, False, np.bool_),
    ]
)

# Read by the kernels as they are. Every other numeric type is converted to float32 first, block by block.
KERNEL_DTYPES = ("float32", "float16", "bfloat16")

# What `quantize` accepts: numerics.md says how each becomes float32.
WEIGHT_DTYPES = (
    *KERNEL_DTYPES,
    *("float64", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
)

_BY_SAFETENSORS = {d.safetensors: d for d in DTYPES.values()}


def from_safetensors(name: str) -> DType | None:
    """The type that a safetensors header calls `name`, or None if the format has no such type."""
    return _BY_SAFETENSORS.get(name)


@functools.cache  # a dtype builds its name anew whenever it is asked
def from_numpy(dtype: np.dtype[Any] | type) -> DType:
    """The table row of a NumPy or ml_dtypes dtype.

    Raises InputError for byte-swapped arrays and for types outside the table (strings, objects, complex128, ...).
    """
    dtype = np.dtype(dtype)
    row = DTYPES.get(dtype.name)
    if row is None or row.numpy != dtype:
        order = " in big-endian byte order" if dtype.byteorder == ">" else ""
        raise InputError(f"dtype {dtype.name}{order} is not supported; use one of {', '.join(WEIGHT_DTYPES)}")
    return row
