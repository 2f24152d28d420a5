"""What only a real GPU can show: results that stay on it, streams, pinned memory, and tensors past 2^31 weights."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from arrowquant_gpu import ops, trace
from arrowquant_gpu.backends import get_backend, pick_device
from arrowquant_gpu.dtypes import KERNEL_DTYPES
from arrowquant_gpu.errors import NonFiniteError
from arrowquant_gpu.formats import pieces as pieces_module
from arrowquant_gpu.grids import GRIDS
from arrowquant_gpu.schemes import Scheme
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal
from .cases import make
from .test_streamed import MIXED, BytesReader, Model, run_all

pytestmark = pytest.mark.gpu


def same(got: QuantizedTensor, want: QuantizedTensor) -> None:
    """Compare a result on the GPU with one on the host."""
    for what in ("packed", "scales", "zeros"):
        a, b = getattr(got, what), getattr(want, what)
        assert (a is None) == (b is None)
        if b is not None:
            assert_bitwise_equal(a.get(), b, what)


def test_auto_takes_the_gpu() -> None:
    assert pick_device("auto").name == "cuda:0"
    assert get_backend("auto").name == "cuda"


@pytest.mark.parametrize("scheme", ["int4_g128", "int3_g100_asym_bf16", "int8_tensor_asym", "int5_channel_f16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_weights_on_the_gpu_stay_there(scheme: str, dtype: str) -> None:
    import cupy

    host = make("normal", (33, 515), "float32").astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    q = ops.quantize(cupy.asarray(host), scheme)
    assert isinstance(q.packed, cupy.ndarray)
    same(q, ops.quantize(host, scheme, device="cpu"))
    out = ops.dequantize(q, "float32")
    assert isinstance(out, cupy.ndarray)
    assert_bitwise_equal(out.get(), ops.dequantize(ops.quantize(host, scheme, device="cpu"), "float32", device="cpu"))


def test_host_weights_through_the_gpu_come_back_to_the_host() -> None:
    x = make("normal", (5000, 2049), "bfloat16")
    got, want = (ops.quantize(x, "int4_g128_asym", device=device) for device in ("cuda", "cpu"))
    assert_bitwise_equal(got.packed, want.packed)
    assert_bitwise_equal(got.zeros, want.zeros)


def test_views_on_the_gpu() -> None:
    import cupy

    x = cupy.asarray(make("normal", (64, 512), "float32"))
    for view in (x.T, x[::2], x[:, 3:], x[:, ::5], x.reshape(-1)[1:]):
        same(ops.quantize(view, "int4_g32"), ops.quantize(view.get(), "int4_g32", device="cpu"))


def test_the_callers_stream_is_used() -> None:
    import cupy

    host = make("normal", (512, 4096), "float32")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        x = cupy.asarray(host) * cupy.float32(2)
        q = ops.quantize(x, "int4_g128")
        stream.synchronize()
    same(q, ops.quantize(host * np.float32(2), "int4_g128", device="cpu"))


def test_dlpack_and_arrow_of_a_result_on_the_gpu() -> None:
    import cupy

    host = make("normal", (16, 256), "float32")
    q = ops.quantize(cupy.asarray(host), "int4_g32_asym")
    codes = cupy.from_dlpack(q)
    assert codes.data.ptr == q.packed.data.ptr
    back = QuantizedTensor.from_arrow(q.to_arrow())
    want = ops.quantize(host, "int4_g32_asym", device="cpu")
    assert_bitwise_equal(back.packed, want.packed)
    assert_bitwise_equal(back.scales, want.scales)
    assert_bitwise_equal(back.zeros, want.zeros)


def test_non_finite_weights_are_counted_and_located() -> None:
    import cupy

    x = cupy.ones((300, 1000), np.float32)
    x[7, 5], x[200, 0] = np.nan, np.inf
    with pytest.raises(NonFiniteError, match=r"1 NaN and 1 infinite .* flat index 7005"):
        ops.quantize(x, "int4_g128")


def test_more_than_two_to_the_31_weights() -> None:
    """Indices past 2^31 in weights: the last rows of a tall and of a wide tensor, beside the CPU."""
    import cupy

    tail = make("normal", (3, 4096), "bfloat16")
    for shape in ((2**31 // 4096 + 5, 4096), (3, 2**31 // 3 // 128 * 128 + 256)):
        x = cupy.zeros(shape, ml_dtypes.bfloat16)
        x[-3:, -4096:] = cupy.asarray(tail)
        q = ops.quantize(x, "int4_g128")
        part = QuantizedTensor(q.packed[-3:, -2048:], q.scales[-3:, -32:], None, tail.shape, q.scheme, "bfloat16")
        same(part, ops.quantize(tail, "int4_g128", device="cpu"))
        assert bool((q.packed[0, :64] == 0x88).all())
        del x, q, part
        cupy.get_default_memory_pool().free_all_blocks()


def test_every_granularity_of_a_long_row() -> None:
    """In registers, streamed, one scale per row, one per tensor, and groups that share bytes."""
    import cupy

    host = make("normal", (3, 70000), "float16")
    for scheme in ("int4_g64", "int4_g1000", "int4_channel", "int4_tensor", "int3_g7_asym"):
        same(ops.quantize(cupy.asarray(host), Scheme.parse(scheme)), ops.quantize(host, scheme, device="cpu"))


@pytest.mark.parametrize("n_slots", [1, 4])
def test_a_ring_of_slots(n_slots: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every kind of piece over real streams, and the times of those in a timeline."""
    from arrowquant_gpu.engine.cuda import open_cuda

    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 1 << 18)
    big = tuple(((1000 * n, 512), dtype, "int4_g128_asym") for n, dtype in ((4, "bfloat16"), (3, "float32")))
    model = Model((*MIXED, *big, *MIXED), n_slots, start=3)
    device = open_cuda("cuda:0", BytesReader(model.data), model.smallest, 1 << 20, n_slots)
    with trace.timeline(tmp_path / "t.json") as timeline:
        run_all(device, model)
    device.close()
    summary = timeline.summary()
    for stage in ("h2d", "kernel", "d2h"):
        row = summary["tracks"][f"cuda:0 {stage}"]
        assert -1e-3 < row["start"] <= row["end"] < summary["seconds"] + 1e-3
        assert row["busy"] > 0.99 * row["seconds"], "work overlaps in one stream"


