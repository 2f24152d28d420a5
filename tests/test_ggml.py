"""ggml's blocks: the reference against plain loops, the CPU backend against the reference, findings."""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu import reference
from arrowquant_gpu.backends import Backend, cpu, get_backend
from arrowquant_gpu.backends.cpu import CpuBackend
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.grids import GRIDS
from arrowquant_gpu.reference import Findings, ggml
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .ggml_cases import CONTENTS, IDS, SCHEMES, check_any_bytes, check_counts, make
from .grid_cases import F32, check, check_cases
from .test_backends import BACKENDS
from .test_cpu_backend import run


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return get_backend(request.param)


# ---------------------------------------------------------------------------------------------------------------------
# Backends.


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_a_backend_gives_the_bytes_of_the_reference(backend: Backend, scheme: Scheme) -> None:
    table = list(itertools.product([scheme], KERNEL_DTYPES, ((1, 64), (7, 320), (3, 1024)), CONTENTS))
    assert check_cases(backend, table, make) == len(table)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_a_backend_decodes_any_bytes(backend: Backend, scheme: Scheme) -> None:
    check_any_bytes(backend, scheme)


@pytest.mark.parametrize("name", IDS)
def test_a_backend_counts(backend: Backend, name: str) -> None:
    check_counts(backend, [name])


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_casts_of_any_length(backend: Backend, name: str, dtype: str) -> None:
    for n in (1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 127, 200):
        check(backend, make("of_any_size", (3, n), dtype), Scheme.parse(name))


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_empty_tensors(backend: Backend, scheme: Scheme) -> None:
    for shape in ((0, 64), (3, 0)):
        check(backend, np.empty(shape, F32), scheme)


@given(data=st.data())
def test_any_bits(data: st.DataObject) -> None:
    """Any finite weights, of which some are extreme."""
    dtype = data.draw(st.sampled_from(KERNEL_DTYPES))
    target = DTYPES[dtype].numpy
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    x = np.frombuffer(rng.bytes(192 * target.itemsize), target).copy()
    x[~np.isfinite(x.astype(F32))] = 0
    if data.draw(st.booleans()):
        with np.errstate(over="ignore", under="ignore"):
            x = (np.sign(x.astype(F32)) * rng.uniform(0.5, 1, 192) * 2.0 ** data.draw(st.integers(-130, 17))).astype(
                target
            )
        x[~np.isfinite(x.astype(F32))] = 1
    for scheme in SCHEMES:
        check(get_backend("cpu"), x.reshape(3, 64), scheme, [dtype])


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """With pieces of one unit: each boundary between two pieces that there can be, is."""
    for constant in ("SHARE", "PIECE"):
        monkeypatch.setattr(cpu, constant, 1)
    monkeypatch.setattr(cpu, "PIECES", 1 << 20)
    backend = CpuBackend(threads)
    for scheme in SCHEMES:
        check(backend, make("normal", (5, 320), "bfloat16"), scheme, ["float32"])
    check_counts(backend, ["q4_1", "f16"])


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_there_is_nothing_to_encode_with_known_scales(scheme: Scheme) -> None:
    x, scales = np.zeros((1, 64), F32), np.empty((1, 0), np.float16)
    packed = np.empty(scheme.packed_shape(x.shape), np.uint8)
    with pytest.raises(NotImplementedError, match=scheme.id):
        reference.encode_packed(x, scales, None, scheme)
    with pytest.raises(NotImplementedError, match=scheme.id):
        reference.solve(x[:, :1], x[:, :1], scheme)
    with pytest.raises(NotImplementedError, match=scheme.id):
        get_backend("cpu").encode(x, scheme, scales, None, packed)


# ---------------------------------------------------------------------------------------------------------------------
# The reference, against one block at a time in exact arithmetic of Python's own.


def f32(value: float) -> float:
    return float(F32(value))


def half_bytes(value: float) -> list[int]:
    return list(np.array(value, "<f2").tobytes())


def nibbles(codes: list[int]) -> list[int]:
    half = len(codes) // 2
    return [codes[j] & 15 | (codes[j + half] & 15) << 4 for j in range(half)]


def block_q8(x: list[float]) -> list[int]:
    scale = f32(max(map(abs, x)) / 127)
    inverse = f32(1 / scale) if scale else 0.0
    codes = [f32(v * inverse) for v in x]
    return half_bytes(scale) + [int(math.copysign(math.floor(abs(q) + 0.5), q)) & 255 for q in codes]


def block_signed(x: list[float], bits: int) -> list[int]:
    most, largest = 0.0, 0.0
    for v in x:
        if abs(v) > most:
            most, largest = abs(v), v
    offset = 1 << (bits - 1)
    scale = f32(largest / -offset)
    inverse = f32(1 / scale) if scale else 0.0
    codes = [min(int(f32(f32(v * inverse) + offset + 0.5)), 2 * offset - 1) for v in x]
    return half_bytes(scale) + fifth(codes, bits) + nibbles(codes)


def block_ranged(x: list[float], bits: int) -> list[int]:
    low, high = x[0], x[0]
    for v in x:
        low, high = (v if v < low else low), (v if v > high else high)
    levels = (1 << bits) - 1
    scale = f32(f32(high - low) / levels)
    inverse = f32(1 / scale) if scale else 0.0
    codes = [min(int(f32(f32(f32(v - low) * inverse) + 0.5)), levels) for v in x]
    return half_bytes(scale) + half_bytes(low) + fifth(codes, bits) + nibbles(codes)


