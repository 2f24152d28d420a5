"""K-quants: their schemes, weights that try their formulas, bytes that no encoder wrote, faults of the kernels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from arrowquant_gpu.backends import Backend
from arrowquant_gpu.grids import GRIDS
from arrowquant_gpu.schemes import Scheme

from . import cases, grid_cases
from .grid_cases import Contents, Faults, Shape

F32 = np.float32
SCHEMES = [Scheme.parse(name) for name, grid in GRIDS.items() if grid.family == "kquant"]
IDS = [scheme.id for scheme in SCHEMES]


def _one_subblock(rng: np.random.Generator, n: int) -> np.ndarray:
    """Zeros but for one sub-block of 16 of a block, which is of either sign."""
    x = np.zeros((n // 256, 16, 16), F32)
    at = np.arange(len(x))
    x[at, rng.integers(0, 16, len(x))] = rng.standard_normal((len(x), 16))
    return x.reshape(n)


def _subblocks_of_any_size(rng: np.random.Generator, n: int) -> np.ndarray:
    """Most scales of a block are a small multiple of its step, or 0."""
    return (rng.standard_normal(n) * np.exp2(rng.integers(-16, 6, n // 16)).repeat(16)).astype(F32)


def _same_magnitudes(rng: np.random.Generator, n: int) -> np.ndarray:
    """The largest magnitude several times, with both signs: the first of them decides."""
    return rng.choice(np.array([0.5, -0.5, 0.25, 0], F32), n)


def _mirrored(rng: np.random.Generator, n: int) -> np.ndarray:
    """All sub-blocks of a block are the same but for their signs, and so are their scales: the first decides."""
    x = rng.standard_normal((n // 256, 1, 16)) * rng.choice([1, -1], (n // 256, 16, 1))
    return x.reshape(n).astype(F32)


def _outliers(rng: np.random.Generator, n: int) -> np.ndarray:
    x = rng.standard_normal(n) * 0.02
    x[::61] *= 50
    return x.astype(F32)


# What else there is than in tests/cases.py.
CONTENTS: Contents = {
    **cases.CONTENTS,
    "laplace": lambda rng, n: rng.laplace(size=n).astype(F32) * F32(0.02),
    "heavy_tailed": lambda rng, n: (rng.standard_t(3, n) * 0.02).astype(F32),
    "outliers": _outliers,
    "one_subblock": _one_subblock,
    "subblocks_of_any_size": _subblocks_of_any_size,
    "same_magnitudes": _same_magnitudes,
    "mirrored": _mirrored,
    "flat": lambda rng, n: np.repeat(rng.standard_normal(n // 32), 32).astype(F32),
    "near_overflow": lambda rng, n: (
        rng.standard_normal(n) * np.exp2(rng.uniform(14, 30, n // 256)).repeat(256)
    ).astype(F32),
}


def make(content: str, shape: Shape, dtype: str) -> np.ndarray:
    """The [rows, length] tensor of one case: finite in its dtype, the same on every machine."""
    return grid_cases.make(CONTENTS, content, shape, dtype)


def check_counts(backend: Backend, names: Iterable[str]) -> None:
    """What is not finite is counted, and so are blocks that overflow."""
    overflows = ((1000, 4e6), (1700, -7e7), (1001, 1e9), (300, 3e12), (301, -3e19), (30, 3e38))
    for name in names:
        grid_cases.check_not_finite(backend, name, (5, 512), (3, 511, 700, 701, 1000, 2559))
        grid_cases.check_overflows(backend, name, (4, 512), overflows)


def random_blocks(scheme: Scheme, n: int, seed: int) -> np.ndarray:
    """Bytes that no encoder wrote, with every value of d and dmin that is finite: [n, bytes of a block]."""
    packed = np.random.default_rng(seed).integers(0, 256, (n, scheme.row_bytes(256)), np.uint8)
    for at in {"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,)}[scheme.id]:
        high = packed[:, at + 1]
        high[high & 0x7C == 0x7C] ^= 4
    return packed


def check_any_bytes(backend: Backend, scheme: Scheme) -> None:
    """Bytes that no encoder wrote."""
    packed = random_blocks(scheme, 97, 11)
    grid_cases.check_decoded(backend, packed, np.empty((97, 0), np.float16), None, scheme, 256)


# What is wrong in the kernels: see `grid_cases.Faults`.
FAULTS: Faults = {
    "a try left out": ("kquants_search.cuh", "k <= TRIES", "k < TRIES", "q4_k"),
    "the clamp of a code": ("kquants_search.cuh", "(v, low), high)", "(v, low), high + 1.0f)", "q5_k"),
    "a minimum above 0": ("kquants_search.cuh", "new_minimum > 0.0f", "new_minimum > 1e30f", "q2_k"),
    "the order of the tries": ("kquants_search.cuh", "t - 10 : t - 9", "10 - t : t - 9", "q6_k"),
    "a round of descent": ("kquants_search.cuh", "round < 5", "round < 1", "q3_k"),
    "the tie of the largest scale": ("quantize_kquants.cu", "is_before && a == b", "!is_before && a == b", "q6_k"),
    "codes where the scale is 0": ("quantize_kquants.cu", "step == 0.0f ? 0u", "false ? 0u", "q4_k"),
    "the scale bytes of zeros": ("quantize_kquants.cu", "BITS == 3 && is_scaled", "BITS == 3", "q3_k"),
    "high bits of a code": ("quantize_kquants.cu", "plane<32, 1, BITS == 3 ? 2 : 4>", "plane<32, 1, 3>", "q5_k"),
    "high bits of a scale": ("quantize_kquants.cu", "0x03030303u) << 6", "0x03030303u) << 5", "q4_k"),
    "the sign of a scale": ("dequantize_kquants.cu", "static_cast<signed char>", "static_cast<u8>", "q6_k"),
    "the offset of a scale": ("dequantize_kquants.cu", "* 16 - 32", "* 16 - 31", "q3_k"),
}
