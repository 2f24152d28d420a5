"""Faults planted in copies of the kernels and in the flags: each must be found by the gates that are there for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu.backends import Backend, launches, nvrtc, variants
from arrowquant_gpu.schemes import Scheme

from .cases import make
from .gpuless.errors import KernelFault
from .gpuless.fake_cupy import Loader
from .gpuless.lint import lint
from .gpuless.loaders import PtxLoader, ShimLoader
from .gpuless.shim import Schedule
from .gpuless.stand_in import Edit, backend_over, edit_kernels
from .test_kernel_gates import check_the_end, compare

HELD = variants.quantize(4, False, "float32", 32)


def check_scheme(scheme: str, shape: tuple[int, int]) -> Callable[[Backend], None]:
    """A check of one kernel: quantize normally distributed float32 weights."""

    def meet(backend: Backend) -> None:
        compare(backend, make("normal", shape, "float32"), Scheme.parse(scheme))

    return meet


def check_not_finite(backend: Backend) -> None:
    """Infinities in two groups, found by different threads."""
    x = make("normal", (1, 256), "float32")
    x[0, [3, 250]] = np.inf
    compare(backend, x, Scheme.parse("int4_g32"))


def check_unaligned(backend: Backend) -> None:
    """Rows of whole groups that start on an odd element."""
    scheme, x = Scheme.parse("int4_g32"), make("normal", (1, 97), "float32")
    packed, scales = backend.empty((1, 48), np.uint8), backend.empty((1, 3), np.float32)
    backend.quantize(backend.put(x)[:, 1:], scheme, packed, scales, None)
    backend.get(packed, np.empty((1, 48), np.uint8))


check_held = check_scheme("int4_g128", (3, 3 * 128))
check_tails = check_scheme("int4_g32_asym", (3, 72))
check_runs = check_scheme("int4_g20_asym", (3, 130))
check_blocks = check_scheme("int4_channel_asym", (2, 9000))
SOUND_CHECKS = (check_held, check_tails, check_runs, check_blocks, check_not_finite, check_unaligned)

# What is planted -> file, edit, the check that meets it, and what each gate says of it. None: this gate cannot see it.
BARRIER = "    __syncthreads();\n#pragma unroll\n    for (int w"
KERNEL_FAULTS: dict[str, tuple[str, Edit, Callable[[Backend], None], tuple[str | None, str | None, str | None]]] = {
    "swapped nibbles": ("quantize.cu", ("t[j] = ", "t[j ^ 1] = "), check_held, ("packed: ",) * 3),
    "a wrong rounding constant": ("codes.cuh", ("12582912.0f", "8388608.0f"), check_held, ("packed: ",) * 3),
    "a missing barrier": (
        *("common.cuh", (BARRIER, BARRIER.partition("\n")[2]), check_blocks),
        ("differ", "differ", "race in shared memory"),
    ),
    "a missing sync": ("quantize.cu", ("team.sync();", ";"), check_runs, ("differ", "differ", "race in global memory")),
    "a warp that parts": (
        *("quantize.cu", ("unit - ahead < n_units", "unit < n_units"), check_held),
        ("has returned|deadlock|takes no part", "has returned|deadlock|takes no part", "has returned|deadlock"),
    ),
    "an index beyond shared memory": (
        *("common.cuh", ("hi[threadIdx.x / WARP] =", "hi[threadIdx.x / WARP + 1] ="), check_blocks),
        ("differ", "index 8 out of bounds", "race in shared memory|nobody wrote"),
    ),
    "shared memory that is not written": (
        *("common.cuh", ("hi[threadIdx.x / WARP] =", "if (threadIdx.x) hi[threadIdx.x / WARP] ="), check_blocks),
        ("differ", "differ", "reads shared memory that nobody wrote"),
    ),
    "a short group read as a whole one": (
        *("quantize.cu", ("n == GROUP && ", ""), check_tails),
        ("differ|out of bounds", "heap-buffer-overflow", "out of bounds"),
    ),
    "an alignment taken for granted": (
        *("common.cuh", ("return (reinterpret_cast<u64>(p) & (n_bytes - 1)) == 0;", "return p && n_bytes;")),
        *(check_unaligned, (None, "requires 16 byte alignment", "misaligned access of 16 bytes")),
    ),
    "a counter without an atomic": (
        *("weights.cuh", ("atomicAdd(counters + N_INF, n_inf)", "counters[N_INF] += n_inf"), check_not_finite),
        (None, None, "two threads write one address|reads what another thread wrote"),
    ),
}
GATES = {
    "reverse": ShimLoader(Schedule(1, 0x7F)),
    "sanitized": ShimLoader(Schedule(0, 0x7F), sanitize=True),
    "ptx": PtxLoader(),
}
MARKS = {"reverse": pytest.mark.compiler, "sanitized": pytest.mark.compiler, "ptx": pytest.mark.nvrtc}


@pytest.mark.parametrize("gate", [pytest.param(g, marks=MARKS[g]) for g in GATES])
@pytest.mark.parametrize("name", KERNEL_FAULTS)
def test_a_fault_in_a_kernel_is_found(name: str, gate: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, edit, meet, words = KERNEL_FAULTS[name]
    said = words[list(GATES).index(gate)]
    edit_kernels(monkeypatch, tmp_path, {file: edit})
    backend, _ = backend_over(GATES[gate], monkeypatch, tmp_path)
    if said is None:
        meet(backend)  # not seen here, which is why there are other gates
    else:
        with pytest.raises(AssertionError, match=said):
            meet(backend)


@pytest.mark.parametrize("gate", [pytest.param(g, marks=MARKS[g]) for g in GATES])
def test_the_kernels_as_they_are_pass(gate: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend, _ = backend_over(GATES[gate], monkeypatch, tmp_path)
    for meet in SOUND_CHECKS:
        meet(backend)


# ---------------------------------------------------------------------------------------------------------------------
# Flags, and arithmetic that flags would change.

HALVES = "__fsub_rn(__fmul_rn(hi, 0.5f), __fmul_rn(lo, 0.5f))"
FLAG_FAULTS: dict[str, tuple[tuple[str, str], Mapping[str, Edit], str]] = {
    "flushing": (("-ftz=false", "-ftz=true"), {}, r".ftz is not exact"),
    "contraction": (
        ("-fmad=false", "-fmad=true"),
        {"solver.cuh": (HALVES, "hi * 0.5f - lo * 0.5f")},
        r"mul without .rn may be contracted",
    ),
    "an approximate division": (
        ("-prec-div=true", "-prec-div=false"),
        {"solver.cuh": ("__fdiv_rn(span, LEVELS)", "span / hi")},
        r".full is not exact|.approx is not exact",
    ),
    "an unlisted multiply-add": (
        ("-fmad=false", "-fmad=false"),
        {"solver.cuh": (HALVES, "__fmaf_rn(hi, 0.5f, -__fmul_rn(lo, 0.5f))")},
        "a fused multiply-add that is not listed",
    ),
}


@pytest.mark.nvrtc
@pytest.mark.parametrize("name", FLAG_FAULTS)
def test_inexact_arithmetic_is_found_by_the_lint(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (old, new), edits, message = FLAG_FAULTS[name]
    assert old in nvrtc.FLAGS
    edit_kernels(monkeypatch, tmp_path, edits)
    monkeypatch.setattr(nvrtc, "FLAGS", tuple(new if flag == old else flag for flag in nvrtc.FLAGS))
    with pytest.raises(KernelFault, match=message):
        lint(nvrtc.compile_source(HELD.source, HELD.defines, 90).ptx)


@pytest.mark.nvrtc
def test_flushing_changes_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What CuPy's own compile step would do: it appends -ftz=true."""
    backend, _ = backend_over(PtxLoader(), monkeypatch, tmp_path)
    x, scheme = make("subnormal", (2, 64), "float32"), Scheme.parse("int4_g32")
    compare(backend, x, scheme)
    monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "-ftz=true"))
    backend, _ = backend_over(PtxLoader(), monkeypatch, tmp_path)
    with pytest.raises(AssertionError, match="differ"):
        compare(backend, x, scheme)


