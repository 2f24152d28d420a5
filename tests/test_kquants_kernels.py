"""The CUDA kernels of K-quants without a GPU, bit for bit against the reference; see docs/kernel_gates.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.backends import Backend, launch_kquants
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.schemes import Scheme

from .gpuless.lint import lint
from .gpuless.loaders import PtxLoader, ShimLoader, ptx_of
from .gpuless.shim import FORWARD, REVERSE, Schedule
from .gpuless.stand_in import backend_over, edit_kernels
from .test_kquants import CONTENTS, IDS, SCHEMES, Case, check, check_counts, check_decode, make

# Order of threads, and the most blocks of a grid: with few of them every thread has several units of work.
ORDERS = {"forward": (FORWARD, None), "reverse": (REVERSE, 1), "random": (Schedule(7, 0xFF), 2)}
SHAPES = ((1, 256), (3, 768), (17, 512), (2, 8704))


def table(n: int, seed: int) -> Iterator[Case]:
    """n cases, of the schemes in turn."""
    rng = np.random.default_rng(seed)
    rest = list(itertools.product(KERNEL_DTYPES, SHAPES, CONTENTS))
    for i in range(n):
        yield (SCHEMES[(seed + i) % len(SCHEMES)], *rest[rng.integers(len(rest))])


def check_cases(backend: Backend, cases: Iterable[Case]) -> int:
    """Encode and decode every case; returns how many there were."""
    n = 0
    for scheme, dtype, shape, content in cases:
        try:
            check(backend, make(content, shape, dtype), scheme, [KERNEL_DTYPES[n % 3]])
        except AssertionError as e:
            raise AssertionError(f"{scheme} of {dtype} {shape} {content}: {e}") from e
        n += 1
    return n


@pytest.mark.compiler
@pytest.mark.parametrize("order", ORDERS)
def test_the_source_in_the_shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, order: str) -> None:
    schedule, max_blocks = ORDERS[order]
    backend, _ = backend_over(ShimLoader(schedule), monkeypatch, tmp_path, max_blocks=max_blocks)
    assert check_cases(backend, table(5, seed=1)) == 5


@pytest.mark.compiler
def test_the_source_under_sanitizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend, _ = backend_over(ShimLoader(Schedule(3, 0x7F), sanitize=True), monkeypatch, tmp_path, max_blocks=2)
    assert check_cases(backend, table(3, seed=2)) == 3
    check_counts(backend, ["q3_k"])


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", [75, 90, 120])
def test_the_emitted_ptx_in_the_simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int) -> None:
    backend, _ = backend_over(PtxLoader(), monkeypatch, tmp_path, arch=arch, max_blocks=2)
    cases = [(scheme, dtype, (3, 256), content) for scheme, dtype, _, content in table(3, arch // 15)]
    assert check_cases(backend, cases) == 3


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", [75, 90])
def test_the_emitted_ptx_has_nothing_inexact(arch: int) -> None:
    every = list(launch_kquants.every())
    for i in np.random.default_rng(arch).permutation(len(every))[:5]:
        compiled = ptx_of(every[i].source, every[i].defines, arch)
        assert not lint(compiled)[every[i].source], "no multiply-add is fused here"


@pytest.mark.compiler
def test_rows_and_bytes_that_start_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights aligned to their element, bytes to 2, and to nothing more: UBSan refuses a wider access there."""
    backend, _ = backend_over(ShimLoader(sanitize=True), monkeypatch, tmp_path)
    for name, dtype, before in (("q4_k", "float16", 2), ("q6_k", "float32", 1)):
        scheme = Scheme.parse(name)
        whole = make("laplace", (1, 3 * 256 + 256), dtype)[:, : 3 * 256 + 1]
        x = whole[:, 1:].reshape(3, 256)
        want = reference.quantize(x, scheme)[0]
        packed = backend.put(np.full(want.size + before, 0xA5, np.uint8))
        placed = packed[before:].reshape(want.shape)
        weights = backend.put(whole)[0, 1:].reshape(3, 256)
        assert backend.quantize(weights, scheme, placed, backend.empty((3, 0), "f2"), None) == reference.Findings()
        got = np.empty(packed.shape, np.uint8)
        backend.get(packed, got)
        assert set(got[:before].tolist()) == {0xA5}
        assert np.array_equal(got[before:], want.reshape(-1))


