"""The quotient sequence of the CUDA kernels, tried where a wrong quotient could change a code (docs/kernels.md)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("quotient.cpp")
CORRECTION = "__builtin_fmaf(__builtin_fmaf(-q0, s, x), r, q0)"
SIGNIFICANDS = 1 << 23  # of scales in [1, 2)

Count = Callable[[int, int, int], tuple[int, int]]

pytestmark = pytest.mark.compiler


def compiled(source: str, folder: Path) -> Count:
    """A function of (first, last, stride) of the scale's significands: quotients tried, and how many were wrong."""
    program, text = folder / "quotient", folder / "quotient.cpp"
    text.write_text(source)
    flags = ["-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["g++", *flags, str(text), "-o", str(program)], check=True)

    def count(first: int, last: int, stride: int) -> tuple[int, int]:
        command = [str(program), str(first), str(last), str(stride)]
        n_quotients, n_wrong = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return int(n_quotients), int(n_wrong)

    return count


@pytest.fixture(scope="module")
def count(tmp_path_factory: pytest.TempPathFactory) -> Count:
    return compiled(SOURCE.read_text(), tmp_path_factory.mktemp("quotient"))


def test_quotients_are_exact_around_half_integers(count: Count) -> None:
    """All over the significands of the scale, and all of those next to 1 and 2, where the reciprocal is least exact."""
    for part in ((0, SIGNIFICANDS, 4099), (0, 2048, 1), (SIGNIFICANDS - 2048, SIGNIFICANDS, 1)):
        n_quotients, n_wrong = count(*part)
        assert n_quotients > 10**7
        assert n_wrong == 0


def test_the_product_alone_is_not_exact(tmp_path: Path) -> None:
    source = SOURCE.read_text()
    assert CORRECTION in source
    assert compiled(source.replace(CORRECTION, "q0"), tmp_path)(0, SIGNIFICANDS, 65537)[1] > 0


@pytest.mark.soak
def test_quotients_are_exact_for_every_scale(count: Count, record_property: Callable[[str, object], None]) -> None:
    n_quotients, n_wrong = count(0, SIGNIFICANDS, 1)
    record_property("quotients", n_quotients)
    assert n_wrong == 0
