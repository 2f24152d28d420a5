"""`Launch`: a kernel with its grid and arguments, and the modules that make it for each family of grids but int."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from ..schemes import Scheme
from . import variants
from .variants import Variant

BLOCK = 256  # threads of a block, as in kernels/common.cuh
SCALE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # as in kernels/codes.cuh


class Launch(NamedTuple):
    """A kernel over `n_units` units of work, `units_per_block` of them in a block of 256 threads; it loops where the
    grid is smaller. Arguments are device arrays, None, and NumPy scalars of exactly the kernel's types.
    """

    variant: Variant
    n_units: int
    units_per_block: int
    args: tuple[Any, ...]


class Family(Protocol):
    """A module for one family. Arguments are those of the methods of `Backend`, device arrays; none is empty."""

    def quantize(self, x: Any, scheme: Scheme, packed: Any, scales: Any, zeros: Any | None, counters: Any) -> Launch:
        """Scales and codes in one pass; what is found is added to `counters` (kernels/common.cuh)."""
        ...

    def encode(self, x: Any, scheme: Scheme, scales: Any, zeros: Any | None, packed: Any) -> Launch:
        """Codes with a known scale, for granularity tensor."""
        ...

    def dequantize(self, packed: Any, scales: Any, zeros: Any | None, scheme: Scheme, out: Any) -> Launch: ...

    def every(self) -> Iterator[Variant]:
        """All variants of the kernels of this family, each once."""
        ...


MODULES = {
    "affine": ".launch_affine",
    "float": ".launch_floats",
    "ggml": ".launch_ggml",
    "kquant": ".launch_kquants",
}


def family(name: str) -> Family:
    """The module of a family, imported when first asked for."""
    module: Any = importlib.import_module(MODULES[name], __package__)
    return module  # type: ignore[no-any-return]


def every() -> Iterator[Variant]:
    """All variants of the kernels of all families, each once."""
    yield from variants.every()
    for name in MODULES:
        yield from family(name).every()
