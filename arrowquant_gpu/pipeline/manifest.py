"""`Manifest`: what a run did to every tensor, as an Arrow table that is written beside the output.

Columns: those of the plan (`plan.COLUMNS`; its last, `accuracy` and `entropy`, are what the width was chosen by, see
`plan.Measured`), and

    cosine, sqnr_db, max_error   error figures of quantized tensors, null unless validation was asked for
    hash                         XXH3-128 of the tensor's stored bytes, hex; see engine/hashes.py

It depends on the source and the options alone: every run on any device writes the same manifest. What differs from run
to run, time and devices, is in `Manifest.run`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..engine.journal import Finished
from ..formats.output import FILES_KEY
from .plan import COLUMNS as PLAN_COLUMNS
from .plan import Plan

COLUMNS = pa.schema(
    [
        *PLAN_COLUMNS,
        pa.field("cosine", pa.float64()),
        pa.field("sqnr_db", pa.float64()),
        pa.field("max_error", pa.float64()),
        pa.field("hash", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Run:
    """How a run went.

    seconds: from the first look at the source until all was written, without the flush
    flush_seconds: until the files were on the disk and under their final names
    devices: their names
    resumed: tensors that an interrupted run had finished
    notes: sentences on what users should know, for example that a GPU ran out of memory
    """

    seconds: float
    flush_seconds: float
    devices: tuple[str, ...]
    resumed: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """The result of a run: `table`, `summary`, the `plan` it carried out, the `files` of the output, and the `run`."""

    plan: Plan
    table: pa.Table
    files: tuple[Path, ...]
    run: Run

    @property
    def summary(self) -> dict[str, Any]:
        """The plan's totals, those of the run, and where validated the worst tensor by cosine."""
        summary = {**self.plan.summary, **dataclasses.asdict(self.run)}
        columns = (self.table[key].to_pylist() for key in ("cosine", "name"))
        cosines = [(cosine, name) for cosine, name in zip(*columns, strict=True) if cosine is not None]
        if cosines:
            summary["worst_cosine"], summary["worst_tensor"] = min(cosines, key=lambda c: (not math.isnan(c[0]), c))
        return summary


def manifest_table(
    plan: Plan, finished: Sequence[Finished], files: Sequence[str], provenance: Mapping[str, str]
) -> pa.Table:
    """The plan's table with what was measured; the schema metadata holds the files and `arrowquant.*` provenance."""
    figures = [[None if f.figures is None else f.figures[i] for f in finished] for i in range(3)]
    metadata = {FILES_KEY: json.dumps(sorted(files))}
    metadata |= {f"arrowquant.{key}".encode(): value for key, value in provenance.items()}
    columns = [*plan.table.columns, *figures, [f.hash for f in finished]]
    return pa.table(columns, schema=COLUMNS.with_metadata(metadata))


def write_manifest(table: pa.Table, path: Path) -> None:
    """Write the table as Parquet. Raises OSError."""
    pq.write_table(table, path)