@pytest.mark.nvrtc
def test_an_index_of_32_bits_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    edit_kernels(
        monkeypatch,
        tmp_path,
        {"quantize.cu": ("const i64 start = at.index * GROUP", "const int start = at.index * GROUP")},
    )
    loader = PtxLoader(only_blocks=(-1,))
    with pytest.raises(AssertionError, match=r"wild pointer|out of bounds|differ"):
        check_the_end(*backend_over(loader, monkeypatch, tmp_path, max_blocks=1 << 30), "int4_g128", (1, 2**31 + 2**14))


@pytest.mark.nvrtc
def test_an_edited_header_changes_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(nvrtc.kernel_dir(), tmp_path / "kernels")
    monkeypatch.setattr(nvrtc, "kernel_dir", lambda: tmp_path / "kernels")
    one_of_each = {v.source: v for v in launches.every()}.values()

    def keys() -> list[str]:
        return [nvrtc.key(v.source, v.defines, 90) for v in one_of_each]

    before = keys()
    assert keys() == before
    for header in sorted((tmp_path / "kernels").glob("*.cuh")):
        text = header.read_text()
        header.write_text(text + "\n")
        users = {v.source for v, a, b in zip(one_of_each, before, keys(), strict=True) if a != b}
        assert users, header.name
        assert header.name != "common.cuh" or len(users) == len(one_of_each)
        header.write_text(text)
    assert keys() == before


def test_every_loader_has_its_gate() -> None:
    loaders: dict[str, Loader] = dict(GATES)
    assert set(loaders) == set(MARKS)
    assert all(len(words) == len(GATES) for *_, words in KERNEL_FAULTS.values())
