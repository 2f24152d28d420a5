"""Tables, record batches and streams quantized: the bytes of `ops.quantize`, input order, no copies, bounded memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nanoarrow
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowquant_gpu import arrow_columns, ops
from arrowquant_gpu.errors import ArrowQuantError, InputError, NonFiniteError, ScaleOverflowError, SchemeError
from arrowquant_gpu.schemes import MAX_GROUP_SIZE, Scheme
from arrowquant_gpu.tables import ERRORS_KEY, Layer, problems_json
from arrowquant_gpu.tables.quantize import TableQuantizer, quantize_stream, quantize_table
from arrowquant_gpu.tables.results import result_schema
from arrowquant_gpu.tensor import QuantizedTensor

from . import weight_rows
from .bitwise import assert_bitwise_equal
from .producers import StreamProducer
from .weight_rows import batch, flat, layers, make, nested, same, table

ROOT = Path(__file__).parent.parent
DEVICES = ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SCHEMES = ["int4_g128_asym", "int2_g16", "int3_channel_asym_bf16", "int8_tensor", "int5_g24_f16", "int6_tensor_asym"]
SHAPES = [(), (0,), (5, 0), (7,), (3, 130), (2, 3, 40), (0, 4)]


def bad(a: np.ndarray) -> np.ndarray:
    changed = a.copy()
    changed.reshape(-1)[0] = np.nan
    return changed


# --- Bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", weight_rows.DTYPES)
def test_rows_are_what_quantize_gives(device: str, scheme: str, dtype: str) -> None:
    arrays = layers(SHAPES, dtype)
    weight_rows.check(quantize_table(table(arrays), scheme, device=device), arrays, scheme)


def test_the_columns_of_results() -> None:
    kinds = {f.name: str(f.type) for f in result_schema()}
    assert kinds == {
        "layer_name": "string",
        "quantized_data": "large_binary",
        "scales": "list<item: float>",
        "zero_points": "list<item: uint8>",
        "shape": "list<item: int64>",
        "bit_width": "uint8",
        "group_size": "uint32",
        "scheme": "string",
        "dtype": "string",
    }
    cut = result_schema("bfloat16", is_cut=True, is_large=True)
    assert cut.names[-2:] == ["chunk", "n_chunks"]
    assert str(cut.field("scales").type) == "large_list<item: uint16>"
    assert cut.field("scales").type.value_field.metadata == {b"arrowquant.dtype": b"bfloat16"}
    assert cut.metadata[b"arrowquant.scale_dtype"] == b"bfloat16"
    result = quantize_table(table(layers([(3, 40)])), "int4_channel", device="cpu")
    assert result.schema == result_schema()
    result.validate(full=True)
    row = result.to_pylist()[0]
    assert (row["shape"], row["bit_width"], row["group_size"]) == ([3, 40], 4, None)
    assert (row["zero_points"], row["scheme"], row["dtype"]) == (None, "int4_channel", "float32")


def test_the_default_scheme_is_the_one_of_the_documents() -> None:
    assert quantize_table(table(layers([(3, 4)])), device="cpu")["scheme"].to_pylist() == ["int4_g128_asym"]


class ArrayProducer:
    """Exports one record batch through `__arrow_c_array__` and nothing else."""

    def __init__(self, data: pa.RecordBatch) -> None:
        self.data = data

    def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
        return self.data.__arrow_c_array__(requested_schema)


WAYS_IN: dict[str, Callable[[pa.Table], Any]] = {
    "table": lambda t: t,
    "one chunk": lambda t: t.combine_chunks(),
    "reader": lambda t: t.to_reader(),
    "stream": StreamProducer,
    "record batch": lambda t: t.combine_chunks().to_batches()[0],
    "array": lambda t: ArrayProducer(t.combine_chunks().to_batches()[0]),
    "struct": lambda t: t.combine_chunks().to_batches()[0].to_struct_array(),
    "nanoarrow stream": nanoarrow.ArrayStream,
    "nanoarrow array": lambda t: nanoarrow.Array(t.combine_chunks().to_batches()[0]),
}


@pytest.mark.parametrize("way", WAYS_IN)
def test_every_way_in(way: str) -> None:
    arrays = layers([(3, 40), (7,), (2, 130)])
    weight_rows.check(quantize_table(WAYS_IN[way](table(arrays)), "int4_g32", device="cpu"), arrays, "int4_g32")
    stream, problems = quantize_stream(WAYS_IN[way](table(arrays)), "int4_g32", device="cpu")
    weight_rows.check(stream.read_all(), arrays, "int4_g32")
    assert problems == []


def test_what_is_no_table() -> None:
    for x in (None, 5, "a.parquet", {"fc": np.ones(3)}, pa.array([1.0])):
        with pytest.raises(InputError, match=r"is no Arrow table|cannot be read as an Arrow table"):
            quantize_table(x)


def test_slices_and_other_columns() -> None:
    arrays = layers([(3, 40), (7,), (2, 130), (4, 16)])
    wide = table(arrays).append_column("note", pa.array(["x"] * 4))
    part = dict(list(arrays.items())[1:3])
    weight_rows.check(quantize_table(wide.slice(1, 2), "int8_g32", device="cpu"), part, "int8_g32")
    one = wide.combine_chunks().slice(1, 2)
    weight_rows.check(quantize_table(one, "int8_g32", device="cpu"), part, "int8_g32")
    deep = batch(list(arrays), nested([make((2, 3)), make((1, 3)), make((5, 1)), make((2, 2))]))
    got = quantize_table(deep.slice(2), "int8_g32", device="cpu")
    assert got["shape"].to_pylist() == [[5, 1], [2, 2]]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=7),
    st.sampled_from(SCHEMES),
    st.sampled_from(("float32", "float16", "bfloat16", "float64")),
    st.sets(st.integers(0, 6)),
    st.booleans(),
)
@settings(max_examples=60)
def test_any_table_with_any_bad_layers(
    shapes: list[tuple[int, int]], scheme: str, dtype: str, where: set[int], is_stream: bool
) -> None:
    """Good rows are as if the bad ones had never been there, and every layer is in the one list or the other."""
    arrays = layers(shapes, dtype)
    broken = {name for i, name in enumerate(arrays) if i in where and arrays[name].size}
    given_ = table({name: bad(a) if name in broken else a for name, a in arrays.items()})
    good = {name: a for name, a in arrays.items() if name not in broken}
    if is_stream:
        stream, problems = quantize_stream(given_, scheme, device="cpu", continue_on_error=True)
        result, found = stream.read_all(), [p.layer for p in problems]
    else:
        result = quantize_table(given_, scheme, device="cpu", continue_on_error=True)
        metadata = result.schema.metadata.get(ERRORS_KEY, b"[]")
        found = [row["layer"] for row in json.loads(metadata)]
    weight_rows.check(result, good, scheme)
    assert sorted(found) == sorted(broken)
    result.validate(full=True)


# --- Schemes ---------------------------------------------------------------------------------------------------------


def by_size(layer: Layer) -> Scheme:
    return Scheme.parse("int8_g16" if layer.shape[-1] < 30 else "int2_channel_asym")


def test_a_scheme_for_each_layer() -> None:
    arrays = layers([(3, 40), (7, 16), (2, 130)])
    result = quantize_table(table(arrays), by_size, device="cpu")
    assert result["scheme"].to_pylist() == ["int2_channel_asym", "int8_g16", "int2_channel_asym"]
    assert result["zero_points"].is_null().to_pylist() == [False, True, False]
    for row, (name, a) in enumerate(arrays.items()):
        want = ops.quantize(a, result["scheme"][row].as_py(), device="reference")
        same(QuantizedTensor.from_arrow(result, row), want, name)


def test_schemes_that_store_other_scales_are_refused() -> None:
    """They would be read as what they are not."""
    given_ = table(layers([(3, 40)]))
    with pytest.raises(SchemeError, match=r"layer\.0: int4_g32_f16 has float16 scales, and those of this table are"):
        quantize_table(given_, lambda _: Scheme.parse("int4_g32_f16"), device="cpu")
    quantizer = TableQuantizer(given_.schema, lambda _: Scheme.parse("int4_g32_f16"), scale_dtype="float16")
    assert quantizer.table(given_.to_batches())["scales"].type == pa.list_(pa.float16())
    with pytest.raises(SchemeError, match="int4_g32 has float32 scales"):
        TableQuantizer(given_.schema, "int4_g32", scale_dtype="float16")
    with pytest.raises(SchemeError, match="scale dtype 'float64'"):
        TableQuantizer(given_.schema, by_size, scale_dtype="float64")
    with pytest.raises(SchemeError, match="9 bits"):
        quantize_table(given_, "int9_g32")


def test_an_error_of_the_choice_is_the_layers() -> None:
    def choose(layer: Layer) -> Scheme:
        if layer.name == "layer.1":
            raise InputError("layer.1: no scheme for it")
        return Scheme.parse("int4_g32")

    arrays = layers([(3, 40)] * 3)
    with pytest.raises(InputError, match=r"layer\.1: no scheme"):
        quantize_table(table(arrays), choose, device="cpu")
    result = quantize_table(table(arrays), choose, device="cpu", continue_on_error=True)
    assert result["layer_name"].to_pylist() == ["layer.0", "layer.2"]


# --- Problems --------------------------------------------------------------------------------------------------------


def test_an_error_names_layer_and_value() -> None:
    arrays = layers([(3, 40), (2, 5)])
    arrays["layer.1"][1, 2] = np.inf
    with pytest.raises(NonFiniteError, match=r"layer\.1: 0 NaN and 1 infinite.*flat index 7 of shape \[2, 5\]"):
        quantize_table(table(arrays), device="cpu")
    with pytest.raises(NonFiniteError, match=r"flat index 0 of shape \[7\]"):
        quantize_table(table({"layer.0": bad(make((7,)))}), device="cpu")
    with pytest.raises(ScaleOverflowError, match=r"layer\.0: 3 scales do not fit float16"):
        quantize_table(table({"layer.0": np.full((3, 4), 3e38, np.float32)}), "int4_channel_f16", device="cpu")
    with pytest.raises(InputError, match="the table of weights has no rows"):
        quantize_table(table(arrays).slice(0, 0), device="cpu")
    with pytest.raises(InputError, match="the table of weights has no rows"):
        quantize_table(StreamProducer(table(arrays).slice(0, 0)), device="cpu")


def test_problems_are_in_the_metadata() -> None:
    names = ["good", "nan", "good", "null", "shape", "last"]
    weights = pa.array([[1.0, 2.0], [float("nan")], [1.0], None, [1.0], [5.0]], pa.list_(pa.float32()))
    given_ = batch(names, weights, shape=pa.array([[2], [1], [1], [1], [2], [1]]))
    result = quantize_table(given_, "int8_g32", device="cpu", continue_on_error=True)
    assert result["layer_name"].to_pylist() == ["good", "last"]
    listed = json.loads(result.schema.metadata[ERRORS_KEY])
    assert [(x["layer"], x["error"]) for x in listed] == [
        ("good", "InputError"),
        ("null", "InputError"),
        ("shape", "InputError"),
        ("nan", "NonFiniteError"),
    ]
    assert all(x["message"].startswith(f"{x['layer']}: ") for x in listed)
    same(QuantizedTensor.from_arrow(result, 1), ops.quantize(np.array([5], np.float32), "int8_g32"))
    assert result.schema.metadata[b"arrowquant.version"] == b"1"
    alone = quantize_table(given_.slice(1, 1), continue_on_error=True, device="cpu")
    assert alone.num_rows == 0
    assert ERRORS_KEY not in quantize_table(given_.slice(0, 1), continue_on_error=True, device="cpu").schema.metadata


@pytest.mark.parametrize("together", [1, 3000, 1 << 30])
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_layers_together_are_as_each_by_itself(together: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is quantized together, those that cannot be are left out, and the others have their own codes."""
    rng, done = np.random.default_rng(together), []
    arrays = {f"l{i}": rng.standard_normal((i % 5 + 1, 96)).astype(np.float32) for i in range(23)}
    given = table(arrays)
    want = quantize_table(given, "int4_g32_asym", device="reference")
    monkeypatch.setattr(ops, "TOGETHER_BYTES", together)
    assert quantize_table(given, "int4_g32_asym", device=device).equals(want)
    for name in ("l3", "l4", "l11"):
        arrays[name] = bad(arrays[name])
    result = quantize_table(table(arrays), "int4_g32_asym", device=device, continue_on_error=True, done=done.append)
    good = [name not in ("l3", "l4", "l11") for name in arrays]
    assert result.equals(want.filter(pa.array(good)))
    assert [p["layer"] for p in json.loads(result.schema.metadata[ERRORS_KEY])] == ["l3", "l4", "l11"]
    assert done == list(arrays)


