"""The scheme of a call, from a width and the options of the call and of its quantizer."""

from __future__ import annotations

import operator

from ..errors import SchemeError
from ..schemes import Scheme


class _Default(int):
    """A number that shows that the caller did not give it."""


# The width where none is given: 4, unless a scheme or a profile says otherwise.
BIT_WIDTH: int = _Default(4)
GROUP_SIZE = 128


def scheme_of(
    bit_width: int,
    *,
    scheme: str | Scheme | None = None,
    group_size: int | None = None,
    otherwise: Scheme | None = None,
    otherwise_group_size: int = GROUP_SIZE,
) -> Scheme:
    """int{bit_width}_g{group_size}_asym, or the scheme that is given; of the call, else of the quantizer (`otherwise`).

    >>> scheme_of(BIT_WIDTH).id, scheme_of(2, group_size=64).id, scheme_of(BIT_WIDTH, scheme="int8_channel").id
    ('int4_g128_asym', 'int2_g64_asym', 'int8_channel')

    Raises SchemeError for a scheme that does not exist, and where a width or a group size contradicts the scheme.
    """
    try:
        bits = operator.index(bit_width)
    except TypeError as e:
        raise SchemeError(f"bit_width {bit_width!r}: it must be a whole number") from e
    if isinstance(bit_width, bool):
        raise SchemeError(f"bit_width {bit_width!r}: it must be a whole number")
    if scheme is not None and group_size is not None:
        raise SchemeError(f"give scheme {scheme} or group_size {group_size}, not both")
    whole = Scheme.parse(scheme) if scheme is not None else otherwise if group_size is None else None
    if whole is None:
        return Scheme(bits, "group", otherwise_group_size if group_size is None else group_size, symmetric=False)
    if not isinstance(bit_width, _Default) and bits != whole.bits:
        raise SchemeError(f"bit_width {bits} and scheme {whole.id} contradict each other: give one of them")
    return whole
