"""`Server`: quantizes and decodes what comes, batch by batch, and keeps results under names where it has a store."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl

from .. import __version__, schemes
from ..backends import get_backend, pick_device
from ..errors import ArrowQuantError, InputError, NotFoundError, ServiceError
from ..schemes import Scheme
from ..tables import problems_json
from ..tables.dequantize import dequantize_stream
from ..tables.quantize import TableQuantizer, batches_of
from . import connections, requests
from .access import Access, split
from .calls import Call, Calls
from .cuts import QuantizedRows
from .faults import FLIGHT_ERRORS, to_flight
from .requests import DEQUANTIZE, PUT, QUANTIZE, Request
from .store import Store, Stored

log = logging.getLogger(__name__)

MAX_CLIENTS, MEMORY_LIMIT, IDLE_TIMEOUT, GRACE = 8, 2 << 30, 300.0, 30.0
# Of the memory of a client: the message that came, the one that is coming, and the answer.
MESSAGES_AT_ONCE = 3
MIN_MESSAGE = 1 << 20
# Seconds without a call after which what keeps a server from closing is cut.
QUIET = 1.0

ACTIONS = {
    "health": "whether calls are taken, and how many are running",
    "info": "version, device and limits of this server",
    "schemes": "the grammar of scheme ids, and what they are made of",
    "drop": 'delete a stored result; the body is {"name": NAME}',
}


class Server(fl.FlightServerBase):  # type: ignore[misc]
    """A Flight service at `location`; it answers from the moment it exists, in threads of its own.

    location: grpc://HOST:PORT or grpc+tls://HOST:PORT; port 0 takes a free one, see the property `location`
    store: directory of results that DoPut stores; without one nothing is stored
    access: token and certificates; both are needed where other machines reach the location
    max_clients: streams at a time, others are refused with BusyError
    memory_limit: bytes for all of them together, from which the largest message follows: `message_bytes`
    idle_timeout: seconds after which a client that neither sends nor takes anything is disconnected
    device, threads: as in `ops.quantize`

        >>> with Server("grpc://127.0.0.1:0", device="cpu") as server:
        ...     server.location.startswith("grpc://127.0.0.1:"), server.message_bytes >> 20
        (True, 85)

    Raises ServiceError, TargetError for the store, DeviceError.
    """

    def __init__(
        self,
        location: str,
        *,
        store: str | Path | None = None,
        access: Access | None = None,
        max_clients: int = MAX_CLIENTS,
        memory_limit: int | None = None,
        idle_timeout: float = IDLE_TIMEOUT,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        access = access or Access()
        access.check(location)
        self._scheme, self._host, port = split(location)
        self.max_clients, self.memory_limit = max_clients, MEMORY_LIMIT if memory_limit is None else memory_limit
        self.message_bytes = self.memory_limit // (max_clients * MESSAGES_AT_ONCE)
        if self.message_bytes < MIN_MESSAGE:
            raise ServiceError(
                f"memory limit {self.memory_limit}: {max_clients} clients need at least "
                f"{max_clients * MESSAGES_AT_ONCE * MIN_MESSAGE} bytes; raise it, or serve fewer (--max-clients)"
            )
        self.idle_timeout = idle_timeout
        self.device, self._threads = pick_device(device), threads
        self._backend = get_backend(self.device.name, threads)
        self._store = None if store is None else Store(Path(store))
        self._is_closed = False
        self._calls = Calls(max_clients, idle_timeout, lambda peer: connections.cut(self.port, peer))
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            super().__init__(f"{self._scheme}://{host}:{port}", **access.options())
        except FLIGHT_ERRORS as e:
            self._release()
            raise ServiceError(f"{location}: cannot listen there ({e}); is the port in use?") from e

    @property
    def location(self) -> str:
        """Where clients connect, with the port that was taken."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{self._scheme}://{host}:{self.port}"

    def close(self, grace: float = GRACE) -> list[dict[str, Any]]:
        """Take no more calls, finish those that run, and end those that run after `grace` seconds; returns these.

        What they would have stored is not. Does nothing a second time.
        """
        if self._is_closed:
            return []
        self._is_closed = True
        self._calls.close()
        ending = threading.Thread(target=super().shutdown, name="shutdown")
        unfinished: list[dict[str, Any]] = []
        ending.start()
        try:
            until, quiet = time.monotonic() + grace, 0.0
            # A connection that never became a call is waited for by gRPC; one whose call has just ended is still sent
            # its last bytes.
            while ending.is_alive() and time.monotonic() < until and quiet < QUIET:
                ending.join(0.05)
                quiet = 0.0 if self._calls.list() else quiet + 0.05
        finally:
            unfinished = [call.describe() for call in self._calls.list()]
            for call in unfinished:
                log.warning("not finished: %s", call)
            while ending.is_alive():
                connections.cut(self.port)
                ending.join(0.2)
            self._release()
        return unfinished

    def shutdown(self) -> None:
        """As `close`: what pyarrow calls it."""
        self.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- Streams -----------------------------------------------------------------------------------------------------

    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Weights in and quantized rows out, or the other way round; the schema of what comes out is sent first."""
        with self._answering(context):
            request = requests.parse(descriptor)
            if request.action == PUT:
                raise InputError(f"put is a DoPut; DoExchange does {QUANTIZE} or {DEQUANTIZE}")
            with self._calls.running(context.peer(), request.action) as call:
                messages = _Messages(context, reader, call, self.message_bytes)
                answer = self._quantize if request.action == QUANTIZE else self._dequantize
                answer(request, messages, writer, call)

    def do_put(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        """Rows into the store, quantized on the way where the descriptor has a scheme."""
        with self._answering(context):
            request = requests.parse(descriptor)
            if request.action != PUT:
                raise InputError(f"{request.action} is a DoExchange; DoPut does {PUT}")
            store = self._stored()
            store.check_free(request.name, request.overwrite)
            with self._calls.running(context.peer(), f"{PUT} {request.name}") as call:
                self._put(store, request, _Messages(context, reader, call, self.message_bytes), writer)

    def do_get(self, context: Any, ticket: Any) -> Any:
        """The rows of a stored result, as they were stored."""
        with self._answering(context):
            stored = self._stored().open(requests.ticket_name(ticket))
            return fl.GeneratorStream(stored.reader.schema, self._get(context, stored))

    def _get(self, context: Any, stored: Stored) -> Iterator[pa.RecordBatch]:
        with self._answering(context), self._calls.running(context.peer(), f"get {stored.name}") as call:
            for batch in stored.batches():
                yield batch
                call.sent()

    def _quantize(self, request: Request, messages: _Messages, writer: Any, call: Call) -> None:
        quantizer = self._quantizer(request, messages)
        writer.begin(quantizer.schema)
        for rows in quantized(quantizer, messages):
            writer.write_batch(rows)
            call.sent()
        if request.continue_on_error:
            writer.write_metadata(problems_json(quantizer.problems).encode())

    def _dequantize(self, request: Request, messages: _Messages, writer: Any, call: Call) -> None:
        rows = pa.RecordBatchReader.from_batches(messages.schema, checked(messages, self.message_bytes))
        decoded = dequantize_stream(rows, request.dtype, device=self.device.name, threads=self._threads)
        writer.begin(decoded.schema)
        for batch in batches_of(decoded):
            writer.write_batch(batch)
            del batch
            call.sent()

    def _put(self, store: Store, request: Request, messages: _Messages, writer: Any) -> None:
        if request.scheme is None:
            quantizer, schema, batches = None, messages.schema, checked(messages)
        else:
            quantizer = self._quantizer(request, messages)
            schema, batches = quantizer.schema, quantized(quantizer, messages)
        with store.writing(request.name, schema, overwrite=request.overwrite) as file:
            n_rows, names = 0, set[str]()
            for batch in batches:
                file.write_batch(batch)
                n_rows += batch.num_rows
                if request.continue_on_error:
                    names.update(batch["layer_name"].to_pylist())
            if request.is_counted:
                messages.check_count()
            problems = [] if quantizer is None else quantizer.problems
            for problem in problems:
                if problem.layer in names:
                    # Pieces before and behind the refused one are in the file already.
                    problem.error.add_note("It came in pieces, which cannot be left out of what is stored.")
                    raise problem.error
            # Written before the result gets its name: a client that has gone cannot be told, and then gets none.
            writer.write(json.dumps({"rows": n_rows, "errors": json.loads(problems_json(problems))}).encode())

    def _quantizer(self, request: Request, messages: _Messages) -> TableQuantizer:
        return TableQuantizer(
            messages.schema,
            Scheme.parse(request.scheme or requests.DEFAULT_SCHEME),
            device=self.device.name,
            threads=self._threads,
            continue_on_error=request.continue_on_error,
        )

    # --- What there is -----------------------------------------------------------------------------------------------

    def list_flights(self, context: Any, criteria: bytes) -> Iterator[Any]:
        with self._answering(context):
            if self._store is not None:
                for name in self._store.names():
                    # Dropped since it was listed.
                    with contextlib.suppress(NotFoundError):
                        yield _info(self._store.open(name))

    def get_flight_info(self, context: Any, descriptor: Any) -> Any:
        with self._answering(context):
            return _info(self._stored().open(requests.name_of(descriptor)))

    def get_schema(self, context: Any, descriptor: Any) -> Any:
        with self._answering(context):
            return fl.SchemaResult(self._stored().open(requests.name_of(descriptor)).reader.schema)

    def list_actions(self, context: Any) -> list[tuple[str, str]]:
        return list(ACTIONS.items())

    def do_action(self, context: Any, action: Any) -> Iterator[Any]:
        with self._answering(context):
            if action.type not in ACTIONS:
                raise NotFoundError(f"action {action.type[:80]!r}: this server has {', '.join(ACTIONS)}")
            body = action.body.to_pybytes()
            said = requests.members(body, f"the body of action {action.type}") if body else {}
            yield fl.Result(json.dumps(getattr(self, f"_{action.type}")(**_arguments(action.type, said))).encode())

    def _health(self) -> dict[str, Any]:
        return {"status": "closing" if self._is_closed else "serving", "running": len(self._calls.list())}

    def _info(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "device": self.device._asdict(),
            "store": self._store is not None,
            "limits": {
                "max_clients": self.max_clients,
                "memory_bytes": self.memory_limit,
                "message_bytes": self.message_bytes,
                "idle_timeout_seconds": self.idle_timeout,
            },
        }

    def _schemes(self) -> dict[str, Any]:
        return {
            "grammar": requests.GRAMMAR,
            "default": requests.DEFAULT_SCHEME,
            "bits": schemes.BITS,
            "granularities": schemes.GRANULARITIES,
            "max_group_size": schemes.MAX_GROUP_SIZE,
            "scale_dtypes": list(schemes.SCALE_SUFFIXES),
        }

    def _drop(self, name: str) -> dict[str, Any]:
        self._stored().drop(requests.check_name(name))
        return {"dropped": name}

    # --- The way out of every call -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _answering(self, context: Any) -> Iterator[None]:
        """Errors of the body as Flight errors; a bug is logged here and named there, and the server lives on."""
        try:
            yield
        except ArrowQuantError as e:
            log.info("%s: %s: %s", context.peer(), type(e).__name__, e)
            raise to_flight(e) from None
        except fl.FlightError:
            raise
        except Exception as e:
            if context.is_cancelled():
                log.info("%s has gone", context.peer())
                raise fl.FlightCancelledError("the client has gone") from None
            log.exception("%s: a bug in arrowquant, please report it", context.peer())
            raise fl.FlightInternalError(f"a bug in arrowquant, please report it: {type(e).__name__}") from None

    def _stored(self) -> Store:
        if self._store is None:
            raise ServiceError("this server stores nothing: start it with --store DIR")
        return self._store

    def _release(self) -> None:
        self._calls.close()
        if self._store is not None:
            self._store.close()


class _Messages:
    """The record batches of a client's stream, of which none is kept here once the next is asked for."""

    def __init__(self, context: Any, reader: Any, call: Call, most_bytes: int) -> None:
        self._context, self._reader, self._call, self._most_bytes = context, reader, call, most_bytes
        self._end = b""
        self.schema: pa.Schema = self._read(lambda: reader.schema)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        while (chunk := self._read(self._next)) is not None:
            if chunk.app_metadata is not None:
                self._end = chunk.app_metadata.to_pybytes()
            batch = chunk.data
            del chunk
            if batch is None:
                self._call.received(0, 0)
                continue
            n_bytes = batch.get_total_buffer_size()
            self._call.received(batch.num_rows, n_bytes)
            if n_bytes > self._most_bytes:
                raise InputError(_too_large("a message", n_bytes, self._most_bytes))
            yield batch
            del batch
        # A stream whose client was killed ends like any other.
        if self._context.is_cancelled():
            raise ServiceError("the client has gone")

    def check_count(self) -> None:
        """Raise InputError unless the stream said at its end how many rows it had, and that is what came."""
        said = requests.members(self._end, "the metadata that ends a put") if self._end else {}
        if said.get("rows") != self._call.rows:
            raise InputError(
                f"{self._call.rows} rows came, and the stream did not end with the metadata that counts them "
                f"{requests.count(self._call.rows).decode()}: it was cut off"
            )

    def _next(self) -> Any:
        try:
            return self._reader.read_chunk()
        except StopIteration:
            return None

    def _read(self, read: Any) -> Any:
        try:
            return read()
        except FLIGHT_ERRORS as e:
            if self._context.is_cancelled():
                raise ServiceError("the client has gone") from e
            raise InputError(f"the stream of record batches cannot be read: {str(e).partition('Detail:')[0]}") from e


