"""What `arrowquant inspect` shows: any checkpoint, float or quantized, as rows from its headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import SourceError
from .formats import QuantizedCheckpoint, TensorInfo
from .formats.checkpoint import SafetensorsCheckpoint, open_checkpoint
from .formats.quantized import open_quantized
from .schemes import Scheme


def open_any(path: Path) -> SafetensorsCheckpoint | QuantizedCheckpoint:
    """A float or a quantized checkpoint. Raises SourceError, with both reasons, where it is neither."""
    try:
        return open_checkpoint(path)
    except SourceError as e:
        no_float = e
    try:
        return open_quantized(path)
    except SourceError as no_quantized:
        raise SourceError(f"Not a float checkpoint: {no_float} Not a quantized one: {no_quantized}") from no_quantized


def describe(
    checkpoint: SafetensorsCheckpoint | QuantizedCheckpoint,
) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    """(format, a row per tensor, what it says of itself). `bytes` are those of codes, scales and zero points where a
    tensor is quantized; `dtype` is the original one."""
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        rows = [_row(e.info, e.scheme, e.reason) for e in checkpoint.entries.values()]
        return checkpoint.format, rows, dict(checkpoint.provenance)
    rows = [_row(info, None, "") for info in checkpoint.tensors.values()]
    notes = {k: v for k, v in checkpoint.metadata.items() if len(v) <= 200}
    architectures = (checkpoint.config or {}).get("architectures")
    if architectures:
        notes["architectures"] = ", ".join(map(str, architectures))
    return "safetensors", rows, notes


def _row(info: TensorInfo, scheme: Scheme | None, reason: str) -> dict[str, Any]:
    return {
        "name": info.name,
        "scheme": None if scheme is None else scheme.id,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "bytes": info.n_bytes if scheme is None else scheme.n_bytes(info.shape),
        "reason": reason,
    }
