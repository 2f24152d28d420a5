"""Groups of time steps: their boundaries, and their scales and zero points beside the formulas written out here."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu.diffusion.calibration import Activations, Extremes
from arrowquant_gpu.diffusion.time_aware import (
    COLUMNS,
    activation_table,
    boundaries,
    stats_json,
    time_groups,
    to_json,
)
from arrowquant_gpu.errors import InputError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.integers(1, 5000), st.data())
def test_boundaries_cut_all_time_steps(n_timesteps: int, data: st.DataObject) -> None:
    n_groups = data.draw(st.integers(1, n_timesteps))
    cuts = boundaries(n_timesteps, n_groups)
    assert cuts == [math.floor(i * n_timesteps / n_groups + 1e-9) for i in range(n_groups + 1)]
    sizes = [b - a for a, b in itertools.pairwise(cuts)]
    assert sum(sizes) == n_timesteps
    assert 1 <= min(sizes) <= max(sizes) <= min(sizes) + 1


@pytest.mark.parametrize(("n_timesteps", "n_groups"), [(4, 5), (1, 0), (3, -1)])
def test_no_group_is_empty(n_timesteps: int, n_groups: int) -> None:
    with pytest.raises(InputError, match=f"{n_groups} time groups of {n_timesteps} time steps"):
        boundaries(n_timesteps, n_groups)


def expected(low: float, high: float, bits: int) -> tuple[np.float32, int]:
    """docs/numerics.md, sections 3 to 5, line by line; every operation in float32."""
    f, levels, offset = np.float32, 2**bits - 1, 2 ** (bits - 1)
    lo, hi = f(min(f(0), f(low))) + f(0), f(max(f(0), f(high))) + f(0)
    if lo == hi == 0:
        return f(2.0**-23), 0
    with np.errstate(over="ignore"):
        span = hi - lo
    scale = (hi / f(2) - lo / f(2)) / f(levels / 2) if np.isinf(span) else span / f(levels)
    scale = scale if scale else f(2.0**-149)
    signed = np.rint(f(-offset) - lo / scale)
    return scale, int(min(offset - 1, max(-offset, signed))) + offset


@given(FLOATS, FLOATS, st.sampled_from([2, 3, 4, 5, 6, 8]))
def test_scale_and_zero_point(a: float, b: float, bits: int) -> None:
    low, high = min(a, b), max(a, b)
    (group,) = time_groups(Activations({0: Extremes(low, high, 1)}), 1, 1, bits)
    scale, zero_point = expected(low, high, bits)
    assert (group.min, group.max, group.bit_width) == (low, high, bits)
    assert np.float32(group.scale) == scale
    assert group.zero_point == zero_point


@given(FLOATS, FLOATS)
def test_codes_of_activations_are_within_a_step(a: float, b: float) -> None:
    """What scale and zero point are for: 0, both extremes and what lies between come back."""
    low, high = min(a, b), max(a, b)
    (group,) = time_groups(Activations({0: Extremes(low, high, 1)}), 1, 1, 8)
    assert group.scale is not None
    assert group.zero_point is not None
    x = np.array([0.0, low, high, low / 2 + high / 2])
    code = np.clip(np.rint(x / group.scale + group.zero_point), 0, 255)
    back = (code - group.zero_point) * group.scale
    assert back[0] == 0
    # Half a step of the code, half of the zero point, and what the smallest float32 scale is off.
    assert (np.abs(back - x) <= 1.01 * group.scale + 256 * 2.0**-149).all()


def test_groups_take_their_own_steps_and_say_where_there_is_nothing() -> None:
    steps = {0: Extremes(-1.0, 1.0, 1), 4: Extremes(0.5, 3.0, 2), 5: Extremes(-0.5, 2.0, 1), 19: Extremes(4.0, 9.0, 1)}
    groups = time_groups(Activations(steps), 20, 4, 8)
    assert [(g.group, g.t_start, g.t_end, g.min, g.max) for g in groups] == [
        (0, 0, 5, -1.0, 3.0),
        (1, 5, 10, -0.5, 2.0),
        (2, 10, 15, None, None),
        (3, 15, 20, 4.0, 9.0),
    ]
    assert (groups[2].scale, groups[2].zero_point) == (None, None)
    # Zero is always in the range.
    assert groups[3].scale == float(np.float32(9) / np.float32(255))
    assert groups[3].zero_point == 0


def test_the_table_and_the_json_hold_the_same() -> None:
    groups = {
        "a.weight": time_groups(Activations({0: Extremes(-0.1, 0.7, 1)}), 3, 2, 8),
        "b.weight": time_groups(Activations({2: Extremes(0.0, 1e-30, 1)}), 3, 2, 4),
    }
    table = activation_table(groups)
    assert table.schema.equals(COLUMNS)
    assert table["layer"].to_pylist() == ["a.weight", "a.weight", "b.weight", "b.weight"]
    said = [group for name in groups for group in json.loads(to_json(groups[name]))["groups"]]
    for row, group in zip(table.to_pylist(), said, strict=True):
        for key, value in group.items():
            same = value is None or np.float32(value) == np.float32(row[key])
            assert same if key in ("min", "max", "scale") else value == row[key]
        assert row.keys() - {"layer"} == group.keys()
    assert json.loads(to_json(groups["a.weight"]))["n_timesteps"] == 3


@given(FLOATS, FLOATS)
def test_stats_keep_every_float32(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    said = json.loads(stats_json(Activations({0: Extremes(low, high, 2), 3: Extremes(low, low, 5)})))
    assert (np.float32(said["min"]), np.float32(said["max"]), said["n"]) == (np.float32(low), np.float32(high), 7)
