"""Record batches, tables and streams of weights to such of quantized rows, in input order and without copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from .. import arrow_columns, ops
from ..backends import Backend, Job, get_backend
from ..errors import ArrowQuantError, InputError, SchemeError
from ..reference import Findings
from ..schemes import SCALE_SUFFIXES, Scheme
from . import Layer, Problem
from .results import Results, result_schema
from .weights import Rows

# What a layer is quantized with: a scheme, or a function of the layer. All schemes of one call store alike scales.
Choice = Scheme | Callable[[Layer], Scheme]
# Called after every layer with its name; an exception from it ends the work.
Done = Callable[[str], None]


NOTHING = Findings()


class TableQuantizer:
    """Quantizes rows of weights; knows one input from its first batch to its last.

    scheme: a scheme, its id, or a function that gives the scheme of each layer; an InputError from it is the layer's
    scale_dtype: of the schemes that such a function gives, which is one for all; float32 by default
    device, threads: as in `ops.quantize`
    continue_on_error: a layer that cannot be quantized is left out and listed in `problems`, instead of raised
    max_row_bytes: a tensor whose result is larger goes to several rows of the result, with columns chunk and n_chunks;
        each has whole rows of the tensor, at least one. What comes in several rows stays as it is

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
        scale_dtype: str | None = None,
        device: str = "auto",
        threads: int | None = None,
        continue_on_error: bool = False,
        max_row_bytes: int | None = None,
        done: Done | None = None,
    ) -> None:
        if max_row_bytes is not None and max_row_bytes < 1:
            raise InputError(f"max_row_bytes {max_row_bytes}: give the bytes of one row of the result, 1 or more")
        self._max_row_bytes = max_row_bytes
        self._choice: Choice = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
        by_scheme = self._choice.scale_dtype if isinstance(self._choice, Scheme) else "float32"
        self._scale_dtype = scale_dtype or by_scheme
        if self._scale_dtype not in SCALE_SUFFIXES:
            raise SchemeError(f"scale dtype {scale_dtype!r}: choose one of {', '.join(SCALE_SUFFIXES)}")
        if isinstance(self._choice, Scheme):
            self._check_scales(self._choice)
        self._rows = Rows(schema)
        self._is_cut = "chunk" in schema.names or max_row_bytes is not None
        self._backend = get_backend(device, threads)
        self._continue, self._done = continue_on_error, done
        self.problems: list[Problem] = []
        # Tensors that are cut into rows, one of which could not be quantized: the rows after it are not gone on with.
        self._broken: set[str] = set()

    @property
    def schema(self) -> pa.Schema:
        """Of the batches that `batch` gives for a stream."""
        return result_schema(self._scale_dtype, is_cut=self._is_cut)

    def batch(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The next batch's rows, quantized; new memory that refers to nothing of the input.

        Raises InputError, NonFiniteError, ScaleOverflowError (these unless continue_on_error), and DeviceError.
        """
        return self._quantized(self._layers(batch), is_stream=True)

    def table(self, batches: Iterable[pa.RecordBatch | pa.Table]) -> pa.Table:
        """All rows of an input as a table of one chunk, and with `finish` behind it; problems are in its metadata.

        A tensor that is cut into rows is in it as a whole, or not at all. Raises InputError where there are no rows.
        """
        layers = [layer for batch in batches for layer in self._layers(batch)]
        self.finish()
        if not layers and not self.problems:
            raise InputError("the table of weights has no rows")
        rows = self._quantized(layers, is_stream=False)
        if self._is_cut and self.problems:
            names, n_chunks = rows["layer_name"].to_pylist(), rows["n_chunks"].to_pylist()
            n_found = Counter(names)
            is_whole = [n_found[name] == n for name, n in zip(names, n_chunks, strict=True)]
            rows = rows.filter(pa.array(is_whole, pa.bool_()))
        return pa.Table.from_batches([rows])

    def finish(self) -> None:
        """There are no more batches. Raises InputError for a tensor of which rows are missing."""
        for problem in self._rows.finish():
            self._report(problem)

    def _layers(self, batch: pa.RecordBatch | pa.Table) -> Iterator[Layer]:
        for layer in self._rows.layers(batch):
            if isinstance(layer, Problem):
                self._report(layer)
            else:
                yield layer

    def _report(self, problem: Problem) -> None:
        if not self._continue:
            raise problem.error
        self.problems.append(problem)

    def _check_scales(self, scheme: Scheme, called: str = "") -> None:
        arrow_columns.check(scheme)
        if scheme.scale_dtype != self._scale_dtype:
            raise SchemeError(
                f"{called}{scheme.id} has {scheme.scale_dtype} scales, and those of this table are "
                f"{self._scale_dtype}; all its schemes must store alike scales (scale_dtype)"
            )

    def _chosen(self, layers: Iterable[Layer]) -> Iterator[tuple[Layer, Scheme]]:
        """Each layer with its scheme, without those that have none."""
        for layer in layers:
            if isinstance(self._choice, Scheme):
                yield layer, self._choice
                continue
            try:
                scheme = self._choice(layer)
            except InputError as e:
                self._fail(layer, e)
            else:
                self._check_scales(scheme, f"{layer.name}: ")
                yield layer, scheme

    def _parts(self, layer: Layer, scheme: Scheme) -> Iterator[tuple[Layer, Scheme]]:
        """The layer, cut into row blocks whose results are small enough."""
        rows, length = layer.weights.shape
        if self._max_row_bytes is None or layer.n_chunks > 1 or rows < 2:
            yield layer, scheme
            return
        step = max(1, self._max_row_bytes // max(1, scheme.n_bytes((1, length))))
        n = -(-rows // step)
        for i in range(n):
            yield layer._replace(weights=layer.weights[i * step : (i + 1) * step], chunk=i, n_chunks=n), scheme

    def _fail(self, layer: Layer, error: InputError) -> None:
        if layer.n_chunks > 1:
            self._broken.add(layer.name)
        self._report(Problem(layer.name, error))

    def _quantized(self, layers: Iterable[Layer], *, is_stream: bool) -> pa.RecordBatch:
        chosen = [part for layer, scheme in self._chosen(layers) for part in self._parts(layer, scheme)]
        layers, schemes = [layer for layer, _ in chosen], [scheme for _, scheme in chosen]
        results = Results(layers, schemes, self._scale_dtype, is_cut=self._is_cut, is_stream=is_stream)
        for run in self._runs(chosen):
            if len(run) == 1 or not self._together(run, chosen, results):
                self._in_turn(run, chosen, results)
        # A stream's schema, and with it its metadata, was sent before: only a table has its problems in it.
        return results.batch(() if is_stream else self.problems)

    def _runs(self, chosen: Sequence[tuple[Layer, Scheme]]) -> Iterator[range]:
        """All layers in order: those that can be read in place as many together as ops.TOGETHER_BYTES, others alone."""
        start = n_bytes = 0
        for i, (layer, scheme) in enumerate(chosen):
            if ops.is_direct(layer.weights, scheme, self._backend) and layer.name not in self._broken:
                n_bytes += layer.weights.nbytes
                if n_bytes < ops.TOGETHER_BYTES:
                    continue
            elif start < i:
                yield range(start, i)
                start = i
            yield range(start, i + 1)
            start, n_bytes = i + 1, 0
        if start < len(chosen):
            yield range(start, len(chosen))

    def _together(self, run: range, chosen: Sequence[tuple[Layer, Scheme]], results: Results) -> bool:
        """Quantize layers as if they were one. False where one of them cannot be: then each must be seen to."""
        jobs: list[Job] = [(chosen[i][0].weights, chosen[i][1], *results.rooms[i]) for i in run]
        first = chosen[run[0]][0].name
        found = ops.quantize_together(jobs, backend=self._backend, name=f"{first} and {len(run) - 1} more")
        if any(findings != NOTHING for findings in found):
            return False
        for i in run:
            self._is_done(chosen[i][0])
        return True

    def _in_turn(self, run: range, chosen: Sequence[tuple[Layer, Scheme]], results: Results) -> None:
        for i in run:
            layer, scheme = chosen[i]
            if layer.name in self._broken:
                results.refuse(i)
                continue
            try:
                quantize_layer(layer, scheme, *results.rooms[i], backend=self._backend)
            except InputError as e:
                results.refuse(i)
                self._fail(layer, e)
            self._is_done(layer)

    def _is_done(self, layer: Layer) -> None:
        if self._done is not None:
            self._done(layer.name)


def quantize_layer(layer: Layer, scheme: Scheme, packed: Any, scales: Any, zeros: Any, *, backend: Backend) -> None:
    """One row of weights into the given arrays. Raises InputError, NonFiniteError, ScaleOverflowError, DeviceError."""
    if scheme.granularity == "tensor" and layer.n_chunks > 1:
        raise InputError(
            f"{layer.name}: {scheme.id} has one scale for the tensor, which is cut into {layer.n_chunks} rows here; "
            f"use a scheme by group or channel, or give it in one row"
        )
    shape = layer.shape if layer.n_chunks == 1 else layer.weights.shape
    ops.quantize_blocks([layer.weights], scheme, packed, scales, zeros, backend=backend, name=layer.name, shape=shape)


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
    options: dict[str, Any] = {"device": device, "threads": threads, "continue_on_error": continue_on_error}
    if isinstance(table, pa.Table):
        check_text(table.schema)
        return TableQuantizer(table.schema, scheme, done=done, **options).table([table])
    reader = as_reader(table)
    return TableQuantizer(reader.schema, scheme, done=done, **options).table(batches_of(reader))


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
        yield from map(quantizer.batch, batches_of(reader))
        quantizer.finish()

    return pa.RecordBatchReader.from_batches(quantizer.schema, results()), quantizer.problems


def batches_of(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """The batches of a stream, none of which is kept. Raises InputError where the stream breaks off."""
    n = 0
    while True:
        try:
            yield reader.read_next_batch()
        except StopIteration:
            return
        except ArrowQuantError:
            raise
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"the stream of weights broke off after {n} record batches: {e}") from e
        n += 1


def check_text(schema: pa.Schema) -> None:
    """Raise InputError for names of columns that are no text: what is damaged is found here, and not somewhere."""
    try:
        if not schema.names:
            raise InputError("the table has no columns")
    except UnicodeDecodeError as e:
        raise InputError(f"the name of a column is no UTF-8, the schema may be damaged: {e}") from e


def as_reader(x: Any) -> pa.RecordBatchReader:
    """Anything that holds record batches as a stream of them. Raises InputError."""
    if isinstance(x, pa.RecordBatchReader):
        check_text(x.schema)
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
