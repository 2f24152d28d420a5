"""Who owns memory, and for how long: docs/arrow.md, line by line.

A source is dropped as early as its caller can drop it, garbage is collected, and freed memory is written over. What
refers to the source must still be right; and once nothing does, the producer must have been told exactly once.
"""

from __future__ import annotations

import array
import gc
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest

from arrowquant_gpu import dlpack
from arrowquant_gpu.errors import InputError
from arrowquant_gpu.interchange import as_weights
from arrowquant_gpu.ops import dequantize, quantize
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal
from .producers import ArrowProducer, DlpackProducer, FakeCupyArray, fake_cupy

N = 1 << 16
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


class Traced(np.ndarray):
    """An array that takes weak references and is the owner of its memory, so that the memory's end can be seen."""


def own(a: np.ndarray) -> Traced:
    traced = Traced(a.shape, a.dtype)
    traced[...] = a
    return traced


def source(dtype: Any = np.float32) -> Traced:
    """The weights all tests use, in memory of their own, large enough to be unmapped when it is freed."""
    return own((np.arange(N) % 251).astype(dtype).reshape(64, -1))


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What is alive before these tests is none of their garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def churn() -> None:
    """Collect garbage, then take and write over memory of the sizes that were in use."""
    gc.collect()
    for dtype in (np.uint8, np.float16, np.float32):
        junk = [np.full((64, N // 64), 77, dtype) for _ in range(8)]
        del junk
    gc.collect()


def arrow_list(x: np.ndarray) -> pa.Array:
    """A list column over the memory of `x`."""
    bits = x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x
    item = pa.field("item", pa.from_numpy_dtype(bits.dtype), metadata={"arrowquant.dtype": x.dtype.name})
    values = pa.Array.from_buffers(item.type, x.size, [None, pa.py_buffer(bits)])
    return pa.FixedSizeListArray.from_arrays(values, type=pa.list_(item, x.shape[1]))


# How a source may reach the front door. Each wraps the memory of a NumPy array and holds on to it.
WRAPS: dict[str, Callable[[np.ndarray], Any]] = {
    "numpy view": lambda x: x[:, :],
    "strided view": lambda x: x[::-1][::-1],
    "memoryview": lambda x: memoryview(x) if x.dtype != ml_dtypes.bfloat16 else x[:],
    "dlpack": DlpackProducer,
    "dlpack, unversioned": lambda x: DlpackProducer(x, versioned=False),
    "arrow": arrow_list,
    "arrow slice": lambda x: arrow_list(x)[:64],
    "arrow chunks": lambda x: pa.chunked_array([arrow_list(x)[:10], arrow_list(x)[10:]]),
    "arrow table": lambda x: pa.table({"w": arrow_list(x)}),
    "arrow stream": lambda x: pa.table({"w": arrow_list(x)}).to_reader(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_weights_keep_a_dropped_source_alive(wrap: str, dtype: Any) -> None:
    x = source(dtype)
    ended = weakref.ref(x)
    w = as_weights(WRAPS[wrap](x))
    del x
    churn()
    assert ended() is not None
    assert_bitwise_equal(np.concatenate(w.blocks), np.asarray(source(dtype)))
    last = w.blocks[-1][-1:]  # a piece of a block is enough
    del w
    churn()
    assert ended() is not None
    assert_bitwise_equal(last, np.asarray(source(dtype))[-1:])
    del last
    gc.collect()
    assert ended() is None, "leaked"


@pytest.mark.parametrize("versioned", [True, False])
def test_dlpack_deleter_is_called_once_when_the_last_view_is_gone(versioned: bool) -> None:
    producer = DlpackProducer(source(), versioned=versioned)
    counts = producer.counts
    w = as_weights(producer)
    block = w.blocks[0][3:]
    del producer, w
    churn()
    assert counts == {"exported": 1}
    assert block[0, 0] == source()[3, 0]
    del block
    gc.collect()
    assert counts == {"exported": 1, "released": 1}
    churn()
    assert counts["released"] == 1


@pytest.mark.parametrize("fields", [{"code": 6}, {"lanes": 2}, {"major": 2}])
def test_dlpack_deleter_is_called_once_where_the_tensor_is_refused(fields: dict[str, int]) -> None:
    producer = DlpackProducer(source(), **fields)
    with pytest.raises(InputError):
        as_weights(producer)
    gc.collect()
    assert producer.counts == {"exported": 1, "released": 1}


def test_dlpack_deleter_may_be_null() -> None:
    producer = DlpackProducer(source(), deleter=None)
    assert_bitwise_equal(as_weights(producer).blocks[0], np.asarray(source()))
    gc.collect()
    assert producer.counts == {"exported": 1}


def test_arrow_release_is_called_once_when_the_last_view_is_gone() -> None:
    producer = ArrowProducer(source().reshape(-1), pa.field("", pa.float32()))
    counts = producer.counts
    w = as_weights(producer)
    block = w.blocks[0][:, 5:]
    del producer, w
    churn()
    assert counts == {"exported": 1}
    assert block[0, 0] == 5
    del block
    gc.collect()
    assert counts == {"exported": 1, "released": 1}


def test_arrow_release_is_called_once_where_the_array_is_refused() -> None:
    producer = ArrowProducer(np.zeros(8, np.int32), pa.field("", pa.date32()))
    with pytest.raises(InputError, match="date32"):
        as_weights(producer)
    gc.collect()
    assert producer.counts == {"exported": 1, "released": 1}


def test_buffers_stay_locked_while_they_are_read() -> None:
    x = array.array("f", range(100))
    w = as_weights(x)
    with pytest.raises(BufferError):
        x.append(1.0)
    del w
    gc.collect()
    x.append(1.0)


def test_weights_are_read_only_where_the_producer_does_not_offer_more() -> None:
    for x in (DlpackProducer(source()), arrow_list(source())):
        assert not as_weights(x).blocks[0].flags.writeable


def test_reading_does_not_write() -> None:
    x = source()
    x.flags.writeable = False
    for wrap in WRAPS.values():
        quantize(wrap(x), "int4_g32", device="reference")
    assert_bitwise_equal(np.asarray(x), np.asarray(source()))


@pytest.mark.parametrize("wrap", WRAPS)
def test_results_do_not_refer_to_their_input(wrap: str) -> None:
    x = source()
    ended = weakref.ref(x)
    q = quantize(WRAPS[wrap](x), "int8_g64_asym", device="reference")
    want = [a.copy() for a in (q.packed, q.scales, q.zeros)]
    x[...] = 77
    for got, a in zip((q.packed, q.scales, q.zeros), want, strict=True):
        assert_bitwise_equal(got, a)
    del x
    gc.collect()
    assert ended() is None
    churn()
    for got, a in zip((q.packed, q.scales, q.zeros), want, strict=True):
        assert_bitwise_equal(got, a)


def traced(q: QuantizedTensor) -> tuple[QuantizedTensor, list[weakref.ref[Any]]]:
    """The tensor over arrays whose end can be seen."""
    packed, scales, zeros = map(own, (q.packed, q.scales, q.zeros))
    refs = [weakref.ref(a) for a in (packed, scales, zeros)]
    return QuantizedTensor(packed, scales, zeros, q.shape, q.scheme, q.dtype), refs


@pytest.mark.parametrize("suffix", ["", "_f16", "_bf16"])
def test_a_row_keeps_the_tensor_alive_and_the_tensor_read_from_it_the_row(suffix: str) -> None:
    first = quantize(source(), f"int4_g32_asym{suffix}", device="reference")
    want = np.asarray(dequantize(first, "float32", device="reference"))
    q, refs = traced(first)
    del first
    batch = q.to_arrow("w")
    del q
    churn()
    assert all(r() is not None for r in refs)
    table = pa.concat_tables([pa.table(batch), pa.table(batch)])
    back = QuantizedTensor.from_arrow(table, 1)
    del batch, table
    churn()
    assert all(r() is not None for r in refs)
    assert_bitwise_equal(np.asarray(dequantize(back, "float32", device="reference")), want)
    del back
    gc.collect()
    assert all(r() is None for r in refs), "leaked"


def test_a_tensor_read_from_a_stream_outlives_stream_and_file() -> None:
    q = quantize(source(), "int4_g32_asym", device="reference")
    batch = q.to_arrow()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = np.frombuffer(sink.getvalue(), np.uint8).copy().view(Traced)
    ended = weakref.ref(data)
    back = QuantizedTensor.from_arrow(pa.ipc.open_stream(pa.py_buffer(data)).read_next_batch())
    del data, sink
    churn()
    assert ended() is not None
    assert_bitwise_equal(back.packed, q.packed)
    del back
    gc.collect()
    assert ended() is None


def test_dlpack_of_a_result_outlives_it() -> None:
    q, refs = traced(quantize(source(), "int8_g32_asym", device="reference"))
    want = np.asarray(q.packed).copy()
    a = np.from_dlpack(q)
    del q
    churn()
    assert refs[0]() is not None
    assert_bitwise_equal(a, want)
    del a
    gc.collect()
    assert [r() for r in refs] == [None] * 3


def test_device_arrays_keep_a_dropped_producer_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    producer = DlpackProducer(source(), device=(dlpack.CUDA, 0))
    counts = producer.counts
    w = as_weights(producer)
    del producer
    churn()
    assert counts == {"exported": 1}
    assert_bitwise_equal(w.blocks[0].memory, np.asarray(source()))
    del w
    gc.collect()
    assert counts == {"exported": 1, "released": 1}


def test_a_row_from_a_device_does_not_refer_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    q, refs = traced(quantize(source(), "int8_g32_asym", device="reference"))
    want = np.asarray(q.packed).copy()
    on_device = QuantizedTensor(*map(FakeCupyArray, (q.packed, q.scales, q.zeros)), q.shape, q.scheme, q.dtype)
    batch = on_device.to_arrow()
    del q, on_device
    churn()
    assert [r() for r in refs] == [None] * 3
    assert_bitwise_equal(QuantizedTensor.from_arrow(batch).packed, want)


def test_many_imports_and_exports_leave_nothing_behind() -> None:
    """Free lists and caches settle in the first rounds; a structure or an owner that leaked with each would not."""
    q = quantize(source()[:2, :32], "int4_g32_asym", device="reference")
    producer, column = DlpackProducer(source()), arrow_list(source())

    def once() -> None:
        QuantizedTensor.from_arrow(q.to_arrow("w"))
        q.__arrow_c_device_array__()
        np.from_dlpack(q)
        as_weights(producer)
        as_weights(column)

    def after_rounds() -> int:
        for _ in range(1000):
            once()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    once()
    gc.collect()
    pool = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        before = after_rounds()
        grown = after_rounds() - before
    finally:
        tracemalloc.stop()
    assert producer.counts["exported"] == producer.counts["released"] == 2001
    assert grown < 1000 * 16, f"{grown} bytes over 1000 rounds"
    assert pa.total_allocated_bytes() <= pool


@pytest.mark.interop
class TestTorch:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_a_dropped_tensor_is_kept_alive(self, dtype: str) -> None:
        import torch

        want = np.asarray(source())
        t = torch.from_numpy(want.copy()).to(getattr(torch, dtype))
        ended = weakref.ref(t)
        w = as_weights(t)
        address = t.data_ptr()
        del t
        for _ in range(8):
            torch.full((64, N // 64), 77, dtype=getattr(torch, dtype))
        churn()
        assert w.blocks[0].ctypes.data == address
        assert_bitwise_equal(w.blocks[0].astype(np.float32), want)
        del w
        gc.collect()
        assert ended() is None

    def test_torch_frees_its_memory_when_the_last_view_is_gone(self) -> None:
        import torch

        x = source()
        ended = weakref.ref(x)
        t = torch.from_numpy(x)  # torch's storage holds the array until its own last reference is gone
        del x
        w = as_weights(t)
        del t
        churn()
        assert ended() is not None
        del w
        gc.collect()
        assert ended() is None

    def test_torch_reads_packed_codes_in_place(self) -> None:
        import torch

        q = quantize(source(), "int8_g32", device="reference")
        t = torch.from_dlpack(q)
        assert t.data_ptr() == q.packed.ctypes.data
        want = q.packed.copy()
        del q
        churn()
        assert_bitwise_equal(t.numpy(), want)
