"""ggml's blocks whose scale follows from the weights at once: family ggml. docs/numerics_ggml.md.

`packed` holds the blocks as GGUF files do, codes and scales together; there are no other scales.

>>> import numpy as np
>>> from arrowquant_gpu.reference import quantize, dequantize
>>> from arrowquant_gpu.schemes import Scheme
>>> s = Scheme.parse("q8_0")
>>> packed, scales, zeros, findings = quantize(np.linspace(-1, 1, 32, dtype=np.float32)[None], s)
>>> packed.shape, scales.shape, zeros, packed[0, :4].tolist()
((1, 34), (1, 0), None, [8, 32, 129, 137])
>>> dequantize(packed, scales, zeros, s, 32)[0, :2].tolist()
[-0.99993896484375, -0.93695068359375]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..grids import GRIDS
from ..schemes import Scheme
from .weights import F32, Findings, find, to_float32

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]

# Values of the codes 0 to 15. E2M1 is doubled, and its scale halved: all values are whole numbers.
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], F32)
NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], F32)
NL_BORDERS = (NL[1:] + NL[:-1]) / F32(2)
E2M1_BORDERS = (E2M1[1:8] + E2M1[:7]) / F32(2)

# The smallest largest magnitude of a block of iq4_nl that is searched: below it all is 0.
NL_LEAST = F32(1e-15)
NL_TRIES = 7
# ln 2 in 16 bits after the point: 2^p ln 2, rounded down, is exact for the p that occur.
LN2 = 45426


def quantize(
    x: NDArray[Any], scheme: Scheme, zeros: NDArray[Any] | None = None
) -> tuple[Bytes, NDArray[Any], None, Findings]:
    """The blocks of a [rows, length] tensor of whole blocks; `scales` is empty, (rows, 0).

    A block overflows if a float16 in it would not be finite. Where the findings count anything, the bytes are not
    defined.
    """
    x = to_float32(x)
    findings = find(x)
    if findings.n_nan or findings.n_inf:
        x = np.zeros_like(x)
    encode, _ = CODECS[scheme.grid]
    with np.errstate(all="ignore"):
        packed, fits = encode(x.reshape(-1, GRIDS[scheme.grid].block))
    overflow = np.flatnonzero(~fits)
    findings = findings._replace(n_overflow=overflow.size, first_overflow=int(overflow[0]) if overflow.size else -1)
    scales = np.empty(scheme.scales_shape(x.shape), DTYPES[scheme.scale_dtype].numpy)
    return packed.reshape(scheme.packed_shape(x.shape)), scales, None, findings


def encode_packed(x: Floats, scales: NDArray[Any], zeros: NDArray[Any] | None, scheme: Scheme) -> Bytes:
    """Blocks have no scale that could be known before them."""
    raise NotImplementedError(f"{scheme.id} has no granularity tensor")


def solve(low: Floats, high: Floats, scheme: Scheme) -> tuple[NDArray[Any] | None, NDArray[Any] | None, Findings]:
    """Nothing in a block follows from the range of the tensor."""
    raise NotImplementedError(f"{scheme.id} has no granularity tensor")


def dequantize(
    packed: Bytes,
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
    scheme: Scheme,
    length: int,
    dtype: str = "float32",
) -> NDArray[Any]:
    """Decode in float32, then one rounding to `dtype`: an array [rows, length]."""
    _, decode = CODECS[scheme.grid]
    with np.errstate(all="ignore"):
        weights = decode(packed.reshape(-1, GRIDS[scheme.grid].block_bytes))
        return weights.astype(DTYPES[dtype].numpy).reshape(packed.shape[0], length)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of blocks. Arrays are [blocks, ...].


def _half(values: Floats) -> tuple[Bytes, Flags]:
    """[blocks, 1] rounded to float16, as 2 bytes each, little-endian; and which are finite then."""
    stored = values.astype("<f2")
    return stored.view(np.uint8), np.isfinite(stored[:, 0])


def _of_half(packed: Bytes) -> Floats:
    """The inverse of `_half`."""
    return np.ascontiguousarray(packed).view("<f2").astype(F32)


def _nibbles(codes: Bytes) -> Bytes:
    """Code j in the low half of byte j, code j + n / 2 in its high half."""
    low, high = np.split(codes & np.uint8(15), 2, axis=1)
    packed: Bytes = low | high << np.uint8(4)
    return packed


def _of_nibbles(packed: Bytes) -> Bytes:
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)


def _fifth_bits(codes: Bytes) -> Bytes:
    """Bit 4 of code j as bit j of 32, little-endian."""
    bits: Bytes = np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")
    return bits


def _of_fifth_bits(packed: Bytes) -> Bytes:
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _largest(x: Floats) -> Floats:
    """[blocks, 1]: the weight of the largest magnitude, the first of several, with its sign; 0.0 among zeros."""
    first = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    return np.where(first == 0, F32(0), first)


def _inverse(scale: Floats) -> Floats:
    """1 / scale, and 0 for a scale of 0, and for one so small that the quotient overflows."""
    inverse = F32(1) / scale
    return np.where((scale == 0) | np.isinf(inverse), F32(0), inverse)


# ---------------------------------------------------------------------------------------------------------------------
# f16, bf16


def _encode_cast(x: Floats, dtype: str) -> tuple[Bytes, Flags]:
    stored = x.astype(DTYPES[dtype].numpy)
    return stored.view(np.uint8), np.isfinite(stored.astype(F32))[:, 0]


def _decode_cast(packed: Bytes, dtype: str) -> Floats:
    return packed.view(np.dtype(DTYPES[dtype].numpy)).astype(F32)


# ---------------------------------------------------------------------------------------------------------------------
# q8_0, and q4_0 and q5_0, whose zero is code 8 or 16


def _encode_q8(x: Floats) -> tuple[Bytes, Flags]:
    scale = np.abs(x).max(axis=1, keepdims=True) / F32(127)
    d, fits = _half(scale)
    q = x * _inverse(scale)
    whole = np.trunc(q)
    away = np.copysign(np.where(np.abs(q - whole) >= F32(0.5), F32(1), F32(0)), q)
    return np.hstack([d, (whole + away).astype(np.int8).view(np.uint8)]), fits


def _decode_q8(packed: Bytes) -> Floats:
    return packed[:, 2:].view(np.int8).astype(F32) * _of_half(packed[:, :2])


def _encode_signed(x: Floats, bits: int) -> tuple[Bytes, Flags]:
    offset = 1 << (bits - 1)
    scale = _largest(x) / F32(-offset)
    d, fits = _half(scale)
    inverse = _inverse(scale)
    half = np.where((inverse == 0) & (scale != 0), F32(0), F32(offset + 0.5))  # what is too small has code 0
    codes = np.minimum(np.trunc(x * inverse + half), F32(2 * offset - 1)).astype(np.uint8)
    high = [_fifth_bits(codes)] if bits == 5 else []
    return np.hstack([d, *high, _nibbles(codes)]), fits


def _decode_signed(packed: Bytes, bits: int) -> Floats:
    codes = _of_nibbles(packed[:, -16:]) | (_of_fifth_bits(packed[:, 2:6]) if bits == 5 else np.uint8(0))
    return (codes.astype(F32) - F32(1 << (bits - 1))) * _of_half(packed[:, :2])


# ---------------------------------------------------------------------------------------------------------------------
# q4_1, q5_1: whole steps from the lowest weight


def _encode_ranged(x: Floats, bits: int) -> tuple[Bytes, Flags]:
    levels = (1 << bits) - 1
    low, high = (np.take_along_axis(x, at[:, None], axis=1) for at in (x.argmin(axis=1), x.argmax(axis=1)))
    scale = (high - low) / F32(levels)
    (d, d_fits), (m, m_fits) = _half(scale), _half(low)
    codes = np.minimum(np.trunc((x - low) * _inverse(scale) + F32(0.5)), F32(levels))
    codes = np.nan_to_num(codes).astype(np.uint8)
    high_bits = [_fifth_bits(codes)] if bits == 5 else []
    return np.hstack([d, m, *high_bits, _nibbles(codes)]), d_fits & m_fits


def _decode_ranged(packed: Bytes, bits: int) -> Floats:
    codes = _of_nibbles(packed[:, -16:]) | (_of_fifth_bits(packed[:, 4:8]) if bits == 5 else np.uint8(0))
    return codes.astype(F32) * _of_half(packed[:, :2]) + _of_half(packed[:, 2:4])


# ---------------------------------------------------------------------------------------------------------------------
# ggml_mxfp4, ggml_nvfp4


def _nearest_e2m1(x: Floats, half_scale: Floats) -> Bytes:
    """The code of the nearest value times half_scale [blocks, 1]; halfway the one nearer to 0; 0 if half_scale is."""
    step = np.where(half_scale == 0, F32(np.inf), half_scale)
    codes: Bytes = (np.abs(x)[..., None] > E2M1_BORDERS * step[..., None]).sum(axis=-1).astype(np.uint8)
    return codes | np.where((x < 0) & (codes > 0), np.uint8(8), np.uint8(0))


def _exponent(amax: Floats) -> NDArray[np.int64]:
    """floor(log2(amax)) of [blocks, 1], where log2 has been rounded to float32: just below 2^k it may be k already.

    With |k| from 2^p to 2^(p+1), log2 steps by 2^(p-23) below k, and a weight by 2^(k-24): so it is k where at most
    2^p ln 2 such steps are missing. Below a positive k = 2^p, log2 steps by half of that. 2^128 itself is left out: the
    blocks would decode to infinity.
    """
    fraction, above = np.frexp(amax)
    k = above.astype(np.int64)
    p = np.frexp(np.abs(k).astype(F32))[1] - 1 - ((k > 0) & (k & (k - 1) == 0))
    near = np.where((k == 0) | (k == 128) | (p < 0), 0, LN2 << np.maximum(p, 0) >> 16)
    missing = np.ldexp(F32(1) - fraction, 24).astype(np.int64)
    return np.where(missing <= near, k, k - 1)


def _half_e8m0(e: Bytes) -> Floats:
    """2^(e - 128), half of what the byte e stands for."""
    return np.ldexp(F32(1), e.astype(np.int32) - 128)


def _encode_mxfp4(x: Floats) -> tuple[Bytes, Flags]:
    amax = np.abs(x).max(axis=1, keepdims=True)
    e = np.where(amax > 0, np.maximum(_exponent(amax) - 2 + 127, 0), 0).astype(np.uint8)
    return np.hstack([e, _nibbles(_nearest_e2m1(x, _half_e8m0(e)))]), np.ones(len(x), np.bool_)


def _decode_mxfp4(packed: Bytes) -> Floats:
    return E2M1[_of_nibbles(packed[:, 1:])] * _half_e8m0(packed[:, :1])


def _ue4m3(x: Floats) -> Bytes:
    """Non-negative weights as e4m3 without a sign: halves round up, and 256 and above is 0x7e."""
    raw = x.view(np.uint32)
    normal = (raw + np.uint32(1 << 19) >> np.uint32(20)).astype(np.int64) - (120 << 3)
    small = np.minimum(np.trunc(x * F32(512) + F32(0.5)), F32(7))
    return np.where(x < F32(2.0**-6), small, np.where(normal < 0x78, normal, 0x7E)).astype(np.uint8)


def _half_ue4m3(u: Bytes) -> Floats:
    """Half of what the bytes stand for. The highest bit does not count, and 0x7f is 0."""
    exponent, mantissa = (u >> 3 & 15).astype(np.int32), (u & 7).astype(F32)
    value = np.where(exponent == 0, np.ldexp(mantissa, -10), np.ldexp(mantissa + F32(8), exponent - 11))
    return np.where(u == 0x7F, F32(0), value)


def _encode_nvfp4(x: Floats) -> tuple[Bytes, Flags]:
    parts = x.reshape(-1, 16)
    u = _ue4m3(np.abs(parts).max(axis=1, keepdims=True) / F32(6))
    codes = _nibbles(_nearest_e2m1(parts, _half_ue4m3(u)))
    return np.hstack([u.reshape(-1, 4), codes.reshape(-1, 32)]), np.ones(len(x), np.bool_)


def _decode_nvfp4(packed: Bytes) -> Floats:
    u, codes = packed[:, :4].reshape(-1, 1), packed[:, 4:].reshape(-1, 8)
    return (E2M1[_of_nibbles(codes)] * _half_ue4m3(u)).reshape(-1, 64)


# ---------------------------------------------------------------------------------------------------------------------
# iq4_nl: 16 scales are tried


def _nearest_nl(x: Floats) -> NDArray[np.int64]:
    """Codes of the nearest of the values; halfway the higher one."""
    return np.searchsorted(NL_BORDERS, x, side="right")


def _encode_nl(x: Floats) -> tuple[Bytes, Flags]:
    largest = _largest(x)
    is_tiny = np.abs(largest) < NL_LEAST
    largest = np.where(is_tiny, F32(1), largest)
    inverses = [F32(1) / (largest / F32(127))]
    inverses += [F32(NL[0] + t) / largest for t in range(-NL_TRIES, NL_TRIES + 1)]
    scale, best = np.zeros_like(largest), np.full_like(largest, -1)
    for inverse in inverses:
        values = NL[_nearest_nl(x * inverse)]
        weighted = x * x * values
        products, norm = _sum(weighted * x), _sum(weighted * values)
        fitted = np.where(norm > 0, products / norm, F32(0))
        is_better = (best < 0) | ((norm > 0) & (products * products > best * norm))
        scale, best = np.where(is_better, fitted, scale), np.where(is_better, fitted * products, best)
    scale = np.where(is_tiny, F32(0), scale)
    d, fits = _half(scale)
    inverse = np.where(scale == 0, F32(0), F32(1) / scale)
    return np.hstack([d, _nibbles(_nearest_nl(x * inverse).astype(np.uint8))]), fits


def _sum(terms: Floats) -> Floats:
    """[blocks, 1]: the terms of each block added to 0 one by one, the first first."""
    return np.add.accumulate(terms, axis=1)[:, -1:] + F32(0)


def _decode_nl(packed: Bytes) -> Floats:
    return NL[_of_nibbles(packed[:, 2:])] * _of_half(packed[:, :2])


# Grid -> blocks of weights [blocks, block] to bytes and which fit their types; bytes [blocks, block_bytes] to weights.
CODECS: dict[str, tuple[Callable[[Floats], tuple[Bytes, Flags]], Callable[[Bytes], Floats]]] = {
    "f16": (lambda x: _encode_cast(x, "float16"), lambda packed: _decode_cast(packed, "float16")),
    "bf16": (lambda x: _encode_cast(x, "bfloat16"), lambda packed: _decode_cast(packed, "bfloat16")),
    "q8_0": (_encode_q8, _decode_q8),
    "q4_0": (lambda x: _encode_signed(x, 4), lambda packed: _decode_signed(packed, 4)),
    "q5_0": (lambda x: _encode_signed(x, 5), lambda packed: _decode_signed(packed, 5)),
    "q4_1": (lambda x: _encode_ranged(x, 4), lambda packed: _decode_ranged(packed, 4)),
    "q5_1": (lambda x: _encode_ranged(x, 5), lambda packed: _decode_ranged(packed, 5)),
    "iq4_nl": (_encode_nl, _decode_nl),
    "ggml_mxfp4": (_encode_mxfp4, _decode_mxfp4),
    "ggml_nvfp4": (_encode_nvfp4, _decode_nvfp4),
}
