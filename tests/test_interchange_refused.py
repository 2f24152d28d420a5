"""What the front door does not take: refused with an InputError that names the tensor, what it found, and a way out."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest

from arrowquant_gpu.errors import InputError
from arrowquant_gpu.interchange import as_weights

from .producers import DlpackProducer
from .quantized import quantized


class RequiresGrad:
    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("Can't export tensors that require gradient, use tensor.detach()")


class NotACapsule(RequiresGrad):
    def __dlpack__(self, **options: Any) -> Any:
        return object()


class NoDevice(RequiresGrad):
    def __dlpack_device__(self) -> tuple[int, int]:
        raise ValueError("Unknown device type meta")


class NoStream:
    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        raise ValueError("the file is gone")


REFUSED = {
    "list": ([1.0, 2.0], r"builtins\.list cannot be read as weights.*np\.asarray"),
    "str": ("abc", r"builtins\.str cannot be read"),
    "None": (None, r"builtins\.NoneType cannot be read"),
    "float": (1.0, r"builtins\.float cannot be read"),
    "bytes": (b"abcd", r"builtins\.bytes has no element type.*np\.frombuffer"),
    "bytearray": (bytearray(4), r"builtins\.bytearray has no element type"),
    "arrow buffer": (pa.py_buffer(b"abcd"), r"pyarrow\.lib\.Buffer has no element type"),
    "anonymous map": (mmap.mmap(-1, 8), r"mmap\.mmap has no element type"),
    "bool": (np.zeros(3, bool), r"dtype bool is not a type of weights"),
    "complex64": (np.zeros(3, np.complex64), r"dtype complex64 is not a type of weights"),
    "complex128": (np.zeros(3, np.complex128), r"dtype complex128 is not supported"),
    "longdouble": (np.zeros(3, np.longdouble), r"dtype (float128|longdouble) is not supported"),
    "object": (np.array([1, None]), r"dtype object is not supported"),
    "string": (np.array(["a"]), r"dtype str32 is not supported"),
    "time": (np.zeros(1, "M8[s]"), r"dtype datetime64\[s\] is not supported"),
    "record": (np.zeros(1, "f4,f4"), r"dtype void64 is not supported"),
    "big-endian": (np.zeros(3, ">f4"), r"dtype float32 in big-endian byte order"),
    "big-endian buffer": (memoryview(np.zeros(3, ">f8")), r"dtype float64 in big-endian byte order"),
    "bool buffer": (memoryview(np.zeros(3, bool)), r"dtype bool is not"),
    "fp8 scale type": (np.zeros(3, ml_dtypes.float8_e8m0fnu), r"dtype float8_e8m0fnu is not a type of weights"),
    "int4": (np.zeros(3, ml_dtypes.int4), r"dtype int4 is not supported"),
    "masked": (np.ma.masked_equal([1.0, 2.0, 2.0], 2.0), r"2 masked values"),
    "quantized": (quantized("int4_g128"), r"already quantized \(int4_g128\)"),
    "nulls": (pa.array([1.0, None, 2.0]), r"1 nulls among 3 values of double, the first at 1"),
    "null list": (pa.array([[1.0], None]), r"1 nulls among 2 values of list<item: double>, the first at 1"),
    "nulls in lists": (pa.array([[1.0, 2.0], [3.0, None]])[1:], r"1 nulls among 2 values of double, the first at 1"),
    "null rows of fixed lists": (pa.array([None, [1.0]], pa.list_(pa.float32(), 1)), r"the first at 0"),
    "null structs": (pa.array([{"w": 1.0}, None]), r"1 nulls among 2 values of struct"),
    "all null": (pa.nulls(2), r"2 nulls among 2"),
    "ragged": (pa.array([[1.0], [2.0], [3.0, 4.0]]), r"ragged lists: row 0 has 1 items and row 2 has 2"),
    "ragged inside": (pa.array([[[1.0], [2.0, 3.0]]]), r"ragged lists: row 0 has 1 items and row 1 has 2"),
    "ragged chunks": (pa.chunked_array([[[1.0]], [[1.0, 2.0]]]), r"rows of chunk 1 have shape \[2\], rows of .*\[1\]"),
    "no rows": (pa.array([], pa.list_(pa.float32())), r"list<item: float> of no rows does not tell a row length"),
    "no chunks": (pa.chunked_array([], pa.large_list(pa.float32())), r"of no rows does not tell"),
    "no inner rows": (pa.array([[], []], pa.list_(pa.list_(pa.float32()))), r"of no rows does not tell"),
    "arrow bool": (pa.array([True]), r"Arrow type bool cannot be read"),
    "arrow string": (pa.array(["a"]), r"Arrow type string cannot be read"),
    "arrow binary": (pa.array([b"ab"], pa.binary(2)), r"Arrow type fixed_size_binary\[2\] cannot be read"),
    "arrow decimal": (pa.array([1], pa.decimal128(5)), r"Arrow type decimal128\(5, 0\).*cast it to float64"),
    "arrow strings in lists": (pa.array([["a"]]), r"Arrow type string cannot be read"),
    "contested permutation": (
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((2, 3, 4, 5), np.float32).transpose(0, 2, 3, 1)),
        r"fixed-shape tensors with permutation \[2, 0, 1\] are written in two ways",
    ),
    "dictionary": (pa.array([1.0]).dictionary_encode(), r"Arrow type dictionary.*dictionary_decode"),
    "run-end encoded": (pa.RunEndEncodedArray.from_arrays([2], [1.0]), r"Arrow type run_end_encoded.*decode"),
    "list view": (pa.array([[1.0]], pa.list_view(pa.float32())), r"Arrow type list_view.*cast it to list"),
    "date": (pa.array([0], pa.date32()), r"Arrow type date32"),
    "struct": (pa.array([{"a": 1.0, "b": 2.0}]), r"Arrow type struct<a: double, b: double>.*pass one of its fields"),
    "table": (pa.table({"a": [1.0], "b": [2.0]}), r"Arrow type struct<a: double, b: double>.*pass one of its fields"),
    "own extension": (
        pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1], pa.int8())),
        r"Arrow type extension<arrow\.bool8>.*pass its \.storage",
    ),
    "opaque of something": (
        pa.ExtensionArray.from_storage(pa.opaque(pa.uint16(), "posit16", "x"), pa.array([1], pa.uint16())),
        r"uint16 values marked as 'posit16'",
    ),
    "mark of another width": (
        pa.array([[1]], pa.list_(pa.field("item", pa.uint32(), metadata={"arrowquant.dtype": "bfloat16"}))),
        r"uint32 values marked as bfloat16; its bits are uint16",
    ),
    "buffer of pointers": (memoryview((ctypes.c_void_p * 2)()), r"memoryview with buffer format '<P' cannot be read"),
    "failing stream": (NoStream(), r"NoStream cannot be read as Arrow: the file is gone"),
    "gradient": (RequiresGrad(), r"RequiresGrad cannot be exported through DLPack: .*tensor\.detach\(\)"),
    "no capsule": (NotACapsule(), r"NotACapsule\.__dlpack__\(\) gave <object.*not an unused DLPack capsule"),
    "no device": (NoDevice(), r"NoDevice cannot be exported through DLPack: Unknown device type meta"),
    "rocm": (
        DlpackProducer(np.zeros(2, np.float32), device=(10, 0)),
        r"DLPack device type 10 \(ROCm\); copy it to CPU or CUDA",
    ),
    "metal": (DlpackProducer(np.zeros(2, np.float32), device=(8, 0)), r"device type 8 \(Metal\)"),
    "unknown device": (DlpackProducer(np.zeros(2, np.float32), device=(99, 0)), r"device type 99 \(unknown\)"),
    "dlpack bool": (DlpackProducer(np.zeros(2, bool), code=6), r"DLPack dtype bool with 8 bits and 1 lanes"),
    "dlpack complex": (DlpackProducer(np.zeros(2, np.complex64), code=5), r"DLPack dtype complex with 64 bits"),
    "dlpack float4": (DlpackProducer(np.zeros(2, np.uint8), code=17, bits=4), r"DLPack dtype float4_e2m1fn with 4"),
    "dlpack lanes": (DlpackProducer(np.zeros(2, np.float32), lanes=4), r"DLPack dtype float with 32 bits and 4 lanes"),
    "dlpack unknown": (DlpackProducer(np.zeros(2, np.float32), code=77), r"DLPack dtype of code 77"),
    "dlpack null": (DlpackProducer(np.zeros((2, 3)), data=None), r"DlpackProducer exports shape \[2, 3\] and no data"),
    "dlpack 2.0": (DlpackProducer(np.zeros(2, np.float32), major=2), r"exports DLPack 2\.0; this reads 1\.x"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str) -> None:
    x, words = REFUSED[what]
    with pytest.raises(InputError, match=rf"^layer\.7: .*{words}"):
        as_weights(x, name="layer.7")


def test_a_capsule_is_read_once() -> None:
    capsule = DlpackProducer(np.zeros(2, np.float32)).__dlpack__()

    class Twice:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0

        def __dlpack__(self, **options: Any) -> Any:
            return capsule

    as_weights(Twice())
    with pytest.raises(InputError, match="not an unused DLPack capsule"):
        as_weights(Twice())
