"""The class ArrowQuantV2: every method against the reference, its results, its refusals, and what it may not do."""

from __future__ import annotations

import array
import inspect
import json
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import arrowquant_gpu as aq
from arrowquant_gpu import ArrowQuantV2, DiffusionQuantConfig, numpy_to_arrow_table, ops, reference
from arrowquant_gpu.errors import (
    DeviceError,
    FormatError,
    InputError,
    NonFiniteError,
    QualityError,
    SchemeError,
    SourceError,
    TargetError,
)
from arrowquant_gpu.formats.output import ACTIVATIONS, MANIFEST
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.schemes import Scheme, rows_and_length
from arrowquant_gpu.v2 import models
from arrowquant_gpu.v2.results import LayerResults
from arrowquant_gpu.v2.scheme import BIT_WIDTH

from .bitwise import assert_bitwise_equal
from .fixtures import tiny_llama, write_safetensors

ROOT = Path(__file__).parent.parent
KEYS = {"quantized_data", "scales", "zero_points", "shape", "bit_width", "group_size", "scheme", "dtype"}
MODEL_KEYS = {
    *("quantized_path", "compression_ratio", "cosine_similarity", "model_size_mb", "modality", "bit_width"),
    "quantization_time_s",
}


def layers(n: int = 3, shape: tuple[int, ...] = (6, 300), dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    return {f"layer.{i}.weight": rng.standard_normal(shape, np.float32).astype(dtype) for i in range(n)}


def check_layer(result: dict[str, Any], x: np.ndarray, scheme: str) -> None:
    """Raise unless a result, or a row of a table of results, is what the reference makes of `x`."""
    parsed = Scheme.parse(scheme)
    packed, scales, zeros, _ = reference.quantize(x.reshape(rows_and_length(x.shape)), parsed)
    assert_bitwise_equal(np.frombuffer(result["quantized_data"], np.uint8), packed.reshape(-1), "quantized_data")
    assert_bitwise_equal(np.asarray(result["scales"], scales.dtype).reshape(scales.shape), scales, "scales")
    assert (result["zero_points"] is None) == (zeros is None)
    if zeros is not None:
        got = np.asarray(result["zero_points"], np.uint8).reshape(zeros.shape)
        assert_bitwise_equal(got, zeros, "zero_points")
    assert tuple(result["shape"]) == x.shape
    assert (result["bit_width"], result["group_size"], result["scheme"]) == (parsed.bits, parsed.group_size, scheme)
    assert result["dtype"] == x.dtype.name


def check_table(table: pa.Table | pa.RecordBatch, weights: dict[str, np.ndarray], scheme: str) -> None:
    rows = table.to_pylist()
    assert [row["layer_name"] for row in rows] == list(weights)
    for row, x in zip(rows, weights.values(), strict=True):
        check_layer(row, x, scheme)


@pytest.fixture
def quantizer() -> ArrowQuantV2:
    return ArrowQuantV2(mode="diffusion", device="cpu")


# --- Signatures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("quantize", {"weights": ..., "bit_width": 4}),
        ("quantize_batch", {"weights": ..., "bit_width": 4, "continue_on_error": False, "parallel": True}),
        (
            "quantize_batch_with_progress",
            {"weights": ..., "bit_width": 4, "progress_callback": None, "continue_on_error": False},
        ),
        ("quantize_arrow", {"table": ..., "bit_width": 4}),
        ("quantize_arrow_batch", {"batch": ..., "bit_width": 4}),
        ("quantize_batch_arrow", {"table": ..., "bit_width": 4, "continue_on_error": False}),
        ("quantize_batch_smart", {"weights": ..., "bit_width": 4}),
        ("quantize_from_safetensors", {"safetensors_path": ..., "output_path": ..., "bit_width": 4}),
        (
            "quantize_diffusion_model",
            {"model_path": ..., "output_path": ..., "config": None, "progress_callback": None},
        ),
        ("validate_quality", {"original_path": ..., "quantized_path": ...}),
    ],
)
def test_names_and_defaults(method: str, parameters: dict[str, Any]) -> None:
    found = list(inspect.signature(getattr(ArrowQuantV2, method)).parameters.values())[1:]
    for parameter, (name, default) in zip(found, parameters.items(), strict=False):
        assert parameter.name == name
        assert (default is ... and parameter.default is inspect.Parameter.empty) or parameter.default == default


