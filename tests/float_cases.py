"""Family float: its schemes, weights that try its formulas, and a backend's results of them against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from arrowquant_gpu import reference
from arrowquant_gpu.backends import Backend
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.reference.floats import MIDPOINTS
from arrowquant_gpu.schemes import Scheme

from . import cases
from .bitwise import assert_bitwise_equal

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


CONTENTS: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    **cases.CONTENTS,
    "steps": _steps,
    "powers": _powers,
    "midpoints": _midpoints,
    "scaled_midpoints": _scaled_midpoints,
    "ranges": _ranges,
}
Case = tuple[Scheme, str, tuple[int, int], str]


def sample(n: int, seed: int) -> Iterator[Case]:
    """n cases of schemes x dtypes x shapes x contents, chosen by a fixed seed."""
    table = list(itertools.product(SCHEMES, KERNEL_DTYPES, SHAPES, CONTENTS))
    for i in np.random.default_rng(seed).permutation(len(table))[:n]:
        yield table[i]


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


def compare(backend: Backend, x: np.ndarray, scheme: Scheme, decoded: str = "float32") -> None:
    """Encode `x` and decode it to `decoded`; raise unless all equals the reference, findings included."""
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
            raise AssertionError(f"findings: got {found}, want {findings}")
        if findings != Findings():
            return
    assert_bitwise_equal(_host(backend, got_scales), scales, "scales")
    assert_bitwise_equal(_host(backend, got_packed), packed, "packed")
    out = backend.empty(x.shape, DTYPES[decoded].numpy)
    backend.dequantize(got_packed, got_scales, placed_divisor, scheme, out)
    want = reference.dequantize(packed, scales, zeros, scheme, x.shape[1], decoded)
    assert_bitwise_equal(_host(backend, out), want, "decoded")


def check(backend: Backend, table: Iterator[Case]) -> int:
    """`compare` every case; returns how many there were."""
    n = 0
    for n, (scheme, dtype, shape, content) in enumerate(table, 1):
        try:
            compare(backend, make(content, shape, dtype), scheme, KERNEL_DTYPES[n % 3])
        except AssertionError as e:
            raise AssertionError(f"{scheme} of {dtype} {shape} {content}: {e}") from e
    return n


def _host(backend: Backend, a: object) -> np.ndarray:
    out = np.empty(a.shape, a.dtype)  # type: ignore[attr-defined] - an array of the backend
    backend.get(a, out)
    return out
