"""`Task`: work that threads can share, and the modules that make it for each family of grids but int."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from ..schemes import Scheme


class Task(NamedTuple):
    """Work on so many units of `unit` weights: run(begin, end) does those from begin up to end.

    Of a quantizing task it returns (whether all weights are finite, number of scales that overflow, number of the first
    of these scales, row-major, or -1). Units begin where bytes of codes, and scales, begin: any thread may do any.
    """

    n_units: int
    unit: int
    run: Callable[[int, int], Any]


class Family(Protocol):
    """A module with the kernels of one family. Arguments are those of the methods of `Backend`; none is empty."""

    def coding(
        self,
        x: NDArray[Any],
        scheme: Scheme,
        packed: NDArray[Any],
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
        *,
        known: bool,
    ) -> Task:
        """Quantize; with `known` scales, write codes alone."""
        ...

    def decoding(
        self,
        packed: NDArray[Any],
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
        scheme: Scheme,
        out: NDArray[Any],
    ) -> Task:
        """Decode."""
        ...


MODULES = {"affine": ".cpu_affine", "float": ".cpu_floats", "ggml": ".cpu_ggml", "kquant": ".cpu_kquants"}


def family(name: str) -> Family:
    """The module of a family, imported when first asked for."""
    module: Any = importlib.import_module(MODULES[name], __package__)
    return module  # type: ignore[no-any-return]


def address(a: NDArray[Any] | None) -> int:
    """Where the first element is; 0 for None."""
    return 0 if a is None else a.__array_interface__["data"][0]
