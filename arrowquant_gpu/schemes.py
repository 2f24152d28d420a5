"""What a quantization is: `Scheme`, a frozen value with one id, and the sizes that follow from it.

Bit pictures. A row of codes is one dense little-endian bit stream: code k of a row occupies bits k*bits ..
k*bits + bits - 1, bit 0 of the row being the lowest bit of its first byte. Each letter below is one bit, the highest
bit of a byte on the left; a is code 0, b is code 1, and so on. Every row starts on a byte; unused high bits of its
last byte are 0.

    int2  ddccbbaa
    int3  ccbbbaaa  feeedddc  hhhgggff
    int4  bbbbaaaa
    int5  bbbaaaaa  dcccccbb  eeeedddd  ggfffffe  hhhhhggg
    int6  bbaaaaaa  ccccbbbb  ddddddcc
    int8  aaaaaaaa
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import SchemeError
from .grids import GRIDS

BITS = (2, 3, 4, 5, 6, 8)
GRANULARITIES = ("group", "channel", "tensor", "block")
SCALE_SUFFIXES = {"float32": "", "float16": "_f16", "bfloat16": "_bf16"}
MAX_GROUP_SIZE = 1 << 20

_ID = re.compile(r"(int|affine|nf|fp|e)([0-9]+(?:m[0-9])?)_(?:([gb])([0-9]+)|(channel|tensor))(_asym)?(_f16|_bf16)?")
_GRAMMAR = (
    "A scheme is int{2,3,4,5,6,8}_{gN,channel,tensor}[_asym][_f16|_bf16], "
    "affine{2,3,4,5,6,8}_g{32,64,128}[_f16|_bf16], {nf4,fp4}_gN, "
    "{e4m3,e5m2}_{gN,channel,tensor,b128}[_f16|_bf16], or one of "
)


def rows_and_length(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape as (rows, row length): groups run along the last axis, and a 0-d tensor is one row of one.

    >>> rows_and_length((8, 64, 4096)), rows_and_length((10,)), rows_and_length(())
    ((512, 4096), (1, 10), (1, 1))
    """
    if not shape:
        return 1, 1
    return math.prod(shape[:-1]), shape[-1]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights become codes: the grid and its width, granularity, symmetry, and how the scales are stored.

    bits: of a code; follows from the grid, but for int and affine
    group_size: weights of a group, or the side of a square block
    scale_dtype: float32, float16 or bfloat16; e8m0 (a power of two) and e4m3 take a byte each
    grid: one of grids.GRIDS
    scale_rule: how an e8m0 scale is rounded (floor, round, ceil), and whether e4m3 scales have one float32 scale of the
        whole tensor above them (global) or not (local)

    >>> s = Scheme(bits=4, group_size=128)
    >>> s.id, Scheme.parse("int8_channel_asym_bf16").scale_dtype, Scheme.parse("nvfp4").group_size
    ('int4_g128', 'bfloat16', 16)

    Raises SchemeError for a combination that does not exist. Formulas: docs/numerics.md.
    """

    bits: int = 4
    granularity: str = "group"
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str = "float32"
    grid: str = "int"
    scale_rule: str = ""

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise SchemeError(f"grid {self.grid!r}: choose one of {', '.join(GRIDS)}")
        if GRIDS[self.grid].bits:
            object.__setattr__(self, "bits", GRIDS[self.grid].bits)
        elif self.bits not in BITS:
            raise SchemeError(f"{self.bits} bits: the supported widths are {', '.join(map(str, BITS))}")
        if self.granularity not in GRANULARITIES:
            raise SchemeError(f"granularity {self.granularity!r}: choose one of {', '.join(GRANULARITIES)}")
        if self.granularity in ("group", "block"):
            size = 128 if self.group_size is None else self.group_size
            if not 1 <= size <= MAX_GROUP_SIZE:
                raise SchemeError(f"group size {size}: it must be from 1 to {MAX_GROUP_SIZE}")
            object.__setattr__(self, "group_size", size)
        elif self.group_size is not None:
            raise SchemeError(f"group size {self.group_size} given for granularity {self.granularity!r}")
        if self.grid == "int" and self.scale_dtype not in SCALE_SUFFIXES:
            raise SchemeError(f"scale dtype {self.scale_dtype!r}: choose one of {', '.join(SCALE_SUFFIXES)}")
        if not self._exists():
            raise SchemeError(f"{self!r} does not exist. {_GRAMMAR}{', '.join(NAMED)}.")

    def _exists(self) -> bool:
        plain = self.scale_dtype in SCALE_SUFFIXES and not self.scale_rule
        if self.grid == "int":
            return plain and self.granularity != "block"
        if self.grid == "affine":
            return plain and self.granularity == "group" and not self.symmetric and self.group_size in (32, 64, 128)
        if not self.symmetric:
            return False
        if self.grid in ("nf4", "fp4"):
            return plain and self.granularity == "group" and self.scale_dtype == "float32"
        if self.grid in ("e4m3", "e5m2") and plain:
            return self.granularity != "block" or self.group_size == 128
        return self._fields() in NAMED.values()

    def _fields(self) -> tuple[str, int | None, str, str]:
        return self.grid, self.group_size, self.scale_dtype, self.scale_rule

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """The scheme with this id (a Scheme is returned as it is). Raises SchemeError with the grammar."""
        if isinstance(text, Scheme):
            return text
        if text in NAMED:
            grid, size, scale_dtype, rule = NAMED[text]
            return cls(granularity="group", group_size=size, scale_dtype=scale_dtype, grid=grid, scale_rule=rule)
        m = _ID.fullmatch(text)
        if m is None:
            raise SchemeError(f"{text!r} is not a scheme. {_GRAMMAR}{', '.join(NAMED)}. For example int4_g128, q4_k.")
        kind, width, shape, size_text, whole, asym, suffix = m.groups()
        grid = kind if kind in ("int", "affine") else kind + width
        scale_dtype = next(k for k, v in SCALE_SUFFIXES.items() if v == (suffix or ""))
        granularity = whole or ("block" if shape == "b" else "group")
        scheme = cls(
            int(width) if grid == kind and width.isdecimal() else 0 if grid == kind else 4,
            granularity,
            int(size_text) if size_text else None,
            asym is None and grid != "affine",
            scale_dtype,
            grid,
        )
        if scheme.id != text:
            raise SchemeError(f"{text!r} is not a scheme id; did you mean {scheme.id!r}?")
        return scheme

    @property
    def id(self) -> str:
        """The one name of this scheme, the same in code, metadata, files and on the command line."""
        named = _NAMES.get(self._fields())
        if named:
            return named
        kind = f"{self.grid}{self.bits}" if self.grid in ("int", "affine") else self.grid
        grain = {"group": f"g{self.group_size}", "block": f"b{self.group_size}"}.get(self.granularity, self.granularity)
        asym = "_asym" if self.grid == "int" and not self.symmetric else ""
        return f"{kind}_{grain}{asym}{SCALE_SUFFIXES[self.scale_dtype]}"

    def __str__(self) -> str:
        return self.id

    @property
    def family(self) -> str:
        """The family of its grid, see grids.py."""
        return GRIDS[self.grid].family

    @property
    def n_levels(self) -> int:
        """Number of steps between the lowest and the highest code: 2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def offset(self) -> int:
        """Stored code = signed code + offset, with offset = 2**(bits - 1)."""
        return 1 << (self.bits - 1)

    @property
    def needs_range(self) -> bool:
        """Whether the range of the whole tensor must be known before its first code."""
        return self.granularity == "tensor" or self.scale_rule == "global"

    @property
    def scale_storage(self) -> str:
        """The dtype of the array of scales: e8m0 and e4m3 scales are bytes."""
        return self.scale_dtype if self.scale_dtype in SCALE_SUFFIXES else "uint8"

    @property
    def zeros_dtype(self) -> str | None:
        """The dtype of what is stored beside the scales, None where nothing is.

        uint8 zero points (int, asymmetric), biases of the scales' dtype (affine), one float32 global scale (nvfp4).
        """
        if self.scale_rule == "global":
            return "float32"
        if self.symmetric:
            return None
        return self.scale_storage if self.grid == "affine" else "uint8"

    def group_length(self, length: int) -> int:
        """Weights in one full group of a row of `length`; a shorter tail group has its own scale."""
        return self.group_size if self.group_size is not None else max(length, 1)

    def row_bytes(self, length: int) -> int:
        """Bytes of the codes of `length` weights of a row that begin where a byte, or a ggml block, begins."""
        grid = GRIDS[self.grid]
        return -(-length // grid.block) * grid.block_bytes if grid.block else -(-length * self.bits // 8)

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the uint8 codes of a tensor: (rows, bytes of one row)."""
        rows, length = rows_and_length(shape)
        return rows, self.row_bytes(length)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the scales: (rows, groups of one row).

        Granularity tensor has one scale, shape (1, 1); granularity block one for each square of rows and columns. An
        empty tensor has none. ggml blocks hold their scales themselves: (rows, 0).
        """
        rows, length = rows_and_length(shape)
        if self.granularity == "tensor":
            return (1, 1) if rows and length else (0, 0)
        if GRIDS[self.grid].block:
            return rows, 0
        groups = -(-length // self.group_length(length))
        if self.granularity == "block" and self.group_size:
            return -(-rows // self.group_size), groups
        return rows, groups

    def zeros_shape(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Shape of what is stored beside the scales, None where nothing is: that of the scales, or (1, 1)."""
        if self.zeros_dtype is None:
            return None
        if self.scale_rule == "global":
            return (1, 1) if math.prod(shape) else (0, 0)
        return self.scales_shape(shape)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a tensor of this shape cannot have this scheme, a sentence; None where it can.

        >>> Scheme.parse("q4_k").misfit((8, 384))
        'rows of 384 weights are not whole blocks of 256, as q4_k needs'
        """
        length = rows_and_length(shape)[1]
        block = GRIDS[self.grid].block
        if block and length % block:
            return f"rows of {length} weights are not whole blocks of {block}, as {self.id} needs"
        if self.granularity == "block" and len(shape) > 2 and self.group_size and shape[-2] % self.group_size:
            return (
                f"matrices of {shape[-2]} rows are not whole blocks of {self.group_size}, as {self.id} needs in a stack"
            )
        return None

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes, scales, and what is stored beside them together."""
        packed, scales, zeros = self.packed_shape(shape), self.scales_shape(shape), self.zeros_shape(shape)
        n = math.prod(packed) + math.prod(scales) * _WIDTHS[self.scale_storage]
        return n + (math.prod(zeros) * _WIDTHS[self.zeros_dtype] if zeros and self.zeros_dtype else 0)


_WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}

# Schemes with a name of their own: (grid, group size, scale dtype, scale rule). The scales of ggml blocks are in them.
NAMED: dict[str, tuple[str, int | None, str, str]] = {
    "mxfp4": ("e2m1", 32, "e8m0", "floor"),
    "mxfp4_round": ("e2m1", 32, "e8m0", "round"),
    "mxfp4_ceil": ("e2m1", 32, "e8m0", "ceil"),
    "mxfp8": ("e4m3", 32, "e8m0", "floor"),
    "mxfp8_round": ("e4m3", 32, "e8m0", "round"),
    "mxfp8_ceil": ("e4m3", 32, "e8m0", "ceil"),
    "nvfp4": ("e2m1", 16, "e4m3", "global"),
    "nvfp4_local": ("e2m1", 16, "e4m3", "local"),
    **{name: (name, grid.block, "float16", "") for name, grid in GRIDS.items() if grid.block},
}
_NAMES = {fields: name for name, fields in NAMED.items()}
