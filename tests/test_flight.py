"""The Flight service: what comes back is what is made here, to the bit; results are kept; errors keep their class."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.flight as fl
import pytest

from arrowquant_gpu import arrow_columns, errors
from arrowquant_gpu.errors import (
    BusyError,
    InputError,
    NonFiniteError,
    NotFoundError,
    SchemeError,
    ServiceError,
    TargetError,
)
from arrowquant_gpu.flight import Client, Server, cuts
from arrowquant_gpu.flight.calls import Calls
from arrowquant_gpu.flight.cuts import cut_quantized, cut_weights, join, quantized_schema
from arrowquant_gpu.flight.faults import from_flight, to_flight
from arrowquant_gpu.schemes import Scheme
from arrowquant_gpu.tables import ERRORS_KEY
from arrowquant_gpu.tables.dequantize import dequantize_table
from arrowquant_gpu.tables.quantize import quantize_table
from arrowquant_gpu.tables.weights import Rows
from benchmarks import bench_flight

from .test_layers import ROOT

SCHEMES = ("int4_g128_asym", "int8_g32", "int3_channel_f16", "int2_g64_asym_bf16", "int8_tensor")
# Small, so that tensors of a few rows are cut.
MESSAGE = 1 << 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server("grpc://127.0.0.1:0", store=tmp_path_factory.mktemp("store"), device="cpu") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.location, message_bytes=MESSAGE) as connected:
        yield connected


@pytest.fixture(autouse=True)
def _small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "GATHERED_BYTES", MESSAGE // 4)


def arrays(dtype: Any = np.float32, seed: int = 0) -> dict[str, np.ndarray]:
    """One tensor of many messages, small ones that share one, a vector, and an empty one."""
    rng = np.random.default_rng(seed)
    shapes = {"big": (300, 256), "a": (3, 64), "b": (5, 7, 32), "vector": (100,), "empty": (0, 64), "c": (40, 256)}
    return {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}


def table(weights: dict[str, np.ndarray]) -> pa.Table:
    """Float arrays as Arrow has them, by pyarrow alone."""
    cells = pa.array([w.reshape(-1) for w in weights.values()])
    return pa.table({"layer_name": list(weights), "weights": cells, "shape": [list(w.shape) for w in weights.values()]})


def assert_same(got: pa.Table, wanted: pa.Table) -> None:
    assert got.schema.equals(wanted.schema, check_metadata=True)
    got.validate(full=True)
    assert got.equals(wanted)


# --- Quantize and decode ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_comes_back_is_what_is_made_here(client: Client, scheme: str) -> None:
    weights = arrays()
    wanted = quantize_table(table(weights), scheme, device="reference")
    assert_same(client.quantize(weights, scheme), wanted)
    assert_same(client.quantize(table(weights), Scheme.parse(scheme)), wanted)
    assert_same(client.quantize(table(weights).to_reader(max_chunksize=2), scheme), wanted)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16, np.int8, ml_dtypes.float8_e4m3fn])
def test_every_element_type(client: Client, dtype: Any) -> None:
    weights = arrays(dtype)
    rows = client.quantize(weights, "int8_g32")
    assert set(rows["dtype"].to_pylist()) == {np.dtype(dtype).name}
    wide = quantize_table(table({k: w.astype(np.float32) for k, w in weights.items()}), "int8_g32", device="reference")
    assert_same(rows.drop_columns("dtype"), wide.drop_columns("dtype"))


def test_arrays_of_several_types_keep_their_order(client: Client) -> None:
    weights = arrays() | {"half": np.ones((4, 64), np.float16)} | {"last": np.ones((2, 32), np.float32)}
    rows = client.quantize(weights, "int4_g32")
    assert rows["layer_name"].to_pylist() == list(weights)
    assert rows["dtype"].to_pylist() == [w.dtype.name for w in weights.values()]
    for name in ("half", "last"):
        one = table({name: weights[name]})
        row = rows.filter(pc.equal(rows["layer_name"], name))
        assert_same(row.combine_chunks(), quantize_table(one, "int4_g32", device="reference"))


def test_any_strides_are_sent(client: Client) -> None:
    x = np.arange(64 * 512, dtype=np.float32).reshape(64, 512)
    wanted = quantize_table(table({"w": np.ascontiguousarray(x[::2, ::-1])}), device="reference")
    assert_same(client.quantize({"w": x[::2, ::-1]}), wanted)


def test_a_stream_has_the_pieces_in_order(client: Client) -> None:
    weights = arrays()
    stream, problems = client.quantize_stream(weights, "int4_g128_asym")
    batches = list(stream)
    assert problems == []
    pieces = [(r["layer_name"], r["chunk"], r["n_chunks"]) for b in batches for r in b.to_pylist()]
    assert [c for n, c, _ in pieces if n == "big"] == list(range(pieces[0][2]))
    assert pieces[0][2] > 3
    assert_same(join(batches, stream.schema), quantize_table(table(weights), device="reference"))


def test_rows_that_came_cut_stay_cut(client: Client) -> None:
    w = np.random.default_rng(3).standard_normal((6, 64), np.float32)
    cut = pa.table(
        {
            "layer_name": ["w", "w"],
            "weights": pa.array([w[:2].reshape(-1), w[2:].reshape(-1)]),
            "shape": [[6, 64]] * 2,
            "chunk": pa.array([0, 1], pa.uint32()),
            "n_chunks": pa.array([2, 2], pa.uint32()),
        }
    )
    whole = table({"big": arrays()["big"]}).append_column("chunk", pa.array([0], pa.uint32()))
    mixed = pa.concat_tables([cut, whole.append_column("n_chunks", pa.array([1], pa.uint32()))])
    for weights in (cut, mixed):
        rows = quantize_table(weights, "int8_g32", device="reference")
        assert_same(client.quantize(weights, "int8_g32"), rows)
        assert_same(client.dequantize(rows), dequantize_table(rows, device="reference"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_decoded_weights(client: Client, scheme: str, dtype: str) -> None:
    rows = quantize_table(table(arrays()), scheme, device="cpu")
    wanted = dequantize_table(rows, dtype, device="reference")
    assert_same(client.dequantize(rows, dtype), wanted)
    assert client.dequantize(quantize_table(table(arrays()).slice(0, 1), scheme, device="cpu"), dtype).num_rows == 1


def test_a_row_of_to_arrow_is_decoded(client: Client) -> None:
    """The columns of V2 Extended, whose row_offset is not true of a piece."""
    rows = quantize_table(table(arrays()).slice(0, 1), "int4_g128", device="cpu")
    tensor = arrow_columns.read(rows)[1]
    decoded = client.dequantize(tensor.to_arrow("big"))
    assert decoded["n_chunks"].to_pylist() == [1]
    assert_same(decoded.select(["layer_name", "weights", "shape"]), client.dequantize(rows))


def test_a_stream_is_read_while_it_is_answered(client: Client) -> None:
    """The source is never more than the messages that may be under way ahead of the results."""
    n_read, n_got, most = 0, 0, 0
    names = [f"w{i}" for i in range(40)]

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal n_read
        for name in names:
            n_read += 1
            yield table({name: np.ones((64, 256), np.float32)}).to_batches()[0]

    schema = table({"w": np.ones((1, 1), np.float32)}).schema
    stream, _ = client.quantize_stream(pa.RecordBatchReader.from_batches(schema, batches()), "int4_g32")
    for batch in stream:
        n_got += batch.num_rows
        most = max(most, n_read - n_got)
    assert n_got == len(names)
    assert 0 < most <= 5


def test_a_stream_that_is_dropped_ends_its_call(server: Server, client: Client) -> None:
    weights = {f"w{i}": np.ones((64, 256), np.float32) for i in range(40)}
    stream, _ = client.quantize_stream(weights, "int4_g32")
    stream.read_next_batch()
    del stream
    wait_for(lambda: client.health()["running"] == 0)
    assert not [t for t in threading.enumerate() if t.name == "flight sender"]


def wait_for(true: Any, seconds: float = 20.0) -> None:
    """Return once `true()` is; fail after a time that no machine needs."""
    event = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if true():
            return
        event.wait(0.02)
    raise AssertionError("it did not become true")


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_errors_arrive_as_they_were(client: Client) -> None:
    weights = arrays()
    weights["a"][1, 2] = np.nan
    with pytest.raises(NonFiniteError, match=r"^a: 1 NaN and 0 infinite values") as caught:
        client.quantize(weights)
    assert (caught.value.name, caught.value.n_nan, caught.value.first, caught.value.shape) == ("a", 1, 66, (3, 64))
    with pytest.raises(SchemeError, match="9 bits"):
        client.quantize(arrays(), "int9_g32")
    with pytest.raises(InputError, match="there twice"):
        client.quantize(pa.concat_tables([table(arrays()), table(arrays())]))
    with pytest.raises(InputError, match="no weights"):
        client.quantize({})
    with pytest.raises(InputError, match="list"):
        client.quantize({"w": [1.0, 2.0]})


def test_an_error_of_the_source_ends_the_call(client: Client) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        yield table({"w": np.ones((64, 256), np.float32)}).to_batches()[0]
        raise ZeroDivisionError("the source")

    schema = table({"w": np.ones((1, 1), np.float32)}).schema
    stream, _ = client.quantize_stream(pa.RecordBatchReader.from_batches(schema, batches()), "int4_g32")
    with pytest.raises((ZeroDivisionError, InputError), match="the source"):
        stream.read_all()
    wait_for(lambda: client.health()["running"] == 0)


def test_what_cannot_be_quantized_is_left_out_and_listed(client: Client) -> None:
    weights = arrays()
    weights["big"][200, 5] = np.inf  # in a piece behind others
    weights["b"][0, 0, 0] = np.nan
    good = {k: w for k, w in weights.items() if k not in ("big", "b")} | {}
    rows = client.quantize(weights, "int4_g32", continue_on_error=True)
    listed = json.loads(rows.schema.metadata[ERRORS_KEY])
    assert [(p["layer"], p["error"]) for p in listed] == [("big", "NonFiniteError"), ("b", "NonFiniteError")]
    plain = rows.replace_schema_metadata({k: v for k, v in rows.schema.metadata.items() if k != ERRORS_KEY})
    assert_same(plain, quantize_table(table(good), "int4_g32", device="reference"))
    stream, problems = client.quantize_stream(weights | {"list": [1.0]}, "int4_g32", continue_on_error=True)
    list(stream)
    assert {p.layer: type(p.error) for p in problems} == {
        "big": NonFiniteError,
        "b": NonFiniteError,
        "list": InputError,
    }


@pytest.mark.parametrize(
    "error",
    [
        InputError("no weights"),
        NonFiniteError("fc", 1, 2, 3, (4, 5)),
        errors.QualityError("fc", 0.5, 0.9, "int2_g64"),
        TargetError("the disk is full"),
        errors.DeviceMemoryError("ünïcode"),
        BusyError("later"),
        errors.AuthenticationError("who?"),
        InputError("x" * 100_000),
        InputError("\u4e16" * 100_000),
        NonFiniteError("n" * 100_000, 1, 2, 3, (4, 5)),
    ],
    ids=lambda e: f"{type(e).__name__} {len(str(e))}",
)
def test_an_error_survives_the_wire(error: Any) -> None:
    """Through gRPC, whose trailers have little room."""

    class One(fl.FlightServerBase):  # type: ignore[misc]
        def do_action(self, context: Any, action: Any) -> Any:
            raise to_flight(error)

    with One("grpc://127.0.0.1:0") as one, fl.connect(f"grpc://127.0.0.1:{one.port}") as connected:
        with pytest.raises(fl.FlightError) as caught:
            list(connected.do_action(fl.Action("x", b"")))
        got = from_flight(caught.value, "here")
    assert type(got) is type(error)
    if len(str(error)) < 1000:
        assert str(got) == str(error)
        assert vars(got) == vars(error)
    else:
        assert str(got)[:50] == str(error)[:50]
        assert "more characters" in str(got)


def test_an_unreachable_server_is_a_service_error() -> None:
    with Client("grpc://127.0.0.1:1") as nobody:
        with pytest.raises(ServiceError, match=r"grpc://127.0.0.1:1: no answer"):
            nobody.health()
        with pytest.raises(ServiceError, match="no answer"):
            nobody.quantize(arrays())
    for location in ("http://x:1", "grpc://", "grpc://x", "grpc://x:y", "grpc://u@x:1", "8815"):
        with pytest.raises(ServiceError, match="location"):
            Client(location)


# --- Stored results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_result_is_kept(client: Client, scheme: str) -> None:
    rows = quantize_table(table(arrays()), scheme, device="reference")
    assert client.put(f"rows-{scheme}", rows) == []
    assert_same(client.get(f"rows-{scheme}"), rows)
    assert client.put(f"weights-{scheme}", arrays(), scheme=scheme) == []
    assert_same(client.get(f"weights-{scheme}"), rows)
    stored = client.get_stream(f"weights-{scheme}").read_all()
    assert (stored.num_rows > rows.num_rows) == (scheme != "int8_tensor")
    client.drop(f"rows-{scheme}")
    with pytest.raises(NotFoundError, match="no stored result"):
        client.get(f"rows-{scheme}")


def test_the_list_says_what_there_is(tmp_path: Path) -> None:
    rows = quantize_table(table(arrays()), "int8_g32", device="cpu")
    with Server("grpc://127.0.0.1:0", store=tmp_path / "deep" / "store", device="cpu") as server:
        with Client(server.location) as client:
            assert client.list() == []
            client.put("b.2", rows)
            client.put("a_1", rows.slice(0, 2))
            found = client.list()
            assert [(r.name, r.rows) for r in found] == [("a_1", 2), ("b.2", rows.num_rows)]
            assert found[1].bytes == (tmp_path / "deep" / "store" / "b.2.arrow").stat().st_size
            with fl.connect(server.location) as plain:
                descriptor = fl.FlightDescriptor.for_path("a_1")
                assert plain.get_schema(descriptor).schema == client.get_stream("a_1").schema
                info = plain.get_flight_info(descriptor)
                assert plain.do_get(info.endpoints[0].ticket).read_all().num_rows == info.total_records == 2
            with pytest.raises(TargetError, match="overwrite"):
                client.put("a_1", rows)
            client.put("a_1", rows.slice(0, 1), overwrite=True)
            assert client.get("a_1").num_rows == 1
        # It is there for the next server, which removes what one that was killed left.
        (tmp_path / "deep" / "store" / ".x.123.part").write_bytes(b"half")
        with pytest.raises(TargetError, match="another server"):
            Server("grpc://127.0.0.1:0", store=tmp_path / "deep" / "store", device="cpu")
    server = Server("grpc://127.0.0.1:0", store=tmp_path / "deep" / "store", device="cpu")
    with server, Client(server.location) as client:
        assert [r.name for r in client.list()] == ["a_1", "b.2"]
    assert not list((tmp_path / "deep" / "store").glob("*.part"))


def test_a_reader_reads_on_what_is_dropped(client: Client) -> None:
    rows = client.quantize(arrays())
    client.put("dropped", rows)
    stream = client.get_stream("dropped")
    client.drop("dropped")
    assert stream.read_all().num_rows >= rows.num_rows


def test_a_server_without_a_store_says_so() -> None:
    with Server("grpc://127.0.0.1:0", device="cpu") as server, Client(server.location) as client:
        assert client.info()["store"] is False
        for call in (lambda: client.put("x", client.quantize(arrays())), lambda: client.get("x")):
            with pytest.raises(ServiceError, match="--store"):
                call()
        assert client.list() == []


def test_pieces_that_were_refused_are_not_stored(client: Client) -> None:
    weights = arrays()
    weights["a"][0, 0] = np.nan
    (problem,) = client.put("left-out", weights, scheme="int4_g32", continue_on_error=True)
    assert (problem.layer, type(problem.error)) == ("a", NonFiniteError)
    assert client.get("left-out")["layer_name"].to_pylist() == [n for n in weights if n != "a"]
    weights["big"][200, 5] = np.nan
    with pytest.raises(NonFiniteError, match=r"^big"):
        client.put("cut", weights, scheme="int4_g32", continue_on_error=True)
    assert "cut" not in {r.name for r in client.list()}


def test_a_plain_client_puts_by_path(server: Server, client: Client) -> None:
    rows = quantize_table(table(arrays()), "int4_g32", device="cpu")
    with fl.connect(server.location) as plain:
        writer, reader = plain.do_put(fl.FlightDescriptor.for_path("plain"), rows.schema)
        writer.write_table(rows)
        writer.done_writing()
        assert json.loads(reader.read().to_pybytes()) == {"rows": rows.num_rows, "errors": []}
        writer.close()
    assert_same(client.get("plain"), rows)


def put_plainly(plain: Any, descriptor: Any, rows: pa.Table, end: bytes | None = None, options: Any = None) -> str:
    """What a DoPut that fails says."""
    writer, reader = plain.do_put(descriptor, rows.schema, options)
    with contextlib.suppress(fl.FlightError):
        writer.write_table(rows)
        if end is not None:
            writer.write_metadata(end)
        writer.done_writing()
    with contextlib.suppress(fl.FlightError):
        assert reader.read() is None
    with pytest.raises(fl.FlightServerError) as caught:
        writer.close()
    return str(json.loads(caught.value.extra_info)["message"])


# --- Cutting and joining ---------------------------------------------------------------------------------------------


def test_messages_are_small_and_views() -> None:
    weights = arrays()
    layers = [layer for batch in table(weights).to_batches() for layer in Rows(batch.schema).layers(batch)]
    messages = list(cut_weights(layers, Scheme.parse("int4_g32"), MESSAGE))
    assert max(m["weights"].nbytes for m in messages) <= MESSAGE * 1.01
    start = layers[0].weights.ctypes.data
    addresses = [m["weights"].values.buffers()[1].address for m in messages if m["layer_name"][0].as_py() == "big"]
    assert addresses == [start + i * MESSAGE for i in range(len(addresses))]
    assert [n for m in messages for n in m["layer_name"].to_pylist() if n != "big"] == [
        n for n in weights if n != "big"
    ]


def test_a_tensor_with_one_scale_is_not_cut() -> None:
    layers = [layer for batch in table(arrays()).to_batches() for layer in Rows(batch.schema).layers(batch)]
    messages = list(cut_weights(layers, Scheme.parse("int8_tensor"), MESSAGE))
    assert sum("big" in m["layer_name"].to_pylist() for m in messages) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_rows_are_joined_as_they_were(scheme: str) -> None:
    rows = quantize_table(table(arrays()), scheme, device="reference")
    schema = quantized_schema(rows.schema)
    messages = list(cut_quantized(rows.to_batches(), schema, 1 << 12))
    assert_same(join(messages, schema), rows)


def test_pieces_out_of_order_are_noticed() -> None:
    rows = quantize_table(table(arrays()), "int4_g32", device="reference")
    schema = quantized_schema(rows.schema)
    messages = list(cut_quantized(rows.to_batches(), schema, 1 << 12))
    with pytest.raises(InputError, match="do not follow"):
        join([messages[1], messages[0], *messages[2:]], schema)
    with pytest.raises(InputError, match="do not follow"):
        join(messages[1:], schema)


# --- The command -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server in a process of its own, and the line that it prints when it listens; killed where it does not end."""
    command = [sys.executable, "-m", "arrowquant_gpu.cli", "serve", "--json", "--device", "cpu", *options]
    if "--location" not in options:
        command += ["--location", "grpc://127.0.0.1:0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command(tmp_path: Path, sent: int, code: int) -> None:
    with serving("--store", str(tmp_path), "--max-clients", "3", "--memory-limit", "90MiB") as (process, ready):
        assert (ready["max_clients"], ready["message_bytes"]) == (3, 10 << 20)
        with Client(ready["location"]) as client:
            client.put("x", arrays(), scheme="int4_g32")
            assert client.info()["limits"]["memory_bytes"] == 90 << 20
        process.send_signal(sent)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == ""
    assert "every call was finished" in err
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["x.arrow"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--location", "grpc://0.0.0.0:0"], 11, "needs a token (--token-file, or ARROWQUANT_TOKEN) and TLS"),
        (["--location", "grpc+tls://127.0.0.1:0"], 11, "TLS needs a certificate"),
        (["--location", "http://127.0.0.1:0"], 11, "write grpc://HOST:PORT"),
        (["--memory-limit", "10MB"], 11, "raise it, or serve fewer"),
        (["--device", "cuda:7"], 4, "cannot be used"),
        (["--tls-cert", "x.pem"], 11, "--tls-key"),
    ],
)
def test_what_cannot_be_served_is_refused(options: list[str], code: int, message: str) -> None:
    from typer.testing import CliRunner

    from arrowquant_gpu import cli

    result = CliRunner().invoke(cli.app, ["serve", *options], env={"ARROWQUANT_TOKEN": None})
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stdout == ""