def test_an_exception_of_the_caller_ends_the_work() -> None:
    seen: list[str] = []

    def stop(name: str) -> None:
        seen.append(name)
        if len(seen) == 2:
            raise KeyError(name)

    with pytest.raises(KeyError):
        quantize_table(table(layers([(3, 40)] * 4)), device="cpu", done=stop)
    assert seen == ["layer.0", "layer.1"]


# --- Tensors in several rows -----------------------------------------------------------------------------------------


def cut(arrays: dict[str, np.ndarray], rows: int) -> pa.Table:
    parts = []
    for name, a in arrays.items():
        pieces = [a[i : i + rows] for i in range(0, len(a), rows)]
        parts += [
            batch(
                [name],
                flat([piece]),
                shape=pa.array([list(a.shape)]),
                chunk=pa.array([i], pa.int64()),
                n_chunks=pa.array([len(pieces)], pa.int64()),
            )
            for i, piece in enumerate(pieces)
        ]
    return pa.Table.from_batches(parts)


def test_rows_of_one_tensor_are_quantized_as_they_come() -> None:
    arrays = layers([(7, 40), (3, 16)])
    result = quantize_table(cut(arrays, 3), "int4_g32_asym", device="cpu")
    assert result["chunk"].to_pylist() == [0, 1, 2, 0]
    assert result["n_chunks"].to_pylist() == [3, 3, 3, 1]
    assert result["shape"].to_pylist() == [[7, 40]] * 3 + [[3, 16]]
    tensors = list(arrow_columns.read_all(result))
    for name, a in arrays.items():
        want = ops.quantize(a, "int4_g32_asym", device="reference")
        got = [q for n, q in tensors if n == name]
        assert_bitwise_equal(np.concatenate([q.packed for q in got]), want.packed, f"{name} packed")
        assert_bitwise_equal(np.concatenate([q.scales for q in got]), want.scales, f"{name} scales")


