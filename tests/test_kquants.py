"""K-quants: the reference against plain loops, the CPU backend against the reference, bounds of the error, findings."""

from __future__ import annotations

import itertools
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowquant_gpu import reference
from arrowquant_gpu.backends import Backend, get_backend
from arrowquant_gpu.dtypes import KERNEL_DTYPES
from arrowquant_gpu.reference import Findings, kquants, kquants_search
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .gpuless.stand_in import edited_module
from .grid_cases import F32, check, check_cases
from .kquants_cases import CONTENTS, IDS, SCHEMES, check_any_bytes, check_counts, make, random_blocks
from .test_backends import quantize

# Whole batches of 2 and of 4 blocks, parts of them, and rows that begin within one.
SHAPES = ((1, 256), (3, 768), (7, 256), (1, 2560))


# ---------------------------------------------------------------------------------------------------------------------
# Backends.


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_the_cpu_gives_the_bytes_of_the_reference(scheme: Scheme) -> None:
    table = list(itertools.product([scheme], KERNEL_DTYPES, SHAPES, CONTENTS))
    assert check_cases(get_backend("cpu"), table, make) == len(table)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_the_cpu_decodes_any_bytes(scheme: Scheme) -> None:
    check_any_bytes(get_backend("cpu"), scheme)


@pytest.mark.parametrize("name", IDS)
def test_the_cpu_counts(name: str) -> None:
    check_counts(get_backend("cpu"), [name])


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_threads_and_pieces_change_no_byte(scheme: Scheme) -> None:
    x = make("heavy_tailed", (513, 2048), "float32")
    x[500, 100] = 1e9
    one, two = get_backend("cpu", threads=1), get_backend("cpu", threads=2)
    a, b = quantize(one, x, scheme), quantize(two, x, scheme)
    assert a[3] == b[3] == Findings(n_overflow=1, first_overflow=500 * 8)
    assert_bitwise_equal(a[0], b[0])


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=1024, max_size=1024), st.sampled_from(IDS))
def test_any_finite_bits(raw: bytes, name: str) -> None:
    x = np.frombuffer(raw, F32).reshape(1, 256)
    x = np.where(np.isfinite(x), x, F32(0))
    check(get_backend("cpu"), x, Scheme.parse(name))
    check(get_backend("cpu"), np.ldexp(np.frexp(x)[0], np.frexp(x)[1] % 16).astype(F32), Scheme.parse(name))


# ---------------------------------------------------------------------------------------------------------------------
# The layout, once more: one weight after the other, as docs/numerics_kquants.md gives the places of its bits.


def _half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def _six(block: bytes, at: int, j: int) -> tuple[int, int]:
    """Scale and minimum j of Q4_K and Q5_K."""
    sc = block[at : at + 12]
    if j < 4:
        return sc[j] & 63, sc[j + 4] & 63
    return sc[j + 4] & 15 | sc[j - 4] >> 6 << 4, sc[j + 4] >> 4 | sc[j] >> 6 << 4


