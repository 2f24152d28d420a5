"""The Flight service under clients that mean harm or die: it lives on, and others' bytes are right."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import pytest

from arrowquant_gpu.errors import ArrowQuantError, BusyError, InputError, ServiceError
from arrowquant_gpu.flight import Client, Server, connections, cuts
from arrowquant_gpu.tables.quantize import quantize_table

from .test_flight import arrays, assert_same, put_plainly, serving, table, wait_for
from .test_layers import ROOT


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = tmp_path_factory.mktemp("store")
    with Server("grpc://127.0.0.1:0", store=store, device="cpu", max_clients=4, memory_limit=48 << 20) as running:
        yield running


@pytest.fixture(autouse=True)
def _lives_on(server: Server) -> Iterator[None]:
    """After every test: nothing runs, nothing is left in the store, and a good client gets the right bytes."""
    yield
    wait_for(lambda: not server._calls.list())
    with Client(server.location) as client:
        assert_same(client.quantize(arrays(), "int4_g32"), quantize_table(table(arrays()), "int4_g32", device="cpu"))
        assert client.list() == []
    assert server._store is not None
    assert [p.name for p in server._store.directory.iterdir()] == [".lock"]


def exchange(server: Server, command: bytes, schema: pa.Schema, batches: list[pa.RecordBatch]) -> Any:
    """What a plain client gets, in one thread: it reads once it has written everything."""
    with fl.connect(server.location) as plain:
        writer, reader = plain.do_exchange(fl.FlightDescriptor.for_command(command))
        try:
            writer.begin(schema)
            for batch in batches:
                writer.write_batch(batch)
            writer.done_writing()
        except fl.FlightError:
            pass
        try:
            return reader.read_all()
        finally:
            with contextlib.suppress(pa.ArrowException):
                writer.close()


GOOD = table({"w": np.ones((4, 64), np.float32)}).to_batches()[0]
QUANTIZE = b'{"action": "quantize", "scheme": "int4_g32"}'


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "action None"),
        (b'{"action": "delete everything"}', "asks for one of"),
        (b'{"action": ["quantize"]}', "asks for one of"),
        (b'{"action": "quantize", "scheme": "int9"}', "not a scheme"),
        (b'{"action": "quantize", "scheme": 4}', "must be a str"),
        (b'{"action": "quantize", "scheme": null}', "must be a str"),
        (b'{"action": "quantize", "continue_on_error": "yes"}', "must be a bool"),
        (b'{"action": "quantize", "device": "cuda"}', "device is unknown"),
        (b'{"action": "dequantize", "dtype": "int4"}', "dequantize gives"),
        (b'{"action": "put", "name": "x"}', "DoPut"),
        (b'{"action": "quantize", "is_counted": true}', "unknown"),
        (b"[" * 100_000, "bytes; at most|not JSON"),
        (b'{"a": ' * 5000, "not JSON"),
        (b'{"action": "' + b"x" * 100_000 + b'"}', "bytes; at most"),
    ],
    ids=lambda x: x[:40].decode(errors="replace") if isinstance(x, bytes) else "",
)
def test_commands_that_mean_nothing(server: Server, command: bytes, message: str) -> None:
    with pytest.raises(fl.FlightServerError, match=message) as caught:
        exchange(server, command, GOOD.schema, [GOOD])
    assert json.loads(caught.value.extra_info)["error"] in ("InputError", "SchemeError")


def test_calls_that_do_not_exist(server: Server) -> None:
    with fl.connect(server.location) as plain:
        for action, body in (
            ("shutdown", b""),
            ("drop", b""),
            ("drop", b"[]"),
            ("health", b'{"a": 1}'),
            ("info", b"{"),
        ):
            with pytest.raises(fl.FlightServerError):
                list(plain.do_action(fl.Action(action, body)))
        with pytest.raises(fl.FlightServerError, match="no stored result"):
            plain.do_get(fl.Ticket(b"nothing")).read_all()
        for raw in (b"", b"\xff", b"x" * 10_000):
            with pytest.raises(fl.FlightServerError):
                plain.do_get(fl.Ticket(raw)).read_all()
        for descriptor in (fl.FlightDescriptor.for_command(QUANTIZE), fl.FlightDescriptor.for_path("a", "b")):
            with pytest.raises(fl.FlightServerError, match="path of one part"):
                plain.get_flight_info(descriptor)
        assert {a.type for a in plain.list_actions()} == {"health", "info", "schemes", "drop"}


def weights_of(**columns: Any) -> pa.RecordBatch:
    return pa.record_batch({"layer_name": ["w"], "weights": [[1.0, 2.0]], **columns})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pa.record_batch({"x": [1]}), "missing"),
        (pa.record_batch({"layer_name": ["w"], "weights": ["text"]}), "list of numbers"),
        (pa.record_batch({"layer_name": ["w"], "weights": [[None, 1.0]]}), "null"),
        (pa.record_batch({"layer_name": [None], "weights": [[1.0]]}), "null"),
        (pa.record_batch({"layer_name": ["w"], "weights": pa.array([None], pa.list_(pa.float32()))}), "null"),
        (weights_of(layer_name=[""]), "empty"),
        (weights_of(weights=[[1.0, float("nan")]]), "1 NaN"),
        (weights_of(weights=[[float("-inf")]]), "1 infinite"),
        (weights_of(shape=[[3]]), "3 weights, and the row has 2"),
        (weights_of(shape=[[-2]]), "sizes"),
        (weights_of(shape=[[1 << 62, 1 << 62]]), "weights"),
        (weights_of(chunk=[0]), "go together"),
        (weights_of(shape=[[2]], chunk=[1], n_chunks=[2]), "where chunk 0"),
        (weights_of(shape=[[2]], chunk=[0], n_chunks=[4_000_000_000]), "chunks"),
        (weights_of(shape=[[2]], chunk=[-1], n_chunks=[-1]), "no part"),
        (pa.record_batch({"layer_name": ["w", "w"], "weights": [[1.0], [1.0]]}), "twice"),
        (pa.record_batch({"layer_name": ["x" * 1_000_000], "weights": [[float("nan")]]}), "x"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_weights_that_are_none(server: Server, batch: pa.RecordBatch, message: str) -> None:
    with pytest.raises(fl.FlightServerError, match=message) as caught:
        exchange(server, QUANTIZE, batch.schema, [batch])
    assert json.loads(caught.value.extra_info)["error"] in ("InputError", "NonFiniteError")


def test_quantized_rows_that_are_none(server: Server) -> None:
    rows = quantize_table(table(arrays()), "int4_g32", device="cpu").to_batches()[0]
    command = b'{"action": "dequantize"}'
    broken = {
        "data": rows.set_column(1, "quantized_data", pa.array([b"x"] * rows.num_rows, pa.large_binary())),
        "scheme": rows.set_column(7, "scheme", pa.array(["int8_g32"] * rows.num_rows)),
        "shape": rows.set_column(4, "shape", pa.array([[1 << 40, 1 << 40]] * rows.num_rows, pa.list_(pa.int64()))),
        "missing": rows.drop_columns(["scales"]),
        "twice": pa.concat_batches([rows, rows]),
    }
    for what, batch in broken.items():
        with pytest.raises(fl.FlightServerError) as caught:
            exchange(server, command, batch.schema, [batch])
        assert json.loads(caught.value.extra_info)["error"] in ("InputError", "SchemeError"), what
        with fl.connect(server.location) as plain:
            assert put_plainly(plain, fl.FlightDescriptor.for_path("broken"), pa.Table.from_batches([batch]))


def test_a_message_that_is_too_large_is_refused(server: Server) -> None:
    large = table({"w": np.zeros((1 << 10, 1100), np.float32)}).to_batches()[0]
    assert server.message_bytes == 4 << 20
    with pytest.raises(fl.FlightServerError, match=r"takes 4194304 at a time: cut large tensors into rows") as caught:
        exchange(server, QUANTIZE, large.schema, [large])
    assert json.loads(caught.value.extra_info)["error"] == "InputError"
    with Client(server.location, message_bytes=1 << 30) as client:
        # The client cuts it by what the server says that it takes.
        assert client.quantize(large).num_rows == 1
        with pytest.raises(InputError, match="cut large tensors"):
            client.quantize(large, "int8_tensor")
    # Two bits a weight: a small message that decodes to a large one.
    rows = quantize_table(
        table({"w": np.zeros((1 << 12, 512), np.float32)}), "int2_channel", device="cpu"
    ).to_batches()[0]
    with pytest.raises(fl.FlightServerError, match="decodes to"):
        exchange(server, b'{"action": "dequantize"}', rows.schema, [rows])


def test_a_stream_that_breaks_off_is_noticed(server: Server) -> None:
    cut = weights_of(shape=[[4]], chunk=[0], n_chunks=[2])
    with pytest.raises(fl.FlightServerError, match="chunk"):
        exchange(server, QUANTIZE, cut.schema, [cut])
    with fl.connect(server.location) as plain:
        rows = quantize_table(GOOD, "int4_g32", device="cpu")
        for end in (None, b'{"rows": 2}', b'{"rows": "1"}', b"nonsense"):
            counted = fl.FlightDescriptor.for_command(b'{"action": "put", "name": "counted"}')
            assert re.search("cut off|not JSON", put_plainly(plain, counted, rows, end))


def test_damaged_streams_do_no_harm(server: Server) -> None:
    """Bytes of HTTP/2 and gRPC, some of them flipped, from a connection that is then dropped."""
    recorded = record_exchange(server)
    rng = random.Random(0)
    for i in range(60):
        data = bytearray(recorded)
        for _ in range(rng.choice((0, 1, 3, 30))):
            data[rng.randrange(24, len(data))] = rng.randrange(256)
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
            try:
                raw.sendall(bytes(data[: rng.randrange(len(data))] if i % 3 == 0 else data))
                raw.settimeout(0.05)
                while raw.recv(1 << 16):
                    pass
            except OSError:
                pass


def record_exchange(server: Server) -> bytes:
    """What a client sends for one good exchange, taken down by a relay."""
    sent = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as relay:

        def copy(source: socket.socket, target: socket.socket, note: bool) -> None:
            try:
                while data := source.recv(1 << 16):
                    if note:
                        sent.extend(data)
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        def run() -> None:
            near, _ = relay.accept()
            with near, socket.create_connection(("127.0.0.1", server.port)) as far:
                back = threading.Thread(target=copy, args=(far, near, False))
                back.start()
                copy(near, far, True)
                back.join()

        thread = threading.Thread(target=run)
        thread.start()
        with fl.connect(f"grpc://127.0.0.1:{relay.getsockname()[1]}") as plain:
            writer, reader = plain.do_exchange(fl.FlightDescriptor.for_command(QUANTIZE))
            writer.begin(GOOD.schema)
            writer.write_batch(GOOD)
            writer.done_writing()
            assert reader.read_all().num_rows == 1
            writer.close()
        del writer, reader, plain
        thread.join(20)
    assert len(sent) > 500
    return bytes(sent)


KILLED = """
import sys
import numpy as np, pyarrow as pa, pyarrow.flight as fl
location, what, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
batch = lambda i: pa.record_batch({"layer_name": [f"w{i}"], "weights": [np.ones(size, np.float32)]})
client = fl.connect(location)
if what == "exchange":
    writer, _ = client.do_exchange(fl.FlightDescriptor.for_command(b'{"action": "quantize"}'))
    writer.begin(batch(0).schema)
