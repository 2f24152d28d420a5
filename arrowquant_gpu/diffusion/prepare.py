"""`prepare`: a plan with what is known of a diffusion model: its modality, and what calibration gives each layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from ..errors import FormatError, InputError
from ..formats import Checkpoint, Diffusion, Entry
from ..formats.diffusion_columns import to_json as spatial_json
from ..schemes import BITS
from .calibration import Activations, Calibration, read_calibration
from .modality import MODALITIES, Modality, detect
from .spatial import equalize
from .time_aware import TimeGroup, activation_table, boundaries, stats_json, time_groups
from .time_aware import to_json as time_aware_json

STRATEGIES = {"text": "time-aware", "code": "time-aware", "image": "spatial", "audio": "spatial"}
EQUALIZED = "columns equalized by calibration"
# Formats whose readers would not multiply by divisors.
WITHOUT_DIVISORS = ("compressed-tensors",)


@dataclass(frozen=True, slots=True)
class DiffusionOptions:
    """What `quantize_checkpoint` does for diffusion models; docs/diffusion.md.

    modality: text, code, image or audio; by default what the checkpoint says of itself
    calibration: a file of activations, JSON lines, Parquet or Arrow
    time_groups: groups that the time steps are cut into
    n_timesteps: of the model; by default as many as the calibration has
    calibration_samples: used for each layer and time step, the first ones
    activation_bits: width of activation codes that scales and zero points are given for
    smoothing: alpha in x * (1 - alpha) + mean * alpha, from 0 (activations as they are) to 1 (their mean)

    Raises InputError for a value out of range.
    """

    modality: str | None = None
    calibration: str | Path | None = None
    time_groups: int = 10
    n_timesteps: int | None = None
    calibration_samples: int = 128
    activation_bits: int = 8
    smoothing: float = 0.5

    def __post_init__(self) -> None:
        if self.modality is not None and self.modality not in MODALITIES:
            raise InputError(f"modality {self.modality!r}: choose one of {', '.join(MODALITIES)}")
        for what, value in (
            ("time_groups", self.time_groups),
            ("n_timesteps", self.n_timesteps),
            ("calibration_samples", self.calibration_samples),
        ):
            if value is not None and value < 1:
                raise InputError(f"{what} {value}: at least 1 is needed")
        if self.activation_bits not in BITS:
            raise InputError(f"activation_bits {self.activation_bits}: choose one of {', '.join(map(str, BITS))}")
        if not (math.isfinite(self.smoothing) and 0 <= self.smoothing <= 1):
            raise InputError(f"smoothing {self.smoothing}: it is from 0 to 1")


class Prepared(NamedTuple):
    """entries: those of the plan, of a diffusion model with `diffusion`; activations: the table of time_aware.py, if
    there is one; modality: None where nothing is to be said of it; reasons: what calibration does to the weights of a
    tensor, by name; warnings: sentences."""

    entries: tuple[Entry, ...]
    activations: pa.Table | None
    modality: Modality | None
    reasons: Mapping[str, str]
    warnings: tuple[str, ...]


def prepare(
    entries: Sequence[Entry], source: Checkpoint, options: DiffusionOptions | None, format_name: str
) -> Prepared:
    """Add to planned entries what their modality calls for: time-aware for text and code, spatial for image and audio.

    Without options, only models that say of themselves that they are diffusion models are touched. Spatial calibration
    reads the weights once, to find the largest of each column; everything else reads headers.

    Raises InputError and SourceError for a calibration that cannot be used, and FormatError where it equalizes columns
    and format `format_name` cannot carry that.
    """
    found = detect(source, None if options is None else options.modality)
    if options is None and not found.is_diffusion:
        return Prepared(tuple(entries), None, None, {}, ())
    options = options or DiffusionOptions()
    warnings: list[str] = []
    if found.name is None:
        warnings.append(
            f"the modality of {source.path.name} is not known ({found.why}): neither time-aware nor spatial; weights "
            f"are quantized per group. Choose one with modality (--modality)."
        )
        if options.calibration is not None:
            raise InputError(f"{options.calibration}: calibration is of use for a known modality only. {warnings[0]}")
        return Prepared(tuple(entries), None, found, {}, tuple(warnings))
    is_spatial = STRATEGIES[found.name] == "spatial"
    quantized = {e.info.name for e in entries if e.scheme}
    calibration = None
    if options.calibration is not None:
        calibration = read_calibration(
            options.calibration,
            quantized,
            n_timesteps=options.n_timesteps,
            n_samples=options.calibration_samples,
        )
        warnings += _unmatched(options.calibration, calibration, quantized)
        has_channels = any(activations.absmax is not None for activations in calibration.layers.values())
        if is_spatial and has_channels and format_name in WITHOUT_DIVISORS:
            raise FormatError(
                f"{format_name} cannot carry the divisors that {options.calibration} gives a model of modality "
                f"{found.name}: its readers would not multiply by them. Choose --format parquet, parquet-tensors or "
                f"arrow, or leave --calibration out."
            )
    elif is_spatial:
        warnings.append(
            f"{found.name} model ({found.why}), and no calibration data: weights are quantized per group, columns are "
            f"not equalized. Give activations with calibration (--calibration)."
        )
    else:
        warnings.append(
            f"{found.name} model ({found.why}), and no calibration data: no activation parameters are stored. The "
            f"weights are the same for all time steps. Give activations with calibration (--calibration)."
        )
    groups = {} if calibration is None or is_spatial else _groups(calibration, entries, options)
    table = activation_table(groups) if groups else None
    if not (found.is_diffusion or calibration is not None):
        return Prepared(tuple(entries), table, found, {}, tuple(warnings))
    prepared, reasons = [], dict[str, str]()
    for entry in entries:
        diffusion = Diffusion(found.name)
        if entry.scheme is not None:
            activations = None if calibration is None else calibration.layers.get(entry.info.name)
            diffusion = _of_activations(diffusion, activations, groups.get(entry.info.name))
            if is_spatial:
                spatial = equalize(source, entry.info, activations, options.smoothing)
                diffusion = dataclasses.replace(diffusion, divisors=spatial.divisors, spatial=spatial_json(spatial))
                if calibration is not None:
                    reasons[entry.info.name] = EQUALIZED if spatial.divisors is not None else spatial.reason or ""
        prepared.append(dataclasses.replace(entry, diffusion=diffusion))
    return Prepared(tuple(prepared), table, found, reasons, tuple(warnings))


def _groups(
    calibration: Calibration, entries: Sequence[Entry], options: DiffusionOptions
) -> dict[str, list[TimeGroup]]:
    """The time groups of each layer, in the order of the plan."""
    boundaries(calibration.n_timesteps, options.time_groups)
    return {
        e.info.name: time_groups(
            calibration.layers[e.info.name], calibration.n_timesteps, options.time_groups, options.activation_bits
        )
        for e in entries
        if e.info.name in calibration.layers
    }


def _of_activations(
    diffusion: Diffusion, activations: Activations | None, groups: Sequence[TimeGroup] | None
) -> Diffusion:
    """With what calibration says of the layer's inputs."""
    return dataclasses.replace(
        diffusion,
        activation_stats=None if activations is None else stats_json(activations),
        time_aware=None if groups is None else time_aware_json(groups),
    )


def _unmatched(path: str | Path, calibration: Calibration, quantized: set[str]) -> list[str]:
    """Warnings for layers that only one side has."""
    warnings = []
    if calibration.unknown:
        warnings.append(
            f"{path}: {len(calibration.unknown)} of its layers are no tensors that are quantized, and left out: "
            f"{', '.join(calibration.unknown)}."
        )
    if missing := sorted(quantized - calibration.layers.keys()):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        warnings.append(f"{path}: it has nothing for {', '.join(missing[:3])}{more}.")
    return warnings