def weight(name: str, block: bytes, e: int) -> np.float32:
    """Weight e of a block, by one rounding for each operation."""
    pair, nibble = 32 * (e // 128) + e % 32, 32 * (e // 64) + e % 32
    if name == "q2_k":
        s = block[e // 16]
        q = block[16 + pair] >> 2 * (e % 128 // 32) & 3
        return F32(F32(_half(block, 80)) * F32(s & 15)) * F32(q) - F32(_half(block, 82)) * F32(s >> 4)
    if name == "q3_k":
        j = e // 16
        low = block[96 + j % 8] >> 4 * (j // 8) & 15
        s = low | (block[104 + j % 4] >> 2 * (j // 4) & 3) << 4
        q = (block[32 + pair] >> 2 * (e % 128 // 32) & 3) + 4 * (block[e % 32] >> e // 32 & 1)
        return F32(F32(_half(block, 108)) * F32(s - 32)) * F32(q - 4)
    if name == "q6_k":
        (s,) = struct.unpack_from("b", block, 192 + e // 16)
        low = block[64 * (e // 128) + e % 64] >> 4 * (e % 128 // 64) & 15
        q = low | (block[128 + pair] >> 2 * (e % 128 // 32) & 3) << 4
        return F32(F32(_half(block, 208)) * F32(s)) * F32(q - 32)
    scale, minimum = _six(block, 4, e // 32)
    q = block[(16 if name == "q4_k" else 48) + nibble] >> 4 * (e % 64 // 32) & 15
    if name == "q5_k":
        q |= (block[16 + e % 32] >> e // 32 & 1) << 4
    step = F32(_half(block, 0)) * F32(scale)
    return F32(step * F32(q)) - F32(_half(block, 2)) * F32(minimum)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_each_weight_is_where_the_document_says(scheme: Scheme) -> None:
    packed = random_blocks(scheme, 12, 3)
    got = reference.dequantize(packed, np.empty((12, 0), np.float16), None, scheme, 256)
    want = np.array([[weight(scheme.id, bytes(block), e) for e in range(256)] for block in packed], F32)
    assert_bitwise_equal(got, want, scheme.id)
    packed[7, 20] ^= 8
    with pytest.raises(AssertionError, match="differ"):
        assert_bitwise_equal(reference.dequantize(packed, np.empty((12, 0)), None, scheme, 256), want, "differ")


# ---------------------------------------------------------------------------------------------------------------------
# What is written is near the weights.

# Scheme -> largest error, as a share of the largest magnitude of the block. More than half a step of the codes, since a
# step is itself one of few multiples of another.
BOUNDS = {"q2_k": 0.5, "q3_k": 0.35, "q4_k": 0.12, "q5_k": 0.07, "q6_k": 0.06}


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_no_weight_is_far_off(scheme: Scheme) -> None:
    """Of all blocks without findings whose scales float16 can hold, sums that overflow in the search included."""
    n = 0
    for content, dtype in itertools.product(CONTENTS, KERNEL_DTYPES):
        if content in ("wild", "subnormal", "near_tiny_scale"):
            continue
        for shape in SHAPES:
            x = make(content, shape, dtype)
            packed, scales, zeros, findings = reference.quantize(x, scheme)
            if findings != Findings():
                continue
            decoded = reference.dequantize(packed, scales, zeros, scheme, x.shape[1]).reshape(-1, 256)
            blocks = x.astype(F32).reshape(-1, 256)
            largest = np.abs(blocks).max(axis=1)
            off = np.abs(decoded - blocks).max(axis=1)
            assert (off <= BOUNDS[scheme.id] * largest).all(), (content, dtype, (off / largest).max())
            n += len(blocks)
    assert n > 200


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_zeros_are_zeros(scheme: Scheme) -> None:
    packed, scales, zeros, findings = reference.quantize(np.zeros((2, 512), F32), scheme)
    assert findings == Findings()
    assert not packed.any()
    assert not reference.dequantize(packed, scales, zeros, scheme, 512).any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_sums_that_overflow_are_found_and_not_written(scheme: Scheme) -> None:
    """Cubes of such weights are infinite in float32."""
    for value in (1e9, 1e13, 1e17, 1e19, 1e25, 3e38):
        x = make("normal", (2, 512), "float32")
        x[1, 300] = value
        assert reference.quantize(x, scheme)[3] == Findings(n_overflow=1, first_overflow=3)


# ---------------------------------------------------------------------------------------------------------------------
# The checks can fail.

# What is wrong -> what is replaced by what in reference/kquants_search.py, and the scheme that shows it.
FAULTS = {
    "a try left out": ("range(fit.tries + 1)", "range(fit.tries)", "q4_k"),
    "sums in another order": ("functools.reduce(np.add, terms,", "functools.reduce(np.add, terms[::-1],", "q5_k"),
    "the last of the largest": ("np.abs(xi) > np.abs(largest)", "np.abs(xi) >= np.abs(largest)", "q6_k"),
    "a positive minimum": ("np.where(new_minimum > 0, F32(0), new_minimum)", "new_minimum", "q2_k"),
    "products in another order": ("wx = x * x, x * x * x", "wx = x * x, x * (x * x) * F32(1.0000001)", "q3_k"),
    "an infinite scale": ("np.isnan(scale), F32(np.inf)", "np.isnan(scale), F32(0)", "q6_k"),
}


def check_all(backend: Backend, name: str) -> None:
    for content, shape in (*itertools.product(CONTENTS, SHAPES), ("heavy_tailed", (512, 2048))):
        check(backend, make(content, shape, "float32"), Scheme.parse(name), [])
    check_counts(backend, [name])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    old, new, name = FAULTS[fault]
    monkeypatch.setitem(sys.modules, kquants_search.__name__, kquants_search)  # which is put back in the end
    module = edited_module(kquants_search.__name__, (old, new))
    for function in ("scale_and_minimum", "scale_by_tries", "scale_by_descent", "first_largest"):
        monkeypatch.setattr(kquants, function, getattr(module, function))
    with pytest.raises(AssertionError, match="differ"):
        check_all(get_backend("cpu"), name)