def quantized(quantizer: TableQuantizer, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The quantized rows of each batch."""
    for batch in batches:
        rows = quantizer.batch(batch)
        del batch
        yield rows
        del rows
    quantizer.finish()


def checked(batches: Iterable[pa.RecordBatch], most_decoded: int | None = None) -> Iterator[pa.RecordBatch]:
    """Batches of quantized rows, each of which can be decoded, and to no more bytes of float32. Raises InputError."""
    rows = QuantizedRows()
    for batch in batches:
        n_bytes = sum(4 * row.size for row in rows.read(batch))
        if most_decoded is not None and n_bytes > most_decoded:
            raise InputError(_too_large("what a message decodes to", n_bytes, most_decoded))
        yield batch
        del batch
    rows.finish()


def _too_large(what: str, n_bytes: int, most: int) -> str:
    return (
        f"{what} has {n_bytes} bytes, and this server takes {most} at a time: cut large tensors into rows of the table "
        f"with whole rows of weights each, counted in columns chunk and n_chunks, and send them in smaller record "
        f"batches; or start the server with a larger --memory-limit"
    )


def _info(stored: Stored) -> Any:
    descriptor = fl.FlightDescriptor.for_path(stored.name)
    endpoint = fl.FlightEndpoint(stored.name.encode(), [])
    return fl.FlightInfo(stored.reader.schema, descriptor, [endpoint], stored.n_rows, stored.n_bytes)


def _arguments(action: str, said: dict[str, Any]) -> dict[str, Any]:
    """Members of an action's body: `drop` has a name, the others nothing."""
    wanted = {"name"} if action == "drop" else set()
    if said.keys() != wanted or not all(isinstance(v, str) for v in said.values()):
        takes = '{"name": NAME}' if wanted else "an empty body"
        raise InputError(f"action {action} takes {takes}, and got {sorted(said)}")
    return said
