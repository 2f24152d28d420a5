"""Time-aware: time steps in groups, each with its own scale and zero point for the ACTIVATIONS of a layer.

Weights do not change with the time step and have no part in this.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ..errors import InputError
from ..reference import scales_and_zeros
from ..schemes import Scheme
from .calibration import Activations, merged

COLUMNS = pa.schema(
    [
        pa.field("layer", pa.string(), nullable=False),
        pa.field("group", pa.int32(), nullable=False),
        pa.field("t_start", pa.int64(), nullable=False),
        pa.field("t_end", pa.int64(), nullable=False),
        pa.field("min", pa.float32()),
        pa.field("max", pa.float32()),
        pa.field("scale", pa.float32()),
        pa.field("zero_point", pa.uint8()),
        pa.field("bit_width", pa.uint8(), nullable=False),
    ]
)


class TimeGroup(NamedTuple):
    """Time steps t_start to t_end - 1 of one layer. What is None was not recorded: no row has such a time step.

    min, max: of the activations, float32
    scale, zero_point: an activation x has code clamp(rne(x / scale + zero_point)), from 0 to 2^bit_width - 1
    """

    group: int
    t_start: int
    t_end: int
    min: float | None
    max: float | None
    scale: float | None
    zero_point: int | None
    bit_width: int


def boundaries(n_timesteps: int, n_groups: int) -> list[int]:
    """First time steps of the groups, and at the end `n_timesteps`: i * n_timesteps // n_groups.

    Raises InputError where a group would be empty.

    >>> boundaries(10, 4)
    [0, 2, 5, 7, 10]
    """
    if not 1 <= n_groups <= n_timesteps:
        raise InputError(
            f"{n_groups} time groups of {n_timesteps} time steps: there are from 1 to {n_timesteps} groups; "
            f"choose --time-groups, or give --timesteps where the calibration has not all of them"
        )
    return [i * n_timesteps // n_groups for i in range(n_groups + 1)]


def time_groups(activations: Activations, n_timesteps: int, n_groups: int, bits: int) -> list[TimeGroup]:
    """The groups of one layer.

    Scale and zero point are those of docs/numerics.md, sections 3 to 5: asymmetric, float32, over min and max of the
    group and 0.

    >>> from .calibration import Extremes
    >>> recorded = Activations({0: Extremes(-1.0, 0.5, 1), 1: Extremes(0.0, 1.55, 1)})
    >>> [group.zero_point for group in time_groups(recorded, n_timesteps=4, n_groups=2, bits=8)]
    [100, None]
    """
    scheme, cuts, groups = Scheme(bits, "tensor", symmetric=False), boundaries(n_timesteps, n_groups), []
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        parts = [found for step, found in activations.steps.items() if start <= step < end]
        if not parts:
            groups.append(TimeGroup(i, start, end, None, None, None, None, bits))
            continue
        found = merged(parts)
        low, high = (np.full((1, 1), bound, np.float32) for bound in (min(found.low, 0.0), max(found.high, 0.0)))
        scales, zeros, _ = scales_and_zeros(low + np.float32(0), high + np.float32(0), scheme)
        assert zeros is not None
        groups.append(TimeGroup(i, start, end, found.low, found.high, float(scales[0, 0]), int(zeros[0, 0]), bits))
    return groups


def activation_table(groups: Mapping[str, Sequence[TimeGroup]]) -> pa.Table:
    """The groups of all layers, by tensor name, with the columns of `COLUMNS`."""
    rows = [{"layer": name, **group._asdict()} for name, of_layer in groups.items() for group in of_layer]
    return pa.Table.from_pylist(rows, COLUMNS)


def to_json(groups: Sequence[TimeGroup]) -> str:
    """The cell of one tensor in column time_aware_quant_json: a list of groups with the columns of the table."""
    floats = ("min", "max", "scale")
    rows = [
        {k: float(f"{v:.9g}") if k in floats and v is not None else v for k, v in group._asdict().items()}
        for group in groups
    ]
    return json.dumps({"n_timesteps": groups[-1].t_end, "groups": rows}, allow_nan=False)


def stats_json(activations: Activations) -> str:
    """The cell of one tensor in column activation_stats_json: min, max and n over all time steps.

    >>> from .calibration import Extremes
    >>> stats_json(Activations({0: Extremes(-1.0, 0.5, 1), 7: Extremes(0.0, 1.5, 3)}))
    '{"min": -1.0, "max": 1.5, "n": 4}'
    """
    whole = activations.whole
    return json.dumps({"min": float(f"{whole.low:.9g}"), "max": float(f"{whole.high:.9g}"), "n": whole.n})
