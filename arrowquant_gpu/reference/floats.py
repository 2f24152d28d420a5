"""Tables of values and small floating-point types times a scale: family float. docs/numerics_floats.md.

>>> import numpy as np
>>> from arrowquant_gpu.reference import quantize, dequantize
>>> from arrowquant_gpu.schemes import Scheme
>>> s = Scheme.parse("mxfp4")
>>> packed, scales, zeros, findings = quantize(np.array([[0.5, -0.1, 3.0, 1.2]], np.float32), s)
>>> packed.tolist(), scales.tolist(), zeros
([[130, 71]], [[126]], None)
>>> dequantize(packed, scales, zeros, s, 4).tolist()
[[0.5, -0.0, 3.0, 1.0]]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..schemes import Scheme
from .integers import EPS, TINY, pack, spread, unpack
from .weights import F32, Findings, find, to_float32

_SMALL = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# What each code stands for, by grid. NF4 and FP4 are those of bitsandbytes, `get_4bit_type`.
VALUES: Mapping[str, NDArray[np.float32]] = {
    "nf4": np.array(
        [
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ],
        F32,
    ),
    "fp4": np.array([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], F32) / F32(12),
    "e2m1": np.array([s * m for s in (1, -1) for m in _MAGNITUDES], F32),
    **{grid: np.arange(256, dtype=np.uint8).view(small).astype(F32) for grid, small in _SMALL.items()},
}
# The largest magnitude of a grid, which the largest weight of a group is mapped to; and its exponent.
LARGEST: Mapping[str, float] = {"e2m1": 6.0, "e4m3": 448.0, "e5m2": 57344.0}
EXPONENT = {grid: int(np.log2(largest)) for grid, largest in LARGEST.items()}

# A table is searched in the order of its values, by the midpoints between neighbours. The codes in that order: of the
# two zeros of FP4 the positive one comes first, so that code 8 stands between 0 and the first positive value.
CODES: Mapping[str, NDArray[np.uint8]] = {
    "nf4": np.arange(16, dtype=np.uint8),
    "fp4": np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8),
}
MIDPOINTS: Mapping[str, NDArray[np.float32]] = {
    grid: (VALUES[grid][codes][:-1] + VALUES[grid][codes][1:]) / F32(2) for grid, codes in CODES.items()
}
# The magnitudes that e2m1 rounds down to code 0, 1, ... at the most: a tie goes to the even code, or (where the rule is
# MLX's) to the smaller magnitude.
_HALFWAY = (VALUES["e2m1"][:7] + VALUES["e2m1"][1:8]) / F32(2)
TIES_TO_EVEN = np.where(np.arange(7) % 2 == 0, _HALFWAY, np.nextafter(_HALFWAY, F32(0)))
TIES_DOWN = _HALFWAY

# What bitsandbytes puts for a smaller absmax, before it divides. For a short tail group it stores that, too.
LEAST_ABSMAX = F32(1e-38)
# The scale of a group whose scale is zero, under a global scale (compressed-tensors): 0.125 as e4m3.
EPS_E4M3 = 0x20
# Added to the bits of a group's largest magnitude, before its exponent becomes that of its scale. round: half a unit of
# a type with one mantissa bit; ceil: what passes the largest value of the grid gets the next exponent.
E8M0_ROUNDING: Mapping[tuple[str, str], int] = {
    ("floor", "e2m1"): 0,
    ("floor", "e4m3"): 0,
    ("round", "e2m1"): 0x200000,
    ("round", "e4m3"): 0x200000,
    ("ceil", "e2m1"): 0x3FFFFF,
    ("ceil", "e4m3"): 0x1FFFFF,
}
# The e8m0 scale of a group of zeros: what the peers of each rule store.
E8M0_OF_ZEROS = {"floor": 0, "round": 0, "ceil": 127}


def ties_down(scheme: Scheme) -> bool:
    """Whether e2m1 is as MLX has it: a tie goes to the smaller magnitude, and there is no negative zero."""
    return scheme.scale_rule in ("ceil", "local")


def _absmax(x: NDArray[np.float32], scheme: Scheme) -> NDArray[np.float32]:
    """Largest magnitude of each group, shape `scheme.scales_shape(x.shape)`."""
    if x.size == 0:
        return np.zeros(scheme.scales_shape(x.shape), F32)
    if scheme.granularity == "tensor":
        x = x.reshape(1, -1)
    largest = np.maximum.reduceat(np.abs(x), np.arange(0, x.shape[1], scheme.group_length(x.shape[1])), axis=1)
    if scheme.granularity == "block":
        largest = np.maximum.reduceat(largest, np.arange(0, x.shape[0], scheme.group_length(0)), axis=0)
    if scheme.grid in CODES and x.shape[1] % scheme.group_length(x.shape[1]):
        largest[:, -1] = np.maximum(largest[:, -1], LEAST_ABSMAX)
    return np.asarray(largest)


def _stored(
    absmax: NDArray[np.float32], zeros: NDArray[Any] | None, scheme: Scheme
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The scales of groups with these largest magnitudes, as stored, and which of them overflow."""
    none = np.empty(0, np.int64)
    if scheme.grid in CODES:
        return absmax, none
    if scheme.scale_dtype == "e8m0":
        bits = absmax.view(np.uint32) + np.uint32(E8M0_ROUNDING[scheme.scale_rule, scheme.grid])
        exponent = np.clip((bits >> 23).astype(np.int32) - EXPONENT[scheme.grid], 0, 254)
        return np.where(absmax == 0, E8M0_OF_ZEROS[scheme.scale_rule], exponent).astype(np.uint8), none
    with np.errstate(over="ignore", under="ignore"):
        exact = absmax / F32(LARGEST[scheme.grid])
        if scheme.scale_dtype == "e4m3":
            codes = small_codes(exact if zeros is None else zeros * exact, "e4m3")
            return codes if zeros is None else np.where(codes == 0, np.uint8(EPS_E4M3), codes), none
        stored = exact.astype(DTYPES[scheme.scale_dtype].numpy).astype(F32)
    stored = np.where(absmax == 0, F32(EPS[scheme.scale_dtype]), stored)
    stored = np.where(stored == 0, F32(TINY[scheme.scale_dtype]), stored)
    return stored.astype(DTYPES[scheme.scale_dtype].numpy), np.flatnonzero(np.isinf(stored))


