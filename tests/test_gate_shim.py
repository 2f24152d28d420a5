"""The CPU shim finds what it is there to find, and is right about intrinsics. The kernels go through it next."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from .bitwise import assert_bitwise_equal
from .gpuless.arguments import device_array
from .gpuless.errors import KernelFault
from .gpuless.launcher import summarize
from .gpuless.shim import REVERSE, SCHEDULES, Schedule, ShimModule
from .gpuless.sources import FAULTY, SOUND, special_floats

pytestmark = pytest.mark.compiler

# A fault is found by a report of its own, or by a result that changes with the order of threads or with what shared
# memory held before. The words of the report are part of the test: another report would be another fault.
REPORTED = {
    "divergent_barrier": "divergent __syncthreads: lines",
    "shuffle_with_a_returned_lane": "names a lane that has returned",
    "shuffle_outside_its_mask": "the calling lane is not in its mask",
    "shuffle_from_outside_the_mask": "shuffle from lane 31, which takes no part",
    "shuffle_against_barrier": "deadlock",
}
SANITIZED = {
    "global_write_out_of_bounds": "heap-buffer-overflow, WRITE of size 4",
    "global_read_out_of_bounds": "heap-buffer-overflow, READ of size 4",
    "shared_out_of_bounds": "index 31 out of bounds",
    "shared_out_of_bounds_by_pointer": "insufficient space",
    "misaligned_vector_load": "which requires 16 byte alignment",
    "shift_beyond_the_width": "shift exponent 33 is too large",
}
DEPENDENT = ("race", "missing_syncwarp", "reused_buffer", "two_writers", "read_of_a_neighbour", "uninitialised_shared")


def run_faulty(name: str, *, sanitize: bool = False) -> set[bytes]:
    """The different results of a faulty kernel over the schedules."""
    kernel = ShimModule(FAULTY, sanitize=sanitize).get_function(name)
    n = 256 if name in ("race", "reused_buffer") else 32
    results = set()
    for schedule in SCHEDULES:
        x, y = np.arange(1, n + 1, dtype=np.float32), np.zeros(n, np.float32)
        kernel((1,), (n,), (x, y), schedule=schedule)
        results.add(y.tobytes())
    return results


@pytest.mark.parametrize("name", REPORTED)
def test_a_wrong_meeting_is_reported(name: str) -> None:
    with pytest.raises(KernelFault, match=REPORTED[name]):
        run_faulty(name)


@pytest.mark.parametrize("name", SANITIZED)
def test_a_wrong_access_is_reported_with_its_line(name: str) -> None:
    with pytest.raises(KernelFault, match=rf"{SANITIZED[name]}|faulty.cu:\d+") as caught:
        run_faulty(name, sanitize=True)
    assert SANITIZED[name] in str(caught.value)
    assert "faulty.cu:" in str(caught.value)


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_race_changes_the_result(name: str) -> None:
    assert len(run_faulty(name)) > 1


def test_every_planted_fault_is_accounted_for() -> None:
    planted = {line.split()[1].split("(")[0] for line in FAULTY.read_text().splitlines() if line.startswith("KERNEL ")}
    assert planted == {*REPORTED, *SANITIZED, *DEPENDENT}


def test_a_write_beyond_the_end_is_found_without_a_sanitizer() -> None:
    with pytest.raises(KernelFault, match="write out of bounds of allocation 1"):
        run_faulty("global_write_out_of_bounds")


@pytest.mark.parametrize("sanitize", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sound_kernels_give_one_result_in_every_order(schedule: Schedule, sanitize: bool) -> None:
    module = ShimModule(SOUND, sanitize=sanitize)
    x, sums = np.arange(5000, dtype=np.int32), np.zeros(3, np.int32)
    module.get_function("block_sum")((3,), (256,), (x, sums, np.int32(x.size)), schedule=schedule)
    assert sums.sum() == x.sum()

    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    for n in (32, 64):
        module.get_function("reverse")((1,), (n,), (x, y), schedule=schedule)
        assert_bitwise_equal(y[:n], x[:n][::-1])

    module.get_function("half_masks")((1,), (64,), (x, y), schedule=schedule)
    for warp in (0, 32):
        assert_bitwise_equal(y[warp : warp + 16], np.full(16, x[warp : warp + 16].sum() + 1))
        assert_bitwise_equal(y[warp + 16 : warp + 32], np.full(16, x[warp + 31]))


def test_conversions_equal_numpy_and_ml_dtypes() -> None:
    module = ShimModule(SOUND)
    bits = np.arange(1 << 16, dtype=np.uint16)
    half, bfloat16 = np.zeros(bits.size, np.float32), np.zeros(bits.size, np.float32)
    module.get_function("from_16_bits")((256,), (256,), (bits, half, bfloat16, np.int64(bits.size)))
    finite = np.isfinite(bits.view(np.float16))
    assert_bitwise_equal(half[finite], bits.view(np.float16)[finite].astype(np.float32))
    assert_bitwise_equal(bfloat16, bits.view(ml_dtypes.bfloat16).astype(np.float32))

    x = special_floats(1 << 16)
    to_half, to_bfloat16 = np.zeros(x.size, np.uint16), np.zeros(x.size, np.uint16)
    module.get_function("to_16_bits")((x.size // 256,), (256,), (x, to_half, to_bfloat16, np.int64(x.size)))
    number = ~np.isnan(x)
    with np.errstate(over="ignore"):
        assert_bitwise_equal(to_half[number], x[number].astype(np.float16).view(np.uint16))
        assert_bitwise_equal(to_bfloat16[number], x[number].astype(ml_dtypes.bfloat16).view(np.uint16))
    assert set(to_half[~number]) == set(to_bfloat16[~number]) == {0x7FFF}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((np.float32(2),), "3 arguments for 4 parameters"),
        ((np.float64(2), np.uint32(32)), "argument 2 .* is float64, the parameter is float of 4 bytes"),
        ((np.uint32(32), np.float32(2)), "argument 2 .* is uint32, the parameter is float of 4 bytes"),
        ((np.float32(2), np.int64(32)), "argument 3 .* is int64, the parameter is integer of 4 bytes"),
        ((np.float32(2), 32), "argument 3 .* is a int; pass a NumPy array or a NumPy scalar"),
        ((np.zeros(1, np.float32), np.uint32(32)), "argument 2 .* is an array, the parameter is float of 4 bytes"),
    ],
)
def test_wrong_arguments_are_refused(args: tuple[object, ...], message: str) -> None:
    kernel = ShimModule(SOUND).get_function("scaled")
    x, y = np.ones(32, np.float32), np.zeros(32, np.float32)
    with pytest.raises(KernelFault, match=message):
        kernel((1,), (32,), (x, y, *args))
    with pytest.raises(KernelFault, match="is uint64, the parameter is pointer of 8 bytes"):
        kernel((1,), (32,), (np.uint64(x.ctypes.data), y, np.float32(2), np.uint32(32)))


@pytest.mark.parametrize(
    ("grid", "block"), [((0,), (32,)), ((1,), (0,)), ((1,), (2048,)), ((1, 1 << 16), (32,)), ((1,), (1, 1, 128))]
)
def test_impossible_grids_are_refused(grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    x = np.ones(32, np.float32)
    with pytest.raises(KernelFault, match="is empty or beyond"):
        ShimModule(SOUND).get_function("scaled")(grid, block, (x, x, np.float32(2), np.uint32(32)))


def test_strides_and_read_only_arrays_are_refused() -> None:
    kernel = ShimModule(SOUND).get_function("scaled")
    x, y = np.ones(64, np.float32), np.zeros(32, np.float32)
    with pytest.raises(KernelFault, match="not contiguous"):
        kernel((1,), (32,), (x[::2], y, np.float32(2), np.uint32(32)))
    y.flags.writeable = False
    with pytest.raises(KernelFault, match="read-only"):
        kernel((1,), (32,), (x, y, np.float32(2), np.uint32(32)))


def test_a_view_is_a_pointer_into_its_owner() -> None:
    kernel = ShimModule(SOUND, sanitize=True).get_function("vector_copy")
    x, y = np.arange(16, dtype=np.uint32), np.zeros(16, np.uint32)
    kernel((1,), (4,), (x[4:12], y[8:], np.int32(2)))
    assert y.tolist() == [0] * 8 + list(range(4, 12))
    with pytest.raises(KernelFault, match="misaligned"):
        kernel((1,), (4,), (device_array(x, offset=1), y, np.int32(4)))


def test_an_architecture_chooses_its_branch() -> None:
    x, y = np.arange(64, dtype=np.uint32), np.zeros((32, 32), np.uint32)
    for arch, highest in ((75, 0), (90, 31)):
        ShimModule(SOUND, arch=arch).get_function("intrinsics")((1,), (32,), (x, x, y, np.int32(32)))
        assert set(y[:, 19]) == {highest}


def test_an_edited_header_is_another_library(tmp_path: Path) -> None:
    source, header = tmp_path / "twice.cu", tmp_path / "factor.cuh"
    source.write_text('#include "factor.cuh"\nextern "C" __global__ void twice(int* x) { x[0] *= FACTOR; }\n')
    libraries = []
    for factor in (2, 3):
        header.write_text(f"#define FACTOR {factor}\n")
        x, kernel = np.full(1, 5, np.int32), ShimModule(source).get_function("twice")
        kernel((1,), (1,), (x,))
        assert x[0] == 5 * factor
        libraries.append(kernel.library)
    assert libraries[0] != libraries[1]


def test_what_is_not_modelled_does_not_compile(tmp_path: Path) -> None:
    source = tmp_path / "unknown.cu"
    source.write_text('extern "C" __global__ void unknown(float* x) { x[0] = __expf(x[0]); }\n')
    with pytest.raises(KernelFault, match="__expf"):
        ShimModule(source).get_function("unknown")


def test_a_crash_is_a_fault_and_the_next_launch_works(tmp_path: Path) -> None:
    source = tmp_path / "crash.cu"
    source.write_text(
        'extern "C" __global__ void crash(int* x, int* y) { x[0] = *reinterpret_cast<int*>(8) + y[0]; }\n'
    )
    x = np.zeros(1, np.int32)
    with pytest.raises(KernelFault, match="ended with -11"):
        ShimModule(source).get_function("crash")((1,), (1,), (x, x))
    test_sound_kernels_give_one_result_in_every_order(REVERSE, sanitize=False)


def test_a_report_without_a_known_error_has_no_summary() -> None:
    assert summarize("nothing to see") == ""
