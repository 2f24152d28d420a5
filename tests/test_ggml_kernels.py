"""The CUDA kernels of ggml's blocks without a GPU, bit for bit against the reference; see docs/kernel_gates.md."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.backends import Backend, launch_ggml
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.grids import GRIDS
from arrowquant_gpu.schemes import Scheme

from .gpuless.lint import lint
from .gpuless.loaders import PtxLoader, ShimLoader, ptx_of
from .gpuless.shim import FORWARD, REVERSE, Schedule
from .gpuless.stand_in import backend_over, edit_kernels
from .test_ggml import CONTENTS, SCHEMES, Case, check, check_counts, check_decode, make

# Order of threads, and the most blocks of a grid: with few of them every thread has several units of work.
ORDERS = {"forward": (FORWARD, None), "reverse": (REVERSE, 1), "random": (Schedule(7, 0xFF), 2)}
SHAPES = ((1, 64), (3, 64), (5, 320), (9, 1024), (67, 128))


def table(n: int, seed: int, first: int = 0) -> Iterator[Case]:
    """n cases, of the schemes in turn from number `first` on."""
    rng = np.random.default_rng(seed)
    rest = list(itertools.product(KERNEL_DTYPES, SHAPES, CONTENTS))
    for i in range(first, first + n):
        yield (SCHEMES[i % len(SCHEMES)], *rest[rng.integers(len(rest))])


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
    assert check_cases(backend, table(10, seed=1)) == 10


@pytest.mark.compiler
def test_the_source_under_sanitizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend, _ = backend_over(ShimLoader(Schedule(3, 0x7F), sanitize=True), monkeypatch, tmp_path, max_blocks=2)
    assert check_cases(backend, table(4, seed=2)) == 4
    check_counts(backend, ["q4_0"])


@pytest.mark.nvrtc
@pytest.mark.parametrize(("arch", "first"), [(75, 0), (90, 4), (120, 7)])
def test_the_emitted_ptx_in_the_simulator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int, first: int
) -> None:
    backend, _ = backend_over(PtxLoader(), monkeypatch, tmp_path, arch=arch, max_blocks=2)
    cases = [(scheme, dtype, (5, 128), content) for scheme, dtype, _, content in table(4, arch, first)]
    assert check_cases(backend, cases) == 4


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", [75, 90])
def test_the_emitted_ptx_has_nothing_inexact(arch: int) -> None:
    every = list(launch_ggml.every())
    for i in np.random.default_rng(arch).permutation(len(every))[:6]:
        assert not lint(ptx_of(every[i].source, every[i].defines, arch))[every[i].source], (
            "no multiply-add is fused here"
        )


@pytest.mark.compiler
def test_rows_and_bytes_that_start_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights aligned to their element, bytes to 2, and to nothing more: UBSan refuses a wider access there."""
    backend, _ = backend_over(ShimLoader(sanitize=True), monkeypatch, tmp_path)
    for name, dtype in (("q4_1", "float16"), ("f16", "float32")):
        scheme = Scheme.parse(name)
        whole = make("normal", (1, 3 * 64 + 1), dtype)
        x = whole[:, 1:].reshape(3, 64)
        want = reference.quantize(x, scheme)[0]
        packed = backend.put(np.full(want.size + 2, 0xA5, np.uint8))
        placed = packed[2:].reshape(want.shape)
        found = backend.quantize(
            backend.put(whole)[0, 1:].reshape(3, 64), scheme, placed, backend.empty((3, 0), "f2"), None
        )
        assert found == reference.Findings()
        got = np.empty(packed.shape, np.uint8)
        backend.get(packed, got)
        assert got[:2].tolist() == [0xA5, 0xA5]
        assert np.array_equal(got[2:], want.reshape(-1))


def test_every_variant_is_a_kernel_of_a_scheme() -> None:
    names = {str(variant) for variant in launch_ggml.every()}
    assert len(names) == len(list(launch_ggml.every())) == 2 * 3 * 8 + 8
    for scheme, dtype in itertools.product(SCHEMES, KERNEL_DTYPES):
        x, packed = np.empty((2, 64), DTYPES[dtype].numpy), np.empty(scheme.packed_shape((2, 64)), np.uint8)
        launch = launch_ggml.quantize(x, scheme, packed, None, None, None)
        assert str(launch.variant) in names
        if GRIDS[scheme.grid].block == 1 and dtype == "float32":
            continue
        assert str(launch_ggml.dequantize(packed, None, None, scheme, x).variant) in names


# ---------------------------------------------------------------------------------------------------------------------
# The gates can fail.

# What is wrong -> the file, what is replaced by what, and the scheme that shows it.
FAULTS = {
    "the tie of the largest magnitude": ("quantize_ggml.cu", "HELD - 1; j >= 0; --j", "0; j < HELD; ++j", "q4_0"),
    "half away from zero": ("quantize_ggml.cu", "0.49999997f", "0.5f", "q8_0"),
    "what is too small": ("quantize_ggml.cu", "inverse == 0.0f && scale != 0.0f ? 0.0f", "false ? 0.0f", "q5_0"),
    "the zero that is first": ("quantize_ggml.cu", "if (low == 0.0f)", "if (false)", "q4_1"),
    "log2 that is rounded": ("quantize_ggml.cu", "missing <= 64", "missing <= 0", "ggml_mxfp4"),
    "halfway to e2m1": ("quantize_ggml.cu", "m > border[3]", "m >= border[3]", "ggml_mxfp4"),
    "the largest ue4m3": ("quantize_ggml.cu", "normal < 0x78 ?", "normal < 0x7e ?", "ggml_nvfp4"),
    "a try left out": ("quantize_ggml.cu", "TRIES = 16", "TRIES = 15", "iq4_nl"),
    "products in another order": ("quantize_ggml.cu", "x, x), value)", "x, value), x)", "iq4_nl"),
    "a value of iq4_nl": ("ggml.cuh", "0x71594535u", "0x71594534u", "iq4_nl"),
    "the fifth bits": ("dequantize_ggml.cu", "fifth >> GAP", "fifth", "q5_1"),
}


@pytest.mark.soak
@pytest.mark.compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    name, old, new, scheme = FAULTS[fault]
    edit_kernels(monkeypatch, tmp_path, {name: (old, new)})
    backend, _ = backend_over(ShimLoader(), monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match="differ"):
        check_cases(backend, [(Scheme.parse(scheme), "float32", (9, 1024), content) for content in CONTENTS])


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
    check_counts(backend, [scheme.id for scheme in SCHEMES])
    for scheme in SCHEMES:
        check_decode(backend, scheme)
    assert len(loader.loaded) == len(list(launch_ggml.every()))


@pytest.mark.soak
@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", [75, 90, 120])
def test_every_variant_in_the_simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int) -> None:
    backend, _ = backend_over(PtxLoader(), monkeypatch, tmp_path, arch=arch, max_blocks=2)
    cases = list(itertools.product(SCHEMES, KERNEL_DTYPES, SHAPES[:3], CONTENTS))
    assert check_cases(backend, cases[::5]) > 200
