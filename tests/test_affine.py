"""Family affine: the reference against lines of its own and MLX's formula, the backends against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu import ops, reference
from arrowquant_gpu.backends import Backend, get_backend, launches
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.errors import SchemeError
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.schemes import BITS, SCALE_SUFFIXES, Scheme

from .bitwise import assert_bitwise_equal
from .cases import CONTENTS, make
from .gpuless.lint import lint
from .gpuless.loaders import PtxLoader, ShimLoader, ptx_of
from .gpuless.shim import FORWARD, REVERSE, Schedule
from .gpuless.stand_in import backend_over
from .test_backends import PATTERNS
from .test_kernel_gates import compare

SCHEMES = tuple(
    Scheme(bits, "group", group, False, scale_dtype, "affine")
    for bits, group, scale_dtype in itertools.product(BITS, (32, 64, 128), SCALE_SUFFIXES)
)
SHAPES = ((1, 1), (2, 7), (5, 127), (3, 129), (7, 384), (2, 1000), (1, 4133))
Case = tuple[Scheme, str, tuple[int, int], str]


def sample(n: int, seed: int) -> Iterator[Case]:
    """n cases of schemes x dtypes x shapes x contents, chosen by a fixed seed."""
    table = list(itertools.product(SCHEMES, KERNEL_DTYPES, SHAPES, CONTENTS))
    for i in np.random.default_rng(seed).permutation(len(table))[:n]:
        yield table[i]


def by_one(x: np.ndarray, bits: int) -> tuple[list[int], float, float]:
    """Codes, scale and bias of one group, weight by weight."""
    f = np.float32
    w, n = [f(v) for v in x], f(2**bits - 1)
    lo, hi = min(w), max(w)
    step = max((hi - lo) / n, f(1e-7))
    if abs(lo) > abs(hi):
        edge = lo
    else:
        edge, step = hi, -step
    k = f(np.rint(edge / step))
    scale, bias = (edge / k, edge) if k != 0 else (step, f(0))
    return [int(min(max(np.rint((v - bias) / scale), 0), n)) for v in w], float(scale), float(bias)


@pytest.mark.parametrize("bits", BITS)
def test_the_reference_weight_by_weight(bits: int) -> None:
    scheme = Scheme(bits, "group", 32, False, "float32", "affine")
    for content in ("normal", "ties", "one_hot", "zeros", "positive", "negative"):
        x = make(content, (2, 77), "float32")
        packed, scales, biases, findings = reference.quantize(x, scheme)
        codes = reference.unpack(packed, bits, 77)
        assert findings == Findings()
        for row, group in itertools.product(range(2), range(3)):
            part = slice(group * 32, min(77, group * 32 + 32))
            want = by_one(x[row, part], bits)
            got = codes[row, part].tolist(), float(scales[row, group]), float(biases[row, group])
            assert got == want, content


def check(backend: Backend, case: Case) -> None:
    """Encode and decode one case; raise unless all equals the reference."""
    scheme, dtype, shape, content = case
    x = make(content, shape, dtype)
    try:
        compare(backend, x, scheme)
        packed, scales, biases, findings = reference.quantize(x, scheme)
        if findings != Findings():
            return
        want = reference.dequantize(packed, scales, biases, scheme, shape[1], dtype)
        got = np.empty(shape, DTYPES[dtype].numpy)
        ops.dequantize_rows(packed, scales, biases, scheme, got, backend=backend)
        assert_bitwise_equal(got, want, "decoded")
    except AssertionError as e:
        raise AssertionError(f"{scheme} of {dtype} {shape} {content}: {e}") from e


def check_counts(backend: Backend) -> None:
    for dtype in KERNEL_DTYPES:
        x = make("normal", (5, 333), dtype)
        bits = x.view(f"u{x.itemsize}")
        for at, pattern in zip((3, 332, 400, 401, 1000, 1664), PATTERNS[dtype], strict=True):
            bits.reshape(-1)[at] = pattern
        compare(backend, x, Scheme.parse("affine4_g32"))
    x = make("normal", (3, 300), "float32")
    x[1, 290], x[2, 0] = 3e38, -3e38
    for scheme in ("affine8_g128_f16", "affine3_g64", "affine4_g32_bf16"):
        compare(backend, x, Scheme.parse(scheme))
    x[1, 289] = -3e38
    compare(backend, x, Scheme.parse("affine4_g32"))


def test_the_cpu_backend() -> None:
    backend = get_backend("cpu", 2)
    for case in sample(1500, seed=1):
        check(backend, case)
    check_counts(backend)


def test_overflows_are_counted() -> None:
    x = np.zeros((2, 64), np.float32)
    x[1, 3], x[1, 4] = 3e38, -3e38
    assert reference.quantize(x, Scheme.parse("affine4_g32"))[3] == Findings(n_overflow=1, first_overflow=2)


def test_only_the_groups_of_mlx_exist() -> None:
    for text in ("affine4_g16", "affine4_channel", "affine4_g64_asym", "affine7_g64"):
        with pytest.raises(SchemeError):
            Scheme.parse(text)


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("schedule", "max_blocks", "sanitize"),
    [(FORWARD, None, False), (REVERSE, 1, False), (Schedule(7, 0xFF), 2, True)],
)
def test_the_source_in_the_shim(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, schedule: Schedule, max_blocks: int | None, sanitize: bool
) -> None:
    loader = ShimLoader(schedule, sanitize=sanitize)
    backend, _ = backend_over(loader, monkeypatch, tmp_path, max_blocks=max_blocks)
    for case in sample(3 if sanitize else 12, seed=max_blocks or 5):
        check(backend, case)
    if not sanitize:
        check_counts(backend)


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", [75, 90, 120])
def test_the_emitted_ptx_in_the_simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int) -> None:
    backend, _ = backend_over(PtxLoader(), monkeypatch, tmp_path, arch=arch, max_blocks=1 if arch == 90 else None)
    for case in sample(4, seed=arch):
        check(backend, case)


@pytest.mark.nvrtc
def test_the_emitted_ptx_has_nothing_inexact() -> None:
    for variant in itertools.islice(launches.family("affine").every(), 0, None, 5):
        lint(ptx_of(variant.source, variant.defines, 90))


@pytest.mark.soak
@pytest.mark.compiler
@pytest.mark.parametrize("arch", [75, 90])
def test_every_variant_in_the_shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int) -> None:
    loader = ShimLoader(Schedule(arch, 0xFF))
    backend, _ = backend_over(loader, monkeypatch, tmp_path, arch=arch)
    for case in sample(2500, seed=arch):
        check(backend, case)
    assert len(loader.loaded) == len(list(launches.family("affine").every()))


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_words_scales_and_biases_are_those_of_mlx(dtype: str) -> None:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    shape = (256, 512)
    for bits, group, content in itertools.product(
        BITS, (32, 64, 128), ("normal", "ties", "zeros", "positive", "one_hot")
    ):
        x = make(content, shape, dtype)
        packed, scales, biases, _ = reference.quantize(x, Scheme(bits, "group", group, False, dtype, "affine"))
        weights = mx.array(x.astype(np.float32)).astype(getattr(mx, dtype))
        words, *rest = mx.quantize(weights, group_size=group, bits=bits)
        assert_bitwise_equal(packed, np.array(words).view(np.uint8), f"words {bits} {group} {content}")
        for ours, theirs in zip((scales, biases), rest, strict=True):
            assert_bitwise_equal(ours.astype(np.float32) + 0, np.array(theirs.astype(mx.float32)) + 0, content)