@pytest.mark.parametrize("mode", ["diffusion", "base", "time_aware"])
def test_modes_give_the_same_codes(mode: str) -> None:
    weights = layers()
    for name, result in ArrowQuantV2(mode=mode, device="cpu").quantize_batch(weights).items():
        check_layer(result, weights[name], "int4_g128_asym")


def test_time_aware_is_diffusion() -> None:
    assert ArrowQuantV2("time_aware").mode == ArrowQuantV2().mode == "diffusion"
    with pytest.raises(InputError, match="mode 'spatial': choose one of diffusion, time_aware, base"):
        ArrowQuantV2("spatial")


def test_importing_the_class_loads_nothing_heavy() -> None:
    code = "from arrowquant_gpu import ArrowQuantV2; import sys; print({'numba', 'cupy', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- Width, group size, scheme ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_width(quantizer: ArrowQuantV2, bits: int) -> None:
    weights = layers()
    for result, x in zip(quantizer.quantize_batch(weights, bits).values(), weights.values(), strict=True):
        check_layer(result, x, f"int{bits}_g128_asym")
        assert len(result["quantized_data"]) == 6 * math.ceil(300 * bits / 8)
    check_table(quantizer.quantize_arrow(numpy_to_arrow_table(weights), bits), weights, f"int{bits}_g128_asym")


@pytest.mark.parametrize(
    ("options", "call", "scheme"),
    [
        ({}, {"group_size": 32}, "int4_g32_asym"),
        ({"group_size": 64}, {"bit_width": 2}, "int2_g64_asym"),
        ({"group_size": 64}, {"group_size": 16}, "int4_g16_asym"),
        ({"scheme": "int8_channel"}, {}, "int8_channel"),
        ({"scheme": "int8_channel"}, {"bit_width": 8}, "int8_channel"),
        ({"scheme": "int8_channel"}, {"scheme": "int5_tensor_asym_f16"}, "int5_tensor_asym_f16"),
        ({"scheme": "int8_channel"}, {"group_size": 128, "bit_width": 8}, "int8_g128_asym"),
        ({"scheme": Scheme(3)}, {}, "int3_g128"),
    ],
)
def test_what_a_call_quantizes_with(options: dict[str, Any], call: dict[str, Any], scheme: str) -> None:
    x = layers(1)
    [result] = ArrowQuantV2(device="cpu", **options).quantize_batch(x, **call).values()
    check_layer(result, *x.values(), scheme)
    check_table(ArrowQuantV2(device="cpu", **options).quantize_arrow(numpy_to_arrow_table(x), **call), x, scheme)


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"bit_width": 7}, "7 bits: the supported widths are 2, 3, 4, 5, 6, 8"),
        ({}, {"bit_width": 4.0}, "bit_width 4.0"),
        ({}, {"bit_width": "4"}, "bit_width '4'"),
        ({}, {"bit_width": True}, "bit_width True"),
        ({}, {"scheme": "int4"}, "'int4' is not a scheme"),
        ({}, {"group_size": 0}, "group size 0"),
        ({}, {"scheme": "int4_g64", "group_size": 32}, "not both"),
        ({}, {"scheme": "int8_g64", "bit_width": 4}, "bit_width 4 and scheme int8_g64 contradict"),
        ({"scheme": "int8_g64"}, {"bit_width": 4}, "bit_width 4 and scheme int8_g64 contradict"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], call: dict[str, Any], message: str) -> None:
    quantizer = ArrowQuantV2(device="cpu", **options)
    with pytest.raises(SchemeError, match=message):
        quantizer.quantize_batch(layers(1), **call)
    with pytest.raises(SchemeError, match=message):
        quantizer.quantize_batch_smart(layers(1), **call)


def test_constructor_refuses() -> None:
    with pytest.raises(SchemeError, match="not both"):
        ArrowQuantV2(scheme="int4_g64", group_size=32)
    with pytest.raises(SchemeError, match="group size -1"):
        ArrowQuantV2(group_size=-1)
    with pytest.raises(DeviceError, match="'tpu'"):
        ArrowQuantV2(device="tpu")
    with pytest.raises(DeviceError, match="threads is 0"):
        ArrowQuantV2(threads=0)
    with pytest.raises(DeviceError, match="threads is 0"):
        ArrowQuantV2(device="cpu").quantize_batch(layers(1), threads=0)


