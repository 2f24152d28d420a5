"""The stand-in for CuPy finds what it is there to find: faults of memory and streams, and faults planted in cuda.py."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowquant_gpu import backends, ops, pinned
from arrowquant_gpu.backends import Backend
from arrowquant_gpu.errors import DeviceError
from arrowquant_gpu.schemes import Scheme
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal
from .cases import make
from .gpuless.device import GARBAGE, Host
from .gpuless.errors import KernelFault
from .gpuless.fake_cupy import BACKEND, install
from .gpuless.loaders import ShimLoader
from .gpuless.shim import ShimModule
from .gpuless.sources import SOUND
from .gpuless.stand_in import Edit, backend_over
from .test_backends import check

pytestmark = pytest.mark.compiler


def scale_loader(cubin: Path, entry: str) -> Any:
    """Every cubin is the kernel `scaled`: y = x / scale."""
    return ShimModule(SOUND).get_function("scaled").prepare


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return install(monkeypatch, scale_loader, n_devices=2)


@pytest.fixture
def scaled(host: Host, tmp_path: Path) -> Any:
    import cupy

    (tmp_path / "k.cubin").touch()
    return cupy.RawModule(path=str(tmp_path / "k.cubin")).get_function("scaled")


def launch(scaled: Any, x: Any, y: Any) -> None:
    scaled((1,), (32,), (x, y, np.float32(2), np.uint32(x.size)))


def test_nothing_runs_before_somebody_waits(scaled: Any) -> None:
    import cupy
    import cupyx

    stream = cupy.cuda.get_current_stream()
    source, result = cupyx.empty_pinned(32, np.float32), cupyx.empty_pinned(32, np.float32)
    source[...], result[...] = 8, 5
    x, y = cupy.empty(32, np.float32), cupy.empty(32, np.float32)
    x.set(source, stream=stream)
    launch(scaled, x, y)
    y.get(stream=stream, out=result, blocking=False)
    assert set(result.tolist()) == {5}
    source[...] = 6  # too early
    stream.synchronize()
    assert set(result.tolist()) == {3}


def test_pageable_memory_is_staged_and_waited_for(scaled: Any) -> None:
    import cupy

    source, result = np.full(32, 8, np.float32), np.zeros(32, np.float32)
    x, y = cupy.empty(32, np.float32), cupy.empty(32, np.float32)
    x.set(source)
    source[...] = 6
    launch(scaled, x, y)
    y.get(out=result, blocking=False)
    assert set(result.tolist()) == {4}


@pytest.mark.parametrize(("non_blocking", "values"), [(True, {np.uint8(GARBAGE)}), (False, {np.uint8(7)})])
def test_streams_wait_for_the_null_stream_only_if_they_are_blocking(
    host: Host, non_blocking: bool, values: set
) -> None:
    import cupy

    x = cupy.empty(64, np.uint8)
    x.set(np.full(64, 7, np.uint8))
    with cupy.cuda.Stream(non_blocking=non_blocking) as stream:
        assert set(x.get(stream=stream)) == values


def test_freed_memory_is_not_for_other_streams(scaled: Any) -> None:
    import cupy

    with cupy.cuda.Stream() as stream:
        x, y = cupy.empty(32, np.float32), cupy.empty(32, np.float32)
        launch(scaled, x, y)
        del x
        stream.synchronize()  # on its own stream, memory may be freed early
    x = cupy.empty(32, np.float32)
    with stream:
        launch(scaled, x, y)
        del x
        with pytest.raises(KernelFault, match="a kernel runs after its memory was freed"):
            stream.synchronize()


def test_pinned_memory_must_live_until_its_transfer_has_run(host: Host) -> None:
    import cupy
    import cupyx

    x, stream = cupy.empty(8, np.uint8), cupy.cuda.get_current_stream()
    pinned = cupyx.empty_pinned(16, np.uint8)
    x.set(pinned[8:], stream=stream)
    del pinned
    gc.collect()
    with pytest.raises(KernelFault, match="a copy to the device runs after its memory was freed"):
        stream.synchronize()


def test_what_cupy_refuses_is_refused(scaled: Any) -> None:
    import cupy

    x = cupy.empty(32, np.float32)
    with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy.ndarray'>"):
        launch(scaled, np.zeros(32, np.float32), x)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)
    with pytest.raises(ValueError, match="set needs a NumPy array of shape"):
        x.set(np.zeros(31, np.float32))
    with pytest.raises(ValueError, match="out must be a NumPy array of shape"):
        x.get(out=np.zeros(32, np.int32))
    with pytest.raises(RuntimeError, match="FILE_NOT_FOUND"):
        cupy.RawModule(path="/nowhere.cubin")
    with pytest.raises(AttributeError):
        cupy.fuse  # noqa: B018


def test_a_host_address_is_no_device_address(scaled: Any) -> None:
    import cupy

    x, host_array = cupy.empty(32, np.float32), np.zeros(32, np.float32)
    with pytest.raises(KernelFault, match=r"argument 0 .* is uint64, the parameter is pointer of 8 bytes"):
        scaled((1,), (32,), (np.uint64(host_array.ctypes.data), x, np.float32(2), np.uint32(32)))
    with pytest.raises(KernelFault, match=r"argument 3 .* is int64, the parameter is integer of 4 bytes"):
        scaled((1,), (32,), (x, x, np.float32(2), 32))  # a Python int is 8 bytes wide


def test_memory_of_another_device_is_refused(scaled: Any) -> None:
    import cupy

    with cupy.cuda.Device(1):
        other = cupy.empty(32, np.float32)
        assert (other.device.id, other.data.ptr % 512) == (1, 0)
    with pytest.raises(KernelFault, match="a kernel on device 0 uses memory of device 1"):
        launch(scaled, other, other)
    with pytest.raises(KernelFault, match="memory of device 1 on a stream of 0"):
        other.get(stream=cupy.cuda.get_current_stream())
    with pytest.raises(RuntimeError, match="invalid device ordinal"), cupy.cuda.Device(2):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Faults planted in backends/cuda.py.

HOST_FAULTS: dict[str, tuple[Edit, str]] = {
    "a width": (("np.int64(self.rows)", "np.int32(self.rows)"), "is int32, the parameter is integer of 8 bytes"),
    "a kind": (("np.int32(lanes)", "np.float32(lanes)"), "is float32, the parameter is integer of 4 bytes"),
    "a Python number": (("np.int32(lanes)", "lanes"), "is int64, the parameter is integer of 4 bytes"),
    "a missing argument": (("args = (x, packed,", "args = (packed,"), "arguments for"),
    "swapped arrays": (("args = (x, packed, scales,", "args = (x, scales, packed,"), "differ|out of bounds"),
    "swapped sizes": (("np.int64(self.length)", "np.int64(self.rows)"), "differ|out of bounds"),
    "an empty grid": (("function((blocks,)", "function((0 * blocks,)"), "is empty or beyond"),
    "small blocks": (("(blocks,), (BLOCK,), args", "(blocks,), (BLOCK // 2,), args"), "differ|findings"),
    "large blocks": (("(blocks,), (BLOCK,), args", "(blocks,), (BLOCK * 8,), args"), "is empty or beyond"),
    "no wait after a copy": (
        ("    for _, copied in turns:\n        copied.synchronize()\n", ""),
        "runs after its memory was freed",
    ),
    "a result that is not read": (("counters.get(stream=stream, out=counts)", "pass"), "findings"),
    "the wrong scale type": (("SCALE_TYPES[scheme.scale_dtype]", "3 - SCALE_TYPES[scheme.scale_dtype]"), "differ"),
}


def check_small(backend: Backend) -> None:
    """Encode and decode by kernels that hold groups and by kernels that stream them."""
    for scheme, shape in (("int4_g32_asym_f16", (100, 96)), ("int3_g5_asym", (2, 37))):
        check(backend, make("normal", shape, "float32"), Scheme.parse(scheme), ["bfloat16"])


def test_the_backend_as_it_is_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend, host = backend_over(ShimLoader(), monkeypatch, tmp_path)
    check_small(backend)
    assert host.gpu.n_launches == 6


@pytest.mark.parametrize("name", HOST_FAULTS)
def test_a_fault_in_the_backend_is_found(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    edit, message = HOST_FAULTS[name]
    backend, _ = backend_over(ShimLoader(), monkeypatch, tmp_path, edit=edit)
    with pytest.raises(AssertionError, match=message):
        check_small(backend)


def test_host_weights_are_refused_by_the_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend, _ = backend_over(ShimLoader(), monkeypatch, tmp_path)
    scheme, x = Scheme.parse("int4_g32"), make("normal", (2, 64), "float32")
    with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy.ndarray'>"):
        backend.quantize(x, scheme, backend.empty((2, 32), np.uint8), backend.empty((2, 2), np.float32), None)


def there_and_back(backend: Backend) -> None:
    """Several parts through two staging buffers that take turns."""
    x = make("normal", (7, 384), "float32")
    out = np.empty_like(x)
    backend.get(backend.put(x), out)
    assert_bitwise_equal(out, x)


STAGE_FAULTS: dict[str, tuple[Edit, str]] = {
    "filled too early": (("        if turn >= 2:\n            copied.synchronize()\n", ""), "differ"),
    "taken too early": (("    copied.synchronize()\n    target[part]", "    target[part]"), "differ"),
    "freed too early": (HOST_FAULTS["no wait after a copy"][0], "runs after its memory was freed"),
}


@pytest.mark.parametrize("name", [None, *STAGE_FAULTS])
def test_weights_larger_than_a_stage(name: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    edit, message = (None, "") if name is None else STAGE_FAULTS[name]
    backend, _ = backend_over(ShimLoader(), monkeypatch, tmp_path, edit=edit)
    monkeypatch.setattr(sys.modules[BACKEND], "STAGE_BYTES", 1000)
    if edit is None:
        there_and_back(backend)
    else:
        with pytest.raises(AssertionError, match=message):
            there_and_back(backend)


def test_devices_that_are_not_there_or_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend_over(ShimLoader(), monkeypatch, tmp_path)
    cuda = sys.modules[BACKEND]
    assert cuda.usable() == (True, "stand-in")
    with pytest.raises(DeviceError, match="cuda:1: cudaErrorInvalidDevice"):
        cuda.CudaBackend(1)
    with pytest.raises(DeviceError, match=r"compute capability 7\.0"):
        backend_over(ShimLoader(), monkeypatch, tmp_path, arch=70)
    assert sys.modules[BACKEND].usable() == (False, "stand-in has compute capability 7.0; 7.5 is needed")


@pytest.fixture
def front_door(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    """The package finds the stand-in when it looks for a GPU."""
    return backend_over(ShimLoader(), monkeypatch, tmp_path, n_devices=2)[1]


def test_the_front_door_takes_the_stand_in_for_a_gpu(front_door: Host) -> None:
    x = make("normal", (9, 96), "float16")
    assert backends.pick_device().name == "cuda:0"
    for scheme in ("int4_g32", "int6_tensor_asym_bf16"):
        want = ops.quantize(x, scheme, device="cpu")
        for device in ("auto", "cuda:1"):
            got = ops.quantize(x, scheme, device=device)
            assert_bitwise_equal(got.packed, want.packed)
            assert_bitwise_equal(got.scales, want.scales)
            assert_bitwise_equal(ops.dequantize(got, device=device), ops.dequantize(want, device="cpu"))
    assert all(gpu.n_launches > 0 for gpu in front_door.gpus)


@pytest.mark.parametrize("scheme", ["int4_g32_asym", "int3_tensor_bf16", "int8_channel"])
def test_weights_on_the_device_stay_there(front_door: Host, scheme: str) -> None:
    import cupy

    host_weights = make("normal", (9, 96), "bfloat16")
    want = ops.quantize(host_weights, scheme, device="cpu")
    with cupy.cuda.Device(1):
        weights = cupy.asarray(host_weights)
    q = ops.quantize(weights, scheme)
    out = ops.dequantize(q)
    assert {a.device.id for a in (q.packed, q.scales, out)} == {1}
    assert front_door.gpus[0].n_launches == 0
    assert_bitwise_equal(q.packed.get(), want.packed)
    assert_bitwise_equal(out.get(), ops.dequantize(want, device="cpu"))
    assert_bitwise_equal(QuantizedTensor.from_arrow(q.to_arrow()).scales, want.scales)


def test_page_locked_tables_are_page_locked(front_door: Host) -> None:
    _, views = pinned.pinned_table({"w": ((4, 5), "float32")})
    assert front_door.pinned_part(views["w"]) is not None
    assert front_door.pinned_part(np.zeros(4)) is None