def test_a_table_has_all_rows_of_a_tensor_or_none() -> None:
    arrays = layers([(7, 40), (3, 16)])
    arrays["layer.0"][4, 0] = np.nan
    result = quantize_table(cut(arrays, 3), device="cpu", continue_on_error=True)
    assert result["layer_name"].to_pylist() == ["layer.1"]
    [problem] = json.loads(result.schema.metadata[ERRORS_KEY])
    assert problem["layer"] == "layer.0"
    result = quantize_table(cut(layers([(7, 40), (3, 16)]), 3).slice(1), device="cpu", continue_on_error=True)
    assert result["layer_name"].to_pylist() == ["layer.1"]
    result = quantize_table(cut(layers([(3, 16), (7, 40)]), 3).slice(0, 3), device="cpu", continue_on_error=True)
    assert result["layer_name"].to_pylist() == ["layer.0"]
    # A complete tensor stays, whatever comes after it.
    twice = pa.concat_tables([cut(layers([(7, 40)]), 3), cut(layers([(7, 40)]), 3).slice(1, 1)])
    assert quantize_table(twice, device="cpu", continue_on_error=True).num_rows == 3


def test_a_stream_stops_at_the_bad_row_of_a_tensor() -> None:
    arrays = layers([(9, 40), (3, 16)])
    arrays["layer.0"][4, 0] = np.nan
    stream, problems = quantize_stream(cut(arrays, 3), device="cpu", continue_on_error=True)
    assert stream.read_all()["layer_name"].to_pylist() == ["layer.0", "layer.1"]
    assert [p.layer for p in problems] == ["layer.0"]


