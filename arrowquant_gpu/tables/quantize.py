"""Record batches, tables and streams of weights to such of quantized rows, in input order and without copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from .. import ops
from ..backends import Backend, get_backend
from ..errors import ArrowQuantError, InputError
from ..schemes import Scheme
from . import Layer, Problem
from .results import Results, result_schema
from .weights import Rows

# What a layer is quantized with: a scheme, or a function of the layer. All schemes of one call store alike scales.
Choice = Scheme | Callable[[Layer], Scheme]
# Called after every layer with its name; an exception from it ends the work.
Done = Callable[[str], None]


class TableQuantizer:
    """Quantizes rows of weights; knows one input from its first batch to its last.

    scheme: a scheme, its id, or a function that gives the scheme of each layer; then `scale_dtype` is that of all
    device, threads: as in `ops.quantize`
    continue_on_error: a layer that cannot be quantized is left out and listed in `problems`, instead of raised

        >>> batch = pa.record_batch({"layer_name": ["fc"], "weights": [[[1.0, 2.0], [3.0, 4.0]]]})
        >>> quantizer = TableQuantizer(batch.schema, "int4_g32_asym", device="cpu")
        >>> rows = quantizer.batch(batch)
        >>> rows["layer_name"].to_pylist(), rows["shape"].to_pylist(), rows["scheme"].to_pylist()
        (['fc'], [[2, 2]], ['int4_g32_asym'])

    Raises SchemeError, DeviceError, and InputError for a schema that cannot hold weights.
    """

    def __init__(
        self,
        schema: pa.Schema,
        scheme: str | Choice = "int4_g128_asym",
        *,
        scale_dtype: str = "float32",
        device: str = "auto",
        threads: int | None = None,
        continue_on_error: bool = False,
        done: Done | None = None,
    ) -> None:
        self._choice: Choice = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
        self._scale_dtype = self._choice.scale_dtype if isinstance(self._choice, Scheme) else scale_dtype
        self._rows = Rows(schema)
        self._is_cut = "chunk" in schema.names
        self._backend = get_backend(device, threads)
        self._continue, self._done = continue_on_error, done
        self.problems: list[Problem] = []

    @property
    def schema(self) -> pa.Schema:
        """Of the batches that `batch` gives for a stream."""
        return result_schema(self._scale_dtype, is_cut=self._is_cut)

    def batch(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The next batch's rows, quantized; new memory that refers to nothing of the input.

        Raises InputError, NonFiniteError, ScaleOverflowError (these unless continue_on_error), and DeviceError.
        """
        return self._quantized(self._layers(batch), is_large=False)

    def table(self, batches: Iterable[pa.RecordBatch]) -> pa.Table:
        """All rows of an input as a table of one chunk, and with `finish` behind it; problems are in its metadata."""
        layers = [layer for batch in batches for layer in self._layers(batch)]
        self.finish()
        return pa.Table.from_batches([self._quantized(layers, is_large=None)])

    def finish(self) -> None:
        """There are no more batches. Raises InputError for a tensor of which rows are missing."""
        for problem in self._rows.finish():
            self._report(problem)

    def _layers(self, batch: pa.RecordBatch) -> Iterator[Layer]:
        for layer in self._rows.layers(batch):
            if isinstance(layer, Problem):
                self._report(layer)
            else:
                yield layer

    def _report(self, problem: Problem) -> None:
        if not self._continue:
            raise problem.error
        self.problems.append(problem)

    def _quantized(self, layers: Iterable[Layer], is_large: bool | None) -> pa.RecordBatch:
        layers = list(layers)
        schemes = [self._choice if isinstance(self._choice, Scheme) else self._choice(layer) for layer in layers]
        results = Results(layers, schemes, self._scale_dtype)
        for i, (layer, scheme) in enumerate(zip(layers, schemes, strict=True)):
            try:
                quantize_layer(layer, scheme, *results.room(i), backend=self._backend)
            except InputError as e:
                self._report(Problem(layer.name, e))
            else:
                results.keep(i)
            if self._done is not None:
                self._done(layer.name)
        # A stream's schema, and with it its metadata, was sent before: only a table has its problems in it.
        problems = self.problems if is_large is None else ()
        return results.batch(is_cut=self._is_cut, problems=problems, is_large=is_large)


