"""Family float: the reference against exact arithmetic, the CPU backend against the reference."""

from __future__ import annotations

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from arrowquant_gpu import ops, reference
from arrowquant_gpu.backends import get_backend
from arrowquant_gpu.dtypes import KERNEL_DTYPES
from arrowquant_gpu.errors import NonFiniteError, ScaleOverflowError
from arrowquant_gpu.reference import Findings, floats
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .float_cases import SCHEMES, check, make, sample
from .grid_cases import check_cases
from .test_backends import PATTERNS

F32 = np.float32

# ---------------------------------------------------------------------------------------------------------------------
# The reference against rational numbers.

# Magnitudes by code, as the formats define them: (exponent bits, mantissa bits, bias, codes without infinity and NaN).
FIELDS = {"e2m1": (2, 1, 1, 8), "e4m3": (4, 3, 7, 127), "e5m2": (5, 2, 15, 124)}


def magnitudes(grid: str) -> list[Fraction]:
    _, mantissa, bias, n = FIELDS[grid]
    found = []
    for code in range(n):
        exponent, rest = divmod(code, 1 << mantissa)
        unit = Fraction(2) ** (max(exponent, 1) - bias - mantissa)
        found.append(unit * (rest + (exponent > 0) * (1 << mantissa)))
    return found


def nearest(value: float, grid: str, *, down: bool = False) -> int:
    """The code of a magnitude: the nearest, saturated; of two as near the even one, or the smaller."""
    table, exact = magnitudes(grid), abs(Fraction(value))
    return min(range(len(table)), key=lambda code: (abs(table[code] - exact), code if down else code % 2))


def exponent_of(absmax: float, scheme: Scheme) -> int:
    """The e8m0 byte of a group that is not zero, by its rule."""
    largest, exact, e = magnitudes(scheme.grid)[-1], Fraction(absmax), -400
    if scheme.scale_rule == "ceil":  # the least that reaches the largest magnitude
        while largest * Fraction(2) ** e < exact:
            e += 1
    else:
        while Fraction(2) ** (e + 1) <= exact:
            e += 1
        e += scheme.scale_rule == "round" and exact >= Fraction(7, 4) * Fraction(2) ** e
        while Fraction(2) <= largest:
            largest, e = largest / 2, e - 1
    return min(max(e + 127, 0), 254)


def by_one(x: list[float], scheme: Scheme, divisor: float | None) -> tuple[list[int], float]:
    """Codes of one whole group, weight by weight, and its scale as stored."""
    absmax, grid = F32(max(abs(v) for v in x)), scheme.grid
    if scheme.scale_dtype == "e8m0":
        stored = floats.E8M0_OF_ZEROS[scheme.scale_rule] if absmax == 0 else exponent_of(float(absmax), scheme)
        factor = F32(2.0**stored * 2.0**-127)
    elif scheme.scale_dtype == "e4m3":
        exact = absmax / F32(6)
        stored = nearest(float(exact if divisor is None else F32(divisor) * exact), "e4m3")
        stored = 0x20 if divisor is not None and stored == 0 else stored
        factor = F32(float(magnitudes("e4m3")[stored]))
        factor = factor if divisor is None else factor / F32(divisor)
    else:
        exact = absmax / F32(float(magnitudes(grid)[-1]))
        factor = F32(np.array(exact).astype(ml_dtypes.bfloat16)) if scheme.scale_dtype == "bfloat16" else exact
        factor = F32(floats.EPS[scheme.scale_dtype]) if absmax == 0 else factor
        stored = float(factor)
    down, codes = scheme.scale_rule in ("ceil", "local") and grid == "e2m1", []
    for v in x:
        q = F32(0) if factor == 0 else F32(v) / factor
        code = nearest(float(q), grid, down=down)
        is_negative = np.signbit(v) if grid != "e2m1" else (q < 0 and (code > 0 or not down))
        codes.append(code + (1 << (scheme.bits - 1)) * bool(is_negative))
    return codes, stored


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.grid in FIELDS and s.granularity == "group"], ids=str)
def test_the_reference_in_rational_numbers(scheme: Scheme) -> None:
    size = scheme.group_length(0)
    for content in ("normal", "steps", "powers", "ties", "zeros", "negative_zero", "one_hot"):
        x = make(content, (2, 2 * size), "float32")
        if scheme.scale_dtype == "float16":
            continue  # its rounding is NumPy's own
        packed, scales, zeros, findings = reference.quantize(x, scheme)
        assert findings == Findings()
        codes = reference.unpack(packed, scheme.bits, x.shape[1])
        for row in range(2):
            for group in range(2):
                part = slice(group * size, group * size + size)
                divisor = None if zeros is None else float(zeros[0, 0])
                want = by_one([float(v) for v in x[row, part]], scheme, divisor)
                assert (codes[row, part].tolist(), float(scales[row, group])) == want, content