def small_codes(x: NDArray[np.float32], grid: str) -> NDArray[np.uint8]:
    """e4m3 or e5m2 of float32, to nearest even, beyond the largest value that; the sign of a zero is kept."""
    bound = F32(LARGEST[grid])
    return np.clip(x, -bound, bound).astype(_SMALL[grid]).view(np.uint8)


def _factors(scales: NDArray[Any], zeros: NDArray[Any] | None, scheme: Scheme) -> NDArray[np.float32]:
    """What a scale, as stored, multiplies values of the grid by: float32 of the same shape."""
    if scheme.scale_dtype == "e8m0":
        powers: NDArray[np.float32] = np.ldexp(F32(1), scales.astype(np.int32) - 127)
        return powers
    if scheme.scale_dtype == "e4m3":
        local = VALUES["e4m3"][scales]
        return local if zeros is None else np.asarray(local / zeros)
    return scales.astype(F32)


def _spread(per_group: NDArray[Any], shape: tuple[int, int], scheme: Scheme) -> NDArray[Any]:
    if scheme.granularity == "block" and per_group.size:
        per_group = np.repeat(per_group, scheme.group_length(0), axis=0)[: shape[0]]
    return spread(per_group, shape, scheme)


def _codes(
    x: NDArray[np.float32], scales: NDArray[Any], zeros: NDArray[Any] | None, scheme: Scheme
) -> NDArray[np.uint8]:
    """Codes, one per byte, shape of `x` [rows, length]."""
    factors = _spread(_factors(scales, zeros, scheme), x.shape, scheme)
    with np.errstate(all="ignore"):
        if scheme.grid in CODES:
            divisors = np.maximum(factors, LEAST_ABSMAX)
            whole = x.shape[1] - x.shape[1] % scheme.group_length(x.shape[1])
            v = np.where(np.arange(x.shape[1]) < whole, x * (F32(1) / divisors), x / divisors)
            found: NDArray[np.uint8] = CODES[scheme.grid][np.searchsorted(MIDPOINTS[scheme.grid], v)]
            return found
        v = x / factors
        if scheme.grid != "e2m1":
            return small_codes(v, scheme.grid)
        down = ties_down(scheme)
        codes = np.searchsorted(TIES_DOWN if down else TIES_TO_EVEN, np.abs(v)).astype(np.uint8)
        codes |= np.uint8(8) * ((v < 0) & (codes > 0) if down else v < 0)
        return np.where(factors == 0, np.uint8(0), codes)