elif what == "put":
    command = b'{"action": "put", "name": "killed", "scheme": "int4_g32"}'
    writer, _ = client.do_put(fl.FlightDescriptor.for_command(command), batch(0).schema)
else:
    from arrowquant_gpu.tables.quantize import quantize_table
    rows = lambda i: quantize_table(pa.Table.from_batches([batch(i)]), device="reference")
    writer, _ = client.do_put(fl.FlightDescriptor.for_path("killed"), rows(0).schema)
i = 0
while True:
    writer.write_table(rows(i)) if what == "path" else writer.write_batch(batch(i))
    if i == 0:
        print("on the way", flush=True)
    i += 1
"""


@pytest.mark.parametrize("what", ["exchange", "put", "path"])
@pytest.mark.parametrize("size", [64, 200_000])
def test_a_client_that_is_killed_leaves_nothing(server: Server, what: str, size: int) -> None:
    command = [sys.executable, "-c", KILLED, server.location, what, str(size)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "on the way\n"
        wait_for(lambda: server._calls.list() and server._calls.list()[0].rows)
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: not server._calls.list())


def test_a_flood_of_clients_is_turned_away(server: Server) -> None:
    """As many streams as there may be stay open; others hear when to come back, and the open ones end right."""
    weights, wanted = table(arrays()), quantize_table(table(arrays()), "int4_g32", device="cpu")
    schema = weights.schema
    go_on = threading.Event()

    def slow() -> Iterator[pa.RecordBatch]:
        yield weights.to_batches()[0]
        assert go_on.wait(60)

    clients = [Client(server.location) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        running = [
            pool.submit(client.quantize, pa.RecordBatchReader.from_batches(schema, slow()), "int4_g32")
            for client in clients
        ]
        wait_for(lambda: len(server._calls.list()) == 4)
        with ThreadPoolExecutor(16) as flood:

            def refused(i: int) -> str:
                with Client(server.location) as client, pytest.raises(BusyError) as caught:
                    client.quantize(weights) if i % 2 else client.put("x", weights, scheme="int4_g32")
                return str(caught.value)

            for message in flood.map(refused, range(48)):
                assert "try again in 1 s" in message
        with pytest.raises(fl.FlightUnavailableError, match="try again"):
            exchange(server, QUANTIZE, GOOD.schema, [GOOD])
        go_on.set()
        for done in running:
            assert_same(done.result(), wanted)
    for client in clients:
        assert client.health()["running"] == 0
        client.close()


def test_clients_do_not_disturb_each_other(server: Server) -> None:
    """Four at a time, some of which send what cannot be quantized."""

    def one(i: int) -> None:
        weights = arrays(seed=i)
        scheme = ("int4_g32", "int8_g128_asym", "int2_channel")[i % 3]
        with Client(server.location, message_bytes=1 << 15) as client:
            if i % 4 == 3:
                weights["c"][7, 7] = np.inf
                with pytest.raises(InputError, match="1 infinite"):
                    client.quantize(weights, scheme)
            else:
                assert_same(client.quantize(weights, scheme), quantize_table(table(weights), scheme, device="cpu"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(40)))


def test_one_client_in_many_threads() -> None:
    with Server("grpc://127.0.0.1:0", device="cpu", max_clients=8) as shared, Client(shared.location) as client:
        wanted = [quantize_table(table(arrays(seed=i)), device="cpu") for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            for got, want in zip(pool.map(lambda i: client.quantize(arrays(seed=i)), range(8)), wanted, strict=True):
                assert_same(got, want)


def test_a_client_that_goes_silent_is_disconnected(server: Server, tmp_path: Path) -> None:
    with Server("grpc://127.0.0.1:0", store=tmp_path, device="cpu", idle_timeout=0.3, max_clients=1) as impatient:
        plain = fl.connect(impatient.location)
        writer, _ = plain.do_put(fl.FlightDescriptor.for_path("silent"), quantize_table(GOOD, device="cpu").schema)
        wait_for(lambda: impatient._calls.list())
        wait_for(lambda: not impatient._calls.list())
        with Client(impatient.location) as client:
            assert client.quantize(GOOD).num_rows == 1
            assert client.list() == []
        with pytest.raises((pa.ArrowException, OSError)):
            writer.close()
        plain.close()
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_closing_finishes_what_runs_and_ends_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "GATHERED_BYTES", 0)  # so that the first batch does not wait for more
    weights, wanted = table(arrays()), quantize_table(table(arrays()), "int4_g32", device="cpu")

    def slow(until: threading.Event) -> Iterator[pa.RecordBatch]:
        yield weights.to_batches()[0]
        assert until.wait(60)

    def close(event: threading.Event, grace: float, is_finished: bool) -> None:
        server = Server("grpc://127.0.0.1:0", device="cpu")
        silent = socket.create_connection(("127.0.0.1", server.port))
        with Client(server.location) as client, ThreadPoolExecutor(2) as pool:
            source = pa.RecordBatchReader.from_batches(weights.schema, slow(event))
            running = pool.submit(client.quantize, source, "int4_g32")
            wait_for(lambda: server._calls.list() and server._calls.list()[0].rows)
            closing = pool.submit(server.close, grace)
            wait_for(lambda: server._is_closed)
            if is_finished:
                event.set()
                assert closing.result() == []
                assert_same(running.result(), wanted)
            else:
                (unfinished,) = closing.result()
                assert (unfinished["call"], unfinished["peer"][:5]) == ("quantize", "ipv4:")
                assert unfinished["rows"] > 0
                event.set()
                with pytest.raises(ServiceError):
                    running.result()
            with pytest.raises(ArrowQuantError):
                client.health()
        silent.close()
        assert server.close() == []

    close(threading.Event(), 30.0, is_finished=True)
    close(threading.Event(), 0.2, is_finished=False)


def test_a_server_that_is_killed_is_an_error_of_its_clients() -> None:
    """And not the end of their process, nor a wait without end."""
    with serving() as (process, ready):
        weights = {f"w{i}": np.ones((64, 4096), np.float32) for i in range(64)}
        with Client(ready["location"], message_bytes=1 << 18) as client:
            stream, _ = client.quantize_stream(weights)
            stream.read_next_batch()
            process.kill()
            with pytest.raises(ServiceError, match=r"grpc://127.0.0.1"):
                stream.read_all()
        process.communicate(timeout=60)


def test_an_error_while_much_is_under_way_does_not_end_the_process(server: Server) -> None:
    """Flight's client aborts where a call that failed is ended by two threads at once."""
    weights = {f"w{i}": np.ones((64, 4096), np.float32) for i in range(3)}
    weights["w0"][0, 0] = np.nan
    for _ in range(100):
        with Client(server.location, message_bytes=1 << 20) as client, pytest.raises(InputError, match="w0"):
            client.quantize(weights)