@pytest.mark.parametrize("grid", ["nf4", "fp4"])
def test_tables_are_searched_by_their_midpoints(grid: str) -> None:
    """With an absmax of 1, every midpoint between neighbours takes the lower one, and what is just above the upper."""
    values = floats.VALUES[grid].astype(float)
    order = sorted(range(16), key=lambda code: (values[code], code))
    middles = [F32((values[a] + values[b]) / 2) for a, b in itertools.pairwise(order)]
    x = np.array([[-1.0, *middles, 1.0], [1.0, *np.nextafter(middles, F32(9)), -1.0]], F32)
    packed, scales, _, _ = reference.quantize(x, Scheme.parse(f"{grid}_g17"))
    codes = reference.unpack(packed, 4, 17)
    assert scales.tolist() == [[1.0], [1.0]]
    assert codes[0, 1:-1].tolist() == order[:-1]
    assert codes[1, 1:-1].tolist() == order[1:]


def test_a_short_tail_of_a_table_divides() -> None:
    """As bitsandbytes: whole groups are multiplied by a reciprocal, and a short one stores 1e-38 for zeros."""
    x = np.zeros((1, 96), F32)
    scales = reference.quantize(x, Scheme.parse("nf4_g64"))[1]
    assert scales.tolist() == [[0.0, float(F32(1e-38))]]


@pytest.mark.parametrize("grid", ["e4m3", "e5m2"])
def test_squares_have_a_scale_of_their_own(grid: str) -> None:
    scheme = Scheme.parse(f"{grid}_b128")
    x = np.ones((130, 257), F32)
    x[129, 256], x[127, 127], x[0, 128] = 3.0, -2.0, 5.0
    packed, scales, _, _ = reference.quantize(x, scheme)
    largest = F32(float(magnitudes(grid)[-1]))
    assert scales.tolist() == (np.array([[2, 5, 1], [1, 1, 3]], F32) / largest).tolist()
    assert packed.shape == (130, 257)
    assert packed[127, 127] == len(magnitudes(grid)) - 1 + 128


def test_the_global_scale() -> None:
    """It maps the largest weight to 448 * 6; a caller may give one; where it would be infinite it is 1."""
    scheme = Scheme.parse("nvfp4")
    x = make("normal", (4, 64), "float32")
    zeros = reference.quantize(x, scheme)[2]
    assert zeros is not None
    assert zeros.shape == (1, 1)
    assert abs(float(zeros[0, 0]) * float(np.abs(x).max()) / 2688 - 1) < 1e-6
    shared = zeros / F32(3)
    assert reference.quantize(x, scheme, shared)[2] is shared
    assert reference.solve(np.zeros((1, 1), F32), np.zeros((1, 1), F32), scheme)[1] == 1


# ---------------------------------------------------------------------------------------------------------------------
# The CPU backend.


