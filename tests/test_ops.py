"""quantize and dequantize as a caller sees them: what goes in, what comes out, what is refused."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import arrowquant_gpu.ops as ops
from arrowquant_gpu import backends, reference
from arrowquant_gpu.backends import get_backend, pick_device
from arrowquant_gpu.dtypes import DTYPES, WEIGHT_DTYPES
from arrowquant_gpu.errors import DeviceError, InputError, NonFiniteError, ScaleOverflowError, SchemeError
from arrowquant_gpu.reference import Findings
from arrowquant_gpu.schemes import Scheme, rows_and_length
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal

DEVICES = ["reference", "cpu"]
SHAPES = [(), (0,), (5, 0), (7,), (3, 130), (2, 3, 40), (2, 1, 2, 16)]


def _data(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    x = np.random.default_rng(len(shape)).standard_normal(shape, dtype=np.float32) * np.float32(20)
    return np.asarray(np.abs(x) if dtype.startswith("uint") else x).astype(DTYPES[dtype].numpy)


def check_against_reference(q: QuantizedTensor, x: np.ndarray) -> None:
    packed, scales, zeros, findings = reference.quantize(x.reshape(rows_and_length(x.shape)), q.scheme)
    assert findings == Findings()
    assert (q.shape, q.dtype) == (x.shape, x.dtype.name)
    assert_bitwise_equal(q.packed, packed, "packed")
    assert_bitwise_equal(q.scales, scales, "scales")
    assert (q.zeros is None) == (zeros is None)
    if zeros is not None:
        assert_bitwise_equal(q.zeros, zeros, "zeros")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_every_weight_dtype(device: str, dtype: str) -> None:
    for shape in SHAPES:
        x = _data(shape, dtype)
        check_against_reference(ops.quantize(x, "int4_g32_asym", device=device), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["int4_g16", "int3_channel_asym_bf16", "int8_tensor", "int5_tensor_asym_f16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_back(device: str, scheme: str, shape: tuple[int, ...]) -> None:
    x = _data(shape, "bfloat16")
    q = ops.quantize(x, scheme, device=device)
    check_against_reference(q, x)
    for dtype in ("float32", "float16", "bfloat16"):
        out = ops.dequantize(q, dtype, device=device)
        want = reference.dequantize(q.packed, q.scales, q.zeros, q.scheme, rows_and_length(shape)[1], dtype)
        assert_bitwise_equal(out, want.reshape(shape), dtype)
    assert ops.dequantize(q, device=device).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("device", DEVICES)
def test_strided_unaligned_and_readonly_inputs(device: str) -> None:
    x = _data((64, 96), "float32")
    raw = np.zeros(x.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(x.shape)
    unaligned[...] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    for view in (x.T, x[::2], x[:, ::3], x[::-1], np.asfortranarray(x), unaligned, frozen, x[:, 5:77]):
        check_against_reference(ops.quantize(view, "int4_g32", device=device), view)


def test_blocks_of_rows_give_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = _data((33, 100), "float64")
    for block_bytes in (1, 1000, 1 << 20):
        monkeypatch.setattr(ops, "BLOCK_BYTES", block_bytes)
        for scheme in ("int4_g32_asym", "int6_tensor_asym"):
            check_against_reference(ops.quantize(x, scheme, device="cpu"), x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["int4_g16", "int4_tensor"])
def test_non_finite_weights_name_tensor_count_and_first_position(
    device: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "BLOCK_BYTES", 400)
    x = _data((50, 20), "float64")
    x[30, 7], x[31, 0], x[49, 19] = np.nan, 1e39, -np.inf
    with pytest.raises(NonFiniteError, match=r"layer\.7: 1 NaN and 2 infinite .* flat index 607 of shape \[50, 20\]"):
        ops.quantize(x, scheme, device=device, name="layer.7")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", ["int4_g16_f16", "int4_tensor_f16"])
def test_scale_overflow_names_the_remedy(device: str, scheme: str) -> None:
    x = np.full((4, 32), 1e9, np.float32)
    with pytest.raises(ScaleOverflowError, match=r"w: .* scales do not fit float16.*_bf16"):
        ops.quantize(x, scheme, device=device, name="w")


def test_the_source_is_neither_changed_nor_kept() -> None:
    x = _data((8, 64), "float32")
    before = x.copy()
    q = ops.quantize(x, "int8_g32", device="cpu")
    assert_bitwise_equal(x, before)
    packed = q.packed.copy()
    x[...] = 0
    assert_bitwise_equal(q.packed, packed)
    assert not np.shares_memory(x, q.packed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("together", [1, 40_000, 1 << 30])
def test_many_arrays_are_as_each_by_itself(device: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, the bad ones in their places, whatever is quantized together."""
    monkeypatch.setattr(ops, "TOGETHER_BYTES", together)
    arrays = {f"{dtype}{shape}": _data(shape, dtype) for dtype in WEIGHT_DTYPES for shape in SHAPES}
    arrays["strided"] = _data((64, 300), "float32")[::2, ::3]
    arrays["nan"] = np.array([[1.0, np.nan]], np.float32)
    arrays["text"] = np.array(["a"])
    arrays["last"] = _data((7, 300), "float32")
    names = np.random.default_rng(together).permutation(list(arrays)).tolist()
    found = list(ops.quantize_all({name: arrays[name] for name in names}, "int4_g32_asym", device=device))
    assert [name for name, _ in found] == names
    for name, q in found:
        if name in ("nan", "text"):
            assert type(q) is (NonFiniteError if name == "nan" else InputError)
            assert str(q).startswith(name)
        else:
            assert isinstance(q, QuantizedTensor)
            check_against_reference(q, arrays[name])