def test_a_port_that_is_taken_is_refused(server: Server) -> None:
    with pytest.raises(ServiceError, match="cannot listen there"):
        Server(server.location, device="cpu")


def test_importing_the_package_does_not_load_flight() -> None:
    code = "import sys, arrowquant_gpu, arrowquant_gpu.cli; print('pyarrow.flight' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_calls_are_counted() -> None:
    calls = Calls(1, 60.0, lambda peer: None)
    with calls.running("peer", "one"):
        with pytest.raises(BusyError, match=r"1 clients .* try again in 1 s"), calls.running("other", "two"):
            raise AssertionError("it was let in")
        assert [c.describe()["call"] for c in calls.list()] == ["one"]
    assert calls.list() == []
    calls.close()
    with pytest.raises(BusyError, match="closing"), calls.running("peer", "three"):
        raise AssertionError("it was let in")


def test_the_benchmark_measures_every_way() -> None:
    bench_flight.check_bits("int4_g32")
    found = bench_flight.measure("int4_g32", 1 << 20, 1, MESSAGE, rows=16)
    assert found["weight_bytes"] == 1 << 20
    for way in bench_flight.WAYS:
        assert found[way]["gb_s"] > 0
        assert found[way]["server_anonymous_mb"] > 0 < found[way]["client_resident_mb"]