@pytest.mark.parametrize("threads", [1, 2])
def test_the_cpu_backend(threads: int) -> None:
    assert check_cases(get_backend("cpu", threads), sample(1000, seed=threads), make, check) == 1000


def test_scales_that_are_known() -> None:
    """`encode` gives the codes that `quantize` gives, for granularities that have no use for it, too."""
    backend = get_backend("cpu", 1)
    for scheme, dtype, shape, content in sample(200, seed=3):
        x = make(content, shape, dtype)
        packed, scales, zeros, findings = reference.quantize(x, scheme)
        if findings == Findings():
            got = np.full_like(packed, 0xA5)
            backend.encode(x, scheme, scales, zeros, got)
            assert_bitwise_equal(got, packed, f"{scheme} of {dtype} {shape} {content}")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_what_is_not_finite_is_counted(dtype: str) -> None:
    x = make("normal", (131, 333), dtype)
    bits = x.view(f"u{x.itemsize}").reshape(-1)
    for at, pattern in zip((3, 332, 400, 401, 1000, 43000), PATTERNS[dtype], strict=True):
        bits[at] = pattern
    for scheme in SCHEMES:
        check(get_backend("cpu", 2), x, scheme)


def test_scales_that_overflow_are_counted() -> None:
    x = make("normal", (300, 300), "float32")
    x[0, 200], x[1, 290], x[299, 299] = 3e38, 1e30, -2e38
    for text in ("e4m3_g32_f16", "e5m2_channel_f16", "e5m2_b128_f16"):
        check(get_backend("cpu", 2), x, Scheme.parse(text))
    found = reference.quantize(x, Scheme.parse("e5m2_b128_f16"))[3]
    assert (found.n_overflow, found.first_overflow) == (3, 1)
    with pytest.raises(ScaleOverflowError):
        ops.quantize(x, "e4m3_tensor_f16", device="cpu")
    x[5, 5] = np.nan
    with pytest.raises(NonFiniteError):
        ops.quantize(x, "nvfp4", device="cpu")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_through_the_front_door(scheme: Scheme) -> None:
    """In one piece and through the reference: the same bytes; and what is decoded is near the weights."""
    x = np.random.default_rng(5).standard_normal((140, 96)).astype(F32)
    q, want = (ops.quantize(x, scheme, device=device) for device in ("cpu", "reference"))
    for got, wanted in ((q.packed, want.packed), (q.scales, want.scales)):
        assert_bitwise_equal(got, wanted)
    w = ops.dequantize(q, device="cpu")
    error = float(np.linalg.norm(w - x) / np.linalg.norm(x))
    assert error < {"fp4": 0.13, "nf4": 0.11, "e2m1": 0.14, "e4m3": 0.03, "e5m2": 0.06}[scheme.grid]


def test_every_byte_is_decoded() -> None:
    """All 256 bytes of codes, and all bytes of scales: what no encoder writes is decoded as it is."""
    backend = get_backend("cpu", 1)
    packed = np.arange(256, dtype=np.uint8).reshape(2, 128)
    for scheme in SCHEMES:
        length = 128 * 8 // scheme.bits
        scales = np.arange(np.prod(scheme.scales_shape((2, length)))).reshape(scheme.scales_shape((2, length)))
        scales = (scales * 7 + 3).astype(reference.quantize(np.ones((1, 1), F32), scheme)[1].dtype)
        divisor = np.full((1, 1), 3, F32) if scheme.scale_rule == "global" else None
        for dtype in KERNEL_DTYPES:
            want = reference.dequantize(packed, scales, divisor, scheme, length, dtype)
            got = np.empty_like(want)
            backend.dequantize(packed, scales, divisor, scheme, got)
            is_nan = np.isnan(want.astype(F32))
            assert (np.isnan(got.astype(F32)) == is_nan).all(), scheme
            assert_bitwise_equal(np.where(is_nan, 0, got), np.where(is_nan, 0, want), scheme.id)