class Tensor:
    """Anything with __dlpack__."""

    def __init__(self, x: np.ndarray) -> None:
        self._x = x

    def __dlpack__(self, **options: Any) -> Any:
        return self._x.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._x.__dlpack_device__()


class StopWorkError(Exception):
    """What a callback raises."""


# --- Dicts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(7,), (4, 300), (2, 3, 40), ()])
def test_dicts_of_arrays(quantizer: ArrowQuantV2, dtype: str, shape: tuple[int, ...]) -> None:
    weights = layers(2, shape, np.dtype(getattr(ml_dtypes, dtype, dtype)))
    results = quantizer.quantize_batch(weights)
    assert type(results) is LayerResults
    assert list(results) == list(weights)
    assert results.errors == {}
    for name, result in results.items():
        assert result.keys() == KEYS
        check_layer(result, weights[name], "int4_g128_asym")
        assert_bitwise_equal(
            ops.dequantize(results.tensor(name)), ops.dequantize(ops.quantize(weights[name], "int4_g128_asym"))
        )


def test_arrays_of_every_protocol(quantizer: ArrowQuantV2) -> None:
    x = np.linspace(-1, 1, 512, dtype=np.float32)
    given = {
        "dlpack": Tensor(x.copy()),
        "arrow": pa.array(x),
        "buffer": array.array("f", x.tolist()),
        "strided": np.repeat(x, 2)[::2],
    }
    for result in quantizer.quantize_batch(given).values():
        check_layer(result, x, "int4_g128_asym")