def test_one_scale_for_a_tensor_in_several_rows_is_refused() -> None:
    with pytest.raises(InputError, match=r"layer\.0: int8_tensor has one scale .* cut into 3 rows"):
        quantize_table(cut(layers([(7, 40)]), 3), "int8_tensor", device="cpu")
    assert quantize_table(cut(layers([(3, 40)]), 3), "int8_tensor", device="cpu").num_rows == 1


# --- Streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_read_as_its_result_is() -> None:
    given_ = table(layers([(3, 40)] * 4))
    asked: list[int] = []

    def batches() -> Iterator[pa.RecordBatch]:
        for i, one in enumerate(given_.to_batches()):
            asked.append(i)
            yield one

    stream, _ = quantize_stream(pa.RecordBatchReader.from_batches(given_.schema, batches()), device="cpu")
    assert asked == []
    assert stream.schema == result_schema()
    for i in range(4):
        stream.read_next_batch()
        assert asked == list(range(i + 1))


def test_a_stream_holds_one_batch_at_a_time() -> None:
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    field = pa.list_(pa.float32())
    held: list[int] = []

    def batches() -> Iterator[pa.RecordBatch]:
        for i in range(4):
            held.append(pool.bytes_allocated())
            yield batch([f"layer.{i}"], pa.array([[1.0] * 5000], field, memory_pool=pool))

    schema = batch(["x"], pa.array([[1.0]], field)).schema
    stream, _ = quantize_stream(pa.RecordBatchReader.from_batches(schema, batches()), device="cpu")
    results = list(stream)
    assert held == [0] * 4
    assert len(results) == 4
    assert pool.bytes_allocated() == 0


