"""`Client`: quantize, decode and store by a server elsewhere, with tables in and tables out."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl

from ..errors import ArrowQuantError, InputError, ServiceError
from ..interchange import as_weights
from ..schemes import Scheme, rows_and_length
from ..tables import ERRORS_KEY, Layer, Problem, problems_json
from ..tables.dequantize import decoded_schema
from ..tables.quantize import as_reader, batches_of
from ..tables.results import result_schema
from ..tables.weights import Rows, weights_schema
from . import requests
from .access import TOKEN_VARIABLE, call_options, split
from .cuts import MESSAGE_BYTES, cut_quantized, cut_weights, join, quantized_schema
from .faults import FLIGHT_ERRORS, from_flight, restored
from .requests import DEFAULT_SCHEME, DEQUANTIZE, PUT, QUANTIZE, Request

# Messages that are under way at a time: one that is sent, one that is worked on, one whose answer comes.
AHEAD = 3


class StoredResult(NamedTuple):
    """What a server says of a result that it keeps."""

    name: str
    rows: int
    bytes: int


class Client:
    """A connection to a server at `location`; may be used by several threads, each with calls of its own.

    token: what the server asks for, by default the environment variable ARROWQUANT_TOKEN
    tls_roots: PEM of the authority, or of the server's own certificate; a path or bytes. Default: what gRPC trusts
    tls_certificate, tls_key: PEM of this client's own certificate, where the server asks for one
    message_bytes: tensors larger than this go in pieces; see `cuts`

    `weights` is, in all methods, a table or stream of weights as for `tables.quantize_table`, or a dict of arrays by
    name (anything `quantize` takes that is on the host). Tensors are sent from where they lie, in pieces of whole rows;
    neither side ever has more than a few pieces beside its input or output. Results are those of `quantize_table`, to
    the bit.

        >>> from arrowquant_gpu.flight import Server
        >>> with Server("grpc://127.0.0.1:0", device="cpu") as server, Client(server.location) as client:
        ...     rows = client.quantize({"fc": np.ones((2, 64), np.float32)}, "int8_g32")
        ...     client.dequantize(rows)["shape"].to_pylist(), client.health()["status"]
        ([[2, 64]], 'serving')

    All methods raise the server's error as the class that it had there (InputError, NonFiniteError, SchemeError, ...),
    and ServiceError where the server cannot be reached, AuthenticationError, BusyError, NotFoundError.
    """

    def __init__(
        self,
        location: str,
        *,
        token: str | None = None,
        tls_roots: bytes | str | Path | None = None,
        tls_certificate: bytes | str | Path | None = None,
        tls_key: bytes | str | Path | None = None,
        message_bytes: int = MESSAGE_BYTES,
    ) -> None:
        split(location)
        self.location = location
        self._options = call_options(token or os.environ.get(TOKEN_VARIABLE))
        self._message_bytes = message_bytes
        self._limit: int | None = None
        given = {"tls_root_certs": tls_roots, "cert_chain": tls_certificate, "private_key": tls_key}
        with self._errors():
            self._flight = fl.connect(location, **{k: _pem(v) for k, v in given.items() if v is not None})

    def close(self) -> None:
        self._flight.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- Quantize and decode -----------------------------------------------------------------------------------------

    def quantize(
        self, weights: Any, scheme: str | Scheme = DEFAULT_SCHEME, *, continue_on_error: bool = False
    ) -> pa.Table:
        """A table of quantized rows in input order, as `quantize_table` makes it here; raises what it raises.

        With `continue_on_error` the tensors that cannot be quantized are listed in the schema metadata.
        """
        scheme, problems = Scheme.parse(scheme), list[Problem]()
        source = _Source(weights, problems if continue_on_error else None)
        batches = list(self._quantized(source, scheme, problems, continue_on_error))
        # Of a tensor that was sent in pieces only some were refused.
        failed = {p.layer for p in problems} - (source.came_cut or set())
        if failed:
            batches = [_without(batch, failed) for batch in batches]
        table = join(batches, result_schema(scheme.scale_dtype, is_cut=True), source.came_cut)
        if problems:
            first: dict[str, Problem] = {}
            for problem in problems:
                first.setdefault(problem.layer, problem)
            listed = {ERRORS_KEY: problems_json(first.values())}
            table = table.replace_schema_metadata({**table.schema.metadata, **listed})
        return table

    def quantize_stream(
        self, weights: Any, scheme: str | Scheme = DEFAULT_SCHEME, *, continue_on_error: bool = False
    ) -> tuple[pa.RecordBatchReader, list[Problem]]:
        """A stream of quantized rows while `weights` is read, by a thread of its own; and the list problems go to.

        Large tensors stay in pieces, columns chunk and n_chunks; with `continue_on_error` there may be pieces of a
        tensor that is among the problems. A reader that is dropped before its end ends the call.
        """
        scheme, problems = Scheme.parse(scheme), list[Problem]()
        source = _Source(weights, problems if continue_on_error else None)
        batches = self._quantized(source, scheme, problems, continue_on_error)
        return pa.RecordBatchReader.from_batches(result_schema(scheme.scale_dtype, is_cut=True), batches), problems

    def dequantize(self, rows: Any, dtype: str = "float32") -> pa.Table:
        """A table of weights (layer_name, weights, shape) from quantized rows: a table or stream of them.

        Raises InputError for rows that cannot be decoded.
        """
        expected = decoded_schema(dtype, is_cut=True)
        reader = as_reader(rows)
        schema = quantized_schema(reader.schema)
        came_cut: set[str] = set()
        batches = batches_of(reader)
        messages = cut_quantized(batches, schema, self._most_bytes(), expansion=True, came_cut=came_cut)
        decoded = list(self._exchange(Request(DEQUANTIZE, dtype=dtype), schema, messages, expected, lambda _: None))
        return join(decoded, expected, came_cut if "chunk" in reader.schema.names else None)

    def _quantized(
        self, source: _Source, scheme: Scheme, problems: list[Problem], continue_on_error: bool
    ) -> Iterator[pa.RecordBatch]:
        request = Request(QUANTIZE, scheme=scheme.id, continue_on_error=continue_on_error)
        expected = result_schema(scheme.scale_dtype, is_cut=True)

        def ended(metadata: bytes) -> None:
            problems.extend(_problems(json.loads(metadata)))

        # A stream has one element type. Each run of tensors that share one is a call.
        for dtype, run in itertools.groupby(source.layers(), key=lambda layer: layer.dtype):
            messages = cut_weights(run, scheme, self._most_bytes())
            yield from self._exchange(request, weights_schema(dtype, is_cut=True), messages, expected, ended)

    def _exchange(
        self,
        request: Request,
        schema: pa.Schema,
        messages: Iterator[pa.RecordBatch],
        expected: pa.Schema,
        ended: Callable[[bytes], None],
    ) -> Iterator[pa.RecordBatch]:
        """Send messages from another thread, and give what comes back."""
        with self._errors():
            descriptor = fl.FlightDescriptor.for_command(request.command())
            writer, reader = self._flight.do_exchange(descriptor, self._options)
            with contextlib.suppress(*FLIGHT_ERRORS):  # the reader says why
                writer.begin(schema)
            if reader.schema != expected:
                raise ServiceError(f"{self.location}: its rows are {reader.schema.names}; it is of another version")
        sender = _Sender(writer, messages, reader.cancel)
        is_done = False
        try:
            with self._errors(sender):
                while sender.is_answer_due():
                    if (batch := self._answer(reader, ended)) is None:
                        raise ServiceError(f"{self.location}: the server ended before it had answered everything")
                    sender.answered()
                    yield batch
                    del batch
                sender.join()
                sender.check()
                # By this thread, and while nothing is read: Flight's client aborts the process where a call that has
                # failed is ended by its reader and half-closed by another thread at the same time.
                writer.done_writing()
                while (batch := self._answer(reader, ended)) is not None:
                    yield batch
                    del batch
                writer.close()
            is_done = True
        finally:
            if not is_done:
                reader.cancel()
                sender.join()
                with contextlib.suppress(*FLIGHT_ERRORS):
                    writer.close()

    @staticmethod
    def _answer(reader: Any, ended: Callable[[bytes], None]) -> pa.RecordBatch | None:
        """The next record batch, None at the end of the stream; metadata goes to `ended`."""
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return None
            if chunk.app_metadata is not None:
                ended(chunk.app_metadata.to_pybytes())
            if chunk.data is not None:
                return chunk.data

    # --- Stored results ----------------------------------------------------------------------------------------------

    def put(
        self,
        name: str,
        rows: Any,
        *,
        scheme: str | Scheme | None = None,
        continue_on_error: bool = False,
        overwrite: bool = False,
    ) -> list[Problem]:
        """Store quantized rows under a name; or weights, which the server then quantizes with `scheme`.

        The result is there when this returns, whole, and not there after an error. Returns what `continue_on_error`
        left out. Raises TargetError where the name is taken and `overwrite` is not given.
        """
        requests.check_name(name)
        problems: list[Problem] = []
        if scheme is None:
            reader = as_reader(rows)
            schema = quantized_schema(reader.schema)
            messages = cut_quantized(batches_of(reader), schema, self._most_bytes())
            request = Request(PUT, name=name, overwrite=overwrite)
        else:
            parsed = Scheme.parse(scheme)
            layers = _Source(rows, problems if continue_on_error else None).layers()
            first = next(layers, None)
            if first is None:
                raise InputError("there are no weights to store")
            schema = weights_schema(first.dtype, is_cut=True)
            same = _of_one_dtype(itertools.chain([first], layers), first)
            messages = cut_weights(same, parsed, self._most_bytes())
            request = Request(
                PUT, name=name, scheme=parsed.id, continue_on_error=continue_on_error, overwrite=overwrite
            )
        return problems + self._put(request, schema, messages)

    def _put(self, request: Request, schema: pa.Schema, messages: Iterator[pa.RecordBatch]) -> list[Problem]:
        n_rows = 0
        descriptor = fl.FlightDescriptor.for_command(request.command())
        with self._errors():
            writer, reader = self._flight.do_put(descriptor, schema, self._options)
        try:
            for batch in messages:
                n_rows += batch.num_rows
                with self._errors():
                    writer.write_batch(batch)
            with self._errors():
                # Without the count, which a client that ended early does not send, nothing is stored.
                writer.write_metadata(requests.count(n_rows))
                writer.done_writing()
                said = reader.read()
        except ArrowQuantError as e:
            # The writer has seen that the call is over; why it is, closing says.
            with self._errors(isinstance(e, ServiceError)):
                writer.close()
            raise
        with self._errors():
            writer.close()
        return _problems(json.loads(said.to_pybytes())["errors"])

    def get(self, name: str) -> pa.Table:
        """A stored result as a table, tensors that were stored in pieces whole again. Raises NotFoundError."""
        stream = self.get_stream(name)
        return join(stream, stream.schema)

    def get_stream(self, name: str) -> pa.RecordBatchReader:
        """A stored result as a stream of its rows, as they were stored. Raises NotFoundError."""
        requests.check_name(name)
        with self._errors():
            reader = self._flight.do_get(fl.Ticket(name.encode()), self._options)
            schema = reader.schema

        def batches() -> Iterator[pa.RecordBatch]:
            is_done = False
            try:
                with self._errors():
                    for chunk in reader:
                        yield chunk.data
                is_done = True
            finally:
                if not is_done:
                    reader.cancel()

        return pa.RecordBatchReader.from_batches(schema, batches())

    def list(self) -> list[StoredResult]:
        """The stored results, by name."""
        with self._errors():
            infos = list(self._flight.list_flights(options=self._options))
        return [StoredResult(i.descriptor.path[0].decode(), i.total_records, i.total_bytes) for i in infos]

    def drop(self, name: str) -> None:
        """Delete a stored result. Raises NotFoundError."""
        self._act("drop", {"name": name})

    # --- What the server says of itself ------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """{"status": "serving", "running": calls that are running}."""
        return self._act("health")

    def info(self) -> dict[str, Any]:
        """Version, device and limits of the server."""
        return self._act("info")

    def schemes(self) -> dict[str, Any]:
        """The grammar of scheme ids, and what they are made of."""
        return self._act("schemes")

    def _act(self, action: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        asked = fl.Action(action, b"" if body is None else json.dumps(body).encode())
        with self._errors():
            (result,) = self._flight.do_action(asked, self._options)
            said: dict[str, Any] = json.loads(result.body.to_pybytes())
            return said

    def _most_bytes(self) -> int:
        """What goes into one message: no more than the server takes."""
        if self._limit is None:
            # Offsets, names and what else a message has beside its weights.
            self._limit = self.info()["limits"]["message_bytes"] * 9 // 10
        return min(self._message_bytes, self._limit)

    @contextlib.contextmanager
    def _errors(self, sender: _Sender | bool = True) -> Iterator[None]:
        """What Flight raises in the body, as the error that the server had; what stopped the sender comes first."""
        try:
            yield
        except ArrowQuantError:
            raise
        except FLIGHT_ERRORS as e:
            if isinstance(sender, _Sender):
                sender.join()
                sender.check()
            if sender:
                raise from_flight(e, self.location) from None


class _Sender:
    """A thread that sends messages until there are no more, the call is over, or making one fails.

    Each message has one answer. AHEAD messages are sent before their answers: HTTP/2 alone would let a quick sender
    fill hundreds of megabytes of the server's memory.
    """

    def __init__(self, writer: Any, messages: Iterator[pa.RecordBatch], cancel: Callable[[], None]) -> None:
        self._writer, self._messages, self._cancel = writer, messages, cancel
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._n_sent = self._n_answered = 0
        self._has_ended = self._is_over = False
        self._thread = threading.Thread(target=self._send, name="flight sender", daemon=True)
        self._thread.start()

    def is_answer_due(self) -> bool:
        """Wait until a message is on its way whose answer has not come, or until there are no more messages."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_sent > self._n_answered or self._has_ended)
            return self._n_sent > self._n_answered

    def answered(self) -> None:
        """An answer has come."""
        with self._changed:
            self._n_answered += 1
            self._changed.notify_all()

    def join(self) -> None:
        """Send no more."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._thread.join()

    def check(self) -> None:
        """Raise what making a message raised."""
        if self._failure is not None:
            raise self._failure

    def _send(self) -> None:
        try:
            while (message := self._next()) is not None:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_over or self._n_sent - self._n_answered < AHEAD)
                    if self._is_over:
                        return
                    self._n_sent += 1
                    self._changed.notify_all()
                try:
                    self._writer.write_batch(message)
                except FLIGHT_ERRORS:  # the reader, who now waits for an answer, says why
                    return
                del message
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _next(self) -> pa.RecordBatch | None:
        try:
            return next(self._messages, None)
        except BaseException as e:
            self._failure = e
            self._cancel()
            return None


class _Source:
    """Weights of any kind as layers. What cannot be read goes to `problems`, or is raised where that is None."""

    def __init__(self, weights: Any, problems: list[Problem] | None) -> None:
        self._weights: Any = weights
        if not isinstance(weights, Mapping):
            self._weights = as_reader(weights)
        self._problems = problems
        if (weights.num_rows == 0) if isinstance(weights, pa.Table | pa.RecordBatch) else weights == {}:
            raise InputError("there are no weights to quantize")
        is_cut = not isinstance(weights, Mapping) and "chunk" in self._weights.schema.names
        # Names of tensors that are in pieces already; None where there are no columns that would say so.
        self.came_cut: set[str] | None = set() if is_cut else None
        self._rows = None if isinstance(weights, Mapping) else Rows(self._weights.schema)

    def layers(self) -> Iterator[Layer]:
        for layer in self._arrays() if self._rows is None else self._table(self._rows):
            if not isinstance(layer, Problem):
                if self.came_cut is not None and layer.n_chunks > 1:
                    self.came_cut.add(layer.name)
                yield layer
            elif self._problems is None:
                raise layer.error
            else:
                self._problems.append(layer)

    def _table(self, rows: Rows) -> Iterator[Layer | Problem]:
        for batch in batches_of(self._weights):
            yield from rows.layers(batch)
        yield from rows.finish()

    def _arrays(self) -> Iterator[Layer | Problem]:
        for name, array in self._weights.items():
            try:
                weights = as_weights(array, name=name)
                if weights.device != "cpu":
                    raise InputError(f"{name}: it is on {weights.device}; copy it to the host first")
                blocks = weights.blocks
                rows = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
                yield Layer(name, rows.reshape(rows_and_length(weights.shape)), weights.shape, weights.dtype)
            except InputError as e:
                yield Problem(name, e)


def _without(batch: pa.RecordBatch, names: set[str]) -> pa.RecordBatch:
    keep = [name not in names for name in batch["layer_name"].to_pylist()]
    return batch if all(keep) else batch.filter(pa.array(keep, pa.bool_()))


def _of_one_dtype(layers: Iterable[Layer], first: Layer) -> Iterator[Layer]:
    for layer in layers:
        if layer.dtype != first.dtype:
            raise InputError(
                f"{layer.name} is {layer.dtype} and {first.name} is {first.dtype}: what is stored under one name has "
                f"one element type; store them under two, or quantize first and put the rows"
            )
        yield layer


def _problems(listed: Iterable[Mapping[str, str]]) -> list[Problem]:
    return [Problem(p["layer"], restored(p["error"], p["message"])) for p in listed]


def _pem(given: bytes | str | Path) -> bytes:
    if isinstance(given, bytes):
        return given
    try:
        return Path(given).read_bytes()
    except OSError as e:
        raise ServiceError(f"{given} cannot be read: {e.strerror}") from e