def test_lists_are_taken_by_quantize_alone(quantizer: ArrowQuantV2) -> None:
    x = layers(1)["layer.0.weight"]
    for given in (x.tolist(), tuple(map(tuple, x.tolist())), x):
        check_layer(quantizer.quantize({"w": given}, bit_width=4)["w"], x, "int4_g128_asym")
    with pytest.raises(InputError, match=r"w: builtins\.list cannot be read as weights.*np\.asarray"):
        quantizer.quantize_batch({"w": x.tolist()})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[1.0], [2.0, 3.0]], "w: its lists cannot be read as an array"),
        (["a"], "w: a list of numbers is expected"),
        ([True, False], "w: a list of numbers is expected"),
        ([None, 1.0], "w: a list of numbers is expected"),
        ([1j], "w: a list of numbers is expected"),
        ([10**400], "w: a list of numbers is expected"),
        ([1e300], "w: 0 NaN and 1 infinite"),
        ([float("nan")], "w: 1 NaN and 0 infinite"),
    ],
)
def test_bad_lists_are_refused(quantizer: ArrowQuantV2, x: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantizer.quantize({"w": x})


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "the dict of weights is empty"),
        ({1: np.ones(3)}, "layer name 1"),
        ({"": np.ones(3)}, "layer name ''"),
        ([np.ones(3)], r"builtins\.list is no dict"),
        (np.ones(3), r"numpy\.ndarray is no dict.*quantize_batch_smart"),
        ({"w": "text"}, r"w: builtins\.str cannot be read"),
        ({"w": np.ones(3, bool)}, "w: dtype bool is not a type of weights"),
        ({"w": np.ones(3, ">f4")}, "w: dtype float32 in big-endian"),
        ({"w": np.array([1.0, np.inf], np.float32)}, "w: 0 NaN and 1 infinite.*index 1 of shape"),
    ],
)
def test_bad_dicts_are_refused(quantizer: ArrowQuantV2, weights: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantizer.quantize_batch(weights)
    with pytest.raises(InputError, match=message):
        quantizer.quantize_batch_with_progress(weights)


def test_good_layers_come_back_where_others_are_bad(quantizer: ArrowQuantV2) -> None:
    weights: dict[str, Any] = layers(4)
    weights["layer.1.weight"][0, 5] = np.nan
    weights["text"] = "text"
    seen: list[tuple[str, float]] = []
    results = quantizer.quantize_batch_with_progress(
        weights, progress_callback=lambda *x: seen.append(x), continue_on_error=True
    )
    assert list(results) == ["layer.0.weight", "layer.2.weight", "layer.3.weight"]
    assert {name: type(e) for name, e in results.errors.items()} == {
        "layer.1.weight": NonFiniteError,
        "text": InputError,
    }
    assert seen == [(name, i / 5) for i, name in enumerate(weights, 1)]
    for name, result in results.items():
        check_layer(result, weights[name], "int4_g128_asym")
    assert quantizer.quantize_batch(weights, continue_on_error=True).errors.keys() == results.errors.keys()
    with pytest.raises(NonFiniteError, match=r"layer\.1\.weight: 1 NaN"):
        quantizer.quantize_batch(weights)


def test_progress_comes_from_the_calling_thread_and_may_cancel(quantizer: ArrowQuantV2) -> None:
    seen: list[tuple[str, float, int]] = []

    def callback(name: str, fraction: float) -> None:
        seen.append((name, fraction, threading.get_ident()))
        if len(seen) == 2:
            raise StopWorkError

    with pytest.raises(StopWorkError):
        quantizer.quantize_batch_with_progress(layers(4), progress_callback=callback)
    assert seen == [(f"layer.{i}.weight", (i + 1) / 4, threading.get_ident()) for i in range(2)]
    assert quantizer.quantize_batch_with_progress(layers(2)).keys() == layers(2).keys()


@pytest.mark.parametrize("options", [{"parallel": False}, {"threads": 1}, {"threads": 3}])
def test_threads_change_no_byte(
    quantizer: ArrowQuantV2, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    real = ops.get_backend
    monkeypatch.setattr(ops, "get_backend", lambda device, threads: (asked.append(threads), real(device, threads))[1])
    weights = layers(2, (1024, 1024))
    for result, x in zip(quantizer.quantize_batch(weights, **options).values(), weights.values(), strict=True):
        check_layer(result, x, "int4_g128_asym")
    assert set(asked) == {options.get("threads", 1)}


def test_results_do_not_refer_to_weights_and_are_of_arrows_pool(quantizer: ArrowQuantV2) -> None:
    weights = layers(1, (256, 4096))
    before = pa.total_allocated_bytes()
    results = quantizer.quantize_batch(weights)
    [result] = results.values()
    n = len(result["quantized_data"]) + result["scales"].nbytes + result["zero_points"].nbytes
    assert n <= pa.total_allocated_bytes() - before < n + 1024
    want = bytes(result["quantized_data"])
    weights["layer.0.weight"][...] = np.nan
    assert bytes(result["quantized_data"]) == want
    del result, results
    assert pa.total_allocated_bytes() == before


def test_batch_reads_arrays_in_place(quantizer: ArrowQuantV2, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backend gets is the memory of the arrays."""
    from arrowquant_gpu.backends.cpu import CpuBackend

    addresses: list[int] = []
    real = CpuBackend.quantize_all

    def noted(self: CpuBackend, jobs: list[Any]) -> Any:
        addresses.extend(x.ctypes.data for x, *_ in jobs)
        return real(self, jobs)

    monkeypatch.setattr(CpuBackend, "quantize_all", noted)
    weights = layers(3)
    quantizer.quantize_batch(weights)
    quantizer.quantize_arrow(numpy_to_arrow_table(weights))
    assert addresses == [x.ctypes.data for x in weights.values()] * 2


@pytest.mark.parametrize("call", ["quantize_batch", "quantize_arrow"])
def test_other_python_threads_go_on(call: str, quantizer: ArrowQuantV2) -> None:
    """The interpreter's lock is free while a layer is computed: another thread counts within one kernel call."""
    from arrowquant_gpu.backends import cpu_kernels

    seen, stop = threading.Event(), threading.Event()
    real, calls, seen_meanwhile = cpu_kernels.quantize(), [], []

    def kernel(*arguments: Any) -> Any:
        # The same work again, until the other thread was seen at it.
        while not seen.is_set() and len(calls) < 2000:
            calls.append(real(*arguments))
        seen_meanwhile.append(seen.is_set())
        return calls[-1]

    def other() -> None:
        while not stop.wait(1e-4):
            if calls:
                seen.set()

    weights = {"w": np.zeros((1024, 4096), np.float32)}
    given = weights if call == "quantize_batch" else numpy_to_arrow_table(weights)
    getattr(quantizer, call)(given, threads=1)
    thread, switch = threading.Thread(target=other), sys.getswitchinterval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "quantize", lambda: kernel)
        sys.setswitchinterval(100)  # a thread that holds the lock is not asked for it: others go on if it lets go
        thread.start()
        try:
            getattr(quantizer, call)(given, threads=1)
        finally:
            stop.set()
            sys.setswitchinterval(switch)
            thread.join()
    assert seen_meanwhile == [True]


# --- Tables ----------------------------------------------------------------------------------------------------------


class Stream:
    """Anything with __arrow_c_stream__."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


class Array:
    """Anything with __arrow_c_array__."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch

    def __arrow_c_array__(self, requested_schema: Any = None) -> Any:
        return self._batch.__arrow_c_array__(requested_schema)


@pytest.mark.parametrize("call", ["quantize_arrow", "quantize_batch_arrow"])
def test_tables_and_what_exports_them(quantizer: ArrowQuantV2, call: str) -> None:
    weights = layers(4)
    table = numpy_to_arrow_table(weights)
    batch = table.combine_chunks().to_batches()[0]
    for given in (table, batch, table.to_reader(), Stream(table), Array(batch)):
        result = getattr(quantizer, call)(given, bit_width=2)
        assert type(result) is pa.Table
        check_table(result, weights, "int2_g128_asym")
    check_table(getattr(quantizer, call)(table.slice(1, 2)), dict(list(weights.items())[1:3]), "int4_g128_asym")


def test_record_batches(quantizer: ArrowQuantV2) -> None:
    weights = layers(3)
    batch = numpy_to_arrow_table(weights).combine_chunks().to_batches()[0]
    for given in (batch, Array(batch)):
        result = quantizer.quantize_arrow_batch(given, bit_width=8)
        assert type(result) is pa.RecordBatch
        check_table(result, weights, "int8_g128_asym")
    with pytest.raises(InputError, match=r"pyarrow\.lib\.Table is no record batch"):
        quantizer.quantize_arrow_batch(numpy_to_arrow_table(weights))
    with pytest.raises(InputError, match="no rows"):
        quantizer.quantize_arrow_batch(batch.slice(0, 0))


def test_tables_leave_bad_rows_out_and_say_which(quantizer: ArrowQuantV2) -> None:
    weights = layers(3)
    weights["layer.1.weight"][0, 0] = np.inf
    table = numpy_to_arrow_table(weights)
    result = quantizer.quantize_batch_arrow(table, bit_width=4, continue_on_error=True)
    [problem] = json.loads(result.schema.metadata[b"arrowquant.errors"])
    assert (problem["layer"], problem["error"]) == ("layer.1.weight", "NonFiniteError")
    del weights["layer.1.weight"]
    check_table(result, weights, "int4_g128_asym")
    for call in (quantizer.quantize_arrow, quantizer.quantize_batch_arrow):
        with pytest.raises(NonFiniteError, match=r"layer\.1\.weight"):
            call(table)


def test_a_row_alone_is_enough_to_decode_it(quantizer: ArrowQuantV2) -> None:
    weights = layers(2)
    result = quantizer.quantize_arrow(numpy_to_arrow_table(weights))
    for i, x in enumerate(weights.values()):
        q = aq.QuantizedTensor.from_arrow(result, i)
        assert np.abs(ops.dequantize(q) - x).max() <= 0.5001 * q.scales.max()


# --- numpy_to_arrow_table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
@pytest.mark.parametrize("n", [1, 3])
def test_tables_are_over_the_memory_of_the_arrays(quantizer: ArrowQuantV2, dtype: str, n: int) -> None:
    weights = layers(n, (4, 300), np.dtype(getattr(ml_dtypes, dtype, dtype)))
    before = pa.total_allocated_bytes()
    table = numpy_to_arrow_table(weights)
    assert pa.total_allocated_bytes() - before < 4096
    assert table.schema.names == ["layer_name", "weights", "shape"]
    assert table["weights"].num_chunks == n
    for chunk, x in zip(table["weights"].chunks, weights.values(), strict=True):
        assert chunk.values.buffers()[1].address == x.ctypes.data
    table.validate(full=True)
    check_table(quantizer.quantize_arrow(table), weights, "int4_g128_asym")


def test_bfloat16_is_marked() -> None:
    kind = numpy_to_arrow_table(layers(1, dtype=ml_dtypes.bfloat16)).schema.field("weights").type
    assert kind.value_type == pa.uint16()
    assert kind.value_field.metadata == {b"arrowquant.dtype": b"bfloat16"}


def test_arrays_that_are_not_row_major_are_copied(quantizer: ArrowQuantV2) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    weights = {"t": x.T, "s": x[:, ::2], "p": x.transpose(1, 0, 2), "whole": x}
    table = numpy_to_arrow_table(weights)
    same = [c.values.buffers()[1].address == x.ctypes.data for c in table["weights"].chunks]
    assert same == [False, False, False, True]
    for value, a in zip(table["weights"].to_pylist(), weights.values(), strict=True):
        assert value == a.reshape(-1).tolist()
    check_table(quantizer.quantize_arrow(table), weights, "int4_g128_asym")


def test_the_table_keeps_the_arrays_alive() -> None:
    table = numpy_to_arrow_table({"w": np.full(1000, 7, np.float32)})
    assert table["weights"].to_pylist() == [[7.0] * 1000]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "empty"),
        ([1], "no dict"),
        ({"a": np.ones(2, np.float32), "b": np.ones(2, np.float16)}, "b: it is float16, and a float32"),
        ({"a": [1.0]}, r"a: builtins\.list"),
        ({"a": np.ones(2, bool)}, "a: dtype bool"),
    ],
)
def test_bad_dicts_make_no_table(weights: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        numpy_to_arrow_table(weights)


# --- Models ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    tensors = {
        "blocks.0.attn.weight": rng.standard_normal((256, 512), np.float32),
        "blocks.0.mlp.weight": rng.standard_normal((512, 256), np.float32) ** 5,
        "blocks.0.norm.weight": np.ones(512, np.float32),
    }
    return write_safetensors(tmp_path / "model.safetensors", tensors, {"modality": "text"})