def test_an_error_arrives_where_the_stream_is_read() -> None:
    arrays = layers([(3, 40)] * 3)
    arrays["layer.1"] = bad(arrays["layer.1"])
    stream, _ = quantize_stream(table(arrays), device="cpu")
    assert stream.read_next_batch()["layer_name"].to_pylist() == ["layer.0"]
    with pytest.raises(NonFiniteError, match=r"layer\.1"):
        stream.read_next_batch()
    stream, problems = quantize_stream(table(arrays), device="cpu", continue_on_error=True)
    assert [b.num_rows for b in stream] == [1, 0, 1]
    assert [p.layer for p in problems] == ["layer.1"]


@pytest.mark.parametrize("error", [OSError("the line is down"), pa.ArrowInvalid("no magic")])
def test_a_stream_that_breaks_off(error: Exception) -> None:
    given_ = table(layers([(3, 40)]))

    def batches() -> Iterator[pa.RecordBatch]:
        yield from given_.to_batches()
        raise error

    with pytest.raises(InputError, match=r"broke off after 1 record batches: .*(line|magic)"):
        quantize_table(pa.RecordBatchReader.from_batches(given_.schema, batches()), device="cpu")


def test_an_error_of_the_source_passes() -> None:
    class MineError(ArrowQuantError):
        pass

    def batches() -> Iterator[pa.RecordBatch]:
        raise MineError("mine")
        yield

    reader = pa.RecordBatchReader.from_batches(table(layers([(1, 1)])).schema, batches())
    with pytest.raises(MineError):
        quantize_table(reader, device="cpu")


# --- Memory ----------------------------------------------------------------------------------------------------------


def buffers(result: pa.Table, column: str) -> list[int]:
    [chunk] = result[column].chunks
    return [b.address for b in chunk.buffers() if b is not None]


