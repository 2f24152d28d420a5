"""Family affine: its schemes, weights that try its formulas, and faults of its kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from arrowquant_gpu.backends import Backend
from arrowquant_gpu.schemes import BITS, SCALE_SUFFIXES, Scheme

from . import cases, grid_cases
from .grid_cases import Contents, Faults, Shape

F32 = np.float32
SCHEMES = tuple(
    Scheme(bits, "group", group, False, scale_dtype, "affine")
    for bits, group, scale_dtype in itertools.product(BITS, (32, 64, 128), SCALE_SUFFIXES)
)
SHAPES = ((1, 1), (2, 7), (5, 127), (3, 129), (7, 384), (2, 1000), (1, 4133))


def _between_codes(rng: np.random.Generator, n: int) -> np.ndarray:
    """Near halves of 255 steps, both ends of which each 32 weights have."""
    steps = rng.uniform(0.01, 1, -(-n // 128)).repeat(128)[:n]
    x = (rng.integers(-100, 155, n) + 0.5) * steps
    x[::32], x[1::32] = -100 * steps[::32], 155 * steps[1::32]
    return x.astype(F32)


CONTENTS: Contents = {**cases.CONTENTS, "between_codes": _between_codes}


def make(content: str, shape: Shape, dtype: str) -> np.ndarray:
    """The [rows, length] tensor of one case: finite in its dtype, the same on every machine."""
    return grid_cases.make(CONTENTS, content, shape, dtype)


def check_counts(backend: Backend, names: Iterable[str]) -> None:
    """What is not finite is counted, and so are groups whose scale, bias or step overflows."""
    for name in names:
        grid_cases.check_not_finite(backend, name, (5, 333), (3, 332, 400, 401, 1000, 1664))
    for name in ("affine8_g128_f16", "affine3_g64", "affine4_g32_bf16", "affine4_g32"):
        grid_cases.check_overflows(backend, name, (3, 300), ((590, 3e38), (600, -3e38), (589, -3e38)))


# What is wrong in the kernels: see `grid_cases.Faults`.
FAULTS: Faults = {
    "the step of what is flat": ("quantize_affine.cu", "LEAST = 1e-7f", "LEAST = 2e-7f", "affine4_g64"),
    "the edge of both signs": ("quantize_affine.cu", "fabsf(lo) > fabsf(hi)", "fabsf(lo) >= fabsf(hi)", "affine4_g32"),
    "the lowest of what is positive": ("quantize_affine.cu", "lo & SIGN ? lo : least", "lo", "affine3_g64"),
    "the bias of a code of 0": ("quantize_affine.cu", "is_zero ? 0.0f : edge", "edge", "affine2_g128"),
    "a quotient that is not corrected": ("quantize_affine.cu", ", reciprocal, p)", ", 0.0f, p)", "affine8_g32"),
    "what float16 can hold": ("quantize_affine.cu", "? 0x7c00 : 0x7f80", "? 0x7f80 : 0x7f80", "affine6_g64_f16"),
    "the group of a weight": ("dequantize_affine.cu", "start / group", "(start + CHUNK) / group", "affine5_g32_bf16"),
}
