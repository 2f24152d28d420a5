"""Weights on disk as a stream of record batches: Arrow IPC files and streams, Parquet files, datasets.

Only the columns that count are read, and no batch is much larger than BATCH_BYTES unless a single row is. Files of
Arrow IPC are mapped: their batches are views of the page cache. Parquet is decoded few rows at a time and by one
thread, since pyarrow's scanner holds several row groups at once (docs/decisions/0043-few-rows-at-a-time.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..errors import ArrowQuantError, SourceError
from .weights import COLUMNS, check_schema

# Of weights, in one record batch that is read.
BATCH_BYTES = 16 << 20
# What ends a stream: a continuation mark, and a length of zero.
_END = b"\xff\xff\xff\xff\0\0\0\0"
# How many times the bytes of a row it takes to decode it from Parquet: values twice, and levels.
_DECODING = 3

_MAGICS = {b"ARROW1": "arrow", b"PAR1": "parquet", b"\xff\xff\xff\xff": "stream"}
# Names of files in a directory that are read as a dataset, and the format that pyarrow calls it.
_SUFFIXES = {".parquet": "parquet", ".arrow": "ipc", ".feather": "ipc", ".ipc": "ipc"}


@dataclass(frozen=True, slots=True)
class Source:
    """A table of weights that is read batch by batch.

    name: what errors call it
    schema: of the columns that are read
    n_rows: how many there are; None where only reading tells
    paths: files and directories that must not be written to
    """

    name: str
    schema: pa.Schema
    n_rows: int | None
    paths: tuple[Path, ...]
    batches: Callable[[], Iterator[pa.RecordBatch]]

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        """The batches, none of them empty or kept. Raises SourceError where the source cannot be read further."""
        with source_errors(self.name):
            yield from self.batches()

    def reader(self) -> pa.RecordBatchReader:
        """The same as a stream of Arrow."""
        return pa.RecordBatchReader.from_batches(self.schema, iter(self))


def open_source(src: Any) -> Source:
    """`src` is a path, a pyarrow Dataset, or a binary file object with an Arrow IPC stream.

    A path is one of an Arrow IPC file or stream or a Parquet file, told apart by their first bytes, or of a directory
    of Parquet or Arrow IPC files, with hive partitions (`layer_name=fc/`) or without.

        >>> import io
        >>> batch = pa.record_batch({"layer_name": ["fc"], "weights": [[1.0, 2.0]], "note": ["not read"]})
        >>> stream = io.BytesIO()
        >>> with pa.ipc.new_stream(stream, batch.schema) as writer:
        ...     writer.write(batch)
        >>> source = open_source(io.BytesIO(stream.getvalue()))
        >>> source.schema.names, source.reader().read_all().num_rows
        (['layer_name', 'weights'], 1)

    Raises SourceError for what cannot be read, and InputError for columns that cannot hold weights.
    """
    if hasattr(src, "get_fragments"):
        with source_errors("the dataset"):
            return _dataset(src, "the dataset", ())
    if hasattr(src, "read"):
        name = str(getattr(src, "name", "the stream"))
        with source_errors(name):
            file = _Ending(src)
            return _stream(file, lambda: file.last, name, ())
    path = Path(src)
    with source_errors(str(path)):
        if path.is_dir():
            return _directory(path)
        with path.open("rb") as opened:
            begin = opened.read(8)
        kind = next((kind for magic, kind in _MAGICS.items() if begin.startswith(magic)), None)
        if kind is None:
            raise SourceError(
                f"{path}: neither Parquet nor Arrow IPC (its first bytes are {begin!r}); a safetensors checkpoint is "
                f"read by `arrowquant quantize`"
            )
        if kind == "stream":
            mapped = pa.memory_map(str(path))
            return _stream(mapped, lambda: mapped.read_at(len(_END), mapped.tell() - len(_END)), str(path), (path,))
        return _file(path, kind)


@contextlib.contextmanager
def source_errors(name: str) -> Iterator[None]:
    """Turn what pyarrow and the system raise in the body into a SourceError that names the source."""
    try:
        yield
    except ArrowQuantError:
        raise
    except FileNotFoundError as e:
        raise SourceError(f"{name}: there is no such file or directory") from e
    except (pa.ArrowException, OSError, ValueError) as e:
        raise SourceError(f"{name}: cannot be read, it may be damaged or incomplete: {e}") from e


def _columns(schema: pa.Schema) -> list[str]:
    check_schema(schema)
    return [name for name in COLUMNS if name in schema.names]


def _projected(schema: pa.Schema) -> pa.Schema:
    return pa.schema([schema.field(name) for name in _columns(schema)])


class _Ending:
    """A file object that is read through, and knows with which bytes it ended."""

    closed = False

    def __init__(self, file: Any) -> None:
        self._file, self.last = file, b""

    def read(self, n: int = -1) -> bytes:
        data: bytes = self._file.read(n)
        self.last = (self.last + data[-len(_END) :])[-len(_END) :]
        return data


def _stream(file: Any, last: Callable[[], bytes], name: str, paths: tuple[Path, ...]) -> Source:
    """An Arrow IPC stream, from where the file is; `last` says what the last bytes were that were read.

    pyarrow takes the end of the file for the end of the stream, so that one which was cut off between two batches, by a
    writer that was killed, would pass for a short one.
    """
    opened = pa.ipc.open_stream(file)
    columns = _columns(opened.schema)

    def batches() -> Iterator[pa.RecordBatch]:
        while True:
            try:
                batch = opened.read_next_batch().select(columns)
            except StopIteration:
                if last() != _END:
                    raise SourceError(
                        f"{name}: ends without the mark that ends an Arrow stream: its writer did not finish. Write it "
                        f"anew, and close the writer"
                    ) from None
                return
            yield from _few_rows(batch)
            del batch  # before the next is read

    return Source(name, _projected(opened.schema), None, paths, batches)


def _file(path: Path, kind: str) -> Source:
    """An Arrow IPC or Parquet file."""
    import pyarrow.parquet as pq

    name = str(path)
    if kind == "arrow":
        schema = _projected(pa.ipc.open_file(pa.memory_map(name)).schema)
        return Source(name, schema, None, (path,), lambda: _ipc_batches(pa.memory_map(name), schema.names))
    opened = pq.ParquetFile(name)
    schema = _projected(opened.schema_arrow)
    n_rows = opened.metadata.num_rows
    return Source(name, schema, n_rows, (path,), lambda: _parquet_batches(pa.OSFile(name), schema.names))


def _ipc_batches(file: Any, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The columns of an Arrow IPC file, those of them that it has.

    Not by the option `included_fields`, with which pyarrow copies a mapped file to memory; so does counting the rows.
    """
    opened = pa.ipc.open_file(file)
    here = [c for c in columns if c in opened.schema.names]
    for i in range(opened.num_record_batches):
        yield from _few_rows(opened.get_batch(i).select(here))