def test_results_are_one_allocation_that_refers_to_nothing_of_the_input() -> None:
    arrays = layers([(3, 40), (7, 16), (2, 130)])
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    rows = [a.reshape(-1).tolist() for a in arrays.values()]
    given_ = batch(
        list(arrays), pa.array(rows, pa.list_(pa.float32()), memory_pool=pool), shape=[[3, 40], [7, 16], [2, 130]]
    )
    result = quantize_table(given_, "int4_g32_asym", device="cpu")
    del given_
    assert pool.bytes_allocated() == 0
    assert all(result[c].num_chunks == 1 for c in result.column_names)
    addresses = [QuantizedTensor.from_arrow(result, i).packed.ctypes.data for i in range(3)]
    sizes = [ops.quantize(a, "int4_g32_asym").packed.nbytes for a in arrays.values()]
    base = buffers(result, "quantized_data")[1]
    assert addresses == [base + n for n in itertools.accumulate([0, *sizes[:-1]])]
    weight_rows.check(result, arrays, "int4_g32_asym")


_PEAK = """
import sys
from pathlib import Path
import numpy as np
from arrowquant_gpu.tables.quantize import quantize_table
from tests.weight_rows import table

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

given = table({f"layer.{i}": np.ones((1024, 1024), np.float32) for i in range(24)})
quantize_table(given.slice(0, 1), device="cpu")
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
result = quantize_table(given, device="cpu")
output = sum(b.size for c in result.columns for chunk in c.chunks for b in chunk.buffers() if b is not None)
print((status("VmHWM") - before - output) / (24 << 22))
"""


def test_memory_beyond_the_output() -> None:
    """Under 5 % of the input, in a process of its own."""
    command = [sys.executable, "-c", _PEAK]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.05


def test_over_two_gigabytes_and_two_to_the_31_weights() -> None:
    """Rows behind 2^31 weights in a list column, and behind 2 GiB in a binary one. The zeros take no memory."""
    rows = 2**31 // MAX_GROUP_SIZE
    items = np.zeros((rows + 1, MAX_GROUP_SIZE), np.float16)
    items[-1] = last = make((MAX_GROUP_SIZE,), "float16")
    ends = [0, rows * MAX_GROUP_SIZE, items.size]
    values = pa.Array.from_buffers(pa.float16(), items.size, [None, pa.py_buffer(items)])
    column = weight_rows.lists(ends, values, pa.field("item", pa.float16()), "large_list")
    given_ = batch(["zeros", "last"], column, shape=pa.array([[rows, MAX_GROUP_SIZE], [MAX_GROUP_SIZE]]))
    scheme = f"int8_g{MAX_GROUP_SIZE}"
    result = quantize_table(given_, scheme, device="cpu")
    same(QuantizedTensor.from_arrow(result, 1), ops.quantize(last, scheme, device="cpu"), "last")
    codes = QuantizedTensor.from_arrow(result, 0).packed
    assert codes.nbytes == 2**31
    assert all((codes[i : i + 64] == 128).all() for i in range(0, rows, 64))
    assert result["quantized_data"].chunk(0).buffers()[1].size == 3 * 8


def test_more_scales_than_a_list_of_a_stream_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from arrowquant_gpu.tables import results

    monkeypatch.setattr(results, "MAX_ITEMS", 5)
    arrays = layers([(3, 40), (4, 40)])
    result = quantize_table(table(arrays), "int4_channel_asym", device="cpu")
    assert result["scales"].type == pa.large_list(pa.float32())
    assert result["zero_points"].type == pa.large_list(pa.uint8())
    weight_rows.check(result, arrays, "int4_channel_asym")
    stream, _ = quantize_stream(table(arrays).combine_chunks(), "int4_channel_asym", device="cpu")
    with pytest.raises(InputError, match="2 rows has 7 scales, and a list column of a stream holds 5"):
        stream.read_all()


def test_problems_as_json() -> None:
    assert problems_json([]) == "[]"


def test_a_wrong_byte_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = layers([(3, 40), (7,)])
    result = quantize_table(table(arrays), "int4_g32", device="cpu")
    weight_rows.check(result, arrays, "int4_g32")
    arrays["layer.1"] = -arrays["layer.1"]
    with pytest.raises(AssertionError, match=r"layer\.1 packed"):
        weight_rows.check(result, arrays, "int4_g32")