def test_together_is_one_call_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    backend = get_backend("cpu", 2)
    monkeypatch.setattr(backend, "quantize_all", lambda jobs: calls.append(len(jobs)) or [Findings()] * len(jobs))
    monkeypatch.setattr(ops, "TOGETHER_BYTES", 3 * 4096)
    arrays = {str(i): np.ones((8, 128), np.float32) for i in range(7)}
    assert len(list(ops.quantize_all(arrays, "int4_g128", device="cpu", threads=2))) == 7
    assert calls == [3, 3, 1]


def test_bad_schemes_and_devices_are_refused() -> None:
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(SchemeError, match="7 bits"):
        ops.quantize(x, "int7_g32")
    with pytest.raises(DeviceError, match="gpu"):
        ops.quantize(x, device="gpu")
    with pytest.raises(SchemeError, match="did you mean 'int4_g128'"):
        Scheme.parse("int04_g0128")


def test_dequantize_refuses_arrays_that_do_not_fit() -> None:
    q = ops.quantize(np.ones((4, 32), np.float32), "int4_g16_asym", device="cpu")
    fields = {"packed": q.packed, "scales": q.scales, "zeros": q.zeros, "shape": q.shape, "scheme": q.scheme}
    for change in (
        {"packed": q.packed[:, :-1]},
        {"scales": q.scales.astype(np.float64)},
        {"zeros": None},
        {"zeros": q.zeros[:2]},
        {"shape": (4, 48)},
        {"scheme": Scheme.parse("int4_g16")},
    ):
        with pytest.raises(InputError):
            ops.dequantize(QuantizedTensor(**{**fields, **change}, dtype="float32"), device="cpu")
    with pytest.raises(InputError, match="int8"):
        ops.dequantize(q, "int8")


def test_auto_says_which_device_it_picked_and_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("arrowquant_gpu.backends._cuda_usable", lambda: (False, "no driver"))
    assert pick_device("auto") == ("cpu", "no usable GPU: no driver")
    with caplog.at_level(logging.DEBUG, "arrowquant_gpu"):
        assert get_backend("auto").name == "cpu"
    assert "using cpu (no usable GPU: no driver)" in caplog.text
    monkeypatch.setattr("arrowquant_gpu.backends._cuda_usable", lambda: (True, "NVIDIA H200"))
    assert pick_device("auto") == ("cuda:0", "NVIDIA H200")
    assert pick_device("cuda:3").name == "cuda:3"


def test_cuda_is_never_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arrowquant_gpu.backends._cuda_usable", lambda: (False, "no driver"))
    with pytest.raises(DeviceError, match=r"cuda:1.*no driver"):
        ops.quantize(np.zeros((1, 8), np.float32), device="cuda:1")


def test_a_broken_cupy_is_a_reason_and_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so is missing')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("cupy", "arrowquant_gpu.backends.cuda"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    usable, reason = backends._cuda_usable.__wrapped__()
    assert (usable, reason) == (False, "CuPy cannot be imported: libcudart.so is missing")