def cosines(source: Path, target: Path) -> dict[str, float]:
    """Of every quantized tensor, in float64 and in one piece."""
    found = {}
    checkpoint = open_quantized(target)
    from arrowquant_gpu import SafeTensorsLoader

    for name, entry in checkpoint.entries.items():
        if entry.scheme is None:
            continue
        x = SafeTensorsLoader(source).get_tensor(name, "float64").reshape(-1)
        y = np.concatenate([ops.dequantize(q, "float32").reshape(-1) for _, q in checkpoint.blocks(name)]).astype(float)
        found[name] = float(x @ y / math.sqrt((x @ x) * (y @ y)))
    return found


@pytest.mark.parametrize("output", ["out.parquet", "out.arrow", "out"])
def test_figures_of_a_model_are_measured(quantizer: ArrowQuantV2, model: Path, tmp_path: Path, output: str) -> None:
    target = tmp_path / output
    seen: list[tuple[str, float]] = []
    result = quantizer.quantize_from_safetensors(
        model, target, bit_width=2, validate=True, progress_callback=lambda *x: seen.append(x)
    )
    assert result.keys() == MODEL_KEYS
    files = [target] if target.is_file() else [f for f in target.rglob("*.parquet") if "manifest" not in f.name]
    size = sum(f.stat().st_size for f in files)
    want = cosines(model, target)
    assert result["quantized_path"] == str(target)
    assert result["model_size_mb"] == size / 2**20
    assert result["compression_ratio"] == model.stat().st_size / size > 5
    assert result["cosine_similarity"] == pytest.approx(sum(want.values()) / len(want), rel=1e-9)
    assert (result["modality"], result["bit_width"]) == ("text", 2)
    assert result["quantization_time_s"] > 0
    assert [f for _, f in seen] == sorted(f for _, f in seen)
    assert seen[-1][1] == 1.0
    assert all(name and 0 <= fraction <= 1 for name, fraction in seen)
    quality = quantizer.validate_quality(model, target)
    assert quality["per_layer_accuracy"] == pytest.approx(want, rel=1e-9)
    keys = ("cosine_similarity", "compression_ratio", "model_size_mb")
    assert {key: quality[key] for key in keys} == pytest.approx({key: result[key] for key in keys}, rel=1e-12)
    assert quality["passed"]
    assert quality.problems == {}
    assert quality.keys() == {*keys, "per_layer_accuracy", "passed"}


