"""Equalized columns: the divisors beside the formula written out here, their JSON, and the engine that divides."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arrowquant_gpu.diffusion import spatial
from arrowquant_gpu.diffusion.calibration import Activations, Extremes
from arrowquant_gpu.diffusion.spatial import column_absmax, divisors, equalize
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.engine import converted
from arrowquant_gpu.engine.converted import columns_of, convert, recover
from arrowquant_gpu.errors import InputError, SourceError
from arrowquant_gpu.formats import Diffusion, Entry, TensorInfo
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.diffusion_columns import Smoothing, Spatial, divisors_of, from_json, to_json
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .fixtures import write_safetensors

POSITIVE = st.floats(2.0**-149, float(np.finfo(np.float32).max), width=32)
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=8))
def test_divisors_are_the_formula_to_the_last_bit(pairs: list[tuple[float, float]]) -> None:
    """The float32 next to the exact root: s^2 lies between the squares of the points halfway to its neighbours."""
    w, x = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
    found = divisors(w, x)
    for s, a, b in zip(found, w, x, strict=True):
        exact = Fraction(float(a)) / Fraction(float(b))
        if s in (spatial.SMALLEST, spatial.LARGEST):
            assert exact <= Fraction(spatial.SMALLEST) ** 2 or exact >= Fraction(spatial.LARGEST) ** 2
            continue
        below, above = (Fraction(float(np.nextafter(s, np.float32(to)))) for to in (0, np.inf))
        here = Fraction(float(s))
        # Rounding twice, to float64 and to float32, may take a tie the wrong way.
        slack = Fraction(1, 1 << 50)
        assert ((below + here) / 2) ** 2 * (1 - slack) <= exact <= ((here + above) / 2) ** 2 * (1 + slack)


def test_columns_that_nothing_is_known_of_are_not_divided() -> None:
    w = np.array([0, 2, 0, np.nan, np.inf, 8], np.float32)
    x = np.array([1, 0, 0, 1, 1, 2], np.float32)
    assert divisors(w, x).tolist() == [1, 1, 1, 1, 1, 2]


@given(st.tuples(POSITIVE, POSITIVE))
def test_what_is_divided_neither_overflows_nor_vanishes(pair: tuple[float, float]) -> None:
    w, x = (np.array([value], np.float32) for value in pair)
    s = divisors(w, x)
    with np.errstate(all="raise", under="ignore"):
        assert 0 < s[0] < np.inf
        assert np.isfinite(w / s).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn"])
@pytest.mark.parametrize("block_bytes", [1, 700, 1 << 20])
def test_largest_of_each_column(tmp_path: Path, dtype: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spatial, "BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((37, 50)) * np.exp2(rng.integers(-3, 3, 50))).astype(DTYPES[dtype].numpy)
    x[:, 3] = 0
    source = open_checkpoint(write_safetensors(tmp_path / "m.safetensors", {"w": x}))
    want = np.array([max(abs(float(v)) for v in x[:, i]) for i in range(50)]).astype(np.float32)
    assert_bitwise_equal(column_absmax(source, "w"), want)


def test_what_is_not_finite_shows_in_its_column(tmp_path: Path) -> None:
    x = np.ones((4, 3), np.float32)
    x[1, 0], x[2, 2] = np.nan, -np.inf
    source = open_checkpoint(write_safetensors(tmp_path / "m.safetensors", {"w": x}))
    found = column_absmax(source, "w")
    assert np.isnan(found[0])
    assert found[1:].tolist() == [1, np.inf]


def test_equalize_says_why_not(tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 3), np.float32), "conv": np.ones((4, 3, 2), np.float32)}
    source = open_checkpoint(write_safetensors(tmp_path / "m.safetensors", weights))
    w, conv = source.tensors["w"], source.tensors["conv"]
    assert equalize(source, w, None, 0.5).reason == spatial.NOT_CALIBRATED
    ranges = Activations({0: Extremes(-1.0, 1.0, 1)})
    assert equalize(source, w, ranges, 0.5).reason == spatial.NO_CHANNELS
    ranges.absmax = np.array([4, 1, 0], np.float32)
    assert equalize(source, conv, ranges, 0.5).reason == spatial.NOT_A_MATRIX
    found = equalize(source, w, ranges, 0.5)
    assert found.divisors is not None
    assert found.divisors.tolist() == [0.5, 1, 1]
    assert found.smoothing is None
    assert found.reason is not None
    ranges.sums, ranges.n_sums = np.array([2.0, 4.0, 6.0]), 4
    found = equalize(source, w, ranges, 0.125)
    assert found.smoothing is not None
    assert (found.smoothing.alpha, found.smoothing.mean.tolist(), found.reason) == (0.125, [0.5, 1.0, 1.5], None)
    ranges.absmax = np.ones(4, np.float32)
    with pytest.raises(InputError, match=r"w: the calibration has 4 channels .* shape is \[4, 3\]: 3 columns"):
        equalize(source, w, ranges, 0.5)


@given(
    hnp.arrays(np.float32, st.integers(0, 9), elements=POSITIVE),
    hnp.arrays(np.float32, st.integers(0, 9), elements=FLOAT32),
    st.floats(0, 1),
    st.none() | st.text(),
)
def test_json_keeps_every_bit(d: np.ndarray, mean: np.ndarray, alpha: float, reason: str | None) -> None:
    text = to_json(Spatial(d, Smoothing(alpha, mean), reason))
    found = from_json(text)
    assert found.smoothing is not None
    assert found.divisors is not None
    assert_bitwise_equal(found.divisors, d)
    assert_bitwise_equal(found.smoothing.mean, mean)
    assert (found.smoothing.alpha, found.reason) == (alpha, reason)
    # Another reader may take numbers for float64, or for float32 at once.
    assert_bitwise_equal(np.array(json.loads(text)["divisors"], np.float64).astype(np.float32), d)
    assert_bitwise_equal(
        np.array([np.float32(v) for v in json.loads(text, parse_float=str)["divisors"]], np.float32), d
    )
    assert from_json(to_json(Spatial(reason=reason))).divisors is None
    assert divisors_of(None) is None


def test_json_of_random_bits() -> None:
    bits = np.random.default_rng(0).integers(1, 0x7F800000, 20_000, dtype=np.uint32)
    found = divisors_of(to_json(Spatial(bits.view(np.float32))))
    assert found is not None
    assert_bitwise_equal(found, bits.view(np.float32))


GOOD: dict[str, Any] = {"formula": "", "divisors": [1.0], "smoothing": None, "reason": None}


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"divisors": [0.0]}, "divisor 0 is 0.0"),
        ({"divisors": [1.0, -2.0]}, "divisor 1 is -2.0"),
        ({"divisors": [1e-60]}, "divisor 0 is 0.0"),
        ({"divisors": [1e39]}, "not a list of"),
        ({"divisors": [float("nan")]}, "not a list of"),
        ({"divisors": [None]}, "not a list of"),
        ({"divisors": ["1"]}, "not what arrowquant writes"),
        ({"divisors": [[1.0]]}, "not a list of"),
        ({"divisors": 1.0}, "not a list of"),
        ({"divisors": {"a": 1}}, "not what arrowquant writes"),
        ({"smoothing": {"alpha": 0.5}}, "not what arrowquant writes"),
        ({"smoothing": 3}, "not what arrowquant writes"),
    ],
)
def test_json_that_is_wrong(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(SourceError, match=match):
        from_json(json.dumps({**GOOD, **changed}))


@pytest.mark.parametrize("text", ["", "{", "7", "null", "[]", "{}", "[" * 100_000])
def test_json_that_is_something_else(text: str) -> None:
    with pytest.raises(SourceError, match="not what arrowquant writes"):
        from_json(text)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "float8_e5m2"])
@pytest.mark.parametrize("shape", [(5, 7), (1, 300), (300, 1), (0, 4), (3, 0)])
@pytest.mark.parametrize("at_a_time", [1, 64, 1 << 16])
def test_converting_is_one_rounding_and_one_division(
    dtype: str, shape: tuple[int, int], at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converted, "CONVERTED", at_a_time)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(DTYPES[dtype].numpy)
    s = np.exp(rng.standard_normal(shape[1])).astype(np.float32)
    plain, divided = np.empty(shape, np.float32), np.empty(shape, np.float32)
    convert(x, None, plain)
    convert(x, s, divided)
    assert_bitwise_equal(plain, x.astype(np.float32))
    assert_bitwise_equal(divided, (x.astype(np.float32) / s[None, :]).astype(np.float32))
    recover(divided, s)
    assert np.allclose(divided, plain, rtol=3e-7, atol=0)


def test_the_divisors_of_a_part_of_a_row(tmp_path: Path) -> None:
    info = TensorInfo("w", "float32", (3, 10), tmp_path, 0, 120)
    s = np.arange(1, 11, dtype=np.float32)
    entry = Entry(info, Scheme.parse("int4_g8"), "", Diffusion("image", s))
    for first, n, want in ((0, 10, s), (20, 10, s), (8, 2, s[8:]), (14, 3, s[4:7])):
        found = columns_of(entry, first, n)
        assert found is not None
        assert_bitwise_equal(found, want)
    assert columns_of(Entry(info, Scheme.parse("int4_g8"), "", Diffusion("image")), 0, 10) is None
    assert columns_of(Entry(info, None, "", Diffusion("image", s)), 0, 10) is None
    assert columns_of(Entry(info, Scheme.parse("int4_g8"), ""), 0, 10) is None


def test_bfloat16_is_no_exception() -> None:
    """Division is of float32, not of the weights' own type."""
    x = np.array([[1.0, 3.0]], ml_dtypes.bfloat16)
    out = np.empty((1, 2), np.float32)
    convert(x, np.array([3, 3], np.float32), out)
    assert out.tolist() == [[float(np.float32(1) / np.float32(3)), 1.0]]
