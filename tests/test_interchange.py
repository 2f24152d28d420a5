"""The front door: every kind of array becomes the same weights, over the same memory, or is refused by name."""

from __future__ import annotations

import array
import ctypes
import itertools
import mmap
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arrowquant_gpu import arrow_weights, interchange
from arrowquant_gpu.dtypes import DTYPES, WEIGHT_DTYPES
from arrowquant_gpu.errors import DeviceError, InputError
from arrowquant_gpu.interchange import Weights, as_weights
from arrowquant_gpu.schemes import rows_and_length

from .bitwise import assert_bitwise_equal
from .producers import ArrowProducer, DlpackProducer, FakeCupyArray, FakeDevice, StreamProducer, fake_cupy

BF16 = np.dtype(ml_dtypes.bfloat16)
BF16_ITEM = pa.field("item", pa.uint16(), metadata={"arrowquant.dtype": "bfloat16"})


def sample(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Distinct small integers: exact in every weight dtype but the 8-bit ones, whose bit patterns are distinct."""
    n = int(np.prod(shape))
    if np.dtype(dtype).itemsize == 1:
        return (np.arange(n) % 64).astype(np.uint8).view(dtype).reshape(shape)
    return (np.arange(n) % 251).astype(dtype).reshape(shape)


def span(a: np.ndarray) -> tuple[int, int]:
    """First and last address of an array's memory."""
    return np.lib.array_utils.byte_bounds(a)


def check(got: Weights, want: np.ndarray, memory: tuple[int, int] | None) -> None:
    """`got` is `want`, bit for bit, as row blocks that lie within `memory` (None: anywhere but there is a copy)."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype.name
    assert got.device == "cpu"
    rows, length = rows_and_length(want.shape)
    assert all(b.ndim == 2 and b.shape[1] == length for b in got.blocks), [b.shape for b in got.blocks]
    assert_bitwise_equal(np.concatenate(got.blocks), np.ascontiguousarray(want).reshape(rows, length))
    if memory is not None and want.size:
        for block in got.blocks:
            low, high = span(block)
            assert memory[0] <= low < high <= memory[1], "a copy was made"


def check_view(x: Any, want: np.ndarray, source: np.ndarray) -> None:
    check(as_weights(x), want, span(source))


def values_span(a: pa.Array) -> tuple[int, int]:
    buffer = a.buffers()[-1]
    return buffer.address, buffer.address + buffer.size


NESTS = (
    lambda a, n: pa.ListArray.from_arrays(pa.array(range(0, len(a) + 1, n), pa.int32()), a),
    lambda a, n: pa.LargeListArray.from_arrays(pa.array(range(0, len(a) + 1, n), pa.int64()), a),
    pa.FixedSizeListArray.from_arrays,
)


class TestNumpy:
    @pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
    @pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (1, 1, 6), (0,), (0, 8), (3, 0), (2, 0, 3)])
    def test_any_dtype_and_shape(self, dtype: str, shape: tuple[int, ...]) -> None:
        x = sample(shape, DTYPES[dtype].numpy)
        check_view(x, x, x)
        assert len(as_weights(x).blocks) == 1

    @given(st.data())
    def test_any_strides_are_views(self, data: st.DataObject) -> None:
        shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=5, min_side=1, max_side=4))
        x = sample(shape)
        view = x.transpose(data.draw(st.permutations(range(x.ndim))))
        steps = data.draw(st.tuples(*[st.sampled_from([1, -1, 2])] * x.ndim))
        check_view(
            view[tuple(slice(None, None, s) for s in steps)], view[tuple(slice(None, None, s) for s in steps)], x
        )

    def test_leading_axes_that_merge_are_one_block(self) -> None:
        x = sample((4, 6, 8))
        assert len(as_weights(x[:, :, ::2]).blocks) == 1
        assert len(as_weights(x[1:3]).blocks) == 1
        assert len(as_weights(x[:, ::2]).blocks) == 1
        assert len(as_weights(x[:, :4]).blocks) == 4
        assert len(as_weights(x.transpose(1, 0, 2)).blocks) == 6

    def test_many_small_blocks_are_gathered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(interchange, "MAX_SMALL_VIEWS", 5)
        x = sample((5, 6, 8))
        assert len(as_weights(x[:, :4]).blocks) == 5
        permuted = x.transpose(1, 0, 2)
        check(as_weights(permuted), permuted, None)
        assert len(as_weights(permuted).blocks) == 1
        monkeypatch.setattr(interchange, "SMALL_VIEW_BYTES", 5 * 8 * 4)
        check_view(permuted, permuted, x)

    def test_broadcast_is_a_view(self) -> None:
        x = sample((8,))
        check_view(np.broadcast_to(x, (1000, 8)), np.broadcast_to(x, (1000, 8)), x)

    @pytest.mark.parametrize("scalar", [np.float32(2.5), np.int8(-3), ml_dtypes.bfloat16(1.5)])
    def test_scalars(self, scalar: Any) -> None:
        check(as_weights(scalar), np.asarray(scalar), None)

    def test_subclasses(self, tmp_path: Any) -> None:
        x = np.memmap(tmp_path / "w", np.float32, "w+", shape=(3, 4))
        x[...] = sample((3, 4))
        check_view(x, np.asarray(x), x)
        check_view(np.ma.MaskedArray(x, mask=False), np.asarray(x), x)


class TestArrow:
    @pytest.mark.parametrize("dtype", [d for d in WEIGHT_DTYPES if DTYPES[d].numpy.isbuiltin == 1])
    def test_flat(self, dtype: str) -> None:
        x = sample((12,), dtype)
        a = pa.array(x)
        check(as_weights(a), x, values_span(a))
        check(as_weights(a[3:9]), x[3:9], values_span(a))

    @given(st.data())
    def test_nested_lists_sliced_and_chunked(self, data: st.DataObject) -> None:
        shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=5))
        x = sample(shape, data.draw(st.sampled_from([np.float16, np.float32, np.float64, np.int32])))
        whole = pa.array(x.ravel())
        for n in reversed(shape[1:]):
            whole = data.draw(st.sampled_from(NESTS))(whole, n)
        start = data.draw(st.integers(0, shape[0] - 1))
        stop = data.draw(st.integers(start + 1, shape[0]))
        check(as_weights(whole[start:stop]), x[start:stop], values_span(whole))

        cuts = sorted(data.draw(st.lists(st.integers(start, stop), max_size=3)))
        edges = [start, *cuts, stop]
        chunked = pa.chunked_array([whole[i:j] for i, j in itertools.pairwise(edges)])
        check(as_weights(chunked), x[start:stop], values_span(whole))
        filled = [n for n in np.diff(edges) if n]
        assert [b.shape[0] for b in as_weights(chunked).blocks] == [n * int(np.prod(shape[1:-1])) for n in filled]

    def test_flat_chunks_are_one_row(self) -> None:
        x = sample((9,))
        chunked = pa.chunked_array([x[:4], x[4:4], x[4:]])
        check(as_weights(chunked), x, None)
        assert len(as_weights(chunked).blocks) == 1
        one = pa.chunked_array([x[:0], x])
        check(as_weights(one), x, values_span(one.chunk(1)))

    def test_a_list_of_several_gigabytes_is_only_looked_at(self, tmp_path: Any) -> None:
        path = tmp_path / "sparse"
        with path.open("wb") as f:
            f.truncate(5 << 30)
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            buffer = pa.py_buffer(mapped)
            values = pa.Array.from_buffers(pa.int8(), 5 << 30, [None, buffer], null_count=0)
            offsets = pa.array([0, 5 << 29, 5 << 30], pa.int64())
            w = as_weights(pa.LargeListArray.from_arrays(offsets, values))
            assert (w.shape, w.blocks[0].shape) == ((2, 5 << 29), (2, 5 << 29))
            assert w.blocks[0][1].ctypes.data == buffer.address + (5 << 29)
            del w, values, buffer

    @pytest.mark.parametrize("permutation", [None, [0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]])
    def test_fixed_shape_tensors(self, permutation: list[int] | None) -> None:
        storage = pa.array(sample((5, 24)).tolist(), pa.list_(pa.float32(), 24))
        kind = pa.fixed_shape_tensor(pa.float32(), (2, 3, 4), permutation=permutation)
        a = pa.ExtensionArray.from_storage(kind, storage)
        check(as_weights(a), a.to_numpy_ndarray(), values_span(storage))
        check(as_weights(a[1:4]), a[1:4].to_numpy_ndarray(), values_span(storage))

    def test_empty_where_the_type_tells_the_shape(self) -> None:
        assert as_weights(pa.array([], pa.list_(pa.float32(), 3))).shape == (0, 3)
        assert as_weights(pa.chunked_array([], pa.list_(pa.list_(pa.float32(), 3), 2))).shape == (0, 2, 3)
        assert as_weights(pa.array([[], []], pa.list_(pa.float32()))).shape == (2, 0)
        assert as_weights(pa.array([], pa.float16())).shape == (0,)

    def test_nulls_outside_a_slice_do_not_matter(self) -> None:
        a = pa.array([[1.0, None], [2.0, 3.0], None, [4.0, 5.0]], pa.list_(pa.float32()))
        check(as_weights(a[1:2]), np.array([[2, 3]], np.float32), values_span(a))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
    def test_marked_bits(self, dtype: str) -> None:
        x = sample((2, 4), DTYPES[dtype].numpy)
        bits = x.view(f"u{x.itemsize}")
        item = pa.field("item", pa.from_numpy_dtype(bits.dtype), metadata={"arrowquant.dtype": dtype})
        nested = pa.array(bits.tolist(), pa.large_list(item))
        check(as_weights(nested), x, values_span(nested))
        flat = pa.table([pa.array(bits[0])], schema=pa.schema([item]))
        check(as_weights(flat), x[0], values_span(flat["item"].chunk(0)))
        check(as_weights(ArrowProducer(bits[0], item)), x[0], span(bits))

    def test_opaque_bfloat16(self) -> None:
        x = sample((6,), BF16)
        storage = pa.array(x.view(np.uint16))
        a = pa.ExtensionArray.from_storage(pa.opaque(pa.uint16(), "bfloat16", "somebody"), storage)
        check(as_weights(a), x, values_span(storage))
        check(as_weights(a[2:]), x[2:], values_span(storage))
        rows = pa.FixedSizeListArray.from_arrays(a, 3)
        check(as_weights(rows), x.reshape(2, 3), values_span(storage))

    @pytest.mark.parametrize("wrap", [lambda t: t, lambda t: t.to_batches()[0], StreamProducer, pa.Table.to_reader])
    def test_a_table_of_one_column_is_that_column(self, wrap: Any) -> None:
        a = pa.array(sample((3, 4)).tolist(), pa.list_(pa.float32()))
        check(as_weights(wrap(pa.table({"w": a}))), sample((3, 4)), values_span(a))

    def test_several_chunks_of_a_table(self) -> None:
        a = pa.array(sample((3, 4)).tolist(), pa.list_(pa.float32()))
        w = as_weights(pa.concat_tables([pa.table({"w": a}), pa.table({"w": a[1:]})]))
        check(w, sample((3, 4))[[0, 1, 2, 1, 2]], values_span(a))
        assert len(w.blocks) == 2


class TestProtocols:
    @pytest.mark.parametrize("versioned", [True, False])
    @pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
    def test_dlpack_dtypes(self, dtype: str, versioned: bool) -> None:
        x = sample((3, 4), DTYPES[dtype].numpy)
        check_view(DlpackProducer(x, versioned=versioned), x, x)

    @given(st.data())
    def test_dlpack_strides(self, data: st.DataObject) -> None:
        x = sample(data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)), np.int16)
        view = x.transpose(data.draw(st.permutations(range(x.ndim)))) if x.ndim else x
        check_view(DlpackProducer(view, versioned=data.draw(st.booleans())), view, x)

    def test_dlpack_byte_offset(self) -> None:
        x = sample((4, 8))
        check_view(DlpackProducer(x[2:], data=x.ctypes.data, byte_offset=64), x[2:], x)

    def test_dlpack_null_strides_are_row_major(self) -> None:
        x = sample((2, 3, 4))
        check_view(DlpackProducer(x, strides=None), x, x)

    def test_dlpack_null_data_of_an_empty_tensor(self) -> None:
        assert as_weights(DlpackProducer(np.empty((0, 4), BF16), data=None)).shape == (0, 4)

    def test_dlpack_of_page_locked_memory_is_host_memory(self) -> None:
        x = sample((2, 3))
        check_view(DlpackProducer(x, device=(3, 0)), x, x)

    def test_dlpack_from_libraries(self) -> None:
        x = sample((3, 4))
        check_view(pa.Tensor.from_numpy(x.T), x.T, x)

        class OldNumpy:  # no keywords: the unversioned structure
            __dlpack_device__ = x.__dlpack_device__

            def __dlpack__(self) -> Any:
                return x.__dlpack__()

        check_view(OldNumpy(), x, x)

    def test_arrow_capsules(self) -> None:
        import nanoarrow as na

        x = sample((6,))
        check_view(ArrowProducer(x, pa.field("w", pa.float32())), x, x)
        a = pa.chunked_array(pa.array(sample((3, 4)).tolist(), pa.large_list(pa.float64())))
        check(as_weights(StreamProducer(a)), sample((3, 4), np.float64), values_span(a.chunk(0)))
        check(as_weights(na.c_array(x)), x, None)
        check(as_weights(na.Array(x)), x, None)

    @pytest.mark.parametrize("code", "bBhHiIqQfd")
    def test_buffers(self, code: str) -> None:
        x = array.array(code, range(12))
        check_view(x, np.arange(12).astype(code), np.asarray(memoryview(x)))
        check_view(memoryview(x), np.arange(12).astype(code), np.asarray(memoryview(x)))

    def test_strided_and_ctypes_buffers(self) -> None:
        x = sample((4, 6), np.float16)
        check_view(memoryview(x.T), x.T, x)
        c = (ctypes.c_float * 3 * 2)()
        check_view(c, np.zeros((2, 3), np.float32), np.asarray(memoryview(c)))

    def test_arrow_is_preferred_to_host_dlpack(self) -> None:
        """pyarrow arrays have both, and DLPack refuses their lists."""

        class Both(ArrowProducer):
            def __dlpack_device__(self) -> tuple[int, int]:
                return 1, 0

            def __dlpack__(self, **options: Any) -> Any:
                raise AssertionError("not the one to ask")

        x = sample((4,))
        check_view(Both(x, pa.field("", pa.float32())), x, x)

    def test_numpy_weights_load_nothing(self) -> None:
        code = (
            "import sys, numpy as np; from arrowquant_gpu.interchange import as_weights; as_weights(np.ones(3));"
            "print([m for m in ('pyarrow', 'cupy', 'torch') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class TestDevice:
    @pytest.fixture
    def cupy(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.setitem(sys.modules, "cupy", cupy := fake_cupy())
        return cupy

    def check_on_device(self, w: Weights, want: np.ndarray, device: str) -> None:
        assert (w.shape, w.dtype, w.device) == (want.shape, want.dtype.name, device)
        assert {type(b) for b in w.blocks} == {FakeCupyArray}
        rows = np.concatenate([b.memory for b in w.blocks])
        assert_bitwise_equal(rows, np.ascontiguousarray(want).reshape(rows_and_length(want.shape)))
        assert all(np.shares_memory(b.memory, want) for b in w.blocks)

    def test_cupy_arrays_stay(self, cupy: Any) -> None:
        x = sample((2, 3, 4), BF16)
        self.check_on_device(as_weights(FakeCupyArray(x, 1)), x, "cuda:1")
        self.check_on_device(as_weights(FakeCupyArray(x, 1)[:, ::2]), x[:, ::2], "cuda:1")

    @pytest.mark.parametrize("kind", [2, 13])
    def test_dlpack_objects_stay(self, cupy: Any, kind: int) -> None:
        x = sample((3, 4), np.float16)
        self.check_on_device(as_weights(DlpackProducer(x, device=(kind, 2))), x, "cuda:2")

    def test_device_memory_is_preferred_to_a_host_copy_through_arrow(self, cupy: Any) -> None:
        class Series(DlpackProducer):
            def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
                raise AssertionError("this would copy to the host")

        x = sample((5,))
        self.check_on_device(as_weights(Series(x, device=(2, 0))), x, "cuda:0")

    def test_without_cupy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cupy", None)
        with pytest.raises(
            DeviceError, match=r"^w: tests\.producers\.DlpackProducer is in GPU memory.*CuPy is not inst"
        ):
            as_weights(DlpackProducer(sample((3,)), device=(2, 0)), name="w")

    def test_what_cupy_refuses(self, cupy: Any) -> None:
        def refuse(x: Any) -> Any:
            raise BufferError("no such luck")

        cupy.from_dlpack = refuse
        with pytest.raises(InputError, match=r"^w: tests\.producers\.DlpackProducer .*no such luck"):
            as_weights(DlpackProducer(sample((3,)), device=(2, 0)), name="w")

    def test_arrow_data_in_device_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A pyarrow with CUDA can hold such arrays; this one cannot make them."""

        class OnGpu(list):
            is_cpu = False

        monkeypatch.setattr(arrow_weights, "_import", lambda x, name: (pa.field("", pa.float32()), [OnGpu()]))
        with pytest.raises(InputError, match=r"^w: Arrow data in device memory; pass it as a DLPack object"):
            as_weights(pa.array([1.0]), name="w")

    def test_current_device_is_left_alone(self, cupy: Any) -> None:
        as_weights(FakeCupyArray(sample((3,)), 1))
        assert FakeDevice.current == 0


def test_the_comparison_notices_a_copy() -> None:
    x = sample((3, 4))
    with pytest.raises(AssertionError, match="a copy was made"):
        check_view(x.copy(), x, x)
    with pytest.raises(AssertionError, match="differ"):
        check_view(x[1:], x[:-1], x)


@pytest.mark.interop
class TestTorch:
    @pytest.mark.parametrize("dtype", sorted(set(WEIGHT_DTYPES)))
    def test_dtypes(self, dtype: str) -> None:
        import torch

        x = sample((3, 4), DTYPES[dtype].numpy)
        bits = torch.from_numpy(x.view(f"u{x.itemsize}"))
        t = bits.view(getattr(torch, dtype))
        check_view(t, x, x)
        check_view(t.T, x.T, x)
        check_view(t[1:, ::2], x[1:, ::2], x)

    def test_scalars_and_empty(self) -> None:
        import torch

        assert as_weights(torch.tensor(1.5)).shape == ()
        assert as_weights(torch.zeros(0, 4, dtype=torch.bfloat16)).shape == (0, 4)

    def test_refused(self) -> None:
        import torch

        with pytest.raises(InputError, match=r"^w: torch\.nn\.parameter\.Parameter .*detach"):
            as_weights(torch.nn.Parameter(torch.zeros(3)), name="w")
        check_view(torch.nn.Parameter(t := torch.zeros(3)).detach(), np.zeros(3, np.float32), t.numpy())
        for bad in (torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.complex64)):
            with pytest.raises(InputError, match=r"^w: DLPack dtype (bool|complex)"):
                as_weights(bad, name="w")
        with pytest.raises(InputError, match=r"^w: torch\.Tensor cannot be exported"):
            as_weights(torch.zeros(3, device="meta"), name="w")
        with pytest.raises(InputError, match=r"^w: torch\.Tensor cannot be exported"):
            as_weights(torch.eye(3).to_sparse(), name="w")