def encode_packed(
    x: NDArray[np.float32], scales: NDArray[Any], zeros: NDArray[Any] | None, scheme: Scheme
) -> NDArray[np.uint8]:
    """Packed codes of weights with known scales."""
    return pack(_codes(x, scales, zeros, scheme), scheme.bits)


def solve(
    low: NDArray[np.float32], high: NDArray[np.float32], scheme: Scheme
) -> tuple[NDArray[Any] | None, NDArray[Any] | None, Findings]:
    """The scale of granularity tensor; or the global scale, a divisor: compressed-tensors, `generate_gparam`."""
    absmax = np.maximum(-low, high)
    if scheme.scale_rule == "global":
        with np.errstate(over="ignore"):
            reciprocal = F32(1) / np.maximum(absmax, np.finfo(F32).tiny)
            divisor = reciprocal * F32(LARGEST["e4m3"] * LARGEST["e2m1"])
        return None, np.where(np.isinf(divisor), F32(1), divisor), Findings()
    scales, overflow = _stored(absmax, None, scheme)
    return scales, None, _overflows(overflow)


def _overflows(numbers: NDArray[np.int64]) -> Findings:
    return Findings(n_overflow=numbers.size, first_overflow=int(numbers[0]) if numbers.size else -1)


def quantize(
    x: NDArray[Any], scheme: Scheme, zeros: NDArray[Any] | None = None
) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any] | None, Findings]:
    """Quantize a [rows, length] tensor of any numeric type: packed codes, scales, global scale, findings.

    Where the findings count anything, the other three are not defined.
    """
    x = to_float32(x)
    findings = find(x)
    if findings.n_nan or findings.n_inf:
        x = np.zeros_like(x)
    if scheme.scale_rule == "global" and zeros is None:
        shape = (1, 1) if x.size else (0, 0)
        bounds = np.full(shape, x.min(initial=0)), np.full(shape, x.max(initial=0))
        zeros = solve(*bounds, scheme)[1]
    scales, overflow = _stored(_absmax(x, scheme), zeros, scheme)
    found = _overflows(overflow)
    findings = findings._replace(n_overflow=found.n_overflow, first_overflow=found.first_overflow)
    return encode_packed(x, scales, zeros, scheme), scales, zeros, findings


def dequantize(
    packed: NDArray[np.uint8],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
    scheme: Scheme,
    length: int,
    dtype: str = "float32",
) -> NDArray[Any]:
    """value of the code * factor of the scale in float32, then one rounding to `dtype`: an array [rows, length]."""
    codes = unpack(packed, scheme.bits, length)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        factors = _spread(_factors(scales, zeros, scheme), codes.shape, scheme)
        weights: NDArray[np.float32] = VALUES[scheme.grid][codes] * factors
        return weights.astype(DTYPES[dtype].numpy)