def test_a_ring_that_does_not_fit_the_gpu() -> None:
    import cupy

    from arrowquant_gpu.engine.cuda import open_cuda

    model = Model(MIXED, 0)
    device = open_cuda("cuda:0", BytesReader(model.data), model.smallest, 1 << 28, 4)
    assert device.notes == ()
    device.close()
    cupy.get_default_memory_pool().free_all_blocks()
    rest = cupy.cuda.Memory(cupy.cuda.runtime.memGetInfo()[0] - (1 << 30))
    device = open_cuda("cuda:0", BytesReader(model.data), model.smallest, 1 << 28, 4)
    assert device.notes[0] == "cuda:0: out of memory for 4 slots of 256 MiB; going on with 2 of 256 MiB"
    run_all(device, model)
    device.close()
    del rest


OTHER_GRIDS = (
    *("affine4_g64", "affine3_g32_bf16", "nf4_g64", "fp4_g64", "mxfp4", "mxfp4_round", "mxfp4_ceil", "mxfp8", "nvfp4"),
    *("nvfp4_local", "e4m3_g128", "e4m3_channel", "e4m3_tensor", "e4m3_b128", "e5m2_channel_f16"),
    *(name for name, grid in GRIDS.items() if grid.block),
)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("scheme", OTHER_GRIDS)
def test_other_grids_equal_the_reference(scheme: str, dtype: str) -> None:
    """Through `ops`, with the pass over the range where a scheme needs one."""
    for content in ("normal", "ties", "one_hot", "zeros"):
        x = make(content, (130, 768), dtype)
        want, got = ops.quantize(x, scheme, device="reference"), ops.quantize(x, scheme, device="cuda")
        assert_bitwise_equal(got.packed, want.packed, f"{content}: packed")
        assert_bitwise_equal(got.scales, want.scales, f"{content}: scales")
        if want.zeros is not None:
            assert_bitwise_equal(got.zeros, want.zeros, f"{content}: zeros")
        decoded = [ops.dequantize(want, dtype, device=device) for device in ("reference", "cuda")]
        assert_bitwise_equal(decoded[1], decoded[0], f"{content}: decoded")
