"""Hostile safetensors headers: every one a typed error or truly valid, every error code reached, the parser covered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arrowquant_gpu.errors import HeaderError
from arrowquant_gpu.formats.safetensors import HeaderCode, read_header

from . import hostile
from .hostile_files import MUTATORS


def check(figures: dict[str, Any]) -> None:
    assert figures["n_failures"] == 0, "\n".join(figures["failures"])
    assert figures["codes_not_reached"] == []
    assert figures["n_mutated_fields"] * 2 >= figures["n"]
    assert set(MUTATORS) <= set(figures["cases"])
    assert figures["codes"][hostile.VALID] * 50 >= figures["n"], "too few cases stay valid to compare with the library"
    assert figures["coverage"]["branch_percent"] >= 95, figures["coverage"]


def test_sample_of_hostile_headers() -> None:
    check(hostile.run_soak(1000, 20261121))


@pytest.mark.soak
def test_hostile_headers(record_property: Callable[[str, object], None]) -> None:
    figures = hostile.run_soak(10_000, 1)
    for key, value in figures.items():
        record_property(key, value)
    check(figures)


def _no_size(path: Path) -> Any:
    try:
        return read_header(path)
    except HeaderError as e:
        if e.code == HeaderCode.SIZE:
            raise HeaderError(str(e), HeaderCode.SHAPE) from e
        raise


def _crashes(path: Path) -> Any:
    try:
        return read_header(path)
    except HeaderError as e:
        raise KeyError("dtype") from e


def _accepts_all(path: Path) -> Any:
    return replace(_valid(path), tensors={})


def _valid(path: Path) -> Any:
    other = path.with_suffix(".other")
    other.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return read_header(other)


def _refuses_all(path: Path) -> Any:
    raise HeaderError(f"{path}: no", HeaderCode.SIZE)


def _without_file(path: Path) -> Any:
    try:
        return read_header(path)
    except HeaderError as e:
        raise HeaderError("no", e.code) from e


def _moves_bytes(path: Path) -> Any:
    header = read_header(path)
    return replace(header, tensors={n: replace(t, offset=t.offset - 1) for n, t in header.tensors.items()})


@pytest.mark.parametrize("faulty", [_no_size, _crashes, _accepts_all, _refuses_all, _without_file, _moves_bytes])
def test_planted_faults_are_noticed(faulty: Callable[[Path], Any], tmp_path: Path) -> None:
    noticed = 0
    for case in hostile.cases(150, 3):
        if case.label == "too_many":
            continue
        try:
            hostile.judge(case, tmp_path / "x.safetensors", faulty)
        except AssertionError:
            noticed += 1
    assert noticed
