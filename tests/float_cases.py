"""Family float: its schemes, weights that try its formulas, a backend's results of them against the reference, and
faults of its kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from arrowquant_gpu import reference
from arrowquant_gpu.backends import Backend
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.reference.floats import MIDPOINTS
from arrowquant_gpu.schemes import Scheme

from . import cases, grid_cases
from .bitwise import assert_bitwise_equal
from .grid_cases import Case, Contents, Faults

F32 = np.float32

SCHEMES = tuple(
    Scheme.parse(text)
    for text in (
        *("nf4_g64", "nf4_g5", "nf4_g100", "nf4_g2048", "fp4_g64", "fp4_g24", "fp4_g7"),
        *("e4m3_g128", "e4m3_g32_f16", "e4m3_g7_bf16", "e4m3_channel", "e4m3_channel_bf16", "e4m3_tensor", "e4m3_b128"),
        *("e5m2_g128", "e5m2_channel_f16", "e5m2_tensor_bf16", "e5m2_b128_f16", "e4m3_b128_bf16"),
        *("mxfp4", "mxfp4_round", "mxfp4_ceil", "mxfp8", "mxfp8_round", "mxfp8_ceil", "nvfp4", "nvfp4_local"),
    )
)
SHAPES = ((1, 1), (2, 7), (3, 31), (4, 64), (3, 129), (2, 1000), (131, 300), (1, 4133))


def _steps(rng: np.random.Generator, n: int) -> np.ndarray:
    """Quarters up to 6: values of e2m1, and the ties between them, with a largest magnitude of 6 or less."""
    return (rng.integers(-24, 25, n) / F32(4)).astype(F32) * F32(2.0) ** rng.integers(-3, 3)


def _powers(rng: np.random.Generator, n: int) -> np.ndarray:
    """Near powers of two, and near those times 1.5 and 1.75, where e8m0 scales change."""
    x = rng.choice(np.array([1, 1.5, 1.75, -1.75], F32), n) * np.exp2(rng.integers(-20, 20, n)).astype(F32)
    return np.nextafter(x, rng.choice(np.array([-9, 0, 9], F32) * F32(1e30), n)).astype(F32)


def _midpoints(rng: np.random.Generator, n: int) -> np.ndarray:
    """What lies between two neighbours of a table, for groups whose largest magnitude is 1."""
    return rng.choice(np.array([*MIDPOINTS["nf4"], *MIDPOINTS["fp4"], 1, -1, 1, -1], F32), n)


def _scaled_midpoints(rng: np.random.Generator, n: int) -> np.ndarray:
    """The same for another largest magnitude, where a quotient and a product with a reciprocal part."""
    return _midpoints(rng, n) * F32(1.2345678)


def _ranges(rng: np.random.Generator, n: int) -> np.ndarray:
    """Groups of very different sizes."""
    return (rng.standard_normal(n) * np.exp2(rng.integers(-130, 120, n // 16 + 1).repeat(16)[:n])).astype(F32)


CONTENTS: Contents = {
    **cases.CONTENTS,
    "steps": _steps,
    "powers": _powers,
    "midpoints": _midpoints,
    "scaled_midpoints": _scaled_midpoints,
    "ranges": _ranges,
}


def sample(n: int, seed: int) -> Iterator[Case]:
    """n cases of schemes x dtypes x shapes x contents."""
    return grid_cases.sample(SCHEMES, SHAPES, CONTENTS, n, seed)


def make(content: str, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """As `cases.make`, of the contents here."""
    if content in cases.CONTENTS:
        return cases.make(content, shape, dtype)
    rng = np.random.default_rng([len(content), *shape])
    with np.errstate(over="ignore", under="ignore"):
        x = CONTENTS[content](rng, shape[0] * shape[1]).reshape(shape).astype(DTYPES[dtype].numpy)
    return np.where(np.isfinite(x), x, x.dtype.type(1))


def range_solution(x: np.ndarray, scheme: Scheme) -> tuple[np.ndarray | None, np.ndarray | None, Findings]:
    """What `reference.solve` makes of the range of `x`, or nothing where the scheme needs none."""
    if not scheme.needs_range:
        return None, None, Findings()
    values = x.astype(F32)
    return reference.solve(np.full((1, 1), values.min(initial=0)), np.full((1, 1), values.max(initial=0)), scheme)


def check(backend: Backend, x: np.ndarray, scheme: Scheme, dtypes: Iterable[str] = KERNEL_DTYPES) -> None:
    """As `grid_cases.check`, with the range of `x` given to the schemes that need it."""
    scale, divisor, _ = range_solution(np.nan_to_num(x.astype(F32), posinf=0, neginf=0), scheme)
    packed, scales, zeros, findings = reference.quantize(x, scheme, divisor)
    got_packed = backend.put(np.full(packed.shape, 0xA5, np.uint8))
    placed_divisor = None if divisor is None else backend.put(divisor)
    if scale is not None:
        if findings != Findings():
            return  # found by the pass that finds the range
        got_scales = backend.put(scale)
        backend.encode(backend.put(x), scheme, got_scales, placed_divisor, got_packed)
    else:
        got_scales = backend.put(np.full(scales.shape, 0xA5, np.uint8).astype(scales.dtype))
        found = backend.quantize(backend.put(x), scheme, got_packed, got_scales, placed_divisor)
        if found != findings:
            raise AssertionError(f"findings differ: got {found}, want {findings}")
        if findings != Findings():
            return
    assert_bitwise_equal(_host(backend, got_scales), scales, "scales")
    assert_bitwise_equal(_host(backend, got_packed), packed, "packed")
    for dtype in dtypes:
        out = backend.empty(x.shape, DTYPES[dtype].numpy)
        backend.dequantize(got_packed, got_scales, placed_divisor, scheme, out)
        want = reference.dequantize(packed, scales, zeros, scheme, x.shape[1], dtype)
        assert_bitwise_equal(_host(backend, out), want, f"{scheme} {dtype}")


def check_counts(backend: Backend, names: Iterable[str]) -> None:
    """What is not finite or overflows is counted, whatever the shape of a unit of work."""
    for name in names:
        grid_cases.check_not_finite(backend, name, (5, 333), (3, 332, 400, 401, 1000, 1664), check)
    for name in ("e4m3_g32_f16", "e5m2_channel_f16", "e4m3_b128_f16"):
        grid_cases.check_overflows(backend, name, (3, 300), ((590, 3e38), (600, -3e38)), check)


def _host(backend: Backend, a: object) -> np.ndarray:
    out = np.empty(a.shape, a.dtype)  # type: ignore[attr-defined] - an array of the backend
    backend.get(a, out)
    return out


# What is wrong in the kernels: see `grid_cases.Faults`.
FAULTS: Faults = {
    "a bin too wide": ("float_codes.cuh", "__fmul_rn(v, 15.0f)", "__fmul_rn(v, 8.0f)", "nf4_g64"),
    "a midpoint": ("float_codes.cuh", "v > __uint_as_float(entry.x)", "v >= __uint_as_float(entry.x)", "nf4_g17"),
    "the tie of a negative value": ("float_codes.cuh", "+ (__float_as_uint(v) >> 31)", "", "fp4_g17"),
    "the sign of what is nearest to zero": ("float_codes.cuh", "v > 0.0f : v", "v < 0.0f : v", "fp4_g64"),
    "the least exponent": ("floats.cuh", "Small<3, 121>", "Small<3, 120>", "mxfp8"),
    "ties to even where they go down": ("floats.cuh", "? code - 1 : code", "? code : code", "mxfp4_ceil"),
    "the sign of zero": ("float_codes.cuh", "__fadd_rn(v, 0.0f)", "v", "mxfp4"),
    "a quotient that is not corrected": ("quantize_floats.cu", ", reciprocal, q)", ", 0.0f, q)", "e4m3_channel"),
    "a tail that is multiplied": (
        "quantize_floats.cu",
        "plain &= !is_short",
        "plain &= is_short || !is_short",
        "nf4_g64",
    ),
    "the tail's least absmax": ("quantize_floats.cu", "is_short ? fmaxf", "false ? fmaxf", "nf4_g64"),
    "the rounding of an exponent": ("quantize_floats.cu", "static_cast<u32>(rounding)", "0u", "mxfp8_round"),
    "a scale of zero": ("quantize_floats.cu", "SCALE == GLOBAL && byte == 0", "false", "nvfp4"),
    "the scale of zeros": ("quantize_floats.cu", "top == 0 ? of_zeros", "false ? of_zeros", "mxfp4_ceil"),
    "a value": ("dequantize_floats.cu", "0.44070983f", "0.4407099f", "nf4_g64"),
    "rows of a square": ("dequantize_floats.cu", "at.row / band", "at.row", "e4m3_b128"),
}