def quantize_layer(layer: Layer, scheme: Scheme, packed: Any, scales: Any, zeros: Any, *, backend: Backend) -> None:
    """One row of weights into the given arrays. Raises InputError, NonFiniteError, ScaleOverflowError, DeviceError."""
    if scheme.granularity == "tensor" and layer.n_chunks > 1:
        raise InputError(
            f"{layer.name}: {scheme.id} has one scale for the tensor, which is cut into {layer.n_chunks} rows here; "
            f"use a scheme by group or channel, or give it in one row"
        )
    ops.quantize_blocks(
        [layer.weights], scheme, packed, scales, zeros, backend=backend, name=layer.name, shape=layer.weights.shape
    )


def quantize_table(
    table: Any,
    scheme: str | Choice = "int4_g128_asym",
    *,
    device: str = "auto",
    threads: int | None = None,
    continue_on_error: bool = False,
    done: Done | None = None,
) -> pa.Table:
    """Quantize a table of weights: pyarrow's, or of any object that exports one as Arrow (Polars, DuckDB, pandas).

    See the package for its columns, and results.py for those of the result, whose rows are in input order and in new
    memory. What is in lists of numbers is read in place: all chunks, and of slices what they cover. With
    `continue_on_error` the layers that cannot be quantized are listed in the schema metadata `arrowquant.errors`.

        >>> table = pa.table({"layer_name": ["a", "b"], "weights": [[1.0] * 64, [float("nan")]]})
        >>> result = quantize_table(table, "int8_g32", device="cpu", continue_on_error=True)
        >>> result["layer_name"].to_pylist(), list(result.schema.metadata)[-1]
        (['a'], b'arrowquant.errors')

    Raises InputError, NonFiniteError, ScaleOverflowError, SchemeError, DeviceError.
    """
    reader = as_reader(table)
    if isinstance(table, pa.Table | pa.RecordBatch) and table.num_rows == 0:
        raise InputError("the table of weights has no rows")
    options: dict[str, Any] = {"device": device, "threads": threads, "continue_on_error": continue_on_error}
    return TableQuantizer(reader.schema, scheme, done=done, **options).table(reader)


def quantize_stream(
    batches: Any,
    scheme: str | Choice = "int4_g128_asym",
    *,
    device: str = "auto",
    threads: int | None = None,
    continue_on_error: bool = False,
    done: Done | None = None,
) -> tuple[pa.RecordBatchReader, list[Problem]]:
    """Quantize a stream of record batches while it is read: the quantized stream, and the list its problems go to.

    `batches` is a RecordBatchReader or anything that exports one. A batch is asked for when its result is, so memory
    is that of one batch and its result. The list is filled as the stream is read, with `continue_on_error`; else the
    first problem is raised by the reader.

        >>> batch = pa.record_batch({"layer_name": ["fc"], "weights": [[1.0, 2.0]]})
        >>> stream, problems = quantize_stream(pa.RecordBatchReader.from_batches(batch.schema, [batch]), device="cpu")
        >>> stream.read_next_batch()["bit_width"].to_pylist(), problems
        ([4], [])

    Raises as `quantize_table`, when the stream is read.
    """
    reader = as_reader(batches)
    options: dict[str, Any] = {"device": device, "threads": threads, "continue_on_error": continue_on_error}
    quantizer = TableQuantizer(reader.schema, scheme, done=done, **options)

    def results() -> Iterator[pa.RecordBatch]:
        for batch in reader:
            yield quantizer.batch(batch)
        quantizer.finish()

    return pa.RecordBatchReader.from_batches(quantizer.schema, results()), quantizer.problems


def as_reader(x: Any) -> pa.RecordBatchReader:
    """Anything that holds record batches as a stream of them. Raises InputError."""
    if isinstance(x, pa.RecordBatchReader):
        return x
    try:
        if isinstance(x, pa.RecordBatch):
            return pa.RecordBatchReader.from_batches(x.schema, [x])
        if isinstance(x, pa.Table):
            return x.to_reader()
        if hasattr(x, "__arrow_c_stream__"):
            return pa.RecordBatchReader.from_stream(x)
        if hasattr(x, "__arrow_c_array__"):
            return as_reader(pa.record_batch(x))
    except (ArrowQuantError, pa.ArrowException, ValueError, TypeError) as e:
        raise InputError(f"{type(x).__module__}.{type(x).__qualname__} cannot be read as an Arrow table: {e}") from e
    raise InputError(
        f"{type(x).__module__}.{type(x).__qualname__} is no Arrow table: pass a pyarrow Table, RecordBatch or "
        f"RecordBatchReader, or an object with __arrow_c_stream__"
    )