def test_every_variant_is_a_kernel_of_a_scheme() -> None:
    names = {str(variant) for variant in launch_kquants.every()}
    assert len(names) == len(list(launch_kquants.every())) == 2 * 5 * 3
    for scheme, dtype in itertools.product(SCHEMES, KERNEL_DTYPES):
        x, packed = np.empty((2, 512), DTYPES[dtype].numpy), np.empty(scheme.packed_shape((2, 512)), np.uint8)
        assert str(launch_kquants.quantize(x, scheme, packed, None, None, None).variant) in names
        assert str(launch_kquants.dequantize(packed, None, None, scheme, x).variant) in names


# ---------------------------------------------------------------------------------------------------------------------
# The gates can fail.

# What is wrong -> the file, what is replaced by what, and the scheme that shows it.
FAULTS = {
    "a try left out": ("kquants_search.cuh", "k <= TRIES", "k < TRIES", "q4_k"),
    "the clamp of a code": ("kquants_search.cuh", "(v, low), high)", "(v, low), high + 1.0f)", "q5_k"),
    "a minimum above 0": ("kquants_search.cuh", "new_minimum > 0.0f", "new_minimum > 1e30f", "q2_k"),
    "the order of the tries": ("kquants_search.cuh", "t - 10 : t - 9", "10 - t : t - 9", "q6_k"),
    "a round of descent": ("kquants_search.cuh", "round < 5", "round < 1", "q3_k"),
    "the tie of the largest scale": ("quantize_kquants.cu", "is_before && a == b", "!is_before && a == b", "q6_k"),
    "codes where the scale is 0": ("quantize_kquants.cu", "step == 0.0f ? 0u", "false ? 0u", "q4_k"),
    "the scale bytes of zeros": ("quantize_kquants.cu", "BITS == 3 && is_scaled", "BITS == 3", "q3_k"),
    "high bits of a code": ("quantize_kquants.cu", "plane<32, 1, BITS == 3 ? 2 : 4>", "plane<32, 1, 3>", "q5_k"),
    "high bits of a scale": ("quantize_kquants.cu", "0x03030303u) << 6", "0x03030303u) << 5", "q4_k"),
    "the sign of a scale": ("dequantize_kquants.cu", "static_cast<signed char>", "static_cast<u8>", "q6_k"),
    "the offset of a scale": ("dequantize_kquants.cu", "* 16 - 32", "* 16 - 31", "q3_k"),
}


@pytest.mark.soak
@pytest.mark.compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    name, old, new, scheme = FAULTS[fault]
    edit_kernels(monkeypatch, tmp_path, {name: (old, new)})
    backend, _ = backend_over(ShimLoader(), monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match="differ"):
        check_cases(backend, [(Scheme.parse(scheme), "float32", (17, 512), content) for content in CONTENTS])


# ---------------------------------------------------------------------------------------------------------------------
# Full counts.


@pytest.mark.soak
@pytest.mark.compiler
@pytest.mark.parametrize("sanitize", [False, True])
def test_every_variant_in_the_shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sanitize: bool) -> None:
    loader = ShimLoader(Schedule(5, 0xFF), sanitize=sanitize)
    backend, _ = backend_over(loader, monkeypatch, tmp_path, max_blocks=2)
    cases = list(itertools.product(SCHEMES, KERNEL_DTYPES, SHAPES, CONTENTS))
    assert check_cases(backend, cases) == len(cases)
    check_counts(backend, IDS)
    for scheme in SCHEMES:
        check_decode(backend, scheme)
    assert len(loader.loaded) == len(list(launch_kquants.every()))


@pytest.mark.soak
@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", [75, 90, 120])
def test_every_variant_in_the_simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int) -> None:
    loader = PtxLoader()
    backend, _ = backend_over(loader, monkeypatch, tmp_path, arch=arch, max_blocks=2)
    cases = [
        (scheme, dtype, (3, 256), content)
        for scheme, dtype, content in itertools.product(SCHEMES, KERNEL_DTYPES, CONTENTS)
    ]
    assert check_cases(backend, cases[::3]) == 100
    for scheme in SCHEMES:
        check_decode(backend, scheme)
    assert len(loader.loaded) == len(list(launch_kquants.every()))
