"""`read_calibration`: what the inputs of layers were when the model ran, from a file that its user recorded.

A row is one layer at one time step. Read row by row or batch by batch, and kept as extremes and sums, so memory grows
with layers and time steps, not with samples. docs/diffusion.md has the columns.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import ArrowQuantError, InputError, SourceError

COLUMNS = ("layer", "timestep", "min", "max", "samples", "channel_absmax")
# A row of Parquet may hold all samples of a layer: so many are read at a time.
BATCH_ROWS = 16
# The longest line of a jsonl file.
MAX_LINE = 256 << 20
# The first bytes of an Arrow IPC stream.
CONTINUATION = b"\xff\xff\xff\xff"


class Extremes(NamedTuple):
    """Of the inputs of a layer: lowest and highest, both float32, and how many samples or rows they are from."""

    low: float
    high: float
    n: int


@dataclass(slots=True)
class Activations:
    """What is known of the inputs of one layer.

    steps: by time step
    absmax: float32 [channels], the largest absolute value of each input channel; None where no row has channels
    sums, n_sums: float64 [channels] and how many samples they are the sum of; of samples that have channels
    """

    steps: dict[int, Extremes] = field(default_factory=dict)
    absmax: NDArray[np.float32] | None = None
    sums: NDArray[np.float64] | None = None
    n_sums: int = 0

    @property
    def whole(self) -> Extremes:
        """Over all time steps."""
        return merged(self.steps.values())

    @property
    def mean(self) -> NDArray[np.float32] | None:
        """float32 [channels], the mean of each input channel; None where no samples have channels."""
        return None if self.sums is None else (self.sums / self.n_sums).astype(np.float32)


class Calibration(NamedTuple):
    """The layers of a calibration file by the tensor that they feed; the time steps; layers that no tensor has."""

    layers: dict[str, Activations]
    n_timesteps: int
    unknown: tuple[str, ...]


def merged(parts: Collection[Extremes]) -> Extremes:
    """The extremes of several."""
    return Extremes(min(p.low for p in parts), max(p.high for p in parts), sum(p.n for p in parts))


def read_calibration(
    path: str | Path, names: Collection[str], *, n_timesteps: int | None = None, n_samples: int = 128
) -> Calibration:
    """Read a calibration file: JSON lines, Parquet, or Arrow IPC (file or stream), told by its first bytes.

    names: of tensors. `layer` of a row is one of these, or one without its ".weight"; rows of other layers are left
        out, and the layers listed in `unknown`
    n_timesteps: by default one more than the largest in the file
    n_samples: of each layer and time step so many are used, the first ones. A number is a sample, and where samples
        have channels a list of numbers is

    Raises SourceError for a file that cannot be read, and InputError, naming row (line), layer and value, for what it
    says: columns that are missing, values that are not finite, min over max, time steps out of range, other numbers of
    channels, no rows, or no layer of this model.
    """
    path = Path(path)
    if n_samples < 1:
        raise InputError(f"calibration samples {n_samples}: at least 1 is needed")
    if n_timesteps is not None and n_timesteps < 1:
        raise InputError(f"timesteps {n_timesteps}: at least 1 is needed")
    tensors = {name.removesuffix(".weight"): name for name in names} | {name: name for name in names}
    layers: dict[str, Activations] = {}
    used: dict[tuple[str, int], int] = {}
    unknown: dict[str, None] = {}
    last, is_empty = -1, True
    with _errors(path):
        for where, row in _rows(path):
            is_empty = False
            with _located(path, where, row):
                layer, step = _key(row, n_timesteps)
                last = max(last, step)
                if layer not in tensors:
                    unknown[layer] = None
                    continue
                name = tensors[layer]
                n_used = used.get((name, step), 0)
                used[name, step] = n_used + _add(layers.setdefault(name, Activations()), step, row, n_samples - n_used)
    if is_empty:
        raise InputError(f"{path}: it has no rows; record the inputs of at least one layer")
    if not layers:
        raise InputError(
            f"{path}: none of its layers is a tensor that is quantized. They are like {_listed(list(unknown))}, the "
            f"tensors like {_listed(sorted(names))}."
        )
    return Calibration(layers, last + 1 if n_timesteps is None else n_timesteps, tuple(unknown))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _key(row: Mapping[str, Any], n_timesteps: int | None) -> tuple[str, int]:
    """Layer and time step of a row."""
    for column in ("layer", "timestep"):
        if row.get(column) is None:
            raise InputError(f"{column} is missing")
    layer, step = row["layer"], row["timestep"]
    if not isinstance(layer, str):
        raise InputError(f"layer {layer!r} is not a name")
    if isinstance(step, bool) or not isinstance(step, int):
        raise InputError(f"timestep {step!r} is not an integer")
    if step < 0 or (n_timesteps is not None and step >= n_timesteps):
        most = "" if n_timesteps is None else f" and less than {n_timesteps} (--timesteps)"
        raise InputError(f"timestep {step}: it must be at least 0{most}")
    return layer, step


def _add(activations: Activations, step: int, row: Mapping[str, Any], room: int) -> int:
    """Take in a row, of its samples the first `room`. Returns how many of them were used."""
    low, high, samples = (row.get(column) for column in ("min", "max", "samples"))
    if (low is None) != (high is None):
        raise InputError("it has one of min and max without the other")
    if low is None and samples is None:
        raise InputError("it has neither min and max nor samples")
    found, n_used = [], 0
    if low is not None:
        bounds = _finite(np.array([low, high]), "min and max")
        if bounds[0] > bounds[1]:
            raise InputError(f"min {low} is over max {high}")
        found.append(Extremes(float(bounds[0]), float(bounds[1]), 1))
    if samples is not None:
        values = _finite(_array(samples, "samples"), "samples")
        if values.size == 0 or values.ndim not in (1, 2):
            raise InputError(f"samples of shape {list(values.shape)}: a list of numbers, or of lists of numbers")
        values = values[:room]
        n_used = len(values)
        if n_used:
            found.append(Extremes(float(values.min()), float(values.max()), n_used))
            if values.ndim == 2:
                _add_channels(activations, np.abs(values).max(axis=0), "samples")
                sums = values.astype(np.float64).sum(axis=0)
                activations.sums = sums if activations.sums is None else activations.sums + sums
                activations.n_sums += n_used
    if (absmax := row.get("channel_absmax")) is not None:
        largest = _finite(_array(absmax, "channel_absmax"), "channel_absmax")
        if largest.ndim != 1 or (largest < 0).any():
            raise InputError("channel_absmax: one number for each channel, none of them negative")
        _add_channels(activations, largest, "channel_absmax")
    if found:
        known = activations.steps.get(step)
        activations.steps[step] = merged([*found, *([] if known is None else [known])])
    return n_used


def _add_channels(activations: Activations, absmax: NDArray[np.float32], what: str) -> None:
    known = activations.absmax
    if known is not None and known.size != absmax.size:
        raise InputError(f"{what} has {absmax.size} channels, an earlier row of this layer {known.size}")
    activations.absmax = absmax if known is None else np.maximum(known, absmax)


def _array(values: Any, what: str) -> NDArray[Any]:
    try:
        return np.array(values)
    except ValueError as e:
        raise InputError(f"{what}: not numbers, or lists of different lengths ({e})") from e


def _finite(values: NDArray[Any], what: str) -> NDArray[np.float32]:
    """As float32, which the values must fit."""
    if values.dtype.kind not in "fiu":
        raise InputError(f"{what}: not numbers alone")
    with np.errstate(over="ignore"):
        as_float32 = values.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(as_float32))
    if bad.size:
        raise InputError(f"{what}: {values.reshape(-1)[bad[0]]} is not a finite float32")
    return as_float32


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(row or line, its columns); lists of an Arrow file as arrays."""
    with path.open("rb") as f:
        head = f.read(8)
    if head.startswith(b"PAR1"):
        with pq.ParquetFile(path) as file:
            columns = _known(path, file.schema_arrow)
            yield from _of_batches(file.iter_batches(BATCH_ROWS, columns=columns))
    elif head.startswith((b"ARROW1", CONTINUATION)):
        with pa.memory_map(str(path)) as mapped:
            if head.startswith(b"ARROW1"):
                file = pa.ipc.open_file(mapped)
                batches: Iterator[pa.RecordBatch] = (file.get_batch(i) for i in range(file.num_record_batches))
                columns = _known(path, file.schema)
            else:
                stream = pa.ipc.open_stream(mapped)
                batches, columns = iter(stream), _known(path, stream.schema)
            yield from _of_batches(batch.select(columns) for batch in batches)
    else:
        yield from _lines(path)


