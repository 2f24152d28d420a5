"""The path that an input takes without a copy, and the device and threads that cost least on this machine.

    batch    arrays, layer after layer; results of each by themselves
    arrow    rows of a table; results as rows of one allocation
    stream   as arrow, batch by batch, while it is read

Any other path than that of its kind would copy an input, or hold all of a stream. What devices and threads cost is
measured, once in a process.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from .. import ops
from ..backends import get_backend, pick_device
from ..errors import InputError
from ..formats.checkpoint import INDEX, open_checkpoint
from ..interchange import as_weights
from ..schemes import Scheme
from ..tables.quantize import TableQuantizer, as_reader, quantize_stream, quantize_table
from ..tables.sources import open_source
from ..tables.weights import check_schema
from .batch import check_names, from_lists, quantize_in_turn

# Sizes of the layers that are measured, in bytes; between them costs are interpolated, beyond them extrapolated.
SIZES = (1 << 16, 1 << 20, 1 << 22, 1 << 25)
ROUNDS = 9
MEASURED_SCHEME = Scheme(4, "group", 128, symmetric=False)
# What a stream is taken for, whose size is not known before it has been read.
STREAM_LAYER_BYTES = 1 << 26
# How files of tables begin: Parquet, Arrow IPC files and streams.
TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")
PATHS = {"dict": "batch", "array": "batch", "table": "arrow", "batch": "arrow", "reader": "stream"}


@dataclass(frozen=True, slots=True)
class Choice:
    """How weights are quantized.

    path: batch, arrow or stream, see the module
    device, threads: as in `quantize`; threads is None for a GPU
    reason: a sentence
    costs: seconds that each candidate would take, by its words; empty where there is only one
    """

    path: str
    device: str
    threads: int | None
    reason: str
    costs: Mapping[str, float]


class Place(NamedTuple):
    """A device, and threads of the CPU."""

    device: str
    threads: int | None

    def __str__(self) -> str:
        return self.device if self.threads is None else f"{self.device}, {self.threads} thread{'s'[: self.threads > 1]}"


class Input(NamedTuple):
    """What came in, looked at once.

    weights: a dict of arrays, one array, a Table, RecordBatch, RecordBatchReader, or a function that opens one
    kind: dict, array, table, batch or reader
    sizes: bytes of each layer; None where that is not known
    home: the GPU that the weights are on, else "cpu"
    """

    weights: Any
    kind: str
    sizes: Sequence[int] | None
    home: str = "cpu"


def choose(weights: Any, *, device: str, threads: int | None) -> Choice:
    """See `ArrowQuantV2.explain`."""
    return _choose(look_at(weights), device, threads)


def quantize_smart(weights: Any, scheme: Scheme, *, device: str, threads: int | None) -> Any:
    """See `ArrowQuantV2.quantize_batch_smart`."""
    found = look_at(weights)
    choice = _choose(found, device, threads)
    place: dict[str, Any] = {"device": choice.device, "threads": choice.threads}
    if found.kind in ("dict", "array"):
        results = quantize_in_turn(found.weights, scheme, **place)
        return results if found.kind == "dict" else results["weights"]
    if found.kind == "table":
        return quantize_table(found.weights, scheme, **place)
    if found.kind == "batch":
        quantizer = TableQuantizer(found.weights.schema, scheme, **place)
        result = quantizer.batch(found.weights)
        quantizer.finish()
        return result
    return quantize_stream(found.weights(), scheme, **place)[0]


# --- The input -------------------------------------------------------------------------------------------------------


def look_at(x: Any) -> Input:
    """Say what `x` is; nothing of it is read but headers. Raises InputError and SourceError."""
    if isinstance(x, Mapping):
        return _of_arrays(from_lists(x), "dict")
    if isinstance(x, str | Path):
        return _of_path(Path(x))
    if isinstance(x, pa.RecordBatchReader):
        check_schema(x.schema)
        return Input(lambda: x, "reader", None)
    if isinstance(x, pa.Table | pa.RecordBatch):
        return _of_table(x)
    if isinstance(x, list | tuple):
        return _of_arrays(from_lists({"weights": x}), "array")
    if hasattr(x, "get_fragments"):  # a pyarrow Dataset
        return Input(open_source(x).reader, "reader", None)
    is_tabular = hasattr(x, "__arrow_c_stream__") or (hasattr(x, "__arrow_c_array__") and not hasattr(x, "__dlpack__"))
    if is_tabular and not isinstance(x, pa.Array | pa.ChunkedArray):
        return _of_table(as_reader(x).read_all())
    return _of_arrays({"weights": x}, "array")


def _of_arrays(arrays: Mapping[str, Any], kind: str) -> Input:
    check_names(arrays)
    sizes, homes = [], set()
    for name, x in arrays.items():
        found = as_weights(x, name=name)
        sizes.append(sum(int(block.nbytes) for block in found.blocks))
        homes.add(found.device)
    return Input(arrays, kind, sizes, homes.pop() if len(homes) == 1 else "auto")


def _of_table(table: pa.Table | pa.RecordBatch) -> Input:
    check_schema(table.schema)
    if table.num_rows == 0:
        raise InputError("the table of weights has no rows")
    each = table["weights"].nbytes // table.num_rows
    return Input(table, "table" if isinstance(table, pa.Table) else "batch", [each] * table.num_rows)


def _of_path(path: Path) -> Input:
    """A checkpoint as the dict of its tensors, all of them; tables on disk as a reader."""
    if path.is_dir():
        is_table = not any(file.name.endswith((".safetensors", INDEX)) for file in path.iterdir())
    else:
        is_table = _first_bytes(path).startswith(TABLES)
    if is_table:
        return Input(open_source(path).reader, "reader", None)
    checkpoint = open_checkpoint(path)
    return _of_arrays({name: checkpoint.view(name) for name in checkpoint.tensors}, "dict")


def _first_bytes(path: Path) -> bytes:
    """Of a file; none where it cannot be read, about which the reader of checkpoints has more to say."""
    try:
        with path.open("rb") as f:
            return f.read(8)
    except OSError:
        return b""


# --- The choice ------------------------------------------------------------------------------------------------------


def _choose(found: Input, device: str, threads: int | None) -> Choice:
    path = PATHS[found.kind]
    if found.home.startswith("cuda"):
        on = found.home if device == "auto" else device
        return Choice(path, on, None, f"{path} on {on}: the weights are on {found.home}", {})
    places, note = _places(device, threads)
    if len(places) == 1:
        return Choice(path, *places[0], f"{path} on {places[0]}: nothing else can be chosen{note}", {})
    sizes = [STREAM_LAYER_BYTES] if found.sizes is None else found.sizes
    what = f"{sum(sizes) / 1e6:.3g} MB in {len(sizes)} layer{'s'[: len(sizes) > 1]}"
    what = "each layer of 67 MB (the sizes are not known yet)" if found.sizes is None else what
    costs = {place: _predict(seconds, sizes) for place, seconds in _measure(places).items()}
    best = min(costs, key=lambda place: costs[place])
    reason = f"{path} on {best}: {costs[best] * 1e3:.3g} ms for {what}, the least of {len(costs)} candidates{note}"
    return Choice(path, *best, reason, {str(place): cost for place, cost in costs.items()})


def _places(device: str, threads: int | None) -> tuple[tuple[Place, ...], str]:
    """What can be chosen, and a note on what cannot."""
    picked = pick_device(device)
    is_gpu = picked.name.startswith("cuda")
    gpus = [Place(picked.name, None)] if is_gpu else []
    if device != "auto" and (is_gpu or picked.name == "reference"):
        return (Place(picked.name, None),), ""
    most: int = getattr(get_backend("cpu", threads), "threads", 1)
    counts = [most] if threads is not None else sorted({*(1 << i for i in range(most.bit_length())), most})
    note = f"; {picked.reason}" if device == "auto" and not is_gpu else ""
    return (*gpus, *(Place("cpu", n) for n in counts)), note


def _predict(measured: Sequence[float], sizes: Sequence[int]) -> float:
    """Seconds for layers of so many bytes, by the seconds that layers of `SIZES` take."""
    slope = max(0.0, measured[-1] - measured[-2]) / (SIZES[-1] - SIZES[-2])
    beyond = np.maximum(0, np.asarray(sizes) - SIZES[-1])
    return math.fsum(np.interp(sizes, SIZES, measured) + beyond * slope)


@functools.cache
def _measure(places: tuple[Place, ...]) -> dict[Place, tuple[float, ...]]:
    """Seconds of a whole call for a layer of each of `SIZES`, transfers included: the least of some rounds.

    The places take turns, so that what else the machine does meanwhile is the same for all.
    """
    least: dict[Place, list[float]] = {place: [] for place in places}
    for n_bytes in SIZES:
        x = np.ones((1, n_bytes // 4), np.float32)
        rounds = [[_seconds(x, place) for place in places] for _ in range(1 + ROUNDS)]
        for place, seconds in zip(places, zip(*rounds[1:], strict=True), strict=True):
            least[place].append(min(seconds))
    return {place: tuple(seconds) for place, seconds in least.items()}


def _seconds(x: NDArray[np.float32], place: Place) -> float:
    start = time.perf_counter()
    ops.quantize(x, MEASURED_SCHEME, device=place.device, threads=place.threads)
    return time.perf_counter() - start
