"""The CUDA kernels of family float without a GPU, bit for bit against the reference; see docs/kernel_gates.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.backends import Backend, launch_floats
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .float_cases import CONTENTS, SCHEMES, Case, check, compare, make, sample
from .gpuless.lint import lint
from .gpuless.loaders import PtxLoader, ShimLoader, ptx_of
from .gpuless.shim import FORWARD, REVERSE, Schedule
from .gpuless.stand_in import backend_over, edit_kernels
from .test_backends import PATTERNS

# Order of threads, and the most blocks of a grid: with few of them every thread has several units of work.
ORDERS = {"forward": (FORWARD, None), "reverse": (REVERSE, 1), "random": (Schedule(7, 0xFF), 2)}


def small(n: int, seed: int) -> Iterator[Case]:
    """n cases of few weights, for the simulator."""
    return (case for case in sample(40 * n, seed) if case[2] in ((3, 31), (4, 64), (3, 129)))


def check_counts(backend: Backend, schemes: tuple[str, ...]) -> None:
    """What is not finite or overflows is counted, whatever the shape of a unit of work."""
    for dtype in KERNEL_DTYPES:
        x = make("normal", (5, 333), dtype)
        bits = x.view(f"u{x.itemsize}").reshape(-1)
        for at, pattern in zip((3, 332, 400, 401, 1000, 1664), PATTERNS[dtype], strict=True):
            bits[at] = pattern
        for text in schemes:
            compare(backend, x, Scheme.parse(text))
    x = make("normal", (3, 300), "float32")
    x[1, 290], x[2, 0] = 3e38, -3e38
    for text in ("e4m3_g32_f16", "e5m2_channel_f16", "e4m3_b128_f16"):
        compare(backend, x, Scheme.parse(text))


@pytest.mark.compiler
@pytest.mark.parametrize("order", ORDERS)
def test_the_source_in_the_shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, order: str) -> None:
    schedule, max_blocks = ORDERS[order]
    backend, _ = backend_over(ShimLoader(schedule), monkeypatch, tmp_path, max_blocks=max_blocks)
    assert check(backend, sample(12, seed=1)) == 12


@pytest.mark.compiler
def test_the_source_under_sanitizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend, _ = backend_over(ShimLoader(Schedule(3, 0x7F), sanitize=True), monkeypatch, tmp_path, max_blocks=2)
    assert check(backend, sample(4, seed=2)) == 4
    check_counts(backend, ("nf4_g64",))


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", [75, 90, 120])
def test_the_emitted_ptx_in_the_simulator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int) -> None:
    backend, _ = backend_over(PtxLoader(), monkeypatch, tmp_path, arch=arch, max_blocks=2)
    cases = [case for case, _ in zip(small(5, seed=arch), range(5), strict=False)]
    assert check(backend, iter(cases)) == 5


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", [75, 90])
def test_the_emitted_ptx_has_nothing_inexact(arch: int) -> None:
    every = list(launch_floats.every())
    for i in np.random.default_rng(arch).permutation(len(every))[:8]:
        check_ptx(every[i], arch)


def check_ptx(variant: launch_floats.Variant, arch: int) -> None:
    """Lint one variant: quotients by a reciprocal are corrected, and nothing else is fused."""
    n_fused = lint(ptx_of(variant.source, variant.defines, arch))[variant.source]
    divides = variant.defines.get("CODING") not in ("NF4", "FP4") and variant.defines.get("SCALE", "POWERS") != "POWERS"
    assert (n_fused > 0) == divides, variant


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_rows_that_start_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str) -> None:
    """Aligned to their element and to nothing more: UBSan refuses a vector load there."""
    backend, _ = backend_over(ShimLoader(sanitize=True), monkeypatch, tmp_path)
    whole = make("normal", (1, 4 * 128 + 5), dtype)
    for offset, text in ((1, "mxfp4"), (5, "e4m3_channel")):
        scheme, x = Scheme.parse(text), whole[0, offset : offset + 512].reshape(4, 128)
        want = reference.quantize(x, scheme)
        packed, scales = backend.put(np.zeros_like(want[0])), backend.put(np.zeros_like(want[1]))
        placed = backend.put(whole)[0, offset : offset + 512].reshape(4, 128)
        assert backend.quantize(placed, scheme, packed, scales, None) == Findings()
        got = np.empty_like(want[0])
        backend.get(packed, got)
        assert_bitwise_equal(got, want[0], text)


def test_every_variant_is_a_kernel_of_a_scheme() -> None:
    names = {str(variant) for variant in launch_floats.every()}
    assert len(names) == len(list(launch_floats.every())) == 3 * (9 + 4 + 2 + 2) + 3 * 5
    used = set()
    for scheme in SCHEMES:
        for dtype in KERNEL_DTYPES:
            x = np.empty((2, 5000), DTYPES[dtype].numpy)
            packed, scales = np.empty(scheme.packed_shape(x.shape)), np.empty(scheme.scales_shape(x.shape))
            if scheme.granularity == "tensor":
                launch = launch_floats.encode(x, scheme, scales, None, packed)
            else:
                launch = launch_floats.quantize(x, scheme, packed, scales, None, None)
            used |= {str(launch.variant), str(launch_floats.dequantize(packed, scales, None, scheme, x).variant)}
    assert used == names


# ---------------------------------------------------------------------------------------------------------------------
# The gates can fail.

# What is wrong -> the file, what is replaced by what, and the scheme that shows it.
FAULTS = {
    "a bin too wide": ("float_codes.cuh", "__fmul_rn(v, 15.0f)", "__fmul_rn(v, 8.0f)", "nf4_g64"),
    "a midpoint": ("float_codes.cuh", "v > __uint_as_float(entry.x)", "v >= __uint_as_float(entry.x)", "nf4_g17"),
    "the tie of a negative value": ("float_codes.cuh", "+ (__float_as_uint(v) >> 31)", "", "fp4_g17"),
    "the sign of what is nearest to zero": ("float_codes.cuh", "v > 0.0f : v", "v < 0.0f : v", "fp4_g64"),
    "the least exponent": ("floats.cuh", "Small<3, 121>", "Small<3, 120>", "mxfp8"),
    "ties to even where they go down": ("floats.cuh", "? code - 1 : code", "? code : code", "mxfp4_ceil"),
    "the sign of zero": ("float_codes.cuh", "__fadd_rn(v, 0.0f)", "v", "mxfp4"),
    "a quotient that is not corrected": ("quantize_floats.cu", ", reciprocal, q)", ", 0.0f, q)", "e4m3_channel"),
    "a tail that is multiplied": (
        "quantize_floats.cu",
        "plain &= !is_short",
        "plain &= is_short || !is_short",
        "nf4_g64",
    ),
    "the tail's least absmax": ("quantize_floats.cu", "is_short ? fmaxf", "false ? fmaxf", "nf4_g64"),
    "the rounding of an exponent": ("quantize_floats.cu", "static_cast<u32>(rounding)", "0u", "mxfp8_round"),
    "a scale of zero": ("quantize_floats.cu", "SCALE == GLOBAL && byte == 0", "false", "nvfp4"),
    "the scale of zeros": ("quantize_floats.cu", "top == 0 ? of_zeros", "false ? of_zeros", "mxfp4_ceil"),
    "a value": ("dequantize_floats.cu", "0.44070983f", "0.4407099f", "nf4_g64"),
    "rows of a square": ("dequantize_floats.cu", "at.row / band", "at.row", "e4m3_b128"),
}


@pytest.mark.soak
@pytest.mark.compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    name, old, new, scheme = FAULTS[fault]
    edit_kernels(monkeypatch, tmp_path, {name: (old, new)})
    backend, _ = backend_over(ShimLoader(), monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match="differ"):
        check(backend, ((Scheme.parse(scheme), "float32", (131, 300), content) for content in CONTENTS))


# ---------------------------------------------------------------------------------------------------------------------
# Full counts.


@pytest.mark.soak
@pytest.mark.compiler
@pytest.mark.parametrize("arch", [75, 90])
def test_every_variant_in_the_shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: int) -> None:
    loader = ShimLoader(Schedule(arch, 0xFF))
    backend, _ = backend_over(loader, monkeypatch, tmp_path, arch=arch)
    assert check(backend, sample(900, seed=arch)) == 900
    check_counts(backend, tuple(scheme.id for scheme in SCHEMES))
    assert len(loader.loaded) == len(list(launch_floats.every()))


@pytest.mark.soak
@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", [75, 90, 120])
def test_every_variant_has_nothing_inexact(arch: int) -> None:
    for variant in launch_floats.every():
        check_ptx(variant, arch)