def test_what_lies_beside_the_weights_is_not_their_size(tmp_path: Path) -> None:
    for name, n_bytes in (("a.parquet", 5), (MANIFEST, 70), (ACTIVATIONS, 900), ("config.json", 30)):
        (tmp_path / name).write_bytes(bytes(n_bytes))
    assert models.weight_bytes(tmp_path) == 5


def test_a_sharded_model_and_its_index(quantizer: ArrowQuantV2, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "llama", shards=3)
    of_folder = quantizer.quantize_from_safetensors(source, tmp_path / "a.parquet")
    index = source / "model.safetensors.index.json"
    of_index = quantizer.quantize_diffusion_model(index, tmp_path / "b.parquet", {"bit_width": 4})
    assert of_folder["modality"] == "text"
    same = ("compression_ratio", "cosine_similarity", "model_size_mb")
    assert {key: of_folder[key] for key in same} == pytest.approx({key: of_index[key] for key in same}, rel=1e-3)
    assert pq.read_table(tmp_path / "a.parquet").num_rows == pq.read_table(tmp_path / "b.parquet").num_rows


def test_profiles_and_what_is_given_beside_them(quantizer: ArrowQuantV2, model: Path, tmp_path: Path) -> None:
    def schemes(name: str, **options: Any) -> set[str]:
        quantizer.quantize_from_safetensors(model, tmp_path / name, **options)
        return {e.scheme.id for e in open_quantized(tmp_path / name).entries.values() if e.scheme}

    assert schemes("a.parquet", profile="cloud") == {"int8_g64_asym"}
    assert schemes("b.parquet", bit_width=4, profile="cloud") == {"int4_g64_asym"}
    assert schemes("c.parquet", profile="local", group_size=32) == {"int4_g32_asym"}
    # 2 bits in groups of 256 are not enough for one of the two (cosine 0.875), and it gets 4.
    assert schemes("d.parquet", profile="edge", min_accuracy=0.9) == {"int2_g256_asym", "int4_g256_asym"}
    with pytest.raises(QualityError, match=r"blocks\.0\.attn\.weight"):
        schemes("e.parquet", profile="edge", min_accuracy=0.9, fail_fast=True)
    assert not (tmp_path / "e.parquet").exists()
    with pytest.raises(SchemeError, match="profile 'huge'"):
        schemes("f.parquet", profile="huge")


