"""What only the CPU backend promises: threads, forks, the memory it touches, the compiler and its cache, FP modes."""

from __future__ import annotations

import mmap
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest

import arrowquant_gpu
from arrowquant_gpu import reference
from arrowquant_gpu.backends import cpu, cpu_kernels, cpu_vectors
from arrowquant_gpu.backends.cpu import CpuBackend
from arrowquant_gpu.backends.cpu_tasks import Task
from arrowquant_gpu.dtypes import DTYPES, KERNEL_DTYPES
from arrowquant_gpu.errors import DeviceError
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .cases import make
from .test_backends import check, check_table, quantize

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for, or sets modes of, x86-64")

BIG = [  # scheme, shape: large enough for threads; whole rows, parts of rows, one row, few long rows
    ("int4_g128", (1031, 640)),
    ("int3_g100_asym_f16", (5, 131072)),
    ("int8_channel_asym", (700, 999)),
    ("int5_channel_bf16", (1, 700_001)),
    ("int2_channel_asym", (3, 400_007)),
    ("int6_g65536", (1, 600_000)),
    ("int4_tensor_asym", (9, 70_001)),
]


def run(code: str, *, cwd: Path | None = None, **environment: str) -> str:
    """The output of Python code in a new process that sees this checkout; raises with its errors if it fails."""
    root = Path(__file__).parent.parent if cwd is None else cwd
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------------------------------------
# Threads


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bytes(threads: int, dtype: str) -> None:
    backend = CpuBackend(threads)
    for scheme, shape in BIG:
        check(backend, make("normal", shape, dtype), Scheme.parse(scheme), [dtype])


