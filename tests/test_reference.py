"""reference.py against its two other witnesses: the scalar oracle, and the golden files under tests/golden/."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.dtypes import DTYPES, WEIGHT_DTYPES
from arrowquant_gpu.schemes import BITS, SCALE_SUFFIXES, Scheme

from .bitwise import assert_bitwise_equal
from .cases import CONTENTS, make
from .golden import GOLDEN, golden_schemes, load
from .scalar_oracle import quantize_row

ORACLE_SCHEMES = [
    Scheme(bits, "group" if size else "channel", size, symmetric, scale_dtype)
    for bits in BITS
    for size in (5, 16, None)
    for symmetric in (True, False)
    for scale_dtype in SCALE_SUFFIXES
]


@pytest.mark.parametrize("scheme", ORACLE_SCHEMES, ids=str)
def test_reference_equals_the_scalar_oracle(scheme: Scheme) -> None:
    """Every content, one row of 37: scales, zero points, codes and decoded values, exactly."""
    for content in CONTENTS:
        x = make(content, (1, 37), "float32")
        packed, scales, zeros, findings = reference.quantize(x, scheme)
        row = [Fraction(float(v)) for v in x[0]]
        want_packed, want_scales, want_zeros, want_decoded = quantize_row(row, scheme)
        overflow = [i for i, s in enumerate(want_scales) if s is None]
        assert findings.n_overflow == len(overflow), content
        if overflow:
            assert findings.first_overflow == overflow[0], content
            continue
        assert [Fraction(float(s)) for s in scales[0]] == want_scales, content
        if zeros is not None:
            assert [int(z) - scheme.offset for z in zeros[0]] == want_zeros, content
        assert packed.tobytes() == want_packed, content
        decoded = reference.dequantize(packed, scales, zeros, scheme, x.shape[1])
        assert decoded[0].tolist() == want_decoded, content


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 64])
def test_unpack_is_the_inverse_of_pack(bits: int, length: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, length)).astype(np.uint8)
    assert_bitwise_equal(reference.unpack(reference.pack(codes, bits), bits, length), codes)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_the_picture_in_schemes(bits: int) -> None:
    """Set one code at a time to all ones and read the letters of the bit picture off the bytes."""
    from arrowquant_gpu import schemes

    picture = next(line for line in schemes.__doc__.splitlines() if line.split()[:1] == [f"int{bits}"]).split()[1:]
    n_codes = len(picture) * 8 // bits
    for k in range(n_codes):
        codes = np.zeros((1, n_codes), np.uint8)
        codes[0, k] = (1 << bits) - 1
        letter = chr(ord("a") + k)
        want = [int("".join("1" if c == letter else "0" for c in byte), 2) for byte in picture]
        assert reference.pack(codes, bits)[0].tolist() == want, letter


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_every_weight_dtype_is_converted_with_one_rounding(dtype: str) -> None:
    target = DTYPES[dtype].numpy
    if dtype.startswith(("int", "uint")):
        info = np.iinfo(target)
        values = [
            info.min,
            info.max,
            0,
            1,
            info.max - 1,
            *(v for v in (2**24 + 1, 2**25 + 2, -(2**24) - 3) if info.min <= v <= info.max),
        ]
        x = np.array(values, target)
        want = [np.float32(float(_round_f32(Fraction(int(v))))) for v in x]
    else:
        x = np.array([0.1, -3.3, 448.0, 1e-3, 2.0**-14 / 3]).astype(target)
        want = [np.float32(float(_round_f32(Fraction(float(v))))) for v in x]
    assert_bitwise_equal(reference.to_float32(x), np.array(want, np.float32))


def _round_f32(x: Fraction) -> Fraction:
    from .scalar_oracle import f32

    return f32(x)


def test_a_float64_beyond_float32_is_found_as_infinite() -> None:
    *_, findings = reference.quantize(np.array([[1.0, 1e39, np.nan, -1e39]]), Scheme())
    assert findings == reference.Findings(1, 2, 1)


def test_float16_scale_overflow_is_counted_and_located() -> None:
    x = np.ones((2, 32), np.float32)
    x[1, 20] = 1e9
    *_, findings = reference.quantize(x, Scheme.parse("int4_g16_f16"))
    assert (findings.n_overflow, findings.first_overflow) == (1, 3)


@pytest.mark.parametrize("scheme", golden_schemes(), ids=str)
def test_golden_files(scheme: Scheme) -> None:
    """Encode and decode against bytes written once by `python -m tests.golden` and reviewed since."""
    stored = load(scheme)
    packed, scales, zeros, _ = reference.quantize(stored["x"], scheme)
    assert_bitwise_equal(packed, stored["packed"], "packed")
    assert_bitwise_equal(scales.view(np.uint8), stored["scales"], "scales")
    assert_bitwise_equal(np.zeros(0, np.uint8) if zeros is None else zeros.view(np.uint8), stored["zeros"], "zeros")
    decoded = reference.dequantize(packed, scales, zeros, scheme, stored["x"].shape[1])
    assert_bitwise_equal(decoded, stored["decoded"], "decoded")


def test_golden_folder_has_each_scheme_and_nothing_else() -> None:
    assert sorted(p.stem for p in Path(GOLDEN).iterdir()) == sorted(s.id for s in golden_schemes())