def test_progress_over_two_passes(quantizer: ArrowQuantV2, model: Path, tmp_path: Path) -> None:
    seen: list[float] = []
    quantizer.quantize_from_safetensors(
        model, tmp_path / "o.parquet", profile="edge", progress_callback=lambda _, f: seen.append(f)
    )
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert any(0 < f <= 0.5 for f in seen)


def test_an_exception_in_progress_leaves_nothing_under_the_name(
    quantizer: ArrowQuantV2, model: Path, tmp_path: Path
) -> None:
    def callback(name: str, fraction: float) -> None:
        raise RuntimeError(name)

    with pytest.raises(RuntimeError):
        quantizer.quantize_from_safetensors(model, tmp_path / "out", progress_callback=callback)
    assert not (tmp_path / "out").exists()
    assert quantizer.quantize_from_safetensors(model, tmp_path / "out", resume=True)["bit_width"] == 4


def test_configs(model: Path, tmp_path: Path) -> None:
    config = DiffusionQuantConfig.from_profile("cloud", group_size=32, modality="code")
    assert (config.bit_width, config.group_size, config.min_accuracy, config.time_groups) == (8, 32, 0.95, 20)
    assert DiffusionQuantConfig.of({"profile": "cloud", "group_size": 32, "modality": "code"}) == config
    assert DiffusionQuantConfig.from_profile("edge", scheme="int4_channel").scheme == "int4_channel"
    quantizer = ArrowQuantV2("base", device="cpu")
    result = quantizer.quantize_diffusion_model(model, tmp_path / "o.parquet", config)
    assert (result["modality"], result["bit_width"]) == ("code", 8)
    for wrong, message in (
        ({"bits": 4}, "bits: no such option"),
        (3, "config is int"),
        ({"group": 1}, "no such option"),
    ):
        with pytest.raises(InputError, match=message):
            quantizer.quantize_diffusion_model(model, tmp_path / "p.parquet", wrong)
    with pytest.raises(InputError, match="mode base makes no use of it"):
        quantizer.quantize_diffusion_model(model, tmp_path / "p.parquet", {"calibration": "x.jsonl"})


