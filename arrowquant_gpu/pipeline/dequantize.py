"""`dequantize_checkpoint`: a quantized checkpoint in, float safetensors out."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .. import __version__, trace
from ..backends import get_backend
from ..dtypes import DTYPES, KERNEL_DTYPES
from ..engine import Progress
from ..engine.decoded import decoded
from ..errors import InputError
from ..formats import Entry, QuantizedCheckpoint, safetensors
from ..formats.model_card import model_card
from ..formats.model_sink import INDEX
from ..formats.output import ACTIVATIONS, FILES_KEY, MANIFEST, Output, target_errors
from ..formats.quantized import open_quantized

SHARD_BYTES = 5_000_000_000

COLUMNS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("scheme", pa.string()),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("file", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Dequantized:
    """The result of `dequantize_checkpoint`: `table` (a row per tensor), the `files` of the output, and seconds.

    `scheme` in the table is the one that a tensor was decoded from, null where it was copied; `dtype` and `bytes` are
    those of the output.
    """

    table: pa.Table
    files: tuple[Path, ...]
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        """Totals: tensors, tensors that were decoded, bytes of all, seconds."""
        return {
            "n_tensors": self.table.num_rows,
            "n_decoded": self.table.num_rows - self.table["scheme"].null_count,
            "bytes": sum(self.table["bytes"].to_pylist()),
            "seconds": self.seconds,
        }


def dequantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Dequantized:
    """Decode the quantized checkpoint `src` into float safetensors `dst`, which appear when they are complete.

    src: a quantized checkpoint in any format that this package writes
    dst: for a directory a directory, with the side files, config.json without its quantization, and shards of at most
        5 GB; for a file one safetensors file
    dtype: "float32", "float16" or "bfloat16" for the tensors that were quantized; by default each its original one.
        What was copied is copied back, bit for bit
    device, threads: as in `quantize`; every device gives the same bytes
    overwrite: replace what is at `dst`; of directories only what this package wrote
    progress: called with (bytes done, bytes in all, tensor name); an exception from it ends the run

    Names and shapes are the original ones. Memory: one row of the source file (16 MiB), however large the model. After
    any error `dst` is what it was before.

        >>> import tempfile, safetensors.numpy
        >>> from arrowquant_gpu import quantize_checkpoint
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = safetensors.numpy.save_file({"fc.weight": np.eye(64, dtype=np.float32)}, folder / "m.safetensors")
        >>> _ = quantize_checkpoint(folder / "m.safetensors", folder / "m.parquet", "int8_g32", device="cpu")
        >>> result = dequantize_checkpoint(folder / "m.parquet", folder / "back.safetensors", device="cpu")
        >>> result.summary["n_decoded"]
        1
        >>> back = safetensors.numpy.load_file(folder / "back.safetensors")["fc.weight"]
        >>> bool(np.abs(back - np.eye(64)).max() < 1 / 255)
        True

    Raises SourceError, InputError (dtype), TargetError, FormatError and DeviceError.
    """
    start = time.perf_counter()
    if dtype is not None and dtype not in KERNEL_DTYPES:
        raise InputError(f"dtype {dtype!r}: choose one of {', '.join(KERNEL_DTYPES)}")
    source = open_quantized(src)
    is_directory = source.path.is_dir()
    output = Output(dst, is_directory=is_directory, sources=[source.path], overwrite=overwrite)
    backend = get_backend(device, threads)
    try:
        output.begin()
        places = _lay_out(source, output, dtype)
        rows = []
        done, total = 0, sum(end - begin for _, begin, end in places.values())
        for name, entry in source.entries.items():
            file, begin, end = places[name]
            target = _dtype(entry, dtype)
            for at, data in decoded(source, name, target, backend):
                with trace.span("write", name, data.nbytes):
                    output.write(file, begin + at, data)
                if progress is not None:
                    progress(done + at + data.nbytes, total, name)
            done += end - begin
            scheme = None if entry.scheme is None else entry.scheme.id
            rows.append((name, scheme, target, list(entry.info.shape), file, end - begin))
        table = pa.Table.from_pylist([dict(zip(COLUMNS.names, row, strict=True)) for row in rows], COLUMNS)
        if is_directory:
            files = json.dumps(sorted([*output.names(), MANIFEST]))
            with target_errors(output.target):
                pq.write_table(table.replace_schema_metadata({FILES_KEY: files}), output.path(MANIFEST))
        written = output.commit()
    except BaseException:
        output.abort()
        raise
    return Dequantized(table, written, time.perf_counter() - start)


def _dtype(entry: Entry, dtype: str | None) -> str:
    return entry.info.dtype if dtype is None or entry.scheme is None else dtype


def _lay_out(source: QuantizedCheckpoint, output: Output, dtype: str | None) -> dict[str, tuple[str, int, int]]:
    """Make all files in their final size, all but the weights in their final content: name -> (file, begin, end)."""
    shards: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    room = SHARD_BYTES if source.path.is_dir() else math.inf
    for name, entry in source.entries.items():
        target = _dtype(entry, dtype)
        n_bytes = -(-math.prod(entry.info.shape) * DTYPES[target].bits // 8)
        if shards[-1] and n_bytes > room:
            shards.append([])
            room = SHARD_BYTES
        room -= n_bytes
        shards[-1].append((name, target, entry.info.shape))
    places: dict[str, tuple[str, int, int]] = {}
    n = len(shards)
    for i, shard in enumerate(shards, 1):
        file = output.target.name
        if source.path.is_dir():
            file = "model.safetensors" if n == 1 else f"model-{i:05d}-of-{n:05d}.safetensors"
        header, spans = safetensors.layout(shard, _header_metadata(source))
        output.create(file, max([len(header), *(end for _, end in spans.values())]))
        output.write(file, 0, np.frombuffer(header, np.uint8))
        places |= {name: (file, *span) for name, span in spans.items()}
    if source.path.is_dir():
        _write_side_files(source, output)
        if n > 1:
            size = sum(end - begin for _, begin, end in places.values())
            weight_map = {name: file for name, (file, _, _) in places.items()}
            _write_json(output, INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    return places


def _header_metadata(source: QuantizedCheckpoint) -> dict[str, str]:
    """What the original file said of itself, and how these weights came about."""
    record = {f"arrowquant.{key}": value for key, value in source.provenance.items()}
    return {**source.metadata, "format": "pt", **record, "arrowquant.dequantized_by": f"arrowquant_gpu {__version__}"}


def _write_side_files(source: QuantizedCheckpoint, output: Output) -> None:
    """The side files, config.json without its quantization, and a model card that says what these weights are."""
    card = None
    for path in source.side_files:
        name = str(path.relative_to(source.path))
        if name == "README.md":
            card = path.read_bytes()
        elif name not in ("config.json", INDEX, MANIFEST, ACTIVATIONS):
            with target_errors(output.target):
                shutil.copyfile(path, output.path(name))
    if source.config is not None:
        _write_json(output, "config.json", source.config)
    note = f"They were decoded to float again by arrowquant_gpu {__version__}, and keep the error of quantization."
    with target_errors(output.target):
        output.path("README.md").write_bytes(model_card(card, source.provenance, note))


def _write_json(output: Output, name: str, value: object) -> None:
    with target_errors(output.target):
        output.path(name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
