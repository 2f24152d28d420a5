"""What `quantize_checkpoint` does for diffusion models, between the plan and the output."""

from __future__ import annotations

import dataclasses

import pyarrow as pa

from ..diffusion import Prepared
from ..formats import Entry
from ..formats.output import Output, target_errors
from .plan import Plan


def explained(plan: Plan, prepared: Prepared) -> Plan:
    """The plan, its widths decided, with the reasons and warnings of `prepare`."""
    entries = [
        dataclasses.replace(e, reason=f"{e.reason}; {reason}")
        if e.scheme and (reason := prepared.reasons.get(e.info.name))
        else e
        for e in plan.entries
    ]
    return dataclasses.replace(plan, entries=tuple(entries), warnings=(*plan.warnings, *prepared.warnings))


def modality_of(prepared: Prepared) -> dict[str, str]:
    """What an output says of the modality, and where that is from; nothing where there is nothing to be said."""
    found = prepared.modality
    return {} if found is None else {"modality": found.name or "unknown", "modality_from": found.why}


def decided(entry: Entry) -> list[str | None]:
    """What must be alike for a run to go on where another was interrupted."""
    diffusion = entry.diffusion
    if diffusion is None:
        return []
    return [diffusion.modality, diffusion.time_aware, diffusion.spatial, diffusion.activation_stats]


def write_activations(prepared: Prepared, output: Output) -> None:
    """Write the table of activation parameters, if there is one, as an Arrow IPC file of the output."""
    if prepared.activations is None:
        return
    metadata = {f"arrowquant.{key}": value for key, value in modality_of(prepared).items()}
    table = prepared.activations.replace_schema_metadata(metadata)
    path = str(output.path(output.activations))
    with target_errors(output.target), pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
