"""Any quantized checkpoint: opened by what it is, and read in pieces of bounded size."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .. import trace
from ..errors import SourceError
from ..ops import scale_rows
from ..schemes import rows_and_length
from ..tensor import QuantizedTensor
from . import QuantizedCheckpoint
from .arrow_ipc import ArrowCheckpoint
from .comfyui import ComfyUICheckpoint
from .gguf_checkpoint import GgufCheckpoint
from .parquet import ParquetCheckpoint
from .parquet_tensors import INDEX, ParquetTensorsCheckpoint
from .recognise import by_first_bytes

# Weights of one piece: 4 MiB as float32, which fits a cache and keeps every core busy.
PIECE_WEIGHTS = 1 << 20

READ = (
    "what can be read is a quantized model directory in a format that arrowquant writes, a directory with one Parquet "
    "file per tensor, a Parquet or Arrow file that arrowquant wrote, or a GGUF file"
)

# Module of formats/ and class that read a directory, by the quant_method of its config.json; MLX has a key of its own.
READERS = {
    "mlx": "mlx:MlxCheckpoint",
    "compressed-tensors": "compressed_tensors:CompressedTensorsCheckpoint",
    "gptq": "gptq_checkpoint:GptqCheckpoint",
    "awq": "awq:AwqCheckpoint",
    "fp8": "fp8:Fp8Checkpoint",
    "modelopt": "modelopt:ModelOptCheckpoint",
    "arrowquant": "packed_safetensors:PackedSafetensorsCheckpoint",
    "bitsandbytes": "bitsandbytes_checkpoint:BitsAndBytesCheckpoint",
}


def open_quantized(path: str | Path) -> QuantizedCheckpoint:
    """Open a quantized checkpoint of any format that this package writes; only headers are read.

    A directory with the index of Parquet files is parquet-tensors, any other is what its config.json says; a file is
    what its first bytes say. The result refers to the files, which must not change while it is in use.

    Raises SourceError for anything else, saying what it is.
    """
    path = Path(path)
    if (path / INDEX).exists():
        return ParquetTensorsCheckpoint(path)
    if path.is_dir():
        return _open_directory(path)
    try:
        with path.open("rb") as f:
            head = f.read(64)
    except OSError as e:
        raise SourceError(f"{path}: cannot be read: {e.strerror or e}") from e
    if head.startswith(b"PAR1"):
        return ParquetCheckpoint(path)
    if head.startswith(b"ARROW1"):
        return ArrowCheckpoint(path)
    if head.startswith(b"GGUF"):
        return GgufCheckpoint(path)
    if head[8:9] == b"{":
        return ComfyUICheckpoint(path)
    what = by_first_bytes(head) or "not known by its first bytes"
    raise SourceError(f"{path} is no quantized checkpoint but {what}; {READ}")


def _open_directory(path: Path) -> QuantizedCheckpoint:
    method = quant_method(path)
    if method not in READERS:
        known = ", ".join(READERS)
        raise SourceError(f"{path} has quant_method {method!r} in config.json; what can be read is {known}")
    module, name = READERS[method].split(":")
    opened: QuantizedCheckpoint = getattr(importlib.import_module(f".{module}", __package__), name)(path)
    return opened


def quant_method(path: Path) -> str:
    """What the config.json of a model directory calls the method it is quantized with.

    Raises SourceError where there is none.
    """
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise SourceError(f"{path}: config.json cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if not isinstance(config, dict):
        raise SourceError(f"{path}: config.json is no JSON object")
    if isinstance(config.get("quantization"), dict) and "quant_method" not in (config.get("quantization_config") or {}):
        return "mlx"
    found = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(found, dict):
        raise SourceError(f"{path}: config.json has no quantization_config: this is no quantized model")
    return str(found.get("quant_method"))


def pieces(
    checkpoint: QuantizedCheckpoint, name: str, n_weights: int = PIECE_WEIGHTS
) -> Iterator[tuple[int, QuantizedTensor | NDArray[Any]]]:
    """A tensor in order, in pieces of about `n_weights`: (index of the first element, the piece).

    A piece of a quantized tensor is [rows, n]: whole rows, or a part of one row that is longer. A piece of a copied
    tensor is a flat array, of uint8 for elements of less than one byte. Pieces are views of the checkpoint's blocks.
    """
    done = 0
    blocks = checkpoint.blocks(name)
    while True:
        with trace.span("read", name):
            found = next(blocks, None)
        if found is None:
            return
        block = found[1]
        if isinstance(block, QuantizedTensor):
            for piece in _cut(block, n_weights):
                yield done, piece
                done += math.prod(piece.shape)
        else:
            flat = block.reshape(-1)
            for start in range(0, flat.size, n_weights):
                yield done + start, flat[start : start + n_weights]
            done += flat.size


def _cut(q: QuantizedTensor, n_weights: int) -> Iterator[QuantizedTensor]:
    rows, length = rows_and_length(q.shape)
    unit = q.scheme.group_size or 1 if q.scheme.granularity == "block" else 1
    step = max(1, n_weights // max(1, length * unit)) * unit
    for row in range(0, rows, step):
        part = slice(row, min(row + step, rows))
        scales, zeros = scale_rows(q.scheme, q.scales, q.zeros, part)
        whole = QuantizedTensor(q.packed[part], scales, zeros, (part.stop - row, length), q.scheme, q.dtype)
        if length <= n_weights or q.scheme.granularity == "block":
            yield whole
        else:
            yield from _cut_row(whole, n_weights)


def _cut_row(q: QuantizedTensor, n_weights: int) -> Iterator[QuantizedTensor]:
    """One long row in parts that begin with a whole byte and a whole group."""
    length, group = q.shape[1], q.scheme.group_size
    unit = math.lcm(8, group or 1)
    step = max(unit, n_weights // unit * unit)
    for start in range(0, length, step):
        stop = min(start + step, length)
        packed = q.packed[:, q.scheme.row_bytes(start) : q.scheme.row_bytes(stop)]
        groups = slice(None) if group is None else slice(start // group, -(-stop // group))
        zeros = q.zeros if q.zeros is None or q.scheme.scale_rule == "global" else q.zeros[:, groups]
        yield QuantizedTensor(packed, q.scales[:, groups], zeros, (1, stop - start), q.scheme, q.dtype)
