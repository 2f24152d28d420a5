"""Rows of quantized tensors to disk: Arrow IPC files and streams, Parquet files, directories of Parquet files.

What has a name appears under it when it is complete; see formats/output.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from ..errors import TargetError
from ..formats.output import Output, target_errors

# What a name ends in, and what is written there. A name that ends in none of them is a directory of Parquet files.
KINDS = {".arrow": "arrow", ".feather": "arrow", ".arrows": "stream", ".parquet": "parquet"}

# Of results, in one row group of a Parquet file, and in one file of a directory.
GROUP_BYTES = 64 << 20
FILE_BYTES = 1 << 30


class Target:
    """Writes the record batches of one table of results; a context manager that commits, or leaves nothing behind.

    dst: a path, or a binary file object, which gets an Arrow IPC stream
    sources: what is read, and must not be written to

        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> batch = pa.record_batch({"x": [1, 2]})
        >>> with Target(folder / "x.arrow", batch.schema) as target:
        ...     target.write(batch)
        >>> target.paths[0].name, pa.ipc.open_file(folder / "x.arrow").read_all().num_rows
        ('x.arrow', 2)

    Raises TargetError.
    """

    def __init__(self, dst: Any, schema: pa.Schema, *, sources: Sequence[Path] = (), overwrite: bool = False) -> None:
        self._schema, self._dst = schema, dst
        self.paths: tuple[Path, ...] = ()
        self._writer: Any = None
        self._waiting: list[pa.RecordBatch] = []
        self._n_waiting = self._n_written = self._n_files = 0
        self._output: Output | None = None
        self._kind = "stream"
        if hasattr(dst, "write"):
            return
        path = Path(dst)
        if path.suffix and path.suffix not in KINDS and not path.is_dir():
            raise TargetError(
                f"{path}: {path.suffix} says nothing of what to write; use {', '.join(KINDS)}, or a name without an "
                f"ending for a directory of Parquet files"
            )
        self._kind = KINDS.get(path.suffix, "directory")
        self._output = Output(path, is_directory=self._kind == "directory", sources=sources, overwrite=overwrite)

    def __enter__(self) -> Self:
        if self._output is None:
            self._writer = pa.ipc.new_stream(self._dst, self._schema)
            return self
        try:
            self._output.begin()
            if self._kind != "directory":
                self._open(self._output, self._output.target.name)
        except BaseException:
            self._output.abort()
            raise
        return self

    def write(self, batch: pa.RecordBatch) -> None:
        """The next rows."""
        if self._output is None:
            self._writer.write(batch)
            return
        with target_errors(self._output.target):
            if self._kind in ("arrow", "stream"):
                self._writer.write(batch)
                return
            self._waiting.append(batch)
            self._n_waiting += batch.nbytes
            if self._n_waiting >= GROUP_BYTES:
                self._write_group()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._output is None:
            # A stream that breaks off has no end mark: that is how its reader can know.
            if error is None:
                self._writer.close()
            return
        try:
            if error is None:
                with target_errors(self._output.target):
                    self._write_group()
                    self._close()
                self.paths = self._output.commit()
            elif self._writer is not None:
                # It may be that nothing can be written any more: that is what the error says already.
                with contextlib.suppress(OSError, pa.ArrowException):
                    self._writer.close()
        finally:
            self._output.abort()

    def _open(self, output: Output, name: str) -> None:
        """Begin the file `name` of the output."""
        path = str(output.path(name))
        if self._kind in ("arrow", "stream"):
            self._writer = (pa.ipc.new_file if self._kind == "arrow" else pa.ipc.new_stream)(path, self._schema)
            return
        import pyarrow.parquet as pq

        texts = [f.name for f in self._schema if pa.types.is_string(f.type)]
        self._writer = pq.ParquetWriter(path, self._schema, compression="none", use_dictionary=texts)

    def _write_group(self) -> None:
        """What waits, as one row group; in a directory, in a file that is not yet full."""
        if not self._waiting or self._output is None:
            return
        if self._writer is None:
            self._open(self._output, f"part-{self._n_files:05d}.parquet")
            self._n_files, self._n_written = self._n_files + 1, 0
        self._writer.write_table(pa.Table.from_batches(self._waiting), row_group_size=1 << 20)
        self._n_written += self._n_waiting
        self._waiting, self._n_waiting = [], 0
        if self._kind == "directory" and self._n_written >= FILE_BYTES:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