def _known(path: Path, schema: pa.Schema) -> list[str]:
    """The columns of a table that are read."""
    names = schema.names
    for column in ("layer", "timestep"):
        if column not in names:
            raise InputError(f"{path}: there is no column {column}; its columns are {', '.join(names)}")
    if "samples" not in names and not {"min", "max"} <= set(names):
        raise InputError(f"{path}: there are neither min and max nor samples; its columns are {', '.join(names)}")
    return [column for column in COLUMNS if column in names]


def _of_batches(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    for batch in batches:
        # What a file says of its own buffers is not believed.
        batch.validate(full=True)
        for i in range(batch.num_rows):
            yield f"row {number}", {column: _value(batch[column][i]) for column in batch.schema.names}
            number += 1


def _value(scalar: pa.Scalar) -> Any:
    """A list of numbers as an array, a list of lists as one of two dimensions where all are of one length."""
    if not scalar.is_valid or not _is_list(scalar.type):
        return scalar.as_py()
    values = scalar.values
    if _is_list(values.type):
        lengths = pc.unique(pc.list_value_length(values))
        if len(lengths) > 1 or values.null_count:
            return scalar.as_py()
        flat = values.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(values), -1) if len(values) else flat
    return values.to_numpy(zero_copy_only=False)


def _is_list(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as f:
        number = 0
        while line := f.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise InputError(f"{path}, line {number}: longer than {MAX_LINE} bytes")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise InputError(f"{path}, line {number}: not JSON: {e}") from e
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: not an object with some of {', '.join(COLUMNS)}")
            yield f"line {number}", row


@contextlib.contextmanager
def _located(path: Path, where: str, row: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except InputError as e:
        layer = f", layer {row['layer']}" if isinstance(row.get("layer"), str) else ""
        raise InputError(f"{path}, {where}{layer}: {e}") from e


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ArrowQuantError:
        raise
    except (OSError, ValueError, pa.ArrowException) as e:
        raise SourceError(f"{path}: cannot be read as calibration data: {e}") from e
