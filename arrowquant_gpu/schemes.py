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

BITS = (2, 3, 4, 5, 6, 8)
GRANULARITIES = ("group", "channel", "tensor")
SCALE_SUFFIXES = {"float32": "", "float16": "_f16", "bfloat16": "_bf16"}
MAX_GROUP_SIZE = 1 << 20

_ID = re.compile(r"int([0-9]+)_(?:g([0-9]+)|(channel|tensor))(_asym)?(_f16|_bf16)?")


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
    """How weights become codes: width, granularity, symmetry, and the type the scales are stored in.

    >>> s = Scheme(bits=4, group_size=128)
    >>> s.id, Scheme.parse("int8_channel_asym_bf16").scale_dtype
    ('int4_g128', 'bfloat16')

    Raises SchemeError for a combination that does not exist. Formulas: docs/numerics.md.
    """

    bits: int = 4
    granularity: str = "group"
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise SchemeError(f"{self.bits} bits: the supported widths are {', '.join(map(str, BITS))}")
        if self.granularity not in GRANULARITIES:
            raise SchemeError(f"granularity {self.granularity!r}: choose one of {', '.join(GRANULARITIES)}")
        if self.granularity == "group":
            size = 128 if self.group_size is None else self.group_size
            if not 1 <= size <= MAX_GROUP_SIZE:
                raise SchemeError(f"group size {size}: it must be from 1 to {MAX_GROUP_SIZE}")
            object.__setattr__(self, "group_size", size)
        elif self.group_size is not None:
            raise SchemeError(f"group size {self.group_size} given for granularity {self.granularity!r}")
        if self.scale_dtype not in SCALE_SUFFIXES:
            raise SchemeError(f"scale dtype {self.scale_dtype!r}: choose one of {', '.join(SCALE_SUFFIXES)}")

    @classmethod
    def parse(cls, text: str | Scheme) -> Scheme:
        """The scheme with this id (a Scheme is returned as it is). Raises SchemeError with the grammar."""
        if isinstance(text, Scheme):
            return text
        m = _ID.fullmatch(text)
        if m is None:
            raise SchemeError(
                f"{text!r} is not a scheme. A scheme is int{{2,3,4,5,6,8}}_{{gN,channel,tensor}}[_asym][_f16|_bf16], "
                f"for example int4_g128, int4_g128_asym, int8_channel_bf16."
            )
        bits, size, whole, asym, suffix = m.groups()
        scale_dtype = next(k for k, v in SCALE_SUFFIXES.items() if v == (suffix or ""))
        scheme = cls(int(bits), whole or "group", int(size) if size else None, asym is None, scale_dtype)
        if scheme.id != text:
            raise SchemeError(f"{text!r} is not a scheme id; did you mean {scheme.id!r}?")
        return scheme

    @property
    def id(self) -> str:
        """The one name of this scheme, the same in code, metadata, files and on the command line."""
        grain = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        return f"int{self.bits}_{grain}{'' if self.symmetric else '_asym'}{SCALE_SUFFIXES[self.scale_dtype]}"

    def __str__(self) -> str:
        return self.id

    @property
    def n_levels(self) -> int:
        """Number of steps between the lowest and the highest code: 2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def offset(self) -> int:
        """Stored code = signed code + offset, with offset = 2**(bits - 1)."""
        return 1 << (self.bits - 1)

    def group_length(self, length: int) -> int:
        """Weights in one full group of a row of `length`; a shorter tail group has its own scale."""
        return self.group_size if self.group_size is not None else max(length, 1)

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the uint8 codes of a tensor: (rows, bytes of one row)."""
        rows, length = rows_and_length(shape)
        return rows, -(-length * self.bits // 8)

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Shape of the scales, and of the zero points of an asymmetric scheme: (rows, groups of one row).

        Granularity tensor has one scale, shape (1, 1). An empty tensor has none.
        """
        rows, length = rows_and_length(shape)
        if self.granularity == "tensor":
            return (1, 1) if rows and length else (0, 0)
        return rows, -(-length // self.group_length(length))

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes, scales and zero points together."""
        packed, scales = math.prod(self.packed_shape(shape)), math.prod(self.scales_shape(shape))
        scale_bytes = 4 if self.scale_dtype == "float32" else 2
        return packed + scales * (scale_bytes + (0 if self.symmetric else 1))
