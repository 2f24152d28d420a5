"""Rows of weights: every way to hold them is read in place as the same arrays; what cannot be read says why."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu.arrow_values import DTYPE_KEY
from arrowquant_gpu.errors import InputError
from arrowquant_gpu.tables import Layer, Problem
from arrowquant_gpu.tables.weights import Rows

from . import weight_rows
from .bitwise import assert_bitwise_equal
from .weight_rows import DTYPES, batch, fixed, flat, layers, make, nested

WAYS: dict[str, Callable[[Sequence[np.ndarray]], pa.Array]] = {
    "list": lambda a: flat(a, "list"),
    "large_list": lambda a: flat(a, "large_list"),
    "nested": lambda a: nested(a, "list"),
    "nested large": lambda a: nested(a, "large_list"),
    "fixed": fixed,
}


def read(*batches: pa.RecordBatch) -> list[Layer]:
    """The layers of a whole input. Raises the first problem."""
    rows = Rows(batches[0].schema)
    found = [row for b in batches for row in rows.layers(b)] + list(rows.finish())
    for row in found:
        if isinstance(row, Problem):
            raise row.error
    return found


def check(found: Sequence[Layer], arrays: dict[str, np.ndarray]) -> None:
    assert [x.name for x in found] == list(arrays)
    for x, a in zip(found, arrays.values(), strict=True):
        assert (x.shape, x.dtype) == (a.shape, a.dtype.name)
        assert not x.weights.flags.writeable
        assert_bitwise_equal(x.weights.reshape(a.shape), a, x.name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_hold_weights(way: str, dtype: str) -> None:
    arrays = layers([(3, 5)] * 3, dtype)
    column, shapes = WAYS[way](list(arrays.values())), pa.array([[3, 5]] * 3)
    check(read(batch(list(arrays), column, shape=shapes)), arrays)
    if column.type.value_field.name == "item" and "nested" in way:
        check(read(batch(list(arrays), column)), arrays)
    # Of a slice only what it covers.
    part = dict(list(arrays.items())[1:2])
    check(read(batch(list(arrays), column, shape=shapes).slice(1, 1)), part)


@pytest.mark.parametrize("kind", ["list", "large_list"])
def test_flat_lists_without_a_shape_are_one_row(kind: str) -> None:
    arrays = layers([(7,), (1,), (0,), (130,)])
    check(read(batch(list(arrays), flat(list(arrays.values()), kind))), arrays)


def test_nesting_is_the_shape_and_may_differ_from_row_to_row() -> None:
    arrays = layers([(3, 5), (2, 7), (4, 1)])
    check(read(batch(list(arrays), nested(list(arrays.values())))), arrays)
    deep = layers([(2, 3, 5), (1, 4, 2)], "float16")
    check(read(batch(list(deep), nested(list(deep.values()), "large_list"))), deep)


def test_what_python_lists_become() -> None:
    made = pa.record_batch({"layer_name": ["a"], "weights": [[[1.0, 2.0], [3.0, 4.0]]]})
    assert made.schema.field("weights").type == pa.list_(pa.list_(pa.float64()))
    check(read(made), {"a": np.array([[1.0, 2.0], [3.0, 4.0]])})


@pytest.mark.parametrize(
    "shape",
    [
        pa.array([[2, 3]], pa.list_(pa.int64())),
        pa.array([[2, 3]], pa.large_list(pa.uint8())),
        pa.array([[2, 3]], pa.list_(pa.int32(), 2)),
        pa.array([[(2, 3)]]),
        pa.array([[[2, 3]]], pa.large_list(pa.list_(pa.int64()))),
    ],
)
def test_ways_to_write_a_shape(shape: pa.Array) -> None:
    arrays = layers([(2, 3)])
    check(read(batch(["layer.0"], flat(list(arrays.values())), shape=shape)), arrays)


def test_a_scalar_an_empty_tensor_and_a_shape_that_is_null() -> None:
    arrays = {"scalar": make(()), "empty": make((0, 4)), "vector": make((6,))}
    shapes = pa.array([[], [0, 4], None], pa.list_(pa.int64()))
    check(read(batch(list(arrays), flat(list(arrays.values())), shape=shapes)), arrays)
    nothing = pa.nulls(3)
    check(
        read(batch(list(arrays), flat([make((1,)), make((2,)), make((3,))]), shape=nothing)),
        {name: make((n,)) for name, n in zip(arrays, (1, 2, 3), strict=True)},
    )


@pytest.mark.parametrize(
    "names",
    [
        pa.array(["a", "b"]),
        pa.array(["a", "b"], pa.large_string()),
        pa.array(["a", "b"], pa.string_view()),
        pa.array(["a", "b"]).dictionary_encode(),
    ],
)
def test_ways_to_write_a_name(names: pa.Array) -> None:
    column = flat([make((2,)), make((3,))])
    made = pa.RecordBatch.from_arrays([names, column], ["layer_name", "weights"])
    check(read(made), {"a": make((2,)), "b": make((3,))})


@pytest.mark.parametrize("mark", [b"bfloat16", b"float8_e4m3fn"])
@pytest.mark.parametrize("way", ["flat", "nested", "opaque"])
def test_marked_bits(mark: bytes, way: str) -> None:
    a = make((2, 3), mark.decode())
    if way == "opaque":
        bits = pa.array(a.reshape(-1).view(f"uint{a.itemsize * 8}"))
        items = pa.ExtensionArray.from_storage(pa.opaque(bits.type, mark.decode(), "x"), bits)
        column = pa.ListArray.from_arrays(pa.array([0, 6], pa.int32()), items)
    else:
        column = flat([a]) if way == "flat" else nested([a])
    check(read(batch(["a"], column, shape=[[2, 3]])), {"a": a})


@pytest.mark.parametrize("kind", ["list", "large_list"])
def test_weights_are_read_where_they_are(kind: str) -> None:
    a = make((64, 32))
    [x] = read(batch(["a"], flat([a], kind), shape=[[64, 32]]))
    assert x.weights.ctypes.data == a.ctypes.data
    deep = nested([a, a[:2]], kind)
    first, second = read(batch(["a", "b"], deep))
    values = deep.values.values.buffers()[1].address
    assert first.weights.ctypes.data == values
    assert second.weights.ctypes.data == values + a.nbytes
    square = fixed([a])
    [x] = read(batch(["a"], square))
    assert x.weights.ctypes.data == square.values.values.buffers()[1].address


def test_views_keep_the_memory() -> None:
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    column = pa.array([[float(i) for i in range(1000)]], pa.list_(pa.float32()), memory_pool=pool)
    [x] = read(batch(["a"], column))
    del column
    assert pool.bytes_allocated() > 0
    assert x.weights[0, -1] == 999
    del x
    assert pool.bytes_allocated() == 0


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=6),
    st.sampled_from(["list", "large_list"]),
    st.sampled_from(DTYPES),
    st.integers(0, 5),
    st.data(),
)
def test_any_rows_in_any_chunks(
    shapes: list[list[int]], kind: str, dtype: str, start: int, data: st.DataObject
) -> None:
    """Flat lists with shapes, cut into record batches anywhere, from any row on."""
    arrays = layers([tuple(s) for s in shapes], dtype)
    whole = batch(list(arrays), flat(list(arrays.values()), kind), shape=pa.array(shapes, pa.list_(pa.int64())))
    start = min(start, len(arrays) - 1)
    cuts = sorted(data.draw(st.sets(st.integers(start, len(arrays)), max_size=3)) | {start, len(arrays)})
    parts = [whole.slice(a, b - a) for a, b in itertools.pairwise(cuts)]
    check(read(*parts), dict(list(arrays.items())[start:]))


# --- Rows of one tensor ----------------------------------------------------------------------------------------------


def cut(a: np.ndarray, at: Sequence[int], **changed: Any) -> pa.RecordBatch:
    """A matrix as rows of the table, each with whole rows of it."""
    parts = np.split(a, at)
    n = len(parts)
    columns: dict[str, Any] = {
        "shape": pa.array([list(a.shape)] * n, pa.list_(pa.int64())),
        "chunk": pa.array(range(n), pa.uint32()),
        "n_chunks": pa.array([n] * n, pa.uint32()),
    }
    return batch(["a"] * n, flat(parts), **(columns | changed))


def test_a_tensor_in_several_rows() -> None:
    a = make((7, 5))
    found = read(cut(a, [1, 4]))
    assert [(x.name, x.shape, x.chunk, x.n_chunks, x.weights.shape) for x in found] == [
        ("a", (7, 5), 0, 3, (1, 5)),
        ("a", (7, 5), 1, 3, (3, 5)),
        ("a", (7, 5), 2, 3, (3, 5)),
    ]
    assert_bitwise_equal(np.concatenate([x.weights for x in found]), a)
    whole = cut(a, [1, 4])
    assert [x.chunk for x in read(whole.slice(0, 2), whole.slice(2))] == [0, 1, 2]


def test_rows_of_several_tensors_may_be_mixed() -> None:
    a, b = make((4, 3)), make((2, 3), seed=1)
    rows = pa.Table.from_batches([cut(a, [2]), cut(b, [1])]).to_pydict()
    rows["layer_name"] = ["a", "a", "b", "b"]
    mixed = pa.table(rows).cast(pa.schema([(f.name, f.type) for f in cut(a, [2]).schema])).take([0, 2, 1, 3])
    [one] = mixed.combine_chunks().to_batches()
    assert [(x.name, x.chunk) for x in read(one)] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


CHUNKS: dict[str, tuple[Callable[[np.ndarray], pa.RecordBatch], str]] = {
    "missing": (lambda a: cut(a, [1, 4]).slice(0, 2), "2 of its 3 chunks"),
    "not the first": (lambda a: cut(a, [1, 4]).slice(1), "chunk 1 of 3, where chunk 0 of 3 must be"),
    "twice": (lambda a: cut(a, [1, 4], chunk=[0, 1, 1]), "chunk 1 of 3, where chunk 2"),
    "more than there are": (lambda a: cut(a, [1, 4], chunk=[0, 1, 3]), "chunk 3 of 3 is no part"),
    "negative": (lambda a: cut(a, [1, 4], chunk=[-1, 0, 1]), "chunk -1 of 3 is no part"),
    "none": (lambda a: cut(a, [1, 4], n_chunks=[0, 0, 0]), "chunk 0 of 0 is no part"),
    "null": (lambda a: cut(a, [1, 4], chunk=[0, None, 2]), "chunk None of 3"),
    "another number": (lambda a: cut(a, [1, 4], n_chunks=[3, 4, 3]), "chunk 1 of 4, where chunk 1 of 3"),
    "another shape": (lambda a: cut(a, [1, 4], shape=[[7, 5], [7, 5], [8, 5]]), "float32 \\[8, 5\\], and chunk 0 of"),
    "no whole rows": (lambda a: cut(a, [1, 4], shape=[[5, 7]] * 3), "5 weights, which are no whole rows"),
    "too few rows": (lambda a: cut(a[:6], [1, 4], shape=[[7, 5]] * 3), "6 rows, and \\[7, 5\\] has 7"),
    "too many rows": (lambda a: cut(a, [1, 4], shape=[[3, 5]] * 3), "4 rows, and \\[3, 5\\] has 3"),
}


@pytest.mark.parametrize("case", CHUNKS)
def test_chunks_that_do_not_make_a_tensor(case: str) -> None:
    made, text = CHUNKS[case]
    with pytest.raises(InputError, match=text) as e:
        read(made(make((7, 5))))
    assert str(e.value).startswith("a: ")


def test_a_tensor_is_not_gone_on_with_after_a_bad_row() -> None:
    rows = Rows(cut(make((7, 5)), [1, 4]).schema)
    found = list(rows.layers(cut(make((7, 5)), [1, 4], chunk=[0, 5, 2])))
    assert [type(x).__name__ for x in found] == ["Layer", "Problem", "Problem"]
    assert "complete, or refused" in str(found[2].error)
    assert list(rows.finish()) == []


# --- What cannot be read ---------------------------------------------------------------------------------------------


def one(weights: Any, **columns: Any) -> pa.RecordBatch:
    return batch(["fc"], weights if isinstance(weights, pa.Array) else pa.array(weights), **columns)


FLAT = pa.array([[1.0, 2.0]], pa.list_(pa.float32()))
SCHEMAS: dict[str, tuple[Callable[[], pa.RecordBatch], str]] = {
    "no name": (lambda: pa.record_batch({"weights": FLAT}), "'layer_name' is missing.*has weights"),
    "no weights": (lambda: pa.record_batch({"layer_name": ["a"]}), "'weights' is missing"),
    "two of one": (
        lambda: pa.RecordBatch.from_arrays([pa.array(["a"]), FLAT, FLAT], ["layer_name", "weights", "weights"]),
        "'weights' is there twice",
    ),
    "two shapes": (
        lambda: pa.RecordBatch.from_arrays(
            [pa.array(["a"]), FLAT, pa.array([[2]]), pa.array([[2]])], ["layer_name", "weights", "shape", "shape"]
        ),
        "'shape' is there twice",
    ),
    "names are numbers": (lambda: pa.record_batch({"layer_name": [1], "weights": FLAT}), "is int64; it must be string"),
    "names are bytes": (lambda: pa.record_batch({"layer_name": [b"a"], "weights": FLAT}), "is binary"),
    "weights are numbers": (lambda: pa.record_batch({"layer_name": ["a"], "weights": [1.0]}), "must hold a list"),
    "weights are text": (lambda: pa.record_batch({"layer_name": ["a"], "weights": ["x"]}), "must hold a list"),
    "shape is a number": (lambda: one(FLAT, shape=[2]), "'shape' is int64; it must be a list of integers"),
    "shape is text": (lambda: one(FLAT, shape=["2"]), "'shape' is string"),
    "shape of floats": (lambda: one(FLAT, shape=[[2.0]]), "'shape' is list<item: double>"),
    "shape too deep": (lambda: one(FLAT, shape=[[[[2]]]]), "'shape' is list"),
    "chunk alone": (lambda: one(FLAT, shape=[[2]], chunk=[0]), "go together"),
    "chunk of floats": (lambda: one(FLAT, shape=[[2]], chunk=[0.0], n_chunks=[1]), "'chunk' is double"),
    "chunk without shape": (lambda: one(FLAT, chunk=[0], n_chunks=[1]), "'shape' is missing"),
}


@pytest.mark.parametrize("case", SCHEMAS)
def test_columns_that_cannot_hold_weights(case: str) -> None:
    made, text = SCHEMAS[case]
    with pytest.raises(InputError, match=text):
        Rows(made().schema)


ROWS: dict[str, tuple[Callable[[], pa.RecordBatch], str]] = {
    "null weights": (lambda: one(pa.array([None], pa.list_(pa.float32()))), "fc: its weights are null"),
    "a null": (lambda: one([[1.0, None]]), "fc: 1 nulls among 2"),
    "a null list": (lambda: one(pa.array([[[1.0], None]])), "fc: 1 nulls among 2"),
    "ragged": (lambda: one([[[1.0, 2.0], [3.0]]]), "fc: ragged lists: row 0 has 2 items and row 1 has 1"),
    "bool": (lambda: one([[True]]), "fc: Arrow type bool"),
    "text": (lambda: one([["x"]]), "fc: Arrow type string"),
    "nothing": (lambda: one([[]]), "fc: Arrow type null"),
    "decimal": (lambda: one(pa.array([[1]]).cast(pa.list_(pa.decimal128(20)))), "fc: Arrow type decimal"),
    "too small a shape": (lambda: one(FLAT, shape=[[1]]), "fc: shape \\[1\\] has 1 weights, and the row has 2"),
    "a negative size": (lambda: one(FLAT, shape=[[-1, -2]]), "fc: shape is \\[-1, -2\\]"),
    "a null size": (lambda: one(FLAT, shape=[[2, None]]), "fc: shape is \\[2, None\\]"),
    "two shapes in one": (lambda: one(FLAT, shape=[[[1], [2]]]), "fc: shape is \\[\\[1\\], \\[2\\]\\]"),
    "a shape in null": (lambda: one(FLAT, shape=pa.array([[None]], pa.list_(pa.list_(pa.int64())))), "fc: shape is"),
    "an enormous shape": (lambda: one(FLAT, shape=[[2**62, 2**62]]), "fc: shape"),
    "no name": (lambda: batch([None], FLAT), "row 0: layer_name is null"),
    "an empty name": (lambda: batch([""], FLAT), "row 0: layer_name is empty"),
    "a name twice": (lambda: batch(["fc", "fc"], flat([make((2,))] * 2)), "fc: this layer_name is there twice"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_cannot_be_read(case: str) -> None:
    made, text = ROWS[case]
    with pytest.raises(InputError, match=text):
        read(made())


def test_a_name_whose_first_row_was_refused() -> None:
    weights = pa.array([[None], [1.0]], pa.list_(pa.float32()))
    with pytest.raises(InputError, match="fc: 1 nulls"):
        read(batch(["fc", "fc"], weights))
    rows = list(Rows(batch(["fc"], FLAT).schema).layers(batch(["fc", "fc"], weights)))
    assert "there twice" in str(rows[1].error)


def test_a_mark_that_means_nothing() -> None:
    for mark, text in ((b"float4", "cannot be read"), (b"float8_e5m2", "its bits are uint8")):
        item = pa.field("item", pa.uint16(), metadata={DTYPE_KEY: mark})
        with pytest.raises(InputError, match=text):
            read(one(pa.array([[1]], pa.list_(item))))


def test_a_name_that_comes_again_in_a_later_batch() -> None:
    with pytest.raises(InputError, match="fc: this layer_name is there twice"):
        read(one(FLAT), one(FLAT))


def test_batches_of_other_types_and_of_other_columns() -> None:
    first, second = one(FLAT), batch(["b"], flat([make((3,), "float16")], "large_list"))
    check(read(first, second), {"fc": np.array([1, 2], np.float32), "b": make((3,), "float16")})
    with pytest.raises(InputError, match="'weights' is missing"):
        read(first, pa.record_batch({"layer_name": ["b"]}))
    with pytest.raises(InputError, match="with columns chunk and n_chunks comes after one without"):
        read(first, cut(make((2, 2)), [1]))


def test_a_bad_row_does_not_hide_the_others() -> None:
    weights = pa.array([[1.0, 2.0], [None, 1.0], None, [3.0]], pa.list_(pa.float32()))
    rows = list(Rows(batch(["a", "b", "c", "d"], weights).schema).layers(batch(["a", "b", "c", "d"], weights)))
    assert [x.name if isinstance(x, Layer) else x.layer for x in rows] == ["a", "b", "c", "d"]
    assert [isinstance(x, Layer) for x in rows] == [True, False, False, True]


def test_the_comparator_sees_an_exchanged_row() -> None:
    arrays = layers([(4,), (4,)])
    found = read(batch(list(arrays), flat(list(reversed(arrays.values())))))
    with pytest.raises(AssertionError):
        check(found, arrays)
    assert weight_rows.make((4,)).dtype == np.float32