def _parquet_batches(file: Any, columns: list[str], row_groups: list[int] | None = None) -> Iterator[pa.RecordBatch]:
    """The columns of a Parquet file, those of them that it has, from all row groups or the given ones."""
    import pyarrow.parquet as pq

    opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    metadata, here = opened.metadata, [c for c in columns if c in opened.schema_arrow.names]
    for i in range(metadata.num_row_groups) if row_groups is None else row_groups:
        group, n_rows = metadata.row_group(i), 0
        size = _rows_of_a_batch(opened, i, here)
        for batch in opened.iter_batches(size, row_groups=[i], columns=here, use_threads=False):
            n_rows += batch.num_rows
            yield batch
        # Of a damaged column pyarrow may read fewer values than there are, and then ends without a word.
        if n_rows != group.num_rows:
            raise pa.ArrowInvalid(f"row group {i} has {group.num_rows} rows, and {n_rows} can be read")


def _rows_of_a_batch(opened: Any, i: int, columns: list[str]) -> int:
    """So many rows of a row group that decoding them takes about BATCH_BYTES.

    By what the first one takes, since a column of equal weights has next to no bytes in the file, and by the bytes of
    all, since the others may be larger. Not by the metadata of the columns: damaged they end the process (pyarrow 26).
    """
    group = opened.metadata.row_group(i)
    row_bytes = group.total_byte_size // max(1, group.num_rows)
    for batch in opened.iter_batches(1, row_groups=[i], columns=columns, use_threads=False):
        batch.validate(full=True)
        row_bytes = max(row_bytes, batch.nbytes)
        break
    return int(max(1, BATCH_BYTES // max(1, row_bytes * _DECODING)))


def _few_rows(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Slices of about BATCH_BYTES."""
    batch.validate(full=True)  # of a damaged one even the size cannot be asked for
    step = max(1, batch.num_rows * BATCH_BYTES // max(1, batch.nbytes))
    for start in range(0, batch.num_rows, step):
        yield batch.slice(start, step)


def _directory(path: Path) -> Source:
    import pyarrow.dataset as ds
    from pyarrow import fs

    files = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "_"))]
    suffixes = {p.suffix for p in files}
    formats = {_SUFFIXES[s] for s in suffixes if s in _SUFFIXES}
    if len(formats) != 1:
        found = "both Parquet and Arrow IPC files" if formats else "no Parquet or Arrow IPC files"
        raise SourceError(f"{path}: has {found} ({', '.join(_SUFFIXES)}); a dataset has files of one format")
    if odd := sorted(suffixes - _SUFFIXES.keys()):
        raise SourceError(
            f"{path}: has files that are no part of a dataset ({', '.join(s or 'without suffix' for s in odd)}); "
            f"move them away, or pass a pyarrow Dataset of the others"
        )
    mapped = fs.LocalFileSystem(use_mmap=formats == {"ipc"})
    dataset = ds.dataset(str(path.absolute()), format=formats.pop(), partitioning="hive", filesystem=mapped)
    return _dataset(dataset, str(path), (path,))


def _dataset(dataset: Any, name: str, paths: tuple[Path, ...]) -> Source:
    """Every file of a dataset after the other; a dataset that is not just files goes through pyarrow's scanner."""
    import pyarrow.dataset as ds

    schema = _projected(dataset.schema)
    is_files = isinstance(dataset, ds.FileSystemDataset) and not getattr(dataset, "_scan_options", None)
    if is_files and isinstance(dataset.format, ds.ParquetFileFormat | ds.IpcFileFormat):
        n_rows = dataset.count_rows() if isinstance(dataset.format, ds.ParquetFileFormat) else None
        return Source(name, schema, n_rows, paths, lambda: _fragments(dataset, schema))
    scanner = dataset.scanner(columns=schema.names, batch_readahead=1, fragment_readahead=1, use_threads=False)
    return Source(name, schema, None, paths, lambda: (x for batch in scanner.to_reader() for x in _few_rows(batch)))


def _fragments(dataset: Any, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of every file, with the columns that its path stands for, in the types of the dataset."""
    import pyarrow.dataset as ds

    for fragment in dataset.get_fragments():
        keys = ds.get_partition_keys(fragment.partition_expression)
        with source_errors(fragment.path), fragment.open() as file:
            if isinstance(fragment.format, ds.IpcFileFormat):
                found = _ipc_batches(file, schema.names)
            else:
                found = _parquet_batches(file, schema.names, [group.id for group in fragment.row_groups])
            for batch in found:
                yield pa.RecordBatch.from_arrays([_column(batch, f, keys) for f in schema], schema=schema)


def _column(batch: pa.RecordBatch, field: pa.Field, keys: dict[str, Any]) -> pa.Array:
    """A column of the dataset: as the file has it, or one value of the path for all rows, or nulls."""
    if field.name in keys:
        return pa.repeat(pa.scalar(keys[field.name], pa.string()), batch.num_rows).cast(field.type)
    if field.name not in batch.schema.names:
        return pa.nulls(batch.num_rows, field.type)
    return batch.column(field.name).cast(field.type)
