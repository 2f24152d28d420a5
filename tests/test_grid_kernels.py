"""The CUDA kernels of all families of grids but int without a GPU, bit for bit against the reference; see
docs/kernel_gates.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.backends import Backend, launches
from arrowquant_gpu.backends.variants import Variant
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.schemes import Scheme

from . import affine_cases, cases, float_cases, ggml_cases, grid_cases, kquants_cases
from .bitwise import assert_bitwise_equal
from .gpuless.lint import lint
from .gpuless.loaders import PtxLoader, ShimLoader, ptx_of
from .gpuless.shim import Schedule
from .gpuless.stand_in import backend_over, edit_kernels
from .grid_cases import Case, Check, Shape
from .test_backends import Outputs
from .test_kernel_gates import ARCHS, ORDERS, check_ptx


def check_ptx_of_floats(variant: Variant, arch: int) -> None:
    """Lint one variant: quotients by a reciprocal are corrected, and nothing else is fused."""
    n_fused = lint(ptx_of(variant.source, variant.defines, arch))[variant.source]
    divides = variant.defines.get("CODING") not in ("NF4", "FP4") and variant.defines.get("SCALE", "POWERS") != "POWERS"
    assert (n_fused > 0) == divides, variant


class Sizes(NamedTuple):
    """Cases of a sample for each machine, and variants for the lint."""

    shim: int
    sanitized: int
    simulated: int
    linted: int


class Family(NamedTuple):
    """What the gates ask of a family."""

    name: str  # as in `launches.MODULES`
    cases: ModuleType  # SCHEMES, CONTENTS, FAULTS, make and check_counts
    shapes: Sequence[Shape]
    few_weights: Sequence[Shape]  # for the simulator
    shape_of_faults: Shape
    counted: str  # the scheme for `check_counts` in a sample
    n_variants: int
    n: Sizes
    n_full: int | None = None  # None: every case there is
    check: Check = grid_cases.check
    check_ptx: Callable[[Variant, int], None] = check_ptx
    check_any_bytes: Callable[[Backend, Scheme], None] | None = None  # where there is more to decode than is encoded

    def every(self) -> list[Variant]:
        return list(launches.family(self.name).every())

    def sample(self, n: int, seed: int, shapes: Sequence[Shape]) -> Iterable[Case]:
        return grid_cases.sample(self.cases.SCHEMES, shapes, self.cases.CONTENTS, n, seed)

    def every_case(self, shapes: Sequence[Shape]) -> list[Case]:
        return list(itertools.product(self.cases.SCHEMES, KERNEL_DTYPES, shapes, self.cases.CONTENTS))

    def check_cases(self, backend: Backend, table: Iterable[Case]) -> int:
        return grid_cases.check_cases(backend, table, self.cases.make, self.check)

    def check_full(self, backend: Backend, table: Sequence[Case]) -> None:
        """All of `table`, and bytes that no encoder wrote."""
        assert self.check_cases(backend, table) == len(table)
        if self.check_any_bytes is not None:
            for scheme in self.cases.SCHEMES:
                self.check_any_bytes(backend, scheme)


FAMILIES = [
    Family(
        "affine",
        affine_cases,
        shapes=affine_cases.SHAPES,
        few_weights=affine_cases.SHAPES,
        shape_of_faults=(9, 1000),
        counted="affine4_g32",
        n_variants=6 * 3 * 2,
        n=Sizes(shim=40, sanitized=4, simulated=5, linted=8),
        n_full=2500,
    ),
    Family(
        "float",
        float_cases,
        shapes=float_cases.SHAPES,
        few_weights=((3, 31), (4, 64), (3, 129)),
        shape_of_faults=(131, 300),
        counted="nf4_g64",
        n_variants=3 * (9 + 4 + 2 + 2) + 3 * 5,
        n=Sizes(shim=15, sanitized=5, simulated=5, linted=8),
        n_full=900,
        check=float_cases.check,
        check_ptx=check_ptx_of_floats,
    ),
    Family(
        "ggml",
        ggml_cases,
        shapes=((1, 64), (3, 64), (5, 320), (9, 1024), (67, 128)),
        few_weights=((3, 64), (5, 128), (5, 320)),
        shape_of_faults=(9, 1024),
        counted="q4_0",
        n_variants=2 * 3 * 8 + 8,
        n=Sizes(shim=10, sanitized=4, simulated=5, linted=6),
        check_any_bytes=ggml_cases.check_any_bytes,
    ),
    Family(
        "kquant",
        kquants_cases,
        shapes=((1, 256), (3, 768), (17, 512), (2, 8704)),
        few_weights=((3, 256),),
        shape_of_faults=(17, 512),
        counted="q3_k",
        n_variants=2 * 5 * 3,
        n=Sizes(shim=5, sanitized=3, simulated=3, linted=5),
        check_any_bytes=kquants_cases.check_any_bytes,
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(params=BY_NAME)
def family(request: pytest.FixtureRequest) -> Family:
    return BY_NAME[request.param]


def test_no_family_is_left_out() -> None:
    assert set(BY_NAME) == set(launches.MODULES)


@pytest.mark.compiler
@pytest.mark.parametrize("order", ORDERS)
def test_the_source_in_the_shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: Family, order: str) -> None:
    schedule, max_blocks = ORDERS[order]
    backend, _ = backend_over(ShimLoader(schedule), monkeypatch, tmp_path, max_blocks=max_blocks)
    n = family.n.shim
    assert family.check_cases(backend, family.sample(n, 1, family.shapes)) == n
    family.cases.check_counts(backend, [family.counted])


@pytest.mark.compiler
def test_the_source_under_sanitizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: Family) -> None:
    backend, _ = backend_over(ShimLoader(Schedule(3, 0x7F), sanitize=True), monkeypatch, tmp_path, max_blocks=2)
    n = family.n.sanitized
    assert family.check_cases(backend, family.sample(n, 2, family.shapes)) == n
    family.cases.check_counts(backend, [family.counted])


@pytest.mark.nvrtc
@pytest.mark.parametrize(("arch", "seed"), [(75, 0), (90, 1), (120, 2)])
def test_the_emitted_ptx_in_the_simulator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: Family, arch: int, seed: int
) -> None:
    backend, _ = backend_over(PtxLoader(), monkeypatch, tmp_path, arch=arch, max_blocks=ARCHS[arch])
    n = family.n.simulated
    assert family.check_cases(backend, family.sample(n, seed, family.few_weights)) == n


@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", [75, 90])
def test_the_emitted_ptx_has_nothing_inexact(family: Family, arch: int) -> None:
    every = family.every()
    for i in np.random.default_rng(arch).permutation(len(every))[: family.n.linted]:
        family.check_ptx(every[i], arch)


def test_every_variant_is_a_kernel_of_a_scheme(family: Family) -> None:
    names = {str(variant) for variant in family.every()}
    assert len(names) == len(family.every()) == family.n_variants
    module, shape, used = launches.family(family.name), (2, 5120), set()
    for scheme, dtype in itertools.product(family.cases.SCHEMES, KERNEL_DTYPES):
        x = np.empty(shape, DTYPES[dtype].numpy)
        packed, scales = np.empty(scheme.packed_shape(shape), np.uint8), np.empty(scheme.scales_shape(shape))
        if scheme.granularity == "tensor":
            launch = module.encode(x, scheme, scales, None, packed)
        else:
            launch = module.quantize(x, scheme, packed, scales, None, None)
        used |= {str(launch.variant), str(module.dequantize(packed, scales, None, scheme, x).variant)}
    assert used == names


# ---------------------------------------------------------------------------------------------------------------------
# Where weights and bytes lie.

# Scheme, dtypes, length of the 4 rows, weights and bytes before them.
PLACES = [
    *((name, dtype, 128, offset, 0) for name, offset in (("mxfp4", 1), ("e4m3_channel", 5)) for dtype in KERNEL_DTYPES),
    *(("affine4_g64", dtype, 128, 1, 0) for dtype in KERNEL_DTYPES),
    *(("q4_1", "float16", 64, 1, 2), ("f16", "float32", 64, 1, 2)),
    *(("q4_k", "float16", 256, 1, 2), ("q6_k", "float32", 256, 1, 1)),
]


@pytest.mark.compiler
@pytest.mark.parametrize(("name", "dtype", "length", "n_weights", "n_bytes"), PLACES)
def test_rows_and_bytes_that_start_anywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, dtype: str, length: int, n_weights: int, n_bytes: int
) -> None:
    """Weights aligned to their element, bytes of blocks to 2 or to 1, and to nothing more: UBSan refuses a wider access
    there."""
    backend, _ = backend_over(ShimLoader(sanitize=True), monkeypatch, tmp_path)
    scheme, shape = Scheme.parse(name), (4, length)
    whole = cases.make("normal", (1, n_weights + 4 * length), dtype)
    want = reference.quantize(whole[:, n_weights:].reshape(shape), scheme)
    outputs = Outputs(backend, scheme, shape)
    bytes_ = backend.put(np.full(n_bytes + want[0].size, 0xA5, np.uint8))
    placed, packed = backend.put(whole)[0, n_weights:].reshape(shape), bytes_[n_bytes:].reshape(want[0].shape)
    assert backend.quantize(placed, scheme, packed, outputs.scales, outputs.zeros) == Findings()
    got = outputs.host(bytes_)
    assert set(got[:n_bytes].tolist()) <= {0xA5}
    assert_bitwise_equal(got[n_bytes:].reshape(want[0].shape), want[0], "packed")
    assert_bitwise_equal(outputs.host(outputs.scales), want[1], "scales")
    if want[2] is not None:
        assert_bitwise_equal(outputs.host(outputs.zeros), want[2], "zeros")


# ---------------------------------------------------------------------------------------------------------------------
# The gates can fail.


@pytest.mark.soak
@pytest.mark.compiler
@pytest.mark.parametrize(
    ("name", "fault"), [(family.name, fault) for family in FAMILIES for fault in family.cases.FAULTS]
)
def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, fault: str) -> None:
    family = BY_NAME[name]
    file, old, new, scheme = family.cases.FAULTS[fault]
    edit_kernels(monkeypatch, tmp_path, {file: (old, new)})
    backend, _ = backend_over(ShimLoader(), monkeypatch, tmp_path)
    table = [(Scheme.parse(scheme), "float32", family.shape_of_faults, content) for content in family.cases.CONTENTS]
    with pytest.raises(AssertionError, match="differ"):
        family.check_cases(backend, table)


# ---------------------------------------------------------------------------------------------------------------------
# Full counts.


@pytest.mark.soak
@pytest.mark.compiler
@pytest.mark.parametrize(
    ("name", "arch", "sanitize", "max_blocks"),
    [
        *((name, arch, False, None) for name in ("affine", "float") for arch in (75, 90)),
        *((name, 90, sanitize, 2) for name in ("ggml", "kquant") for sanitize in (False, True)),
    ],
)
def test_every_variant_in_the_shim(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, arch: int, sanitize: bool, max_blocks: int | None
) -> None:
    family, loader = BY_NAME[name], ShimLoader(Schedule(arch, 0xFF), sanitize=sanitize)
    backend, _ = backend_over(loader, monkeypatch, tmp_path, arch=arch, max_blocks=max_blocks)
    if family.n_full is None:
        table = family.every_case(family.shapes)
    else:
        table = list(family.sample(family.n_full, arch, family.shapes))
    family.check_full(backend, table)
    family.cases.check_counts(backend, [scheme.id for scheme in family.cases.SCHEMES])
    assert len(loader.loaded) == family.n_variants


@pytest.mark.soak
@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("name", "every_nth"), [("ggml", 5), ("kquant", 3)])
def test_every_variant_in_the_simulator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, every_nth: int, arch: int
) -> None:
    family, loader = BY_NAME[name], PtxLoader()
    backend, _ = backend_over(loader, monkeypatch, tmp_path, arch=arch, max_blocks=2)
    family.check_full(backend, family.every_case(family.few_weights)[::every_nth])
    assert len(loader.loaded) == family.n_variants


@pytest.mark.soak
@pytest.mark.nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_every_variant_has_nothing_inexact(family: Family, arch: int) -> None:
    for variant in family.every():
        family.check_ptx(variant, arch)
