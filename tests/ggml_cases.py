"""ggml's blocks: their schemes, weights that try their formulas, bytes that no encoder wrote, faults of the kernels."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from arrowquant_gpu.backends import Backend
from arrowquant_gpu.grids import GRIDS
from arrowquant_gpu.schemes import Scheme

from . import cases, grid_cases
from .grid_cases import Contents, Faults, Shape

F32 = np.float32
SCHEMES = [Scheme.parse(name) for name, grid in GRIDS.items() if grid.family == "ggml"]
IDS = [scheme.id for scheme in SCHEMES]


def _signed_zeros(rng: np.random.Generator, n: int) -> np.ndarray:
    """No weight below zero, and zeros of both signs among them."""
    x = np.abs(rng.standard_normal(n)).astype(F32)
    x[rng.random(n) < 0.6] = 0
    return np.where((x == 0) & (rng.random(n) < 0.5), F32(-0.0), x)


def _near_powers(rng: np.random.Generator, n: int) -> np.ndarray:
    """The largest of 32 a few steps below, at, or above a power of two."""
    x = rng.uniform(-0.3, 0.3, n).astype(F32)
    size = -(-n // 32)
    powers = np.exp2(rng.integers(-120, 100, size)).astype(F32)
    steps = rng.integers(-50, 3, size).astype(np.int32)
    near = (powers.view(np.int32) + steps).view(F32)
    x = (x.reshape(-1, n)[0] * np.repeat(powers, 32)[:n]).astype(F32)
    x[::32] = near
    return x


def _grid_ties(rng: np.random.Generator, n: int) -> np.ndarray:
    """Halfway between two values of e2m1 and of small whole numbers, at several scales."""
    values = np.array([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6], F32)
    x = rng.choice(np.concatenate([values, -values]), n)
    x[::32] = rng.choice(np.array([6, -6, 7.9, 4], F32), len(x[::32]))
    return (x * np.exp2(np.repeat(rng.integers(-9, 9, -(-n // 32)), 32)[:n])).astype(F32)


def _both_signs(rng: np.random.Generator, n: int) -> np.ndarray:
    """The largest magnitude twice or more, with both signs."""
    return rng.integers(-4, 5, n).astype(F32) * F32(0.125)


def _halves(rng: np.random.Generator, n: int) -> np.ndarray:
    """Halves of steps of q8_0 and q4_0, and the floats next to them."""
    x = (rng.integers(-127, 127, n) + 0.5).astype(F32)
    small = rng.random(n) < 0.5
    x[small] = rng.choice(np.array([0.5, -0.5, 1.5, -2.5], F32), int(small.sum()))
    x = np.nextafter(x, (x * rng.integers(0, 3, n)).astype(F32))
    x[::32] = rng.choice(np.array([127, -127, 8, -8, 15, 31], F32), len(x[::32]))
    return x


# What else there is than in tests/cases.py.
CONTENTS: Contents = {
    **cases.CONTENTS,
    "signed_zeros": _signed_zeros,
    "near_powers": _near_powers,
    "grid_ties": _grid_ties,
    "both_signs": _both_signs,
    "halves": _halves,
    "heavy_tailed": lambda rng, n: (rng.standard_t(3, n) * 0.02).astype(F32),
    "of_any_size": lambda rng, n: (rng.standard_normal(n) * np.exp2(np.arange(n) // 32 % 60 - 40)).astype(F32),
}


def make(content: str, shape: Shape, dtype: str) -> np.ndarray:
    """The [rows, length] tensor of one case: finite in its dtype, the same on every machine."""
    return grid_cases.make(CONTENTS, content, shape, dtype)


def check_counts(backend: Backend, names: Iterable[str]) -> None:
    """What is not finite is counted, and so are blocks that overflow."""
    overflows = ((1000, 65519.0), (170, -65519.9), (1001, 65520.0), (650, 2e6), (651, 1e7), (30, -3e38))
    for name in names:
        grid_cases.check_not_finite(backend, name, (5, 320), (3, 319, 400, 401, 1000, 1599))
        grid_cases.check_overflows(backend, name, (4, 320), overflows)


def check_any_bytes(backend: Backend, scheme: Scheme) -> None:
    """Bytes that no encoder wrote, with every value of a scale that is not NaN."""
    rng = np.random.default_rng(11)
    grid, length = GRIDS[scheme.grid], 128
    packed = rng.integers(0, 256, (97, scheme.row_bytes(length)), np.uint8)
    if scheme.grid not in ("ggml_mxfp4", "ggml_nvfp4"):
        halves = packed.reshape(-1, grid.block_bytes)[:, : 4 if scheme.grid in ("q4_1", "q5_1") else 2].copy()
        words = halves.view(np.uint16)
        exponent = 0x7F80 if scheme.grid == "bf16" else 0x7C00
        words[words & exponent == exponent] ^= 0x400
        packed.reshape(-1, grid.block_bytes)[:, : halves.shape[1]] = words.view(np.uint8)
    grid_cases.check_decoded(backend, packed, np.empty((97, 0), np.float16), None, scheme, length)


# What is wrong in the kernels: see `grid_cases.Faults`.
FAULTS: Faults = {
    "the tie of the largest magnitude": ("quantize_ggml.cu", "HELD - 1; j >= 0; --j", "0; j < HELD; ++j", "q4_0"),
    "half away from zero": ("quantize_ggml.cu", "0.49999997f", "0.5f", "q8_0"),
    "what is too small": ("quantize_ggml.cu", "inverse == 0.0f && scale != 0.0f ? 0.0f", "false ? 0.0f", "q5_0"),
    "the zero that is first": ("quantize_ggml.cu", "if (low == 0.0f)", "if (false)", "q4_1"),
    "log2 that is rounded": ("quantize_ggml.cu", "missing <= 64", "missing <= 0", "ggml_mxfp4"),
    "halfway to e2m1": ("quantize_ggml.cu", "m > border[3]", "m >= border[3]", "ggml_mxfp4"),
    "the largest ue4m3": ("quantize_ggml.cu", "normal < 0x78 ?", "normal < 0x7e ?", "ggml_nvfp4"),
    "a try left out": ("quantize_ggml.cu", "TRIES = 16", "TRIES = 15", "iq4_nl"),
    "products in another order": ("quantize_ggml.cu", "x, x), value)", "x, value), x)", "iq4_nl"),
    "a value of iq4_nl": ("ggml.cuh", "0x71594535u", "0x71594534u", "iq4_nl"),
    "the fifth bits": ("dequantize_ggml.cu", "fifth >> GAP", "fifth", "q5_1"),
}