def test_nothing_is_left_open() -> None:
    """Neither threads nor descriptors, after servers that served and were closed."""

    def serve_once() -> None:
        with Server("grpc://127.0.0.1:0", device="cpu") as server, Client(server.location) as client:
            client.quantize(GOOD)
            with pytest.raises(InputError):
                client.quantize({"w": np.array([[np.nan]])})

    def count() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    serve_once()
    before = count()
    for _ in range(5):
        serve_once()
    wait_for(lambda: count()[0] <= before[0] + 2 and count()[1] <= before[1])


def test_cutting_ends_the_connections_of_a_port_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours, socket.create_server(("127.0.0.1", 0)) as others:
        ends = [(socket.create_connection(s.getsockname()), s.accept()[0]) for s in (ours, ours, others)]
        peer = f"ipv4:127.0.0.1:{ends[0][0].getsockname()[1]}"
        port = ours.getsockname()[1]
        assert connections.cut(port, peer) == 1
        assert ends[0][0].recv(1) == b""
        ends[1][1].sendall(b"a")
        assert ends[1][0].recv(1) == b"a"
        assert connections.cut(port) >= 1
        assert ends[1][0].recv(1) == b""
        ends[2][1].sendall(b"b")
        assert ends[2][0].recv(1) == b"b"
        for near, far in ends:
            near.close()
            far.close()
