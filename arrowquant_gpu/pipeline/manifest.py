"""`Manifest`: what a run did to every tensor, as an Arrow table that is written beside the output.

Columns: those of the plan (`plan.COLUMNS`), and

    cosine, sqnr_db, max_error   error figures of quantized tensors, null unless validation was asked for
    hash                         BLAKE2b-128, hex, see below
    seconds                      time spent on the tensor

The hash of a quantized tensor is that of three BLAKE2b-128 digests, one after the other: of its packed codes, of its
scales and of its zero points (of nothing, where there are none), as QuantizedTensor holds them. It depends neither on
the format nor on the device. The hash of a kept tensor is that of its bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..formats.output import FILES_KEY
from .figures import Figures
from .plan import COLUMNS as PLAN_COLUMNS
from .plan import Plan

COLUMNS = pa.schema(
    [
        *PLAN_COLUMNS,
        pa.field("cosine", pa.float64()),
        pa.field("sqnr_db", pa.float64()),
        pa.field("max_error", pa.float64()),
        pa.field("hash", pa.string(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
    ]
)


class Record(NamedTuple):
    """What the engine measured on one tensor."""

    figures: Figures | None
    hash: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """The result of a run: `table`, `summary`, the `plan` it carried out and the `files` of the output."""

    plan: Plan
    table: pa.Table
    files: tuple[Path, ...]
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        """The plan's totals, seconds, and where validated the worst tensor by cosine."""
        summary = {**self.plan.summary, "seconds": self.seconds}
        columns = (self.table[key].to_pylist() for key in ("cosine", "name"))
        cosines = [(cosine, name) for cosine, name in zip(*columns, strict=True) if cosine is not None]
        if cosines:
            summary["worst_cosine"], summary["worst_tensor"] = min(cosines, key=lambda c: (not math.isnan(c[0]), c))
        return summary


def manifest_table(
    plan: Plan, records: Sequence[Record], files: Sequence[str], provenance: Mapping[str, str]
) -> pa.Table:
    """The plan's table with what was measured; the schema metadata holds the files and `arrowquant.*` provenance."""
    figures = [r.figures for r in records]
    measured = [
        [None if f is None else f.cosine for f in figures],
        [None if f is None else f.sqnr_db for f in figures],
        [None if f is None else f.max_error for f in figures],
        [r.hash for r in records],
        [r.seconds for r in records],
    ]
    metadata = {FILES_KEY: json.dumps(sorted(files))}
    metadata |= {f"arrowquant.{key}".encode(): value for key, value in provenance.items()}
    return pa.table([*plan.table.columns, *measured], schema=COLUMNS.with_metadata(metadata))


def write_manifest(table: pa.Table, path: Path) -> None:
    """Write the table as Parquet. Raises OSError."""
    pq.write_table(table, path)
