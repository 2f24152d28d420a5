"""Expressions of Arrow's compute engine: the rows of `quantize_table`, nulls, errors, and a registry for everybody."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from arrowquant_gpu import compute, ops
from arrowquant_gpu.errors import DeviceError, InputError, NonFiniteError, SchemeError
from arrowquant_gpu.tables.quantize import quantize_table
from arrowquant_gpu.tensor import QuantizedTensor

from . import weight_rows
from .bitwise import assert_bitwise_equal
from .weight_rows import batch, fixed, flat, layers, nested, table

ROOT = Path(__file__).parent.parent
FLAT = pa.list_(pa.float32())
NAMES = pc.field("layer_name")
WEIGHTS = pc.field("weights")


def rows(found: pa.Table) -> pa.Table:
    """The struct column as a table of results."""
    q = found["q"].combine_chunks()
    return pa.table({"layer_name": found["layer_name"], **{f.name: q.field(f.name) for f in q.type}})


def evaluated(given: pa.Table | ds.Dataset, scheme: str, **options: Any) -> pa.Table:
    dataset = given if isinstance(given, ds.Dataset) else ds.dataset(given)
    kind = dataset.schema.field("weights").type
    q = compute.quantize(WEIGHTS, scheme, type=kind, device="cpu", **options)
    return rows(dataset.to_table(columns={"layer_name": NAMES, "q": q}))


@pytest.mark.parametrize("scheme", ["int4_g128_asym", "int3_channel_bf16", "int8_tensor_f16", "int5_g24"])
@pytest.mark.parametrize("kind", ["list", "large_list"])
def test_an_expression_gives_the_rows_of_quantize_table(scheme: str, kind: str) -> None:
    arrays = layers([(3, 40), (7,), (2, 130), (0, 4)])
    given = table(arrays, kind)
    weight_rows.check(evaluated(given, scheme, shape=pc.field("shape")), arrays, scheme)
    vectors = {name: a.reshape(-1) for name, a in arrays.items()}
    weight_rows.check(evaluated(given, scheme), vectors, scheme)


@pytest.mark.parametrize("way", [nested, fixed])
@pytest.mark.parametrize("dtype", weight_rows.DTYPES)
def test_nesting_and_marks_are_seen(way: Any, dtype: str) -> None:
    """bfloat16 bits among them."""
    arrays = layers([(3, 5)] * 3, dtype)
    given = pa.Table.from_batches([batch(list(arrays), way(list(arrays.values())))])
    weight_rows.check(evaluated(given, "int8_g32"), arrays, "int8_g32")


def test_a_type_with_a_mark_is_not_the_one_without() -> None:
    a = weight_rows.make((2, 40), "bfloat16")
    marked = batch(["a"], flat([a]))
    plain = marked.set_column(1, "weights", pa.array([a.reshape(-1).view(np.uint16)]))
    assert marked.schema.field("weights").type == plain.schema.field("weights").type
    got = evaluated(pa.Table.from_batches([plain]), "int8_g32")
    weight_rows.check(got, {"a": a.reshape(-1).view(np.uint16)}, "int8_g32")
    weight_rows.check(evaluated(pa.Table.from_batches([marked]), "int8_g32"), {"a": a.reshape(-1)}, "int8_g32")


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    arrays = layers([(3, 40)] * 9)
    for i in range(3):
        pq.write_table(table(arrays).slice(3 * i, 3), tmp_path / f"{i}.parquet", row_group_size=1)
    dataset = ds.dataset(tmp_path)
    q = compute.quantize(WEIGHTS, "int4_g32", type=dataset.schema.field("weights").type, shape=pc.field("shape"))
    found = rows(dataset.to_table(columns={"layer_name": NAMES, "q": q}).sort_by("layer_name"))
    weight_rows.check(found, dict(sorted(arrays.items())), "int4_g32")
    only = rows(dataset.to_table(columns={"layer_name": NAMES, "q": q}, filter=NAMES == "layer.4"))
    weight_rows.check(only, {"layer.4": arrays["layer.4"]}, "int4_g32")


def test_marks_of_a_dataset_on_disk(tmp_path: Path) -> None:
    arrays = layers([(3, 40), (7,)], "bfloat16")
    pq.write_table(table(arrays), tmp_path / "w.parquet")
    weight_rows.check(evaluated(ds.dataset(tmp_path), "int8_g32", shape=pc.field("shape")), arrays, "int8_g32")


def test_nulls_stay_nulls() -> None:
    given = pa.table({"layer_name": list("abcd"), "weights": pa.array([None, [1.0, 2.0], None, [3.0]], FLAT)})
    q = compute.quantize(WEIGHTS, "int8_g32", type=FLAT)
    dataset = ds.dataset(given)
    found = dataset.to_table(columns={"q": q, "back": compute.dequantize(q)})
    assert found["q"].is_null().to_pylist() == [True, False, True, False]
    assert found["back"].is_null().to_pylist() == [True, False, True, False]
    want = quantize_table(given.take([1, 3]), "int8_g32")
    [struct] = found["q"].drop_null().combine_chunks().to_pylist()[:1]
    assert struct["quantized_data"] == want["quantized_data"][0].as_py()
    nothing = ds.dataset(pa.table({"weights": pa.array([None], FLAT)}))
    assert nothing.to_table(columns={"q": q, "back": compute.dequantize(q)})["back"].to_pylist() == [None]


def test_a_shape_that_is_one_for_all() -> None:
    arrays = layers([(3, 40)] * 2)
    shape = pc.scalar(pa.scalar([3, 40], pa.list_(pa.int64())))
    weight_rows.check(evaluated(table(arrays), "int8_g32", shape=shape), arrays, "int8_g32")


def test_no_rows() -> None:
    dataset = ds.dataset(pa.table({"weights": pa.array([], FLAT)}))
    q = compute.quantize(WEIGHTS, "int8_g32", type=FLAT)
    found = dataset.to_table(columns={"q": q, "back": compute.dequantize(q)})
    assert found.num_rows == 0
    assert found["q"].type == compute.quantized_type("int8_g32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scheme", ["int4_g32_asym", "int8_channel_bf16"])
def test_and_back(scheme: str, dtype: str) -> None:
    arrays = layers([(3, 40), (7,), (1, 130)])
    scale_dtype = "bfloat16" if scheme.endswith("bf16") else "float32"
    q = compute.quantize(WEIGHTS, scheme, type=FLAT, shape=pc.field("shape"))
    expression = compute.dequantize(q, dtype, scale_dtype=scale_dtype)
    back = ds.dataset(table(arrays)).to_table(columns={"w": expression})["w"].combine_chunks()
    for i, a in enumerate(arrays.values()):
        want = ops.dequantize(ops.quantize(a, scheme, device="reference"), dtype, device="reference")
        got = back[i].values.to_numpy(zero_copy_only=False).view(want.dtype)
        assert_bitwise_equal(got, want.reshape(-1))


def test_errors_arrive_as_they_are() -> None:
    """pyarrow hands on what a function raises, wherever it evaluates it."""

    def evaluate(weights: pa.Array, **columns: Any) -> Any:
        given = ds.dataset(pa.table({"weights": weights, **columns}))
        shape = {"shape": pc.field("shape")} if columns else {}
        return given.to_table(columns={"q": compute.quantize(WEIGHTS, "int8_g32", type=weights.type, **shape)})

    with pytest.raises(NonFiniteError, match="row 1: 1 NaN"):
        evaluate(pa.array([[1.0], [float("nan")]], FLAT))
    with pytest.raises(InputError, match="row 0: 1 nulls"):
        evaluate(pa.array([[None]], FLAT))
    with pytest.raises(InputError, match=r"row 0: shape \[3\] has 3 weights, and the row has 1"):
        evaluate(pa.array([[1.0]], FLAT), shape=pa.array([[3]]))
    with pytest.raises(InputError, match="ragged"):
        evaluate(pa.array([[[1.0], [1.0, 2.0]]]))
    q = compute.quantize(WEIGHTS, "int8_g32", type=FLAT)
    damaged = ds.dataset(pa.table({"weights": pa.array([[1.0]], FLAT)})).to_table(columns={"q": q})
    struct = damaged["q"].combine_chunks()
    fields = [
        pa.array([b"too long"], f.type) if f.name == "quantized_data" else struct.field(f.name) for f in struct.type
    ]
    short = pa.table({"q": pa.StructArray.from_arrays(fields, fields=list(struct.type))})
    with pytest.raises(InputError, match=r"row 0 \(row 0\): data has 8 items"):
        ds.dataset(short).to_table(columns={"w": compute.dequantize(pc.field("q"))})


def test_what_is_refused_before_anything_runs() -> None:
    with pytest.raises(SchemeError):
        compute.quantize(WEIGHTS, "int9_g3", type=FLAT)
    with pytest.raises(InputError, match="must hold a list"):
        compute.quantize(WEIGHTS, type=pa.float32())
    with pytest.raises(DeviceError):
        compute.quantize(WEIGHTS, type=FLAT, device="tpu")
    with pytest.raises(InputError, match="dtype 'float64'"):
        compute.dequantize(pc.field("q"), "float64")
    other = ds.dataset(pa.table({"weights": pa.array([[1.0]], pa.list_(pa.float64()))}))
    with pytest.raises(pa.ArrowNotImplementedError, match="no kernel matching"):
        other.to_table(columns={"q": compute.quantize(WEIGHTS, type=FLAT)})


def test_registered_once_for_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under names of their own for each type and option, by however many threads at once."""
    barrier, found = threading.Barrier(8), []
    register = pc.register_scalar_function

    def slowly(*arguments: Any) -> None:
        time.sleep(0.05)
        register(*arguments)

    monkeypatch.setattr(pc, "register_scalar_function", slowly)
    given = ds.dataset(pa.table({"weights": pa.array([[1.0, 2.0]], FLAT)}))

    def ask() -> None:
        barrier.wait()
        q = compute.quantize(WEIGHTS, "int6_g77_asym", type=FLAT)
        found.append(given.to_table(columns={"q": q})["q"].to_pylist())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(x == found[0] for x in found)
    named = [name for name in pc.list_functions() if "int6_g77_asym" in name]
    assert len(named) == 1
    compute.quantize(WEIGHTS, "int6_g77_asym", type=pa.list_(pa.float16()))
    assert len([name for name in pc.list_functions() if "int6_g77_asym" in name]) == 2
    compute.quantize(WEIGHTS, "int6_g77_asym", type=FLAT, device="reference", threads=1)
    assert len([name for name in pc.list_functions() if "int6_g77_asym" in name]) == 3


def test_importing_registers_nothing() -> None:
    code = (
        "import pyarrow.compute as pc, arrowquant_gpu.compute\nprint([n for n in pc.list_functions() if 'quant' in n])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "arrowquant" not in done.stdout


def test_rows_read_back_one_by_one() -> None:
    arrays = layers([(3, 40)])
    found = evaluated(table(arrays), "int4_g32_asym", shape=pc.field("shape"))
    assert QuantizedTensor.from_arrow(found, 0).shape == (3, 40)