def fifth(codes: list[int], bits: int) -> list[int]:
    return list(sum((q >> 4) << j for j, q in enumerate(codes)).to_bytes(4, "little")) if bits == 5 else []


def nearest_e2m1(v: float, step: float) -> int:
    values = [*range(5), 6, 8, 12, 0, *range(-1, -5, -1), -6, -8, -12]
    errors = [abs(k * step - v) for k in values]
    return errors.index(min(errors))


def block_mxfp4(x: list[float]) -> list[int]:
    most = max(map(abs, x))
    e = max(math.floor(f32(math.log2(most))) + 125, 0) if most else 0
    return [e, *nibbles([nearest_e2m1(v, 2.0 ** (e - 128)) for v in x])]


def block_nvfp4(x: list[float]) -> list[int]:
    scales, codes = [], []
    for part in range(4):
        values = x[16 * part : 16 * part + 16]
        wanted = f32(max(map(abs, values)) / 6)
        table = [(u & 7) * 2.0**-9 if u < 8 else (8 + (u & 7)) * 2.0 ** ((u >> 3) - 10) for u in range(0x78)] + [256.0]
        u = max(i for i in range(0x79) if i == 0 or wanted >= (table[i - 1] + table[i]) / 2)
        u = 0x7E if u == 0x78 else 7 if u == 8 and wanted < 2.0**-6 else u
        step = 224.0 if u == 0x7E else table[u] / 2
        scales.append(u)
        codes += nibbles([nearest_e2m1(v, step) for v in values])
    return scales + codes


def block_nl(x: list[float]) -> list[int]:
    table = ggml.NL.tolist()
    border = [(a + b) / 2 for a, b in itertools.pairwise(table)]

    def code(v: float) -> int:
        return sum(v >= b for b in border)

    largest = max(x, key=abs)
    scale = best = 0.0
    for t in range(16):
        inverse = f32(1 / f32(largest / 127)) if t == 0 else f32((t - 135) / largest)
        products = norm = 0.0
        for v in x:
            q = table[code(f32(v * inverse))]
            weighted = f32(f32(v * v) * q)
            products, norm = f32(products + f32(weighted * v)), f32(norm + f32(weighted * q))
        if t == 0 or f32(products * products) > f32(best * norm):
            scale = f32(products / norm)
            best = f32(scale * products)
    inverse = f32(1 / scale)
    return half_bytes(scale) + nibbles([code(f32(v * inverse)) for v in x])


BY_HAND: dict[str, Callable[[list[float]], list[int]]] = {
    "q8_0": block_q8,
    "q4_0": lambda x: block_signed(x, 4),
    "q5_0": lambda x: block_signed(x, 5),
    "q4_1": lambda x: block_ranged(x, 4),
    "q5_1": lambda x: block_ranged(x, 5),
    "ggml_mxfp4": block_mxfp4,
    "ggml_nvfp4": block_nvfp4,
    "iq4_nl": block_nl,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_reference_is_what_plain_loops_give(name: str) -> None:
    """Every product and sum of two float32 is exact in a float64, or rounded twice to the same float32."""
    scheme = Scheme.parse(name)
    contents = ["normal", "ties", "halves", "grid_ties", "both_signs", "heavy_tailed", "near_powers"]
    contents += [] if name == "iq4_nl" else ["signed_zeros", "one_hot", "zeros", "negative_zero"]
    contents = [c for c in contents if not (c == "near_powers" and name != "ggml_mxfp4")]
    for content in contents:
        x = make(content, (8, 64), "float32")
        packed, _, _, findings = reference.quantize(x, scheme)
        assert findings == Findings()
        block = GRIDS[scheme.grid].block
        want = [BY_HAND[name](row) for row in x.reshape(-1, block).tolist()]
        assert_bitwise_equal(packed.reshape(len(want), -1), np.array(want, np.uint8), content)


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_decoded_weights_are_near(scheme: Scheme) -> None:
    x = make("normal", (16, 1024), "float32")
    packed, scales, zeros, _ = reference.quantize(x, scheme)
    error = reference.dequantize(packed, scales, zeros, scheme, 1024) - x
    bound = {2: 0.2, 4: 0.12, 5: 0.06, 8: 0.008, 16: 0.003}[scheme.bits]
    assert np.sqrt((error**2).mean() / (x**2).mean()) < bound


@pytest.mark.soak
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
@pytest.mark.parametrize("target", ["generic", "haswell"])
def test_other_instruction_sets_give_the_same_bytes(target: str, tmp_path: Path) -> None:
    """SSE2 only, and AVX2 without AVX-512: what Numba compiles for on older machines."""
    code = """
        from arrowquant_gpu.backends.cpu import CpuBackend
        from tests.ggml_cases import CONTENTS, SCHEMES, check_any_bytes, make
        from tests.grid_cases import check
        for scheme in SCHEMES:
            for content in CONTENTS:
                check(CpuBackend(1), make(content, (3, 320), "bfloat16"), scheme)
            check_any_bytes(CpuBackend(1), scheme)
        print("same")
        """
    assert run(code, NUMBA_CPU_NAME=target, NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path)) == "same"
