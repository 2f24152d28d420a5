"""Profiles: the numbers of the table, in the package, in its page and on the command line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu.errors import SchemeError
from arrowquant_gpu.pipeline.profiles import PROFILES, profile

from .fixtures import write_safetensors
from .test_cli import document

PAGE = Path(__file__).parent.parent / "docs" / "widths.md"

# name: bits, group size, least accuracy, time groups, calibration samples
TABLE = {
    "edge": (2, 256, 0.65, 5, 32),
    "local": (4, 128, 0.85, 10, 128),
    "cloud": (8, 64, 0.95, 20, 512),
}


def test_the_table() -> None:
    assert {name: dataclasses.astuple(row)[1:] for name, row in PROFILES.items()} == TABLE
    assert [profile(name).name for name in TABLE] == list(TABLE)


@pytest.mark.parametrize(
    ("name", "scheme"), [*zip(TABLE, ["int2_g256_asym", "int4_g128_asym", "int8_g64_asym"], strict=True)]
)
def test_the_scheme_of_a_profile(name: str, scheme: str) -> None:
    assert profile(name).scheme.id == scheme


@pytest.mark.parametrize("name", ["", "Edge", "int4_g128", "edge "])
def test_an_unknown_profile_names_those_that_exist(name: str) -> None:
    with pytest.raises(SchemeError, match=f"profile {name!r}: choose one of edge, local, cloud"):
        profile(name)


def test_the_page_has_the_same_numbers() -> None:
    rows = re.findall(r"^\| ([a-z][^|]*?) \| (.*?) \| (.*?) \| (.*?) \|$", PAGE.read_text(), re.MULTILINE)
    found = {label.partition(",")[0]: values for label, *values in rows}
    keys = ("bits", "group size", "least accuracy", "time groups", "calibration samples")
    assert {key: [float(v) for v in found[key]] for key in keys} == {
        key: [row[i] for row in TABLE.values()] for i, key in enumerate(keys)
    }
    assert found["scheme"] == [f"`{profile(name).scheme.id}`" for name in TABLE]


@pytest.mark.parametrize("name", list(TABLE))
def test_a_profile_sets_scheme_and_least_accuracy(tmp_path: Path, name: str) -> None:
    """The same weights pass the profile itself, and are given more bits where more is asked for beside it."""
    weights = np.random.default_rng(1).standard_normal((16, 512), np.float32)
    source = write_safetensors(tmp_path / "m.safetensors", {"fc.weight": weights})
    (row,) = document("quantize", source, tmp_path / "out", "--profile", name, "--device", "cpu")["tensors"]
    assert row["scheme"] == profile(name).scheme.id
    assert row["accuracy"] > profile(name).min_accuracy
    least = {"edge": 0.98, "local": 0.999}.get(name)
    if least is not None:
        options = ("--profile", name, "--min-accuracy", least, "--device", "cpu", "--dry-run")
        (row,) = document("quantize", source, tmp_path / "more", *options)["tensors"]
        assert row["scheme"] == profile(name).scheme.id.replace(f"int{TABLE[name][0]}", f"int{2 * TABLE[name][0]}")