@pytest.mark.parametrize("threads", [2, 5])
def test_every_way_to_cut_small_tensors(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """The table with pieces of one unit: each boundary between two pieces that there can be, is."""
    for constant in ("SHARE", "PIECE", "LONG_ROW"):
        monkeypatch.setattr(cpu, constant, 1)
    monkeypatch.setattr(cpu, "PIECES", 1 << 20)
    assert check_table(CpuBackend(threads), every=400) > 300


@pytest.mark.parametrize("order", [1, -1])
def test_findings_of_all_pieces_are_put_together(monkeypatch: pytest.MonkeyPatch, order: int) -> None:
    """Whichever piece ends first."""
    backend = CpuBackend(3)
    share = backend._share
    monkeypatch.setattr(backend, "_share", lambda *arguments: share(*arguments)[::order])
    for scheme, shape in BIG:
        x = make("normal", shape, "float32")
        at = np.array([x.size // 3, x.size // 2, x.size - 1])
        x.reshape(-1)[at] = np.nan, np.inf, -np.inf
        assert reference.find(x) == Findings(1, 2, int(at[0]))
        check(backend, x, Scheme.parse(scheme))
        x.reshape(-1)[at] = 3e38
        check(backend, x, Scheme.parse(scheme.removesuffix("_bf16").removesuffix("_f16") + "_f16"))


def test_concurrent_callers_share_one_backend() -> None:
    backend = CpuBackend(3)
    work = [(make("normal", shape, dtype), Scheme.parse(s)) for s, shape in BIG[:4] for dtype in KERNEL_DTYPES]
    want = [reference.quantize(x, scheme) for x, scheme in work]
    start = threading.Barrier(8)

    def call(caller: int) -> int:
        start.wait()
        for i in range(2 * len(work)):
            (x, scheme), expected = work[(i + caller) % len(work)], want[(i + caller) % len(work)]
            packed, scales, _, findings = quantize(backend, x, scheme)
            assert findings == Findings()
            assert_bitwise_equal(packed, expected[0], "packed")
            assert_bitwise_equal(scales, expected[1], "scales")
        return caller

    with ThreadPoolExecutor(8) as callers:
        assert sorted(callers.map(call, range(8))) == list(range(8))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_several_tensors_at_once(threads: int) -> None:
    """Large and small, empty, one long row, and between them some that are refused: each as the reference has it."""
    group, row = Scheme.parse("int4_g128_asym"), Scheme.parse("int3_channel_bf16")
    given = [("normal", (300, 1000), "float32", group), ("normal", (3, 40), "bfloat16", group)]
    given += [("normal", (700, 512), "float16", group), ("normal", (0, 5), "float32", group)]
    given += [("normal", (1, cpu.LONG_ROW + 8), "float32", row), ("normal", (5, 300), "float32", row)]
    inputs = [make(content, shape, dtype) for content, shape, dtype, _ in given]
    inputs[2][0, 3] = np.nan
    jobs = []
    for x, (_, _, _, scheme) in zip(inputs, given, strict=True):
        scales = np.empty(scheme.scales_shape(x.shape), DTYPES[scheme.scale_dtype].numpy)
        packed, zeros = np.empty(scheme.packed_shape(x.shape), np.uint8), np.empty(scales.shape, np.uint8)
        jobs.append((x, scheme, packed, scales, None if scheme.symmetric else zeros))
    found = CpuBackend(threads).quantize_all(jobs)
    for (x, scheme, *out), findings in zip(jobs, found, strict=True):
        *want, expected = reference.quantize(x, scheme)
        assert findings == expected, scheme
        if expected == Findings():
            for got, array in zip(out, want, strict=True):
                if array is not None:
                    assert_bitwise_equal(got, array, scheme.id)
    assert [findings != Findings() for findings in found] == [False, False, True, False, False, False]


def test_where_no_thread_can_be_started_the_caller_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, x = CpuBackend(4), make("normal", BIG[0][1], "float32")

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    check(backend, x, Scheme.parse("int4_g128"))


def test_an_interrupted_caller_leaves_no_thread_at_work() -> None:
    """Once the error reaches the caller, its arrays may go: nobody may still be writing to them."""
    backend, main = CpuBackend(4), threading.current_thread()
    entered, release, begun, at_work = threading.Semaphore(0), threading.Event(), [], set()

    def task(begin: int, end: int) -> None:
        if threading.current_thread() is main:
            entered.acquire()
            threading.Timer(0.05, release.set).start()
            raise KeyboardInterrupt
        begun.append(begin)
        at_work.add(begin)
        entered.release()
        release.wait()
        at_work.remove(begin)

    with pytest.raises(KeyboardInterrupt):
        backend._share([Task(1 << 24, 1, task)])
    assert release.is_set()
    assert not at_work
    assert len(begun) <= 3  # one piece for each helper: no other was begun after the interrupt


def test_a_forked_child_computes_too() -> None:
    out = run(
        """
        import os, threading, warnings
        warnings.simplefilter("ignore")  # Python warns of any fork beside threads; this one is the point
        from arrowquant_gpu.backends.cpu import CpuBackend
        from arrowquant_gpu.backends.cpu_tasks import Task
        from arrowquant_gpu.schemes import Scheme
        from tests.cases import make
        from tests.test_backends import check
        backend, x = CpuBackend(4), make("normal", (2048, 512), "float32")
        check(backend, x, Scheme.parse("int4_g128"))
        child = os.fork()
        check(backend, x, Scheme.parse("int8_g64_asym"))
        if child == 0:
            both, seen = threading.Barrier(2), set()
            def meet(begin, end):
                if (me := threading.get_ident()) not in seen:
                    seen.add(me)
                    both.wait(100)  # breaks if the child has no second thread
            CpuBackend._share(backend, [Task(1 << 19, 1, meet)])
            os._exit(42)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert out == "42"


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def test_the_default_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ARROWQUANT_NUM_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    assert CpuBackend().threads == len(os.sched_getaffinity(0))
    monkeypatch.setenv("ARROWQUANT_NUM_THREADS", "3")
    assert CpuBackend().threads == 3
    assert CpuBackend(7).threads == 7


def test_rayons_variable_counts_where_ours_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARROWQUANT_NUM_THREADS", raising=False)
    monkeypatch.setenv("RAYON_NUM_THREADS", "5")
    assert CpuBackend().threads == 5
    monkeypatch.setenv("ARROWQUANT_NUM_THREADS", "3")
    assert CpuBackend().threads == 3
    monkeypatch.delenv("ARROWQUANT_NUM_THREADS")
    monkeypatch.setenv("RAYON_NUM_THREADS", "0")
    assert CpuBackend().threads == len(os.sched_getaffinity(0))
    monkeypatch.setenv("RAYON_NUM_THREADS", "many")
    with pytest.raises(DeviceError, match="RAYON_NUM_THREADS is 'many'"):
        CpuBackend()


@pytest.mark.parametrize("text", ["", "0", "-1", "two", "1.5"])
def test_a_wrong_number_of_threads_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ARROWQUANT_NUM_THREADS", text)
    with pytest.raises(DeviceError, match=f"ARROWQUANT_NUM_THREADS is {text!r}"):
        CpuBackend()
    with pytest.raises(DeviceError, match="threads is 0"):
        CpuBackend(0)


def test_numba_without_its_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(DeviceError, match="NUMBA_DISABLE_JIT"):
        CpuBackend()


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_read_only_file_mapping_is_read_in_place(tmp_path: Path, dtype: str) -> None:
    """At an offset that leaves no row aligned to more than its element, as in a checkpoint."""
    x, path = make("normal", (601, 1001), dtype), tmp_path / "weights"
    path.write_bytes(bytes(10) + x.tobytes())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        view = np.frombuffer(mapping, x.dtype, offset=10) if x.itemsize == 2 else None
        if view is None:  # float32 at offset 10 is not aligned to its element: use 12
            path.write_bytes(bytes(12) + x.tobytes())
            view = np.memmap(path, x.dtype, "r", offset=12)
        check(CpuBackend(2), view.reshape(x.shape), Scheme.parse("int4_g128_asym"), [dtype])
        del view


def test_nothing_the_size_of_the_tensor_is_allocated() -> None:
    backend, scheme = CpuBackend(2), Scheme.parse("int4_g128_asym")
    x = make("normal", (2048, 2048), "float32")
    packed = np.empty(scheme.packed_shape(x.shape), np.uint8)
    scales, zeros = np.empty(scheme.scales_shape(x.shape), np.float32), np.empty(scheme.scales_shape(x.shape), np.uint8)
    calls = [
        lambda: backend.quantize(x, scheme, packed, scales, zeros),
        lambda: backend.encode(x, scheme, scales, zeros, packed),
        lambda: backend.dequantize(packed, scales, zeros, scheme, x),
        lambda: backend.value_range(x),
    ]
    for call in calls:
        call()
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100_000


GUARD = """
import ctypes, mmap, sys
import numpy as np
from arrowquant_gpu.backends.cpu import CpuBackend
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.schemes import Scheme
from tests.cases import make

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
maps = []

def fenced(shape, dtype, at_end):
    # An array that ends (or starts) where the memory that may be touched does.
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    inner = -(-max(size, 1) // PAGE) * PAGE
    mapping = mmap.mmap(-1, inner + 2 * PAGE)
    maps.append(mapping)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    for page in (base, base + PAGE + inner):
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = PAGE + (inner - size if at_end else 0)
    return np.frombuffer(mapping, dtype, size // dtype.itemsize, start).reshape(shape)

SHAPES = ((1, 1), (2, 3), (1, 7), (3, 16), (2, 17), (1, 63), (1, 64), (3, 65), (2, 333), (1, 2049), (1, 4133))
backend, n = CpuBackend(1), 0
for at_end in (True, False):
    for bits, grain, asym, dtype in (
        (2, "g16", "", "float32"), (3, "g128", "_asym", "bfloat16"), (4, "g100", "_asym_f16", "float16"),
        (5, "g5", "_bf16", "float32"), (6, "channel", "_asym", "float16"), (8, "g64", "", "bfloat16"),
    ):
        scheme = Scheme.parse(f"int{bits}_{grain}{asym}")
        for shape in SHAPES:
            x = fenced(shape, DTYPES[dtype].numpy, at_end)
            x[...] = make("normal", shape, dtype)
            packed = fenced(scheme.packed_shape(shape), np.uint8, at_end)
            scales = fenced(scheme.scales_shape(shape), DTYPES[scheme.scale_dtype].numpy, at_end)
            zeros = None if scheme.symmetric else fenced(scheme.scales_shape(shape), np.uint8, at_end)
            backend.quantize(x, scheme, packed, scales, zeros)
            backend.encode(x, scheme, scales, zeros, packed)
            backend.dequantize(packed, scales, zeros, scheme, x)
            backend.value_range(x)
            x[-1, -1] = np.nan
            backend.quantize(x, scheme, packed, scales, zeros)
            n += 1
print(n)
"""


def test_no_byte_before_or_after_an_array_is_touched() -> None:
    assert run(GUARD) == "132"


def test_the_fences_around_the_arrays_stop_a_stray_access() -> None:
    """The arrays of the test above, one weight too long."""
    planted = GUARD.replace("backend.quantize(x,", "ctypes.string_at(x.ctypes.data, x.nbytes + 1); backend.quantize(x,")
    with pytest.raises(AssertionError, match="exit -11"):
        run(planted)


# ---------------------------------------------------------------------------------------------------------------------
# The compiler, its targets and its cache


@x86_only
@pytest.mark.parametrize("target", ["generic", pytest.param("haswell", marks=pytest.mark.soak)])
def test_other_instruction_sets_give_the_same_bytes(target: str, tmp_path: Path) -> None:
    """SSE2 only, and AVX2 without AVX-512: what Numba compiles for on older machines."""
    code = """
        from arrowquant_gpu.backends.cpu import CpuBackend
        from tests.test_backends import check_table
        print(check_table(CpuBackend(2), every=200))
        """
    out = run(code, NUMBA_CPU_NAME=target, NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))
    assert int(out) > 600


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, whose cache is its own."""
    source = Path(arrowquant_gpu.__file__).parent
    shutil.copytree(source, tmp_path / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


HITS = """
    import numpy as np
    from arrowquant_gpu.backends import cpu_kernels
    from arrowquant_gpu.backends.cpu import CpuBackend
    print(cpu_kernels.__file__)
    print(CpuBackend(1).value_range(np.array([[-1.5, 2.5]], np.float32))[:2])
    print(sum(cpu_kernels.value_range().stats.cache_hits.values()))
    """


def test_a_second_process_compiles_nothing_until_the_source_changes(copy: Path) -> None:
    home = str(copy / "home")
    first, second = (run(HITS, cwd=copy, NUMBA_CACHE_DIR=home).split("\n") for _ in range(2))
    assert first == [str(copy / "arrowquant_gpu/backends/cpu_kernels.py"), "(-1.5, 2.5)", "0"]
    assert second == [*first[:2], "1"]
    # The operations that kernels are made of are in another file, which Numba's cache does not look at.
    vectors = copy / "arrowquant_gpu/backends/cpu_vectors.py"
    text = vectors.read_text()
    planted = (
        'def signed_max(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:\n    return b.select(b.icmp_signed(">"'
    )
    assert planted in text
    vectors.write_text(text.replace(planted, planted.replace('">"', '"<"')))
    assert run(HITS, cwd=copy, NUMBA_CACHE_DIR=home).split("\n")[1:] == ["(-1.5, 0.0)", "0"]


def test_no_directory_for_the_cache(copy: Path) -> None:
    """Neither in the package, as in read-only site-packages, nor in the user's home, nor where Numba is told."""
    (copy / "arrowquant_gpu/backends/__pycache__").write_text("a file, not a directory")
    nowhere = os.devnull + "/nowhere"
    out = run(HITS, cwd=copy, NUMBA_CACHE_DIR=nowhere, HOME=nowhere, XDG_CACHE_HOME=nowhere)
    assert out.split("\n")[1:] == ["(-1.5, 2.5)", "0"]


def test_a_full_disk_under_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(self: object, *_: object) -> None:
        calls.append(self)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(numba.core.caching.Cache, "save_overload", full)

    def double(x: int) -> int:
        return 2 * x

    assert cpu_kernels._kernel(double)()(21) == 42
    assert len(calls) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The floating-point mode of the calling thread

FLUSH_TO_ZERO_ROUND_UP = 0x1F80 | 0x8040 | 0x4000


@numba.njit
def _set_mode(mode: int) -> int:
    saved = cpu_vectors.ieee_mode()
    cpu_vectors.restore_mode(numba.int32(mode))
    return saved


@x86_only
@pytest.mark.parametrize("content", ["subnormal", "wild", "ties", "normal"])
def test_a_thread_that_flushes_subnormals_gets_the_same_bytes(content: str) -> None:
    """Libraries built with -ffast-math, and torch.set_flush_denormal, leave a thread in such a mode."""
    x, backend, scheme = make(content, (6, 500), "float32"), CpuBackend(1), Scheme.parse("int4_g32_asym")
    want = reference.quantize(x, scheme)
    decoded = {d: reference.dequantize(*want[:3], scheme, 500, d) for d in KERNEL_DTYPES}
    packed, scales, zeros = (np.empty_like(a) for a in want[:3])
    out = {d: np.empty(x.shape, DTYPES[d].numpy) for d in KERNEL_DTYPES}
    before = _set_mode(FLUSH_TO_ZERO_ROUND_UP)
    try:
        flushed = float(np.float32(2.0**-140) * np.float32(0.5)) == 0
        findings = backend.quantize(x, scheme, packed, scales, zeros)
        for d in KERNEL_DTYPES:
            backend.dequantize(packed, scales, zeros, scheme, out[d])
    finally:
        during = _set_mode(before)
    assert flushed
    assert during & 0xFFC0 == FLUSH_TO_ZERO_ROUND_UP
    assert findings == Findings()
    for got, expected, what in zip((packed, scales, zeros), want, ("packed", "scales", "zeros"), strict=False):
        assert_bitwise_equal(got, expected, what)
    for d in KERNEL_DTYPES:
        assert_bitwise_equal(out[d], decoded[d], d)