def test_the_mode_decides_on_calibration(model: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "c.jsonl"
    row = {"layer": "blocks.0.attn.weight", "timestep": 0, "min": -1.0, "max": 2.0}
    calibration.write_text(json.dumps(row) + "\n")
    result = ArrowQuantV2("diffusion", device="cpu").quantize_from_safetensors(
        model, tmp_path / "o.parquet", calibration=calibration, timesteps=1, time_groups=1
    )
    assert result["modality"] == "text"
    rows = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert any(row["time_aware_quant_json"] for row in rows)


def test_what_cannot_be_written_or_read(quantizer: ArrowQuantV2, model: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        quantizer.quantize_from_safetensors(tmp_path / "gone.safetensors", tmp_path / "o.parquet")
    quantizer.quantize_from_safetensors(model, tmp_path / "o.parquet")
    with pytest.raises(TargetError, match="exists"):
        quantizer.quantize_from_safetensors(model, tmp_path / "o.parquet")
    quantizer.quantize_from_safetensors(model, tmp_path / "o.parquet", overwrite=True)
    with pytest.raises(FormatError, match="'onnx'"):
        quantizer.quantize_from_safetensors(model, tmp_path / "p", format="onnx")
    with pytest.raises(InputError, match="no such option"):
        quantizer.quantize_from_safetensors(model, tmp_path / "p", colour="red")


def test_quality_fails_where_a_weight_is_another(quantizer: ArrowQuantV2, model: Path, tmp_path: Path) -> None:
    target = tmp_path / "o.arrow"
    quantizer.quantize_from_safetensors(model, target)
    assert quantizer.validate_quality(model, target)["passed"]
    refused = quantizer.validate_quality(model, target, min_accuracy=0.99999)
    assert not refused["passed"]
    assert refused.problems
    tensors = {name: x.copy() for name, x in aq.SafeTensorsLoader(model).get_all_tensors().items()}
    tensors["blocks.0.attn.weight"][3, 7] += 3
    write_safetensors(model, tensors, {"modality": "text"})
    broken = quantizer.validate_quality(model, target)
    assert not broken["passed"]
    assert list(broken.problems) == ["blocks.0.attn.weight"]


def test_fractions_of_several_passes() -> None:
    seen: list[tuple[str, float]] = []
    report = models.fractions(lambda *x: seen.append(x), "model.safetensors", 2)
    assert report is not None
    for call in ((0, 10, ""), (5, 10, "a"), (10, 10, "b"), (0, 20, ""), (20, 20, "c")):
        report(*call)
    # A second pass that is over at once.
    again: list[float] = []
    report = models.fractions(lambda _, fraction: again.append(fraction), "model.safetensors", 2)
    assert report is not None
    for call in ((5, 10, "a"), (10, 10, "b"), (20, 20, "c")):
        report(*call)
    assert again == [0.25, 0.5, 1.0]
    assert seen == [("model.safetensors", 0.0), ("a", 0.25), ("b", 0.5), ("model.safetensors", 0.5), ("c", 1.0)]


def test_the_default_width_knows_that_it_is_one() -> None:
    assert BIT_WIDTH == 4
    assert type(BIT_WIDTH) is not int
    assert json.dumps({"bit_width": Scheme(int(BIT_WIDTH)).bits}) == '{"bit_width": 4}'


@pytest.mark.parametrize(
    "call", [lambda q, x: q.quantize_batch(x), lambda q, x: q.quantize_arrow(numpy_to_arrow_table(x))]
)
def test_reference_and_cpu_agree(call: Callable[..., Any]) -> None:
    weights = layers(2, (5, 333))
    a, b = (call(ArrowQuantV2(device=device), weights) for device in ("reference", "cpu"))
    if isinstance(a, pa.Table):
        assert a.equals(b)
    else:
        assert {k: bytes(v["quantized_data"]) for k, v in a.items()} == {
            k: bytes(v["quantized_data"]) for k, v in b.items()
        }
