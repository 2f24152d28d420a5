"""The table of number grids: what values codes stand for, and how many bits and bytes they take. docs/grids.md.

A grid is of one family, and a family is one set of formulas, with one module in the reference and in each backend:

    int     whole numbers times a scale, with or without a zero point
    affine  whole numbers times a scale plus a bias, as MLX has them
    float   a table of values, or a small floating-point type, times a scale
    ggml    blocks of bytes that hold codes and scales together, as ggml and GGUF define them
    kquant  such blocks of 256 weights, whose scales are quantized too and searched for
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Grid(NamedTuple):
    """One grid. `bits` of a code; 0 where the scheme chooses. A ggml block of `block` weights takes `block_bytes`."""

    family: str
    bits: int = 0
    block: int = 0
    block_bytes: int = 0


GRIDS: Mapping[str, Grid] = {
    "int": Grid("int"),
    "affine": Grid("affine"),
    # bitsandbytes: 16 values from -1 to 1.
    "nf4": Grid("float", 4),
    "fp4": Grid("float", 4),
    # OCP: sign, exponent and mantissa bits.
    "e2m1": Grid("float", 4),
    "e4m3": Grid("float", 8),
    "e5m2": Grid("float", 8),
    # ggml's types of no blocks: each weight by itself.
    "f16": Grid("ggml", 16, 1, 2),
    "bf16": Grid("ggml", 16, 1, 2),
    "q8_0": Grid("ggml", 8, 32, 34),
    "q4_0": Grid("ggml", 4, 32, 18),
    "q4_1": Grid("ggml", 4, 32, 20),
    "q5_0": Grid("ggml", 5, 32, 22),
    "q5_1": Grid("ggml", 5, 32, 24),
    "iq4_nl": Grid("ggml", 4, 32, 18),
    # ggml rounds and lays out these two in its own way.
    "ggml_mxfp4": Grid("ggml", 4, 32, 17),
    "ggml_nvfp4": Grid("ggml", 4, 64, 36),
    "q2_k": Grid("kquant", 2, 256, 84),
    "q3_k": Grid("kquant", 3, 256, 110),
    "q4_k": Grid("kquant", 4, 256, 144),
    "q5_k": Grid("kquant", 5, 256, 176),
    "q6_k": Grid("kquant", 6, 256, 210),
}
