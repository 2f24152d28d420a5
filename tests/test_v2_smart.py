"""quantize_batch_smart: whatever holds weights, the same bytes whatever is chosen, and choices that are explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from arrowquant_gpu import ArrowQuantV2, numpy_to_arrow_table
from arrowquant_gpu.errors import DeviceError, InputError, NonFiniteError, SourceError
from arrowquant_gpu.v2 import smart
from arrowquant_gpu.v2.smart import SIZES, Place

from .fixtures import tiny_llama, write_safetensors
from .test_v2 import Array, Stream, Tensor, check_layer, check_table, layers

SCHEME = "int4_g128_asym"
ONE, TWO, GPU = Place("cpu", 1), Place("cpu", 2), Place("cuda:0", None)


@pytest.fixture
def quantizer() -> ArrowQuantV2:
    return ArrowQuantV2(device="cpu", threads=1)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> dict[Place, tuple[float, ...]]:
    """What is measured, told by the test: seconds for each of SIZES."""
    told: dict[Place, tuple[float, ...]] = {}

    def measure(places: tuple[Place, ...]) -> dict[Place, tuple[float, ...]]:
        return {place: told[place] for place in places}

    monkeypatch.setattr(smart, "_measure", measure)
    return told


def test_dicts(quantizer: ArrowQuantV2) -> None:
    weights = layers(3)
    results = quantizer.quantize_batch_smart({**weights, "list": weights["layer.0.weight"].tolist()})
    assert list(results) == [*weights, "list"]
    for name, x in weights.items():
        check_layer(results[name], x, SCHEME)
    check_layer(results["list"], weights["layer.0.weight"], SCHEME)


@pytest.mark.parametrize("form", ["table", "stream", "batch", "array"])
def test_tables(quantizer: ArrowQuantV2, form: str) -> None:
    weights = layers(3)
    table = numpy_to_arrow_table(weights)
    batch = table.combine_chunks().to_batches()[0]
    given = {"table": table, "stream": Stream(table), "batch": batch, "array": Array(batch)}[form]
    result = quantizer.quantize_batch_smart(given)
    assert type(result) is (pa.RecordBatch if form == "batch" else pa.Table)
    check_table(result, weights, SCHEME)
    assert quantizer.explain(given).path == "arrow"


def test_readers_are_read_as_they_are_asked_for(quantizer: ArrowQuantV2) -> None:
    weights, read = layers(4), []

    def batches() -> Any:
        for batch in numpy_to_arrow_table(weights).to_batches():
            read.append(1)
            yield batch

    reader = pa.RecordBatchReader.from_batches(numpy_to_arrow_table(weights).schema, batches())
    assert quantizer.explain(reader).path == "stream"
    result = quantizer.quantize_batch_smart(reader)
    assert type(result) is pa.RecordBatchReader
    assert not read
    first = result.read_next_batch()
    assert len(read) == 1
    check_table(pa.Table.from_batches([first, *result]), weights, SCHEME)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "arrows", "feather", "folder", "hive", "arrow folder", "dataset"])
def test_files_of_tables(quantizer: ArrowQuantV2, tmp_path: Path, kind: str) -> None:
    weights = layers(4)
    table, path = numpy_to_arrow_table(weights), tmp_path / "weights"
    if kind in ("parquet", "dataset"):
        pq.write_table(table, path, row_group_size=2)
    elif kind == "arrows":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    elif kind in ("arrow", "feather"):
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == "hive":
        parts = table.append_column("part", pa.array([0, 0, 1, 1]))
        ds.write_dataset(
            parts, path, format="parquet", partitioning=["part"], partitioning_flavor="hive", use_threads=False
        )
    else:
        form = "feather" if kind == "arrow folder" else "parquet"
        ds.write_dataset(table, path, format=form, use_threads=False)
    given = ds.dataset(path) if kind == "dataset" else str(path) if kind == "arrow" else path
    assert quantizer.explain(given).path == "stream"
    check_table(quantizer.quantize_batch_smart(given).read_all(), weights, SCHEME)


@pytest.mark.parametrize("shards", [1, 2])
def test_checkpoints(quantizer: ArrowQuantV2, tmp_path: Path, shards: int) -> None:
    from arrowquant_gpu import ShardedSafeTensorsLoader

    folder = tiny_llama(tmp_path / "llama", shards=shards)
    want = ShardedSafeTensorsLoader(folder).get_all_tensors()
    files = [folder, *folder.glob("*.index.json")] if shards > 1 else [folder, folder / "model.safetensors"]
    for given in files:
        results = quantizer.quantize_batch_smart(given)
        assert list(results) == list(want)
        for name, x in want.items():
            check_layer(results[name], x, SCHEME)


@pytest.mark.parametrize("form", ["numpy", "dlpack", "arrow", "list"])
def test_one_array(quantizer: ArrowQuantV2, form: str) -> None:
    x = layers(1)["layer.0.weight"][0]
    given = {"numpy": x, "dlpack": Tensor(x), "arrow": pa.array(x), "list": x.tolist()}[form]
    check_layer(quantizer.quantize_batch_smart(given), x, SCHEME)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (3, InputError, r"builtins\.int cannot be read"),
        ({}, InputError, "empty"),
        (pa.table({"x": [1]}), InputError, "layer_name"),
        (numpy_to_arrow_table(layers(1)).slice(0, 0), InputError, "no rows"),
        ("nowhere.safetensors", SourceError, "no such file"),
        ({"w": np.array([np.nan], np.float32)}, NonFiniteError, "w: 1 NaN"),
    ],
)
def test_what_holds_no_weights(quantizer: ArrowQuantV2, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantizer.quantize_batch_smart(weights)


def test_files_that_hold_no_weights(quantizer: ArrowQuantV2, tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="layer_name"):
        quantizer.quantize_batch_smart(tmp_path / "x.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(SourceError, match=r"broken\.parquet"):
        quantizer.quantize_batch_smart(tmp_path / "broken.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty"):
        quantizer.explain(tmp_path / "empty")
    bits = write_safetensors(tmp_path / "m.safetensors", {"b": np.ones(3, bool)})
    with pytest.raises(InputError, match="b: dtype bool"):
        quantizer.quantize_batch_smart(bits)


# --- Choices ---------------------------------------------------------------------------------------------------------


def on_gpu(monkeypatch: pytest.MonkeyPatch, threads: int = 2) -> None:
    """A machine with a GPU, as far as the choice looks at it."""
    from arrowquant_gpu.backends import Device, pick_device
    from arrowquant_gpu.backends.cpu import CpuBackend

    def pick(device: str = "auto") -> Device:
        return Device("cuda:0", "NVIDIA") if device in ("auto", "cuda") else pick_device(device)

    monkeypatch.setattr(smart, "pick_device", pick)
    monkeypatch.setattr(smart, "get_backend", lambda device, n: CpuBackend(n or threads))


def test_the_cheapest_place_is_taken(costs: dict[Place, tuple[float, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread for small layers, two for larger ones, the GPU for the largest."""
    on_gpu(monkeypatch)
    costs |= {
        ONE: (1e-5, 1e-4, 4e-4, 32e-4),
        TWO: (2e-5, 8e-5, 3e-4, 24e-4),
        GPU: (9e-5, 2e-4, 4e-4, 9e-4),
    }
    chosen = []
    for n_bytes in (1 << 12, 1 << 20, 1 << 25, 1 << 27):
        choice = ArrowQuantV2().explain({"w": np.zeros(n_bytes // 4, np.float32)})
        chosen.append((choice.device, choice.threads))
        assert choice.costs.keys() == {"cpu, 1 thread", "cpu, 2 threads", "cuda:0"}
        assert min(choice.costs.values()) == choice.costs[str(Place(choice.device, choice.threads))]
    assert chosen == [("cpu", 1), ("cpu", 2), ("cuda:0", None), ("cuda:0", None)]
    assert choice.reason == ("batch on cuda:0: 2.61 ms for 134 MB in 1 layer, the least of 3 candidates")


def test_costs_are_those_of_all_layers(costs: dict[Place, tuple[float, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small layers are not one large one: the GPU's cost for each counts."""
    on_gpu(monkeypatch)
    costs |= {ONE: (1e-5, 1e-4, 4e-4, 32e-4), TWO: (1e-5, 1e-4, 4e-4, 33e-4), GPU: (9e-5, 2e-4, 4e-4, 9e-4)}
    small = {str(i): np.zeros(1 << 10, np.float32) for i in range(100)}
    choice = ArrowQuantV2().explain(small)
    assert (choice.device, choice.threads) == ("cpu", 1)
    assert choice.costs["cuda:0"] == pytest.approx(100 * 9e-5)
    table = ArrowQuantV2().explain(numpy_to_arrow_table(small))
    assert table.costs == pytest.approx(choice.costs)
    reader = ArrowQuantV2().explain(numpy_to_arrow_table(small).to_reader())
    assert (reader.device, "not known yet" in reader.reason) == ("cuda:0", True)


@pytest.mark.parametrize(
    ("options", "choice"),
    [
        ({"device": "cuda"}, ("cuda:0", None)),
        ({"device": "cpu", "threads": 3}, ("cpu", 3)),
        ({"device": "reference"}, ("reference", None)),
    ],
)
def test_what_was_asked_for_is_not_replaced(
    options: dict[str, Any], choice: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch)
    quantizer = ArrowQuantV2(device="cpu")
    quantizer.device, quantizer.threads = options["device"], options.get("threads")
    found = quantizer.explain(layers(1))
    assert (found.device, found.threads) == choice
    assert found.costs == {}
    assert "nothing else can be chosen" in found.reason


def test_the_choice_is_carried_out(costs: dict[Place, tuple[float, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    from arrowquant_gpu import ops
    from arrowquant_gpu.backends.cpu import CpuBackend

    monkeypatch.setattr(smart, "get_backend", lambda *_: CpuBackend(2))
    costs |= {ONE: (1.0,) * 4, TWO: (2.0,) * 4}
    asked, real = [], ops.get_backend
    monkeypatch.setattr(
        ops, "get_backend", lambda device, threads: (asked.append((device, threads)), real(device, threads))[1]
    )
    weights = layers(1)
    a = ArrowQuantV2(device="cpu").quantize_batch_smart(weights)
    costs |= {ONE: (3.0,) * 4}
    b = ArrowQuantV2(device="cpu").quantize_batch_smart(weights)
    assert asked == [("cpu", 1), ("cpu", 2)]
    for results in (a, b):
        check_layer(results["layer.0.weight"], weights["layer.0.weight"], SCHEME)


def test_this_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smart, "SIZES", (1 << 12, 1 << 13, 1 << 14, 1 << 15))
    smart._measure.cache_clear()
    calls, real = [], smart._seconds
    monkeypatch.setattr(smart, "_seconds", lambda x, place: (calls.append(place), real(x, place))[1])
    try:
        measured = smart._measure((ONE, TWO))
        assert smart._measure((ONE, TWO)) is measured
    finally:
        smart._measure.cache_clear()
    assert calls == [ONE, TWO] * 4 * (1 + smart.ROUNDS)
    assert all(len(seconds) == 4 and min(seconds) > 0 for seconds in measured.values())


def test_costs_beyond_what_was_measured() -> None:
    measured = (1.0, 2.0, 3.0, 5.0)
    assert smart._predict(measured, [0, SIZES[0], SIZES[3]]) == 1 + 1 + 5
    assert smart._predict(measured, [2 * SIZES[3] - SIZES[2]]) == pytest.approx(7)
    assert smart._predict((1.0, 2.0, 3.0, 2.5), [1 << 30]) == 2.5


def test_no_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = ArrowQuantV2()
    quantizer.device = "cuda:9"
    from arrowquant_gpu import backends

    monkeypatch.setattr(backends, "_cuda_usable", lambda: (False, "none here"))
    with pytest.raises(DeviceError, match="none here"):
        quantizer.explain(layers(1))
