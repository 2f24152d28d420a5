"""Tables of weights on disk to tables of quantized tensors on disk, in memory that does not grow with them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import Problem
from .quantize import Choice, TableQuantizer
from .sources import open_source
from .targets import Target

# Called after each record batch: rows read so far, rows in all (None of a stream), name of the last layer.
Progress = Callable[[int, int | None, str], None]


@dataclass(frozen=True, slots=True)
class Written:
    """What `quantize_file` did.

    paths: the files that were written; none where the results went to a stream
    n_rows: rows of the result
    weight_bytes, result_bytes: of the columns that were read, and of those that were written, in memory
    problems: layers that are not in the result, or not wholly
    """

    paths: tuple[Path, ...]
    n_rows: int
    weight_bytes: int
    result_bytes: int
    seconds: float
    problems: list[Problem]


def quantize_file(
    src: Any,
    dst: Any,
    scheme: str | Choice = "int4_g128_asym",
    *,
    device: str = "auto",
    threads: int | None = None,
    continue_on_error: bool = False,
    overwrite: bool = False,
    max_row_bytes: int | None = None,
    progress: Progress | None = None,
) -> Written:
    """Quantize a table of weights that is too large for memory, from disk or a stream to disk or a stream.

    src: as in `sources.open_source`: an Arrow IPC file or stream, a Parquet file, a directory of either, a pyarrow
        Dataset, a binary file object
    dst: a path that ends in .arrow, .arrows (a stream) or .parquet, another for a directory of Parquet files, or a
        binary file object, which gets an Arrow IPC stream. Files appear when they are complete
    scheme, device, threads, continue_on_error: as in `TableQuantizer`
    overwrite: replace a file that is there
    max_row_bytes: a tensor whose codes, scales and zero points are larger goes to several rows (columns chunk and
        n_chunks), each with whole rows of the tensor; what comes in several rows stays as it is

        >>> import tempfile, pyarrow as pa, pyarrow.parquet as pq
        >>> folder = Path(tempfile.mkdtemp())
        >>> pq.write_table(pa.table({"layer_name": ["fc"], "weights": [[1.0, 2.0]]}), folder / "weights.parquet")
        >>> done = quantize_file(folder / "weights.parquet", folder / "int4.arrow", "int4_g32", device="cpu")
        >>> done.n_rows, [path.name for path in done.paths], done.problems
        (1, ['int4.arrow'], [])

    Raises SourceError, TargetError, and as `quantize_table`; then nothing is left at `dst`.
    """
    start = time.perf_counter()
    source = open_source(src)
    quantizer = TableQuantizer(
        source.schema,
        scheme,
        device=device,
        threads=threads,
        continue_on_error=continue_on_error,
        max_row_bytes=max_row_bytes,
    )
    n_read = n_rows = weight_bytes = result_bytes = 0
    with Target(dst, quantizer.schema, sources=source.paths, overwrite=overwrite) as target:
        for batch in source:
            n_read, weight_bytes = n_read + batch.num_rows, weight_bytes + batch.nbytes
            rows = quantizer.batch(batch)
            n_rows, result_bytes = n_rows + rows.num_rows, result_bytes + rows.nbytes
            target.write(rows)
            if progress is not None:
                progress(n_read, source.n_rows, batch["layer_name"][-1].as_py() or "")
            del batch, rows  # before the next are made
        if not n_read:
            raise InputError(f"{source.name}: the table of weights has no rows")
        quantizer.finish()
    return Written(target.paths, n_rows, weight_bytes, result_bytes, time.perf_counter() - start, quantizer.problems)
