"""The kernels and the CUDA backend without a GPU, bit for bit against the reference; see docs/kernel_gates.md.

The backend runs unchanged over the stand-in for CuPy, so that arguments, grids, memory and streams are its own. What
differs is the machine that runs a kernel: the shim in several thread orders, the shim under sanitizers, or the
simulator on the PTX of three architectures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.backends import Backend, variants
from arrowquant_gpu.dtypes import KERNEL_DTYPES
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .cases import cases, make
from .gpuless.device import Host
from .gpuless.lint import LISTED_FMA, lint
from .gpuless.loaders import PtxLoader, ShimLoader, ptx_of
from .gpuless.shim import FORWARD, REVERSE, Schedule
from .gpuless.stand_in import backend_over
from .test_backends import PATTERNS, check, quantize

Case = tuple[Scheme, str, tuple[int, int], str]

# Order of threads, and the most blocks of a grid: with few of them every thread has several units of work.
ORDERS = {"forward": (FORWARD, None), "reverse": (REVERSE, 1), "random": (Schedule(7, 0xFF), 2)}
ARCHS = {75: None, 90: 1, 120: 3}


def sample(n: int, seed: int) -> Iterator[Case]:
    """n cases of the table that have some weights, chosen by a fixed seed."""
    table = [case for case in cases(every=7) if case[2][0] * case[2][1]]
    for i in np.random.default_rng(seed).permutation(len(table))[:n]:
        yield table[i]


def check_cases(backend: Backend, table: Iterator[Case]) -> int:
    """Encode and decode every case; returns how many there were."""
    n = 0
    for scheme, dtype, shape, content in table:
        try:
            check(backend, make(content, shape, dtype), scheme, [dtype])
        except AssertionError as e:
            raise AssertionError(f"{scheme} of {dtype} {shape} {content}: {e}") from e
        n += 1
    return n


def compare(backend: Backend, x: np.ndarray, scheme: Scheme) -> None:
    """Quantize with one kernel, for granularity group and channel; raise unless all equals the reference."""
    want, got = reference.quantize(x, scheme), quantize(backend, x, scheme)
    if got[3] != want[3]:
        raise AssertionError(f"findings: got {got[3]}, want {want[3]}")
    if want[3] == Findings():
        assert_bitwise_equal(got[0], want[0], "packed")
        assert_bitwise_equal(got[1], want[1], "scales")
        if want[2] is not None:
            assert_bitwise_equal(got[2], want[2], "zeros")


def check_counts(backend: Backend) -> None:
    """What is not finite or overflows is counted, by kernels that hold groups and by those that stream them."""
    for dtype in KERNEL_DTYPES:
        x = make("normal", (5, 333), dtype)
        bits = x.view(f"u{x.itemsize}")
        for at, pattern in zip((3, 332, 400, 401, 1000, 1664), PATTERNS[dtype], strict=True):
            bits.reshape(-1)[at] = pattern
        for scheme in ("int4_g32", "int4_g5_asym", "int4_tensor"):
            check(backend, x, Scheme.parse(scheme))
    x = make("normal", (3, 300), "float32")
    x[1, 290] = 3e38
    for scheme in ("int8_g128_f16", "int8_channel_asym_f16"):
        check(backend, x, Scheme.parse(scheme))


@pytest.mark.compiler
@pytest.mark.parametrize("order", ORDERS)
def test_the_source_in_the_shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, order: str) -> None:
    schedule, max_blocks = ORDERS[order]
    loader = ShimLoader(schedule)
    backend, _ = backend_over(loader, monkeypatch, tmp_path, max_blocks=max_blocks)
    assert check_cases(backend, sample(20, seed=1)) == 20
    check_counts(backend)
    assert len(loader.loaded) > 40, "too few variants for a sample"


@pytest.mark.compiler
@pytest.mark.parametrize("arch", [75, 90])
def test_the_source_under_sanitizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int) -> None:
    loader = ShimLoader(Schedule(3, 0x7F), sanitize=True)
    backend, _ = backend_over(loader, monkeypatch, tmp_path, arch=arch, max_blocks=2)
    assert check_cases(backend, sample(4, seed=arch)) == 4
    if arch == 90:
        check_counts(backend)


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_the_emitted_ptx_in_the_simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int) -> None:
    backend, _ = backend_over(PtxLoader(), monkeypatch, tmp_path, arch=arch, max_blocks=ARCHS[arch])
    assert check_cases(backend, sample(6, seed=arch)) == 6


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", [75, 90])
def test_the_emitted_ptx_has_nothing_inexact(arch: int) -> None:
    every = list(variants.every())
    linted = [every[i] for i in np.random.default_rng(arch).permutation(len(every))[:12]]
    for variant in linted:
        check_ptx(variant, arch)


def check_ptx(variant: variants.Variant, arch: int) -> None:
    """Lint one variant; a kernel that is listed must have the multiply-adds it is listed for."""
    found = lint(ptx_of(variant.source, variant.defines, arch))
    assert (found[variant.source] > 0) == (variant.source in LISTED_FMA), variant


# ---------------------------------------------------------------------------------------------------------------------
# Where the weights lie.


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_rows_that_start_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str) -> None:
    """Aligned to their element and to nothing more: UBSan refuses a vector load there."""
    backend, _ = backend_over(ShimLoader(sanitize=True), monkeypatch, tmp_path)
    whole = make("normal", (1, 4 * 384 + 5), dtype)
    for offset in (1, 2, 5):
        x = whole[0, offset : offset + 4 * 384].reshape(4, 384)
        placed = _Placed(backend, backend.put(whole)[0, offset : offset + 4 * 384].reshape(4, 384))
        for scheme in ("int4_g128", "int5_g100_asym"):
            compare(placed, x, Scheme.parse(scheme))


class _Placed:
    """A backend that has the weights already, where a test has put them."""

    def __init__(self, backend: Backend, placed: object):
        self._backend, self._placed = backend, placed

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def put(self, x: np.ndarray) -> object:
        is_weights = x.shape == self._placed.shape and x.dtype == self._placed.dtype
        return self._placed if is_weights else self._backend.put(x)


def check_the_end(backend: Backend, host: Host, scheme: str, shape: tuple[int, int]) -> None:
    """Quantize, encode and decode a huge tensor of which only the end is looked at: its memory is mostly not there."""
    s = Scheme.parse(scheme)
    start = (shape[1] // s.group_size - 8) // 8 * 8 * s.group_size
    tail = make("normal", (1, shape[1] - start), "bfloat16")
    want = reference.quantize(tail, s)

    x, packed = backend.empty(shape, tail.dtype), backend.empty(s.packed_shape(shape), np.uint8)
    scales = backend.empty(s.scales_shape(shape), np.float32)
    zeros = None if s.symmetric else backend.empty(scales.shape, np.uint8)
    codes, groups = slice(start * s.bits // 8, None), slice(start // s.group_size, None)
    x.contents[-1, start:] = tail
    assert backend.quantize(x, s, packed, scales, zeros) == Findings()
    assert_bitwise_equal(packed.contents[-1:, codes], want[0], "packed")
    assert_bitwise_equal(scales.contents[-1:, groups], want[1], "scales")
    if zeros is not None:
        assert_bitwise_equal(zeros.contents[-1:, groups], want[2], "zeros")

    packed.contents[-1, codes] = 0
    backend.encode(x, s, scales, zeros, packed)
    backend.dequantize(packed, scales, zeros, s, x)
    host.gpu.synchronize()
    assert_bitwise_equal(packed.contents[-1:, codes], want[0], "encoded")
    decoded = reference.dequantize(*want[:3], s, tail.shape[1], "bfloat16")
    assert_bitwise_equal(x.contents[-1:, start:], decoded, "decoded")


@pytest.mark.nvrtc
@pytest.mark.parametrize(
    ("scheme", "shape"),
    [("int4_g128", (1, 2**31 + 2**14)), ("int3_g16_asym", (5, 2**29 + 77)), ("int5_g100_asym", (3, 2**30 + 33))],
)
def test_past_2_to_the_31_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scheme: str, shape: tuple[int, int]
) -> None:
    """The last two blocks of a grid that is large enough for no thread to loop."""
    loader = PtxLoader(only_blocks=(-2, -1))
    check_the_end(*backend_over(loader, monkeypatch, tmp_path, max_blocks=1 << 30), scheme, shape)


# ---------------------------------------------------------------------------------------------------------------------
# Full counts.


def variant_cases(arch_seed: int) -> Iterator[Case]:
    """Four cases of every scheme and kernel dtype with weights, shapes and contents mixed."""
    rng = np.random.default_rng(arch_seed)
    table: dict[tuple[str, str], list[Case]] = {}
    for case in cases():
        if case[2][0] * case[2][1]:
            table.setdefault((case[0].id, case[1]), []).append(case)
    for found in table.values():
        for i in rng.permutation(len(found))[:4]:
            yield found[i]


@pytest.mark.soak
@pytest.mark.compiler
@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize("arch", [75, 90])
def test_every_variant_in_the_shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int, sanitize: bool) -> None:
    loader = ShimLoader(Schedule(arch, 0xFF), sanitize=sanitize)
    backend, _ = backend_over(loader, monkeypatch, tmp_path, arch=arch)
    assert check_cases(backend, variant_cases(arch)) > 3000
    assert len(loader.loaded) == len(list(variants.every()))


@pytest.mark.soak
@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_every_variant_in_the_simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int) -> None:
    loader = PtxLoader()
    backend, _ = backend_over(loader, monkeypatch, tmp_path, arch=arch)
    assert check_cases(backend, variant_cases(arch)) > 3000
    assert len(loader.loaded) == len(list(variants.every()))


@pytest.mark.soak
@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_every_variant_has_nothing_inexact(arch: int) -> None:
    for variant in variants.every():
        check_ptx(variant, arch)
