"""`Variant`: one source file compiled with one set of macros; and which there are of family int.

A macro has the name of a scheme field in upper case. `GROUP` is a group length that the kernel holds in registers, or
0 for any other; the type in which scales are stored is an argument of the kernels and no macro.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ..dtypes import KERNEL_DTYPES
from ..schemes import BITS

C_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
GROUPS = (16, 32, 64, 128, 256)
SOLVERS = ("minmax",)


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel: the stem of its source file, which is also its entry point, and its macros in a fixed order."""

    source: str
    macros: tuple[tuple[str, str], ...]

    @property
    def defines(self) -> dict[str, str]:
        return dict(self.macros)

    def __str__(self) -> str:
        return " ".join([self.source, *(f"{name}={value}" for name, value in self.macros)])


def variant(source: str, **macros: str | int) -> Variant:
    """A variant by its file and macros."""
    return Variant(source, tuple((name, str(value)) for name, value in macros.items()))


def quantize(bits: int, symmetric: bool, dtype: str, group: int, solver: str = "minmax") -> Variant:
    """The kernel that decides scales and encodes, for groups of `group` weights of a kernel dtype.

    >>> str(quantize(4, True, "bfloat16", 128))
    'quantize BITS=4 SYMMETRIC=1 IN_T=__nv_bfloat16 GROUP=128 SOLVER=minmax'
    >>> str(quantize(4, True, "bfloat16", 100))
    'quantize BITS=4 SYMMETRIC=1 IN_T=__nv_bfloat16 GROUP=0 SOLVER=minmax'
    """
    held = group if group in GROUPS else 0
    return variant("quantize", BITS=bits, SYMMETRIC=int(symmetric), IN_T=C_TYPES[dtype], GROUP=held, SOLVER=solver)


def encode(bits: int, symmetric: bool, dtype: str) -> Variant:
    """The kernel that encodes with scales in memory, for groups of any length."""
    return quantize(bits, symmetric, dtype, 0, "given")


def value_range(dtype: str) -> Variant:
    """The kernel that finds the range of a whole tensor."""
    return variant("value_range", IN_T=C_TYPES[dtype])


def dequantize(bits: int, symmetric: bool, dtype: str) -> Variant:
    """The kernel that decodes to a kernel dtype, for groups of any length."""
    return variant("dequantize", BITS=bits, SYMMETRIC=int(symmetric), OUT_T=C_TYPES[dtype])


def every() -> Iterator[Variant]:
    """All variants of the kernels of family int, each once; launches.py has those of all families."""
    for bits, symmetric, dtype in itertools.product(BITS, (True, False), KERNEL_DTYPES):
        for group, solver in itertools.product((*GROUPS, 0), SOLVERS):
            yield quantize(bits, symmetric, dtype, group, solver)
        yield encode(bits, symmetric, dtype)
        yield dequantize(bits, symmetric, dtype)
    for dtype in KERNEL_DTYPES:
        yield value_range(dtype)
