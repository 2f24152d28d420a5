"""Quantized tensors where they are: DLPack, the Arrow C device interface, and page-locked memory on the way down."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from arrowquant_gpu import device_arrow
from arrowquant_gpu.dtypes import DTYPES, WEIGHT_DTYPES
from arrowquant_gpu.errors import DeviceError, InputError
from arrowquant_gpu.interchange import as_weights
from arrowquant_gpu.pinned import pinned_table, to_host
from arrowquant_gpu.schemes import Scheme
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal
from .producers import DlpackProducer, FakeCupyArray, FakeDevice, fake_cupy
from .quantized import EVERY_KIND, SHAPES, arrays, check_equal, quantized


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What is alive before these tests is none of their garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "cupy", cupy := fake_cupy())
    FakeDevice.synchronized.clear()
    return cupy


def on_device(q: QuantizedTensor, device: int = 0) -> QuantizedTensor:
    moved = [None if a is None else FakeCupyArray(a, device) for a in (q.packed, q.scales, q.zeros)]
    return QuantizedTensor(*moved, q.shape, q.scheme, q.dtype)


class Capsules:
    """Capsules as a producer, to hand them to a library."""

    def __init__(self, pair: tuple[Any, Any]):
        self.pair = pair

    def __arrow_c_device_array__(self, requested_schema: Any = None, **options: Any) -> tuple[Any, Any]:
        return self.pair


def structure(capsule: Any) -> device_arrow.ArrowDeviceArray:
    return device_arrow.ArrowDeviceArray.from_address(device_arrow._pointer(capsule, b"arrow_device_array"))


class TestDlpack:
    def test_packed_codes_are_shared(self) -> None:
        q = quantized()
        assert q.__dlpack_device__() == (1, 0)
        a = np.from_dlpack(q)
        assert_bitwise_equal(a, q.packed)
        assert np.shares_memory(a, q.packed)
        view = np.from_dlpack(QuantizedTensor.from_arrow(q.to_arrow()))
        assert view.ctypes.data == q.packed.ctypes.data
        assert not view.flags.writeable
        assert not np.shares_memory(np.from_dlpack(q, copy=True), q.packed)

    def test_on_a_device(self, cupy: Any) -> None:
        q = quantized()
        d = on_device(q, 3)
        assert d.__dlpack_device__() == (2, 3)
        assert np.shares_memory(cupy.from_dlpack(d).memory, q.packed)


class TestDeviceExport:
    def test_layout_is_the_one_of_the_standard(self) -> None:
        assert ctypes.sizeof(device_arrow.ArrowDeviceArray) == 128
        offsets = {
            name: getattr(device_arrow.ArrowDeviceArray, name).offset
            for name, *_ in device_arrow.ArrowDeviceArray._fields_
        }
        assert offsets == {"array": 0, "device_id": 80, "device_type": 88, "sync_event": 96, "reserved": 104}

    @pytest.mark.parametrize("scheme", EVERY_KIND, ids=str)
    def test_nanoarrow_reads_host_memory_in_place(self, scheme: Scheme) -> None:
        from nanoarrow import device

        for shape in SHAPES:
            q = quantized(scheme, shape)
            imported = device.c_device_array(q)
            assert imported.device_type_id == 1
            columns = [imported.array.child(i) for i in range(imported.array.n_children)]
            assert [imported.schema.child(i).name for i in range(len(columns))] == list(arrays(q))
            for column, a in zip(columns, arrays(q).values(), strict=True):
                assert (column.length, column.child(0).length) == (1, a.size)
                assert a.size == 0 or column.child(0).buffers[1] == a.ctypes.data, "copied"
            metadata = dict(imported.schema.metadata.items())
            assert metadata[b"arrowquant.scheme"].decode() == scheme.id
            assert tuple(json.loads(metadata[b"arrowquant.shape"])) == shape
            assert metadata[b"arrowquant.dtype"] == b"float16"

    def test_pyarrow_reads_host_memory(self) -> None:
        q = quantized("int4_g16_asym_bf16")
        a = pa.Array._import_from_c_device_capsule(*q.__arrow_c_device_array__())
        a.validate(full=True)
        assert [(f.name, str(f.type)) for f in a.type] == [
            ("data", "list<item: uint8>"),
            ("scales", "list<item: uint16>"),
            ("zero_points", "list<item: uint8>"),
        ]
        assert_bitwise_equal(as_weights(a.field("scales")).blocks[0], q.scales.reshape(1, -1))
        assert_bitwise_equal(as_weights(a.field("data")).blocks[0], q.packed.reshape(1, -1))

    def test_offsets_of_64_bits_where_32_do_not_reach(self, monkeypatch: pytest.MonkeyPatch) -> None:
        q = quantized()
        monkeypatch.setattr(device_arrow, "MAX_INT32", q.packed.size - 1)
        a = pa.Array._import_from_c_device_capsule(*q.__arrow_c_device_array__())
        a.validate(full=True)
        assert [str(f.type) for f in a.type][:2] == ["large_list<item: uint8>", "list<item: float>"]
        assert_bitwise_equal(as_weights(a.field("data")).blocks[0], q.packed.reshape(1, -1))

    def test_cuda_memory(self, cupy: Any) -> None:
        q = quantized()
        schema, capsule = on_device(q, 3).__arrow_c_device_array__()
        c = structure(capsule)
        assert (c.device_type, c.device_id, c.sync_event, list(c.reserved)) == (2, 3, None, [0, 0, 0])
        assert FakeDevice.synchronized == {3: 1}
        assert FakeDevice.current == 0
        assert (c.array.length, c.array.null_count, c.array.n_buffers, c.array.n_children) == (1, 0, 1, 3)
        for i, a in enumerate(arrays(q).values()):
            column = c.array.children[i].contents
            assert (column.length, column.null_count, column.n_buffers, column.n_children) == (1, 0, 2, 1)
            assert column.buffers[0] is None
            # The fake's device memory can be read: what is there must be offsets, and not those pyarrow built with.
            assert list((ctypes.c_int32 * 2).from_address(column.buffers[1])) == [0, a.size]
            values = column.children[0].contents
            assert (values.length, values.buffers[0], values.buffers[1]) == (a.size, None, a.ctypes.data)
        names = [f.name for f in pa.schema(pa.DataType._import_from_c_capsule(schema))]
        assert names == ["data", "scales", "zero_points"]

    def test_offsets_of_cuda_memory_are_device_memory(self, cupy: Any) -> None:
        given = []
        make_array = cupy.asarray
        cupy.asarray = lambda a: given.append(made := make_array(a)) or made
        _, capsule = on_device(quantized(), 1).__arrow_c_device_array__()
        c = structure(capsule)
        assert [c.array.children[i].contents.buffers[1] for i in range(3)] == [g.data.ptr for g in given]
        assert {g.device.id for g in given} == {1}

    def test_nanoarrow_takes_and_passes_on_cuda_memory(self, cupy: Any) -> None:
        from nanoarrow import device

        q = quantized()
        imported = device.c_device_array(on_device(q, 3))
        assert (imported.device_type_id, imported.device_id) == (2, 3)
        _, capsule = imported.__arrow_c_device_array__()
        c = structure(capsule)
        assert (c.device_type, c.device_id) == (2, 3)
        assert c.array.children[0].contents.children[0].contents.buffers[1] == q.packed.ctypes.data

    def test_arrays_that_are_not_row_major_are_copied(self, cupy: Any) -> None:
        q = quantized("int8_g16")
        f = QuantizedTensor(np.asfortranarray(q.packed), q.scales, None, q.shape, q.scheme, q.dtype)
        for exported in (f, on_device(f)):
            c = structure(capsule := exported.__arrow_c_device_array__()[1])
            values = c.array.children[0].contents.children[0].contents
            assert bytes((ctypes.c_uint8 * q.packed.size).from_address(values.buffers[1])) == q.packed.tobytes()
            del c, values, capsule

    def test_options(self) -> None:
        q = quantized()
        q.__arrow_c_device_array__(None, stream=None)
        with pytest.raises(NotImplementedError, match="options stream"):
            q.__arrow_c_device_array__(stream=1)

    @pytest.mark.parametrize("where", ["host", "cuda"])
    @pytest.mark.parametrize("consumer", ["nobody", "nanoarrow", "child"])
    def test_memory_lives_as_long_as_the_consumer(self, cupy: Any, where: str, consumer: str) -> None:
        from nanoarrow import device

        q = quantized()
        want = q.packed.copy()
        exported = on_device(q) if where == "cuda" else q
        address = q.packed.ctypes.data
        alive = [weakref.ref(a) for a in arrays(q).values()]
        pair = exported.__arrow_c_device_array__()
        del q, exported
        gc.collect()
        assert all(r() is not None for r in alive)
        held: Any = pair
        if consumer != "nobody":
            held = device.c_device_array(Capsules(pair))
            del pair
        if consumer == "child":
            held = held.array.child(0)
        gc.collect()
        assert all(r() is not None for r in alive)
        assert bytes((ctypes.c_uint8 * want.size).from_address(address)) == want.tobytes()
        pair = held = None
        gc.collect()
        assert all(r() is None for r in alive), "leaked"

    def test_a_child_that_was_moved_out_outlives_its_parents(self, cupy: Any) -> None:
        """The C data interface lets a consumer move a child and release the rest."""
        q = quantized()
        ended = weakref.ref(q.packed)
        pair = on_device(q).__arrow_c_device_array__()
        address = q.packed.ctypes.data
        del q
        child = structure(pair[1]).array.children[0].contents.children[0].contents
        moved = device_arrow.ArrowArray.from_buffer_copy(child)
        child.release = None
        del child, pair  # an unused capsule releases what it holds
        gc.collect()
        assert ended() is not None
        assert moved.buffers[1] == address
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(moved.release)(ctypes.addressof(moved))
        gc.collect()
        assert moved.release is None
        assert ended() is None, "leaked"


class TestFromDevice:
    @pytest.mark.parametrize("scheme", ["int4_g16", "int4_g16_asym_f16", "int8_channel_asym_bf16", "int3_tensor"])
    def test_to_arrow_goes_through_page_locked_memory(self, cupy: Any, scheme: str) -> None:
        q = quantized(scheme)
        batch = on_device(q, 2).to_arrow("w")
        assert len(cupy.pinned) == 1
        assert FakeDevice.synchronized[2] >= 1
        check_equal(QuantizedTensor.from_arrow(batch), q)
        low = min(a.ctypes.data for a in arrays(QuantizedTensor.from_arrow(batch)).values())
        for a in arrays(QuantizedTensor.from_arrow(batch)).values():
            assert low <= a.ctypes.data < low + cupy.pinned[0], "outside the page-locked block"
            assert (a.ctypes.data - low) % 64 == 0

    def test_other_dlpack_arrays(self, cupy: Any) -> None:
        x = np.arange(6, dtype=np.int16).reshape(2, 3)
        [a] = to_host([DlpackProducer(x, device=(2, 0))])
        assert_bitwise_equal(a, x)
        assert not np.shares_memory(a, x)

    def test_empty(self, cupy: Any) -> None:
        q = quantized(shape=(0, 8))
        check_equal(QuantizedTensor.from_arrow(on_device(q).to_arrow()), q)


class TestPinnedTable:
    COLUMNS: ClassVar = {
        "a": ((4,), "float32"),
        "b": ((4, 3), "bfloat16"),
        "c": ((4, 2, 5), "float8_e4m3fn"),
        "d": ((4,), "bfloat16"),
    }

    def check(self, table: pa.Table, views: dict[str, np.ndarray]) -> None:
        table.validate(full=True)
        assert {name: str(table.schema.field(name).type) for name in table.column_names} == {
            "a": "float",
            "b": "fixed_size_list<item: uint16>[3]",
            "c": "fixed_size_list<item: fixed_size_list<item: uint8>[5]>[2]",
            "d": "uint16",
        }
        for i, (name, (shape, dtype)) in enumerate(self.COLUMNS.items()):
            view = views[name]
            assert (view.shape, view.dtype, view.flags.writeable) == (shape, DTYPES[dtype].numpy, True)
            assert view.flags.aligned
            assert (view.ctypes.data - views["a"].ctypes.data) % 64 == 0
            view[...] = np.full(shape, i + 1, np.float32).astype(view.dtype)
        for i, name in enumerate(self.COLUMNS):
            w = as_weights(table.select([name]), name=name)
            assert (w.shape, w.dtype) == self.COLUMNS[name]
            assert_bitwise_equal(w.blocks[0], views[name].reshape(w.blocks[0].shape))
            assert w.blocks[0].ctypes.data == views[name].ctypes.data
            assert (w.blocks[0].astype(np.float32) == i + 1).all()

    def test_page_locked(self, cupy: Any) -> None:
        self.check(*pinned_table(self.COLUMNS))
        assert cupy.pinned == [4 * 64]
        pinned_table({"w": ((1 << 20, 7), "float16")}, fallback="pageable")
        assert cupy.pinned[1:] == [14 << 20], "a fallback that was not needed"

    def test_pageable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cupy", None)
        self.check(*pinned_table(self.COLUMNS, fallback="pageable"))
        with pytest.raises(DeviceError, match="page-locked memory needs CuPy, which is not installed"):
            pinned_table(self.COLUMNS)

    def test_cuda_that_refuses(self, cupy: Any) -> None:
        def refuse(n_bytes: int) -> Any:
            raise RuntimeError("cudaErrorInsufficientDriver")

        cupy.cuda.alloc_pinned_memory = refuse
        self.check(*pinned_table(self.COLUMNS, fallback="pageable"))
        with pytest.raises(DeviceError, match="256 bytes of page-locked memory cannot be had: cudaErrorInsuff"):
            pinned_table(self.COLUMNS)

    @pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
    @pytest.mark.parametrize("shape", [(6,), (2, 3), (0, 3), (2, 0), (0,)])
    def test_every_dtype(self, dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cupy", None)
        table, views = pinned_table({"w": (shape, dtype)}, fallback="pageable")
        views["w"][...] = np.ones(shape, np.float32).astype(views["w"].dtype)
        w = as_weights(table)
        assert (w.shape, w.dtype) == (shape, dtype)
        assert_bitwise_equal(w.blocks[0], views["w"].reshape(w.blocks[0].shape))

    @pytest.mark.parametrize("survivor", ["table", "view", "weights"])
    def test_anything_keeps_the_block_alive(self, cupy: Any, survivor: str) -> None:
        blocks = []
        allocate = cupy.cuda.alloc_pinned_memory
        cupy.cuda.alloc_pinned_memory = lambda n: blocks.append(weakref.ref(m := allocate(n))) or m
        table, views = pinned_table({"w": ((2, 3), "float32"), "v": ((2,), "float64")})
        held = {"table": table, "view": views["v"], "weights": as_weights(table["w"])}[survivor]
        del table, views
        gc.collect()
        assert blocks[0]() is not None
        del held
        gc.collect()
        assert blocks[0]() is None

    @pytest.mark.parametrize(
        ("columns", "words"),
        [
            ({}, "given: none"),
            ({"a": ((), "float32")}, r"given: a \[\]"),
            ({"a": ((2,), "float32"), "b": ((3, 2), "float32")}, r"given: a \[2\], b \[3, 2\]"),
            ({"a": ((2, 1 << 31), "uint8")}, r"a: shape \[2, 2147483648\]: a fixed_size_list holds"),
            ({"a": ((-1,), "uint8")}, r"a: shape \[-1\]"),
            ({"a": ((2,), "bool")}, "a: dtype 'bool' is not a type of weights"),
            ({"a": ((2,), "float4_e2m1fn")}, "a: dtype 'float4_e2m1fn'"),
            ({"a": ((2,), "f32")}, "a: dtype 'f32'"),
        ],
    )
    def test_refused(self, columns: Any, words: str) -> None:
        with pytest.raises(InputError, match=words):
            pinned_table(columns, fallback="pageable")
        with pytest.raises(InputError, match="fallback 'pinned'"):
            pinned_table({"a": ((2,), "float32")}, fallback="pinned")


@pytest.mark.gpu
class TestGpu:
    """The same on a real device, where nothing here is a stand-in."""

    @staticmethod
    def on_gpu(q: QuantizedTensor) -> QuantizedTensor:
        import cupy

        moved = [None if a is None else cupy.asarray(a) for a in (q.packed, q.scales, q.zeros)]
        return QuantizedTensor(*moved, q.shape, q.scheme, q.dtype)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
    def test_weights_stay(self, dtype: str) -> None:
        import cupy

        x = cupy.asarray(np.arange(24).astype(DTYPES[dtype].numpy).reshape(2, 3, 4))
        w = as_weights(x)
        assert (w.shape, w.dtype, w.device, len(w.blocks)) == ((2, 3, 4), dtype, f"cuda:{x.device.id}", 1)
        assert w.blocks[0].data.ptr == x.data.ptr
        assert [b.data.ptr for b in as_weights(x[:, 1:]).blocks] == [x[0, 1:].data.ptr, x[1, 1:].data.ptr]

    @pytest.mark.parametrize("scheme", ["int4_g16", "int4_g16_asym_f16", "int8_channel_asym_bf16", "int3_tensor"])
    def test_rows_come_down(self, scheme: str) -> None:
        import cupy

        q = quantized(scheme)
        back = QuantizedTensor.from_arrow(self.on_gpu(q).to_arrow())
        check_equal(back, q)
        attributes = cupy.cuda.runtime.pointerGetAttributes(back.packed.ctypes.data)
        assert attributes.type == cupy.cuda.runtime.memoryTypeHost

    def test_device_export(self) -> None:
        import cupy
        from nanoarrow import device

        q = quantized()
        on_gpu = self.on_gpu(q)
        imported = device.c_device_array(on_gpu)
        assert (imported.device_type_id, imported.device_id) == (2, on_gpu.packed.device.id)
        for i, a in enumerate((on_gpu.packed, on_gpu.scales, on_gpu.zeros)):
            column = imported.array.child(i)
            assert column.child(0).buffers[1] == a.data.ptr
            memory = cupy.cuda.UnownedMemory(column.buffers[1], 8, imported)
            offsets = cupy.ndarray((2,), cupy.int32, cupy.cuda.MemoryPointer(memory, 0))
            assert offsets.get().tolist() == [0, a.size]
        assert cupy.from_dlpack(on_gpu).data.ptr == on_gpu.packed.data.ptr

    def test_pinned_table(self) -> None:
        import cupy

        table, views = pinned_table(TestPinnedTable.COLUMNS)
        TestPinnedTable().check(table, views)
        for view in views.values():
            attributes = cupy.cuda.runtime.pointerGetAttributes(view.ctypes.data)
            assert attributes.type == cupy.cuda.runtime.memoryTypeHost
